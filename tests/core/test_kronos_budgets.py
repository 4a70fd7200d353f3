"""Budgets that KronosOpt plans by itself: of a question's units, and of a step in an ordinary loop."""

import numpy as np
import pytest
import torch
from two_tensors import fill, make

from ssrctl.core.budget import coordinates, step_budgets, step_weights
from ssrctl.core.kronos import KronosOpt
from ssrctl.core.mask import BlockMask
from ssrctl.core.topk import NonFiniteGradient


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_an_ordinary_loop_trains_with_the_budget_of_one_unit(scope):
    named = {"w": torch.nn.Parameter(torch.zeros(6, 10)), "idle": torch.nn.Parameter(torch.ones(40))}
    mask = BlockMask.from_indices({"w": (6, 10), "idle": (40,)}, {"w": torch.arange(20)})
    target = torch.randn(60, generator=torch.Generator().manual_seed(0)).view(6, 10)
    optimizer = KronosOpt(
        named.items(), lr=0.5, protected=mask, budget=0.2, max_step_budget=0.1, max_grad_norm=0.0, scope=scope
    )
    count = 8 if scope == "global" else 4  # 10% of the 80 unprotected coordinates; of which 40 are in "w"
    expected = np.zeros(60, dtype=np.float32)
    for _ in range(4):
        (0.5 * (named["w"] - target).square().sum()).backward()
        stats = optimizer.step()
        assert stats.num_updated == count
        assert named["w"].grad is None
        gradient = expected - target.flatten().numpy()
        largest = sorted(range(20, 60), key=lambda i: (-abs(float(gradient[i])), i))[:count]
        expected[largest] -= np.float32(0.5) * gradient[largest]
        assert named["w"].detach().flatten().numpy().tobytes() == expected.tobytes()
    assert named["idle"].tolist() == [1.0] * 40
    assert optimizer.step().num_updated == 0  # nothing came


def test_the_budget_of_an_ordinary_step_is_the_smaller_of_both():
    for budget, cap, count in ((0.5, 0.25, 3), (0.25, 0.5, 3), (1.0, 1.0, 12)):
        named, optimizer = make(budget=budget, max_step_budget=cap)
        fill(named, [1.0] * 8, [1.0] * 4)
        assert optimizer.step().num_updated == count


def test_an_ordinary_loop_goes_on_after_a_nan():
    named, optimizer = make(lr=1.0, max_step_budget=0.2, budget=0.5, max_grad_norm=0.0)
    fill(named, [1.0, float("nan"), *[0.0] * 6])
    with pytest.raises(NonFiniteGradient, match="the gradient of w has 1 value"):
        optimizer.step()
    optimizer.zero_grad()
    fill(named, [1.0, 2.0, *[0.0] * 6])
    assert optimizer.step().num_updated == 2
    assert named["w"].tolist() == [-1.0, -2.0, *[0.0] * 6]


def claims_of(optimizer, named, units):
    """How many coordinates each planned unit gets, of gradients that have something everywhere."""
    optimizer.begin_question(units)
    counts = []
    for _ in range(units if isinstance(units, int) else len(units)):
        for parameter in named.values():
            parameter.grad = torch.ones_like(parameter)
        counts.append(sum(indices.numel() for indices in optimizer.claim().values()))
    with pytest.raises(RuntimeError, match="no budget is planned for this unit"):
        optimizer.begin_unit()
    return counts


def test_planned_budgets_by_hand():
    # n = 1,000 with 200 protected: 800 unprotected. B = 10% is 80, k_max = 4% is 32.
    named = {"w": torch.nn.Parameter(torch.zeros(1000))}
    mask = BlockMask.from_indices({"w": (1000,)}, {"w": torch.arange(200)})
    optimizer = KronosOpt(named.items(), lr=0.1, protected=mask, budget=0.1, max_step_budget=0.04)
    assert claims_of(optimizer, named, 1) == [32]  # capped
    assert claims_of(optimizer, named, 2) == [32, 32]
    assert claims_of(optimizer, named, 3) == [26, 26, 26]  # 26.67, rounded down
    assert claims_of(optimizer, named, 5) == [16] * 5
    assert claims_of(optimizer, named, [1.0, 1.0, 2.0]) == [24, 24, 32]  # 8 above the cap
    assert claims_of(optimizer, named, [0.25, 0.75, 7.0]) == [16, 32, 32]  # twice over
    assert claims_of(optimizer, named, (0.0, 1.0)) == [0, 32]
    assert claims_of(optimizer, named, []) == []
    assert claims_of(optimizer, named, 0) == []


def test_budgets_of_the_paper_by_hand():
    # v = 1, 1/2, 1/4, 1/4: w = 1/11, 2/11, 4/11, 4/11 of B = 5% of 110,000 = 5,500; k_max = 1% is 1,100
    named = {"w": torch.nn.Parameter(torch.zeros(110_000))}
    optimizer = KronosOpt(named.items(), lr=0.1)
    optimizer.begin_question()
    counts = []
    for k in step_budgets([1.0, 0.5, 0.25], 4, rule="paper"):
        named["w"].grad = torch.ones_like(named["w"])
        counts.append(optimizer.claim(coordinates(k, optimizer.num_unprotected))["w"].numel())
    # (v + eps)^-1 with eps = 1e-8 is just below 500 and 1,000, and is rounded down
    assert counts == pytest.approx([500, 1000, 1100, 1100], abs=1)
    # given as weights, what the cap cuts off goes to the first two, up to the cap
    assert claims_of(optimizer, named, step_weights([1.0, 0.5, 0.25], 4)) == [1100] * 4


def test_a_plan_and_a_k_of_ones_own():
    named, optimizer = make(budget=1.0, max_step_budget=0.5)
    optimizer.begin_question(4)  # 3 each
    counts = []
    for k in (None, 2, None):
        fill(named, [1.0] * 8, [1.0] * 4)
        counts.append(sum(indices.numel() for indices in optimizer.claim(k).values()))
    assert counts == [3, 2, 3]
    optimizer.begin_question()  # plans are forgotten with their question
    fill(named, [1.0] * 8)
    with pytest.raises(RuntimeError, match=r"pass k, or tell begin_question\(\) the units"):
        optimizer.claim()


@pytest.mark.parametrize(
    ("units", "match"),
    [
        (-1, "at least 0 units, got -1"),
        ([1.0, -1.0], "finite and at least 0"),
        ([float("nan")], "finite and at least 0"),
        ([0.0, 0.0], "all 2 weights are 0"),
    ],
)
def test_units_that_cannot_be_planned(units, match):
    _, optimizer = make()
    with pytest.raises(ValueError, match=match):
        optimizer.begin_question(units)
    with pytest.raises(RuntimeError, match="before begin_question"):
        optimizer.claim(1)
