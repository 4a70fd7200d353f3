"""Rows of the files that users bring: jsonl, json, csv and tsv, gzipped or not."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssrctl.errors import UserError
from ssrctl.io.files import STDIO as STDIO
from ssrctl.io.files import text_bytes
from ssrctl.io.jsonl import parse_json, read_jsonl

_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_LONGEST_CELL = 2**31 - 1


def is_file_name(name: str) -> bool:
    """Return True if ``name`` ends as the name of a file that ``read_rows`` reads."""
    return _kind(name) in _KINDS


def is_table(name: str) -> bool:
    """Return True if ``name`` ends as that of a csv or tsv file, gzipped or not."""
    return _kind(name) in (".csv", ".tsv")


def read_rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``(where, row)`` of a file or, for ``-``, of jsonl on stdin.

    ``where`` is ``file:line`` for jsonl, else ``file:row N``. A json file holds a list of objects, or an object with one
    such list; json lines in it are read too. Cells of csv and tsv are text as written, and empty ones are empty text.

    Raises:
        UserError: not found, not UTF-8, malformed (the line or row is named), or nothing in it.
    """
    path = Path(name).expanduser()
    match _kind(name):
        case ".json":
            return json_rows(path)
        case ".csv":
            return _table_rows(path, ",")
        case ".tsv":
            return _table_rows(path, "\t")
    return read_jsonl(name if name == STDIO else path)


def _kind(name: str) -> str:
    return Path(name.lower().removesuffix(".gz")).suffix


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``(where, row)`` of a json file, as ``read_rows`` does."""
    with text_bytes(path, "json file") as stream:
        data = stream.read()
    try:
        value = parse_json(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):
            yield from read_jsonl(path)  # the suffix of json with an object per line in it
            return
        kind = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "not valid json"
        raise UserError(f"{path}: {kind}: {error}", "fix the file") from error
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list) and item and isinstance(item[0], dict)]
        value = lists[0] if len(lists) == 1 else [value]
    if not isinstance(value, list):
        raise UserError(f"{path}: expected a list of json objects, found {type(value).__name__}")
    for number, row in enumerate(value, start=1):
        where = f"{path}:row {number}"
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a json object, found {type(row).__name__}")
        yield where, row


def _table_rows(path: Path, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(_LONGEST_CELL)
    number = 0
    with text_bytes(path, "table") as stream, io.TextIOWrapper(stream, encoding="utf-8", newline="") as text:
        try:
            reader = csv.reader(text, delimiter=delimiter, strict=True)
            header = next(reader, [])
            if len(set(header)) < len(header):
                twice = next(name for name in header if header.count(name) > 1)
                raise UserError(f"{path}: the column '{twice}' occurs twice in the header", "rename or remove one")
            for cells in reader:
                if not cells:
                    continue
                number += 1
                if len(cells) != len(header):
                    raise UserError(
                        f"{path}:row {number} has {len(cells)} cells, the header names {len(header)}",
                        "put quotes around a cell that holds the delimiter",
                    )
                yield f"{path}:row {number}", dict(zip(header, cells, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            kind = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "malformed"
            raise UserError(f"{path}:row {number + 1}: {kind}: {error}", "fix or remove that row") from error
    if not number:
        raise UserError(f"{path}: no rows in it", "check the file")
