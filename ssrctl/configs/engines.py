"""Settings of the engine that samples."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from annotated_types import Ge

from ssrctl.configs.building import Config, NotNegative, ZeroOrMore, default_of
from ssrctl.configs.credentials import check_address
from ssrctl.configs.names import flag
from ssrctl.errors import UserError

DEFAULT_SERVER = "http://127.0.0.1:8000"
KEY_VARIABLE = "VLLM_API_KEY"


def check_server(setting: str, address: str) -> None:
    """Raise a UserError for a setting that is not the address of a vLLM server, or has a credential in it."""
    check_address(setting, address, variable=KEY_VARIABLE, example=DEFAULT_SERVER)


@dataclass(kw_only=True)
class RolloutOptions(Config):
    """Settings of the engine that samples."""

    panel = "Engine"

    rollout_engine: Literal["transformers", "vllm-server"] = "transformers"
    """Engine that samples: transformers in this process, or vllm-server, a running vLLM whose weights follow the model by
    pushes (`ssrctl serve-rollouts` starts one)."""

    rollout_server_url: list[str] = field(default_factory=list)
    """Address of the vLLM server, http://127.0.0.1:8000 by default; give the flag again for several."""

    rollout_server_timeout: NotNegative = 240.0
    """Seconds to wait for the servers at the start."""

    rollout_server_return: NotNegative = 0.0
    """Seconds to wait for a server that is gone to come back, when it gets all weights; 0 ends the run, to be continued."""

    rollout_push: Literal["auto", "file", "inline"] = "auto"
    """Carrier of the weights. file: a file in shared memory, for servers on this machine; inline: the request itself; auto
    chooses by the address."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for address in self.rollout_server_url:
            check_server("--rollout-server-url", address)
        idle = [spec.name for spec in fields(RolloutOptions) if getattr(self, spec.name) != default_of(spec)]
        if self.rollout_engine == "transformers" and idle:
            raise UserError(
                f"{flag(type(self), idle[0])} is for --rollout-engine vllm-server", "give that too, or leave it out"
            )


@dataclass(kw_only=True)
class EngineOptions(RolloutOptions):
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

    verify_engine_every: ZeroOrMore = 0
    """Compare the engine with itself after a push of all weights, every N steps; 0 never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.verify_engine_every and self.rollout_engine == "transformers":
            raise UserError("--verify-engine-every is for --rollout-engine vllm-server", "leave it out")
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
