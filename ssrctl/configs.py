"""One dataclass per stage: every setting, its default, and the doc line that `--help` shows.

A config is built in one place, ``build_config``: defaults, then the yaml file of ``--config``, then flags.
Types and choices are checked there, ranges in ``__post_init__``; an unknown key is an error.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from ssrctl.errors import UserError

Config = TypeVar("Config")

TINY = "tiny-reasoner"
TINY_DATASET = "tiny-arithmetic"


def build_config(kind: type[Config], given: Mapping[str, Any], config_path: Path | None = None) -> Config:
    """Make a config of ``kind`` from flags and, below them, a yaml file.

    Args:
        kind: a dataclass of this module.
        given: values that were given as flags, by field name.
        config_path: a yaml file with a mapping of field names (dashes or underscores) to values.

    Raises:
        UserError: the file is missing or not a mapping, a key is unknown, a value has the wrong type or
            range, or a needed value is absent.
    """
    values: dict[str, Any] = {}
    names = [spec.name for spec in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if config_path is not None:
        for key, value in _read_yaml(config_path).items():
            name = str(key).replace("-", "_")
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                raise UserError(
                    f"{config_path}: unknown key '{key}'",
                    f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(names)}",
                )
            values[name] = value
    values |= given
    return _validated(kind, values)


def _validated(kind: type[Config], values: Mapping[str, Any]) -> Config:
    import pydantic

    # json-mode strictness would refuse paths given as text, so only types are coerced, never guessed.
    try:
        return pydantic.TypeAdapter(kind).validate_python(dict(values))
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else kind.__name__
        if first["type"] == "missing" or (name in values and values[name] is None):
            raise UserError(f"'{name}' is needed", f"give {_flag(kind, name)}") from None
        raise UserError(f"{_flag(kind, name)}: {first['msg']}, got {first.get('input')!r}") from None


def _flag(kind: type, name: str) -> str:
    for spec in dataclasses.fields(kind):
        if spec.name == name and spec.metadata.get("argument"):
            return spec.metadata.get("metavar") or name.upper()
    return "--" + name.replace("_", "-")


def _read_yaml(path: Path) -> dict[Any, Any]:
    import yaml

    from ssrctl.io.files import existing_file

    try:
        loaded = yaml.safe_load(existing_file(path, "config file").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid yaml: {' '.join(str(error).split())}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: expected a mapping of settings, found {type(loaded).__name__}")
    return loaded


def _require(condition: bool, flag: str, rule: str, value: Any) -> None:
    if not condition:
        raise UserError(f"{flag} must be {rule}, got {value}")


def positional(*, metavar: str | None = None, default: Any = dataclasses.MISSING) -> Any:
    """A field that is a positional argument on the command line."""
    return field(default=default, metadata={"argument": True, "metavar": metavar})


def output(default: Any = dataclasses.MISSING) -> Any:
    """The `-o` field."""
    return field(default=default, metadata={"flags": ("-o",)})


# --------------------------------------------------------------------------------------------------
# what several stages share


@dataclass(kw_only=True)
class CommonConfig:
    """Settings of every stage."""

    json: bool = False
    """Print the result as one json object on stdout."""

    dry_run: bool = False
    """Print the resolved plan and stop."""


@dataclass(kw_only=True)
class ModelConfig:
    """Settings of every stage that loads a model."""

    model: str = TINY
    """Model name on the hub or local folder (any AutoModelForCausalLM); the default is the bundled reasoner."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Precision to compute in; auto is the checkpoint's own."""

    device: str = "auto"
    """Where to run: auto, cpu, cuda, cuda:1."""

    trust_remote_code: bool = False
    """Run python code that the model's folder contains. Only for models that you trust."""

    seed: int = 0
    """Everything random derives from it."""


