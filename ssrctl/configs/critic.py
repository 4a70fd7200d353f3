"""Settings of critics."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from ssrctl.configs.building import AtLeastOne, Config, Finite, NotNegative, Positive, ZeroOrMore, output, positional
from ssrctl.configs.common import CommonConfig, ModelConfig, SamplingConfig
from ssrctl.errors import UserError


@dataclass(kw_only=True)
class CriticOptions(Config):
    """Settings of the critic that scores steps."""

    panel = "Critic"

    critic: Literal["rule", "llm", "rollout"] = "rule"
    """rule checks arithmetic and the origin of its numbers; llm asks a model through litellm; rollout lets the
    policy itself continue from each step and counts how often the answer is right."""

    critic_model: str | None = None
    """litellm model name of the llm critic, such as openai/gpt-oss-120b."""

    critic_fallback: list[str] = field(default_factory=list)
    """litellm model to ask when the first one fails; may be given several times."""

    critic_api_base: str | None = None
    """Endpoint of the llm critic, for an OpenAI-compatible server of your own; it also serves fallbacks with the same
    provider prefix."""

    critic_rubric: str = "steps"
    """Rubric of the llm critic: steps, correctness, progress, clarity, final, or a text file."""

    critic_per_step: bool = False
    """One call per step with the steps before it as context (the paper's way) instead of one per response."""

    critic_show_reference: bool = True
    """Show the llm critic the reference answer, where the record has one."""

    critic_temperature: NotNegative = 0.0
    """Sampling temperature of the llm critic."""

    critic_thinking_tokens: ZeroOrMore = 2048
    """Tokens allowed in a reply for a reasoning model's thoughts, in addition to the scores."""

    critic_max_concurrency: AtLeastOne = 8
    """Calls of the llm critic in flight at once."""

    critic_requests_per_minute: Annotated[Positive, Finite] | None = None
    """Rate limit of the llm critic's calls, retries included; no limit by default."""

    critic_timeout: Positive = 60.0
    """Seconds until a call of the llm critic counts as failed."""

    critic_retries: ZeroOrMore = 3
    """Retries after a transient failure."""

    critic_input_price: Annotated[NotNegative, Finite] | None = None
    """US dollars per million prompt tokens; by default litellm's table."""

    critic_output_price: Annotated[NotNegative, Finite] | None = None
    """US dollars per million reply tokens; by default litellm's table."""

    critic_budget_usd: Annotated[Positive, Finite] | None = None
    """Hard cap on the llm critic's cost in US dollars; when it is reached, the run stops and keeps the scores so far."""

    critic_cache: bool = True
    """Use the cache of the llm critic's replies, in which each judgement is paid for only once."""

    critic_cache_dir: Path | None = None
    """Folder of the replies; by default ssrctl under the user's cache folder."""

    answer_extraction: Literal["strict", "lenient"] = "strict"
    """strict: only a marked answer counts (boxed, ####, <answer>, "the answer is"); lenient: else the last number
    outside of formulas."""

    critic_rollouts: AtLeastOne = 8
    """Continuations per step of the rollout critic (Math-Shepherd's K)."""

    critic_rollout_value: Literal["difference", "value"] = "difference"
    """Score of the rollout critic: the difference that a step makes to the share of right continuations, or the value
    of that share."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.critic == "llm" and not self.critic_model:
            raise UserError("the llm critic needs a model", "give --critic-model, such as openai/gpt-oss-120b")
        if (self.critic_input_price is None) != (self.critic_output_price is None):
            raise UserError("--critic-input-price and --critic-output-price belong together", "give both")


@dataclass(kw_only=True)
class CriticConfig(CriticOptions, ModelConfig, SamplingConfig, CommonConfig):
    """Score each reasoning step; a step that cannot be judged has no score, never 0.

    --model, --temperature and the other sampling settings are those of the rollout critic's policy; its
    --max-new-tokens covers the response's steps so far and the continuation together.

    Example: ssrctl critic steps.jsonl --critic llm --critic-model openai/gpt-oss-120b --budget-usd 5 -o scored.jsonl
    """

    input: str | None = positional(metavar="STEPS", default=None)
    """Segmented responses (jsonl), or - for stdin."""

    output: str = output("-")
    """File for the scored responses (jsonl), or - for stdout. Scores that the file already holds are kept, and only
    missing ones are requested."""

    ledger: Path | None = None
    """Log of every call of the llm critic (jsonl); by default next to the output."""

    calibrate: Path | None = None
    """Instead of scoring, measure the critic on labelled solutions (ProcessBench's fields, or segmented responses
    with the first wrong step as label) and print one table."""

    repeats: AtLeastOne = 1
    """With --calibrate: judge everything this many times, to measure the noise of the scores."""

    wrong_below: Annotated[float, Interval(gt=-100, le=100)] = 0.0
    """With --calibrate: the first step whose score is below this counts as the critic's first error."""

    limit: AtLeastOne | None = None
    """Use only the first N records."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibrate is not None and self.input is not None:
            raise UserError("--calibrate takes the place of STEPS", "give one of them")
        if self.calibrate is None and self.input is None:
            raise UserError("no input", "name the file that `ssrctl segment` wrote, or - for stdin")
        if self.ledger is not None and str(self.ledger) in (self.input, self.output):
            raise UserError(f"--ledger {self.ledger} is also the input or the output", "name another file")
        if self.calibrate is None and self.repeats > 1:
            raise UserError("--repeats measures the noise of scores", "use it with --calibrate")
