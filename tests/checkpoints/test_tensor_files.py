"""Safetensors in pieces: what is written the library reads, and the other way round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssrctl.checkpoints.tensor_files import TensorSpool, read_pieces, stored_tensors
from ssrctl.errors import UserError
from ssrctl.io.tensor_writing import DTYPES, NewTensor, aligned_order, stored_bytes, write_header

ALL_DTYPES = [getattr(torch, name) for name in DTYPES.values()]


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    count = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype == torch.bool else 256
    data = torch.randint(0, high, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return data.view(dtype).view(shape)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_pieces_hold_every_byte(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"b": random_bits(dtype, (5, 7)), "a": random_bits(dtype, (), 1), "empty": random_bits(dtype, (0, 3))}
    save_file(tensors, tmp_path / "t.safetensors")
    places = stored_tensors(tmp_path / "t.safetensors")
    assert places.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (places[name].dtype, places[name].shape) == (dtype, tuple(tensor.shape))
        for elements in (1, 6, 7, 35, 36, None):
            pieces = list(read_pieces(tmp_path / "t.safetensors", places[name], elements))
            assert b"".join(map(raw, pieces)) == raw(tensor)
            assert all(piece.dtype == dtype and piece.dim() == 1 for piece in pieces)
            assert all(len(piece) == elements for piece in pieces[:-1])


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    # odd lengths of narrow types would push wider ones off their boundary if they came first
    tensors = {f"{dtype} 'ü'": random_bits(dtype, (3, 5), seed) for seed, dtype in enumerate(ALL_DTYPES)}
    tensors["scalar"] = torch.tensor(1.5, dtype=torch.float64)
    order = aligned_order(NewTensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())
    with (tmp_path / "t.safetensors").open("wb") as file:
        write_header(file, order, {"format": "pt", "who": "ä"})
        for one in order:
            file.write(stored_bytes(tensors[one.name]))
    found = load_file(tmp_path / "t.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape, raw(found[name])) == (tensor.dtype, tensor.shape, raw(tensor))
    with safe_open(tmp_path / "t.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "who": "ä"}
    for place in stored_tensors(tmp_path / "t.safetensors").values():
        assert place.dtype is not None and place.start % place.dtype.itemsize == 0


@given(
    lengths=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), max_size=5),
    values=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8]),
)
def test_a_spool_puts_pieces_together(tmp_path: Path, lengths: list[list[int]], values: torch.dtype) -> None:
    # float32 values are as wide as int32 indices: their pieces alternate and still must not mix
    spool = TensorSpool(tmp_path)
    expected: dict[str, list[Tensor]] = {}
    for number, pieces in enumerate(lengths):
        for position, length in enumerate(pieces):
            for suffix, dtype in (("values", values), ("indices", torch.int32)):
                piece = random_bits(dtype, (length,), 10 * number + position)
                expected.setdefault(f"t{number}.{suffix}", []).append(piece)
                spool.append(f"t{number}.{suffix}", piece)
    spool.save(tmp_path / "out.safetensors", {"k": "v"})
    spool.close()
    found = load_file(tmp_path / "out.safetensors")
    assert {name: raw(tensor) for name, tensor in found.items()} == {
        name: b"".join(map(raw, pieces)) for name, pieces in expected.items()
    }
    assert all(
        place.start % place.dtype.itemsize == 0 for place in stored_tensors(tmp_path / "out.safetensors").values()
    )  # type: ignore[union-attr]


def test_pieces_of_two_tensors_must_not_alternate(tmp_path: Path) -> None:
    spool = TensorSpool(tmp_path)
    for name in ("a.values", "b.values"):
        spool.append(name, torch.ones(2))
    with pytest.raises(AssertionError, match="alternate"):
        spool.append("a.values", torch.ones(2))
    spool.close()


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"w": torch.ones(100)}, path)
    place = stored_tensors(path)["w"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="ends too early"):
        list(read_pieces(path, place, 30))
    with pytest.raises(UserError, match="not a readable safetensors file"):
        stored_tensors(path)
