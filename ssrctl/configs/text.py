"""Settings of segmentation and critics."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ssrctl.configs.building import output, positional, require
from ssrctl.configs.common import CommonConfig, ModelConfig, SamplingConfig, check_sampling
from ssrctl.errors import UserError


@dataclass(kw_only=True)
class SegmentOptions:
    """How a response is cut into steps."""

    style: Literal["auto", "newline", "paragraph"] = "auto"
    """auto: line breaks, enumerations and headings, else sentence ends and discourse markers; newline: every
    line outside of code, formulas and tables; paragraph: blank lines alone."""

    max_steps: int = 64
    """Most steps per response; the shortest neighbours are merged until so many remain."""

    min_chars: int = 2
    """A step shorter than this many characters is merged into its neighbour."""

    max_chars: int = 2000
    """A step longer than this many characters is cut at line and sentence ends where it has any; 0 is off."""


@dataclass(kw_only=True)
class SegmentConfig(SegmentOptions, CommonConfig):
    """Split responses into reasoning steps."""

    input: str = positional(metavar="RESPONSES")
    """Responses (jsonl), or - for stdin."""

    output: str = output("-")
    """Where to write the responses with their steps (jsonl), or - for stdout."""

    tokenizer: str | None = None
    """Also count the tokens of each step, by this model's tokenizer (hub name or local folder)."""

    def __post_init__(self) -> None:
        require(self.max_steps >= 1, "--max-steps", "at least 1", self.max_steps)
        require(self.min_chars >= 1, "--min-chars", "at least 1", self.min_chars)
        require(self.max_chars == 0 or self.max_chars >= 40, "--max-chars", "0 or at least 40", self.max_chars)


@dataclass(kw_only=True)
class CriticOptions:
    """Who scores steps, and how."""

    critic: Literal["rule", "llm", "rollout"] = "rule"
    """rule checks arithmetic and where its numbers come from; llm asks a model through litellm; rollout lets the
    policy itself go on from each step and counts how often it ends right."""

    critic_model: str | None = None
    """litellm model name of the llm critic, such as openai/gpt-oss-120b."""

    critic_fallback: list[str] = field(default_factory=list)
    """litellm model to ask when the first one fails; may be given several times."""

    critic_api_base: str | None = None
    """Endpoint of the llm critic, for an OpenAI-compatible server of your own; it serves the fallbacks with the same
    provider prefix too."""

    rubric: str = "steps"
    """Rubric of the llm critic: steps, correctness, progress, clarity, final, or a text file."""

    per_step: bool = False
    """One call per step with the steps before it as context (the paper's way) instead of one per response."""

    show_reference: bool = True
    """Show the llm critic the reference answer, where the record has one."""

    critic_temperature: float = 0.0
    """Sampling temperature of the llm critic."""

    critic_thinking_tokens: int = 2048
    """Room in a reply, beside the scores, for what a reasoning model writes before them."""

    max_concurrency: int = 8
    """Calls of the llm critic in flight at once."""

    requests_per_minute: float | None = None
    """Pace of the llm critic's calls, retries included; no limit by default."""

    critic_timeout: float = 60.0
    """Seconds after which a call of the llm critic counts as failed."""

    critic_retries: int = 3
    """Further tries after a call that failed for a passing reason."""

    input_price: float | None = None
    """US dollars per million prompt tokens; by default litellm's table."""

    output_price: float | None = None
    """US dollars per million reply tokens; by default litellm's table."""

    budget_usd: float | None = None
    """Hard cap on what the llm critic may spend; reached, the run stops and keeps what is done."""

    cache: bool = True
    """Keep the llm critic's replies and never pay for the same judgement twice."""

    cache_dir: Path | None = None
    """Folder of the replies; by default ssrctl under the user's cache folder."""

    critic_rollouts: int = 8
    """Continuations per step of the rollout critic (Math-Shepherd's K)."""

    rollout_value: Literal["difference", "value"] = "difference"
    """Rollout critic: a step's score is how much it changes the share of right continuations, or that share."""


@dataclass(kw_only=True)
class CriticConfig(ModelConfig, SamplingConfig, CriticOptions, CommonConfig):
    """Score each reasoning step; what cannot be judged is missing, never 0.

    --model, --temperature and the other sampling settings are those of the rollout critic's policy; its
    --max-new-tokens covers the response's steps so far and the continuation together.
    """

    input: str | None = positional(metavar="STEPS", default=None)
    """Segmented responses (jsonl), or - for stdin."""

    output: str = output("-")
    """Where to write the scored responses (jsonl), or - for stdout. In a file, scores that are there already are
    kept, and only what is missing is asked for."""

    ledger: Path | None = None
    """Where to note every call of the llm critic (jsonl); by default beside the output."""

    calibrate: Path | None = None
    """Instead of scoring, measure the critic on labelled solutions (ProcessBench's fields, or segmented responses
    with the first wrong step as label) and print one table."""

    repeats: int = 1
    """With --calibrate: judge everything so many times, to measure the noise of the scores."""

    wrong_below: float = 0.0
    """With --calibrate: the first step whose score is below this counts as the critic's first error."""

    limit: int | None = None
    """Use only the first so many records."""

    def __post_init__(self) -> None:
        check_critic(self)
        check_sampling(self)
        require(self.limit is None or self.limit >= 1, "--limit", "at least 1", self.limit)
        require(self.repeats >= 1, "--repeats", "at least 1", self.repeats)
        require(-100 < self.wrong_below <= 100, "--wrong-below", "above -100 and at most 100", self.wrong_below)
        if self.calibrate is not None and self.input is not None:
            raise UserError("--calibrate takes the place of STEPS", "give one of them")
        if self.calibrate is None and self.input is None:
            raise UserError("no input", "name the file that `ssrctl segment` wrote, or - for stdin")
        if self.ledger is not None and str(self.ledger) in (self.input, self.output):
            raise UserError(f"--ledger {self.ledger} is also the input or the output", "name another file")
        if self.calibrate is None and self.repeats > 1:
            raise UserError("--repeats measures the noise of scores", "use it with --calibrate")


def check_critic(config: CriticOptions) -> None:
    """Ranges and combinations of the critic's settings.

    Raises:
        UserError: a value is out of its range, or a setting that is given has no effect.
    """
    if config.critic == "llm" and not config.critic_model:
        raise UserError("the llm critic needs a model", "give --critic-model, such as openai/gpt-oss-120b")
    require(config.max_concurrency >= 1, "--max-concurrency", "at least 1", config.max_concurrency)
    require(config.critic_timeout > 0, "--critic-timeout", "above 0", config.critic_timeout)
    require(config.critic_retries >= 0, "--critic-retries", "0 or more", config.critic_retries)
    require(config.critic_thinking_tokens >= 0, "--critic-thinking-tokens", "0 or more", config.critic_thinking_tokens)
    require(config.critic_temperature >= 0, "--critic-temperature", "0 or more", config.critic_temperature)
    require(config.critic_rollouts >= 1, "--critic-rollouts", "at least 1", config.critic_rollouts)
    for name in ("requests_per_minute", "budget_usd"):
        value = getattr(config, name)
        require(value is None or 0 < value < math.inf, "--" + name.replace("_", "-"), "above 0 and finite", value)
    for name in ("input_price", "output_price"):
        value = getattr(config, name)
        require(value is None or 0 <= value < math.inf, "--" + name.replace("_", "-"), "0 or more and finite", value)
    if (config.input_price is None) != (config.output_price is None):
        raise UserError("--input-price and --output-price belong together", "give both")
