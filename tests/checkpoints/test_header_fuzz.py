"""Torn, foreign and hostile safetensors headers end in one clear error, never in a crash, and nothing else is read."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from ssrctl.checkpoints.header import MAX_HEADER_BYTES
from ssrctl.checkpoints.reader import TensorReader
from ssrctl.checkpoints.tensor_files import stored_tensors
from ssrctl.errors import UserError

GOOD = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
DATA = bytes(range(16))


def write(path: Path, header: bytes, data: bytes = DATA, length: int | None = None) -> Path:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return path


def entry(**fields: Any) -> bytes:
    return json.dumps({"a": GOOD | fields}).encode()


def refusal(path: Path) -> str:
    for read in (stored_tensors, TensorReader):
        with pytest.raises(UserError) as caught:
            read(path)
    message = caught.value.message
    assert caught.value.remedy and message.isprintable() and len(message) < 600
    return caught.value.message


def test_the_good_header_is_good(tmp_path: Path) -> None:
    [place] = stored_tensors(write(tmp_path / "t.safetensors", entry())).values()
    assert (place.dtype, place.shape) == (torch.float32, (4,))
    with TensorReader(tmp_path / "t.safetensors") as reader:
        assert reader.tensor("a").numpy().tobytes() == DATA


TWO = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE = {
    "empty": (b"", "EOF while parsing"),
    "no json": (b"{", "EOF while parsing"),
    "no object": (b"[]", "invalid type: sequence"),
    "no text": (b'{"\xff": {}}', "invalid UTF-8"),
    "deep": (b"[" * 200_000, "invalid JSON"),
    "long number": (b'{"a": ' + b"9" * 5000 + b"}", "number out of range"),
    "nothing of the data": (b"{}", "file not fully covered"),
    "no entry": (b'{"a": 3}', "expected struct TensorInfo"),
    "no shape": (b'{"a": {"dtype": "F32", "data_offsets": [0, 16]}}', "missing field `shape`"),
    "twice": (b'{"a": %b, "a": %b}' % ((json.dumps(GOOD).encode(),) * 2), "a name is given twice"),
    "metadata": (b'{"__metadata__": {"a": 1}, "a": %b}' % json.dumps(GOOD).encode(), "expected a string"),
    "dtype": (entry(dtype=3), "expected string"),
    "shape of floats": (entry(shape=[4.0]), "expected usize"),
    "shape of truth": (entry(shape=[4, True]), "expected usize"),
    "negative": (entry(shape=[-4]), "expected usize"),
    "overflow": (entry(shape=[2**40, 2**40]), "overflow computing"),
    "overflow of nothing": (entry(shape=[2**40, 0, 2**40]), "invalid shape"),
    "beyond 64 bits": (entry(shape=[2**64]), "expected usize"),
    "wraps around": (entry(shape=[2**62 + 4]), "overflow computing"),
    "too few bytes": (entry(shape=[3]), "invalid shape"),
    "backwards": (entry(data_offsets=[16, 0]), "invalid offset"),
    "negative offsets": (entry(data_offsets=[-16, 0]), "expected usize"),
    "three offsets": (entry(data_offsets=[0, 8, 16]), "invalid length 3"),
    "beyond the end": (entry(shape=[2**40], data_offsets=[0, 2**42]), "file not fully covered"),
    "not from the start": (entry(shape=[2], data_offsets=[8, 16]), "invalid offset for tensor `a`"),
    "overlap": (json.dumps({"a": GOOD, "b": TWO | {"data_offsets": [8, 16]}}).encode(), "invalid offset for tensor `b`"),
    "the same bytes twice": (json.dumps({"a": GOOD, "b": GOOD}).encode(), "invalid offset for tensor"),
    "gap": (json.dumps({"a": TWO, "b": TWO | {"shape": [1], "data_offsets": [12, 16]}}).encode(), "invalid offset for tensor `b`"),
    "absurd and empty": (
        json.dumps({"a": GOOD, "b": {"dtype": "F32", "shape": [0, 2**40, 2**40], "data_offsets": [16, 16]}}).encode(),
        "more than 2^63 elements",
    ),
    "ink in an offset": (
        json.dumps({"a": GOOD, "\x1b[31m\n": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}).encode(),
        "invalid offset for tensor",
    ),
    "ink": (b'{"\\u001b[31m": {}}', "missing field `dtype`"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_headers(tmp_path: Path, kind: str) -> None:
    header, said = HOSTILE[kind]
    assert said in refusal(write(tmp_path / "t.safetensors", header))


def test_unknown_dtypes_are_refused(tmp_path: Path) -> None:
    assert "unknown variant `F31`" in refusal(write(tmp_path / "t.safetensors", entry(dtype="F31")))
    path = write(tmp_path / "t.safetensors", entry(dtype="F4", shape=[32]))
    assert stored_tensors(path)["a"].dtype is None
    with pytest.raises(UserError, match="is stored as F4, which cannot be compared"):
        TensorReader(path)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_wrong_lengths(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "t.safetensors", entry(), length=length)
    assert (f"has {length:,} bytes, at most" if length > 1000 else "EOF while parsing") in refusal(path)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 40])
def test_short_files(tmp_path: Path, kept: int) -> None:
    path = write(tmp_path / "t.safetensors", entry())
    path.write_bytes(path.read_bytes()[:kept])
    assert ("header too small" if kept < 8 else "invalid header length") in refusal(path)


def test_a_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with path.open("wb") as file:  # sparse: takes no room on disk
        file.write((2**33).to_bytes(8, "little"))
        file.truncate(2**34)
    tracemalloc.start()
    try:
        assert f"at most {MAX_HEADER_BYTES:,} are read" in refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_tensors_without_elements(tmp_path: Path) -> None:
    tensors = {"none": torch.ones(0, 7), "one": torch.tensor(2.0), "also": torch.ones(3, 0)}
    save_file(tensors, tmp_path / "t.safetensors")
    with TensorReader(tmp_path / "t.safetensors") as reader:
        assert reader.shapes == {"also": (3, 0), "none": (0, 7), "one": ()}
        assert [reader.tensor(name).numel() for name in reader.shapes] == [0, 0, 1]
        assert [sum(map(len, reader.pieces(name))) for name in reader.shapes] == [0, 0, 1]


def read_all(path: Path) -> None:
    """Everything that a file says it holds; the only error that may come out is the user's."""
    try:
        with TensorReader(path) as reader:
            for name, shape in reader.shapes.items():
                assert reader.tensor(name).shape == shape
                assert sum(map(len, reader.pieces(name))) == torch.Size(shape).numel()
    except UserError as error:
        assert error.message


