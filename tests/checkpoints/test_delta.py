"""Deltas: bit-exact, and refused where they do not belong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ssrctl.checkpoints import delta as delta_module
from ssrctl.checkpoints.delta import Delta, DeltaFile, apply_delta, changed_indices, load_delta, same_bits, save_delta
from ssrctl.errors import UserError
from ssrctl.io.artifacts import ModelIdentity
from ssrctl.io.packed_numbers import byte_tensor, pack_indices

BASE = ModelIdentity(name="tiny", revision=None, fingerprint="xxh3:base")
INTEGER = {
    torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float8_e4m3fn: torch.int8
}  # fmt: skip
DTYPES = list(INTEGER)


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().view(INTEGER[tensor.dtype]).flatten().tolist()


def draw_bits(dtype: torch.dtype, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Any bit pattern at all: NaNs with payloads, infinities, denormals, zeros of both signs."""
    width = torch.iinfo(INTEGER[dtype])
    raw = torch.randint(width.min, width.max, shape, generator=generator).to(INTEGER[dtype])
    quiet_nan = {4: 0x7FC00123, 2: 0x7FC5, 1: 0x7F}[dtype.itemsize]
    special = torch.tensor([0, width.min, quiet_nan, quiet_nan - 1, 1]).to(INTEGER[dtype])
    pick = special[torch.randint(len(special), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.5, pick, raw).view(dtype)


def difference(base: dict[str, Tensor], tuned: dict[str, Tensor]) -> Delta:
    changes = {}
    for name in base:
        indices = changed_indices(base[name], tuned[name])
        if indices.numel():
            changes[name] = (indices, tuned[name].flatten()[indices])
    return Delta(BASE, {n: tuple(t.shape) for n, t in base.items()}, changes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(seed=st.integers(0, 10_000), small=st.booleans())
def test_every_bit_comes_back(tmp_path: Path, dtype: torch.dtype, seed: int, small: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"a.weight": (5, 7), "a.values": (9,), "scalar": (), "same": (3,)}
    base = {name: draw_bits(dtype, shape, generator) for name, shape in shapes.items()}
    tuned = {}
    for name, tensor in base.items():
        other, keep = draw_bits(dtype, tensor.shape, generator), torch.rand(tensor.shape, generator=generator) < 0.5
        tuned[name] = tensor.clone() if name == "same" else torch.where(keep, tensor, other)
    delta = difference(base, tuned)
    if small:
        before = {name: base[name].flatten()[indices] for name, (indices, _) in delta.changes.items()}
        delta = dataclasses.replace(delta, before=before)
    expected = {
        n: [i for i, (x, y) in enumerate(zip(bits(base[n]), bits(tuned[n]), strict=True)) if x != y] for n in base
    }
    assert {n: delta.changes[n][0].tolist() if n in delta.changes else [] for n in base} == expected
    assert delta.count == sum(map(len, expected.values()))
    path = tmp_path / "delta.safetensors"
    save_delta(path, delta, {"step": 3})
    found = load_delta(path, lambda name, indices: base[name].flatten()[indices])
    assert (found.base, found.shapes, found.count) == (BASE, shapes, delta.count)
    for name, (indices, values) in found.changes.items():
        assert (indices.tolist(), bits(values)) == (delta.changes[name][0].tolist(), bits(delta.changes[name][1]))
    model = {name: tensor.clone() for name, tensor in base.items()}
    apply_delta(DeltaFile(path), model, BASE.fingerprint)
    assert {n: bits(t) for n, t in model.items()} == {n: bits(t) for n, t in tuned.items()}


def test_zeros_of_two_signs_differ_and_a_nan_equals_itself() -> None:
    nan = float("nan")
    a = torch.tensor([0.0, nan, 1.0]).bfloat16()
    b = torch.tensor([-0.0, nan, 1.0]).bfloat16()
    assert same_bits(a, b).tolist() == [False, True, True]
    assert changed_indices(a, b).tolist() == [0]
    x = torch.arange(6.0).view(2, 3)
    assert changed_indices(x.T, x.T + torch.tensor([[0, 1], [0, 0], [0, 0]])).tolist() == [1]


def example() -> Delta:
    changes = {"w": (torch.tensor([1, 5]), torch.tensor([7.0, 8.0])), "b": (torch.tensor([0]), torch.tensor([9.0]))}
    return Delta(BASE, {"w": (2, 3), "b": (1,), "unchanged": (4,)}, changes)


def zeros() -> dict[str, Tensor]:
    return {"w": torch.zeros(2, 3), "b": torch.zeros(1), "unchanged": torch.zeros(4)}


def test_what_the_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    save_delta(path, example(), {"step": 3})
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == ["b.indices", "b.values", "w.indices", "w.values"]
        assert file.get_tensor("w.indices").dtype == torch.int32
        metadata = file.metadata()
    assert json.loads(metadata["base"])["fingerprint"] == "xxh3:base" and json.loads(metadata["count"]) == 3
    assert json.loads(metadata["shapes"]) == {"w": [2, 3], "b": [1], "unchanged": [4]}
    assert json.loads(metadata["settings"]) == {"step": 3}


def test_indices_beyond_int32_are_kept_wide(tmp_path: Path) -> None:
    for last, dtype in ((2**31 - 1, torch.int32), (2**31, torch.int64)):
        changes = {"w": (torch.tensor([0, last]), torch.ones(2))}
        save_delta(tmp_path / "d.safetensors", Delta(BASE, {"w": (2**20, 2**12)}, changes))
        with safe_open(tmp_path / "d.safetensors", framework="pt") as file:
            assert file.get_tensor("w.indices").dtype == dtype
        assert load_delta(tmp_path / "d.safetensors").changes["w"][0].tolist() == [0, last]


def test_no_change_at_all(tmp_path: Path) -> None:
    save_delta(tmp_path / "d.safetensors", Delta(BASE, {"w": (2,)}, {}))
    found = load_delta(tmp_path / "d.safetensors")
    assert found.count == 0 and found.shapes == {"w": (2,)}


def test_a_delta_applies_to_its_own_base_alone(tmp_path: Path) -> None:
    save_delta(tmp_path / "d.st", example())
    delta, model = DeltaFile(tmp_path / "d.st"), zeros()
    with pytest.raises(UserError, match=r"d.st belongs to tiny xxh3:base, this model has xxh3:other"):
        apply_delta(delta, model, "xxh3:other")
    wrong_dtype = zeros() | {"w": torch.zeros(2, 3).bfloat16()}
    with pytest.raises(UserError, match=r"w holds float32, the model was loaded as bfloat16") as caught:
        apply_delta(delta, wrong_dtype, BASE.fingerprint)
    assert caught.value.remedy == "load the model with --dtype float32"
    with pytest.raises(UserError, match="w is absent or has another shape"):
        apply_delta(delta, zeros() | {"w": torch.zeros(3, 2)}, BASE.fingerprint)
    last_is_missing = {n: t for n, t in zeros().items() if n != "b"}
    with pytest.raises(UserError, match="b is absent"):
        apply_delta(delta, last_is_missing, BASE.fingerprint)
    for tensors in (model, wrong_dtype, last_is_missing):
        assert all(int(t.count_nonzero()) == 0 for t in tensors.values()), "a refused delta wrote something"
    apply_delta(delta, model, BASE.fingerprint)
    assert model["w"].tolist() == [[0, 7, 0], [0, 0, 8]] and model["b"].tolist() == [9]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w.indices": torch.tensor([1, 6])}, r"not ascending within 0\.\.5"),
        ({"w.indices": torch.tensor([-1, 5])}, "not ascending"),
        ({"w.indices": torch.tensor([5, 1])}, "not ascending"),
        ({"w.indices": torch.tensor([5, 5])}, "not ascending"),
        ({"w.indices": torch.tensor([1.0, 5.0])}, "not a list of integers"),
        ({"w.indices": torch.tensor([[1, 5]]), "w.values": torch.ones(1, 2)}, "not a list of integers"),
        ({"w.values": torch.ones(3)}, "do not pair up"),
        ({"w.values": None}, "do not pair up"),
        ({"w.indices": None}, "do not pair up"),
        ({"new.indices": torch.tensor([0]), "new.values": torch.ones(1)}, "new: indices and values do not pair up"),
        ({"w.values": torch.ones(2, dtype=torch.int32)}, "w: the values are I32, not floating-point numbers"),
        ({"w.extra": torch.ones(2)}, "does not hold the 3 entries that it names"),
        ({"w.indices": torch.tensor([1]), "w.values": torch.ones(1)}, "does not hold the 3 entries that it names"),
        ({"stray": torch.ones(2)}, "indices and values do not pair up"),
    ],
    ids=range(14),
)
def test_damaged_deltas_are_refused(tmp_path: Path, change: dict[str, Tensor | None], message: str) -> None:
    path = tmp_path / "d.safetensors"
    save_delta(path, example())
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()} | change  # noqa: SIM118
    save_file({name: t for name, t in tensors.items() if t is not None}, path, metadata=metadata)
    with pytest.raises(UserError, match=message):
        load_delta(path)


