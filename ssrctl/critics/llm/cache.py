"""The critic's cache: replies that were paid for once are kept in one sqlite file and never paid for again.

litellm's own cache leaves ``api_base`` out of its key, so that two servers share answers, and it fails on a base
install.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import sqlite3
import threading
import time
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import psutil

from ssrctl.errors import UserError

FILE_NAME = "critic-replies.sqlite3"
APPLICATION_ID = 0x53535243  # "SSRC": tells our file from another program's
SCHEMA_VERSION = 1
BUSY_SECONDS = 60.0  # for which another process may hold the file before that is an error
UNWRITABLE = {
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_PROTOCOL,  # file locks do not work there
    sqlite3.SQLITE_READONLY,
}

TABLE = """
CREATE TABLE replies (
    key TEXT PRIMARY KEY, text BLOB NOT NULL, model BLOB NOT NULL,
    prompt_tokens INTEGER, completion_tokens INTEGER, cost_usd REAL)
"""

# The write-ahead log needs memory shared by all processes, hence one machine. A file system that is none of these may
# be mounted by several, and there sqlite's rollback journal is used: slower, but right wherever file locks work.
LOCAL_FILE_SYSTEMS = {"apfs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "hfs", "ntfs", "overlay", "tmpfs", "xfs", "zfs"}


@dataclass(frozen=True)
class CachedReply:
    """A judge's reply as it was paid for.

    Attributes:
        text: what it wrote, exactly; untrusted.
        model: litellm name of the model that was asked.
        prompt_tokens, completion_tokens: as the provider counted them, below 2**63; None if it did not.
        cost_usd: what it cost then; None when no price was known.
    """

    text: str
    model: str
    prompt_tokens: int | None
    completion_tokens: int | None
    cost_usd: float | None


def cache_key(parts: Mapping[str, Any]) -> str:
    """The SHA-256 of ``parts`` as canonical json, in hexadecimal.

    The order of names does not matter, that of list entries does; 1 and 1.0 are the same; None is not the same as
    being left out. Texts differ if any code point does, lone surrogates included.

    Args:
        parts: everything that a reply depends on: json values, names being str.

    Raises:
        TypeError: something else is among them.
        ValueError: NaN or an infinity is.
    """
    text = json.dumps(_canonical(parts), sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # Escaped as ASCII, two lone surrogates in a row would be the same text as the character that they make up.
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):  # json would take 1 for "1"
                raise TypeError(f"a key of the cache is made of names that are str, not {type(name).__name__}")
        return {name: _canonical(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(part) for part in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def default_cache_dir() -> Path:
    """The folder of the replies: ``$SSRCTL_CACHE/critic``, else ``ssrctl/critic`` in the user's cache folder, which is
    ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("SSRCTL_CACHE"):
        return Path(own).expanduser() / "critic"
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if xdg.is_absolute():  # the XDG specification says to ignore others
        return xdg / "ssrctl" / "critic"
    try:
        return Path.home() / ".cache" / "ssrctl" / "critic"
    except RuntimeError as error:
        raise UserError("no home folder is known to keep replies in", "give --cache-dir or --no-cache") from error


