"""Samples of lm-evaluation-harness (``--log_samples``, ``samples_*.jsonl``) of tasks that generate text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ssrctl.errors import UserError
from ssrctl.io.formats.base import Format, Row, StepLabels, kept, numbering, others
from ssrctl.io.problems import QUESTION_COLUMNS
from ssrctl.io.records import Rollout
from ssrctl.io.row_fields import final_answer, is_empty, read_answer


def _fits(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("doc"), dict) and isinstance(row.get("resps"), list)


def _reader() -> Callable[[Row, str], list[Row]]:
    """Return a function that leaves out a document's rows of further filters: they hold the same responses."""
    filters: dict[str, Any] = {}
    number = numbering()

    def read(row: Row, where: str) -> list[Row]:
        name = str(row.get("doc_id", where.rsplit(":", 1)[-1]))
        if filters.setdefault(name, row.get("filter")) != row.get("filter"):
            return []
        return number(name, _read(row, where))

    return read


def _read(row: Row, where: str) -> list[Row]:
    doc, resps = row["doc"], row["resps"]
    texts = resps[0] if resps and isinstance(resps[0], list) else resps
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"{where}: field 'resps' holds no generated text", "only tasks that generate text have responses to read"
        )
    made = others(row, "resps", "target", "arguments", "doc_id")
    made["question"] = next((doc[name] for name in QUESTION_COLUMNS if isinstance(doc.get(name), str)), None)
    prompt = _prompt(row.get("arguments"))
    if made["question"] is None:
        made["question"] = prompt
    if prompt is not None:
        made["prompt"] = prompt
    if not is_empty(row.get("target")):
        answer = read_answer(row["target"], where, "target")
        made["answer"] = final_answer(answer) if isinstance(answer, str) else answer
    return [made | {"response": text} for text in texts]


def _prompt(arguments: Any) -> str | None:
    """Return the text that the model was given: the first argument of the first request."""
    first = arguments.get("gen_args_0") if isinstance(arguments, dict) else None
    if isinstance(arguments, list) and arguments:
        first = arguments[0]
    text = first.get("arg_0") if isinstance(first, dict) else first[0] if isinstance(first, list) and first else None
    return text if isinstance(text, str) else None


def _write(rollout: Rollout, labels: StepLabels) -> Row:
    extracted = None if rollout.final is None else rollout.final.extracted
    name = rollout.group
    row = {"doc_id": int(name) if name.isdecimal() else name, "doc": {"question": rollout.question}, **kept(rollout)}
    if rollout.prompt is not None:
        row["arguments"] = {"gen_args_0": {"arg_0": rollout.prompt}}
    if rollout.answer is not None:
        row["target"] = rollout.answer
    row |= {"resps": [[rollout.response]]}
    return row if "filtered_resps" in row else row | {"filtered_resps": [extracted or rollout.response]}


LM_EVAL = Format(name="lm-eval", fields=("doc", "resps"), fits=_fits, reader=_reader, write=_write)
