"""Settings of the engine that samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from ssrctl.configs.building import Config
from ssrctl.errors import UserError


@dataclass(kw_only=True)
class EngineOptions(Config):
    """Settings of training on the samples of an engine whose log-probabilities differ from the trainer's."""

    panel = "Engine"

    old_logprobs: Literal["engine", "trainer"] | None = None
    """Old log-probabilities of the importance ratio: those that the engine gave while sampling, or the trainer's own, from a
    pass without gradients. By default engine, since it samples with the trainer's weights and precision; trainer with
    --engine-correction."""

    engine_correction: Literal["none", "truncate", "mask"] = "none"
    """Weigh the policy loss with the probability ratio of trainer and engine. truncate: a ratio above
    --engine-correction-cap counts as the cap; mask: it counts 0."""

    engine_correction_cap: Annotated[float, Ge(1)] = 2.0
    """Largest ratio of --engine-correction."""

    engine_correction_level: Literal["token", "step", "sequence"] | None = None
    """Tokens whose ratios are multiplied before the cap: none, those of a step, those of a response. By default step with
    kronos, whose updates are per step, otherwise as --importance-level."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine_correction != "none" and self.old_logprobs == "engine":
            raise UserError(
                f"--old-logprobs engine has the ratio to the engine in it, and --engine-correction {self.engine_correction} "
                "would count it twice",
                "use --old-logprobs trainer, or --engine-correction none",
            )

    @property
    def resolved_old_logprobs(self) -> str:
        """The source of the old log-probabilities in force."""
        return self.old_logprobs or ("engine" if self.engine_correction == "none" else "trainer")