class ReplyCache:
    """Replies by key, safe for many threads and processes at once. Nothing is ever deleted or replaced.

    A reply that was put survives a kill of the process. On a disk of this machine, a power cut may lose the replies of
    the last seconds, since not every commit is forced onto the disk, but leaves a sound file. Elsewhere every commit is
    forced, at 10 to 20 ms each.

    Args:
        folder: made if need be; the file in it can be read by its owner alone, since models wrote what it holds.

    Raises:
        UserError: the folder or file cannot be made or written, the file is damaged or not such a cache, or was
            written by a newer version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / FILE_NAME
        self._lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))  # sqlite gives its side files the same mode
        except OSError as error:
            raise UserError(
                f"cannot keep replies in {self.path}: {error.strerror}",
                "choose a folder you can write to with --cache-dir, or give --no-cache",
            ) from error
        local = _is_local(self.path)
        if not local:
            self._leave_write_ahead_log()
        self._connection = self._connect(BUSY_SECONDS)
        try:
            self._run("BEGIN IMMEDIATE")  # one process at a time, and a file that cannot be written is known now
            new = self._make_or_check()
            self._run("COMMIT")
            if new and local:  # the others follow; an older file keeps its journal, another machine may rely on it
                self._run("PRAGMA journal_mode = WAL")
            self._run("PRAGMA synchronous = NORMAL")
        except BaseException:
            self._connection.close()
            raise

    def get(self, key: str) -> CachedReply | None:
        """The reply that was put under ``key``, or None.

        Raises:
            UserError: the file is damaged, or held by another process for too long.
        """
        rows = self._run(
            "SELECT text, model, prompt_tokens, completion_tokens, cost_usd FROM replies WHERE key = ?", (key,)
        )
        if not rows:
            return None
        text, model, *numbers = rows[0]
        try:
            return CachedReply(_decoded(text), _decoded(model), *numbers)
        except UnicodeDecodeError as error:
            raise self._damaged(str(error)) from error

    def put(self, key: str, reply: CachedReply) -> None:
        """Keep ``reply``. If there is one under ``key``, it stays: all processes go on with the same one.

        Raises:
            UserError: the disk is full, the file damaged, or held by another process for too long.
        """
        text, model, *numbers = astuple(reply)
        row = (key, _encoded(text), _encoded(model), *numbers)
        self._run("INSERT INTO replies VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO NOTHING", row)

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> ReplyCache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _connect(self, timeout: float) -> sqlite3.Connection:
        try:
            # isolation_level None: every statement is a transaction of its own.
            return sqlite3.connect(self.path, timeout=timeout, isolation_level=None, check_same_thread=False)
        except sqlite3.DatabaseError as error:
            raise self._failure(error) from error

    def _leave_write_ahead_log(self) -> None:
        """Give up the log of a file that was made on its own machine's disk, before it is used over the network."""
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            with contextlib.closing(self._connect(timeout=0.0)) as connection:
                try:
                    if connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID:
                        connection.execute("PRAGMA journal_mode = DELETE").fetchall()
                    return
                except sqlite3.DatabaseError as error:
                    if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                        raise self._failure(error) from error
            # Who stays connected keeps the others from it, so all let go, for times that differ.
            time.sleep(random.uniform(0.01, 0.1))

    def _make_or_check(self) -> bool:
        """Make the table if the file is new, and return whether it is; refuse a file that is not ours."""
        application, version, tables = (
            self._run(query)[0][0]
            for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
        )
        if (application, version, tables) == (0, 0, 0):
            self._run(f"PRAGMA application_id = {APPLICATION_ID}")
            self._run(f"PRAGMA user_version = {SCHEMA_VERSION}")
            self._run(TABLE)
            return True
        if application != APPLICATION_ID:
            raise UserError(f"{self.path} is a database of another program", self._remedy())
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{self.path} has version {version} of the cache's form, and this ssrctl knows {SCHEMA_VERSION}",
                f"use the ssrctl that wrote it, or {self._remedy()}",
            )
        return False

    def _run(self, statement: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """All rows of one statement; sqlite itself waits while another process holds the file."""
        with self._lock:
            try:
                return self._connection.execute(statement, values).fetchall()
            except sqlite3.ProgrammingError:
                raise  # a mistake of ours
            except sqlite3.DatabaseError as error:
                raise self._failure(error) from error

    def _failure(self, error: sqlite3.DatabaseError) -> UserError:
        if _code(error) == sqlite3.SQLITE_BUSY:
            return UserError(
                f"another process, perhaps on another machine, has held {self.path} for {BUSY_SECONDS:g} seconds",
                "let it end, or give another --cache-dir or --no-cache",
            )
        if _code(error) in UNWRITABLE:
            return UserError(
                f"cannot keep replies in {self.path}: {error}",
                "make room or choose another folder with --cache-dir, or give --no-cache",
            )
        return self._damaged(str(error))

    def _damaged(self, how: str) -> UserError:
        return UserError(f"the cache {self.path} is damaged: {how}", self._remedy())

    def _remedy(self) -> str:
        return f"move it and the {FILE_NAME}-* files beside it away, or give another --cache-dir or --no-cache"


def _code(error: sqlite3.Error) -> int | None:
    """The primary result code; the extended ones have it in their low byte."""
    code = getattr(error, "sqlite_errorcode", None)  # errors of the Python module itself have none
    return None if code is None else code & 0xFF


def _is_local(path: Path) -> bool:
    """Whether ``path`` is certainly on a disk of this machine."""
    resolved = path.resolve()
    try:
        every = psutil.disk_partitions(all=True)
    except OSError:  # a container that hides its mounts
        return False
    mounts = [mount for mount in every if resolved.is_relative_to(mount.mountpoint)]
    if not mounts:
        return False
    # The innermost; of several at one place, the last covers the others, and sorting keeps their order.
    return sorted(mounts, key=lambda mount: len(mount.mountpoint))[-1].fstype.lower() in LOCAL_FILE_SYSTEMS


def _encoded(text: str) -> bytes:
    """UTF-8 that also holds lone surrogates, which sqlite's own texts cannot."""
    return text.encode("utf-8", errors="surrogatepass")


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", errors="surrogatepass")
