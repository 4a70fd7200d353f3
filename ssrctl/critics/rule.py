"""The rule critic: checks the arithmetic of each step and where its numbers come from.

Scores of a step:

- no equality to check: missing (``no_equation``);
- a false equality, or a number copied wrongly out of a calculator mark ``<<48/2=24>>24``: -100;
- the bundled task (the record has ``modulus``): a true equality scores 100 if it is the next operation of the question
  on the previous result, and -50 if it is not;
- other text: true equalities score 100 if all their numbers come from the question, an earlier step or common
  knowledge (60 where the text mentions minutes), and 50, a weak sign, if some number has no known origin.

A true equality on a wrong earlier result counts as right: the blame stays with the step that erred. The final
answer is right (100) or wrong (0) against the reference; without one it is checked against the last result.
Errors that arithmetic cannot show (the wrong operation, a misread question) go unnoticed.
"""

from __future__ import annotations

import re
from fractions import Fraction

from ssrctl.configs import CriticOptions
from ssrctl.critics.base import CriticResources, ResponseCritic, missing, scored
from ssrctl.io.records import Rollout, StepScore
from ssrctl.text.answers import Extraction, check_answer
from ssrctl.text.equations import Equality, find_equalities
from ssrctl.text.quantities import given_numbers, numbers_of_words

WRONG, MISPLACED, UNSOURCED, RIGHT = -100.0, -50.0, 50.0, 100.0
_CHAIN = re.compile(r"\s*(\d{1,18})((?:[-+*]\d{1,18})+)\s*=\s*\?\s*")
_LINK = re.compile(r"([-+*])(\d+)")
# Needed to halve, to subtract a share from the whole and to convert percent to a share; they carry no information.
_COMMON = frozenset(Fraction(number) for number in (0, 1, 2, 100))


class RuleCritic(ResponseCritic):
    """The critic that the module's docstring describes."""

    def __init__(self, answer_extraction: Extraction = "strict") -> None:
        self.answer_extraction = answer_extraction

    @classmethod
    def create(cls, options: CriticOptions, resources: CriticResources) -> RuleCritic:
        """Return the critic; it needs no resources."""
        return cls(options.answer_extraction)

    def score(self, rollout: Rollout) -> list[StepScore]:
        """Return the score of each step."""
        return _score_one(rollout, self.answer_extraction)


def _score_one(rollout: Rollout, answer_extraction: Extraction) -> list[StepScore]:
    question = rollout.question or ""
    modulus = rollout.extra.get("modulus")
    modulus = modulus if isinstance(modulus, int) and modulus > 1 else None
    chain = _parse_chain(question) if modulus else None
    known = given_numbers(question)
    scores: list[StepScore] = []
    last: Fraction | None = None if chain is None else chain[0]
    for index, step in enumerate(rollout.steps or ()):
        text = rollout.step_text(index)
        # A number that was copied correctly proves nothing.
        equalities = [each for each in find_equalities(text) if each.operators or not each.holds(modulus)]
        if step.kind == "final":
            scores.append(_score_final(rollout, text, last, answer_extraction))
        elif not equalities:
            scores.append(missing("no_equation"))
        elif chain is not None:
            scores.append(_score_link(equalities, index, chain[1], last, modulus))
        else:
            scores.append(_score_text(equalities, known | numbers_of_words(text), modulus))
        known |= given_numbers(text)
        if equalities:
            last = equalities[-1].right
    return scores


def _score_link(
    equalities: list[Equality], index: int, links: list[tuple[str, int]], last: Fraction | None, modulus: int | None
) -> StepScore:
    """Score one operation of the bundled task: ``last operator operand = result``."""
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
    sourced = known | _COMMON
    for equality in equalities:
        if any(operand not in sourced for operand in equality.operands):
            return scored(UNSOURCED, "step", "true, but with a number that was not given")
        sourced |= {abs(value) for value in (equality.left, equality.right) if value is not None}
    return scored(RIGHT, "step", "true and from known numbers")


def _score_final(rollout: Rollout, text: str, last: Fraction | None, answer_extraction: Extraction) -> StepScore:
    reference = rollout.answer if rollout.answer is not None or last is None else str(last)
    verdict = check_answer(text, reference, extraction=answer_extraction)
    if reference is None:
        return missing("no_reference" if verdict.extracted is not None else "no_answer")
    if verdict.correct is None:
        return missing("answer_timeout")
    why = "right answer" if verdict.correct else "wrong answer"
    if rollout.answer is None:
        why = "no reference; compared with the last result"
    return scored(100.0 if verdict.correct else 0.0, "final", why)


def _parse_chain(question: str) -> tuple[Fraction, list[tuple[str, int]]] | None:
    """Parse ``48*6-2=?`` into (48, [("*", 6), ("-", 2)]); None for any other question."""
    match = _CHAIN.fullmatch(question)
    if match is None:
        return None
    return Fraction(match.group(1)), [(operator, int(number)) for operator, number in _LINK.findall(match.group(2))]
