"""A format: its rows as rows of ours, and back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ssrctl.errors import UserError
from ssrctl.io.records import Rollout

ALL_RIGHT = -1
STEP_JOINT = "\n\n"
ABOUT_LABELS = "label is the index of the first wrong step, counted from 0, or -1 when none is wrong"

Row = dict[str, Any]
# One label per step: True = right, False = wrong, None = not labelled.
StepLabels = Sequence[bool | None]


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format.

    Our rows have ``question``, ``response`` and, of a labelled solution, ``steps`` as spans, ``labels`` (one of
    ``StepLabels``) and ``label``, the index of the first wrong step (``ALL_RIGHT``: none; absent if it is not known).

    Attributes:
        name: value of ``--format``.
        fields: the fields by which its rows are known, for messages.
        fits: returns True for a row that has these fields.
        reader: returns a function from a row and its place to rows of ours, made anew for each file.
        write: makes a row of a rollout whose steps have these labels; None for a format that is only read.
        needs_labels: ``write`` needs a label for every step that is written.
    """

    name: str
    fields: tuple[str, ...]
    fits: Callable[[Mapping[str, Any]], bool]
    reader: Callable[[], Callable[[Row, str], list[Row]]]
    write: Callable[[Rollout, StepLabels], Row] | None = None
    needs_labels: bool = False


def numbering() -> Callable[[str, list[Row]], list[Row]]:
    """Return a function that gives the rows of a problem, as they come, the ids ``NAME/0``, ``NAME/1``, ..."""
    counts: Counter[str] = Counter()

    def number(name: str, rows: list[Row]) -> list[Row]:
        for row in rows:
            row["id"] = f"{name}/{counts[name]}"
            counts[name] += 1
        return rows

    return number


def joined(steps: Sequence[Any], where: str) -> Row:
    """Return the response and the spans of steps given as texts; a blank line joins them and belongs to the step before.

    Raises:
        UserError: no step, a blank one, or one that is not text.
    """
    spans, position = [], 0
    for index, step in enumerate(steps):
        if not isinstance(step, str):
            raise UserError(f"{where}: step {index} is not text, found {type(step).__name__}")
        if not step.strip():
            raise UserError(f"{where}: step {index} is blank", "remove it, and lower the label if that counts it")
        end = position + len(step) + (len(STEP_JOINT) if index + 1 < len(steps) else 0)
        spans.append({"start": position, "end": end, "kind": "step"})
        position = end
    if not spans:
        raise UserError(f"{where}: no steps", "each row needs at least one step")
    return {"response": STEP_JOINT.join(steps), "steps": spans}


def labelled(labels: StepLabels, num_steps: int, where: str) -> Row:
    """Return the fields ``labels`` and ``label``; without ``label`` where a missing label may hide the first wrong step.

    Raises:
        UserError: not one label per step, or a label that is not true, false or null.
    """
    if len(labels) != num_steps:
        raise UserError(f"{where}: {len(labels)} labels for {num_steps} steps", "give one label per step")
    for index, value in enumerate(labels):
        if not isinstance(value, bool | None):
            raise UserError(f"{where}: label {index} must be true, false or null, found {json.dumps(value)[:40]}")
    row: Row = {"labels": list(labels)}
    known = labels[: labels.index(False)] if False in labels else labels
    if None not in known:
        row["label"] = len(known) if False in labels else ALL_RIGHT
    return row


def labels_before(label: int, num_steps: int) -> list[bool | None]:
    """Return the labels that the index of the first wrong step gives: steps after it have none."""
    if label == ALL_RIGHT:
        return [True] * num_steps
    return [True] * label + [False] + [None] * (num_steps - label - 1)


def check_label(label: Any, num_steps: int, where: str) -> int:
    """Check the index of the first wrong step.

    Raises:
        UserError: not a whole number, or out of range.
    """
    if type(label) is not int:  # a bool is an int, but not an index
        found = "nothing" if label is None else json.dumps(label)[:40]
        raise UserError(f"{where}: field 'label' must be a whole number, found {found}", ABOUT_LABELS)
    if not ALL_RIGHT <= label < num_steps:
        raise UserError(f"{where}: label {label} is out of range for {num_steps} steps", ABOUT_LABELS)
    return label


def step_texts(rollout: Rollout) -> list[str]:
    """Return the steps without the white space at their ends."""
    return [rollout.step_text(index).strip() for index in range(len(rollout.steps or ()))]


def others(row: Mapping[str, Any], *taken: str) -> Row:
    """Return the fields of a row that are not named, to be kept as they are."""
    return {key: value for key, value in row.items() if key not in taken}


def kept(rollout: Rollout, *dropped: str) -> Row:
    """Return the fields of a record that no stage of ours made, without the named ones."""
    made = ("label", "labels", "critic", "final_answer_correct", "messages")
    return {key: value for key, value in rollout.extra.items() if key not in (*made, *dropped)}


def each(read: Callable[[Row, str], Row]) -> Callable[[], Callable[[Row, str], list[Row]]]:
    """Return the ``reader`` of a format whose rows are one response each."""
    return lambda: lambda row, where: [read(row, where)]


def is_texts(value: Any) -> bool:
    """Return True for a list of texts that is not empty."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)
