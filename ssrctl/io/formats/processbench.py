"""ProcessBench (Zheng et al. 2024): ``problem``, ``steps`` as texts, ``label`` and ``final_answer_correct``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssrctl.io.formats.base import (
    ALL_RIGHT,
    Format,
    Row,
    StepLabels,
    check_label,
    each,
    is_texts,
    joined,
    kept,
    labels_before,
    others,
    step_texts,
)
from ssrctl.io.records import Rollout


def _fits(row: Mapping[str, Any]) -> bool:
    return is_texts(row.get("steps")) and "label" in row


def _read(row: Row, where: str) -> Row:
    steps = row["steps"]
    label = check_label(row["label"], len(steps), where)
    question = row.get("problem") if row.get("question") is None else row["question"]
    labels = {"label": label, "labels": labels_before(label, len(steps))}
    return others(row, "problem", "steps", "label") | {"question": question} | joined(steps, where) | labels


def _write(rollout: Rollout, labels: StepLabels) -> Row:
    row = {"id": rollout.id, **kept(rollout), "problem": rollout.question, "steps": step_texts(rollout)}
    correct = rollout.extra.get("final_answer_correct")
    if rollout.final is not None:
        correct = rollout.final.correct
    if correct is not None:
        row["final_answer_correct"] = correct
    return row | {"label": list(labels).index(False) if False in labels else ALL_RIGHT}


PROCESSBENCH = Format(
    name="processbench",
    fields=("problem", "steps", "label"),
    fits=_fits,
    reader=each(_read),
    write=_write,
    needs_labels=True,
)