def huge_frame(count: int, window_log: int) -> Tensor:
    """A stream of zeros that says how much memory its reader needs."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=window_log)
    block = (2**20).to_bytes(4, "little") + bytes(2**20)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return byte_tensor(b"".join(frame.compress(block) for _ in range(count >> 20)) + frame.flush())


def packed(*indices: int) -> Tensor:
    return pack_indices([torch.tensor(indices)], 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w.gaps": packed(1, 5)[:-5]}, "w: the compressed data end too early"),
        ({"w.gaps": packed(1, 5) ^ 64}, r"w: the compressed data are corrupt \("),
        ({"w.gaps": packed(1, 6)}, r"w: indices are not ascending within 0\.\.5"),
        ({"w.gaps": packed(1)}, "w: indices and values do not pair up"),
        ({"w.gaps": packed(1, 4, 5)}, "w: indices and values do not pair up"),
        ({"w.gaps": torch.zeros(9)}, "w: gaps and steps do not pair up"),
        ({"w.steps": None}, "w: gaps and steps do not pair up"),
        ({"stray": torch.ones(2)}, "does not hold the 3 entries"),
        # ten million numbers in two hundred bytes, in a frame that asks for a gigabyte to be unpacked
        ({"w.gaps": huge_frame(10_000_000, 30)}, "corrupt .*too much memory"),
        ({"w.gaps": huge_frame(10_000_000, 17)}, r"indices are not ascending within 0\.\.5"),
        ({"coding": {"name": "gaps-steps", "version": 2}}, "this version reads .*'version': 1"),
        (
            {"entries": {"w": {"count": 2, "dtype": "int8"}, "b": {"count": 1, "dtype": "float32"}}},
            "w: the values are int8",
        ),
        ({"entries": {"w": {"count": 2}}}, "w.dtype' is missing"),
    ],
    ids=range(13),
)
def test_damaged_small_deltas_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path, base = tmp_path / "d.safetensors", zeros()
    before = {name: base[name].flatten()[indices] for name, (indices, _) in example().changes.items()}
    save_delta(path, dataclasses.replace(example(), before=before))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | {
            key: json.dumps(value) for key, value in change.items() if isinstance(value, dict)
        }
        tensors = {name: file.get_tensor(name) for name in file.keys()} | change  # noqa: SIM118
    save_file({name: t for name, t in tensors.items() if isinstance(t, Tensor)}, path, metadata=metadata)
    with pytest.raises(UserError, match=message):
        load_delta(path, lambda name, indices: base[name].flatten()[indices])


def test_the_small_form_needs_the_base_for_values_only(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    save_delta(path, dataclasses.replace(example(), before={"w": torch.tensor([6.0, 9.0]), "b": torch.zeros(1)}))
    assert [indices.tolist() for indices, _ in DeltaFile(path).blocks("w")] == [[1, 5]]
    with pytest.raises(UserError, match="steps from those of tiny, which is not at hand"):
        load_delta(path)


def test_torn_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    save_delta(path, example())
    data = path.read_bytes()
    for keep in (0, 7, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:keep])
        with pytest.raises(UserError, match="not a readable safetensors file"):
            load_delta(path)
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(UserError, match="not a delta file"):
        load_delta(path)
    save_delta(path, example())
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | {"base": "null"}
    save_file({"w.indices": torch.tensor([0]), "w.values": torch.ones(1)}, path, metadata=metadata)
    with pytest.raises(UserError, match="'base' does not name a model"):
        load_delta(path)


def with_metadata(path: Path, **changes: str) -> Path:
    """The example delta with other metadata."""
    save_delta(path, example())
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata=metadata | changes)
    return path


FLOATS = {"w": "float32", "b": "float32", "unchanged": "float32"}


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        ("[]", "does not name every tensor's dtype"),
        ('{"w": "float32"}', "does not name every tensor's dtype"),
        (json.dumps(FLOATS | {"b": "float33"}), "does not name every tensor's dtype"),
        (json.dumps(FLOATS | {"b": ["float32"]}), "does not name every tensor's dtype"),
        (json.dumps(FLOATS | {"b": "bfloat16"}), "b: the values are F32, not bfloat16"),
    ],
    ids=range(5),
)
def test_declared_dtypes_must_be_those_of_the_values(tmp_path: Path, dtypes: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DeltaFile(with_metadata(tmp_path / "d.safetensors", dtypes=dtypes))
    declared = DeltaFile(with_metadata(tmp_path / "d.safetensors", dtypes=json.dumps(FLOATS)))
    assert declared.dtypes == dict.fromkeys(FLOATS, torch.float32)


def test_blocks_are_checked_against_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_module, "BLOCK_ENTRIES", 2)
    changes = {"w": (torch.tensor([0, 2, 3, 4, 5]), torch.arange(5.0))}
    path = tmp_path / "d.safetensors"
    save_delta(path, Delta(BASE, {"w": (2, 3)}, changes))
    file = DeltaFile(path)
    blocks = list(file.blocks("w"))
    assert [indices.tolist() for indices, _ in blocks] == [[0, 2], [3, 4], [5]]
    assert [values.tolist() for _, values in blocks] == [[0, 1], [2, 3], [4]]
    assert torch.equal(file.change("w")[1], torch.arange(5.0)) and list(file.blocks("absent")) == []
    for listed in ([0, 2, 2, 4, 5], [0, 3, 1, 4, 5], [0, 2, 3, 4, 6]):
        save_delta(path, Delta(BASE, {"w": (2, 3)}, {"w": (torch.tensor(listed), torch.arange(5.0))}))
        with pytest.raises(UserError, match=r"not ascending within 0\.\.5"):
            load_delta(path)
