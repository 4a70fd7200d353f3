"""Reading and writing jsonl: whole files, ``-`` for stdin and stdout, and logs that survive a kill."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ssrctl.errors import UserError
from ssrctl.io.files import STDIO as STDIO
from ssrctl.io.files import CannotWrite, text_bytes, whole_file


def read_jsonl(
    path: str | Path, *, on_torn: Callable[[str], None] | None = None, may_be_empty: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``(where, row)`` for every line, ``where`` being ``file:line`` for error messages.

    Args:
        path: a jsonl file, gzipped or not, or ``-`` for stdin. Blank lines are skipped.
        on_torn: called with a message when the last line is truncated (no newline at its end and no valid
            json, as after a kill); that line is then left out. When None, a truncated line is an error like any
            other bad line.
        may_be_empty: yield nothing, instead of raising, if there is no whole line, as in a log after an early kill.

    Raises:
        UserError: missing file, text that is not UTF-8, a line that is not a json object or has a key twice, or no
            whole line at all.
    """
    name = "<stdin>" if str(path) == STDIO else str(path)
    seen = torn = False
    with text_bytes(path, "jsonl file") as stream:
        for number, raw in enumerate(stream, start=1):
            if not raw.strip():
                continue
            where = f"{name}:{number}"
            try:
                row = parse_json(raw.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                is_cut = isinstance(error, json.JSONDecodeError | UnicodeDecodeError) and not raw.endswith(b"\n")
                if on_torn is not None and is_cut:
                    on_torn(f"{where}: the last line is torn; it was left out")
                    torn = True
                    continue
                kind = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "not valid json"
                raise UserError(f"{where}: {kind}: {error}", "fix or remove that line") from error
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected a json object, found {type(row).__name__}")
            seen = True
            yield where, row
    if not seen and not may_be_empty:
        reason = "no records in it" + (": its only line is truncated" if torn else "")
        raise UserError(f"{name}: {reason}", "check that the stage before wrote its output")


def parse_json(text: str) -> Any:
    """Parse json strictly: no NaN, no infinity, no key that occurs twice in an object.

    Raises:
        ValueError: not such json.
        RecursionError: nested too deeply.
    """
    return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_without_duplicates)


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write ``rows`` to ``path`` (whole or not at all) or, for ``-``, to stdout as they come. Returns the number of rows."""
    if str(path) == STDIO:
        count = 0
        for row in rows:
            sys.stdout.write(dump_line(row))
            count += 1
        sys.stdout.flush()
        return count
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        count = 0
        for row in rows:
            stream.write(dump_line(row))
            count += 1
    return count


def dump_line(row: dict[str, Any]) -> str:
    """One json object and a newline. NaN and infinity, which json does not have, are refused (ValueError)."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # lone surrogates have no UTF-8 form, but json can escape them
        text = json.dumps(row, ensure_ascii=True, allow_nan=False)
    return text + "\n"


class JsonlLog:
    """An append-only jsonl file: each row is flushed to the operating system as it is written.

    A kill can leave at most one truncated last line. Opening the log again cuts such a line off, so that the
    next row starts on a line of its own; a last line that lacks only its newline, which readers take for complete,
    gets it.

    Args:
        path: the file, made with its folder.
        remedy: of the error when it cannot be written.

    Raises:
        CannotWrite: it cannot be opened.
    """

    def __init__(
        self, path: str | Path, *, remedy: str = "make room, and run the same command again: it continues from here"
    ) -> None:
        self.path, self._remedy = Path(path), remedy
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self.path.open("ab+", buffering=0)
            _cut_torn_tail(self._stream)
        except OSError as error:
            raise self._cannot_write(error) from error

    def append(self, row: dict[str, Any]) -> None:
        """Add one row, whole or not at all.

        Raises:
            CannotWrite: on a full disk, above all.
        """
        before = self._stream.seek(0, os.SEEK_END)
        left = memoryview(dump_line(row).encode("utf-8"))
        try:
            while left:
                left = left[self._stream.write(left) :]
        except OSError as error:
            with contextlib.suppress(OSError):  # a device; of a file, the next opening would cut the torn line off
                self._stream.truncate(before)
            raise self._cannot_write(error) from error

    def sync(self) -> None:
        """Force what was appended onto the disk."""
        try:
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise self._cannot_write(error) from error

    def close(self) -> None:
        try:
            self.sync()
        finally:
            self._stream.close()

    def _cannot_write(self, error: OSError) -> CannotWrite:
        return CannotWrite(f"cannot write {self.path}: {error.strerror}", self._remedy)

    def __enter__(self) -> JsonlLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _cut_torn_tail(stream: Any) -> None:
    stream.seek(0, os.SEEK_END)
    position = size = stream.tell()
    while position > 0:
        start = max(0, position - 65536)
        stream.seek(start)
        block = stream.read(position - start)
        newline = block.rfind(b"\n")
        if newline >= 0:
            position = start + newline + 1
            break
        position = start
    if position != size:
        stream.seek(position)
        if _is_row(stream.read()):
            stream.write(b"\n")
        else:
            stream.truncate(position)
    stream.seek(0, os.SEEK_END)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return made


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a json number")


def _finite(text: str) -> float:
    """Python reads 1e999 as infinity, which no record may hold."""
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is too large for a number")
    return value


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8")), dict)
    except (ValueError, RecursionError):
        return False
