"""The header of a safetensors file, believed only after it was checked.

A file may be torn, or made to do harm: its header may be said to be of any length, and what it says of the tensors may
overlap, leave gaps, run backwards or overflow. Everything is checked against the file's size before it is used, and
no more than ``MAX_HEADER_BYTES`` of it are ever read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ssrctl.errors import UserError
from ssrctl.io.files import existing_file

# The largest headers of published models have about 20 MB. Hostile json of this size takes about 1 GB as objects.
MAX_HEADER_BYTES = 32 * 2**20
_MAX_SIZE = 2**63 - 1
_LENGTH_BYTES = 8


def read_header(path: str | Path, item_bytes: Mapping[str, int]) -> tuple[dict[str, dict[str, Any]], int]:
    """The entries of a safetensors file in the order of their bytes, and where in the file their bytes begin.

    Args:
        path: the file.
        item_bytes: bytes per element of the dtypes whose tensors' sizes are to be checked, by the file's name for them.

    Returns:
        ``{name: {"dtype": str, "shape": [int, ...], "data_offsets": [start, end]}}``: sizes of 0 or more, and the
        tensors' bytes follow each other from 0 to the end of the file.

    Raises:
        UserError: missing, torn, foreign or hostile file.
    """
    file = existing_file(path, "safetensors file")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
            _refuse(file, f"its header should have {length:,} bytes" if size >= _LENGTH_BYTES else "it has no header")
        if length > MAX_HEADER_BYTES:
            _refuse(file, f"its header has {length:,} bytes, at most {MAX_HEADER_BYTES:,} are read")
        text = stream.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        _refuse(file, f"its header is not json: {_first_line(error)}")
    if not isinstance(header, dict):
        _refuse(file, "its header is no json object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(file, "its metadata holds something else than text")
    for name, entry in header.items():
        if problem := _problem(entry, item_bytes):
            _refuse(file, f"tensor {_shown(name)} {problem}")
    end = 0
    ordered = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    for name, entry in ordered:
        start, after = entry["data_offsets"]
        if start != end:
            what = "overlaps the one before it" if start < end else f"leaves a gap of {start - end:,} bytes before it"
            _refuse(file, f"tensor {_shown(name)} {what}")
        end = after
    if end != size - _LENGTH_BYTES - length:
        _refuse(file, f"its tensors should have {end:,} bytes, {size - _LENGTH_BYTES - length:,} are there")
    return dict(ordered), _LENGTH_BYTES + length


def _problem(entry: Any, item_bytes: Mapping[str, int]) -> str | None:
    """What is wrong with a tensor's entry, taken alone."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return "lacks its dtype, shape or offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        return "has a dtype that is no text"
    if not _sizes(shape):
        return "has a shape that is no list of sizes"
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return "has offsets that are no range of bytes"
    # Sizes are taken without zeros: torch multiplies all of them for the strides of an empty tensor too.
    if math.prod(one for one in shape if one) > _MAX_SIZE:
        return f"has more than 2^63 elements: its shape is {_shown(shape)}"
    if dtype in item_bytes and (nbytes := math.prod(shape) * item_bytes[dtype]) != offsets[1] - offsets[0]:
        return f"should have {nbytes:,} bytes by its shape, {offsets[1] - offsets[0]:,} by its offsets"
    return None


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and 0 <= one <= _MAX_SIZE for one in value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is given twice")
    return found


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _first_line(error: Exception) -> str:
    return ascii(str(error).partition("\n")[0][:120])[1:-1]


def _refuse(file: Path, problem: str) -> NoReturn:
    size = file.stat().st_size
    raise UserError(
        f"{file} is not a readable safetensors file ({size} bytes): {problem}",
        "it may be torn; make or copy it again",
    )
