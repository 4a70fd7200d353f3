"""A Hugging Face model folder around weights: whole or not at all, with its config and tokenizer."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ssrctl.checkpoints.files import check_link
from ssrctl.errors import UserError
from ssrctl.io.files import part_folder, remove_parts_of_dead_processes, write_text

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
# Config, generation config, tokenizer files of every kind, chat templates, code of models that bring their own.
_KEPT_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}
_KEPT_NAMES = {"LICENSE", "NOTICE"}
_KEPT_FOLDERS = ("additional_chat_templates",)
_DTYPE_KEYS = ("dtype", "torch_dtype")  # the second is the name before transformers 5


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to ``path``; on success it takes ``path``'s place, on any exception it is removed.

    Temporary folders of processes that were killed while they wrote ``path`` are removed first.

    Raises:
        UserError: ``path`` exists and is not an empty folder, or its parent cannot be written to.
    """
    check_free(path)
    target = path.resolve()
    with contextlib.ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_parts_of_dead_processes(target.parent, target.name)
            temporary = stack.enter_context(part_folder(target))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}", "choose a folder you can write to") from error
        yield temporary
        temporary.replace(target)


def check_free(path: Path) -> None:
    """Check that a folder can be made at ``path``: nothing there, or an empty folder.

    Raises:
        UserError: there is something.
    """
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{path} exists and is not a folder", "name another folder")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path} is not empty", "name another folder, or remove that one first")


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy the files that belong to a model besides its weights; links within the hub's cache are followed.

    The model card stays behind, since it describes the base.

    Returns:
        The copied names, sorted.

    Raises:
        UserError: a link that leads out of the folder.
    """
    kept = [
        one
        for one in source.iterdir()
        if one.is_file()
        and not one.name.startswith(".")
        and not one.name.endswith(".index.json")
        and (one.suffix in _KEPT_SUFFIXES or one.stem in _KEPT_NAMES)
    ]
    kept += [one for name in _KEPT_FOLDERS if (source / name).is_dir() for one in (source / name).iterdir()]
    names = []
    for one in sorted(kept):
        check_link(source, str(one.relative_to(source)))
        name = one.relative_to(source)
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(one, target / name)
        names.append(name.as_posix())
    return names


def set_config_dtype(folder: Path, dtype: torch.dtype) -> bool:
    """Make config.json ask for ``dtype`` if it asks for another; returns whether it was changed.

    Otherwise transformers would round the weights to what the config says as it loads them. A config that asks
    for nothing is left as it is: then the weights' own dtype counts.

    Raises:
        UserError: config.json is not a json object.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        present = [key for key in _DTYPE_KEYS if config.get(key) is not None]
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{CONFIG} of the base is not a json object: {error}", "fix or copy it again") from error
    wanted = str(dtype).removeprefix("torch.")
    if all(config[key] == wanted for key in present):
        return False
    config |= dict.fromkeys(present, wanted)
    write_text(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return True
