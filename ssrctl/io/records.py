"""The record that passes between stages: one rollout, with what each stage has added to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, StrictBool, StrictInt

from ssrctl.errors import UserError
from ssrctl.io.checked import Number, checked
from ssrctl.io.jsonl import read_jsonl, write_jsonl
from ssrctl.io.row_fields import Reference, is_empty, is_messages, lookup, message_text, read_answer, read_messages


class _Part:
    """An object within a rollout. Keys that a later version adds must not be lost, so unknown ones are refused."""

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}


@dataclass(kw_only=True)
class StepSpan(_Part):
    """A step's character span in the response: ``{"start": 0, "end": 57, "kind": "step"}``."""

    start: StrictInt
    end: StrictInt
    kind: Literal["step", "final"] = "step"


@dataclass(kw_only=True)
class StepScore(_Part):
    """A critic's verdict on one step.

    ``{"score": 85, "reward": 0.85, "rationale": "...", "error": null}``. A score that the critic could not
    give is *missing*: ``score`` and ``reward`` are None and ``error`` says why. It is never 0.
    """

    score: Number | None
    reward: Number | None
    rationale: str | None = None
    error: str | None = None


# What each outcome says about `correct`. A comparison that was given up says nothing, so it never is a reward.
_CORRECT: dict[str, bool | None] = {"correct": True, "wrong": False, "unparsed": False, "timed_out": None}


@dataclass(kw_only=True)
class FinalAnswer(_Part):
    """The final answer that was extracted, the way it was found, and the verdict on it.

    ``{"extracted": "42", "correct": true, "way": "hashes", "outcome": "correct"}``

    Attributes:
        extracted: the answer as the response words it; None when it states none.
        correct: None when it cannot be told: no reference, or the comparison was given up.
        way: how it was found: boxed, hashes, marker, heading, phrase, answer-tag or last-number.
        outcome: ``correct``; ``wrong``; ``unparsed``, no answer was found (``correct`` is False); ``timed_out``,
            one was found and comparing it took too long (``correct`` is None); None without a reference.
            Where it is not given, it is made of the other fields.

    Raises:
        ValueError: ``outcome`` and ``correct`` contradict each other.
    """

    extracted: str | None
    correct: StrictBool | None
    way: str | None = None
    outcome: Literal["correct", "wrong", "unparsed", "timed_out"] | None = None

    def __post_init__(self) -> None:
        if self.outcome is None and self.correct is not None:
            self.outcome = "correct" if self.correct else "unparsed" if self.extracted is None else "wrong"
        if self.outcome is not None and self.correct is not _CORRECT[self.outcome]:
            raise ValueError(f"'outcome' {self.outcome} contradicts 'correct' {self.correct}")


@dataclass(kw_only=True)
class Rollout:
    """One response to one question; the fields after ``response`` are added by later stages.

    Example::

        {"id": "q17/3", "question": "...", "answer": "42", "prompt": "...", "response": "...",
         "steps": [{"start": 0, "end": 57, "kind": "step"}, {"start": 57, "end": 80, "kind": "final"}],
         "scores": [{"score": 85, "reward": 0.85, "rationale": "...", "error": null}, ...],
         "final": {"extracted": "42", "correct": true, "way": "hashes", "outcome": "correct"}, "advantages": [0.4, -1.2]}

    ``answer`` is a tuple where several answers are accepted (a list in json); any of them is right. ``extra`` holds every
    field that is not listed here; it is written back unchanged.
    """

    id: str
    question: str | None = None
    answer: Reference | None = None
    prompt: str | None = None
    response: str | None = None
    steps: list[StepSpan] | None = None
    scores: list[StepScore] | None = None
    final: FinalAnswer | None = None
    advantages: list[Number | None] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """The id without its rollout number: ``q17/3`` is in group ``q17``."""
        return self.id.rsplit("/", 1)[0]

    def step_text(self, index: int) -> str:
        """Return the text of step ``index``."""
        assert self.steps is not None and self.response is not None
        return self.response[self.steps[index].start : self.steps[index].end]

    def to_dict(self) -> dict[str, Any]:
        """Return the jsonl row: fields that no stage has filled are left out, unknown ones kept."""
        row: dict[str, Any] = {}
        for name in RECORD_FIELDS:
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                row[name] = [_as_json(item) for item in value]
            elif value is not None:
                row[name] = _as_json(value)
        # A data set's column may be called like a field of ours; ours is the one that is meant.
        return row | {key: value for key, value in self.extra.items() if key not in RECORD_FIELDS}

    @classmethod
    def from_dict(cls, row: dict[str, Any], *, where: str, needs: tuple[str, ...] = ()) -> Rollout:
        """Check and convert one jsonl row.

        Args:
            row: the parsed json object.
            where: ``file:line``, for messages.
            needs: fields that must be there.

        Raises:
            UserError: a needed field is absent, or a field has the wrong type or spans that do not cover
                the response in order; the message names the line and the field.
        """
        row = _with_our_fields(row, where)
        for name in needs:
            if row.get(name) is None:
                raise UserError(f"{where}: field '{name}' is missing", _REMEDIES.get(name))
        # A line without an id (as users' own files often are) is known by its line number.
        known = {name: value for name, value in row.items() if name in RECORD_FIELDS}
        known["id"] = where.rsplit(":", 1)[-1] if row.get("id") is None else str(row["id"])
        if not isinstance(answer := row.get("answer"), str | None):
            known["answer"] = None if is_empty(answer) else read_answer(answer, where, "answer")
        made = checked(cls, known | {"extra": {key: row[key] for key in row if key not in RECORD_FIELDS}}, where)
        if made.steps is not None:
            _check_cover(made.steps, made.response, where)
        if made.scores is not None and (made.steps is None or len(made.scores) != len(made.steps)):
            raise UserError(
                f"{where}: field 'scores' has {len(made.scores)} entries for {len(made.steps or [])} steps",
                "run `ssrctl critic` again on the segmented file",
            )
        return made


