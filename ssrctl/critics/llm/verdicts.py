"""The schema of a judge's reply, and a parser that accepts only scores that it can verify."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ssrctl.critics.base import missing, scored
from ssrctl.io.records import StepScore

MAX_RATIONALE_CHARS = 300
MAX_REPLY_CHARS = 1_000_000  # more than any model writes; a server's reply has no bound
MAX_LISTED = 20  # steps that a problem names

_OBJECT = re.compile(r'\{\s*"')  # does not match braces of LaTeX or prose
_FENCE = "```"
_END_OF_FENCE = "` \t\r\n"
_THINKING, _THOUGHT = "<think>", "</think>"
# A string of json whatever its escapes, or a comma before a closing bracket.
_STRING_OR_TRAILING_COMMA = re.compile(r'"(?:[^"\\]|\\.)*"|,(?=\s*[}\]])', re.DOTALL)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_NUMBER = re.compile(r"\s*[+-]?\d+(\.\d+)?\s*")
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]+")


class StepVerdict(BaseModel):
    """The verdict on one step."""

    # Providers want every key required and no others, and refuse bounds on numbers and lengths. The reason comes
    # before the score, so that the score can follow from it.
    model_config = ConfigDict(extra="forbid", strict=True)
    index: int = Field(description="the number in the step's heading")
    rationale: str = Field(description="the reason, in at most 20 words")
    score: float = Field(description="-100 to 100 for a step, 0 to 100 for the final answer")


class Verdicts(BaseModel):
    """One verdict for every step that is to be scored."""

    model_config = ConfigDict(extra="forbid", strict=True)
    scores: list[StepVerdict]


@dataclass(frozen=True)
class ParsedReply:
    """The scores in a reply.

    Attributes:
        scores: one per wanted step, in their order; unreadable ones are missing, with their class.
        problem: the fault, as the judge is told it, without any word of the reply; None when every wanted step has
            its score.
    """

    scores: list[StepScore]
    problem: str | None

    @property
    def num_scored(self) -> int:
        """Number of steps that have a score."""
        return sum(score.reward is not None for score in self.scores)


def parse_verdicts(reply: str, wanted: Sequence[tuple[int, str]]) -> ParsedReply:
    """Parse a judge's reply. Each score is the one that the reply gives under that index, or missing; never raises.

    Slips of judges without structured output are read where they leave no doubt: backslashes of LaTeX that json does
    not know, trailing commas, numbers in quotation marks, further keys with plain values, thinking that ends in ``</think>`` without an
    opening tag, and prose after the code fence that holds the object. A wrong index or a score out of range is never
    guessed.

    Error classes for all steps: ``bad_json`` (the reply does not end in a json object with "scores", or contains a
    broken object), ``bad_schema`` ("scores" is not a list of objects, or not the only list or object), ``bad_index`` (an index that was not requested:
    a judge that counts from 0 means another step by every index), ``duplicate_index`` (two entries for a step, as when
    a quoted step breaks out of its quotation marks). For one step: ``missing_index``, ``bad_schema`` (a score that is
    not a number, a rationale that is not text, a duplicate key) and ``out_of_range`` (also NaN and infinities).

    Args:
        reply: a json object, possibly after prose or thinking, possibly in a code fence.
        wanted: number (from 1) and kind (``step`` or ``final``) of each requested step.
    """
    found, problem = _find_object(reply[:MAX_REPLY_CHARS])
    if found is None:
        return _all_missing("bad_json", wanted, problem)
    items = found["scores"]
    # A quoted step that breaks out of its quotation marks could leave the judge's own entries under another key.
    if any(isinstance(value, list | dict) for key, value in found.items() if key != "scores"):
        return _all_missing("bad_schema", wanted, 'the JSON object has other lists or objects than "scores"')
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        return _all_missing("bad_schema", wanted, '"scores" is not a list of objects')
    by_number: dict[int, list[dict[str, Any]]] = {number: [] for number, _ in wanted}
    for item in items:
        index = _plain_number(item.get("index"))
        if type(index) is not int or index not in by_number:
            asked = f"asked for: {_listed(list(by_number))}, counted from 1"
            return _all_missing("bad_index", wanted, f'an "index" is not one of those {asked}')
        by_number[index].append(item)
    if duplicates := [number for number, mine in by_number.items() if len(mine) > 1]:
        return _all_missing("duplicate_index", wanted, f"more than one entry for step {_listed(duplicates)}")
    scores = [_read_one(by_number[number], kind) for number, kind in wanted]
    return ParsedReply(scores, _describe(scores, wanted))


class _AmbiguousObject(dict[str, Any]):
    """A json object with a duplicate key: parsers differ on its value."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    return made if len(made) == len(pairs) else _AmbiguousObject(made)


