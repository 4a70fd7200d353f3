"""The files of a checkpoint: one safetensors file, or shards with an index."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from ssrctl.checkpoints.header import MAX_HEADER_BYTES, read_header
from ssrctl.errors import UserError
from ssrctl.io.files import existing_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_ADAPTER = re.compile(r"(^|\.)lora_(A|B|embedding_A|embedding_B)(\.|$)")
_MERGE = "merge it first (peft: merge_and_unload, then save_pretrained)"
_FROM_GGUF = "convert it: from_pretrained(FOLDER, gguf_file=NAME), then save_pretrained writes safetensors"
_CONVERT = "if you trust it, convert it: from_pretrained, then save_pretrained writes safetensors"


def tiny_location() -> Path:
    """Return the folder of the bundled model."""
    from ssrctl import tiny_reasoner

    return tiny_reasoner.path()


def locate(place: Path) -> dict[str, Path]:
    """Return {tensor name: file}; ``{"": file}`` for a single file, whose names come from its header.

    A file that is named itself may lie anywhere. Files of a folder that are links must stay in it, or in the
    hub's cache that the folder is part of.

    Raises:
        UserError: nothing there, an adapter, no safetensors in the folder, a shard that is missing or lies outside.
    """
    if not os.path.exists(place):  # noqa: PTH110 (Path.exists raises for names that are too long)
        raise UserError(
            f"checkpoint not found: {place}",
            "give a local folder or safetensors file; `hf download` fetches a model from the hub",
        )
    if place.is_file():
        if place.suffix == ".gguf":
            raise UserError(f"{place} is a GGUF file, which only `diagnose` reads, as TUNED", _FROM_GGUF)
        if place.suffix in _PICKLES:
            raise UserError(f"{place} is a pickle, which may run code when it is loaded and is not read", _CONVERT)
        return {"": place}
    if (place / "adapter_config.json").exists():
        raise UserError(f"{place} is a LoRA adapter, not a model", _MERGE)
    if (place / SINGLE).exists() or (place / SINGLE).is_symlink():
        check_link(place, SINGLE)
        return {"": existing_file(place / SINGLE, "model file")}
    if (place / INDEX).exists():
        check_link(place, INDEX)
        return dict(_indexed(place))
    raise _nothing_to_read(place)


def check_folder(folder: Path) -> None:
    """Check that a model folder has whole safetensors, and that no file in it is a link that leads out of it.

    Raises:
        UserError: see ``locate`` and ``read_header``; or a config or tokenizer file that is such a link.
    """
    check_links(folder)
    for file in sorted(set(locate(folder).values())):
        read_header(file)


def check_links(folder: Path) -> None:
    """Refuse a folder of which a file or sub-folder is a link that leads out of it; hidden ones are not read.

    Raises:
        UserError: there is one.
    """
    for one in sorted(folder.iterdir()):
        if one.is_symlink() and not one.name.startswith("."):
            check_link(folder, one.name)


def refuse_adapter(file: Path, names: Collection[str]) -> None:
    """Refuse a file whose tensors are those of a LoRA adapter.

    Raises:
        UserError: it is one.
    """
    found = sorted(name for name in names if _ADAPTER.search(name))
    if found:
        raise UserError(
            f"{file} is a LoRA adapter, not a model: it holds {len(found)} tensors like {found[0]!a}", _MERGE
        )


def _nothing_to_read(place: Path) -> UserError:
    others = sorted(one.name for one in place.iterdir() if one.suffix in (*_PICKLES, ".gguf", ".safetensors"))
    message = f"{place}: neither {SINGLE} nor {INDEX} in it" + (f", but {', '.join(others[:3])}" if others else "")
    if any(name.endswith(".safetensors") for name in others):
        return UserError(message, "name the .safetensors file itself")
    if any(name.endswith(".gguf") for name in others):
        return UserError(message, _FROM_GGUF)
    if any(name.endswith(_PICKLES) for name in others):
        return UserError(f"{message}: pickles may run code when they are loaded and are not read", _CONVERT)
    return UserError(message, "give a model folder saved with save_pretrained (safetensors)")


def check_link(folder: Path, name: str) -> None:
    """Refuse a link that leads out of the model's folder; the hub's cache links to its own blobs."""
    # Path.resolve raises for links in a circle.
    target, home = Path(os.path.realpath(folder / name)), folder.resolve()
    inside = target.is_relative_to(home)
    cached = home.parent.name == "snapshots" and target.is_relative_to(home.parent.parent / "blobs")
    if not (inside or cached):
        raise UserError(
            f"{folder / name} is a link that leads out of the model's folder",
            "copy the file into the folder, or name the file that it leads to",
        )


def _read_index(index: Path) -> dict[str, str]:
    """Read the index's map from tensor to shard."""
    try:
        if (size := index.stat().st_size) > MAX_HEADER_BYTES:
            raise ValueError(f"{size:,} bytes, at most {MAX_HEADER_BYTES:,} are read")
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError("its weight_map does not name a file for each tensor")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{index}: not an index of shards: {error}", "copy the model again") from error
    return weight_map


def _indexed(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the (tensor name, shard) pairs of a sharded model, every shard checked to be there."""
    index = folder / INDEX
    weight_map = _read_index(index)
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        posix, windows = PurePosixPath(shard), PureWindowsPath(shard)
        if posix.is_absolute() or windows.anchor or ".." in (*posix.parts, *windows.parts):
            raise UserError(f"{index}: shard {shard!r} lies outside of the model's folder", "do not use this model")
    # Path.is_file raises for names that are too long.
    missing = [shard for shard in shards if not os.path.isfile(folder / shard)]  # noqa: PTH113
    if missing:
        shown = (missing[0] if missing[0].isprintable() else ascii(missing[0]))[:200]
        raise UserError(
            f"{index}: shard {shown} is missing ({len(missing)} of {len(shards)} shards are)",
            "download or copy the model again",
        )
    for shard in shards:
        check_link(folder, shard)
    for name, shard in weight_map.items():
        yield name, folder / shard
