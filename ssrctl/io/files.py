"""Files are written whole or not at all."""

from __future__ import annotations

import codecs
import contextlib
import errno
import fcntl
import glob
import gzip
import os
import secrets
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssrctl.errors import UserError

STDIO = "-"
_GZIP = b"\x1f\x8b"
_OTHER_COMPRESSION = {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
PART = ".part"  # ending of temporary files and folders
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota or a limit on the size of files is reached


class CannotWrite(UserError):
    """An output that cannot be written, above all because the disk is full; what was there before is unchanged."""


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; on success fsync it and rename it into place.

    On any exception the temporary file is removed and ``path`` keeps what it held before; temporary files of processes
    that were killed while they wrote ``path`` are removed first. A link is followed: what it points to is replaced. A
    device or named pipe (``/dev/null``) is written to, not replaced.

    Raises:
        UserError: ``path`` is a folder, or (CannotWrite) it cannot be made or written to.
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
        remove_parts_of_dead_processes(target.parent, target.name)
        handle, temporary = _new_part(target)
    except (OSError, ValueError) as error:  # a name with a NUL or a lone surrogate is a ValueError
        reason = error.strerror if isinstance(error, OSError) else error
        raise CannotWrite(f"cannot write {target}: {reason}", "choose a folder you can write to") from error
    try:
        try:
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
        except OSError as error:
            if error.filename is not None and error.errno not in FULL:
                raise
            # A full disk, above all, which the system reports without a name.
            raise CannotWrite(f"cannot write {target}: {error.strerror}", "make room or name another place") from error
        # mkstemp makes files that only the owner reads; outputs get the usual mode.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
        _sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def _new_part(target: Path) -> tuple[int, Path]:
    """Make the temporary file of ``target``, locked as long as the returned descriptor is open."""
    while True:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:40]}.", suffix=PART)
        _hold(handle)
        if os.fstat(handle).st_nlink:
            return handle, Path(name)
        os.close(handle)  # another process took it for a leftover before it was locked


@contextlib.contextmanager
def part_folder(target: Path) -> Iterator[Path]:
    """Yield a new temporary folder next to ``target``; it is removed at the end, if it still has its name."""
    folder = target.parent / f".{target.name[:40]}.{secrets.token_hex(4)}{PART}"
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    _hold(descriptor)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _hold(descriptor: int) -> None:
    """Lock an open temporary file or folder, so that no other process takes it for a leftover."""
    with contextlib.suppress(OSError):  # a file system without locks, where leftovers are not removed
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_parts_of_dead_processes(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files and folders in ``folder``, of output ``name`` or of all, that no process holds."""
    for part in folder.glob(f".{'*' if name is None else glob.escape(name[:40])}.*{PART}"):
        with contextlib.suppress(OSError):  # gone, held by a process, or on a file system without locks
            descriptor = os.open(part, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if part.is_dir():
                    shutil.rmtree(part)
                else:
                    part.unlink()
            finally:
                os.close(descriptor)


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


@contextlib.contextmanager
def text_bytes(path: str | Path, what: str) -> Iterator[Any]:
    """Open a UTF-8 text file, or stdin for ``-``, for reading bytes; gzip and a byte order mark are taken off.

    Args:
        path: the file; its first bytes tell whether it is compressed, not its name.
        what: the kind of file, for messages.

    Raises:
        UserError: not a readable file, UTF-16, another compression, or a corrupt gzip file.
    """
    name = "<stdin>" if str(path) == STDIO else str(path)
    with contextlib.ExitStack() as open_files:
        stream: Any = sys.stdin.buffer
        if str(path) != STDIO:
            stream = open_files.enter_context(existing_file(path, what).open("rb"))
        if _head(stream).startswith(_GZIP):
            stream = open_files.enter_context(gzip.GzipFile(fileobj=stream))
        try:
            head = _head(stream)
            if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UserError(f"{name} is UTF-16, not UTF-8", "convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")
            for magic, kind in _OTHER_COMPRESSION.items():
                if head.startswith(magic):
                    raise UserError(f"{name} is a {kind} file", "unpack it, or compress it with gzip")
            if head.startswith(codecs.BOM_UTF8):
                stream.read(len(codecs.BOM_UTF8))
            yield stream
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{name}: corrupt gzip file: {error}", "copy or compress it again") from error


def _head(stream: Any) -> bytes:
    """Return the first bytes without consuming them; none of a stream that cannot look ahead."""
    head: bytes = stream.peek(8)[:8] if hasattr(stream, "peek") else b""
    return head


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
