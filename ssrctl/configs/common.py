"""Settings that several stages share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ssrctl.configs.building import AtLeastOne, Config, Positive, Share, ZeroOrMore, allows_code
from ssrctl.configs.json_object import as_json_text, parse_json_object
from ssrctl.errors import UserError

RecordFormat = Literal["ssrctl", "processbench", "prm800k", "prmbench", "stepwise", "math-shepherd", "lm-eval", "verl"]
InputFormat = Literal["auto", RecordFormat, "lighteval", "inspect"]
TINY = "tiny-reasoner"
TINY_DATASET = "tiny-arithmetic"


def is_bundled(dataset: str) -> bool:
    """Return True for the bundled problems and their variants (``tiny-arithmetic:longer``)."""
    return dataset.partition(":")[0] == TINY_DATASET


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
class PageOptions(Config):
    """Settings of the commands that end with a page."""

    panel = "Logging"

    report: bool = True
    """Write report.html at the end, as `ssrctl report` does."""


@dataclass(kw_only=True)
class HubOptions(CommonConfig):
    """Settings of the commands that can upload what they write."""

    panel = "Hub"

    push_to_hub: str | None = None
    """Upload the result to this repository of the Hugging Face hub, OWNER/NAME, as `ssrctl push` does."""

    hub_private_repo: bool = False
    """Make a new repository private."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hub_private_repo and self.push_to_hub is None:
            raise UserError("--hub-private-repo is for --push-to-hub", "name the repository: --push-to-hub OWNER/NAME")


@dataclass(kw_only=True)
class ModelConfig(Config):
    """Settings of every stage that loads a model."""

    panel = "Model"

    model: str = TINY
    """Model name on the hub or local folder (any AutoModelForCausalLM); the default is the bundled reasoner."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    dtype: Literal["auto", "stored", "float32", "bfloat16", "float16"] = "auto"
    """Precision to compute in. auto: bfloat16 on CUDA, float32 on a CPU; stored: that of the checkpoint."""

    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = "auto"
    """Attention of transformers; auto is sdpa where the model has it, which uses flash kernels on CUDA."""

    device: str = "auto"
    """Device to run on: auto, cpu, cuda, cuda:1."""

    seed: int = 0
    """Random seed."""

    trust_remote_code: bool = allows_code(False)
    """Run python code that the model's folder contains. Only for models that you trust."""


@dataclass(kw_only=True)
class GradientOptions(Config):
    """Settings of the commands that compute gradients."""

    panel = "Model"

    repeatable_sums: bool = True
    """On CUDA, add up gradients in a fixed order, so that two runs select the same coordinates. Without it some kernels are
    faster, and a model may have operations that add in no fixed order."""


@dataclass(kw_only=True)
class ProcessOptions(Config):
    """Settings of the commands that divide their work among processes."""

    panel = "Processes"
    several_processes = True

    num_processes: AtLeastOne | None = None
    """Start this many processes on this machine, as `accelerate launch` would: one per GPU, or on the CPU. Not needed
    under a launcher."""

    accelerate_config: Path | None = None
    """File of `accelerate config` to launch with."""

    @property
    def launches(self) -> bool:
        """True if the command is to be started again in several processes."""
        return (self.num_processes or 1) > 1 or self.accelerate_config is not None


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

    stop: list[str] = field(default_factory=list)
    """Text that ends a response, kept in it as its last token gives it; give the flag again for several."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(self.stop):
            raise UserError("--stop needs a text that is not empty", "leave it out to stop at end tokens only")


@dataclass(kw_only=True)
class PromptOptions(Config):
    """Settings of the way from a question to its prompt."""

    panel = "Prompt"

    prompt_template: str = "auto"
    """Wording of a question: a name in profiles/prompts, a text file with {question}, or auto, which leaves chat
    messages as they are."""

    system_prompt: str | None = None
    """System message of the chat template, for rows that have none of their own."""

    chat_template: Path | None = None
    """Jinja file to use instead of the tokenizer's chat template."""

    chat_template_kwargs: str | None = None
    """Variables for the chat template as a json object, such as '{"enable_thinking": false}'."""

    def __post_init__(self) -> None:
        self.chat_template_kwargs = as_json_text(self.chat_template_kwargs)
        super().__post_init__()
        self.chat_template_variables  # noqa: B018 (raises for what is not a json object)

    @property
    def chat_template_variables(self) -> dict[str, object]:
        """The variables of ``--chat-template-kwargs``, parsed.

        Raises:
            UserError: not a json object.
        """
        return parse_json_object(self.chat_template_kwargs, "--chat-template-kwargs", '{"enable_thinking": false}')


@dataclass(kw_only=True)
class DatasetConfig(PromptOptions):
    """Settings of the problems."""

    panel = "Data"

    dataset: str = TINY_DATASET
    """Problems: a jsonl, json, csv, tsv (or .gz of these) or parquet file, a datasets name on the hub, or tiny-arithmetic
    (bundled), with :longer, :numbers or :order for problems out of its distribution, :probes for equal parts of all."""

    dataset_config: str | None = None
    """Configuration name of a hub dataset."""

    dataset_split: str | None = None
    """Split to read; by default train for training and profiling, test (heldout) for evaluation."""

    limit: AtLeastOne | None = None
    """Use only the first N problems."""

    question_column: str | None = None
    """Column with the question or the chat messages, a.b for a field in it; by default question, problem, prompt, input
    or messages."""

    answer_column: str | None = None
    """Column with the reference answer, a.b for a field in it; by default answer, final_answer, ground_truth, target,
    reward_model.ground_truth, solution or extra_info.answer."""
