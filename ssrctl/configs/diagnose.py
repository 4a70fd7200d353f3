"""Settings of diagnosis and of the mask commands."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ssrctl.configs.building import output, positional, require
from ssrctl.configs.common import CommonConfig
from ssrctl.configs.layers import layer_ranges
from ssrctl.errors import UserError

MEASURES = ("sparsity", "size", "rank", "spectrum", "landing", "overlap", "time", "gradients")


@dataclass(kw_only=True)
class DiagnoseConfig(CommonConfig):
    """Measure what updates did: to a checkpoint, between several, over a run, or between the steps of a run.

    Paths are model folders, safetensors files, deltas, checkpoint folders or run directories. BASE TUNED measures one
    update, BASE TUNED TUNED ... several and their overlap, RUN a run over time against its own base, --jaccard RUN
    the steps within a run.
    """

    paths: list[Path] = positional(metavar="[RUN | BASE TUNED...]", default=None)
    """A run directory (with --jaccard; the newest under runs/ when omitted), or a base and tuned checkpoints."""

    jaccard: bool = False
    """Overlap of the coordinates that the steps of each question selected."""

    series: bool = False
    """The tuned checkpoints are one run's, in the order of training."""

    measures: str | None = None
    """What to measure, of sparsity, size, rank, spectrum, landing, overlap, time and gradients, separated by commas; by
    default everything that the paths allow and that is not slow for several checkpoints."""

    output_dir: Path | None = output(None)
    """Folder for report.json, report.html and the tables as csv; by default the run itself, or diagnose/."""

    atol: float = 1e-5
    """Fixed tolerance below which a weight counts as unchanged (Mukherjee et al. 2025)."""

    eta: float = 1e-3
    """Relative tolerance of the bf16-aware rule (Zhu et al. 2025, definition 2.1)."""

    rule: Literal["bits", "atol", "bf16"] = "bits"
    """What counts as changed in overlaps, landing and time: any stored bit, more than --atol, or more than
    --eta by the bf16-aware rule. Sparsity is reported by all three."""

    k: int | None = None
    """Singular directions to compare; by default a tenth of a matrix's smaller side, at least 8, at most 128."""

    principal_rank: float = 0.1
    """Rank of the reconstruction behind the principal mask, as a share of the smaller side."""

    mask_density: float = 0.5
    """Share of each matrix in the principal and in the low-magnitude mask (Zhu et al. 2025, alpha)."""

    layers: str | None = None
    """Only these layers: 0-3,7; tensors outside of the layers are left out then. For --intervene, where."""

    protect: Path | None = None
    """Superweight mask: report whether its weights moved."""

    assert_frozen: Path | None = None
    """Exit with code 4 if any weight of this mask changed."""

    assert_moved: str | None = None
    """Exit with code 4 unless every tensor whose name this glob pattern matches changed."""

    intervene: Literal["rotate", "permute-heads"] | None = None
    """Instead of measuring, write a model whose function is that of BASE but whose weights are rotated, or whose
    heads are permuted (Zhu et al. 2025, appendix D)."""

    seed: int = 0
    """Of random masks, sketches and interventions."""

    num_workers: int = 2
    """Tensors read and compared at once."""

    def __post_init__(self) -> None:
        self.paths = list(self.paths or [])
        require(self.atol >= 0, "--atol", "0 or more", self.atol)
        require(self.eta >= 0, "--eta", "0 or more", self.eta)
        require(self.k is None or self.k >= 1, "--k", "at least 1", self.k)
        require(0 < self.principal_rank <= 1, "--principal-rank", "in (0, 1]", self.principal_rank)
        require(0 < self.mask_density < 1, "--mask-density", "between 0 and 1", self.mask_density)
        require(self.num_workers >= 1, "--num-workers", "at least 1", self.num_workers)
        for name in (self.measures or "sparsity").replace(" ", "").split(","):
            require(name in MEASURES, "--measures", f"a list of {', '.join(MEASURES)}", repr(name))
        self._check_paths()

    def wants(self, measure: str, *, default: bool) -> bool:
        """Whether ``measure`` is to be taken; ``default`` when the user did not choose."""
        return default if self.measures is None else measure in self.measures.replace(" ", "").split(",")

    def _check_paths(self) -> None:
        count = len(self.paths)
        if self.jaccard and self.intervene is not None:
            raise UserError("--jaccard and --intervene exclude each other", "give one of them")
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


@dataclass(kw_only=True)
class MaskOutput(CommonConfig):
    """What every mask command has."""

    output: Path = output()
    """Mask to write (safetensors)."""


