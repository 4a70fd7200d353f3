"""Settings of evaluation."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval

from ssrctl.configs.building import AtLeastOne, default_of, output, positional
from ssrctl.configs.common import (
    CommonConfig,
    DatasetConfig,
    InputFormat,
    ModelConfig,
    PageOptions,
    ProcessOptions,
    SamplingConfig,
)
from ssrctl.configs.engines import RolloutOptions
from ssrctl.configs.names import flag
from ssrctl.errors import UserError


@dataclass(kw_only=True)
class EvalConfig(ModelConfig, DatasetConfig, SamplingConfig, RolloutOptions, PageOptions, ProcessOptions, CommonConfig):
    """Measure sampled accuracy with a confidence interval, or compare two evaluations problem by problem.

    Example: ssrctl eval --checkpoint runs/first --dataset problems.jsonl --num-samples 8 --output-dir eval/first
    """

    has_recipes = True

    output_dir: Path = output(Path("eval"))
    """Folder for samples.jsonl and summary.json; samples already there are kept and not drawn again."""

    checkpoint: Path | None = None
    """A run directory, checkpoint folder, delta file, or delta on the hub to put on top of the model; a run knows its own
    model."""

    kl_to: str | None = None
    """Base model, on the hub or a folder: also measure KL(model, base) per token on the sampled responses. It is loaded next
    to the other one."""

    responses: str | None = None
    """Grade these responses (jsonl, or - for stdin) instead of sampling; no model is loaded. References are the
    records' own answers, else those of --dataset."""

    format: InputFormat = "auto"
    """With --responses: their format (docs/formats.md); auto tells it by the fields."""

    answer_extraction: Literal["strict", "lenient"] = "lenient"
    """strict: only a marked answer counts (boxed, ####, <answer>, "the answer is"); lenient: else the last number
    outside of formulas."""

    num_samples: AtLeastOne = 8
    """Samples per problem and run: n of avg@n, pass@k and maj@n."""

    runs: AtLeastOne = 1
    """Repeat the evaluation with fresh samples this often; the standard deviation between runs is reported apart from the
    interval over problems. With --responses, the ids of N runs end in /0, /1 and so on, the first run's first."""

    baseline: Path | None = None
    """Folder of an earlier evaluation of the same problems; the paired difference is reported."""

    compare: bool = False
    """Compare evaluations that were made before, each with the first, problem by problem: --compare A B [C ...]. Folders
    of eval, or files of graded responses; no model is loaded."""

    folders: list[Path] = positional(metavar="[A B ...]", default_factory=list)
    """With --compare: the evaluations, the first of which the others are compared with."""

    confidence: Annotated[float, Interval(gt=0.5, lt=1)] = 0.95
    """Level of the intervals."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compare != bool(self.folders) or len(self.folders) == 1:
            raise UserError(
                f"--compare needs two evaluations or more, got {len(self.folders)}"
                if self.compare
                else f"unexpected argument: {self.folders[0]}",
                "ssrctl eval --compare A B",
            )
        if self.compare and (self.responses is not None or self.baseline is not None):
            raise UserError("--compare takes evaluations as they are", "leave out --responses and --baseline")
        if self.responses is None and self.format != "auto":
            raise UserError("--format is that of --responses", "give both, or leave it out")
        if self.responses is not None:
            self._check_grading()

    @classmethod
    def idle_in_files(cls, given: Mapping[str, Any]) -> Collection[str]:
        """With ``--responses``, a recipe's settings of sampling."""
        return _sampling_fields() if given.get("responses") is not None else ()

    def _check_grading(self) -> None:
        """Refuse sampling settings beside given responses: nothing is sampled, so they would have no effect."""
        idle = _sampling_fields()
        changed = [
            spec.name for spec in fields(self) if spec.name in idle and getattr(self, spec.name) != default_of(spec)
        ]
        if changed:
            flags = ", ".join(flag(type(self), name) for name in changed)
            raise UserError(
                f"--responses grades what was sampled before: {flags} would have no effect",
                "leave out one or the other",
            )
        if self.responses == self.dataset == "-":
            raise UserError("--responses and --dataset cannot both come from stdin", "give one of them as a file")


def _sampling_fields() -> list[str]:
    """Return the settings of sampling, in their order."""
    parts = (ModelConfig, SamplingConfig, RolloutOptions, ProcessOptions)
    idle = {spec.name for base in parts for spec in fields(base)}
    idle |= {"num_samples", "checkpoint", "kl_to", "prompt_template", "limit"}
    idle |= {"system_prompt", "chat_template", "chat_template_kwargs"}
    return [spec.name for spec in fields(EvalConfig) if spec.name in idle]
