"""Math-Shepherd (Wang et al. 2024): ``input`` with the tag ``ки`` after each step, ``label`` with + or - in its place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ssrctl.errors import UserError
from ssrctl.io.formats.base import Format, Row, StepLabels, each, joined, kept, labelled, others, step_texts
from ssrctl.io.records import Rollout

TAG = "ки"
_FIRST_STEP = re.compile(r"\s*(?=Step 1:)")
_STEP_LABEL = re.compile(r"Step \d+:")


def _fits(row: Mapping[str, Any]) -> bool:
    text, label = row.get("input"), row.get("label")
    return isinstance(text, str) and TAG in text and isinstance(label, str)


def _read(row: Row, where: str) -> Row:
    *parts, rest = row["input"].split(TAG)
    if rest.strip():
        raise UserError(f"{where}: text after the last {TAG} of field 'input'", "each step ends with the tag")
    start = _FIRST_STEP.search(parts[0])
    if start is None:
        raise UserError(f"{where}: no 'Step 1:' in field 'input'", "the question ends where 'Step 1:' begins")
    labels = _labels(parts, row["label"], where)
    question, parts[0] = parts[0][: start.start()], parts[0][start.end() :]
    steps = [part.strip() for part in parts]
    made = others(row, "input", "label") | {"question": question.strip()}
    return made | joined(steps, where) | labelled(labels, len(steps), where)


def _labels(parts: list[str], label: str, where: str) -> list[bool | None]:
    """Return the marks of ``label``, which is the ``parts`` with + or - after each."""
    marks: list[bool | None] = []
    place = 0
    for part in parts:
        end = place + len(part)
        if label[place:end] != part or label[end : end + 1] not in ("+", "-"):
            raise UserError(
                f"{where}: fields 'input' and 'label' differ at step {len(marks) + 1}",
                "label is the input with + or - instead of each tag",
            )
        marks.append(label[end] == "+")
        place = end + 1
    return marks


def _write(rollout: Rollout, labels: StepLabels) -> Row:
    texts = [
        text if _STEP_LABEL.match(text) else f"Step {number}: {text}"
        for number, text in enumerate(step_texts(rollout), 1)
    ]
    return kept(rollout) | {
        "input": f"{rollout.question} " + "\n".join(f"{text} {TAG}" for text in texts),
        "label": f"{rollout.question} "
        + "\n".join(f"{text} {'+' if right else '-'}" for text, right in zip(texts, labels, strict=True)),
    }


MATH_SHEPHERD = Format(
    name="math-shepherd",
    fields=("input with ки", "label"),
    fits=_fits,
    reader=each(_read),
    write=_write,
    needs_labels=True,
)
