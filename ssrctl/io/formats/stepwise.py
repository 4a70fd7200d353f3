"""TRL's stepwise supervision: ``prompt``, ``completions`` (a text per step) and ``labels`` (true = right)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssrctl.io.formats.base import Format, Row, StepLabels, each, is_texts, joined, kept, labelled, others, step_texts
from ssrctl.io.records import Rollout


def _fits(row: Mapping[str, Any]) -> bool:
    return "prompt" in row and is_texts(row.get("completions")) and isinstance(row.get("labels"), list)


def _read(row: Row, where: str) -> Row:
    steps = row["completions"]
    labels = [bool(value) if value in (0, 1) else value for value in row["labels"]]  # some sets have 0 and 1
    made = others(row, "completions", "labels")
    if isinstance(row["prompt"], str):  # messages are read by the record itself
        made["question"] = made.pop("prompt")
    return made | joined(steps, where) | labelled(labels, len(steps), where)


def _write(rollout: Rollout, labels: StepLabels) -> Row:
    prompt = rollout.extra.get("messages", rollout.question)
    return kept(rollout) | {"prompt": prompt, "completions": step_texts(rollout), "labels": list(labels)}


STEPWISE = Format(
    name="stepwise",
    fields=("prompt", "completions", "labels"),
    fits=_fits,
    reader=each(_read),
    write=_write,
    needs_labels=True,
)
