"""Mask files, their identity checks, mask logs, and fingerprints."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ssrctl.checkpoints.fingerprint import fingerprint
from ssrctl.core.mask import BlockMask
from ssrctl.errors import UserError
from ssrctl.io.artifacts import (
    ModelIdentity,
    count_mask,
    load_mask,
    load_mask_for,
    load_tensors,
    read_metadata,
    save_mask,
    save_tensors,
)
from ssrctl.io.mask_log import QuestionLog, StepMaskLog, UnitLog, load_mask_log, mask_log_paths, save_mask_log

SHAPES = {"model.w": (20, 40), "bias": (5,), "tiles": (3, 3)}  # one is called like a part of the format
IDENTITY = ModelIdentity(name="org/model", revision="main", fingerprint="xxh3:0")


def draw_mask(seed: int = 0, density: float = 0.1) -> BlockMask:
    generator = np.random.default_rng(seed)
    return BlockMask.from_dense({n: torch.from_numpy(generator.random(s) < density) for n, s in SHAPES.items()})


def same(a: BlockMask, b: BlockMask) -> bool:
    return a.shapes == b.shapes and all(torch.equal(x, b.to_dense()[n]) for n, x in a.to_dense().items())


def write(
    path: Path, mask: BlockMask | None = None, model: ModelIdentity | None = IDENTITY, *, small: bool = True
) -> Path:
    settings = {"k": 1, "p": None}
    save_mask(path, mask or draw_mask(), mask_kind="superweights", model=model, settings=settings, small=small)
    return path


@given(st.integers(0, 1000), st.sampled_from([0.0, 0.05, 0.3, 1.0]), st.booleans())
def test_masks_survive_the_file(tmp_path: Path, seed: int, density: float, small: bool) -> None:
    mask = draw_mask(seed, density)
    found, metadata = load_mask(write(tmp_path / "m.safetensors", mask, small=small))
    assert same(found, mask)
    assert json.loads(metadata["counts"]) == {n: t.count() for n, t in mask.tensors.items()}
    shapes, counts, again = count_mask(tmp_path / "m.safetensors")
    assert (shapes, counts, again) == (mask.shapes, json.loads(metadata["counts"]), metadata)


def test_the_file_is_as_the_design_says(tmp_path: Path) -> None:
    mask = BlockMask.from_indices({"w": (17, 20)}, {"w": torch.tensor([0, 9, 16 * 20 + 19])})
    with safe_open(write(tmp_path / "small.safetensors", mask), framework="np") as file:
        small = file.metadata()
        # a zstd frame of: three numbers; 0, 8 and 328 coordinates passed over, the last behind an escape
        content = zstandard.decompress(file.get_tensor("w.gaps").tobytes(), 99)
    assert content == b"\x03\0\0\0" + b"\0\x08\xff" + bytes([329 - 255, 0, 0, 0])
    assert json.loads(small.pop("coding")) == {"name": "gaps", "version": 1}
    path = write(tmp_path / "m.safetensors", mask, small=False)
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
        assert small == metadata
        assert sorted(file.keys()) == ["w.col_indices", "w.crow_indices", "w.tiles"]
        assert file.get_tensor("w.crow_indices").tolist() == [0, 1, 2]
        assert file.get_tensor("w.col_indices").tolist() == [0, 1]
        tiles = file.get_tensor("w.tiles")
    assert tiles.dtype == np.uint8 and tiles.shape == (2, 32)
    assert tiles[0].tolist() == [1, 2, *[0] * 30] and tiles[1].tolist() == [8, *[0] * 31]
    assert metadata["ssrctl_kind"] == "mask" and metadata["mask_kind"] == "superweights"
    assert json.loads(metadata["shapes"]) == {"w": [17, 20]} and json.loads(metadata["block_size"]) == [16, 16]
    assert json.loads(metadata["counts"]) == {"w": 3}
    assert json.loads(metadata["model"]) == {"name": "org/model", "revision": "main", "fingerprint": "xxh3:0"}
    assert json.loads(metadata["settings"]) == {"k": 1, "p": None}


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> Path:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    return path


def set_tensor(name: str, value: Tensor) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    return lambda tensors, metadata: tensors.update({name: value})


def set_field(name: str, value: Any) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    return lambda tensors, metadata: metadata.update({name: value if isinstance(value, str) else json.dumps(value)})


@pytest.mark.parametrize(
    "change",
    [
        set_tensor("bias.tiles", torch.full((1, 32), 255, dtype=torch.uint8)),  # bits in the padding
        set_tensor("bias.tiles", torch.zeros(1, 31, dtype=torch.uint8)),
        set_tensor("bias.crow_indices", torch.tensor([0, 9], dtype=torch.int32)),
        set_tensor("bias.crow_indices", torch.tensor([0.0, 1.0])),
        set_tensor("extra.tiles", torch.zeros(1)),
        lambda tensors, metadata: tensors.pop("bias.tiles"),
        lambda tensors, metadata: metadata.pop("shapes"),
        set_field("shapes", "no json"),
        set_field("shapes", [1, 2]),
        set_field("shapes", {"model.w": [20, -40], "bias": [5], "tiles": [3, 3]}),
        set_field("shapes", {"model.w": [20, 40.0], "bias": [5], "tiles": [3, 3]}),
        set_field("shapes", {"model.w": [20, 40], "bias": [4], "tiles": [3, 3]}),
        set_field("block_size", [32, 32]),
        set_field("ssrctl_kind", "delta"),
        lambda tensors, metadata: metadata.pop("ssrctl_kind"),
    ],
    ids=range(15),
)
def test_damaged_masks_are_user_errors(tmp_path: Path, change: Any) -> None:
    def everything_but(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        change(tensors, metadata)

    # all of it selected, so that every tensor has tiles; a bias of [4] has a bit in its padding
    path = rewrite(write(tmp_path / "m.safetensors", ~BlockMask.empty(SHAPES)), everything_but)
    for read in (load_mask, count_mask):
        with pytest.raises(UserError, match=str(path)):
            read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_field("counts", {"w": 10**15}), "would take 56,000,000 GB of memory"),
        (set_field("shapes", {"w": [2**60, 1]}), "GB of memory"),
        (set_field("counts", {"w": 2}), "w: it does not hold the 2 coordinates"),
        (set_field("counts", {"w": 4}), "w: it does not hold the 4 coordinates"),
        (set_field("counts", {"w": "3"}), "'w' must be a valid integer"),
        (set_field("counts", {}), "w: it does not hold the 0 coordinates"),
        (set_field("shapes", {"w": [16, 20]}), r"w: indices are not ascending within 0\.\.319"),
        (set_field("coding", {"name": "gaps", "version": 2}), "install a newer ssrctl"),
        (lambda tensors, metadata: metadata.pop("coding"), "metadata 'coding' is absent"),
        (set_tensor("w.gaps", torch.zeros(3)), "not bytes"),
        (set_tensor("w.gaps", torch.arange(9).byte()), "w: the compressed data are corrupt"),
        (set_tensor("w.tiles", torch.zeros(1, 32).byte()), "first difference: w.tiles"),
    ],
    ids=range(12),
)
def test_damaged_small_masks_are_user_errors(tmp_path: Path, change: Any, message: str) -> None:
    mask = BlockMask.from_indices({"w": (17, 20)}, {"w": torch.tensor([0, 9, 16 * 20 + 19])})
    path = rewrite(write(tmp_path / "m.safetensors", mask), change)
    with pytest.raises(UserError, match=message):
        load_mask(path)
    with pytest.raises(UserError, match="does not hold|too early" if "memory" in message else message):
        count_mask(path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_torn_files_are_user_errors(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "m.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"{path} is not a readable safetensors file \(\d+ bytes\)"):
        load_mask(path)


def test_missing_and_foreign_files_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        load_mask(tmp_path / "m.safetensors")
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="is not a mask file: it has no ssrctl metadata"):
        load_mask(tmp_path / "foreign.safetensors")
    save_tensors(tmp_path / "other.safetensors", {"x": torch.zeros(2)}, "delta", {})
    with pytest.raises(UserError, match="is not a mask file: it is a delta"):
        load_mask(tmp_path / "other.safetensors")


def test_a_mask_must_belong_to_the_model(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors")
    assert same(load_mask_for(path, SHAPES, "xxh3:0"), draw_mask())
    with pytest.raises(UserError, match=r"made for other weights: org/model xxh3:0, the model has xxh3:1"):
        load_mask_for(path, SHAPES, "xxh3:1")
    assert same(load_mask_for(path, SHAPES, "xxh3:1", ignore_fingerprint=True), draw_mask())
    with pytest.raises(UserError, match="bias is 5 in the mask, 6 in the model"):
        load_mask_for(path, SHAPES | {"bias": (6,)}, "xxh3:0", ignore_fingerprint=True)
    with pytest.raises(UserError, match="new is absent in the mask, 2x2 in the model"):
        load_mask_for(path, SHAPES | {"new": (2, 2)}, "xxh3:0")
    with pytest.raises(UserError, match="bias is 5 in the mask, absent in the model"):
        load_mask_for(path, {n: s for n, s in SHAPES.items() if n != "bias"}, "xxh3:0")
    # a mask of no particular weights fits any of the same shapes
    assert same(load_mask_for(write(path, model=None), SHAPES, "xxh3:1"), draw_mask())


def test_an_identity_that_is_none_is_a_user_error(tmp_path: Path) -> None:
    path = rewrite(write(tmp_path / "m.safetensors"), set_field("model", {"nickname": "x"}))
    with pytest.raises(UserError, match="'model' does not name a model"):
        load_mask_for(path, SHAPES, "xxh3:0")


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = {"t": torch.randn(3, 4).T, "s": torch.tensor(1.5).bfloat16(), "none": torch.zeros(0, 3)}
    save_tensors(tmp_path / "t.safetensors", tensors, "optimizer", {"n": 3, "name": "x", "list": [1]})
    found, metadata = load_tensors(tmp_path / "t.safetensors", "optimizer")
    assert found.keys() == tensors.keys() and all(torch.equal(found[n], t) for n, t in tensors.items())
    assert (metadata["n"], metadata["name"], metadata["list"]) == ("3", "x", "[1]")
    assert read_metadata(tmp_path / "t.safetensors", "optimizer") == metadata


def log_of(step: int) -> StepMaskLog:
    units = [UnitLog(steps=[i], budget=0.01, advantages=[0.5, -0.5], mask=draw_mask(10 + i)) for i in range(11)]
    questions = [
        QuestionLog(id="q1", units=units[:2], gradient_cosine=[[1.0, 0.25], [0.25, 1.0]]),
        QuestionLog(id="q2", units=[]),
        QuestionLog(id="q3", units=units[2:]),
    ]
    return StepMaskLog(step=step, num_coordinates=814, num_protected=7, questions=questions)


def test_mask_logs_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "masks" / "000003.safetensors"
    save_mask_log(path, log_of(3))
    save_mask_log(tmp_path / "masks" / "000020.safetensors", log_of(20))
    found, expected = load_mask_log(path), log_of(3)
    assert (found.step, found.num_coordinates, found.num_protected) == (3, 814, 7)
    assert [q.id for q in found.questions] == ["q1", "q2", "q3"]
    for q, e in zip(found.questions, expected.questions, strict=True):
        assert q.gradient_cosine == e.gradient_cosine and len(q.units) == len(e.units)
        for unit, wanted in zip(q.units, e.units, strict=True):
            assert (unit.steps, unit.budget, unit.advantages) == (wanted.steps, wanted.budget, wanted.advantages)
            assert same(unit.mask, wanted.mask)
    assert [p.name for p in mask_log_paths(tmp_path)] == ["000003.safetensors", "000020.safetensors"]
    assert mask_log_paths(tmp_path / "none") == []


@pytest.mark.parametrize(
    "change",
    [
        set_field("questions", 5),
        set_field("questions", [{"id": "q1"}]),
        set_field("questions", [{"id": "q1", "gradient_cosine": None, "units": [{"colour": 1}]}]),
        lambda tensors, metadata: tensors.pop("2.8.bias.tiles"),
        lambda tensors, metadata: metadata.pop("step"),
    ],
    ids=range(5),
)
def test_damaged_mask_logs_are_user_errors(tmp_path: Path, change: Any) -> None:
    path = tmp_path / "000001.safetensors"
    save_mask_log(path, log_of(1))
    rewrite(path, change)
    with pytest.raises(UserError, match=str(path)):
        load_mask_log(path)


def test_fingerprints_tell_every_difference() -> None:
    base = {"a": torch.tensor([[1.0, 0.0], [2.0, float("nan")]]), "b": torch.zeros(3).bfloat16(), "c": torch.zeros(0)}
    mark = fingerprint(base.items())
    assert mark.startswith("xxh3:") and len(mark) == 5 + 32
    assert fingerprint(reversed(base.items())) == mark
    assert fingerprint((n, t.clone()) for n, t in base.items()) == mark
    assert fingerprint((base | {"a": base["a"].T.contiguous().T}).items()) == mark, "storage order is no difference"
    others: list[dict[str, Tensor]] = [
        base | {"a": torch.tensor([[1.0, -0.0], [2.0, float("nan")]])},
        base | {"a": base["a"].flatten()},
        base | {"b": torch.zeros(3).half()},
        {"a": base["b"], "b": base["a"], "c": base["c"]},
        {n: t for n, t in base.items() if n != "c"},
        base | {"c": torch.zeros(0, 2)},
    ]
    marks = [fingerprint(other.items()) for other in others]
    assert len({mark, *marks}) == 7


def test_a_fingerprint_does_not_change_between_versions() -> None:
    """Files hold it, so it is built here a second time from the bytes."""
    inner = xxhash.xxh3_128_hexdigest(struct.pack("<2f", 1, 2))
    expected = "xxh3:" + xxhash.xxh3_128_hexdigest(f"w float32 2 {inner}".encode())
    assert fingerprint([("w", torch.tensor([1.0, 2.0]))]) == expected == "xxh3:53f7de7f7c966590ad57275f53f8e083"
