"""Settings of the mask commands."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ssrctl.configs.building import Fraction, NotNegative, Positive, Share, output, positional
from ssrctl.configs.common import HubOptions, JsonConfig, PairOptions
from ssrctl.configs.layers import layer_ranges
from ssrctl.errors import UserError


@dataclass(kw_only=True)
class MaskOutput(HubOptions):
    """Settings of every command that writes a mask."""

    output: Path = output()
    """Mask to write (safetensors)."""

    format: Literal["small", "plain"] = "small"
    """small: packed gaps between the selected weights of sparse tensors (about a byte each); plain: bit-packed 16x16 tiles
    for every tensor."""


@dataclass(kw_only=True)
class MaskSource(MaskOutput):
    """A mask made from a model's weights."""

    model: str
    """Model folder, safetensors file (read one tensor at a time) or name on the hub; or tiny-reasoner."""

    include: list[str] = field(default_factory=list)
    """Only tensors whose names match this glob pattern; may be given several times."""

    exclude: list[str] = field(default_factory=list)
    """Leave out tensors whose names match this glob pattern; may be given several times."""


@dataclass(kw_only=True)
class MaskRandomConfig(MaskSource):
    """Take a random share of each tensor, drawn without replacement (Adewuyi et al. 2026).

    The same seed gives the same mask for every model with the same names and shapes.

    Example: ssrctl mask random --model base --density 0.01 -o mask.safetensors
    """

    density: Share = 0.01
    """Share of each tensor; the count is rounded to the nearest."""

    like: Path | None = None
    """Take as many weights of each tensor as this mask does, instead of --density: its control of equal density."""

    seed: int = 0
    """Random seed; each tensor's draw derives from it and from the tensor's name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.like is not None and self.density != 0.01:
            raise UserError("--like gives the density of each tensor", "leave out --density or --like")


@dataclass(kw_only=True)
class MaskPrincipalConfig(MaskSource):
    """Take the largest weights of each matrix's low-rank reconstruction (Zhu et al. 2025, section 4.2).

    Tensors that are not matrices (norms, biases) are left out. The paper also leaves out the embedding and the head:
    --exclude '*embed*' --exclude '*lm_head*'.

    Example: ssrctl mask principal --model base --exclude '*embed*' -o mask.safetensors
    """

    rank: Share = 0.1
    """Rank of the reconstruction, as a share of the smaller side."""

    density: Fraction = 0.5
    """Share of each matrix."""


@dataclass(kw_only=True)
class MaskLowMagnitudeConfig(MaskSource):
    """Take the smallest weights of each tensor by magnitude (Zhu et al. 2025, section 4.2).

    Example: ssrctl mask low-magnitude --model base --density 0.1 -o mask.safetensors
    """

    density: Fraction = 0.5
    """Share of each tensor."""


@dataclass(kw_only=True)
class MaskLayersConfig(MaskSource):
    """Take all weights of some layers.

    Example: ssrctl mask layers --model base --layers 0-3,7 -o mask.safetensors
    """

    layers: str | None = None
    """Layers to take, counted from 0: 0-3,7. Without it, all that --include and --exclude leave."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            layer_ranges(self.layers)
        elif not (self.include or self.exclude):
            raise UserError(
                "nothing says which weights to take", "give --layers 0-3,7, or --include or --exclude PATTERN"
            )


@dataclass(kw_only=True)
class MaskDiffConfig(PairOptions, MaskOutput):
    """Take the weights that training changed: the subnetwork of Mukherjee et al. 2025.

    Example: ssrctl mask diff base tuned --changed-by bf16 -o mask.safetensors
    """

    base: Path = positional(metavar="BASE")
    """The checkpoint before training: a model folder, a safetensors file, a name on the hub, or tiny-reasoner."""

    tuned: Path = positional(metavar="TUNED")
    """The checkpoint after it: a model folder, a safetensors file, a name on the hub, a delta, a checkpoint folder or a
    run."""

    changed_by: Literal["bits", "atol", "bf16"] = "bits"
    """Criterion of a changed weight. bits: any change of the stored value; atol: by more than --atol; bf16: beyond the
    relative tolerance --bf16-rtol (Zhu et al. 2025, definition 2.1)."""

    atol: NotNegative = 1e-5
    """Absolute tolerance of --changed-by atol."""

    bf16_rtol: Positive = 1e-3
    """Relative tolerance of --changed-by bf16 (the paper's eta)."""


@dataclass(kw_only=True)
class MaskCombination(MaskOutput):
    """A mask made from several others."""

    masks: list[Path] = positional(metavar="MASK")
    """Mask files of one model, two or more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_several(self.masks)


def _check_several(masks: list[Path]) -> None:
    if len(masks) < 2:
        raise UserError(f"MASK... must be two or more masks, got {len(masks)}")


@dataclass(kw_only=True)
class MaskUnionConfig(MaskCombination):
    """Keep what is in any of the masks.

    Example: ssrctl mask union a.safetensors b.safetensors -o either.safetensors
    """


@dataclass(kw_only=True)
class MaskIntersectConfig(MaskCombination):
    """Keep what is in all of the masks.

    Example: ssrctl mask intersect a.safetensors b.safetensors -o both.safetensors
    """


@dataclass(kw_only=True)
class MaskMinusConfig(MaskCombination):
    """Keep what is in the first mask and in none of the others.

    Example: ssrctl mask minus a.safetensors b.safetensors -o rest.safetensors
    """


@dataclass(kw_only=True)
class MaskComplementConfig(MaskOutput):
    """Turn a mask around: keep what is not in it.

    Example: ssrctl mask complement a.safetensors -o others.safetensors
    """

    mask: Path = positional(metavar="MASK")
    """Mask file."""

    within: bool = False
    """Keep only weights of tensors that the mask selects from, so that the complement of a mask of matrices does not take
    in all of the embedding and the norms."""


@dataclass(kw_only=True)
class MaskCompareConfig(JsonConfig):
    """Compare masks of one model: overlap and Jaccard index of each pair, next to those of random masks.

    Example: ssrctl mask compare seed0.safetensors seed1.safetensors
    """

    masks: list[Path] = positional(metavar="MASK")
    """Mask files of one model, two or more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_several(self.masks)


@dataclass(kw_only=True)
class MaskInfoConfig(JsonConfig):
    """Check a mask and show its contents by layer and kind of matrix.

    Example: ssrctl mask info a.safetensors
    """

    mask: Path = positional(metavar="MASK")
    """Mask file."""
