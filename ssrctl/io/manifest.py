"""The origin of an artifact: versions, settings and input hashes; never a key, a token, or a path of the machine."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssrctl.configs import ProcessOptions
from ssrctl.configs.common import HubOptions
from ssrctl.io.files import existing_file, write_text
from ssrctl.version import __version__

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "safetensors", "peft", "litellm")


def settings_of(config: Any) -> dict[str, Any]:
    """Return a config as plain json values; paths become text, and addresses lose the parts that may hold a key."""
    settings = {key: _plain(value) for key, value in dataclasses.asdict(config).items()}
    return {key: _without_secrets(value) if key.endswith("_base") else value for key, value in settings.items()}


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write settings as yaml that ``--config`` reads back."""
    import yaml

    write_text(path, yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))


def published_settings(config: Any) -> dict[str, Any]:
    """Return ``settings_of`` for metadata that travels with an artifact.

    Local paths are cut to their last part; the settings of launching and uploading are left out, which do not bear on
    the result.
    """
    left_out = {*ProcessOptions.__annotations__, *HubOptions.__annotations__}
    out = {key: value for key, value in settings_of(config).items() if key not in left_out}
    for key, value in out.items():
        original = getattr(config, key)
        if isinstance(original, Path) or (isinstance(original, str) and original.startswith(("/", "~", "."))):
            out[key] = Path(value).name
    return out


def versions() -> dict[str, str]:
    """Return the versions of ssrctl, python and the libraries that bear on results."""
    found = {"ssrctl": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def file_hash(path: str | Path) -> str:
    """Return ``sha256:`` and the hex digest of a file's contents.

    Raises:
        UserError: no such file.
    """
    import hashlib

    with existing_file(path, "input").open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def _without_secrets(address: str | None) -> str | None:
    """Return an address without user, password and query."""
    if address is None:
        return None
    parts = urllib.parse.urlsplit(address)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
