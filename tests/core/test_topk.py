"""Exact selection, compared with a sort of everything, along every path that it can take."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import selection

from ssrctl.core import counting, topk, topk_plain
from ssrctl.core.bits import bits_from_indices
from ssrctl.core.topk import NonFiniteGradient, count_non_finite, select_topk
from ssrctl.core.topk_plain import PlainReader

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Zeros of both signs, the smallest denormal of each dtype, a larger one, neighbours of 1, the largest.
POOL = {
    torch.float32: [0.0, -0.0, 1e-45, -1e-45, 3e-39, 1.0, -1.0, 1.0000001, -0.9999999, 3.4e38],
    torch.bfloat16: [0.0, -0.0, 9.2e-41, -9.2e-41, 1e-39, 1.0, -1.0, 1.0078125, -0.99609375, 3.3e38],
    torch.float16: [0.0, -0.0, 6e-8, -6e-8, 3e-5, 1.0, -1.0, 1.0009766, -0.9995117, 65504.0],
}
SHAPES = [(), (1,), (7,), (16, 3), (2, 3, 5), (0,), (4, 0), (40,)]
# Constants that send small tensors along each path: count all of them; windows of one byte of bits; a sample that
# suffices; one that is misled, because its margin points the wrong way.
PATHS = {
    "counted": {},
    "in small windows": {"CHUNK": 8},
    "sampled": {"SAMPLED_FROM": 1, "SAMPLE": 20, "CHUNK": 16},
    "misled": {"SAMPLED_FROM": 1, "SAMPLE": 20, "MARGIN": -2.0, "CHUNK": 32},
}


def use(path, monkeypatch):
    for name, value in PATHS[path].items():
        monkeypatch.setattr(topk_plain if name == "CHUNK" else topk, name, value)


def as_bits(taken, gradients):
    return {
        name: bits_from_indices(torch.tensor(sorted(indices), dtype=torch.int64), gradients[name].numel())
        for name, indices in taken.items()
    }


def tensor(rng, shape, dtype, from_pool, layout):
    """Random values in a tensor whose memory is contiguous, transposed, or every other element of another's."""
    size = int(np.prod(shape))
    values = rng.choice(POOL[dtype], size) if from_pool else rng.standard_normal(size)
    made = torch.tensor(values, dtype=torch.float64).to(dtype).reshape(shape)
    if layout == "transposed":
        order = tuple(reversed(range(made.dim())))
        return made.permute(order).contiguous().permute(order)
    if layout == "stepped" and made.dim():
        return torch.stack([made, torch.full_like(made, 9)], dim=-1)[..., 0]
    return made