@dataclass(kw_only=True)
class SamplingConfig:
    """How responses are sampled."""

    temperature: float = 1.0
    """Sampling temperature; log-probabilities are those of the scaled logits."""

    top_p: float = 1.0
    """Nucleus sampling; below 1 the importance ratios are no longer exact."""

    top_k: int = 0
    """Sample among the k likeliest tokens, 0 for all; above 0 the importance ratios are no longer exact."""

    max_new_tokens: int = 256
    """Longest response, in tokens."""

    generation_batch_size: int = 64
    """Responses generated at once."""


@dataclass(kw_only=True)
class DatasetConfig:
    """Which problems."""

    dataset: str = TINY_DATASET
    """Problems: a json, jsonl, csv or parquet file, a datasets name on the hub, or tiny-arithmetic (bundled)."""

    dataset_config: str | None = None
    """Configuration name of a hub dataset."""

    dataset_split: str | None = None
    """Split to read; by default train for training and profiling, test (heldout) for evaluation."""

    question_column: str | None = None
    """Column with the question; by default the first of question, problem, prompt, input, Question."""

    answer_column: str | None = None
    """Column with the reference answer; by default the first of answer, target, Answer."""

    prompt_template: str = "auto"
    """How a question is worded: a name in profiles/prompts, a text file with {question}, or auto."""

    limit: int | None = None
    """Use only the first so many problems."""


def _check_sampling(config: SamplingConfig) -> None:
    _require(config.temperature > 0, "--temperature", "above 0", config.temperature)
    _require(0 < config.top_p <= 1, "--top-p", "in (0, 1]", config.top_p)
    _require(config.top_k >= 0, "--top-k", "0 or more", config.top_k)
    _require(config.max_new_tokens >= 1, "--max-new-tokens", "at least 1", config.max_new_tokens)
    _require(config.generation_batch_size >= 1, "--generation-batch-size", "at least 1", config.generation_batch_size)


def _check_limit(config: DatasetConfig) -> None:
    _require(config.limit is None or config.limit >= 1, "--limit", "at least 1", config.limit)


# --------------------------------------------------------------------------------------------------
# one per stage


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
            _require(0 < self.fraction < 1, "--fraction", "between 0 and 1", self.fraction)
        if self.fraction is not None and self.minimal:
            raise UserError("--fraction and --minimal exclude each other", "give one of them")
        _require(0 < self.candidate_fraction < 1, "--candidate-fraction", "between 0 and 1", self.candidate_fraction)
        _require(self.num_subsets >= 1, "--num-subsets", "at least 1", self.num_subsets)
        _require(self.kl_threshold > 0, "--kl-threshold", "above 0", self.kl_threshold)
        _require(self.max_prompt_tokens >= 2, "--max-prompt-tokens", "at least 2", self.max_prompt_tokens)
        _require(self.spike_threshold > 1, "--spike-threshold", "above 1", self.spike_threshold)


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
        _check_sampling(self)
        _check_limit(self)
        _require(self.num_problems >= 1, "--num-problems", "at least 1", self.num_problems)
        _require(self.num_generations >= 2, "--num-generations", "at least 2", self.num_generations)
        _require(0 < self.claim_fraction < 1, "--claim-fraction", "between 0 and 1", self.claim_fraction)
        _require(self.max_steps >= 1, "--max-steps", "at least 1", self.max_steps)


@dataclass(kw_only=True)
class SegmentConfig(CommonConfig):
    """Split responses into reasoning steps."""

    input: str = positional(metavar="RESPONSES")
    """Responses (jsonl), or - for stdin."""

    output: str = output("-")
    """Where to write the responses with their steps (jsonl), or - for stdout."""

    max_steps: int = 64
    """Most steps per response; the shortest neighbours are merged until so many remain."""

    min_chars: int = 2
    """A step shorter than this many characters is merged into its neighbour."""

    def __post_init__(self) -> None:
        _require(self.max_steps >= 1, "--max-steps", "at least 1", self.max_steps)
        _require(self.min_chars >= 1, "--min-chars", "at least 1", self.min_chars)


