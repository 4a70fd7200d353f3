"""Files are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ssrctl.errors import UserError


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; on success fsync it and rename it into place.

    On any exception the temporary file is removed and ``path`` keeps what it held before. A link is followed:
    what it points to is replaced. A device or named pipe (``/dev/null``) is written to, not replaced.

    Raises:
        UserError: ``path`` is a folder, or its folder cannot be made or written to.
    """
    target = Path(path)
    if os.path.isdir(target):  # noqa: PTH112 (Path.is_dir raises for names that are too long)
        raise UserError(f"cannot write {target}: it is a folder", "name a file")
    if os.path.exists(target) and not os.path.isfile(target):  # noqa: PTH110, PTH113
        with _device(target) as temporary:
            yield temporary
        return
    try:
        target = target.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # The temporary name is cut, so that a name of full length stays within what file systems take; one that
        # is too long is to be known now, not when all is computed and the rename fails.
        with contextlib.suppress(FileNotFoundError):
            target.lstat()
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:40]}.", suffix=".part")
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}", "choose a folder you can write to") from error
    os.close(handle)
    temporary = Path(name)
    try:
        try:
            yield temporary
        except OSError as error:
            if error.filename is not None:
                raise
            # A full disk, above all, which the system reports without a name.
            raise UserError(f"cannot write {target}: {error.strerror}", "make room or name another place") from error
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        # mkstemp and safetensors both make files that only the owner reads; outputs get the usual mode.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
        _sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _device(target: Path) -> Iterator[Path]:
    """Yield a temporary path; on success its contents are written to the device or pipe ``target``."""
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "output"
        temporary.touch()
        yield temporary
        with temporary.open("rb") as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def existing_file(path: str | Path, what: str) -> Path:
    """Return ``path`` if it is a readable file; otherwise a ``UserError`` that names ``what`` it should be."""
    file = Path(path)
    if not os.path.exists(file):  # noqa: PTH110 (Path.exists raises for names that are too long)
        raise UserError(f"{what} not found: {file}", "check the path")
    if not file.is_file():
        raise UserError(f"{what} is not a file: {file}", "name the file itself")
    if not os.access(file, os.R_OK):
        raise UserError(f"{what} cannot be read: {file}", "check its permissions")
    return file


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
