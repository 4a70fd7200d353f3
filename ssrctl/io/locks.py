"""One process per output: a lock that the operating system drops when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ssrctl.errors import UserError
from ssrctl.io.console import warn


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold ``folder``, made if it is not there, for this process; an empty one that was made is removed at the end.

    Raises:
        UserError: another process holds it, or the folder cannot be written to.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with _locked(folder / ".lock", folder):
            yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # not empty, or not made
                path.rmdir()


@contextlib.contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Hold the output file ``path``, which need not exist, for this process; see ``locked_folder``."""
    with _locked(path.with_name(f".{path.name[:240]}.lock"), path):
        yield


@contextlib.contextmanager
def _locked(lock: Path, output: Path) -> Iterator[None]:
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
