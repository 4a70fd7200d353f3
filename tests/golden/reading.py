"""Files as plain values that can be compared: numbers as they are, tensors and long records as hashes."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

HASH, TEXT_HASH = "sha256:", "text-sha256:"

# Differs from run to run.
TIMINGS = frozenset(
    {
        "tokens_per_second",
        "peak_memory_bytes",
        "old_logprobs_seconds",
        "reference_seconds",
        "sample_seconds",
        "score_seconds",
        "update_seconds",
        "seconds",
        "seconds_per_call",
        "mean_latency_s",
    }
)
# Says how and by which release something was made, not what: renamed settings and newer releases are no difference.
# A file's size (``bytes``) and the hashes of input files (``inputs``) depend on the settings that the files hold, and
# the order of a safetensors file's metadata is drawn anew every time.
CIRCUMSTANCES = frozenset(
    {"settings", "versions", "ssrctl_version", "transformers_version", "inputs", "bytes", "bytes_frac"}
)
LEFT_OUT = TIMINGS | CIRCUMSTANCES
PROSE = frozenset({"rationale"})  # of records: sentences for people
# csv tables hold what their json twins hold; pages and plots are drawn; config.yaml holds the settings.
SKIPPED_ENDINGS = frozenset({".html", ".svg", ".csv", ".yaml", ".lock"})
SKIPPED_NAMES = frozenset({"COMPLETE"})
TABLES = "tables"


def read_folder(folder: Path, scrub: str) -> dict[str, Any]:
    """Read all files below ``folder``: path within it -> content as plain values.

    Args:
        folder: what a command wrote; may be missing.
        scrub: path of the working folder, which is taken out of texts.
    """
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or path.suffix in SKIPPED_ENDINGS or path.name in SKIPPED_NAMES:
            continue
        if path.parent.name == TABLES:
            if path.name == "index.json":
                found[path.parent.relative_to(folder).as_posix()] = _tables(path)
            continue
        found[name] = _content(path)
    return clean(found, scrub)


def clean(value: Any, scrub: str) -> Any:
    """Leave out timings and circumstances, and the working folder's path, at every depth."""
    if isinstance(value, dict):
        return {key: clean(held, scrub) for key, held in value.items() if not _left_out(key, held)}
    if isinstance(value, list):
        return [clean(held, scrub) for held in value]
    return value.replace(scrub, "FOLDER") if isinstance(value, str) else value


def _left_out(key: str, held: Any) -> bool:
    """Whether a value is a timing or a circumstance; so is the hash of a whole checkpoint file that `eval` notes."""
    return key in LEFT_OUT or (key == "checkpoint" and isinstance(held, str) and held.startswith(HASH))


def tensors_of(path: Path) -> dict[str, Any]:
    """Hash a safetensors file's tensors by name, dtype, shape and bytes; its metadata without settings as it is.

    The file's own bytes are not hashed, since its metadata holds settings and versions. ``unnamed`` leaves the
    tensors' names out of the hash.
    """
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    metadata = header.pop("__metadata__", {})
    named, unnamed = hashlib.sha256(), []
    for name in sorted(header):
        start, end = header[name]["data_offsets"]
        facts = json.dumps([header[name]["dtype"], header[name]["shape"]]).encode()
        body = hashlib.sha256(facts + raw[8 + size + start : 8 + size + end]).digest()
        named.update(name.encode() + b"\0" + body)
        unnamed.append(body)
    return {
        "tensors": len(header),
        "named": HASH + named.hexdigest(),
        "unnamed": HASH + hashlib.sha256(b"".join(sorted(unnamed))).hexdigest(),
        "metadata": {key: _metadata(key, text) for key, text in metadata.items() if key != "format"},
    }


def _metadata(key: str, text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return _digest(value) if key == "shapes" else value  # one entry for each parameter of the model


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return tensors_of(path)
    if path.suffix == ".jsonl":
        return _rows(path)
    if path.name == "tokenizer.json":
        return HASH + hashlib.sha256(path.read_bytes()).hexdigest()
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    return TEXT_HASH + hashlib.sha256(path.read_bytes()).hexdigest()


def _rows(path: Path) -> Any:
    """A run's metrics as they are; of longer records a hash, and one of their prose apart."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.name == "metrics.jsonl":
        return rows
    plain = [_without(row, LEFT_OUT | PROSE) for row in rows]
    prose = _digest([_without(row, LEFT_OUT) for row in rows]).removeprefix(HASH)
    return {"rows": len(rows), "content": _digest(plain), "with_prose": TEXT_HASH + prose}


def _without(value: Any, keys: frozenset[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(held, keys) for key, held in value.items() if key not in keys}
    return [_without(held, keys) for held in value] if isinstance(value, list) else value


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return HASH + hashlib.sha256(text.encode()).hexdigest()


def _tables(index: Path) -> list[Any]:
    """A report's tables in their order, so that one with another title, hence another file name, is still found."""
    names = [entry["name"] for entry in json.loads(index.read_text(encoding="utf-8"))]
    return [json.loads((index.parent / f"{name}.json").read_text(encoding="utf-8")) for name in names]