@dataclass(kw_only=True)
class MaskSource(MaskOutput):
    """A mask made from a model's weights."""

    model: str = positional(metavar="MODEL")
    """Model folder or safetensors file, read one tensor at a time; or tiny-reasoner."""

    include: list[str] = field(default_factory=list)
    """Only tensors whose names match this glob pattern; may be given several times."""

    exclude: list[str] = field(default_factory=list)
    """Leave out tensors whose names match this glob pattern; may be given several times."""


@dataclass(kw_only=True)
class MaskRandomConfig(MaskSource):
    """A random share of each tensor, drawn without replacement (Adewuyi et al. 2026).

    The same seed gives the same mask for every model with the same names and shapes.
    """

    density: float = 0.01
    """Share of each tensor, in (0, 1]; the count is rounded to the nearest."""

    seed: int = 0
    """Each tensor's draw derives from it and from the tensor's name."""

    def __post_init__(self) -> None:
        require(0 < self.density <= 1, "--density", "in (0, 1]", self.density)


@dataclass(kw_only=True)
class MaskPrincipalConfig(MaskSource):
    """The largest weights of each matrix's low-rank reconstruction (Zhu et al. 2025, section 4.2).

    Tensors that are no matrices (norms, biases) are left out. The paper also leaves out the embedding and the head:
    --exclude '*embed*' --exclude '*lm_head*'.
    """

    rank: float = 0.1
    """Rank of the reconstruction, as a share of the smaller side."""

    density: float = 0.5
    """Share of each matrix, in (0, 1)."""

    def __post_init__(self) -> None:
        require(0 < self.rank <= 1, "--rank", "in (0, 1]", self.rank)
        require(0 < self.density < 1, "--density", "between 0 and 1", self.density)


@dataclass(kw_only=True)
class MaskLowMagnitudeConfig(MaskSource):
    """The smallest weights of each tensor by magnitude (Zhu et al. 2025, section 4.2)."""

    density: float = 0.5
    """Share of each tensor, in (0, 1)."""

    def __post_init__(self) -> None:
        require(0 < self.density < 1, "--density", "between 0 and 1", self.density)


@dataclass(kw_only=True)
class MaskLayersConfig(MaskSource):
    """All weights of some layers."""

    layers: str | None = None
    """Layers to take, counted from 0: 0-3,7. Without it, whatever --include and --exclude leave."""

    def __post_init__(self) -> None:
        if self.layers is not None:
            layer_ranges(self.layers)
        elif not (self.include or self.exclude):
            raise UserError(
                "nothing says which weights to take", "give --layers 0-3,7, or --include or --exclude PATTERN"
            )


@dataclass(kw_only=True)
class MaskDiffConfig(MaskOutput):
    """The weights that training changed: the subnetwork of Mukherjee et al. 2025."""

    base: Path = positional(metavar="BASE")
    """The checkpoint before training: a model folder, a safetensors file, or tiny-reasoner."""

    tuned: Path = positional(metavar="TUNED")
    """The checkpoint after it: a model folder, a safetensors file, a delta, a checkpoint folder or a run."""

    rule: Literal["bits", "atol", "bf16"] = "bits"
    """bits: any change of the stored value; atol: by more than --atol; bf16: beyond the relative tolerance --eta
    (Zhu et al. 2025, definition 2.1)."""

    atol: float = 1e-5
    """Tolerance of --rule atol."""

    eta: float = 1e-3
    """Tolerance of --rule bf16."""

    def __post_init__(self) -> None:
        require(self.atol >= 0, "--atol", "0 or more", self.atol)
        require(self.eta > 0, "--eta", "above 0", self.eta)


@dataclass(kw_only=True)
class MaskCombination(MaskOutput):
    """A mask made from several others."""

    masks: list[Path] = positional(metavar="MASK...")
    """Mask files of one model, two or more."""

    def __post_init__(self) -> None:
        require(len(self.masks) >= 2, "MASK...", "two or more masks", len(self.masks))


@dataclass(kw_only=True)
class MaskUnionConfig(MaskCombination):
    """What is in any of the masks."""


@dataclass(kw_only=True)
class MaskIntersectConfig(MaskCombination):
    """What is in all of the masks."""


@dataclass(kw_only=True)
class MaskMinusConfig(MaskCombination):
    """What is in the first mask and in none of the others."""


@dataclass(kw_only=True)
class MaskComplementConfig(MaskOutput):
    """What is not in the mask."""

    mask: Path = positional(metavar="MASK")
    """Mask file."""


@dataclass(kw_only=True)
class MaskInfoConfig:
    """Check a mask and show what it holds, by layer and kind of matrix."""

    mask: Path = positional(metavar="MASK")
    """Mask file."""

    json: bool = False
    """Print the result as one json object on stdout."""
