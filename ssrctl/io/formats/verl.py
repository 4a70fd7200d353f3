"""Rollouts that verl writes: ``input``, ``output``, ``gts`` and ``score``, or ``prompts`` and ``responses``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssrctl.errors import UserError
from ssrctl.io.formats.base import Format, Row, StepLabels, is_texts, kept, others
from ssrctl.io.records import Rollout
from ssrctl.io.row_fields import is_empty, is_messages


def _fits(row: Mapping[str, Any]) -> bool:
    if isinstance(row.get("input"), str) and isinstance(row.get("output"), str):
        return "score" in row or "gts" in row
    return ("prompts" in row or "prompt" in row) and _are_responses(row.get("responses"))


def _are_responses(value: Any) -> bool:
    return isinstance(value, str) or is_texts(value)


def _read(row: Row, where: str) -> list[Row]:
    name = "input" if "input" in row else "prompts" if "prompts" in row else "prompt"
    prompt = row[name]
    made = others(row, "input", "output", "prompts", "responses", "gts")
    if is_messages(prompt):
        made["prompt"] = prompt
    elif isinstance(prompt, str):  # the whole prompt as text; the question within it is not marked
        made |= {"question": prompt, "prompt": prompt}
    else:
        raise UserError(f"{where}: field '{name}' must be text or chat messages, found {type(prompt).__name__}")
    if not is_empty(row.get("gts")):
        made["answer"] = row["gts"]
    responses = row["output"] if "output" in row else row["responses"]
    if isinstance(responses, str):
        return [made | {"response": responses}]
    name = str(made.get("id", where.rsplit(":", 1)[-1]))
    return [made | {"id": f"{name}/{number}", "response": text} for number, text in enumerate(responses)]


def _write(rollout: Rollout, labels: StepLabels) -> Row:
    row: Row = {"id": rollout.id, "input": rollout.prompt or rollout.question, "output": rollout.response}
    row |= {"gts": rollout.answer} | kept(rollout)
    if rollout.final is not None and rollout.final.correct is not None:
        row["score"] = float(rollout.final.correct)
    return row


VERL = Format(name="verl", fields=("input", "output", "score or gts"), fits=_fits, reader=lambda: _read, write=_write)
