"""Settings that several stages share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ssrctl.configs.building import AtLeastOne, Config, Positive, Share, ZeroOrMore

TINY = "tiny-reasoner"
TINY_DATASET = "tiny-arithmetic"


@dataclass(kw_only=True)
class JsonConfig(Config):
    """Settings of every command."""

    json: bool = False
    """Print the result as one json object on stdout."""


@dataclass(kw_only=True)
class CommonConfig(JsonConfig):
    """Settings of every stage."""

    dry_run: bool = False
    """Print the resolved plan and stop."""


@dataclass(kw_only=True)
class ModelConfig(Config):
    """Settings of every stage that loads a model."""

    panel = "Model"

    model: str = TINY
    """Model name on the hub or local folder (any AutoModelForCausalLM); the default is the bundled reasoner."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Precision to compute in; auto is the checkpoint's own."""

    device: str = "auto"
    """Device to run on: auto, cpu, cuda, cuda:1."""

    seed: int = 0
    """Random seed."""

    trust_remote_code: bool = False
    """Run python code that the model's folder contains. Only for models that you trust."""


@dataclass(kw_only=True)
class PairOptions(Config):
    """Settings of the commands that compare two checkpoints."""

    panel = "Tensors"

    include: list[str] = field(default_factory=list)
    """Only tensors whose names match this glob pattern; may be given several times."""

    exclude: list[str] = field(default_factory=list)
    """Leave out tensors whose names match this glob pattern; may be given several times."""

    strict: bool = False
    """Refuse checkpoints whose tensors differ in name or shape, instead of comparing what both have."""


@dataclass(kw_only=True)
class SamplingConfig(Config):
    """Settings of the sampling of responses."""

    panel = "Sampling"

    temperature: Positive = 1.0
    """Sampling temperature; log-probabilities are those of the scaled logits."""

    max_new_tokens: AtLeastOne = 256
    """Longest response, in tokens."""

    sampling_batch_size: AtLeastOne = 64
    """Responses sampled at once."""

    top_p: Share = 1.0
    """Nucleus sampling; below 1 the importance ratios are no longer exact."""

    top_k: ZeroOrMore = 0
    """Sample among the k likeliest tokens, 0 for all; above 0 the importance ratios are no longer exact."""


@dataclass(kw_only=True)
class DatasetConfig(Config):
    """Settings of the problems."""

    panel = "Data"

    dataset: str = TINY_DATASET
    """Problems: a json, jsonl, csv or parquet file, a datasets name on the hub, or tiny-arithmetic (bundled)."""

    dataset_config: str | None = None
    """Configuration name of a hub dataset."""

    dataset_split: str | None = None
    """Split to read; by default train for training and profiling, test (heldout) for evaluation."""

    limit: AtLeastOne | None = None
    """Use only the first N problems."""

    prompt_template: str = "auto"
    """Wording of a question: a name in profiles/prompts, a text file with {question}, or auto."""

    question_column: str | None = None
    """Column with the question; by default the first of question, problem, prompt, input, Question."""

    answer_column: str | None = None
    """Column with the reference answer; by default the first of answer, target, Answer."""