@dataclass(kw_only=True)
class CriticOptions:
    """Who scores steps, and how."""

    critic: Literal["rule", "llm"] = "rule"
    """rule checks arithmetic and consistency; llm asks a model through litellm."""

    critic_model: str | None = None
    """litellm model name of the llm critic, such as openai/gpt-oss-120b."""

    critic_api_base: str | None = None
    """Endpoint of the llm critic, for an OpenAI-compatible server of your own."""

    rubric: str = "steps"
    """Rubric of the llm critic: a name in profiles/rubrics or a text file."""

    max_concurrency: int = 8
    """Calls of the llm critic in flight at once."""

    critic_timeout: float = 60.0
    """Seconds after which a call of the llm critic counts as failed."""


@dataclass(kw_only=True)
class CriticConfig(CriticOptions, CommonConfig):
    """Score each reasoning step; what cannot be judged is missing, never 0."""

    input: str = positional(metavar="STEPS")
    """Segmented responses (jsonl), or - for stdin."""

    output: str = output("-")
    """Where to write the scored responses (jsonl), or - for stdout."""

    def __post_init__(self) -> None:
        _check_critic(self)


def _check_critic(config: CriticOptions) -> None:
    if config.critic == "llm" and not config.critic_model:
        raise UserError("the llm critic needs a model", "give --critic-model, such as openai/gpt-oss-120b")
    _require(config.max_concurrency >= 1, "--max-concurrency", "at least 1", config.max_concurrency)
    _require(config.critic_timeout > 0, "--critic-timeout", "above 0", config.critic_timeout)


