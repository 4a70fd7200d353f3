"""The mask log of a training step: which coordinates each step of each question selected, and what it passed over.

One safetensors file per logged training step, ``masks/000123.safetensors``. Set ``u`` of question ``q`` is
stored as a mask (see ``io.artifacts``) whose tensor names carry the prefix ``q.u.``; the metadata holds one
json object per question under ``questions``. The set that the unit would have taken without claims is stored with the
prefix ``free.q.u.``, as two-byte indices (``core.index_sets``): a tenth of the size. Logs without what was added later
are read with None in its place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssrctl.errors import UserError
from ssrctl.io.artifacts import json_field, load_tensors, mask_from_tensors, mask_tensors, save_tensors, shapes_field

if TYPE_CHECKING:
    from torch import Tensor

    from ssrctl.core.mask import BlockMask

KIND = "step-masks"
Matrix = list[list[float | None]]
# Shares of opposite signs between two units' gradients before masking: of the coordinates where neither is 0, and of
# sum |a b|; over all coordinates, and within the union of their unconstrained sets.
CONFLICTS = ("conflict", "weighted_conflict", "top_conflict", "top_weighted_conflict")
_SHARES = ("gradient_norm", "captured", "unconstrained_captured")


@dataclass(kw_only=True)
class UnitLog:
    """One update unit of a question: a step, or several that were fused.

    Attributes:
        steps: indices of the reasoning steps in it, from 0.
        budget: the fraction k_i of the unprotected coordinates that it was granted.
        advantages: one per response that has the step, flattened over the unit's steps.
        mask: the coordinates it selected.
        gradient_norm: L2 norm of its gradient before masking.
        captured: share of the squared norm that lies in ``mask``, in [0, 1].
        unconstrained: the k_i largest |g| among the unprotected coordinates, as if nobody had claimed any.
        unconstrained_captured: share of the squared norm that lies in these.
    """

    steps: list[int]
    budget: float
    advantages: list[float]
    mask: BlockMask
    gradient_norm: float | None = None
    captured: float | None = None
    unconstrained: BlockMask | None = None
    unconstrained_captured: float | None = None


@dataclass(kw_only=True)
class QuestionLog:
    """The units of one question, in the order in which they claimed.

    Attributes:
        id: the question's id.
        units: those that claimed something.
        gradient_cosine: ``[len(units)][len(units)]`` cosines between the units' gradients before masking,
            in float64, when the run logged them.
        conflict: by name (``CONFLICTS``) matrices of that size with shares of opposite signs, None where undefined;
            when the run logged them.
    """

    id: str
    units: list[UnitLog]
    gradient_cosine: list[list[float]] | None = None
    conflict: dict[str, Matrix] | None = None


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
        units: list[dict[str, Any]] = []
        for u, unit in enumerate(question.units):
            shapes |= {name: list(shape) for name, shape in unit.mask.shapes.items()}
            tensors |= mask_tensors(unit.mask, f"{q}.{u}.")
            if unit.unconstrained is not None:
                tensors |= _index_tensors(unit.unconstrained, f"free.{q}.{u}.")
            fields = ("steps", "budget", "advantages", *_SHARES)
            units.append(
                {name: getattr(unit, name) for name in fields} | {"unconstrained": unit.unconstrained is not None}
            )
        matrices = {"gradient_cosine": question.gradient_cosine, "conflict": question.conflict}
        questions.append({"id": question.id, "units": units} | matrices)
    metadata = {
        "step": log.step,
        "num_coordinates": log.num_coordinates,
        "num_protected": log.num_protected,
        "shapes": shapes,
        "questions": questions,
    }
    save_tensors(path, tensors, KIND, metadata)


def load_mask_log(path: str | Path) -> StepMaskLog:
    """Read one log file.

    Raises:
        UserError: a torn or foreign file, or metadata of another form or type.
    """
    tensors, metadata = load_tensors(path, KIND)
    shapes = shapes_field(metadata, path)
    try:
        return StepMaskLog(
            step=_count(json_field(metadata, "step", path), "step"),
            num_coordinates=_count(json_field(metadata, "num_coordinates", path), "num_coordinates"),
            num_protected=_count(json_field(metadata, "num_protected", path), "num_protected"),
            questions=[
                _question(_mapping(question, f"question {q}"), q, tensors, shapes, path)
                for q, question in enumerate(_sequence(json_field(metadata, "questions", path), "questions"))
            ],
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        said = f"{error} is absent" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: malformed mask log: {said}", "log the run again") from error


def _question(
    stored: Mapping[str, Any],
    q: int,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    path: str | Path,
) -> QuestionLog:
    units = [
        _unit(_mapping(unit, f"unit {u} of question {q}"), f"{q}.{u}.", tensors, shapes, path)
        for u, unit in enumerate(_sequence(stored["units"], "units"))
    ]
    if not isinstance(stored["id"], str):
        raise TypeError(f"the id of question {q} is no text")
    cosine, conflict = stored["gradient_cosine"], stored.get("conflict")
    if cosine is not None:
        _check_matrix(cosine, len(units), "gradient_cosine")
    if conflict is not None:
        if sorted(_mapping(conflict, "conflict")) != sorted(CONFLICTS):
            raise ValueError(f"conflict holds {sorted(conflict)}, expected {sorted(CONFLICTS)}")
        for name in CONFLICTS:
            _check_matrix(conflict[name], len(units), name, blanks=True)
    return QuestionLog(id=stored["id"], units=units, gradient_cosine=cosine, conflict=conflict)


def _unit(
    stored: Mapping[str, Any],
    prefix: str,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    path: str | Path,
) -> UnitLog:
    has_free = stored.get("unconstrained", False)
    return UnitLog(
        steps=[_count(step, "a step") for step in _sequence(stored["steps"], "steps")],
        budget=_number(stored["budget"], "budget"),
        advantages=[_number(one, "an advantage") for one in _sequence(stored["advantages"], "advantages")],
        mask=mask_from_tensors(tensors, shapes, path, prefix),
        unconstrained=_mask_from_indices(tensors, shapes, f"free.{prefix}") if has_free else None,
        **{name: None if stored.get(name) is None else _number(stored[name], name) for name in _SHARES},
    )


def _index_tensors(mask: BlockMask, prefix: str) -> dict[str, Tensor]:
    from ssrctl.core.index_sets import IndexSet

    stored: dict[str, Tensor] = {}
    for name, tiles in mask.tensors.items():
        found = IndexSet.from_tiles(tiles)
        stored |= {f"{prefix}{name}.low": found.low, f"{prefix}{name}.counts": found.counts}
    return stored


def _mask_from_indices(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], prefix: str) -> BlockMask:
    """The inverse of ``_index_tensors``.

    Raises:
        KeyError: a part is absent.
        ValueError, IndexError: the parts do not describe a set over a tensor of that shape.
    """
    import torch

    from ssrctl.core.index_sets import BLOCK_BITS, IndexSet
    from ssrctl.core.mask import BlockMask

    found = {}
    for name, shape in shapes.items():
        low, counts = tensors[f"{prefix}{name}.low"], tensors[f"{prefix}{name}.counts"]
        numel = math.prod(shape)
        blocks = -(-numel // (1 << BLOCK_BITS))
        whole = (
            low.dtype == torch.int16 and counts.dtype == torch.int32 and low.dim() == 1 and counts.shape == (blocks,)
        )
        if not whole or bool((counts < 0).any()) or int(counts.sum()) != low.numel():
            raise ValueError(f"{prefix}{name} does not hold a set of indices")
        indices = IndexSet(numel, low, counts).to_indices()
        # built again, which checks the order and the range
        found[name] = IndexSet.from_indices(indices, numel).to_tiles(shape)
    return BlockMask(found)


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{what} is no mapping")
    return value


def _sequence(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{what} is no list")
    return value


def _count(value: Any, what: str) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{what} is no count: {value!r}")
    return value


def _number(value: Any, what: str) -> float:
    if type(value) not in (int, float):
        raise TypeError(f"{what} is no number: {value!r}")
    return float(value)


def _check_matrix(matrix: Any, size: int, what: str, *, blanks: bool = False) -> None:
    if [len(_sequence(row, what)) for row in _sequence(matrix, what)] != [size] * size:
        raise ValueError(f"{what} does not fit {size} units")
    for value in (value for row in matrix for value in row):
        if not (blanks and value is None):
            _number(value, what)


def mask_log_paths(run: Path) -> Sequence[Path]:
    """The mask logs of a run directory, oldest first."""
    return sorted((run / "masks").glob("*.safetensors"))
