"""Settings of evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ssrctl.configs.building import output, require
from ssrctl.configs.common import CommonConfig, DatasetConfig, ModelConfig, SamplingConfig, check_limit, check_sampling


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
