"""Settings of evaluation."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from ssrctl.configs.building import output, require
from ssrctl.configs.common import CommonConfig, DatasetConfig, ModelConfig, SamplingConfig, check_limit, check_sampling
from ssrctl.errors import UserError


@dataclass(kw_only=True)
class EvalConfig(ModelConfig, SamplingConfig, DatasetConfig, CommonConfig):
    """Measure sampled accuracy with a confidence interval, or compare two evaluations problem by problem."""

    output_dir: Path = output(Path("eval"))
    """Folder for samples.jsonl and summary.json; samples already there are kept and not drawn again."""

    checkpoint: Path | None = None
    """A run directory, checkpoint folder or delta file to put on top of the model; a run knows its own model."""

    responses: str | None = None
    """Grade these responses (jsonl, or - for stdin) instead of sampling; no model is loaded. References are the
    records' own answers, else those of --dataset."""

    num_samples: int = 8
    """Samples per problem."""

    baseline: Path | None = None
    """Folder of an earlier evaluation of the same problems; the paired difference is reported."""

    confidence: float = 0.95
    """Level of the intervals."""

    def __post_init__(self) -> None:
        check_sampling(self)
        check_limit(self)
        require(self.num_samples >= 1, "--num-samples", "at least 1", self.num_samples)
        require(0.5 < self.confidence < 1, "--confidence", "between 0.5 and 1", self.confidence)
        if self.responses is not None:
            self._check_grading()

    def _check_grading(self) -> None:
        """Nothing is sampled when responses are given, so what says how has no effect and is refused."""
        idle = {spec.name for base in (ModelConfig, SamplingConfig) for spec in fields(base)}
        idle |= {"num_samples", "checkpoint", "prompt_template", "limit"}
        changed = [spec.name for spec in fields(self) if spec.name in idle and getattr(self, spec.name) != spec.default]
        if changed:
            flags = ", ".join("--" + name.replace("_", "-") for name in changed)
            raise UserError(
                f"--responses grades what was sampled before: {flags} would have no effect",
                "leave out one or the other",
            )
        if self.responses == self.dataset == "-":
            raise UserError("--responses and --dataset cannot both come from stdin", "give one of them as a file")
