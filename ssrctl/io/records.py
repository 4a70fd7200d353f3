"""The record that passes between stages: one rollout, with what each stage has added to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ssrctl.errors import UserError
from ssrctl.io.jsonl import read_jsonl


@dataclass(kw_only=True)
class StepSpan:
    """A step's character span in the response: ``{"start": 0, "end": 57, "kind": "step"}``."""

    start: int
    end: int
    kind: Literal["step", "final"] = "step"


@dataclass(kw_only=True)
class StepScore:
    """A critic's verdict on one step.

    ``{"score": 85, "reward": 0.85, "rationale": "...", "error": null}``. A score that the critic could not
    give is *missing*: ``score`` and ``reward`` are None and ``error`` says why. It is never 0.
    """

    score: float | None
    reward: float | None
    rationale: str | None = None
    error: str | None = None


# What each outcome says about `correct`. A comparison that was given up says nothing, so it never is a reward.
_CORRECT: dict[str, bool | None] = {"correct": True, "wrong": False, "unparsed": False, "timed_out": None}


@dataclass(kw_only=True)
class FinalAnswer:
    """What was extracted as the final answer, how, and whether it is right.

    ``{"extracted": "42", "correct": true, "way": "hashes", "outcome": "correct"}``

    Attributes:
        extracted: the answer as the response words it; None when it states none.
        correct: None when it cannot be told: no reference, or the comparison was given up.
        way: how it was found: boxed, hashes, marker, heading, phrase, answer-tag or last-number.
        outcome: ``correct``; ``wrong``; ``unparsed``, no answer was found (``correct`` is False); ``timed_out``,
            one was found and comparing it took too long (``correct`` is None); None without a reference. Records
            of earlier versions have none; it is then made of the other fields.

    Raises:
        ValueError: ``outcome`` and ``correct`` contradict each other.
    """

    extracted: str | None
    correct: bool | None
    way: str | None = None
    outcome: Literal["correct", "wrong", "unparsed", "timed_out"] | None = None

    def __post_init__(self) -> None:
        if self.outcome is None and isinstance(self.correct, bool):
            self.outcome = "correct" if self.correct else "unparsed" if self.extracted is None else "wrong"
        if self.outcome in _CORRECT and self.correct is not _CORRECT[self.outcome]:
            raise ValueError(f"'outcome' {self.outcome} contradicts 'correct' {self.correct}")


@dataclass(kw_only=True)
class Rollout:
    """One response to one question; the fields after ``response`` are added by later stages.

    Example::

        {"id": "q17/3", "question": "...", "answer": "42", "prompt": "...", "response": "...",
         "steps": [{"start": 0, "end": 57, "kind": "step"}, {"start": 57, "end": 80, "kind": "final"}],
         "scores": [{"score": 85, "reward": 0.85, "rationale": "...", "error": null}, ...],
         "final": {"extracted": "42", "correct": true, "way": "hashes", "outcome": "correct"}, "advantages": [0.4, -1.2]}

    ``extra`` holds every field that is not listed here; it is written back unchanged.
    """

    id: str
    question: str | None = None
    answer: str | None = None
    prompt: str | None = None
    response: str | None = None
    steps: list[StepSpan] | None = None
    scores: list[StepScore] | None = None
    final: FinalAnswer | None = None
    advantages: list[float | None] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """The id without its rollout number: ``q17/3`` belongs to group ``q17``."""
        return self.id.rsplit("/", 1)[0]

    def step_text(self, index: int) -> str:
        """The text of step ``index``."""
        assert self.steps is not None and self.response is not None
        return self.response[self.steps[index].start : self.steps[index].end]

    def to_dict(self) -> dict[str, Any]:
        """The jsonl row: fields that no stage has filled are left out, unknown ones kept."""
        row: dict[str, Any] = {}
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if spec.name == "extra" or value is None:
                continue
            if isinstance(value, list):
                value = [_as_json(item) for item in value]
            row[spec.name] = _as_json(value)
        # A data set's column may be called like a field of ours; ours is the one that is meant.
        known = {spec.name for spec in dataclasses.fields(self)} - {"extra"}
        return row | {key: value for key, value in self.extra.items() if key not in known}

    @classmethod
    def from_dict(cls, row: dict[str, Any], *, where: str, needs: tuple[str, ...] = ()) -> Rollout:
        """Check and convert one jsonl row.

        Args:
            row: the parsed json object.
            where: ``file:line``, for messages.
            needs: fields that must be there for the stage at hand.

        Raises:
            UserError: a needed field is absent, or a field has the wrong type or spans that do not cover
                the response in order; the message names the line and the field.
        """
        for name in needs:
            if row.get(name) is None:
                raise UserError(f"{where}: field '{name}' is missing", _REMEDIES.get(name))
        values = dict(row)
        # A line without an id (as users' own files often are) is known by its line number.
        identity = values.pop("id", None)
        known: dict[str, Any] = {"id": where.rsplit(":", 1)[-1] if identity is None else str(identity)}
        for name in ("question", "answer", "prompt", "response"):
            value = values.pop(name, None)
            if name == "answer" and isinstance(value, int | float):
                value = str(value)
            if value is not None and not isinstance(value, str):
                raise UserError(f"{where}: field '{name}' must be text, found {type(value).__name__}")
            known[name] = value
        steps = _list(values, "steps", where, lambda v: _build(StepSpan, v))
        if steps is not None:
            _check_cover(steps, known["response"], where)
        known["steps"] = steps
        known["scores"] = scores = _list(values, "scores", where, lambda v: _build(StepScore, v))
        if scores is not None and (steps is None or len(scores) != len(steps)):
            raise UserError(
                f"{where}: field 'scores' has {len(scores)} entries for {len(steps or [])} steps",
                "run `ssrctl critic` again on the segmented file",
            )
        known["advantages"] = _list(values, "advantages", where, _number_or_none)
        final = values.pop("final", None)
        try:
            known["final"] = None if final is None else _build(FinalAnswer, final)
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: field 'final' is malformed: {error}") from error
        return cls(**known, extra=values)