@pytest.mark.parametrize("seed", range(40))
def test_broken_bytes(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    tensors = {"w": torch.ones(3, 5), "b": torch.ones(2, dtype=torch.bfloat16), "e": torch.ones(0, 4)}
    save_file(tensors, tmp_path / "good.safetensors", metadata={"format": "pt"})
    good = (tmp_path / "good.safetensors").read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")
    for _ in range(20):
        data = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(end)
            match draw.randrange(4):
                case 0:
                    data[place] = draw.randrange(256)
                case 1:
                    data[place] = ord(draw.choice('0123456789-[]{}",:'))
                case 2:
                    data[place:place] = draw.choice([b"0", b"-", b"9" * 20, b"[", b"null", b"\0"])
                case _:
                    del data[place : place + draw.randint(1, 9)]
        # Often the length still fits what follows, so that the damage is met behind it.
        if draw.random() < 0.7:
            data[:8] = max(len(data) - (len(good) - end) - 8, 0).to_bytes(8, "little")
        (tmp_path / "t.safetensors").write_bytes(data)
        read_all(tmp_path / "t.safetensors")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.sampled_from([0, 4, 8, 16, 1.5, "F32", "U8", "F4", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
SIZES = st.lists(st.sampled_from([0, 1, 2, 4, 8, 16, 2**31, 2**62, 2**63 - 1]), max_size=3)
ENTRY = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "U8", "BOOL", "F4", "X"]) | JSON, "shape": SIZES | JSON},
    optional={"data_offsets": SIZES | JSON, "more": JSON},
)


@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__", "\ud800", "ü"]), ENTRY | JSON, max_size=3))
def test_made_up_headers(tmp_path: Path, header: dict[str, Any]) -> None:
    read_all(write(tmp_path / "t.safetensors", json.dumps(header).encode()))
