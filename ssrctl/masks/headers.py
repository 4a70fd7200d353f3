"""Headers of mask files, read without their tiles, and the check that two masks belong together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ssrctl.errors import UserError
from ssrctl.io.artifacts import (
    MASK_KIND,
    ModelIdentity,
    identity_field,
    json_field,
    load_mask,
    mask_at,
    read_metadata,
    shapes_field,
)

if TYPE_CHECKING:
    from ssrctl.core.mask import BlockMask


@dataclass(frozen=True)
class MaskHeader:
    """The header of a mask file.

    Attributes:
        path: the file, or the repository on the hub.
        kind: the recipe: ``random``, ``superweights``, ``union`` ...
        shapes: of all tensors of its model.
        model: the model whose weights it selects; None where the file does not say.
        count: number of selected weights, as the file says.
    """

    path: Path
    kind: str
    shapes: dict[str, tuple[int, ...]]
    model: ModelIdentity | None
    count: int

    @property
    def numel(self) -> int:
        """Weights of all tensors together, selected or not."""
        return sum(map(math.prod, self.shapes.values()))

    def load(self) -> BlockMask:
        """Read the mask itself, every tile checked."""
        return load_mask(self.path)[0]


def read_mask_header(path: Path) -> MaskHeader:
    """Read the header of a mask file.

    Raises:
        UserError: missing, truncated or foreign file, or metadata that does not describe a mask.
    """
    metadata = read_metadata(mask_at(path), MASK_KIND)
    shapes = shapes_field(metadata, path)
    counts = json_field(metadata, "counts", path)
    if not isinstance(counts, dict) or not all(type(count) is int for count in counts.values()):
        raise UserError(f"{path}: metadata 'counts' does not hold counts", "make the file again")
    model = identity_field(metadata, "model", path)
    return MaskHeader(path, metadata.get("mask_kind", "unknown"), shapes, model, sum(counts.values()))


def check_same_model(one: MaskHeader, other: MaskHeader) -> None:
    """Check that two masks cover the same tensors and, where both say so, belong to the same weights.

    Raises:
        UserError: they do not; both files are named.
    """
    names = sorted(one.shapes.keys() | other.shapes.keys())
    differing = [name for name in names if one.shapes.get(name) != other.shapes.get(name)]
    if differing:
        first = [header.shapes.get(differing[0]) for header in (one, other)]
        ours, theirs = ("absent" if shape is None else str(list(shape)) for shape in first)
        raise UserError(
            f"{one.path} and {other.path} are masks of different models, {len(differing)} tensors differ, first "
            f"{differing[0]}: {ours} and {theirs}",
            "combine masks of one model",
        )
    if one.model and other.model and one.model.fingerprint != other.model.fingerprint:
        raise UserError(
            f"{one.path} and {other.path} were made for different weights: {one.model.name} {one.model.fingerprint} and "
            f"{other.model.name} {other.model.fingerprint}",
            "make both for the same checkpoint",
        )
