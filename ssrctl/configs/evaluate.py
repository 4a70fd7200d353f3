"""Settings of evaluation and diagnosis."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ssrctl.configs.building import output, positional, require
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
    """Grade these responses (jsonl, or - for stdin) instead of sampling; no model is loaded."""

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
        require(self.atol >= 0, "--atol", "0 or more", self.atol)
        if self.jaccard and len(self.paths) > 1:
            raise UserError(f"--jaccard takes one run directory, got {len(self.paths)} paths")
        if not self.jaccard and len(self.paths) != 2:
            raise UserError(
                f"expected BASE and TUNED, got {len(self.paths)} paths",
                "name two checkpoints, or use --jaccard for a run",
            )
