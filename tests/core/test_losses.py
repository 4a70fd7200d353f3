"""The policy loss of a step against a loop over tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.losses import step_loss
from torch import Tensor

from ssrctl.core.losses import RATIOS, step_policy_loss

NAN = float("nan")
LEVELS = ["token", "step", "sequence"]


def draw(seed: int, spread: float = 0.3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probabilities, old ones, step ids, advantages) of a ragged group, float64."""
    generator = torch.Generator().manual_seed(seed)
    num, length = 5, 12
    logprobs = -torch.rand(num, length, generator=generator, dtype=torch.float64) * 3
    old = logprobs + spread * torch.randn(num, length, generator=generator, dtype=torch.float64)
    step_ids = torch.full((num, length), -1)
    for j in range(num):
        position = 0
        for step in range(int(torch.randint(0, 4, (), generator=generator))):
            size = int(torch.randint(1, 5, (), generator=generator))
            step_ids[j, position : position + size] = step
            position += size
    advantages = torch.randn(num, generator=generator, dtype=torch.float64)
    advantages[torch.rand(num, generator=generator) < 0.2] = NAN
    return logprobs, old, step_ids, advantages


@pytest.mark.parametrize("level", LEVELS)
@given(seed=st.integers(0, 10_000), step=st.integers(0, 3), epsilon=st.sampled_from([0.05, 0.2, 0.9]))
def test_value_and_gradient_equal_the_loop(level: str, seed: int, step: int, epsilon: float) -> None:
    logprobs, old, step_ids, advantages = draw(seed)
    fast, slow = logprobs.clone().requires_grad_(), logprobs.clone().requires_grad_()
    found = step_policy_loss(fast, old, step_ids, step, advantages, clip_epsilon=epsilon, level=level)
    expected = step_loss(slow, old, step_ids, step, advantages.tolist(), epsilon, level)
    if expected is None:
        assert found.loss is None and found.num_terms == found.num_clipped == 0
        return
    assert found.loss is not None
    torch.testing.assert_close(found.loss, expected, rtol=1e-10, atol=1e-12)
    # Where every term is clipped, the loop's loss has no graph at all; ours has one with gradient 0.
    if expected.requires_grad:
        expected.backward()
    found.loss.backward()
    slow_gradient = torch.zeros_like(logprobs) if slow.grad is None else slow.grad
    torch.testing.assert_close(fast.grad, slow_gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("advantage", [0.7, -0.7])
def test_descent_raises_what_was_good(level: str, advantage: float) -> None:
    logits = torch.zeros(1, 3, 4, requires_grad=True)
    tokens = torch.tensor([[[0], [1], [2]]])
    step_ids = torch.tensor([[0, 1, 1]])

    def logprobs() -> Tensor:
        return logits.log_softmax(-1).gather(-1, tokens).squeeze(-1)

    before = logprobs().detach()
    found = step_policy_loss(logprobs(), before, step_ids, 1, torch.tensor([advantage]), level=level)
    assert found.loss is not None
    found.loss.backward()
    with torch.no_grad():
        logits -= 0.1 * logits.grad
    moved = (logprobs() - before)[0]
    assert moved[0] == 0
    assert (moved[1:] > 0).all() if advantage > 0 else (moved[1:] < 0).all()


@pytest.mark.parametrize("level", LEVELS)
def test_on_policy_gradient_is_the_advantage_spread_over_tokens_and_responses(level: str) -> None:
    """At ratio 1 every level gives REINFORCE: -A_j / (|J| n_j) on each token of the step."""
    logprobs = torch.full((3, 4), -1.0, dtype=torch.float64, requires_grad=True)
    step_ids = torch.tensor([[0, 0, 0, 1], [0, 1, 1, -1], [1, -1, -1, -1]])
    advantages = torch.tensor([0.5, -2.0, 9.0], dtype=torch.float64)
    found = step_policy_loss(logprobs, logprobs.detach(), step_ids, 0, advantages, level=level)
    assert found.loss is not None and found.num_clipped == 0
    assert found.num_terms == (2 if level == "step" else 4)
    assert found.loss.item() == pytest.approx(-(0.5 - 2.0) / 2)
    found.loss.backward()
    third = -0.5 / 2 / 3
    expected = torch.tensor([[third, third, third, 0], [1.0, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(logprobs.grad, expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("log_ratio", "advantage", "clipped"),
    [(0.5, 1.0, True), (0.5, -1.0, False), (-0.5, 1.0, False), (-0.5, -1.0, True), (0.1, 1.0, False)],
)
def test_the_clip_works_on_the_pessimistic_side(level: str, log_ratio: float, advantage: float, clipped: bool) -> None:
    logprobs = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    old = torch.full((1, 2), -log_ratio, dtype=torch.float64)
    ids, advantages = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([advantage])
    found = step_policy_loss(logprobs, old, ids, 0, advantages, clip_epsilon=0.2, level=level)
    assert found.loss is not None
    found.loss.backward()
    assert logprobs.grad is not None
    assert bool((logprobs.grad == 0).all()) == clipped
    bound = 1.2 if log_ratio > 0 else 0.8
    assert found.loss.item() == pytest.approx(-advantage * (bound if clipped else math.exp(log_ratio)))
    assert found.num_terms == (1 if level == "step" else 2)
    assert found.num_clipped == (found.num_terms if clipped else 0)


def test_the_sequence_ratio_is_that_of_the_whole_response() -> None:
    logprobs = torch.zeros(1, 4, dtype=torch.float64)
    old = -torch.tensor([[0.0, 0.0, 0.3, 9.0]], dtype=torch.float64)
    found = step_policy_loss(
        logprobs, old, torch.tensor([[0, 0, 1, -1]]), 0, torch.tensor([1.0]), clip_epsilon=0.9, level="sequence"
    )
    assert found.loss is not None and found.loss.item() == pytest.approx(-math.exp(0.1))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("junk", [NAN, math.inf, -math.inf])
def test_padding_may_hold_anything(level: str, junk: float) -> None:
    logprobs, old, step_ids, advantages = draw(3)
    assert bool((step_ids < 0).any())
    advantages = torch.where(advantages.isnan(), 1.0, advantages)
    clean = logprobs.clone().requires_grad_()
    expected = step_policy_loss(clean, old, step_ids, 0, advantages, level=level)
    dirty = logprobs.masked_fill(step_ids < 0, junk).requires_grad_()
    found = step_policy_loss(dirty, old.masked_fill(step_ids < 0, junk), step_ids, 0, advantages, level=level)
    assert found.loss is not None and expected.loss is not None
    assert found.loss.item() == expected.loss.item()
    found.loss.backward()
    expected.loss.backward()
    assert clean.grad is not None and dirty.grad is not None
    assert torch.equal(clean.grad, dirty.grad)


@pytest.mark.parametrize("level", LEVELS)
def test_a_missing_advantage_takes_the_response_out_of_the_mean(level: str) -> None:
    logprobs, old, step_ids, _ = draw(3)
    have = (step_ids == 0).any(1)
    assert int(have.sum()) >= 2
    dropped = int(have.nonzero()[0])
    advantages = torch.full((5,), 0.5, dtype=torch.float64)
    advantages[dropped] = NAN
    rest = [j for j in range(5) if j != dropped]
    found = step_policy_loss(logprobs, old, step_ids, 0, advantages, level=level)
    without = step_policy_loss(logprobs[rest], old[rest], step_ids[rest], 0, advantages[rest], level=level)
    assert found.loss is not None and without.loss is not None and torch.equal(found.loss, without.loss)
    assert (found.num_terms, found.num_clipped) == (without.num_terms, without.num_clipped)


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_to_learn_from(level: str) -> None:
    logprobs, old, step_ids, _ = draw(0)
    missing = torch.full((5,), NAN, dtype=torch.float64)
    assert step_policy_loss(logprobs, old, step_ids, 0, missing, level=level).loss is None
    assert step_policy_loss(logprobs, old, step_ids, 99, torch.ones(5), level=level).loss is None


def test_unknown_level() -> None:
    assert set(RATIOS) == set(LEVELS)
    with pytest.raises(ValueError, match="unknown importance level 'word'"):
        step_policy_loss(*draw(0)[:3], 0, torch.ones(5), level="word")
