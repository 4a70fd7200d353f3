"""The mask log of a training step: the coordinates that each step of each question selected or passed over.

One safetensors file per logged training step, ``masks/000123.safetensors``. Set ``u`` of question ``q`` is
stored as a mask (see ``io.artifacts``) whose tensor names carry the prefix ``q.u.``; the metadata holds one
json object per question under ``questions``. The set that the unit would have taken without claims is stored with the
prefix ``free.q.u.``, as two-byte indices (``core.index_sets``): a tenth of the size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import StrictBool, StrictFloat, StrictStr

from ssrctl.errors import UserError
from ssrctl.io.artifacts import (
    json_field,
    load_tensors,
    mask_from_tensors,
    mask_tensors,
    open_safetensors,
    read_metadata,
    save_tensors,
    shapes_field,
)
from ssrctl.io.checked import Count, checked

if TYPE_CHECKING:
    from torch import Tensor

    from ssrctl.core.mask import BlockMask

KIND = "step-masks"
Matrix = list[list[float | None]]
# Shares of opposite signs between two units' gradients before masking: of the coordinates where neither is 0, and of
# sum |a b|; over all coordinates, and within the union of their unconstrained sets.
CONFLICTS = ("conflict", "weighted_conflict", "top_conflict", "top_weighted_conflict")
REMEDY = "log the run again"


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
        unconstrained: the k_i largest |g| among the unprotected coordinates, as if none were claimed.
        unconstrained_captured: share of the squared norm that lies in these.
        positive_norm, negative_norm: L2 norms over ``mask`` of the gradients of the responses with a positive and with a
            negative advantage, when the run logged them.
    """

    steps: list[int]
    budget: float
    advantages: list[float]
    mask: BlockMask
    gradient_norm: float | None = None
    captured: float | None = None
    unconstrained: BlockMask | None = None
    unconstrained_captured: float | None = None
    positive_norm: float | None = None
    negative_norm: float | None = None


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
            fields = {name: value for name, value in vars(unit).items() if name != "mask"}
            units.append(fields | {"unconstrained": unit.unconstrained is not None})
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
        UserError: a truncated or foreign file, or metadata of another form or type.
    """
    tensors, metadata = load_tensors(path, KIND)
    shapes = shapes_field(metadata, path)
    stored = _stored(path, metadata)
    try:
        return StepMaskLog(
            step=stored.step,
            num_coordinates=stored.num_coordinates,
            num_protected=stored.num_protected,
            questions=[_question(question, q, tensors, shapes, path) for q, question in enumerate(stored.questions)],
        )
    except (KeyError, ValueError, IndexError) as error:
        said = f"{error} is absent" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: malformed mask log: {said}", REMEDY) from error


@dataclass(frozen=True, kw_only=True)
class Claims:
    """The sizes of the sets of a training step, and the signs of their gradients, without the sets.

    Attributes:
        shares: ``[question][unit]``, selected coordinates over the unprotected ones, in [0, 1].
        cosines, conflicts: of all pairs of units of a question: cosine of their gradients before masking, and
            ``top_conflict`` (``CONFLICTS``); empty when the run did not log them.
    """

    step: int
    shares: list[list[float]]
    cosines: list[float]
    conflicts: list[float]


def load_claims(path: str | Path) -> Claims:
    """Read a log's sizes only, in a hundredth of the time of ``load_mask_log``.

    Raises:
        UserError: a truncated or foreign file, or metadata of another form or type.
    """
    stored = _stored(path, read_metadata(path, KIND))
    sizes = [[0] * len(question.units) for question in stored.questions]
    with open_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            q, _, rest = name.partition(".")
            if q != "free" and name.endswith(".tiles"):
                try:
                    sizes[int(q)][int(rest.partition(".")[0])] += _popcount(file.get_tensor(name))
                except (ValueError, IndexError) as error:
                    raise UserError(f"{path}: malformed mask log: {name} is of no unit", REMEDY) from error
    free = max(1, stored.num_coordinates - stored.num_protected)
    conflicts = [(question.conflict or {}).get("top_conflict") for question in stored.questions]
    return Claims(
        step=stored.step,
        shares=[[size / free for size in question] for question in sizes],
        cosines=_above_diagonal(question.gradient_cosine for question in stored.questions),
        conflicts=_above_diagonal(conflicts),
    )


def _popcount(tiles: Tensor) -> int:
    import numpy as np

    return int(np.unpackbits(tiles.numpy()).sum(dtype=np.int64))


def _above_diagonal(matrices: Iterable[Sequence[Sequence[float | None]] | None]) -> list[float]:
    return [
        value
        for matrix in matrices
        for place, row in enumerate(matrix or [])
        for value in row[place + 1 :]
        if value is not None
    ]


def _stored(path: str | Path, metadata: Mapping[str, str]) -> _Stored:
    fields = {key: json_field(metadata, key, path) for key in ("step", "num_coordinates", "num_protected", "questions")}
    found: _Stored = checked(_Stored, fields, f"{path}: malformed mask log", REMEDY)
    return found


@dataclass(kw_only=True)
class _StoredUnit:
    steps: list[Count]
    budget: StrictFloat
    advantages: list[StrictFloat]
    gradient_norm: StrictFloat | None
    captured: StrictFloat | None
    unconstrained: StrictBool
    unconstrained_captured: StrictFloat | None
    positive_norm: StrictFloat | None
    negative_norm: StrictFloat | None


@dataclass(kw_only=True)
class _StoredQuestion:
    id: StrictStr
    units: list[_StoredUnit]
    gradient_cosine: list[list[StrictFloat]] | None
    conflict: dict[str, list[list[StrictFloat | None]]] | None


@dataclass(kw_only=True)
class _Stored:
    step: Count
    num_coordinates: Count
    num_protected: Count
    questions: list[_StoredQuestion]


def _question(
    stored: _StoredQuestion,
    q: int,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    path: str | Path,
) -> QuestionLog:
    units = []
    for u, unit in enumerate(stored.units):
        mask = mask_from_tensors(tensors, shapes, path, f"{q}.{u}.")
        free = _mask_from_indices(tensors, shapes, f"free.{q}.{u}.") if unit.unconstrained else None
        units.append(UnitLog(**vars(unit) | {"mask": mask, "unconstrained": free}))
    if stored.conflict is not None and sorted(stored.conflict) != sorted(CONFLICTS):
        raise ValueError(f"conflict holds {sorted(stored.conflict)}, expected {sorted(CONFLICTS)}")
    for name, matrix in {"gradient_cosine": stored.gradient_cosine, **(stored.conflict or {})}.items():
        if matrix is not None and [len(row) for row in matrix] != [len(units)] * len(units):
            raise ValueError(f"{name} does not fit {len(units)} units")
    return QuestionLog(id=stored.id, units=units, gradient_cosine=stored.gradient_cosine, conflict=stored.conflict)


def _index_tensors(mask: BlockMask, prefix: str) -> dict[str, Tensor]:
    from ssrctl.core.index_sets import IndexSet

    stored: dict[str, Tensor] = {}
    for name, tiles in mask.tensors.items():
        found = IndexSet.from_tiles(tiles)
        stored |= {f"{prefix}{name}.low": found.low, f"{prefix}{name}.counts": found.counts}
    return stored


def _mask_from_indices(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], prefix: str) -> BlockMask:
    """Return the mask that ``_index_tensors`` stored.

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


def mask_log_paths(run: Path) -> Sequence[Path]:
    """Return the mask logs of a run directory, oldest first."""
    return sorted((run / "masks").glob("*.safetensors"))
