"""Settings of the stages that measure a model before it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ssrctl.configs.building import output, require
from ssrctl.configs.common import CommonConfig, DatasetConfig, ModelConfig, SamplingConfig, check_limit, check_sampling
from ssrctl.errors import UserError


@dataclass(kw_only=True)
class SuperweightsConfig(ModelConfig, CommonConfig):
    """Find the language-critical weights and write them as a mask (SSR section 2.2)."""

    output: Path = output()
    """Mask file to write (safetensors); a report goes beside it as json."""

    prompts: str = "auto"
    """Prompts: a jsonl file with a text field each, a name in profiles/prompts, or auto."""

    method: Literal["gradient", "activation", "both"] = "gradient"
    """Gradient magnitude with KL ablation, activation spikes (Yu et al. 2024), or the union of both."""

    fraction: float | None = None
    """Size of the mask as a fraction of all weights; 0.005 unless --minimal."""

    minimal: bool = False
    """Shrink from 4% to the smallest size whose ablation still gives KL of at least --kl-threshold."""

    kl_threshold: float = 1.0
    """Divergence in nats from which a set counts as language-critical."""

    candidate_fraction: float = 0.05
    """Share of weights taken as candidates from each prompt subset."""

    num_subsets: int = 4
    """Prompt subsets whose candidates are collected and united."""

    max_prompt_tokens: int = 256
    """Longest prompt; what exceeds it is cut off and counted."""

    spike_threshold: float = 50.0
    """Activation method: a channel is a spike when it exceeds so many times the median channel maximum."""

    def __post_init__(self) -> None:
        if self.fraction is not None:
            require(0 < self.fraction < 1, "--fraction", "between 0 and 1", self.fraction)
        if self.fraction is not None and self.minimal:
            raise UserError("--fraction and --minimal exclude each other", "give one of them")
        require(0 < self.candidate_fraction < 1, "--candidate-fraction", "between 0 and 1", self.candidate_fraction)
        require(self.num_subsets >= 1, "--num-subsets", "at least 1", self.num_subsets)
        require(self.kl_threshold > 0, "--kl-threshold", "above 0", self.kl_threshold)
        require(self.max_prompt_tokens >= 2, "--max-prompt-tokens", "at least 2", self.max_prompt_tokens)
        require(self.spike_threshold > 1, "--spike-threshold", "above 1", self.spike_threshold)


@dataclass(kw_only=True)
class ProfileBudgetConfig(ModelConfig, SamplingConfig, DatasetConfig, CommonConfig):
    """Measure how gradient magnitude decays over steps and write the budget profile (SSR section 2.3.3)."""

    output: Path = output()
    """Profile to write (json); a plot goes beside it when matplotlib is there."""

    traces: Path | None = None
    """Scored traces (jsonl from `ssrctl critic`); without it, responses to the dataset are sampled and scored."""

    protect: Path | None = None
    """Superweight mask: these coordinates count as claimed from the start."""

    ignore_fingerprint: bool = False
    """Use a mask that was made for other weights of the same shapes."""

    num_problems: int = 16
    """Problems to profile."""

    num_generations: int = 8
    """Responses per problem."""

    claim_fraction: float = 0.01
    """Share of the unprotected weights that each profiled step claims."""

    max_steps: int = 24
    """Profile no further than this step."""

    advantage: Literal["paper", "group", "hybrid"] = "group"
    """Rule of the advantages whose gradients are measured, as in `ssrctl train`."""

    def __post_init__(self) -> None:
        check_sampling(self)
        check_limit(self)
        require(self.num_problems >= 1, "--num-problems", "at least 1", self.num_problems)
        require(self.num_generations >= 2, "--num-generations", "at least 2", self.num_generations)
        require(0 < self.claim_fraction < 1, "--claim-fraction", "between 0 and 1", self.claim_fraction)
        require(self.max_steps >= 1, "--max-steps", "at least 1", self.max_steps)
