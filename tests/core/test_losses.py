"""The clipped step loss, compared with loops over tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import policy_loss as reference

from ssrctl.core.losses import step_policy_loss

LEVELS = ("token", "step", "sequence")


def random_group(seed, spread):
    """Ragged responses with steps in order, log-ratios of the given spread, some advantages missing."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = 4, 9
    step_ids = torch.full((rows, width), -1, dtype=torch.int64)
    for row in range(rows):
        length = int(torch.randint(1, width + 1, (), generator=generator))
        cuts = torch.rand(length, generator=generator) < 0.4
        cuts[0] = False
        step_ids[row, :length] = cuts.cumsum(0)
    old = -3 * torch.rand(rows, width, generator=generator, dtype=torch.float64)
    new = old + spread * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64)
    advantages[torch.rand(rows, generator=generator) < 0.25] = float("nan")
    return new, old, step_ids, advantages


@pytest.mark.parametrize("level", LEVELS)
@given(seed=st.integers(0, 10**6), spread=st.sampled_from([0.0, 0.1, 0.5]), step=st.integers(0, 3))
def test_loss_and_gradient_equal_the_loops(level, seed, spread, step):
    new, old, step_ids, advantages = random_group(seed, spread)
    values = [None if a != a else a for a in advantages.tolist()]
    loss, gradient, terms, clipped = reference.step_loss(
        new.tolist(), old.tolist(), step_ids.tolist(), step, values, 0.2, level
    )
    new.requires_grad_(True)
    made = step_policy_loss(new, old, step_ids, step, advantages, clip_epsilon=0.2, level=level)
    assert (made.num_terms, made.num_clipped) == (terms, clipped)
    if loss is None:
        assert made.loss is None
        return
    # float64 throughout: a dozen operations on numbers of order 1
    assert float(made.loss.detach()) == pytest.approx(loss, abs=1e-12)
    made.loss.backward()
    torch.testing.assert_close(new.grad, torch.tensor(gradient, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_descent_raises_what_was_good_and_lowers_what_was_bad(level, advantage):
    logprobs = torch.full((1, 3), -1.0, requires_grad=True)
    steps = torch.tensor([[0, 1, 1]])
    made = step_policy_loss(logprobs, logprobs.detach().clone(), steps, 1, torch.tensor([advantage]), level=level)
    made.loss.backward()
    change = -logprobs.grad
    assert float(made.loss.detach()) == pytest.approx(-advantage)
    assert float(change[0, 0]) == 0.0, "a token outside the step was moved"
    assert bool((change[0, 1:] * advantage > 0).all())
    # at ratio 1 all three levels share one gradient: the mean over the step's two tokens
    torch.testing.assert_close(change[0, 1:], torch.full((2,), advantage / 2))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("log_ratio", "advantage", "clips"), [(0.5, 1.0, True), (0.5, -1.0, False), (-0.5, 1.0, False), (-0.5, -1.0, True)]
)
def test_the_clip_stops_only_what_has_gone_far_enough(level, log_ratio, advantage, clips):
    old = torch.full((1, 2), -2.0)
    logprobs = (old + log_ratio).requires_grad_(True)
    steps = torch.zeros(1, 2, dtype=torch.int64)
    made = step_policy_loss(logprobs, old, steps, 0, torch.tensor([advantage]), clip_epsilon=0.2, level=level)
    made.loss.backward()
    assert made.num_clipped == (made.num_terms if clips else 0)
    assert (float(logprobs.grad.abs().sum()) == 0.0) == clips
    limit = 1.2 if log_ratio > 0 else 0.8
    ratio = limit if clips else float(torch.tensor(log_ratio).exp())
    assert float(made.loss.detach()) == pytest.approx(-advantage * ratio, rel=1e-6)


def test_long_steps_weigh_no_more_than_short_ones():
    """The mean is over a response's own tokens first, and then over the responses."""
    logprobs = torch.zeros(2, 4, requires_grad=True)
    steps = torch.tensor([[0, 0, 0, 0], [0, -1, -1, -1]])
    step_policy_loss(logprobs, torch.zeros(2, 4), steps, 0, torch.tensor([1.0, 1.0]), level="token").loss.backward()
    torch.testing.assert_close(logprobs.grad, -torch.tensor([[0.125] * 4, [0.5, 0, 0, 0]]))


def test_responses_without_the_step_or_without_a_score_are_left_out_of_the_mean():
    logprobs = torch.zeros(3, 2, requires_grad=True)
    steps = torch.tensor([[0, 1], [0, 0], [0, 1]])
    advantages = torch.tensor([1.0, 1.0, float("nan")])
    made = step_policy_loss(logprobs, torch.zeros(3, 2), steps, 1, advantages)
    made.loss.backward()
    assert float(made.loss.detach()) == -1.0
    assert logprobs.grad.tolist() == [[0.0, -1.0], [0.0, 0.0], [0.0, 0.0]]


def test_a_zero_advantage_is_a_score_and_counts():
    logprobs = torch.zeros(2, 1, requires_grad=True)
    made = step_policy_loss(
        logprobs, torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int64), 0, torch.tensor([1.0, 0.0])
    )
    assert float(made.loss.detach()) == -0.5


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")])
def test_padding_may_hold_anything(level, garbage):
    clean = torch.tensor([[-1.0, -2.0, -3.0], [-1.5, 0.0, 0.0]])
    old = clean + 0.1
    steps = torch.tensor([[0, 0, 1], [0, -1, -1]])
    advantages = torch.tensor([1.0, -0.5])
    results = []
    for dirty in (False, True):
        new_in, old_in = clean.clone(), old.clone()
        if dirty:
            new_in[1, 1:] = garbage
            old_in[1, 2] = garbage
        new_in.requires_grad_(True)
        made = step_policy_loss(new_in, old_in, steps, 0, advantages, level=level)
        made.loss.backward()
        results.append((made.loss.detach(), new_in.grad, made.num_terms, made.num_clipped))
    assert results[0][2:] == results[1][2:]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0)


def test_no_response_has_the_step():
    nothing = step_policy_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[0, -1]]), 3, torch.ones(1))
    assert (nothing.loss, nothing.num_terms, nothing.num_clipped) == (None, 0, 0)


def test_levels_are_known_by_name():
    with pytest.raises(ValueError, match="'word'; known: token, step, sequence"):
        step_policy_loss(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), 0, torch.ones(1), level="word")
