"""A jsonl output that is filled in any order, survives a kill, and is finished by the next run of the same work.

``OUT.partial`` next to ``OUT`` gets every finished row at once. When all rows are there, ``OUT`` is written whole and in
order, and ``OUT.partial`` is removed. The next run takes the rows that both files hold already, if they were made under
the same identity from the same input.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ssrctl.errors import UserError
from ssrctl.io.files import whole_file
from ssrctl.io.jsonl import JsonlLog, dump_line

SUFFIX = ".partial"


@dataclass(frozen=True)
class _Place:
    """A row: the file it is in, and its offset there."""

    path: Path
    offset: int


class ResumableOutput:
    """Rows for the lines of an input, by their position in it.

    Args:
        path: the finished file.
        identity: name of the settings that made the rows; each row holds it under ``identity_field``.
        identity_field: that field's name.
        made_fields: the fields that the work adds or replaces; the others identify the input of a row.
        is_done: returns True for an earlier row that needs no retry.

    Raises:
        UserError: ``OUT.partial`` holds rows that were made under another identity.

    Attributes:
        num_others: rows of ``OUT`` that were made under another identity; ``finish`` replaces them.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        identity: str,
        identity_field: str,
        made_fields: Collection[str],
        is_done: Callable[[dict[str, Any]], bool],
    ) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + SUFFIX)
        self._identity, self._field = identity, identity_field
        self._made_fields = {*made_fields, identity_field}
        self._places: list[_Place | None] = []
        self._reused: list[_Place] = []
        self._earlier: dict[bytes, _Place] = {}
        self.num_others = 0
        # The newest row of an input counts: those of the partial file come later than those of the finished one.
        for file, must_match in ((self.path, False), (self.partial, True)):
            if file.is_file() and file.stat().st_size:
                self._read_earlier(file, is_done, must_match)
        self._log: JsonlLog | None = None

    def reserve(self, row: dict[str, Any]) -> int | None:
        """Take the next position for input ``row``. Returns it, or None when the row is there from an earlier run."""
        earlier = self._earlier.get(self._input_key(row))
        self._places.append(earlier)
        if earlier is not None:
            self._reused.append(earlier)
        return None if earlier is not None else len(self._places) - 1

    def earlier_row(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """Return the row that an earlier run made of input ``row``; None without one."""
        return next(self._rows([self._earlier.get(self._input_key(row))]), None)

    def add(self, position: int, row: dict[str, Any]) -> None:
        """Store the finished row of ``position``; it survives a kill from now on.

        Raises:
            UserError: it cannot be written, on a full disk for instance.
        """
        assert self._places[position] is None
        with _writing(self.partial):
            if self._log is None:
                self._log = JsonlLog(self.partial)
            offset = self._log.path.stat().st_size
            self._log.append(row | {self._field: self._identity})
        self._places[position] = _Place(self.partial, offset)

    @property
    def num_done(self) -> int:
        """Number of positions whose row is there."""
        return sum(place is not None for place in self._places)

    @property
    def num_unused(self) -> int:
        """Number of earlier rows whose input was not reserved so far; ``finish`` leaves them out."""
        return len(set(self._earlier.values()) - set(self._reused))

    def earlier_rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows that earlier runs made."""
        return self._rows(self._reused)

    def _rows(self, places: Iterable[_Place | None]) -> Iterator[dict[str, Any]]:
        streams: dict[Path, BinaryIO] = {}
        try:
            for place in places:
                if place is not None:
                    if place.path not in streams:
                        streams[place.path] = place.path.open("rb")
                    stream = streams[place.path]
                    stream.seek(place.offset)
                    yield json.loads(stream.readline())
        finally:
            for stream in streams.values():
                stream.close()

    def finish(self) -> None:
        """Write the finished file, in the order of the input, and remove the partial one.

        Raises:
            UserError: it cannot be written; the partial one stays.
        """
        assert None not in self._places
        self.close()
        with _writing(self.path), whole_file(self.path) as temporary, temporary.open("w", encoding="utf-8") as stream:
            for row in self._rows(self._places):
                stream.write(dump_line(row))
        self.partial.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave the finished rows in the partial file."""
        log, self._log = self._log, None
        if log is not None:
            with _writing(self.partial):
                log.close()

    def _read_earlier(self, file: Path, is_done: Callable[[dict[str, Any]], bool], must_match: bool) -> None:
        offset = 0
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                start, offset = offset, offset + len(line)
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue  # truncated by a kill, or not a file of ours: then no row of it is used
                if not isinstance(row, dict):
                    continue
                if row.get(self._field) != self._identity:
                    if must_match:
                        raise UserError(
                            f"{file}:{number} was made with other settings ({row.get(self._field)!r}, "
                            f"now {self._identity!r})",
                            f"finish that run with its settings, or remove {file.name}",
                        )
                    self.num_others += row.get(self._field) is not None
                    continue
                if is_done(row):
                    self._earlier[self._input_key(row)] = _Place(file, start)

    def _input_key(self, row: dict[str, Any]) -> bytes:
        given = {key: value for key, value in row.items() if key not in self._made_fields}
        text = json.dumps(given, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode("ascii")).digest()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Convert an OSError while writing ``path`` into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}",
            "make room, and run the same command again: it continues from here",
        ) from error
