"""Settings of diagnosis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ssrctl.configs.building import AtLeastOne, Config, Fraction, NotNegative, Share, output, positional
from ssrctl.configs.common import CommonConfig, PairOptions
from ssrctl.errors import UserError


@dataclass(kw_only=True)
class MeasureOptions(Config):
    """Settings of the measures."""

    panel = "Measures"

    measures: str | None = None
    """Measures to take, of sparsity, size, rank, spectrum, landing, overlap, time, gradients, function and prune,
    separated by commas; by default all that the paths allow, without the slow ones for several checkpoints and without
    function (KL to the base on prompts) and prune (KL of the largest changes), which load the models: default,function
    adds one."""

    layers: str | None = None
    """Only these layers: 0-3,7; tensors outside of the layers are left out then. Also for --intervene."""

    changed_by: Literal["bits", "atol", "bf16"] = "bits"
    """Criterion of a changed weight in overlaps, landing and time: any stored bit, more than --atol, or more than
    --bf16-rtol by the bf16-aware rule. Sparsity is reported by all three."""

    atol: NotNegative = 1e-5
    """Fixed tolerance below which a weight counts as unchanged (Mukherjee et al. 2025)."""

    bf16_rtol: NotNegative = 1e-3
    """Relative tolerance of the bf16-aware rule (eta of Zhu et al. 2025, definition 2.1)."""

    num_directions: AtLeastOne | None = None
    """Singular directions to compare; by default a tenth of a matrix's smaller side, at least 8, at most 128."""

    principal_rank: Share = 0.1
    """Rank of the reconstruction behind the principal mask, as a share of the smaller side."""

    mask_density: Fraction = 0.5
    """Share of each matrix in the principal and in the low-magnitude mask (Zhu et al. 2025, alpha)."""

    prompts: str | None = None
    """Texts for function and prune: a jsonl file with a text field each, or a name in profiles/prompts; by default
    general."""

    device: str = "cpu"
    """Device for the decompositions of rank, spectrum and landing: cpu, cuda, cuda:1, auto; it computes in float64."""

    picture: str | None = None
    """Matrix of which landing and overlap show a picture, and time the rows and columns, by its tensor's name; by default
    of the middle layer."""


@dataclass(kw_only=True)
class CheckOptions(Config):
    """Settings of the checks of single weights."""

    panel = "Checks"

    protect: Path | None = None
    """Superweight mask: report whether its weights moved."""

    assert_frozen: Path | None = None
    """Exit with code 4 if any weight of this mask changed."""

    assert_moved: str | None = None
    """Exit with code 4 unless every tensor whose name this glob pattern matches changed."""

    exit_code: bool = False
    """Exit as diff does: with code 0 if all weights are equal bit for bit, 1 if one differs or is on one side only, 2 or
    more after an error."""


@dataclass(kw_only=True)
class DiagnoseConfig(MeasureOptions, PairOptions, CheckOptions, CommonConfig):
    """Measure what updates did: to a checkpoint, between several, over a run, or between the steps of a run.

    Paths are model folders, safetensors files, deltas, checkpoint folders or run directories; TUNED may be a GGUF file
    that is not quantised. BASE TUNED measures one update, BASE TUNED TUNED ... several and their overlap, --pairs
    BASE:TUNED ... the same with a base for each, RUN a run over time against its own base, --jaccard RUN the steps within a
    run.

    Example: ssrctl diagnose base tuned --measures sparsity,rank
    """

    paths: list[Path] = positional(metavar="RUN | BASE TUNED", default_factory=list)
    """A run directory (with --jaccard; the newest under runs/ when omitted), or a base and tuned checkpoints."""

    output_dir: Path | None = output(None)
    """Folder for the page, its numbers as json and the tables as csv; by default the run itself, or diagnose/."""

    jaccard: bool = False
    """Overlap of the coordinates that the steps of each question selected."""

    series: bool = False
    """The tuned checkpoints are one run's, in the order of training."""

    pairs: bool = False
    """Each path is a pair BASE:TUNED: every checkpoint is compared with its own base (Zhu et al. 2025, figure 6)."""

    intervene: Literal["rotate", "permute-heads"] | None = None
    """Instead of measuring, write a model whose function is that of BASE but whose weights are rotated, or whose
    heads are permuted (Zhu et al. 2025, appendix D)."""

    seed: int = 0
    """Random seed of masks, sketches and interventions."""

    num_workers: AtLeastOne = 2
    """Tensors read and compared at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_paths()

    def wants(self, measure: str, *, default: bool) -> bool:
        """Return True if ``measure`` was chosen, or ``default`` if the user did not choose."""
        if self.measures is None:
            return default
        asked = self.measures.replace(" ", "").split(",")
        return measure in asked or (default and "default" in asked)

    def exit_status(self, code: int, result: Mapping[str, Any] | None) -> int:
        """Return the exit code; with ``--exit-code`` 1 says that weights differ, and failures that are 1 elsewhere are 2."""
        if not self.exit_code:
            return code
        if code == 0:
            return 0 if result is None or result.get("identical", True) else 1
        return max(code, 2)

    def _check_paths(self) -> None:
        count = len(self.paths)
        if self.jaccard and self.intervene is not None:
            raise UserError("--jaccard and --intervene exclude each other", "give one of them")
        if self.pairs and self.series:
            raise UserError("--pairs and --series exclude each other", "a series has one base: give one of them")
        if self.jaccard and count > 1:
            raise UserError(f"--jaccard takes one run directory, got {count} paths")
        if self.intervene is not None:
            if count != 1:
                raise UserError(f"--intervene takes one model, got {count} paths", "name the model to change")
            if self.output_dir is None:
                raise UserError("--intervene writes a model", "say where with -o FOLDER")
            return
        if not self.jaccard and count == 0:
            raise UserError(
                "nothing to measure", "name a run, or a base and a tuned checkpoint, or use --jaccard for a run"
            )
        if self.series and count < 3:
            raise UserError(
                f"--series needs a base and at least two checkpoints, got {count} paths", "name them in order"
            )
