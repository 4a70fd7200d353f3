"""The mask log of a training step: which coordinates each step of each question selected.

One safetensors file per logged training step, ``masks/000123.safetensors``. Set ``u`` of question ``q`` is
stored as a mask (see ``io.artifacts``) whose tensor names carry the prefix ``q.u.``; the metadata holds one
json object per question under ``questions``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssrctl.errors import UserError
from ssrctl.io.artifacts import json_field, load_tensors, mask_from_tensors, mask_tensors, save_tensors, shapes_field

if TYPE_CHECKING:
    from torch import Tensor

    from ssrctl.core.mask import BlockMask

KIND = "step-masks"


@dataclass(kw_only=True)
class UnitLog:
    """One update unit of a question: a step, or several that were fused.

    Attributes:
        steps: indices of the reasoning steps in it, from 0.
        budget: the fraction k_i of the unprotected coordinates that it was granted.
        advantages: one per response that has the step, flattened over the unit's steps.
        mask: the coordinates it selected.
    """

    steps: list[int]
    budget: float
    advantages: list[float]
    mask: BlockMask


@dataclass(kw_only=True)
class QuestionLog:
    """The units of one question, in the order in which they claimed.

    Attributes:
        id: the question's id.
        units: those that claimed something.
        gradient_cosine: ``[len(units)][len(units)]`` cosines between the units' gradients before masking,
            in float64, when the run logged them.
    """

    id: str
    units: list[UnitLog]
    gradient_cosine: list[list[float]] | None = None


@dataclass(kw_only=True)
class StepMaskLog:
    """Everything that one training step selected.

    Attributes:
        step: the training step, from 1.
        num_coordinates: n, all trainable coordinates.
        num_protected: size of the protected set.
        questions: in training order.
    """

    step: int
    num_coordinates: int
    num_protected: int
    questions: list[QuestionLog]


def save_mask_log(path: str | Path, log: StepMaskLog) -> None:
    """Write the log of one training step, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    questions: list[dict[str, Any]] = []
    shapes: dict[str, list[int]] = {}
    for q, question in enumerate(log.questions):
        for u, unit in enumerate(question.units):
            shapes |= {name: list(shape) for name, shape in unit.mask.shapes.items()}
            tensors |= mask_tensors(unit.mask, f"{q}.{u}.")
        units = [{"steps": u.steps, "budget": u.budget, "advantages": u.advantages} for u in question.units]
        questions.append({"id": question.id, "units": units, "gradient_cosine": question.gradient_cosine})
    metadata = {
        "step": log.step,
        "num_coordinates": log.num_coordinates,
        "num_protected": log.num_protected,
        "shapes": shapes,
        "questions": questions,
    }
    save_tensors(path, tensors, KIND, metadata)


def load_mask_log(path: str | Path) -> StepMaskLog:
    """Read one log file; ``UserError`` when it is torn or foreign."""
    tensors, metadata = load_tensors(path, KIND)
    shapes = shapes_field(metadata, path)
    try:
        questions = [
            QuestionLog(
                id=question["id"],
                gradient_cosine=question["gradient_cosine"],
                units=[
                    UnitLog(**unit, mask=mask_from_tensors(tensors, shapes, path, f"{q}.{u}."))
                    for u, unit in enumerate(question["units"])
                ],
            )
            for q, question in enumerate(json_field(metadata, "questions", path))
        ]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: malformed mask log: {error}", "log the run again") from error
    return StepMaskLog(
        step=json_field(metadata, "step", path),
        num_coordinates=json_field(metadata, "num_coordinates", path),
        num_protected=json_field(metadata, "num_protected", path),
        questions=questions,
    )


def mask_log_paths(run: Path) -> Sequence[Path]:
    """The mask logs of a run directory, oldest first."""
    return sorted((run / "masks").glob("*.safetensors"))
