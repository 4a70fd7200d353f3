"""Settings of the search for superweights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from ssrctl.configs.building import AtLeastOne, Fraction, Positive, output
from ssrctl.configs.common import GradientOptions, HubOptions, ModelConfig, ProcessOptions
from ssrctl.errors import UserError


@dataclass(kw_only=True)
class SuperweightsConfig(ModelConfig, GradientOptions, ProcessOptions, HubOptions):
    """Find the language-critical weights and write them as a mask (SSR section 2.2).

    Example: ssrctl superweights --model Qwen/Qwen2.5-0.5B-Instruct -o superweights.safetensors
    """

    output: Path = output()
    """Mask file to write (safetensors); a json report is written next to it."""

    prompts: str = "auto"
    """Prompts: a jsonl file with a text field each, a name in profiles/prompts, or auto."""

    method: Literal["gradient", "activation", "both"] = "gradient"
    """Gradient magnitude with KL ablation, activation spikes (Yu et al. 2024), or the union of both."""

    fraction: Fraction | None = None
    """Size of the mask as a fraction of all weights; 0.005 unless --minimal."""

    minimal: bool = False
    """Shrink from 4% to the smallest size whose ablation still gives KL of at least --kl-threshold."""

    kl_threshold: Positive = 1.0
    """Smallest divergence in nats at which a set counts as language-critical."""

    candidate_fraction: Fraction = 0.05
    """Share of weights taken as candidates from each prompt subset."""

    num_subsets: AtLeastOne = 4
    """Prompt subsets whose candidates are collected and united."""

    max_prompt_tokens: Annotated[int, Ge(2)] = 256
    """Longest prompt; longer ones are truncated and counted."""

    spike_threshold: Annotated[float, Gt(1)] = 50.0
    """Activation method: a channel is a spike when it exceeds the median channel maximum by this factor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fraction is not None and self.minimal:
            raise UserError("--fraction and --minimal exclude each other", "give one of them")
