"""The Hugging Face hub: files of repositories on this machine, and uploads."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssrctl.errors import UserError, first_line
from ssrctl.io.console import console

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

CARD_FILE = "README.md"
_ADDRESS = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_FILE_ENDINGS = (".safetensors", ".json", ".jsonl", ".yaml", ".gguf")  # a file that is not there, not a repository
_WEIGHT_ENDINGS = (".safetensors", ".safetensors.index.json")
_OWN_FILES = {".gitattributes"}  # that the hub puts into a new repository


def fetched(path: str | Path, patterns: Collection[str]) -> Path:
    """Return ``path``, or the folder in the hub's cache with the files of the repository of that name.

    Args:
        path: a file or folder; where there is none, ``OWNER/NAME`` or ``OWNER/NAME@REVISION`` is a repository.
        patterns: glob patterns of the files to download.

    Raises:
        UserError: neither a path here nor a repository that the hub gives.
    """
    name = str(path)
    address = _ADDRESS.fullmatch(name) if is_address(name) else None
    if address is None or os.path.lexists(name):
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(address[1], revision=address[2], allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name} is not a path here, and the hub gave no repository of that name: {_reason(error)}",
            "check the name, and for a private repository `hf auth login`",
        ) from error


def is_address(name: str) -> bool:
    """Return True if ``name`` has the form of a repository, ``OWNER/NAME`` or ``OWNER/NAME@REVISION``."""
    return _ADDRESS.fullmatch(name) is not None and not name.endswith(_FILE_ENDINGS)


def hub_origin(path: Path) -> tuple[str, str] | None:
    """Return (name, revision) of the repository that a path in the hub's cache belongs to; None for other paths."""
    parts = path.absolute().parts
    for repository, snapshots, revision in zip(parts, parts[1:], parts[2:], strict=False):
        if repository.startswith("models--") and snapshots == "snapshots":
            return "/".join(repository.split("--")[1:]), revision
    return None


def label_of(path: Path) -> str:
    """Return the name of a checkpoint in reports: its name on the hub, or the last part of the path as it was given."""
    origin = hub_origin(path)
    return Path(os.path.abspath(path)).name if origin is None else origin[0]  # noqa: PTH100 (links keep their names)


def artifact_at(path: str | Path, file: str, *companions: str) -> Path:
    """Return ``path``, or the artifact ``file`` of the repository of that name, from the hub's cache.

    ``companions`` are downloaded to its folder if the repository has them.

    Raises:
        UserError: the hub does not give the repository, or it does not hold such a file.
    """
    folder = fetched(path, [file, *companions])
    if folder == Path(path):
        return folder
    if not (folder / file).is_file():
        raise UserError(
            f"{path} is not a path here, and the repository of that name on the hub holds no {file}",
            "name a file, or a repository that `ssrctl push` wrote",
        )
    return folder / file


def check_can_push(repo: str) -> None:
    """Check what can be known without the network, before hours of work: the name, offline mode, a token.

    Raises:
        UserError: the upload cannot succeed.
    """
    from huggingface_hub import get_token
    from huggingface_hub.constants import is_offline_mode

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"'{repo}' is not the name of a repository", "give OWNER/NAME")
    if is_offline_mode():
        raise UserError(f"cannot push to {repo}: HF_HUB_OFFLINE is set", "unset it")
    if get_token() is None:
        raise UserError(
            f"cannot push to {repo}: there is no Hugging Face token", "run `hf auth login`, or set HF_TOKEN"
        )


def upload(repo: str, files: Mapping[str, Path], metadata: Mapping[str, Any], text: str, *, private: bool) -> str:
    """Upload files and a model card in one commit; the repository is made if it does not exist.

    Weights of an earlier upload that are not among ``files`` are removed in the same commit. Metadata that somebody added
    to the card on the hub, such as a license, stay.

    Args:
        repo: ``OWNER/NAME``.
        files: by their names in the repository.
        metadata: of the card. A repository that holds files has to have its ``tags`` already, so that no other model is
            overwritten.
        text: of the card.
        private: make a new repository private.

    Returns:
        The address of the repository.

    Raises:
        UserError: no permission, a repository with other contents, no network.
    """
    import httpx
    import yaml
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    check_can_push(repo)
    if not console().is_terminal:
        disable_progress_bars()
    api = HfApi(library_name="ssrctl")
    try:
        address = api.create_repo(repo, private=private or None, exist_ok=True)
        info = api.model_info(repo)
        there = _files_of(info, metadata["tags"])
        known = info.card_data.to_dict() if info.card_data else {}
        header = yaml.safe_dump({**known, **metadata}, sort_keys=False, allow_unicode=True)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, path) for name, path in files.items()
        ]
        operations.append(CommitOperationAdd(CARD_FILE, f"---\n{header}---\n\n{text}".encode()))
        operations += [
            CommitOperationDelete(name) for name in there if name.endswith(_WEIGHT_ENDINGS) and name not in files
        ]
        api.create_commit(repo, operations, commit_message="Upload with ssrctl")
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError, ValueError) as error:
        # A hub, or a proxy in front of it, may repeat the headers of the request.
        reason = _reason(error).replace(get_token() or "\0", "(token)")
        raise UserError(
            f"cannot push to {repo}: {reason}", "check the network, the name, and that the token may write there"
        ) from None
    return str(address)


def _files_of(info: ModelInfo, tags: Collection[str]) -> list[str]:
    """Return the names of a repository's files; refuse one whose card does not have ``tags``."""
    there = [one.rfilename for one in info.siblings or [] if one.rfilename not in _OWN_FILES]
    if there and not set(tags) <= set(info.tags or []):
        raise UserError(
            f"{info.id} on the hub holds something else: {', '.join(there[:3])}{', ...' * (len(there) > 3)}; its card "
            f"lacks the tags {' and '.join(tags)}",
            "name a repository of its own; nothing was changed",
        )
    return there


def _reason(error: Exception) -> str:
    """Return the first line of an error of the hub, with what the server said."""
    said = getattr(error, "server_message", None)
    first = first_line(error)
    return first if not said or said in first else f"{first} {' '.join(said.split())}"
