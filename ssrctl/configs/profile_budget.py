"""Settings of the budget profile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge

from ssrctl.configs.building import AtLeastOne, Fraction, output
from ssrctl.configs.common import (
    DatasetConfig,
    GradientOptions,
    HubOptions,
    ModelConfig,
    ProcessOptions,
    SamplingConfig,
)


@dataclass(kw_only=True)
class ProfileBudgetConfig(ModelConfig, GradientOptions, DatasetConfig, SamplingConfig, ProcessOptions, HubOptions):
    """Measure the decay of gradient magnitude over steps and write the budget profile (SSR section 2.3.3).

    Example: ssrctl profile-budget --model Qwen/Qwen2.5-0.5B-Instruct --protect superweights.safetensors -o budget.json
    """

    output: Path = output()
    """Profile to write (json); a plot is written next to it if matplotlib is installed."""

    traces: Path | None = None
    """Scored traces (jsonl from `ssrctl critic`); without it, responses to the dataset are sampled and scored."""

    protect: Path | None = None
    """Superweight mask: these coordinates count as claimed from the start."""

    ignore_fingerprint: bool = False
    """Use a mask that was made for other weights of the same shapes."""

    num_problems: AtLeastOne = 16
    """Problems to profile."""

    num_generations: Annotated[int, Ge(2)] = 8
    """Responses per problem."""

    claim_fraction: Fraction = 0.01
    """Share of the unprotected weights that each profiled step claims."""

    max_steps: AtLeastOne = 24
    """Profile no further than this step."""

    advantage: Literal["paper", "group", "hybrid"] = "group"
    """Rule of the advantages whose gradients are measured, as in `ssrctl train`."""
