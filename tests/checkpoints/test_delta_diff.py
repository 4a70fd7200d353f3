"""The difference of two checkpoints: exactly the coordinates whose bits differ, however the work is cut up."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ssrctl.checkpoints import delta_diff, tensor_files
from ssrctl.checkpoints.delta import DeltaFile, load_delta
from ssrctl.checkpoints.delta_diff import Difference, write_difference
from ssrctl.checkpoints.fingerprint import fingerprint
from ssrctl.checkpoints.reader import TensorReader, open_delta
from ssrctl.errors import UserError

Weights = dict[str, Tensor]
INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.int8: torch.int8}
SHAPES: dict[str, tuple[int, ...]] = {"a.weight": (5, 7), "b.values": (9,), "scalar": (), "none": (0, 3), "same": (4,)}


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().view(INTEGER[tensor.dtype]).flatten().tolist()


def any_bits(dtype: torch.dtype, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Half special values (zeros of both signs, infinities, NaNs with payloads, a denormal), half random bits."""
    integer = INTEGER[dtype]
    width = torch.iinfo(integer)
    inf = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.int8: 5}[dtype]
    special = torch.tensor([0, width.min, inf, inf + width.min, inf + 1, inf + 2, 1]).to(integer)
    raw = torch.randint(width.min, width.max, shape, generator=generator).to(integer)
    pick = special[torch.randint(len(special), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.5, pick, raw).view(dtype)


def save(folder: Path, tensors: Weights, num_files: int) -> Path:
    """A model folder of one file, or of shards with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {name: f"model-{i % num_files}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def diff(base: Path, tuned: Path, path: Path, *, small: bool = True) -> Difference:
    with TensorReader(base) as one, TensorReader(tuned) as other:
        order = one.in_file_order(list(one.shapes))
        return write_difference(path, one, other, order, settings={"by": "test"}, small=small)


def assert_lists(path: Path, base: Weights, tuned: Weights) -> None:
    """The delta against a comparison of python integers."""
    delta = load_delta(path, lambda name, indices: base[name].flatten()[indices])
    for name in base:
        pairs = list(zip(bits(base[name]), bits(tuned[name]), strict=True))
        expected = [i for i, (x, y) in enumerate(pairs) if x != y]
        indices, values = delta.changes.get(name, (torch.empty(0), torch.empty(0, dtype=tuned[name].dtype)))
        assert indices.tolist() == expected, name
        assert bits(values) == [pairs[i][1] for i in expected] and values.dtype == tuned[name].dtype


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    dtypes=st.lists(st.sampled_from(list(INTEGER)), min_size=5, max_size=5),
    files=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    piece=st.sampled_from([1, 4, 9, 2**20]),
    small=st.booleans(),
)
def test_the_coordinates_whose_bits_differ(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    dtypes: list[torch.dtype],
    files: tuple[int, int],
    piece: int,
    small: bool,
) -> None:
    tmp_path = tmp_path_factory.mktemp("diff")
    generator = torch.Generator().manual_seed(seed)
    base = {name: any_bits(dtype, SHAPES[name], generator) for name, dtype in zip(SHAPES, dtypes, strict=True)}
    tuned = {}
    for name, tensor in base.items():
        keep = torch.rand(tensor.shape, generator=generator) < (1.0 if name == "same" else 0.6)
        tuned[name] = torch.where(keep, tensor, any_bits(tensor.dtype, SHAPES[name], generator))
    folders = [save(tmp_path / side, one, number) for side, one, number in zip(("base", "tuned"), (base, tuned), files)]  # noqa: B905
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_files, "PIECE_ELEMENTS", piece)
        made = diff(*folders, tmp_path / "d.safetensors", small=small)
    assert_lists(tmp_path / "d.safetensors", base, tuned)
    delta = DeltaFile(tmp_path / "d.safetensors")
    assert delta.base.fingerprint == made.base.fingerprint == fingerprint(base.items())
    assert delta.tuned is not None and delta.tuned.fingerprint == fingerprint(tuned.items())
    assert delta.shapes == SHAPES and delta.dtypes == {name: tensor.dtype for name, tensor in tuned.items()}
    assert {one.name: one.changed for one in made.tensors if one.changed} == delta.counts
    assert [one.name for one in made.tensors] == sorted(SHAPES)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["base", "d.safetensors", "tuned"]


def test_what_the_file_says(tmp_path: Path) -> None:
    base = {"w": torch.zeros(2, 3).bfloat16(), "b": torch.zeros(4).bfloat16()}
    tuned = {"w": torch.tensor([[0, 0, 2], [0, 3, 0]]).bfloat16(), "b": base["b"]}
    folders = save(tmp_path / "base", base, 1), save(tmp_path / "tuned", tuned, 1)
    diff(*folders, tmp_path / "small.safetensors")
    with safe_open(tmp_path / "small.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["w.gaps", "w.steps"]
        small = file.metadata()
        # a zstd frame of: two numbers; two coordinates before index 2, one more before index 4
        assert zstandard.decompress(file.get_tensor("w.gaps").numpy().tobytes(), 99) == b"\x02\0\0\0\x02\x01"
        # 2.0 is 0x4000, so that the step from 0 is coded as 0x8000: an escape, and 0x8000 - 255 byte by byte
        assert zstandard.decompress(file.get_tensor("w.steps").numpy().tobytes(), 99)[4:] == b"\xff\xff\x01\x81\x7f\x7f"
    assert json.loads(small["coding"]) == {"name": "gaps-steps", "version": 1}
    assert json.loads(small["entries"]) == {"w": {"count": 2, "dtype": "bfloat16"}}
    diff(*folders, tmp_path / "d.safetensors", small=False)
    with safe_open(tmp_path / "d.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["w.indices", "w.values"]
        assert file.get_tensor("w.indices").dtype == torch.int32 and file.get_tensor("w.indices").tolist() == [2, 4]
        assert file.get_tensor("w.values").dtype == torch.bfloat16
        metadata = file.metadata()
    assert {key: value for key, value in small.items() if key not in ("coding", "entries")} == metadata
    assert metadata["ssrctl_kind"] == "delta" and metadata["format"] == "pt"
    assert json.loads(metadata["base"]) == {
        "name": "base", "revision": None, "fingerprint": fingerprint(base.items())
    }  # fmt: skip
    assert json.loads(metadata["tuned"])["name"] == "tuned"
    assert json.loads(metadata["shapes"]) == {"w": [2, 3], "b": [4]} and json.loads(metadata["count"]) == 2
    assert json.loads(metadata["dtypes"]) == {"w": "bfloat16", "b": "bfloat16"}
    assert json.loads(metadata["settings"]) == {"by": "test"}


def test_no_difference_is_a_delta_without_entries(tmp_path: Path) -> None:
    base = save(tmp_path / "base", {"w": torch.full((3,), math.nan)}, 1)
    made = diff(base, base, tmp_path / "d.safetensors")
    assert [one.changed for one in made.tensors] == [0]
    assert load_delta(tmp_path / "d.safetensors").count == 0


def test_the_tuned_dtype_counts_where_the_base_fits_into_it(tmp_path: Path) -> None:
    values = [1.0, -0.0, math.inf, math.nan, 2.0**-130]
    narrow, wide = torch.tensor(values).bfloat16(), torch.tensor(values).bfloat16().float()
    moved = wide.clone()
    moved[1], moved[4] = 0.0, 1.5
    for number, (base, tuned) in enumerate([(narrow, moved), (wide, moved.bfloat16())]):
        folder = tmp_path / str(number)
        path = folder / "d.safetensors"
        diff(save(folder / "b", {"w": base}, 1), save(folder / "t", {"w": tuned}, 1), path)
        (indices, changed) = load_delta(path, lambda _, indices, base=base: base[indices]).changes["w"]
        assert indices.tolist() == [1, 4] and changed.dtype == tuned.dtype and changed.tolist() == [0.0, 1.5]


@pytest.mark.parametrize(
    ("base", "tuned", "lost"),
    [
        (torch.tensor([1.0, 1.00390625, math.nan]), torch.bfloat16, "1 of 3"),  # 1 + 2^-8 needs eight bits
        (torch.tensor([1.0, 1e-8]).bfloat16(), torch.float16, "1 of 2"),  # below float16's smallest
        (torch.tensor([1e30, 2e30]).bfloat16(), torch.float16, "2 of 2"),  # infinite there
    ],
)
def test_a_base_that_would_be_rounded_is_refused(tmp_path: Path, base: Tensor, tuned: torch.dtype, lost: str) -> None:
    folders = save(tmp_path / "base", {"w": base}, 1), save(tmp_path / "tuned", {"w": base.to(tuned)}, 1)
    with pytest.raises(UserError, match=f"w is .* in BASE .* in TUNED, and {lost} base values have no exact") as caught:
        diff(*folders, tmp_path / "d.safetensors")
    assert caught.value.remedy is not None and "save_pretrained" in caught.value.remedy
    assert sorted(one.name for one in tmp_path.iterdir()) == ["base", "tuned"]


def test_codes_and_numbers_are_not_compared(tmp_path: Path) -> None:
    folders = (save(tmp_path / "b", {"w": torch.zeros(2).to(torch.int8)}, 1), save(tmp_path / "t", {"w": torch.zeros(2)}, 1))  # fmt: skip
    with pytest.raises(UserError, match="w is int8 in BASE and float32 in TUNED"):
        diff(*folders, tmp_path / "d.safetensors")


def test_an_interrupted_diff_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = (save(tmp_path / "base", {"a": torch.zeros(3), "b": torch.zeros(3)}, 1),
               save(tmp_path / "tuned", {"a": torch.ones(3), "b": torch.ones(3)}, 1))  # fmt: skip
    path = tmp_path / "d.safetensors"
    path.write_bytes(b"earlier")
    real = delta_diff.changed_indices
    calls = []

    def interrupted(*pieces: Tensor) -> Tensor:
        calls.append(pieces)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*pieces)

    monkeypatch.setattr(delta_diff, "changed_indices", interrupted)
    with pytest.raises(KeyboardInterrupt):
        diff(*folders, path)
    assert path.read_bytes() == b"earlier"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["base", "d.safetensors", "tuned"]


def test_other_readers_of_deltas_take_it(tmp_path: Path) -> None:
    base = {"w": torch.arange(6.0).view(2, 3).bfloat16(), "v": torch.ones(2).bfloat16()}
    tuned = {"w": base["w"] + 1, "v": base["v"]}
    folder = save(tmp_path / "base", base, 2)
    diff(folder, save(tmp_path / "tuned", tuned, 1), tmp_path / "d.safetensors")
    with TensorReader(folder) as reader:
        opened = open_delta(tmp_path / "d.safetensors", reader)
        assert all(torch.equal(opened.tensor(name), tensor) for name, tensor in tuned.items())
