"""Sketches of gradients: linear, the same for every step, and right about inner products within the stated error."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ssrctl.training.gradient_sketch import GradientSketch

NUMELS = {"w": 1000, "b": 7, "v": 333}


def sketched(sketch: GradientSketch, gradient: dict[str, Tensor]) -> Tensor:
    total = sketch.zeros()
    for name, part in gradient.items():
        sketch.add(total, name, part)
    return total


def draw(seed: int, heavy: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(numel, generator=generator) for name, numel in NUMELS.items()}
    return {name: part**3 for name, part in made.items()} if heavy else made


def flat(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient[name].double() for name in NUMELS])


def test_few_coordinates_are_stored_as_they_are() -> None:
    sketch = GradientSketch(NUMELS, max_size=1340, seed=0)
    assert sketch.exact and sketch.size == sketch.num_coordinates == 1340
    gradient = draw(0)
    backwards = dict(reversed(gradient.items()))  # in the order in which a backward pass delivers them
    assert torch.equal(sketched(sketch, backwards), flat(gradient))
    assert not GradientSketch(NUMELS, max_size=1339, seed=0).exact


def reference(numels: dict[str, int], size: int, seed: int, gradient: dict[str, Tensor]) -> list[float]:
    """The documented construction, one coordinate at a time."""
    from ssrctl.core.seeds import derive_seed

    total = [0.0] * size
    for name, numel in numels.items():
        generator = torch.Generator().manual_seed(derive_seed(seed, "gradient sketch", name))
        for start in range(0, numel, size):
            length = min(size, numel - start)
            shift = int(torch.randint(size, (1,), generator=generator))
            packed = torch.randint(256, (-(-length // 8),), dtype=torch.uint8, generator=generator).tolist()
            for i in range(length):
                sign = -1.0 if packed[i // 8] >> (i % 8) & 1 else 1.0
                total[(i + shift) % size] += sign * float(gradient[name][start + i])
    return total


def test_each_coordinate_goes_where_the_construction_says() -> None:
    gradient = draw(1)
    for size in (64, 100, 333):
        found = sketched(GradientSketch(NUMELS, size, seed=5), gradient)
        expected = torch.tensor(reference(NUMELS, size, 5, gradient), dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_sketches_of_parts_add_up_and_depend_on_the_seed_alone() -> None:
    sketch = GradientSketch(NUMELS, 128, seed=3)
    one, other = draw(1), draw(2)
    whole = sketched(sketch, {name: 2.0 * one[name] - other[name] for name in NUMELS})
    # the sum is rounded to float32 before it is sketched
    torch.testing.assert_close(whole, 2.0 * sketched(sketch, one) - sketched(sketch, other), rtol=0, atol=1e-4)
    assert torch.equal(sketched(sketch, one), sketched(GradientSketch(NUMELS, 128, seed=3), one))
    assert not torch.equal(sketched(sketch, one), sketched(GradientSketch(NUMELS, 128, seed=4), one))
    low = {name: part.bfloat16() for name, part in one.items()}
    shaped = {name: part.float().reshape(-1, 1) for name, part in low.items()}
    assert torch.equal(sketched(sketch, low), sketched(sketch, shaped))


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("same", [False, True])
def test_inner_products_are_unbiased_and_within_the_stated_error(heavy: bool, same: bool) -> None:
    u = draw(1, heavy)
    v = u if same else {name: u[name] + part for name, part in draw(2, heavy).items()}
    exact = float(flat(u) @ flat(v))
    scale = float(flat(u).norm() * flat(v).norm())
    size, trials = 64, 400
    found = []
    for seed in range(trials):
        sketch = GradientSketch(NUMELS, size, seed)
        found.append(float(sketched(sketch, u) @ sketched(sketch, v)))
    errors = torch.tensor(found, dtype=torch.float64) - exact
    # 4 standard errors of the mean
    assert abs(float(errors.mean())) < 4 * float(errors.std()) / math.sqrt(trials)
    stated = math.sqrt((scale**2 + exact**2) / size)
    assert stated <= math.sqrt(2 / size) * scale * (1 + 1e-12)
    # the standard deviation of 400 draws is known to a tenth; and the bound is not idle
    assert 0.3 * stated < float(errors.std()) < 1.1 * stated


def test_a_sketch_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        GradientSketch(NUMELS, 0, seed=0)
    sketch = GradientSketch(NUMELS, 64, seed=0)
    with pytest.raises(ValueError, match="b has 7 coordinates, its gradient 8"):
        sketch.add(sketch.zeros(), "b", torch.zeros(8))
