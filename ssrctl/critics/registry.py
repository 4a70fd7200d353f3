"""The registry of critics: the values of ``--critic`` and the class behind each."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ssrctl.configs import CriticOptions, SamplingConfig
from ssrctl.critics.base import Critic

if TYPE_CHECKING:
    from ssrctl.models.loading import LoadedModel
    from ssrctl.text.prompts import PromptFormat

# Each class has a class method create(options, resources). Its module is imported only when the critic is chosen.
CRITICS = {
    "rule": "ssrctl.critics.rule:RuleCritic",
    "llm": "ssrctl.critics.llm.critic:LLMCritic",
    "rollout": "ssrctl.critics.rollout:RolloutCritic",
    "prm": "ssrctl.critics.prm.critic:PRMCritic",
}


@dataclass(frozen=True, kw_only=True)
class CriticResources:
    """Objects that a critic may need in addition to its options.

    Attributes:
        policy: loads the model whose continuations the rollout critic samples; called only by a critic that needs it.
        sampling: settings of that sampling.
        prompt_format: the way to the prompt of a record that has none; None leaves such records without a prompt.
        seed: seed of that sampling.
        device: device of the prm critic's model, as ``--device``.
        ledger: file for the log of the llm critic's calls; None writes no log.
    """

    policy: Callable[[], LoadedModel] | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    prompt_format: PromptFormat | None = None
    seed: int = 0
    device: str = "auto"
    ledger: Path | None = None


def make_critic(options: CriticOptions, resources: CriticResources | None = None) -> Critic:
    """Return the critic that ``options.critic`` names.

    Raises:
        UserError: the critic lacks a key, a package, a rubric or a model.
    """
    create: Callable[..., Critic] = pkgutil.resolve_name(CRITICS[options.critic]).create
    return create(options, resources or CriticResources())
