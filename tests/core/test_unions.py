import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssrctl.core.unions import combinations, find_candidates, random_coordinates, sizes_below, unite

SHAPES = {"a": (3, 4), "b": (5,), "c": (2, 2, 2)}


def gradients(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def slow_union(many: list[dict[str, torch.Tensor]], num_members: int, size: int) -> list[tuple[str, int]]:
    """Rank everything densely: each gradient over its own entry threshold, the largest over the sets."""
    best: dict[tuple[str, int], float] = {}
    for one in many:
        flat = {(n, i): abs(v) for n, g in one.items() for i, v in enumerate(g.flatten().tolist())}
        order = sorted(flat, key=lambda key: (-flat[key], key))[:num_members]
        threshold = flat[order[-1]]
        for key in order:
            best[key] = max(best.get(key, 0.0), flat[key] / threshold)
    return sorted(sorted(best, key=lambda key: (-best[key], key))[:size])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 12), st.integers(1, 12))
def test_a_union_cut_to_size_matches_the_dense_ranking(seed: int, num_sets: int, num_members: int, size: int) -> None:
    size = min(size, num_members)
    many = [gradients(seed + place) for place in range(num_sets)]
    # Only the scores that the cut needs are kept: the claim of `unite` is that this loses nothing.
    candidates = [find_candidates(one, SHAPES, num_members, keep=size) for one in many]
    united = unite(candidates, size)
    assert [(n, i) for n in SHAPES for i in united[n].tolist()] == slow_union(many, num_members, size)
    for one in candidates:
        assert one.members.count() == num_members


def test_a_larger_gradient_scale_is_no_advantage() -> None:
    first, second = gradients(0), gradients(1)
    loud = {name: 1000 * g for name, g in second.items()}
    quiet = [find_candidates(g, SHAPES, 8, keep=6) for g in (first, second)]
    mixed = [find_candidates(g, SHAPES, 8, keep=6) for g in (first, loud)]
    for name in SHAPES:
        assert torch.equal(unite(quiet, 6)[name], unite(mixed, 6)[name])


def test_zero_gradients_are_no_candidates() -> None:
    sparse = {"a": torch.zeros(3, 4), "b": torch.tensor([0.0, -2.0, 0.0, 0.5, 0.0])}
    found = find_candidates(sparse, SHAPES, 6, keep=4)
    assert found.members.to_indices()["b"].tolist() == [1, 3]
    assert found.members.count() == 2
    assert found.scores["b"].tolist() == [4.0, 1.0]
    assert unite([found], 4)["b"].tolist() == [1, 3]


def test_combinations() -> None:
    assert combinations(2) == [(0,), (1,), (0, 1)]
    assert len(combinations(4)) == 15
    assert len(combinations(6)) == 6 + 15 + 1
    assert combinations(6)[-1] == tuple(range(6))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 25), st.integers(0, 10**6))
def test_random_coordinates_are_distinct_and_inside(size: int, seed: int) -> None:
    drawn = random_coordinates(SHAPES, size, seed)
    assert sum(part.numel() for part in drawn.values()) == size
    for name, shape in SHAPES.items():
        part = drawn[name]
        assert bool((part.diff() > 0).all())
        assert part.numel() == 0 or (part[0] >= 0 and part[-1] < torch.Size(shape).numel())
    again = random_coordinates(SHAPES, size, seed)
    assert all(torch.equal(drawn[name], again[name]) for name in SHAPES)


@pytest.mark.parametrize("size", [3, 20])
def test_random_coordinates_are_uniform(size: int) -> None:
    counts = torch.zeros(25)
    starts = {"a": 0, "b": 12, "c": 17}
    draws = 2000
    for seed in range(draws):
        for name, part in random_coordinates(SHAPES, size, seed).items():
            counts[part + starts[name]] += 1
    share = size / 25
    # Five standard deviations of a binomial: all 25 counts are within unless the draw is skewed.
    assert float((counts - draws * share).abs().max()) < 5 * (draws * share * (1 - share)) ** 0.5


def test_more_than_there_are() -> None:
    with pytest.raises(ValueError, match="cannot draw 26 of 25"):
        random_coordinates(SHAPES, 26, 0)


def test_sizes_below() -> None:
    sizes = sizes_below(0.04, 10_000)
    assert sizes[:9] == [0.04, 0.03, 0.02, 0.015, 0.01, 0.0075, 0.005, 0.0025, 0.001]
    assert sizes[9:] == pytest.approx([0.0005, 0.00025, 0.0001])
    assert sizes_below(0.0025, 10**4)[0] == 0.0025
    assert sizes_below(0.04, 10) == []