@dataclass(kw_only=True)
class TrainConfig(ModelConfig, SamplingConfig, DatasetConfig, CriticOptions, CommonConfig):
    """Train with step-wise reinforcement learning and masked updates (SSR section 2.3)."""

    output_dir: Path | None = output(None)
    """Run directory; by default a new one under runs/."""

    optimizer: Literal["kronos", "adamw"] | None = None
    """kronos: per-step, disjoint, sparse updates; adamw: dense updates in the same loop, or with --mask updates
    and state for the masked weights alone. By default kronos, with --mask adamw."""

    update_rule: Literal["sgd", "adam", "rms"] = "sgd"
    """Kronos: what the kept gradient becomes. sgd: itself; adam: moments for the weights that were ever selected;
    rms: each step's, divided by its root mean square."""

    learning_rate: float | None = None
    """Step size; by default 3e-2 for kronos with sgd, 1e-5 with rms, and 1e-4 for everything else. It does not
    carry over between optimizers, rules or models."""

    find_lr: bool = False
    """Instead of training, try a few steps at six learning rates around --learning-rate, from the same weights and on
    the same questions, and print what each did."""

    find_lr_steps: int = 8
    """Training steps at each rate of --find-lr."""

    adam_beta1: float = 0.9
    """Decay of the first moment."""

    adam_beta2: float | None = None
    """Decay of the second moment; by default 0.95 for kronos, whose coordinates are selected now and then, and
    0.999 for adamw."""

    adam_epsilon: float = 1e-8
    """Added to the denominator of adam, adamw and rms."""

    lr_scheduler_type: Literal["constant", "linear", "cosine", "constant_with_warmup"] = "constant"
    """Learning-rate schedule over --max-steps."""

    warmup_steps: int = 0
    """Steps of linear warm-up, for the schedules that have one."""

    weight_decay: float = 0.0
    """Decoupled weight decay of adamw."""

    max_grad_norm: float = 1.0
    """Clip on the gradient's norm; for kronos that of the kept sparse gradient. 0 is off."""

    max_steps: int = 120
    """Training steps (batches of questions)."""

    questions_per_step: int = 4
    """Questions in one training step."""

    num_generations: int = 8
    """Responses per question: the group."""

    num_iterations: int = 1
    """Updates on each batch of responses; above 1 the clipped importance ratio matters."""

    credit: Literal["step", "final", "cot"] = "step"
    """step: each step its advantage (SSR); final, cot: one advantage per response from the final answer or
    from the mean step reward (the GSPO baselines)."""

    advantage: Literal["paper", "group", "hybrid"] = "group"
    """paper is eq. 9, whose advantages sum to zero within every response, good or bad; group is eq. 6 alone;
    hybrid adds the response's standing in its group to eq. 9."""

    importance_level: Literal["token", "step", "sequence"] = "sequence"
    """Level of the importance ratio; sequence is the length-normalised ratio of GSPO."""

    clip_epsilon: float = 0.2
    """The importance ratio is clipped to 1 - epsilon, 1 + epsilon."""

    protect: Path | None = None
    """Superweight mask whose coordinates never change."""

    mask: Path | None = None
    """Train only the coordinates of this mask; budgets are shares of these then."""

    ignore_fingerprint: bool = False
    """Use a mask that was made for other weights of the same shapes."""

    budget_profile: str = "auto"
    """Budget profile: a file from `ssrctl profile-budget`, a name in profiles/budgets, flat for equal
    budgets, or auto."""

    budget: float = 0.05
    """Share B of the unprotected coordinates that one question may claim."""

    max_step_budget: float = 0.01
    """Largest share that one step may claim, k_max."""

    fuse_tol: float = 0.0
    """Neighbouring steps whose advantages over the group differ by less are updated as one; 0 is off."""

    max_units: int | None = None
    """Join the most similar neighbouring steps until a question has at most so many updates, which bounds the cost
    of long responses."""

    scope: Literal["global", "tensor"] = "global"
    """global: one threshold over all weights; tensor: the same share of each tensor, whose gradient is dropped
    at once."""

    allocation: Literal["disjoint", "overlap", "pooled", "shuffled"] = "disjoint"
    """disjoint: no two steps of a question update the same weight. Controls: overlap, every step its own largest;
    pooled, the largest of all steps' gradients together; shuffled, each step gets the set of the step before."""

    selection: Literal["exact", "block"] = "exact"
    """exact: the largest gradients; block: the paper's tile-wise approximation, whose recall is logged."""

    reuse_factor: float | None = None
    """A step may take a claimed weight whose gradient is so many times the smallest free one's; off by default."""

    master_weights: bool = True
    """With bfloat16 or float16 weights, keep the exact float32 value of those that kronos (or adamw with
    --mask) updates."""

    step_gradient: Literal["auto", "kept", "truncated", "chunked", "local"] = "auto"
    """How each step's gradient is computed. kept, truncated and chunked are exact and differ in cost; auto takes the
    cheapest (with --scope tensor not chunked, which adds up whole gradients); local ignores what a step does to
    earlier steps' keys and values."""

    max_segments: int = 64
    """Most reasoning steps per response; the shortest neighbours are merged."""

    save_steps: int = 50
    """Write a checkpoint every so many steps, and at the end."""

    save_total_limit: int | None = None
    """Keep only the newest so many checkpoints."""

    resume_from_checkpoint: str | None = None
    """A checkpoint folder, or latest to continue the run in --output-dir."""

    logging_steps: int = 10
    """When the output is no terminal, print a line every so many steps."""

    log_masks_every: int = 10
    """Store every step's selected coordinates each so many training steps; 0 is off."""

    log_gradient_cosine: bool = False
    """With the masks, store the cosine between the per-step gradients before masking (costs memory: one
    dense gradient per step)."""

    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Also send metrics to this tracker."""

    def __post_init__(self) -> None:
        _check_sampling(self)
        _check_limit(self)
        _check_critic(self)
        for name in (
            "max_steps",
            "questions_per_step",
            "num_iterations",
            "save_steps",
            "logging_steps",
            "max_segments",
            "find_lr_steps",
        ):
            _require(getattr(self, name) >= 1, "--" + name.replace("_", "-"), "at least 1", getattr(self, name))
        _require(self.num_generations >= 2, "--num-generations", "at least 2", self.num_generations)
        _require(self.learning_rate is None or self.learning_rate > 0, "--learning-rate", "above 0", self.learning_rate)
        _require(self.warmup_steps >= 0, "--warmup-steps", "0 or more", self.warmup_steps)
        _require(self.weight_decay >= 0, "--weight-decay", "0 or more", self.weight_decay)
        _require(self.max_grad_norm >= 0, "--max-grad-norm", "0 or more", self.max_grad_norm)
        _require(0 < self.clip_epsilon < 1, "--clip-epsilon", "between 0 and 1", self.clip_epsilon)
        _require(0 < self.budget <= 1, "--budget", "in (0, 1]", self.budget)
        _require(0 < self.max_step_budget <= 1, "--max-step-budget", "in (0, 1]", self.max_step_budget)
        _require(self.fuse_tol >= 0, "--fuse-tol", "0 or more", self.fuse_tol)
        _require(self.log_masks_every >= 0, "--log-masks-every", "0 or more", self.log_masks_every)
        _require(
            self.save_total_limit is None or self.save_total_limit >= 1,
            "--save-total-limit",
            "at least 1",
            self.save_total_limit,
        )
        _require(0 <= self.adam_beta1 < 1, "--adam-beta1", "in [0, 1)", self.adam_beta1)
        _require(self.adam_beta2 is None or 0 <= self.adam_beta2 < 1, "--adam-beta2", "in [0, 1)", self.adam_beta2)
        _require(self.adam_epsilon > 0, "--adam-epsilon", "above 0", self.adam_epsilon)
        _require(self.max_units is None or self.max_units >= 1, "--max-units", "at least 1", self.max_units)
        _require(self.reuse_factor is None or self.reuse_factor >= 1, "--reuse-factor", "at least 1", self.reuse_factor)
        if self.optimizer is None:
            self.optimizer = "kronos" if self.mask is None else "adamw"
        if self.find_lr and self.resume_from_checkpoint is not None:
            raise UserError("--find-lr starts from the model's weights", "leave out --resume-from-checkpoint")
        self._check_optimizer()

    def _check_optimizer(self) -> None:
        """Settings that the optimizer would ignore are errors."""
        if self.optimizer == "kronos":
            if self.weight_decay > 0:
                raise UserError(
                    "--weight-decay has no meaning for kronos, whose updates are sparse", "use --optimizer adamw"
                )
            if self.scope == "tensor" and self.allocation == "shuffled":
                raise UserError(
                    "--allocation shuffled needs whole gradients, which --scope tensor drops at once",
                    "use --scope global",
                )
            if self.scope == "tensor" and self.log_gradient_cosine:
                raise UserError(
                    "--log-gradient-cosine needs whole gradients, which --scope tensor drops at once",
                    "use --scope global",
                )
            if self.reuse_factor is not None and self.allocation != "disjoint":
                raise UserError(
                    f"--reuse-factor loosens the disjoint allocation; it has no meaning with {self.allocation}"
                )
            return
        defaults = {spec.name: spec.default for spec in dataclasses.fields(self)}
        kronos_only = ("update_rule", "scope", "allocation", "selection", "reuse_factor", "max_units")
        if odd := [name for name in kronos_only if getattr(self, name) != defaults[name]]:
            flags = ", ".join("--" + name.replace("_", "-") for name in odd)
            raise UserError(f"{flags} has no meaning for adamw", "use --optimizer kronos")

    @property
    def resolved_learning_rate(self) -> float:
        """The learning rate in force."""
        if self.learning_rate is not None:
            return self.learning_rate
        return {"sgd": 3e-2, "rms": 1e-5, "adam": 1e-4}[self.update_rule if self.optimizer == "kronos" else "adam"]

    @property
    def step_gradient_method(self) -> str:
        """The way in force: with scope tensor, auto takes one that needs no whole gradient."""
        return "piecemeal" if self.step_gradient == "auto" and self.scope == "tensor" else self.step_gradient

    @property
    def betas(self) -> tuple[float, float]:
        """Decays of the two moments in force."""
        second = self.adam_beta2
        if second is None:
            second = 0.95 if self.optimizer == "kronos" else 0.999
        return self.adam_beta1, second


@dataclass(kw_only=True)
class EvalConfig(ModelConfig, SamplingConfig, DatasetConfig, CommonConfig):
    """Measure sampled accuracy with a confidence interval, or compare two evaluations problem by problem."""

    output_dir: Path = output(Path("eval"))
    """Folder for samples.jsonl and summary.json; samples already there are kept and not drawn again."""

    checkpoint: Path | None = None
    """A run directory, checkpoint folder or delta file to put on top of the model; a run knows its own model."""

    num_samples: int = 8
    """Samples per problem."""

    baseline: Path | None = None
    """Folder of an earlier evaluation of the same problems; the paired difference is reported."""

    confidence: float = 0.95
    """Level of the intervals."""

    def __post_init__(self) -> None:
        _check_sampling(self)
        _check_limit(self)
        _require(self.num_samples >= 1, "--num-samples", "at least 1", self.num_samples)
        _require(0.5 < self.confidence < 1, "--confidence", "between 0.5 and 1", self.confidence)


@dataclass(kw_only=True)
class DiagnoseConfig(CommonConfig):
    """Measure what updates did: between two checkpoints, or between the steps of a run."""

    paths: list[Path] = positional(metavar="[RUN | BASE TUNED]", default=None)
    """A run directory (with --jaccard; the newest under runs/ when omitted), or a base and a tuned checkpoint."""

    jaccard: bool = False
    """Overlap of the coordinates that the steps of each question selected."""

    output_dir: Path | None = output(None)
    """Folder for report.json and report.html; by default the run itself, or diagnose/ for two checkpoints."""

    atol: float = 1e-5
    """Fixed tolerance below which a weight counts as unchanged (Mukherjee et al. 2025)."""

    def __post_init__(self) -> None:
        self.paths = list(self.paths or [])
        _require(self.atol >= 0, "--atol", "0 or more", self.atol)
        if self.jaccard and len(self.paths) > 1:
            raise UserError(f"--jaccard takes one run directory, got {len(self.paths)} paths")
        if not self.jaccard and len(self.paths) != 2:
            raise UserError(
                f"expected BASE and TUNED, got {len(self.paths)} paths",
                "name two checkpoints, or use --jaccard for a run",
            )


@dataclass(kw_only=True)
class DeltaDiffConfig(CommonConfig):
    """Write what turns a base into a tuned checkpoint as a delta: the coordinates that differ bit for bit.

    Checkpoints are model folders (one file or shards) or safetensors files. Where the dtypes differ, the tuned
    one's counts, provided that the base's values have an exact form in it.
    """

    base: Path = positional(metavar="BASE")
    """The checkpoint that the delta will apply to: a model folder, a safetensors file, or tiny-reasoner."""

    tuned: Path = positional(metavar="TUNED")
    """The checkpoint that applying it will give again: a model folder or a safetensors file."""

    output: Path = output()
    """Delta to write (safetensors)."""


@dataclass(kw_only=True)
class DeltaApplyConfig(CommonConfig):
    """Put a delta into its base and write the result as a model folder, with config and tokenizer.

    The folder has the base's layout, one file or the same shards. Values are written bit for bit, in the delta's
    dtype: a run in float32 on a bfloat16 base gives a float32 folder, and its config.json says so.
    """

    base: Path = positional(metavar="BASE")
    """What the delta was made from: a model folder, a safetensors file, or tiny-reasoner."""

    delta: Path = positional(metavar="DELTA")
    """A delta file, a checkpoint folder, or a run directory, of which the newest checkpoint is taken."""

    output: Path = output()
    """Model folder to write; must not exist, or be empty."""

    ignore_fingerprint: bool = False
    """Apply a delta that was made from other weights of the same shapes."""


@dataclass(kw_only=True)
class DeltaInfoConfig:
    """Show what a delta holds: its base, its size, and how many entries each tensor and layer has."""

    delta: Path = positional(metavar="DELTA")
    """A delta file, a checkpoint folder, or a run directory, of which the newest checkpoint is taken."""

    json: bool = False
    """Print the result as one json object on stdout."""