@pytest.mark.parametrize("path", PATHS)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtypes=st.sampled_from([*[(dtype,) for dtype in DTYPES], DTYPES]),
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=5),
    layout=st.sampled_from(["contiguous", "transposed", "stepped"]),
    from_pool=st.booleans(),
    share=st.one_of(st.floats(0, 0.1), st.floats(0, 1.2)),
    taken_share=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
)
def test_equals_a_sort(monkeypatch, path, seed, dtypes, shapes, layout, from_pool, share, taken_share):
    rng = np.random.default_rng(seed)
    gradients = {
        f"p{number}": tensor(rng, shape, dtypes[rng.integers(len(dtypes))], from_pool, layout)
        for number, shape in enumerate(shapes)
    }
    taken = {
        name: set(np.flatnonzero(rng.random(g.numel()) < taken_share).tolist())
        for name, g in gradients.items()
        if rng.random() < 0.8
    }
    k = int(share * sum(g.numel() for g in gradients.values()))
    before = {name: g.clone() for name, g in gradients.items()}
    use(path, monkeypatch)
    found = select_topk(gradients, k, as_bits(taken, gradients))
    assert {name: indices.tolist() for name, indices in found.items()} == selection.select(gradients, k, taken)
    assert all(indices.dtype == torch.int64 for indices in found.values())
    assert all(torch.equal(before[name], g) for name, g in gradients.items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("already", [False, True])
def test_large_tensors_are_sampled_and_read_once(monkeypatch, dtype, already):
    """At real size, with the top taken by an earlier selection or not, the sample's bound suffices."""
    generator = torch.Generator().manual_seed(3)
    size, k = 2_200_000, 5_500
    values = torch.randn(size, generator=generator) * torch.exp(2 * torch.randn(size, generator=generator))
    parts = values.to(dtype).split([1_500_001, 99_999, 600_000])
    gradients = dict(zip("abc", parts, strict=True))
    taken = {}
    if already:
        earlier = select_topk(gradients, size // 20)
        taken = {name: bits_from_indices(indices, gradients[name].numel()) for name, indices in earlier.items()}
    bounds = []
    collect = PlainReader.collect
    monkeypatch.setattr(PlainReader, "collect", lambda self, b, k: bounds.append(b) or collect(self, b, k))
    found = select_topk(gradients, k, taken)
    ranked = values.to(dtype).double().abs().numpy()
    if already:
        offsets = dict(zip("abc", [0, 1_500_001, 1_600_000], strict=True))
        ranked[torch.cat([earlier[n] + offsets[n] for n in "abc"]).numpy()] = -1
    expected = np.sort(np.argsort(-ranked, kind="stable")[:k])
    assert len(bounds) == 1 and bounds[0] > 0
    assert np.array_equal(np.concatenate([found["a"], found["b"] + 1_500_001, found["c"] + 1_600_000]), expected)


def test_a_misled_sample_is_noticed(monkeypatch):
    """The sample sees the few large values and nothing else, so that its bound lies above nearly all."""
    use("sampled", monkeypatch)
    gradient = torch.arange(1.0, 2001.0)
    gradient[:: topk._stride(2000)] = 1e6
    bounds = []
    collect = PlainReader.collect
    monkeypatch.setattr(PlainReader, "collect", lambda self, b, k: bounds.append(b) or collect(self, b, k))
    found = select_topk({"w": gradient}, 400)["w"]
    assert found.tolist() == selection.select({"w": gradient}, 400, {})["w"]
    assert len(bounds) == 2 and bounds[0] > bounds[1] > 0


def test_a_stride_samples_positions():
    """Positions run through all tensors: 200 is the first of "v", and 203 the first multiple of 7 in it."""
    gradients = {"w": torch.arange(1.0, 201.0), "v": torch.arange(300.0, 370.0)}
    counts = PlainReader(gradients, {"v": bits_from_indices(torch.tensor([10]), 70)}).histogram(7)
    sampled = torch.tensor([*range(1, 201, 7), 303, *range(317, 370, 7)], dtype=torch.float32)
    assert torch.equal(counts, torch.bincount(sampled.view(torch.int32) >> 16, minlength=counts.numel()))


ONE = 0x3F800000  # the pattern of 1.0
SLOW_TO_RULE_OUT = {
    "ties": (torch.full((5000,), ONE), range(10)),
    "rising by a bit": (torch.arange(ONE, ONE + 5000), range(4990, 5000)),
    "higher by a bit at the end": (torch.tensor([ONE] * 4993 + [ONE + 1] * 7), [0, 1, 2, *range(4993, 5000)]),
}


@pytest.mark.parametrize("values", SLOW_TO_RULE_OUT)
def test_candidates_stay_few(monkeypatch, values):
    """A bound that keeps nothing out, on ties and on the worst order, must not collect everything."""
    monkeypatch.setattr(topk_plain, "CHUNK", 64)
    patterns, best = SLOW_TO_RULE_OUT[values]
    gradient = patterns.to(torch.int32).view(torch.float32)
    largest = 0
    add = counting.Candidates.add

    def watched(self, positions, keys):
        nonlocal largest
        add(self, positions, keys)
        largest = max(largest, self.count)

    monkeypatch.setattr(counting.Candidates, "add", watched)
    positions, _ = PlainReader({"w": gradient}, {}).collect(0, 10)
    assert largest <= 2 * 10 + 5 * 64
    assert set(best) <= set(positions.tolist())
    assert select_topk({"w": gradient}, 10)["w"].tolist() == list(best)


def test_ties_go_to_the_first_tensor_and_the_lowest_index():
    gradients = {"z": torch.tensor([1.0, -2.0, 2.0]), "a": torch.tensor([2.0, 3.0, -2.0])}
    found = select_topk(gradients, 3)
    assert found["z"].tolist() == [1, 2]
    assert found["a"].tolist() == [1]


def test_equal_values_tie_across_dtypes():
    gradients = {f"w{i}": torch.tensor([0.5, -1.5, 0.25], dtype=dtype) for i, dtype in enumerate(DTYPES)}
    assert [i.tolist() for i in select_topk(gradients, 2).values()] == [[1], [1], []]
    assert [i.tolist() for i in select_topk(gradients, 5).values()] == [[0, 1], [0, 1], [1]]


def test_the_threshold_is_found_in_the_lowest_mantissa_bit():
    """Values that agree in the upper 16 bits of their pattern are told apart by the second count."""
    patterns = torch.arange(0x3F800000, 0x3F800000 + 1000, dtype=torch.int32)
    values = patterns.view(torch.float32)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    found = select_topk({"w": values}, 10)["w"]
    assert sorted(values[found].view(torch.int32).tolist()) == list(range(0x3F800000 + 990, 0x3F800000 + 1000))


@given(st.integers(0, counting.INFINITY))
def test_a_bound_is_the_same_in_every_dtype(bound):
    for dtype in (torch.bfloat16, torch.float16):
        patterns = torch.arange(0x8000, dtype=torch.int32).to(torch.int16)
        finite = patterns[patterns.view(dtype).isfinite()]
        reached = finite.view(dtype).float().view(torch.int32) >= bound
        assert torch.equal(finite >= counting.pattern_bound(bound, dtype), reached)


def test_nothing_asked_for_and_nothing_there():
    gradients = {"a": torch.ones(3), "b": torch.ones(2, 2)}
    assert {n: i.tolist() for n, i in select_topk(gradients, 0).items()} == {"a": [], "b": []}
    assert select_topk({}, 5) == {}
    assert select_topk({"a": torch.empty(0)}, 5)["a"].tolist() == []


def test_more_than_there_are():
    bits = {"a": bits_from_indices(torch.tensor([1]), 3)}
    assert select_topk({"a": torch.zeros(3)}, 10**12, bits)["a"].tolist() == [0, 2]


def test_tensors_that_are_not_contiguous():
    gradient = torch.arange(12.0).reshape(3, 4).t()
    strided = torch.arange(10.0)[::2]
    repeated = torch.tensor([[1.0], [3.0]]).expand(2, 3)
    assert select_topk({"g": gradient}, 2)["g"].tolist() == [8, 11]  # flat indices of the transposed tensor
    assert select_topk({"g": strided}, 2)["g"].tolist() == [3, 4]
    assert select_topk({"g": repeated}, 2)["g"].tolist() == [3, 4]
    assert select_topk({"g": torch.arange(3.0, requires_grad=True)}, 1)["g"].tolist() == [2]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named(monkeypatch, path, dtype, bad):
    use(path, monkeypatch)
    good, broken = torch.ones(20, dtype=dtype), torch.ones(30, dtype=dtype)
    broken[4] = broken[7] = bad
    with pytest.raises(NonFiniteGradient, match="broken has 2 values") as caught:
        select_topk({"good": good, "broken": broken}, 1)
    assert (caught.value.name, caught.value.count) == ("broken", 2)
    with pytest.raises(NonFiniteGradient, match="all has 40 values"):
        select_topk({"good": good, "all": torch.full((40,), bad, dtype=dtype)}, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_taken_may_be_nan_and_is_not_blamed(dtype):
    """Only eligible coordinates count, so a NaN in a protected weight does not stop a run."""
    first, second = torch.ones(9, dtype=dtype), torch.arange(1, 10, dtype=dtype)
    first[3] = float("nan")
    taken = {"first": bits_from_indices(torch.tensor([3]), 9)}
    assert select_topk({"first": first, "second": second}, 1, taken)["second"].tolist() == [8]
    second[2] = float("inf")
    with pytest.raises(NonFiniteGradient, match="second has 1 values"):
        select_topk({"first": first, "second": second}, 1, taken)
    assert (count_non_finite(first), count_non_finite(first, taken["first"])) == (1, 0)


def test_the_largest_finite_values_are_finite():
    for dtype in DTYPES:
        top = torch.finfo(dtype).max
        assert select_topk({"w": torch.tensor([1.0, -top, top], dtype=dtype)}, 1)["w"].tolist() == [1]


def test_refusals():
    with pytest.raises(ValueError, match="at least 0, got -1"):
        select_topk({"w": torch.ones(3)}, -1)
    with pytest.raises(ValueError, match=r"that of a is torch\.float64"):
        select_topk({"a": torch.ones(3, dtype=torch.float64)}, 1)
    with pytest.raises(ValueError, match="that of a is on cpu, that of b on meta"):
        select_topk({"a": torch.ones(3), "b": torch.ones(3, device="meta")}, 1)
    with pytest.raises(ValueError, match=r"a needs 2 bytes of bits, got a tensor of shape \[1\]"):
        select_topk({"a": torch.ones(9)}, 1, {"a": torch.zeros(1, dtype=torch.uint8)})


@pytest.mark.parametrize("k", [5, 40, 300, 900])
@pytest.mark.parametrize("few", [0, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_zero_but_for_a_few(monkeypatch, k, few, dtype):
    """As an embedding's: most reach the threshold, and the first zeros are taken."""
    monkeypatch.setattr(topk_plain, "CHUNK", 256)
    generator = torch.Generator().manual_seed(0)
    gradient = torch.zeros(1000, dtype=dtype)
    gradient[torch.randperm(1000, generator=generator)[:few]] = torch.randn(few, generator=generator).to(dtype)
    taken = torch.randperm(1000, generator=generator)[:50].sort().values
    free = torch.ones(1000, dtype=torch.bool)
    free[taken] = False
    ranked = sorted(free.nonzero().flatten().tolist(), key=lambda i: (-abs(float(gradient[i])), i))
    found = select_topk({"w": gradient}, k, {"w": bits_from_indices(taken, 1000)})
    assert found["w"].tolist() == sorted(ranked[:k])
