"""Solutions whose first wrong step is known, to measure critics on.

Two forms of a row are read, and may be mixed in one file:

- ProcessBench's: ``problem``, ``steps`` (a list of texts), ``label``, and optionally ``id`` and
  ``final_answer_correct``;
- our own records (``question``, ``response``, ``steps`` as spans) with ``label``, and optionally ``final`` or
  ``final_answer_correct``.

``label`` is the index of the first wrong step, counted from 0, or -1 when no step is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssrctl.errors import UserError
from ssrctl.io.files import existing_file
from ssrctl.io.jsonl import STDIO, read_jsonl
from ssrctl.io.records import Rollout, StepSpan

ALL_RIGHT = -1
STEP_JOINT = "\n\n"
_ABOUT_LABELS = "label is the index of the first wrong step, counted from 0, or -1 when none is wrong"


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A solution with the place of its first error.

    Example: the row ``{"problem": "2+3+4=?", "steps": ["2+3=6", "6+4=10"], "label": 0}`` gives a rollout with the
    response ``"2+3=6\\n\\n6+4=10"``, spans 0-7 and 7-13, and label 0.

    Attributes:
        rollout: with question, response and steps; without anything that gives the label away, and without scores.
        label: index of the first wrong step, or ``ALL_RIGHT``.
        final_correct: True = the final answer is right; None when the row does not say.
    """

    rollout: Rollout
    label: int
    final_correct: bool | None = None


def read_labelled(path: str | Path) -> Iterator[Labelled]:
    """Yield the labelled solutions of a file.

    Steps given as texts are joined by a blank line, which belongs to the step before it, and all of them have kind
    ``step``: labels count every text, and a last text that reasons is more than a final answer. Fields that are not
    named above are kept in ``rollout.extra``.

    Args:
        path: a jsonl file, ``-`` for stdin, or a json file that holds one list of rows, as ProcessBench is given
            out.

    Raises:
        UserError: an unreadable file or line; a row without question, steps or label; steps that are empty, blank
            or neither texts nor spans; a label that is not a whole number or out of range. The message names the line
            (the entry, in a json list).
    """
    for where, row in _rows(path):
        yield _labelled(row, where)


def _labelled(row: dict[str, Any], where: str) -> Labelled:
    row = dict(row)
    steps, label, problem = (row.pop(name, None) for name in ("steps", "label", "problem"))
    _check(steps, label, where)
    final_correct = _final_correct(row, where)
    if row.get("question") is None:
        row["question"] = problem
    if row["question"] is None:
        raise UserError(f"{where}: neither 'problem' nor 'question' is there", "each row needs the question as text")
    if all(isinstance(step, str) for step in steps):
        row["response"], spans = _join(steps, where)
        rollout = Rollout.from_dict(row, where=where)
        rollout.steps = spans
    elif all(isinstance(step, dict) for step in steps):
        rollout = Rollout.from_dict(row | {"steps": steps}, where=where, needs=("response",))
    else:
        found = ", ".join(sorted({type(step).__name__ for step in steps}))
        raise UserError(f"{where}: field 'steps' must hold only texts or only spans, found {found}")
    return Labelled(rollout=rollout, label=label, final_correct=final_correct)


def _check(steps: Any, label: Any, where: str) -> None:
    if not isinstance(steps, list) or not steps:
        found = "an empty list" if steps == [] else "nothing" if steps is None else type(steps).__name__
        raise UserError(
            f"{where}: field 'steps' must be a list of at least one step, found {found}",
            "give ProcessBench's fields, or run `ssrctl segment` and add a label",
        )
    if type(label) is not int:  # a bool is an int, but not an index
        found = "nothing" if label is None else json.dumps(label)[:40]
        raise UserError(f"{where}: field 'label' must be a whole number, found {found}", _ABOUT_LABELS)
    if not ALL_RIGHT <= label < len(steps):
        raise UserError(f"{where}: label {label} is out of range for {len(steps)} steps", _ABOUT_LABELS)


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


def _join(steps: list[str], where: str) -> tuple[str, list[StepSpan]]:
    spans = []
    position = 0
    for index, step in enumerate(steps):
        if not step.strip():
            raise UserError(f"{where}: step {index} is blank", "remove it, and lower the label if that counts it")
        end = position + len(step) + (len(STEP_JOINT) if index + 1 < len(steps) else 0)
        spans.append(StepSpan(start=position, end=end))
        position = end
    return STEP_JOINT.join(steps), spans


def _rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if str(path) == STDIO or not _is_list(path):
        yield from read_jsonl(path)
        return
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a list in valid json: {error}", "give one json object a line") from error
    if not rows:
        raise UserError(f"{path}: no records in it")
    # Named in the form "file:place", whose place serves as the id of a row without one.
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}:entry {number}: expected a json object, found {type(row).__name__}")
        yield f"{path}:entry {number}", row


def _is_list(path: str | Path) -> bool:
    """Return True if the file's first character that is not white space opens a json list."""
    with existing_file(path, "file of labelled solutions").open("rb") as stream:
        for line in stream:
            if line.strip():
                return line.lstrip().startswith(b"[")
    return False
