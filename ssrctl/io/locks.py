"""One process per output: a lock that the operating system drops when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ssrctl.errors import UserError
from ssrctl.io.console import warn

_LONGEST = 240  # bytes of a name, with which the lock's own stays below what file systems take


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold ``folder``, made if it is not there, for this process; an empty one that was made is removed at the end.

    Raises:
        UserError: another process holds it, or the folder cannot be written to.
    """
    with _locked(folder / ".lock", folder):
        yield


@contextlib.contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Hold the output file ``path``, which need not exist, for this process; see ``locked_folder``.

    Devices and pipes, which several processes may write to, are not locked.
    """
    real = Path(os.path.realpath(path))
    if os.path.exists(real) and not os.path.isfile(real):  # noqa: PTH110, PTH113 (Path's raise for long names)
        yield
        return
    name = real.name if len(os.fsencode(real.name)) <= _LONGEST else hashlib.sha256(os.fsencode(real.name)).hexdigest()
    with _locked(real.with_name(f".{name}.lock"), path):
        yield


@contextlib.contextmanager
def _locked(lock: Path, output: Path) -> Iterator[None]:
    made = [folder for folder in lock.parents if not folder.exists()]
    try:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _take(lock, output)
        except OSError as error:
            raise UserError(f"cannot write {output}: {error.strerror}", "choose a folder you can write to") from error
        try:
            yield
        finally:
            if descriptor is not None:
                with contextlib.suppress(OSError):  # the folder may be gone; the lock itself ends with the descriptor
                    lock.unlink()
                os.close(descriptor)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # not empty, or not made
                folder.rmdir()


def _take(lock: Path, output: Path) -> int | None:
    """Return the open, locked file; None where the file system has no locks."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise UserError(
                f"{output} is in use by {holder}", "wait until it has ended, or name another output"
            ) from None
        except OSError as error:
            os.close(descriptor)
            lock.unlink(missing_ok=True)
            warn(f"{output} is not locked ({error.strerror}): do not start a second command on it")
            return None
        try:
            is_current = os.fstat(descriptor).st_ino == lock.stat().st_ino
        except FileNotFoundError:
            is_current = False
        if is_current:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
            return descriptor
        os.close(descriptor)  # the process before removed the file between our opening and locking it


def _holder(descriptor: int) -> str:
    try:
        named = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {named['pid']} on {named['host']}"
    except (ValueError, TypeError, KeyError):  # it has not written its name yet
        return "another process"
