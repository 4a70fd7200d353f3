"""PRM800K (Lightman et al. 2023): human ratings of several completions per step, of which the chosen one goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssrctl.errors import UserError
from ssrctl.io.formats.base import Format, Row, StepLabels, each, joined, kept, labelled, others, step_texts
from ssrctl.io.records import Rollout

_RATINGS = {1: True, 0: True, -1: False}  # 0 is "neutral", which the paper counts as right


def _fits(row: Mapping[str, Any]) -> bool:
    question, label = row.get("question"), row.get("label")
    return isinstance(question, dict) and isinstance(label, dict) and "steps" in label


def _read(row: Row, where: str) -> Row:
    question, label = row["question"], row["label"]
    steps = label["steps"] if isinstance(label["steps"], list) else []
    chosen = [_chosen(step, f"{where}: step {index}") for index, step in enumerate(steps)]
    made = others(row, "question", "label") | {"question": question.get("problem")}
    if (answer := question.get("ground_truth_answer")) is not None:
        made["answer"] = answer
    if "finish_reason" in label:
        made["finish_reason"] = label["finish_reason"]
    return (
        made
        | joined([text for text, _ in chosen], where)
        | labelled([right for _, right in chosen], len(chosen), where)
    )


def _chosen(step: Any, place: str) -> tuple[Any, bool | None]:
    """Return the text and the label of the completion that goes on; of a last step, that of its first completion."""
    completions = step.get("completions") if isinstance(step, dict) else None
    human = step.get("human_completion") if isinstance(step, dict) else None
    number = step.get("chosen_completion") if isinstance(step, dict) else None
    if number is None and human is not None:
        chosen, rating = human, 1  # written by the labeller to go on from
    else:
        try:
            chosen = completions[number or 0]  # type: ignore[index]
            rating = chosen.get("rating")
        except (TypeError, LookupError, AttributeError):
            raise UserError(f"{place} has no completion {number or 0}", "fix or remove that row") from None
    if rating is not None and (not isinstance(rating, int) or rating not in _RATINGS):
        raise UserError(f"{place} has the rating {rating!r}, expected -1, 0, 1 or null")
    text = chosen.get("text") if isinstance(chosen, dict) else chosen
    return text, None if rating is None else _RATINGS[rating]


def _write(rollout: Rollout, labels: StepLabels) -> Row:
    question = {"problem": rollout.question}
    if isinstance(rollout.answer, str):
        question["ground_truth_answer"] = rollout.answer
    steps: list[Row] = [
        {
            "completions": [{"text": text, "rating": None if right is None else 1 if right else -1, "flagged": None}],
            "human_completion": None,
            "chosen_completion": 0,
        }
        for text, right in zip(step_texts(rollout), labels, strict=True)
    ]
    reason = rollout.extra.get("finish_reason", "found_error" if False in labels else "solution")
    return kept(rollout, "finish_reason") | {"question": question, "label": {"steps": steps, "finish_reason": reason}}


PRM800K = Format(
    name="prm800k",
    fields=("question.problem", "label.steps"),
    fits=_fits,
    reader=each(_read),
    write=_write,
    needs_labels=True,
)
