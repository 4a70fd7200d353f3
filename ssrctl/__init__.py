"""Step-wise reinforcement learning of language models with sparse, masked updates.

The public names for other programs are listed here and documented in docs/api.md. Each is imported when it is first asked for
(PEP 562), so that ``import ssrctl``, and with it the command line, costs no torch::

    from ssrctl import BlockMask, KronosOpt, segment, select_topk, two_level_advantages
    from ssrctl import ResponseCritic, Rollout, TrainConfig, read_rollouts, train
"""

import importlib
from typing import TYPE_CHECKING, Any

from ssrctl.version import __version__

__all__ = [
    "BlockMask",
    "Critic",
    "CriticOptions",
    "CriticResources",
    "FinalAnswer",
    "KronosOpt",
    "ResponseCritic",
    "RewardFunction",
    "Rollout",
    "StepScore",
    "StepSpan",
    "Stopped",
    "TrainConfig",
    "UserError",
    "__version__",
    "check_answer",
    "make_critic",
    "missing",
    "read_rollouts",
    "score_all",
    "scored",
    "segment",
    "select_topk",
    "train",
    "two_level_advantages",
    "write_rollouts",
]

# The public names that each module defines.
_MODULES = {
    "ssrctl.configs.critic": ["CriticOptions"],
    "ssrctl.configs.train": ["TrainConfig"],
    "ssrctl.core.advantages": ["two_level_advantages"],
    "ssrctl.core.kronos": ["KronosOpt"],
    "ssrctl.core.mask": ["BlockMask"],
    "ssrctl.core.topk": ["select_topk"],
    "ssrctl.critics.base": ["Critic", "CriticResources", "ResponseCritic", "missing", "score_all", "scored"],
    "ssrctl.critics.registry": ["make_critic"],
    "ssrctl.critics.rewards": ["RewardFunction"],
    "ssrctl.errors": ["Stopped", "UserError"],
    "ssrctl.io.records": ["FinalAnswer", "Rollout", "StepScore", "StepSpan", "read_rollouts", "write_rollouts"],
    "ssrctl.stages.train": ["train"],
    "ssrctl.text.answers": ["check_answer"],
    "ssrctl.text.segment": ["segment"],
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

if TYPE_CHECKING:
    from ssrctl.configs.critic import CriticOptions
    from ssrctl.configs.train import TrainConfig
    from ssrctl.core.advantages import two_level_advantages
    from ssrctl.core.kronos import KronosOpt
    from ssrctl.core.mask import BlockMask
    from ssrctl.core.topk import select_topk
    from ssrctl.critics.base import Critic, CriticResources, ResponseCritic, missing, score_all, scored
    from ssrctl.critics.registry import make_critic
    from ssrctl.critics.rewards import RewardFunction
    from ssrctl.errors import Stopped, UserError
    from ssrctl.io.records import FinalAnswer, Rollout, StepScore, StepSpan, read_rollouts, write_rollouts
    from ssrctl.stages.train import train
    from ssrctl.text.answers import check_answer
    from ssrctl.text.segment import segment
else:  # a type checker that saw this would accept every misspelt name

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'ssrctl' has no attribute {name!r}; its public names: {', '.join(__all__)}")
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value  # the next look-up does not come here
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
