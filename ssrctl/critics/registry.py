"""The registry of critics: the name that `--critic` gives, and how each is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ssrctl.configs import CriticOptions, SamplingConfig
from ssrctl.critics.base import Critic

if TYPE_CHECKING:
    from ssrctl.models.loading import LoadedModel


def make_critic(
    options: CriticOptions,
    *,
    policy: Callable[[], LoadedModel] | None = None,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
    ledger: Path | None = None,
) -> Critic:
    """The critic that ``options.critic`` names.

    Args:
        options: who scores, and how.
        policy: gives the model whose continuations the rollout critic samples; loaded only if it is asked for.
        sampling: how it samples.
        seed: of that sampling.
        ledger: where the llm critic notes its calls; None keeps no ledger.

    Raises:
        UserError: the critic lacks something: a key, a package, a rubric, a model.
    """
    return CRITICS[options.critic](
        options, CriticResources(policy=policy, sampling=sampling or SamplingConfig(), seed=seed, ledger=ledger)
    )


@dataclass(frozen=True, kw_only=True)
class CriticResources:
    """What a critic may need beside its options."""

    policy: Callable[[], LoadedModel] | None
    sampling: SamplingConfig
    seed: int
    ledger: Path | None


def _rule(options: CriticOptions, resources: CriticResources) -> Critic:
    from ssrctl.critics.rule import RuleCritic

    return RuleCritic(options.answer_extraction)


def _llm(options: CriticOptions, resources: CriticResources) -> Critic:
    from ssrctl.critics.llm.critic import LLMCritic

    return LLMCritic(options, ledger=resources.ledger)


def _rollout(options: CriticOptions, resources: CriticResources) -> Critic:
    from ssrctl.critics.rollout import RolloutCritic

    assert resources.policy is not None, "the rollout critic needs the policy"
    return RolloutCritic(options, resources.policy(), resources.sampling, resources.seed)


CRITICS: dict[str, Callable[[CriticOptions, CriticResources], Critic]] = {
    "rule": _rule,
    "llm": _llm,
    "rollout": _rollout,
}
