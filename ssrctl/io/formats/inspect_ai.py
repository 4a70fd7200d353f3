"""Logs of inspect_ai: the samples of a ``.eval`` archive, or of a ``.json`` log (written by 0.3.285)."""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ssrctl.errors import UserError
from ssrctl.io import console
from ssrctl.io.files import existing_file
from ssrctl.io.formats.base import Format, Row, others
from ssrctl.io.jsonl import parse_json
from ssrctl.io.records import RECORD_FIELDS
from ssrctl.io.row_fields import is_empty, is_messages, message_text

SUFFIX = ".eval"
_SAMPLES = "samples/"
_LARGEST = 2**30  # bytes of one sample: an archive may unpack to any size
_ZSTANDARD = 93  # the compression of newer logs, which zipfile reads from Python 3.14 on


def _fits(row: Mapping[str, Any]) -> bool:
    return _is_log(row) or (isinstance(row.get("output"), dict) and "choices" in row["output"] and "epoch" in row)


def _is_log(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("samples"), list) and isinstance(row.get("eval"), dict)


def archive_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield ``(where, sample)`` of a ``.eval`` archive, in the order of the log; nothing is unpacked to disk.

    Samples that ended in an error without a response are left out with a warning.

    Raises:
        UserError: not found, not such an archive, or a sample that cannot be read.
    """
    existing_file(path, "file of records")
    num_failed = 0
    try:
        with zipfile.ZipFile(path) as archive:
            for part in archive.infolist():
                if not (part.filename.startswith(_SAMPLES) and part.filename.endswith(".json")):
                    continue
                where = f"{path}:{part.filename}"
                if part.file_size > _LARGEST:
                    raise UserError(f"{where} has {part.file_size} bytes, at most {_LARGEST} are read")
                row = _sample(_unpacked(archive, part), where)
                if _failed(row):
                    num_failed += 1
                else:
                    yield where, row
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, struct.error) as error:
        raise UserError(f"{path} is not a whole log of inspect_ai: {error}", "copy or write it again") from error
    _warn_of(num_failed, path)


def _unpacked(archive: zipfile.ZipFile, part: zipfile.ZipInfo) -> bytes:
    """Return the contents of a part of an archive, at most ``_LARGEST`` bytes, checked."""
    if part.compress_type != _ZSTANDARD:
        return archive.read(part)
    import zstandard

    file = archive.fp
    assert file is not None
    file.seek(part.header_offset)
    head = file.read(30)  # of the part: fixed fields, of which the last two are the lengths of its name and extra field
    name, extra = struct.unpack("<HH", head[26:30])
    file.seek(name + extra, 1)
    try:
        with zstandard.ZstdDecompressor().stream_reader(file.read(part.compress_size)) as stream:
            data: bytes = stream.read(part.file_size)
    except zstandard.ZstdError as error:
        raise zipfile.BadZipFile(str(error)) from error
    if zlib.crc32(data) != part.CRC:
        raise zipfile.BadZipFile(f"{part.filename} has another checksum than the log gives")
    return data


def _sample(data: bytes, where: str) -> Row:
    try:
        row = parse_json(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid json: {error}", "write the log again") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a json object, found {type(row).__name__}")
    return row


def _failed(row: Mapping[str, Any]) -> bool:
    """Return True for a sample that ended in an error before the model answered."""
    output = row.get("output")
    return not is_empty(row.get("error")) and isinstance(output, dict) and is_empty(output.get("choices"))


def _warn_of(num_failed: int, where: object) -> None:
    if num_failed:
        console.warn(f"{where}: {num_failed} samples ended in an error without a response and are left out")


def _read(row: Row, where: str) -> list[Row]:
    """Return the record of a sample, or those of a whole log."""
    if not _is_log(row):
        return [_record(row, where)]
    made, num_failed = [], 0
    for number, sample in enumerate(row["samples"], start=1):
        if not isinstance(sample, dict) or not _fits(sample) or _is_log(sample):
            raise UserError(f"{where}: sample {number} is not one of inspect_ai", "write the log again")
        if _failed(sample):
            num_failed += 1
        else:
            made.append(_record(sample, f"{where}: sample {number}"))
    _warn_of(num_failed, where)
    return made


def _record(row: Row, where: str) -> Row:
    metadata = row.get("metadata")
    made: Row = others(metadata, *RECORD_FIELDS) if isinstance(metadata, dict) else {}
    epoch = row["epoch"]
    if type(epoch) is not int or epoch < 1:
        raise UserError(f"{where}: field 'epoch' must be a whole number from 1 on, found {json.dumps(epoch)[:40]}")
    name = row.get("id")
    made["id"] = f"{where.rsplit(':', 1)[-1] if name is None else name}/{epoch - 1}"
    given = row.get("input")
    if is_messages(given):
        assert given is not None
        users = [one for one in given if isinstance(one, Mapping) and one.get("role") == "user"]
        if not users:
            raise UserError(f"{where}: field 'input' has no message of the user")
        given = message_text(users[-1].get("content"), f"{where}: field 'input'")
    if not isinstance(given, str):
        raise UserError(f"{where}: field 'input' must be text or chat messages, found {type(given).__name__}")
    made["question"] = given
    if not is_empty(row.get("target")):
        made["answer"] = row["target"]
    return made | _response(row["output"], where)


def _response(output: Mapping[str, Any], where: str) -> Row:
    """Return the text of the first choice, its length and its end."""
    choices = output["choices"]
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise UserError(f"{where}: field 'output.choices' holds no response", "leave out samples that failed")
    message = choices[0].get("message")
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        content = [_as_text(part) for part in content]
    made: Row = {"response": message_text(content, f"{where}: field 'output.choices[0].message'")}
    if isinstance(reason := choices[0].get("stop_reason"), str):
        made["finished"] = reason == "stop"
    usage = output.get("usage")
    tokens = usage.get("output_tokens") if isinstance(usage, dict) else None
    return made | ({"num_tokens": tokens} if type(tokens) is int else {})


def _as_text(part: Any) -> Any:
    """Return a part of a message with reasoning as text between the usual tags."""
    if isinstance(part, dict) and part.get("type") == "reasoning" and isinstance(part.get("reasoning"), str):
        return {"type": "text", "text": f"<think>{part['reasoning']}</think>\n"}
    return part


INSPECT = Format(name="inspect", fields=("input", "output.choices", "epoch"), fits=_fits, reader=lambda: _read)
