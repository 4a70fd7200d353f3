"""Choosing a critic, and from scores to rewards."""

import pkgutil

import pytest

from ssrctl.configs import CriticOptions
from ssrctl.configs.critic import BUILT_IN
from ssrctl.critics.base import missing, scored
from ssrctl.critics.registry import CRITICS, make_critic
from ssrctl.critics.rule import RuleCritic


@pytest.mark.parametrize(
    "kind, score, reward",
    [
        ("step", -100, -1.0),
        ("step", -50, -0.5),
        ("step", 0, 0.0),
        ("step", 85, 0.85),
        ("step", 100, 1.0),
        ("final", 0, -1.0),
        ("final", 25, -0.5),
        ("final", 50, 0.0),
        ("final", 100, 1.0),
    ],
)
def test_rewards_of_equations_2_and_3(kind, score, reward):
    made = scored(score, kind, "why")
    assert (made.score, made.rationale, made.error) == (score, "why", None)
    assert made.reward == pytest.approx(reward, abs=1e-15)


@pytest.mark.parametrize(
    "kind, score",
    [
        ("step", -100.5),
        ("step", 101),
        ("final", -1),
        ("final", 100.5),
        ("step", float("nan")),
        ("final", float("inf")),
        ("step", -float("inf")),
    ],
)
def test_scores_outside_their_range_are_missing(kind, score):
    made = scored(score, kind, "why")
    assert (made.score, made.reward, made.error, made.rationale) == (None, None, "out_of_range", "why")


def test_missing_is_not_zero():
    made = missing("timeout")
    assert (made.score, made.reward, made.error, made.rationale) == (None, None, "timeout", None)


def test_every_value_of_the_option_is_a_critic():
    assert set(CRITICS) == set(BUILT_IN)
    assert all(callable(pkgutil.resolve_name(path).create) for path in CRITICS.values())
    assert isinstance(make_critic(CriticOptions(critic="rule")), RuleCritic)
