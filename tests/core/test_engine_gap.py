"""The gap between engine and trainer and its correction, compared with loops and with exact expectations."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.core.engine_gap import engine_correction, measure_gap
from ssrctl.core.losses import step_policy_loss

STEPS = torch.tensor([[0, 0, 1, 1, 2], [0, 1, 1, -1, -1], [-1, -1, -1, -1, -1]])


def spans_of(level):
    """Lists of (row, column), one list per token, step or response."""
    places = [(row, column) for row, column in itertools.product(range(3), range(5)) if STEPS[row, column] >= 0]
    key = {"token": lambda p: p, "step": lambda p: (p[0], int(STEPS[p])), "sequence": lambda p: p[0]}[level]
    return [list(group) for _, group in itertools.groupby(places, key)]


@pytest.mark.parametrize("level", ["token", "step", "sequence"])
@pytest.mark.parametrize("kind", ["truncate", "mask"])
@given(seed=st.integers(0, 10**6), missing=st.booleans())
def test_weights_equal_the_loops(level, kind, seed, missing):
    generator = torch.Generator().manual_seed(seed)
    trainer, engine = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    if missing:
        engine[0, 2] = float("nan")
    made = engine_correction(trainer, engine, STEPS, kind=kind, level=level, cap=1.5)
    wanted, hits, known = torch.zeros(3, 5, dtype=torch.float64), 0, 0
    for span in spans_of(level):
        ratio = math.exp(sum(float(trainer[p] - engine[p]) for p in span))
        if math.isnan(ratio):
            continue
        known, hits = known + 1, hits + (ratio > 1.5)
        for place in span:
            wanted[place] = min(ratio, 1.5) if kind == "truncate" else ratio * (ratio <= 1.5)
    torch.testing.assert_close(made.weights, wanted)
    assert (made.num_hit, made.num_spans) == (hits, known)


@pytest.mark.parametrize(
    ("kind", "cap", "right"), [("truncate", 1e9, True), ("mask", 1e9, True), ("truncate", 1.0, False)]
)
def test_the_corrected_gradient_is_in_the_mean_that_of_the_trainers_own_samples(kind, cap, right):
    """All 9 responses of two tokens, drawn by an engine at another temperature; a cap that bites leaves a bias."""
    logits = torch.tensor([0.3, -1.0, 0.9], dtype=torch.float64)
    policy = logits.log_softmax(0)
    engine = (logits / 2.0).log_softmax(0)
    rewards = torch.tensor([1.0, -0.4, 0.2], dtype=torch.float64)
    total = {"weighed": torch.zeros(2), "plain": torch.zeros(2), "own": torch.zeros(2)}
    for tokens in itertools.product(range(3), repeat=2):
        now, then = policy[list(tokens)].unsqueeze(0), engine[list(tokens)].unsqueeze(0)
        steps, advantages = torch.zeros(1, 2, dtype=torch.int64), rewards[tokens[0]].unsqueeze(0)
        weights = engine_correction(now, then, steps, kind=kind, level="sequence", cap=cap).weights
        for name, correction in (("weighed", weights), ("plain", None), ("own", None)):
            logprobs = now.clone().requires_grad_()
            loss = step_policy_loss(logprobs, now, steps, 0, advantages, level="token", correction=correction).loss
            drawn = float((now if name == "own" else then).sum().exp())
            total[name] = total[name] + drawn * torch.autograd.grad(loss, logprobs)[0][0]
    assert not torch.allclose(total["plain"], total["own"], rtol=0.05)
    assert torch.allclose(total["weighed"], total["own"], rtol=1e-12) == right


@pytest.mark.parametrize("level", ["token", "step", "sequence"])
def test_a_steps_loss_is_weighed_and_the_kl_term_is_not(level):
    new = torch.tensor([[-1.0, -2.0, -0.5]], dtype=torch.float64, requires_grad=True)
    steps, advantage = torch.tensor([[0, 0, 1]]), torch.tensor([0.7])
    settings = {"level": level, "beta": 0.3, "reference": new.detach() + 0.2}
    weights = torch.tensor([[0.25, 0.25, 9.0]])
    plain = step_policy_loss(new, new.detach(), steps, 0, advantage, **settings).loss
    weighed = step_policy_loss(new, new.detach(), steps, 0, advantage, correction=weights, **settings).loss
    assert float((weighed - plain).detach()) == pytest.approx(0.7 * (1 - 0.25))


def test_the_gap_of_a_hundred_tokens():
    apart = torch.zeros(100)
    apart[7], apart[50] = -0.5, 0.25
    gap = measure_gap(apart, low=0.8, high=1.3)
    assert (gap.mean, gap.p99, gap.max) == (0.0075, 0.25, 0.5)
    assert gap.kl == pytest.approx((math.exp(-0.5) - 0.5 + math.exp(0.25) - 1.25) / 100)
    assert gap.outside_frac == pytest.approx(0.01), "exp(0.25) = 1.28 is inside"
    assert measure_gap(torch.empty(0), low=0.8, high=1.2) is None


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown kind 'drop'"):
        engine_correction(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), kind="drop", level="token", cap=2)
