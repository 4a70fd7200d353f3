"""The data files that ship with the package: prompts, rubrics, budget profiles."""

from __future__ import annotations

import os
from pathlib import Path

from ssrctl.errors import UserError


def profiles_dir() -> Path:
    """Return the folder of shipped profiles: inside an installed package, or at the top of a source checkout."""
    package = Path(__file__).parent.parent
    installed = package / "profiles"
    return installed if installed.is_dir() else package.parent / "profiles"


def shipped_names(folder: str, suffix: str) -> list[str]:
    """Return the names of the profiles that ship in ``profiles/folder``, sorted."""
    return sorted(path.name.removesuffix(suffix) for path in (profiles_dir() / folder).glob(f"*{suffix}"))


def profile_path(folder: str, name: str, suffix: str) -> Path:
    """Resolve ``name`` to a file: an existing path as it is, otherwise ``profiles/folder/name + suffix``.

    Raises:
        UserError: neither exists; the message lists the names that ship.
    """
    if os.path.isfile(name):  # noqa: PTH113 (Path.is_file raises for names that are too long)
        return Path(name)
    known = shipped_names(folder, suffix)
    if name in known:
        return profiles_dir() / folder / f"{name}{suffix}"
    raise UserError(
        f"{folder.rstrip('s')} '{name}' is neither a file nor one that ships",
        f"shipped: {', '.join(known) or 'none'}",
    )
