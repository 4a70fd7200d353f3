"""The llm critic's cache: one sqlite file of paid replies, so that none is paid for twice.

litellm's own cache leaves ``api_base`` out of its key, so that two servers share answers, and it fails on a base
install.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from ssrctl.errors import UserError

FILE_NAME = "critic-replies.sqlite3"
APPLICATION_ID = 0x53535243  # "SSRC": tells our file from another program's
SCHEMA_VERSION = 1
BUSY_SECONDS = 60.0  # sqlite's timeout while another process writes
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
OTHER_CACHE = "use another folder with --critic-cache-dir, or --no-critic-cache"


@dataclass(frozen=True)
class Reply:
    """A judge's reply as it was paid for.

    Attributes:
        text: the exact reply, never blank; untrusted.
        model: litellm name of the model that replied.
        prompt_tokens, completion_tokens: as the provider counted them, below 2**63; None if it did not.
        cost_usd: the cost of the answered request; None when no price was known.
    """

    text: str
    model: str
    prompt_tokens: int | None
    completion_tokens: int | None
    cost_usd: float | None


def cache_key(parts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of ``parts`` as canonical json, in hexadecimal.

    The order of names does not matter, the order of list entries does; 1 and 1.0 are the same; None differs from an
    absent name. Texts differ if any code point does, lone surrogates included.

    Args:
        parts: everything that a reply depends on: json values, with str as names.

    Raises:
        TypeError: a value is not json, or a name is not a str.
        ValueError: a number is NaN or infinite.
    """
    text = json.dumps(_canonical(parts), sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # Escaped as ASCII, a pair of lone surrogates would be the same text as the character that the pair encodes.
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):  # json would take 1 for "1"
                raise TypeError(f"names in a cache key must be str, not {type(name).__name__}")
        return {name: _canonical(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(part) for part in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def default_cache_dir() -> Path:
    """Return the folder of the cache: ``$SSRCTL_CACHE/critic``, else ``ssrctl/critic`` in the user's cache folder.

    The user's cache folder is ``$XDG_CACHE_HOME`` or ``~/.cache``.
    """
    if own := os.environ.get("SSRCTL_CACHE"):
        return Path(own).expanduser() / "critic"
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if xdg.is_absolute():  # the XDG specification says to ignore relative paths
        return xdg / "ssrctl" / "critic"
    try:
        return Path.home() / ".cache" / "ssrctl" / "critic"
    except RuntimeError as error:
        raise UserError("no home folder is known to keep the critic's replies in", OTHER_CACHE) from error


class ReplyCache:
    """Replies by key, safe for many threads and processes at once. Nothing is ever deleted or replaced.

    A stored reply survives a kill of the process and a power cut: sqlite forces every commit onto the disk, at 10 to
    20 ms each. Its default rollback journal works wherever file locks do, network file systems included.

    Args:
        folder: created if need be. Only the owner can read the file in it, since models wrote its content.

    Raises:
        UserError: the folder or file cannot be made or written, the file is corrupt or not such a cache, or was
            written by a newer version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / FILE_NAME
        self._lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))  # sqlite gives its journal the same mode
            # isolation_level None: every statement is a transaction of its own.
            self._connection = sqlite3.connect(
                self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        except OSError as error:
            raise self._unwritable(error.strerror) from error
        except sqlite3.DatabaseError as error:
            raise self._failure(error) from error
        try:
            self._run("BEGIN IMMEDIATE")  # one process at a time; fails now if the file cannot be written
            self._make_or_check()
            self._run("COMMIT")
        except BaseException:
            self._connection.close()
            raise

    def get(self, key: str) -> Reply | None:
        """Return the reply stored under ``key``, or None.

        Raises:
            UserError: the file is corrupt, or another process locks it for too long.
        """
        rows = self._run(
            "SELECT text, model, prompt_tokens, completion_tokens, cost_usd FROM replies WHERE key = ?", (key,)
        )
        if not rows:
            return None
        text, model, *numbers = rows[0]
        try:
            return Reply(_decoded(text), _decoded(model), *numbers)
        except UnicodeDecodeError as error:
            raise self._corrupt(str(error)) from error

    def put(self, key: str, reply: Reply) -> None:
        """Store ``reply`` unless ``key`` has one already, so that all processes continue with the same reply.

        Raises:
            UserError: the disk is full, the file is corrupt, or another process locks it for too long.
        """
        text, model, *numbers = astuple(reply)
        row = (key, _encoded(text), _encoded(model), *numbers)
        self._run("INSERT INTO replies VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO NOTHING", row)

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        with self._lock:
            self._connection.close()

    def _make_or_check(self) -> None:
        """Create the table in a new file; refuse a file that is not ours."""
        application, version, tables = (
            self._run(query)[0][0]
            for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
        )
        if (application, version, tables) == (0, 0, 0):
            self._run(f"PRAGMA application_id = {APPLICATION_ID}")
            self._run(f"PRAGMA user_version = {SCHEMA_VERSION}")
            self._run(TABLE)
        elif application != APPLICATION_ID:
            raise UserError(f"{self.path} is a database of another program", OTHER_CACHE)
        elif version != SCHEMA_VERSION:
            raise UserError(
                f"{self.path} is a cache of version {version}, and this ssrctl reads version {SCHEMA_VERSION}",
                f"use the ssrctl that wrote it, or {OTHER_CACHE}",
            )

    def _run(self, statement: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """Return all rows of one statement; sqlite waits while another process locks the file."""
        with self._lock:
            try:
                return self._connection.execute(statement, values).fetchall()
            except sqlite3.ProgrammingError:
                raise  # a bug of ours
            except sqlite3.DatabaseError as error:
                raise self._failure(error) from error

    def _failure(self, error: sqlite3.DatabaseError) -> UserError:
        # The low byte of sqlite's code is the primary code; errors of the Python module itself have none.
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_BUSY:
            return UserError(
                f"another process has locked {self.path} for {BUSY_SECONDS:g} seconds",
                f"wait until it ends, or {OTHER_CACHE}",
            )
        return self._unwritable(str(error)) if code in UNWRITABLE else self._corrupt(str(error))

    def _unwritable(self, reason: str | None) -> UserError:
        return UserError(
            f"cannot keep the critic's replies in {self.path}: {reason}",
            f"make it writable with free space, or {OTHER_CACHE}",
        )

    def _corrupt(self, reason: str) -> UserError:
        return UserError(
            f"the cache {self.path} is corrupt: {reason}",
            f"move it and any {FILE_NAME}-* files next to it away, or {OTHER_CACHE}",
        )


def _encoded(text: str) -> bytes:
    """Encode as UTF-8 that also holds lone surrogates, which sqlite's own texts cannot."""
    return text.encode("utf-8", errors="surrogatepass")


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", errors="surrogatepass")
