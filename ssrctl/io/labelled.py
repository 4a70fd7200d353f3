"""Solutions whose first wrong step is known, to measure critics on.

Rows are read in every format with labels (``ssrctl.io.formats``); ours are records (``question``, ``response``, ``steps``
as spans) with ``label``, ``labels`` or both, and optionally ``final`` or ``final_answer_correct``. Formats may be mixed in one
file.

``label`` is the index of the first wrong step, counted from 0, or -1 when no step is wrong; ``labels`` has true, false
or null for each step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssrctl.errors import UserError
from ssrctl.io import console
from ssrctl.io.formats.base import ALL_RIGHT as ALL_RIGHT
from ssrctl.io.formats.base import StepLabels, check_label, labelled, labels_before
from ssrctl.io.formats.registry import read_formatted_rows
from ssrctl.io.records import Rollout


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A solution with the place of its first error.

    Example: the row ``{"problem": "2+3+4=?", "steps": ["2+3=6", "6+4=10"], "label": 0}`` gives a rollout with the
    response ``"2+3=6\\n\\n6+4=10"``, spans 0-7 and 7-13, and label 0.

    Attributes:
        rollout: with question, response and steps; without anything that gives the label away, and without scores.
        label: index of the first wrong step, or ``ALL_RIGHT``.
        labels: one per step, where they say more than ``label``: True = right, False = wrong, None = not labelled.
        final_correct: True = the final answer is right; None when the row does not say.
    """

    rollout: Rollout
    label: int
    labels: StepLabels | None = None
    final_correct: bool | None = None

    @property
    def step_labels(self) -> StepLabels:
        """One label per step; without ``labels`` those after the first wrong step are None."""
        return labels_before(self.label, len(self.rollout.steps or ())) if self.labels is None else self.labels


def read_labelled(path: str | Path, format_name: str = "auto") -> Iterator[Labelled]:
    """Yield the labelled solutions of a file.

    Steps given as texts are joined by a blank line, which belongs to the step before it, and all of them have kind
    ``step``: labels count every text, and a last text that reasons is more than a final answer. Fields that are not
    named above are kept in ``rollout.extra``. Solutions of which a missing label may hide the first wrong step are left
    out with a warning.

    Args:
        path: a jsonl file, ``-`` for stdin, or a file that holds one list of rows, as ProcessBench is given out.
        format_name: as ``--format``.

    Raises:
        UserError: an unreadable file or line; a row without question, steps or label; steps that are empty, blank
            or neither texts nor spans; labels of another number than steps; a label that is not a whole number or out of
            range. The message names the line (the row, in a json list).
    """
    num_unknown = 0
    for where, row in read_formatted_rows(path, format_name):
        made = _labelled(row, where)
        if made is None:
            num_unknown += 1
        else:
            yield made
    if num_unknown:
        console.warn(f"{path}: {num_unknown} solutions lack a label before their first wrong step and are left out")


def _labelled(row: dict[str, Any], where: str) -> Labelled | None:
    row = dict(row)
    steps, label, labels = (row.pop(name, None) for name in ("steps", "label", "labels"))
    _check_steps(steps, where)
    if labels is not None:
        if not isinstance(labels, list):
            raise UserError(f"{where}: field 'labels' must be a list, found {type(labels).__name__}")
        found = labelled(labels, len(steps), where).get("label")
        if label is None and found is None:
            return None
        label = found if label is None else check_label(label, len(steps), where)
        if found is not None and found != label:
            raise UserError(f"{where}: label {label} and labels contradict each other: the first false is {found}")
    label = check_label(label, len(steps), where)
    final_correct = _final_correct(row, where)
    if row.get("question") is None:
        row["question"] = row.pop("problem", None)
    if row["question"] is None:
        raise UserError(f"{where}: neither 'problem' nor 'question' is there", "each row needs the question as text")
    rollout = Rollout.from_dict(row | {"steps": steps}, where=where, needs=("response",))
    return Labelled(
        rollout=rollout,
        label=label,
        labels=None if labels == labels_before(label, len(steps)) else labels,
        final_correct=final_correct,
    )


def _check_steps(steps: Any, where: str) -> None:
    if not isinstance(steps, list) or not steps:
        found = "an empty list" if steps == [] else "nothing" if steps is None else type(steps).__name__
        raise UserError(
            f"{where}: field 'steps' must be a list of at least one step, found {found}",
            "give ProcessBench's fields, or run `ssrctl segment` and add a label",
        )
    if not all(isinstance(step, dict) for step in steps):
        found = ", ".join(sorted({type(step).__name__ for step in steps}))
        raise UserError(f"{where}: field 'steps' must hold only texts or only spans, found {found}")


def _final_correct(row: dict[str, Any], where: str) -> bool | None:
    """Remove the outcome and an earlier critic's scores from ``row``; return the verdict on the final answer."""
    named = row.pop("final_answer_correct", None)
    final = row.pop("final", None)
    for name in ("scores", "advantages"):
        row.pop(name, None)
    if named is None and isinstance(final, dict):
        named = final.get("correct")
    if named is not None and not isinstance(named, bool):
        raise UserError(
            f"{where}: whether the final answer is correct must be true, false or null, found {json.dumps(named)[:40]}"
        )
    return named
