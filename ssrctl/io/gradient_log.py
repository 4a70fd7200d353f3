"""The gradient log of a training step: the batch's dense gradient before masking, or a sketch of it.

One safetensors file per logged training step, ``gradients/000123.safetensors``, with one tensor ``gradient``
(float32 ``[size]``). The metadata says how they were made; see ``training.gradient_sketch``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ssrctl.errors import UserError
from ssrctl.io.artifacts import json_field, load_tensors, read_metadata, save_tensors
from ssrctl.io.checked import Count, checked

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

KIND = "gradient-sketch"
_TENSOR = "gradient"


@dataclass(frozen=True, kw_only=True)
class GradientHeader:
    """The header of a gradient log.

    Attributes:
        step: the training step, from 1.
        sketch: ``exact``, the gradient itself, or ``count-sketch``.
        size: numbers stored.
        seed: of the sketch; logs can be compared when it and everything else but the step agree.
        num_coordinates: of the model.
    """

    step: Count
    sketch: Literal["exact", "count-sketch"]
    size: Count
    seed: Count
    num_coordinates: Count

    @property
    def map(self) -> tuple[str, int, int, int]:
        """Everything but the step, which two logs must share to be compared."""
        return self.sketch, self.size, self.seed, self.num_coordinates


def gradient_log_path(run: Path, step: int) -> Path:
    """Return the path of a training step's log."""
    return run / "gradients" / f"{step:06d}.safetensors"


def gradient_log_paths(run: Path) -> list[Path]:
    """Return the gradient logs of a run directory, oldest first; other names are not ours."""
    found = (run / "gradients").glob("*.safetensors")
    return sorted((path for path in found if path.stem.isdecimal()), key=lambda path: int(path.stem))


def save_gradient_log(path: str | Path, header: GradientHeader, gradient: Tensor) -> None:
    """Write the log of one training step, whole or not at all; stored as float32.

    Raises:
        ValueError: another number of numbers than the header says, or one that is not finite.
    """
    if gradient.shape != (header.size,):
        raise ValueError(f"a sketch of {header.size} numbers, got a tensor of shape {list(gradient.shape)}")
    stored = gradient.float()
    if not bool(stored.isfinite().all()):
        raise ValueError(f"the sketch of step {header.step} holds NaN or infinity")
    save_tensors(path, {_TENSOR: stored}, KIND, vars(header))


def read_gradient_header(path: str | Path) -> GradientHeader:
    """Read only the header; ``UserError`` when the file is truncated or foreign."""
    return _header(read_metadata(path, KIND), path)


def load_gradient_log(path: str | Path) -> tuple[GradientHeader, Tensor]:
    """Read one log: (header, float32 ``[size]``).

    Raises:
        UserError: a truncated or foreign file, or contents that do not fit its header or are not finite.
    """
    import torch

    tensors, metadata = load_tensors(path, KIND)
    header = _header(metadata, path)
    gradient = tensors.get(_TENSOR)
    if gradient is None or gradient.dtype != torch.float32 or gradient.shape != (header.size,):
        raise UserError(f"{path}: expected {header.size} float32 numbers under '{_TENSOR}'", "log the run again")
    if bad := int((~gradient.isfinite()).sum()):
        raise UserError(f"{path}: {bad} of {header.size} numbers are NaN or infinite", "remove the file")
    return header, gradient


def _header(metadata: Mapping[str, str], path: str | Path) -> GradientHeader:
    stored: dict[str, Any] = {
        key: json_field(metadata, key, path) for key in ("step", "size", "seed", "num_coordinates")
    }
    stored["sketch"] = metadata.get("sketch")
    return checked(GradientHeader, stored, f"{path}: metadata", "log the run again, or use a newer version")
