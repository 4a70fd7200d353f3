"""PRMBench (Song et al. 2025): a solution that was modified so that the steps in ``error_steps`` are wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssrctl.errors import UserError
from ssrctl.io.formats.base import Format, Row, StepLabels, each, is_texts, joined, kept, labelled, others, step_texts
from ssrctl.io.records import Rollout


def _fits(row: Mapping[str, Any]) -> bool:
    return is_texts(row.get("modified_process")) and isinstance(row.get("error_steps"), list)


def _read(row: Row, where: str) -> Row:
    steps, wrong = row["modified_process"], row["error_steps"]
    odd = [number for number in wrong if type(number) is not int or not 1 <= number <= len(steps)]
    if odd:
        raise UserError(
            f"{where}: field 'error_steps' has {odd[0]!r} for {len(steps)} steps", "its numbers count steps from 1"
        )
    made = others(row, "modified_process", "error_steps", "modified_question", "ground_truth", "idx")
    made["question"] = row.get("modified_question") or row.get("question")
    if row.get("idx") is not None:
        made["id"] = row["idx"]
    if row.get("ground_truth") is not None:
        made["answer"] = row["ground_truth"]
    labels = [number not in wrong for number in range(1, len(steps) + 1)]
    return made | joined(steps, where) | labelled(labels, len(steps), where)


def _write(rollout: Rollout, labels: StepLabels) -> Row:
    row = {"idx": rollout.id, "original_question": rollout.question, **kept(rollout)}
    row |= {
        "modified_question": rollout.question,
        "question": rollout.question,
        "modified_process": step_texts(rollout),
    }
    if rollout.answer is not None:
        row["ground_truth"] = rollout.answer
    return row | {"error_steps": [number for number, right in enumerate(labels, start=1) if right is False]}


PRMBENCH = Format(
    name="prmbench",
    fields=("modified_process", "error_steps"),
    fits=_fits,
    reader=each(_read),
    write=_write,
    needs_labels=True,
)
