"""Settings of critics."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval

from ssrctl.configs.building import (
    AtLeastOne,
    Config,
    Finite,
    Fraction,
    NotNegative,
    Positive,
    ZeroOrMore,
    output,
    positional,
)
from ssrctl.configs.common import (
    CommonConfig,
    InputFormat,
    ModelConfig,
    ProcessOptions,
    PromptOptions,
    RecordFormat,
    SamplingConfig,
)
from ssrctl.configs.credentials import check_address, credential_in_json
from ssrctl.configs.engines import RolloutOptions
from ssrctl.configs.json_object import as_json_text, parse_json_object
from ssrctl.configs.own_code import CRITICS, check_name, names_code
from ssrctl.errors import UserError

# Parts of a request's body that settings of their own decide, and those that change the form of the reply.
_OWN_BODY: dict[str, str | None] = {
    "model": "--critic-model",
    "temperature": "--critic-temperature",
    "max_tokens": "--critic-max-tokens",
    "max_completion_tokens": "--critic-max-tokens",
    "reasoning_effort": "--critic-reasoning-effort",
    **dict.fromkeys(("messages", "response_format", "stream", "stream_options", "n", "tools", "functions"), None),
}
BUILT_IN = ("rule", "llm", "rollout", "prm")
_EFFORT = re.compile(r"[A-Za-z][\w-]{0,39}", re.ASCII)


@dataclass(kw_only=True)
class CriticOptions(Config):
    """Settings of the critic that scores steps."""

    panel = "Critic"

    critic: str = names_code("rule")
    """rule checks arithmetic and the origin of its numbers; llm asks a model through litellm; rollout lets the
    policy itself continue from each step and counts how often the answer is right; prm is a process reward model;
    module:Class is a critic of your own (docs/critics.md)."""

    critic_model: str | None = None
    """Model of the critic: for llm a litellm name, such as openai/gpt-oss-120b; for prm a name on the hub or a local
    folder."""

    critic_fallback: list[str] = field(default_factory=list)
    """litellm model to ask when the first one fails; may be given several times."""

    critic_api_base: str | None = None
    """Endpoint of the llm critic, for an OpenAI-compatible server of your own; it also serves fallbacks with the same
    provider prefix. For the prm critic, a vLLM pooling server (/pooling or /classify)."""

    critic_rubric: str = "steps"
    """Rubric of the llm critic: steps, correctness, progress, clarity, final, or a text file."""

    critic_per_step: bool = False
    """One call per step with the steps before it as context (the paper's way) instead of one per response."""

    critic_show_reference: bool = True
    """Show the llm critic the reference answer, where the record has one."""

    critic_temperature: NotNegative = 0.0
    """Sampling temperature of the llm critic."""

    critic_reasoning_effort: str | None = None
    """How much a reasoning model thinks: none, minimal, low, medium, high, or another word that the provider takes; by
    default the provider's own setting."""

    critic_thinking_tokens: ZeroOrMore = 2048
    """Tokens allowed in a reply for a reasoning model's thoughts about up to four steps, in addition to the scores; more
    steps get more in proportion, up to 16384 or this number. 0 for a model that does not think."""

    critic_max_tokens: AtLeastOne | None = None
    """Token limit of every reply, thoughts and scores together, instead of the limit that grows with the steps."""

    critic_extra_body: str | None = None
    """Further entries of each request's body as a json object, such as
    '{"chat_template_kwargs": {"enable_thinking": false}}'. It is stored with the results: no keys or passwords."""

    critic_max_concurrency: AtLeastOne = 8
    """Calls of the llm critic, or to the prm critic's server, in flight at once."""

    critic_requests_per_minute: Annotated[Positive, Finite] | None = None
    """Rate limit of the llm critic's calls, retries included; no limit by default."""

    critic_timeout: Positive = 60.0
    """Seconds until a call of the llm critic or to the prm critic's server counts as failed."""

    critic_retries: ZeroOrMore = 3
    """Retries after a transient failure."""

    critic_input_price: Annotated[NotNegative, Finite] | None = None
    """US dollars per million prompt tokens; by default litellm's table."""

    critic_output_price: Annotated[NotNegative, Finite] | None = None
    """US dollars per million reply tokens; by default litellm's table."""

    critic_budget_usd: Annotated[Positive, Finite] | None = None
    """Hard cap on the llm critic's cost in US dollars; when it is reached, the run stops and keeps the scores so far."""

    critic_cache: bool = True
    """Use the cache of the llm critic's replies and the prm critic's probabilities, in which each judgement is paid for only
    once."""

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

    critic_prm_style: Literal["auto", "trl", "qwen2.5-math", "math-shepherd", "openr", "rlhflow"] = "auto"
    """Convention of the prm critic's model: token classifiers of TRL, Qwen2.5-Math-PRM, or a causal LM that predicts
    + or - after each step (math-shepherd, openr, rlhflow). auto tells the first two by their architecture."""

    critic_prm_step_tag: str | None = None
    """Text after each step for the prm critic, such as the step_separator of a model's training; by default the
    style's own."""

    critic_prm_tokenizer: str | None = None
    """Tokenizer of the prm critic's server (hub name or local folder); by default --critic-model."""

    critic_prm_zero: Fraction = 0.5
    """Probability of a right step at which the prm critic's score is 0."""

    critic_batch_size: AtLeastOne = 8
    """Responses that the prm critic's model reads at once."""

    critic_dtype: Literal["auto", "stored", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the prm critic's model. auto: bfloat16 on CUDA, float32 on a CPU; stored: that of the checkpoint."""

    def __post_init__(self) -> None:
        self.critic_extra_body = as_json_text(self.critic_extra_body)
        super().__post_init__()
        check_name("--critic", self.critic, CRITICS, BUILT_IN)
        if self.critic == "llm" and not self.critic_model:
            raise UserError("the llm critic needs a model", "give --critic-model, such as openai/gpt-oss-120b")
        if self.critic == "prm" and not self.critic_model:
            raise UserError("the prm critic needs a model", "give --critic-model, such as Qwen/Qwen2.5-Math-PRM-7B")
        # Here, before any setting is stored or shown.
        if self.critic_api_base:
            _check_endpoint(self.critic_api_base, "vllm/" if self.critic == "prm" else self.critic_model)
        if self.critic_reasoning_effort is not None and not _EFFORT.fullmatch(self.critic_reasoning_effort):
            raise UserError(
                f"--critic-reasoning-effort must be one word, got {self.critic_reasoning_effort!r}",
                "give none, minimal, low, medium, high, or another word that the provider takes",
            )
        _check_body(self.critic_extra_body_object)
        if (self.critic_input_price is None) != (self.critic_output_price is None):
            raise UserError("--critic-input-price and --critic-output-price belong together", "give both")

    @property
    def critic_extra_body_object(self) -> dict[str, Any]:
        """The object of ``--critic-extra-body``, parsed; empty without one.

        Raises:
            UserError: not a json object.
        """
        return parse_json_object(self.critic_extra_body, "--critic-extra-body", '{"top_k": 20}')


def _check_body(body: dict[str, Any]) -> None:
    if taken := sorted(_OWN_BODY.keys() & body.keys()):
        own = _OWN_BODY[taken[0]]
        raise UserError(
            f"--critic-extra-body: '{taken[0]}' is set by the critic", f"use {own}" if own else "leave it out"
        )
    if (name := credential_in_json(body)) is not None:
        raise UserError(
            f"--critic-extra-body: '{name}' looks like a credential, and the body is stored with the results",
            "set the provider's environment variable for its key",
        )


def _check_endpoint(endpoint: str, model: str | None) -> None:
    provider, named, _ = (model or "").partition("/")
    variable = f"{provider.upper().replace('-', '_')}_API_KEY" if named else "OPENAI_API_KEY"
    check_address("--critic-api-base", endpoint, variable=variable, example="http://localhost:8000/v1")


@dataclass(kw_only=True)
class CriticConfig(
    CriticOptions, ModelConfig, PromptOptions, SamplingConfig, RolloutOptions, ProcessOptions, CommonConfig
):
    """Score each reasoning step; a step that cannot be judged has no score, never 0.

    --model, --temperature, --chat-template and the other settings of sampling and prompts are those of the rollout
    critic's policy; its --max-new-tokens covers the response's steps so far and the continuation together.

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
    """Instead of scoring, measure the critic on labelled solutions (ProcessBench, PRM800K and others, or segmented
    responses with the first wrong step as label) and print one table. With --output FILE the judgements are kept there, and those
    that it already holds are not made again."""

    repeats: AtLeastOne = 1
    """With --calibrate: judge everything this many times, to measure the noise of the scores."""

    wrong_below: Annotated[float, Interval(gt=-100, le=100)] = 0.0
    """With --calibrate: the first step whose score is below this counts as the critic's first error. With
    --output-format: a step whose score is below this is labelled wrong."""

    min_f1: Annotated[float, Interval(gt=0, le=1)] | None = None
    """With --calibrate: exit with code 4 if the first-error F1 is below this."""

    format: InputFormat = "auto"
    """Format of the input (docs/formats.md); auto tells it by the fields."""

    output_format: RecordFormat = "ssrctl"
    """Format of the output: stepwise, math-shepherd and others make training data for process reward models. The scored
    records are then kept in OUTPUT.records.jsonl, from which the same command continues."""

    limit: AtLeastOne | None = None
    """Use only the first N records."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rollout_engine != "transformers" and self.critic != "rollout":
            raise UserError(
                f"--rollout-engine {self.rollout_engine} is for --critic rollout, not {self.critic}", "leave it out"
            )
        if self.calibrate is not None and self.input is not None:
            raise UserError("--calibrate takes the place of STEPS", "give one of them")
        if self.calibrate is None and self.input is None:
            raise UserError("no input", "name the file that `ssrctl segment` wrote, or - for stdin")
        if self.calibrate is not None and self.output != "-" and _same_file(self.output, self.calibrate):
            raise UserError(f"--output {self.output} is the file of labelled solutions", "name another file")
        if self.ledger is not None and str(self.ledger) in (self.input, self.output):
            raise UserError(f"--ledger {self.ledger} is also the input or the output", "name another file")
        if self.calibrate is None and self.min_f1 is not None:
            raise UserError("--min-f1 checks a calibration", "use it with --calibrate")
        if self.calibrate is not None and self.output_format != "ssrctl":
            raise UserError("--calibrate keeps judgements as records", "leave out --output-format")
        if self.calibrate is None and self.repeats > 1:
            raise UserError("--repeats measures the noise of scores", "use it with --calibrate")
        if self.launches and self.critic != "rollout":
            raise UserError(
                f"the {self.critic} critic runs in one process",
                "leave out --num-processes and --accelerate-config; they divide the continuations of --critic rollout",
            )


def _same_file(one: str, other: Path) -> bool:
    return Path(one).resolve() == other.resolve()
