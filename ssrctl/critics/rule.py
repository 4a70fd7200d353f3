"""The deterministic critic: checks the arithmetic of each step and where its numbers come from.

Scores of a step:

- no equality to check: missing (``no_equation``);
- a false equality: -100;
- the bundled task (the record has ``modulus``): a true equality that is not the next operation of the question
  on the previous result: -50; that is: 100;
- other text: true equalities whose numbers all occur in the question or an earlier step: 100; some number
  comes from nowhere: 50, a weak sign, since reading "half" as 2 is no mistake.

A true equality on a wrong earlier result counts as right: the blame stays with the step that erred. The final
answer is right (100) or wrong (0) against the reference; without one it is checked against the last result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from ssrctl.critics.base import missing, scored
from ssrctl.io.records import Rollout, StepScore
from ssrctl.text.answers import check_answer, extract_answer, same_answer
from ssrctl.text.equations import Equality, find_equalities, numbers_in

WRONG, MISPLACED, UNSOURCED, RIGHT = -100.0, -50.0, 50.0, 100.0
_CHAIN = re.compile(r"\s*(\d{1,18})((?:[-+*]\d{1,18})+)\s*=\s*\?\s*")
_LINK = re.compile(r"([-+*])(\d+)")
_WORDS = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "dozen": 12, "twenty": 20, "thirty": 30, "hundred": 100, "half": 2,
    "twice": 2, "double": 2, "triple": 3, "third": 3, "quarter": 4, "week": 7, "year": 12, "percent": 100,
}  # fmt: skip
_WORD = re.compile(r"[a-z]+")


class RuleCritic:
    """See the module's text."""

    def score(self, rollouts: Sequence[Rollout], on_done: Callable[[int], None] | None = None) -> list[list[StepScore]]:
        out = []
        for rollout in rollouts:
            out.append(_score_one(rollout))
            if on_done is not None:
                on_done(1)
        return out


def _score_one(rollout: Rollout) -> list[StepScore]:
    modulus = rollout.extra.get("modulus")
    modulus = modulus if isinstance(modulus, int) and modulus > 1 else None
    chain = _parse_chain(rollout.question or "") if modulus else None
    known = set(numbers_in(rollout.question or "")) | _numbers_as_words(rollout.question or "")
    scores: list[StepScore] = []
    last: Fraction | None = None if chain is None else chain[0]
    for index, step in enumerate(rollout.steps or ()):
        text = rollout.step_text(index)
        equalities = find_equalities(text)
        if step.kind == "final":
            scores.append(_score_final(rollout, text, last))
        elif not equalities:
            scores.append(missing("no_equation"))
        elif chain is not None:
            scores.append(_score_link(equalities, index, chain[1], last, modulus))
        else:
            scores.append(_score_text(equalities, known, modulus))
        known |= set(numbers_in(text))
        if equalities:
            last = equalities[-1].right
    return scores


def _score_link(
    equalities: list[Equality], index: int, links: list[tuple[str, int]], last: Fraction | None, modulus: int | None
) -> StepScore:
    """One operation of the bundled task: ``last operator operand = result``."""
    if not all(equality.holds(modulus) for equality in equalities):
        return scored(WRONG, "step", "the equality is false")
    first = equalities[0]
    if len(equalities) > 1 or len(first.operands) != 2 or index >= len(links):
        return scored(MISPLACED, "step", "true, but not one operation of the question")
    operator, operand = links[index]
    if last is not None and first.operands[0] != last:
        return scored(MISPLACED, "step", "true, but not about the previous result")
    if first.operators != (operator,) or first.operands[1] != operand:
        return scored(MISPLACED, "step", f"true, but the question has {operator}{operand} here")
    return scored(RIGHT, "step", "true and next in the question")


def _score_text(equalities: list[Equality], known: set[Fraction], modulus: int | None) -> StepScore:
    wrong = sum(not equality.holds(modulus) for equality in equalities)
    if wrong:
        return scored(WRONG, "step", f"{wrong} of {len(equalities)} equalities are false")
    sourced = set(known)
    for equality in equalities:
        if any(operand not in sourced for operand in equality.operands):
            return scored(UNSOURCED, "step", "true, but with a number that was not given")
        sourced |= {value for value in (equality.left, equality.right) if value is not None}
    return scored(RIGHT, "step", "true and from known numbers")


def _score_final(rollout: Rollout, text: str, last: Fraction | None) -> StepScore:
    found = extract_answer(text)
    if found is None:
        return missing("no_answer")
    if rollout.answer is not None:
        right = check_answer(text, rollout.answer).correct
        return scored(100.0 if right else 0.0, "final", "right answer" if right else "wrong answer")
    if last is None:
        return missing("no_reference")
    agrees = same_answer(found.value, str(last))
    return scored(100.0 if agrees else 0.0, "final", "no reference; compared with the last result")


def _parse_chain(question: str) -> tuple[Fraction, list[tuple[str, int]]] | None:
    """``48*6-2=?`` as (48, [("*", 6), ("-", 2)]); None for any other question."""
    match = _CHAIN.fullmatch(question)
    if match is None:
        return None
    return Fraction(match.group(1)), [(operator, int(number)) for operator, number in _LINK.findall(match.group(2))]


def _numbers_as_words(text: str) -> set[Fraction]:
    return {Fraction(_WORDS[word]) for word in _WORD.findall(text.lower()) if word in _WORDS}