# A column of the user's data set may be called "extra"; it is kept in ``extra`` like all others.
RECORD_FIELDS = tuple(spec.name for spec in dataclasses.fields(Rollout) if spec.name != "extra")
_REMEDIES = {
    "steps": "run `ssrctl segment` first",
    "scores": "run `ssrctl critic` first",
    "response": "each line needs the model's response as text",
    "question": "each line needs the question as text",
    "answer": "each line needs the reference answer",
    "final": "grade the responses first: ssrctl eval --responses",
}


def read_rollouts(
    path: str | Path, *, needs: tuple[str, ...] = (), on_torn: Callable[[str], None] | None = None
) -> Iterator[Rollout]:
    """Yield the rollouts of a jsonl file, checked; see ``read_jsonl`` and ``Rollout.from_dict`` for errors."""
    for where, row in read_jsonl(path, on_torn=on_torn):
        yield Rollout.from_dict(row, where=where, needs=needs)


def write_rollouts(path: str | Path, rollouts: Iterable[Rollout]) -> int:
    """Write rollouts as jsonl, whole or not at all; return their number. ``-`` is stdout."""
    return write_jsonl(path, (rollout.to_dict() for rollout in rollouts))


def _with_our_fields(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a row with the fields of other tools in our names, as far as ours are absent.

    A ``prompt`` of chat messages becomes ``messages``, its last text the question: ``prompt`` is the exact text that the
    model was given. A ``completion`` or a list of messages as ``response`` becomes the text of its last message;
    ``ground_truth``, also within verl's ``reward_model``, becomes the answer.
    """
    row = dict(row)
    if is_messages(row.get("prompt")):
        messages = read_messages(row.pop("prompt"), f"{where}: field 'prompt'")
        row.setdefault("messages", messages)
        if row.get("question") is None:
            row["question"] = messages[-1]["content"]
    name = "completion" if row.get("response") is None else "response"
    if (value := row.get(name)) is not None:
        if is_messages(value):
            last = value[-1]
            value = message_text(
                last.get("content") if isinstance(last, dict) else last, f"{where}: field '{name}[-1]'"
            )
        row["response"] = value
    if row.get("answer") is None:
        for name in ("ground_truth", "reward_model.ground_truth"):
            if (answer := lookup(row, name, where)) is not None:
                row["answer"] = answer
                break
    return row


def _as_json(value: Any) -> Any:
    return dict(vars(value)) if isinstance(value, _Part) else value


def _check_cover(steps: list[StepSpan], response: str | None, where: str) -> None:
    """Check that spans are ordered, do not overlap and cover the response exactly."""
    position = 0
    for number, step in enumerate(steps):
        if step.start != position or step.end <= step.start:
            raise UserError(
                f"{where}: step {number} spans {step.start}-{step.end}, expected it to start at {position}",
                "spans must cover the response in order; run `ssrctl segment` again",
            )
        position = step.end
    if steps and (response is None or position != len(response)):
        length = "no response" if response is None else f"{len(response)} characters"
        raise UserError(f"{where}: the steps end at {position}, the response has {length}")
