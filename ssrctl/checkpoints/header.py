"""The header of a safetensors file, used only after it was checked.

A file may be truncated, or made to do harm. The safetensors library refuses a header whose tensors overlap, leave gaps,
run backwards, overflow or do not end with the file. Three checks are added here: the header's size before anything of
it is read, a name that is given twice (the library takes the last), and shapes of empty tensors from which torch
cannot compute strides.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from ssrctl.errors import UserError
from ssrctl.io.artifacts import open_safetensors
from ssrctl.io.files import existing_file

# The largest headers of published models have about 20 MB. Hostile json of this size takes about 1 GB as objects.
MAX_HEADER_BYTES = 32 * 2**20
_MAX_ELEMENTS = 2**63 - 1
_LENGTH_BYTES = 8
_LFS_POINTER = b"version "  # https://git-lfs.github.com/spec/v1


def read_header(path: str | Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Return the entries of a safetensors file in the order of their bytes, and the offset at which their bytes begin.

    Returns:
        ``{name: {"dtype": str, "shape": [int, ...], "data_offsets": [start, end]}}``: sizes of 0 or more, and the
        tensors' bytes follow each other from 0 to the end of the file.

    Raises:
        UserError: missing, truncated, foreign or hostile file.
    """
    file = existing_file(path, "safetensors file")
    with file.open("rb") as stream:
        length = int.from_bytes(start := stream.read(_LENGTH_BYTES), "little")
        if start == _LFS_POINTER:
            raise UserError(f"{file} is a git-lfs pointer, not the file itself", "fetch the files with `git lfs pull`")
        if length > MAX_HEADER_BYTES:
            _refuse(file, f"its header has {length:,} bytes, at most {MAX_HEADER_BYTES:,} are read")
        with open_safetensors(file, "np"):  # makes the library's checks
            text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        _refuse(file, f"its header is not json: {ascii(str(error)[:120])[1:-1]}")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        # Sizes are taken without zeros: torch multiplies all of them for the strides of an empty tensor too.
        if math.prod(one for one in entry["shape"] if one) > _MAX_ELEMENTS:
            _refuse(file, f"tensor {ascii(name)[:80]} has more than 2^63 elements: {ascii(entry['shape'])[:80]}")
    ordered = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))
    return ordered, _LENGTH_BYTES + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is given twice")
    return found


def _refuse(file: Path, problem: str) -> NoReturn:
    raise UserError(
        f"{file} is not a readable safetensors file ({file.stat().st_size} bytes): {problem}",
        "it may be truncated; make or copy it again",
    )