def _find_object(reply: str) -> tuple[dict[str, Any] | None, str]:
    """Return the json object with "scores" that ends ``reply``, or None and the reason why none can be trusted.

    A judge that quotes a step may leave the step's own json in its reply: before its verdict, in a broken object when
    it does not escape quotation marks, or in place of the verdict, with words about it after. So an object that cannot
    be parsed ends the search, and only the end of a code fence may follow the object that is returned; words may follow
    a fence that the object fills, if it is the only one in the reply.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    reply = _without_thinking(reply)
    if not reply:
        return None, "it ends before the JSON object"
    reply, place = _without_slips(reply), 0
    while match := _OBJECT.search(reply, place):
        try:
            value, place = decoder.raw_decode(reply, match.start())
        except (ValueError, RecursionError):
            return None, "it is not valid JSON, or ends within it"
        if "scores" not in value:
            continue
        if isinstance(value, _AmbiguousObject):
            return None, "a key occurs twice in the JSON object"
        if reply[place:].strip(_END_OF_FENCE) and not _fills_the_only_fence(reply, match.start(), place):
            return None, "something follows the JSON object"
        return value, ""
    return None, 'it holds no JSON object with the key "scores"'


def _without_thinking(reply: str) -> str:
    """Return the text after the thinking; nothing when it does not end.

    The template of some servers holds the opening tag. A reply that begins with the object is not thinking, since a
    rationale may quote the closing tag.
    """
    head, end, rest = reply.partition(_THOUGHT)
    if reply.lstrip().startswith(_THINKING):
        return rest
    return rest if end and not head.lstrip().startswith(("{", "[", _FENCE)) else reply


def _without_slips(reply: str) -> str:
    """Return the reply with trailing commas dropped, and with backslashes doubled that json does not know."""

    def mended(match: re.Match[str]) -> str:
        if match[0] == ",":
            return ""
        return _ESCAPE.sub(
            lambda escape: escape[0] if escape[1][0] in '"\\/bfnrt' or escape[1][1:] else f"\\{escape[0]}", match[0]
        )

    return _STRING_OR_TRAILING_COMMA.sub(mended, reply)


def _fills_the_only_fence(reply: str, start: int, stop: int) -> bool:
    """Return True if the object is all that the only code fence of the reply holds."""
    opened = reply[:start].rstrip().removesuffix("json").rstrip(" ").endswith(_FENCE)
    return (
        opened
        and reply.count(_FENCE) == 2
        and reply[stop:].lstrip().startswith(_FENCE)
        and not _OBJECT.search(reply, stop)
    )


def _plain_number(value: Any) -> Any:
    """Return a number that stands in quotation marks as a number, anything else as it is."""
    if not isinstance(value, str) or not _NUMBER.fullmatch(value):
        return value
    return float(value) if "." in value else int(value)


def _read_one(items: list[dict[str, Any]], kind: str) -> StepScore:
    if not items:
        return missing("missing_index")
    (item,) = items
    score, rationale = _plain_number(item.get("score")), item.get("rationale")
    if not isinstance(score, int | float) or isinstance(score, bool):
        return missing("bad_schema")
    if not isinstance(rationale, str | None) or isinstance(item, _AmbiguousObject):
        return missing("bad_schema")
    try:
        value = float(score)
    except OverflowError:  # json's integers have no upper limit
        return missing("out_of_range")
    text = _UNPRINTABLE.sub(" ", (rationale or "")[:MAX_RATIONALE_CHARS]).strip()
    return scored(value, kind, text or None)


def _all_missing(error: str, wanted: Sequence[tuple[int, str]], problem: str) -> ParsedReply:
    return ParsedReply([missing(error) for _ in wanted], problem if wanted else None)


def _describe(scores: list[StepScore], wanted: Sequence[tuple[int, str]]) -> str | None:
    """Return the failures of single steps in words, grouped by class; None when there are none."""
    steps: dict[str, list[int]] = defaultdict(list)
    for score, (number, kind) in zip(scores, wanted, strict=True):
        if score.error is not None:
            steps[f"{score.error} {kind}" if score.error == "out_of_range" else score.error].append(number)
    return "; ".join(_WORDS[error].format(steps=_listed(numbers)) for error, numbers in steps.items()) or None


_WORDS = {
    "missing_index": "no entry for step {steps}",
    "bad_schema": 'no number as "score", no text as "rationale", or a key twice, in the entry of step {steps}',
    "out_of_range step": "a score that is not between -100 and 100 for step {steps}",
    "out_of_range final": "a score that is not between 0 and 100 for the final answer, step {steps}",
}


def _listed(numbers: list[int]) -> str:
    more = len(numbers) - MAX_LISTED
    return ", ".join(map(str, numbers[:MAX_LISTED])) + (f" and {more} more" if more > 0 else "")
