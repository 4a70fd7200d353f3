"""The Triton kernels in Triton's interpreter, compared with plain torch.

Triton decides at import whether it interprets, so ``test_topk_triton`` runs this file in a process of its own.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from ssrctl.core import topk, topk_triton
from ssrctl.core.bits import bits_from_indices
from ssrctl.core.counting import INFINITY
from ssrctl.core.topk import NonFiniteGradient, select_topk
from ssrctl.core.topk_plain import PlainReader

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(topk_triton, "BLOCK", 128)


def example(dtypes, seed=0):
    """Tensors of several blocks and of parts of one, an empty one, one at an odd address; some with bits."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (9, 31), "none": (0, 3), "b": (), "c": (128,), "d": (5,)}
    gradients = {}
    for number, (name, shape) in enumerate(shapes.items()):
        values = torch.randn(shape, generator=generator) * torch.exp(2 * torch.randn(shape, generator=generator))
        gradients[name] = values.round(decimals=1).to(dtypes[number % len(dtypes)])
    gradients["odd"] = torch.randn(101, generator=generator).to(dtypes[-1])[1:]
    gradients["strided"] = torch.randn(7, 12, generator=generator).to(dtypes[0]).t()
    taken = {"a": torch.arange(0, 279, 3), "odd": torch.arange(40), "strided": torch.tensor([83]), "d": torch.arange(5)}
    return gradients, {name: bits_from_indices(i, gradients[name].numel()) for name, i in taken.items()}


@pytest.mark.parametrize("dtypes", [*[(dtype,) for dtype in DTYPES], DTYPES], ids=str)
def test_kernels_select_what_plain_torch_does(monkeypatch, dtypes):
    gradients, taken = example(dtypes)
    plain = PlainReader(gradients, taken)
    fused = topk_triton.TritonReader(gradients, taken)
    assert torch.equal(fused.histogram(1), plain.histogram(1))
    for bound in (0, int(torch.tensor(1.0).view(torch.int32)), INFINITY):
        expected, expected_keys = plain.collect(bound, 10**6)
        positions, keys = fused.collect(bound, 10**6)
        assert torch.equal(keys, expected_keys)
        wanted = plain.layout.split(expected)
        assert all(torch.equal(found, wanted[n]) for n, found in fused.layout.split(positions).items())
    expected = select_topk(gradients, 60, taken)
    monkeypatch.setattr(topk, "make_reader", topk_triton.TritonReader)
    found = select_topk(gradients, 60, taken)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_stride_samples_positions():
    gradient = torch.arange(1.0, 201.0)  # two blocks: positions are the indices, and 56 that are no coordinate
    counts = topk_triton.TritonReader({"w": gradient, "v": torch.full((70,), 1e6)}, {}).histogram(7)
    sampled = torch.cat([gradient[::7], torch.full((10,), 1e6)])  # 256 + 3 is the first multiple of 7 in "v"
    assert torch.equal(counts, torch.bincount(sampled.view(torch.int32) >> 16, minlength=counts.numel()))


@pytest.mark.parametrize("values", ["zeros", "rising"])
def test_a_bound_that_is_too_low_is_raised_on_the_way(monkeypatch, values):
    monkeypatch.setattr(topk_triton, "MANY", 150)
    gradient = torch.zeros(600) if values == "zeros" else torch.arange(600.0)
    reader = topk_triton.TritonReader({"w": gradient}, {})
    writes = []
    write = reader._write
    monkeypatch.setattr(reader, "_write", lambda found, *rest: writes.append(write(found, *rest) or found.count))
    positions, _ = reader.collect(0, 10)
    assert set(range(10) if values == "zeros" else range(590, 600)) <= set(positions.tolist())
    assert len(writes) > 1 and max(writes) <= 2 * 10 + 150 + 10


def test_kernels_notice_nan(monkeypatch):
    monkeypatch.setattr(topk, "make_reader", topk_triton.TritonReader)
    gradients, taken = example((torch.bfloat16,))
    gradients["c"][5] = float("nan")
    gradients["odd"][3] = float("inf")  # taken
    with pytest.raises(NonFiniteGradient, match="c has 1 values"):
        select_topk(gradients, 3, taken)


def test_kernels_are_usable_and_broken_ones_are_not(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert topk_triton.usable(torch.device("cpu"))

    def fails(*_):
        raise RuntimeError("no C compiler")

    topk_triton.usable.cache_clear()
    monkeypatch.setattr(topk_triton.TritonReader, "collect", fails)
    with pytest.warns(UserWarning, match="in plain torch: no C compiler"):
        assert not topk_triton.usable(torch.device("cpu"))
