"""What several stages share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ssrctl.configs.building import require

TINY = "tiny-reasoner"
TINY_DATASET = "tiny-arithmetic"


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


@dataclass(kw_only=True)
class EnvConfig:
    """Print versions and devices, to paste into a bug report."""

    json: bool = False
    """Print the result as one json object on stdout."""


def check_sampling(config: SamplingConfig) -> None:
    require(config.temperature > 0, "--temperature", "above 0", config.temperature)
    require(0 < config.top_p <= 1, "--top-p", "in (0, 1]", config.top_p)
    require(config.top_k >= 0, "--top-k", "0 or more", config.top_k)
    require(config.max_new_tokens >= 1, "--max-new-tokens", "at least 1", config.max_new_tokens)
    require(config.generation_batch_size >= 1, "--generation-batch-size", "at least 1", config.generation_batch_size)


def check_limit(config: DatasetConfig) -> None:
    require(config.limit is None or config.limit >= 1, "--limit", "at least 1", config.limit)