_REMEDIES = {
    "steps": "run `ssrctl segment` first",
    "scores": "run `ssrctl critic` first",
    "response": "each line needs the model's response as text",
    "question": "each line needs the question as text",
    "answer": "each line needs the reference answer",
}


def read_rollouts(
    path: str | Path, *, needs: tuple[str, ...] = (), on_torn: Callable[[str], None] | None = None
) -> Iterator[Rollout]:
    """Yield the rollouts of a jsonl file, checked; see ``read_jsonl`` and ``Rollout.from_dict`` for errors."""
    for where, row in read_jsonl(path, on_torn=on_torn):
        yield Rollout.from_dict(row, where=where, needs=needs)


def _as_json(value: Any) -> Any:
    return dataclasses.asdict(value) if isinstance(value, StepSpan | StepScore | FinalAnswer) else value


def _build(kind: type, value: Any) -> Any:
    """Make a small record from a json object; unknown keys and wrong types are errors."""
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, found {type(value).__name__}")
    allowed = {spec.name for spec in dataclasses.fields(kind)}
    # Keys that a later version adds must not be lost silently, so they are refused rather than dropped.
    if unknown := sorted(set(value) - allowed):
        raise ValueError(f"unknown keys {', '.join(unknown)}")
    made = kind(**value)
    for spec in dataclasses.fields(kind):
        _check_type(spec.name, getattr(made, spec.name), str(spec.type))
    return made


def _check_type(name: str, value: Any, declared: str) -> None:
    if value is None:
        fine = "None" in declared
    elif declared.startswith("int"):
        fine = isinstance(value, int) and not isinstance(value, bool)
    elif declared.startswith("float"):
        fine = isinstance(value, int | float) and not isinstance(value, bool)
    elif declared.startswith("bool"):
        fine = isinstance(value, bool)
    elif declared.startswith("Literal"):
        fine = f"'{value}'" in declared or f'"{value}"' in declared
    else:
        fine = isinstance(value, str)
    if not fine:
        raise TypeError(f"'{name}' must be {declared}, found {value!r}")


def _list(values: dict[str, Any], name: str, where: str, convert: Callable[[Any], Any]) -> list[Any] | None:
    items = values.pop(name, None)
    if items is None:
        return None
    if not isinstance(items, list):
        raise UserError(f"{where}: field '{name}' must be a list, found {type(items).__name__}")
    try:
        return [convert(item) for item in items]
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: field '{name}' is malformed: {error}") from error


def _number_or_none(value: Any) -> float | None:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise TypeError(f"expected a number or null, found {value!r}")


def _check_cover(steps: list[StepSpan], response: str | None, where: str) -> None:
    """Spans are ordered, do not overlap and cover the response exactly."""
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
