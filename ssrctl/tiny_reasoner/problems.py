"""Multi-step modular arithmetic, the dataset `tiny-arithmetic`.

A question starts from a two-digit number and applies one-digit operands strictly from left to
right (no operator precedence), reducing modulo 100 after every operation:

    question   48*6-2*9+2-3=?
    solution   48*6=88        one operation a line
               88-2=86
               86*9=74
               74+2=76
               76-3=73
               ####73         the final answer, after four number signs

The start and every result are written with exactly two digits (`07`, not `7`), operands with one.
So a line is always seven characters, which lets a two-layer model find the number it needs at a
fixed distance. Answers are written the same way.

Three variants leave the distribution that the model was warmed up on, or that a run trains on:

- ``longer``: six to eight operations; the others have four or five.
- ``numbers``: starts below 10 and operands from 0; the others start from 10 on, with operands from 2.
- ``order``: of the orders of operators (`+*-+`) one in eight is held out, instead of one question in eight. A model that
  trains on its train split never sees an order of its held-out split; the warm-up saw all orders.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal, get_args

Split = Literal["train", "heldout"]
Variant = Literal["longer", "numbers", "order"]

MODULUS = 100
OPERATORS = "+-*"
HELDOUT_ONE_IN = 8


@dataclass(frozen=True)
class _Range:
    """The questions that are drawn from: numbers of operations, starts and operands."""

    num_ops: range
    starts: range = range(10, 100)
    operands: range = range(2, 10)  # 0 and 1 would make steps that need no arithmetic

    @property
    def size(self) -> int:
        """The number of different questions."""
        choices = len(OPERATORS) * len(self.operands)
        return sum(len(self.starts) * choices**num_ops for num_ops in self.num_ops)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One question with its worked solution.

    Example: `Problem(id="train-0b9c2e41d7aa", question="48*6-2=?", answer="86",
    solution="48*6=88\\n88-2=86\\n####86")`.
    """

    id: str
    question: str
    answer: str
    solution: str
    modulus: int = MODULUS

    def to_record(self) -> dict[str, str | int]:
        """Return the problem as one jsonl line, with the field names above."""
        return asdict(self)


def problems(
    split: Split, num: int, seed: int, min_ops: int = 4, max_ops: int = 5, *, variant: Variant | None = None
) -> list[Problem]:
    """Return `num` different problems of `split` with `min_ops` to `max_ops` operations each.

    The same arguments always give the same list, and a longer list starts with the shorter one.
    `num=0` gives an empty list. Only the question itself decides whether it is held out, so
    the two splits are disjoint whatever the seeds. The variant `longer` has numbers of operations of its own. Asking
    for more than half of the questions that a split has is a ValueError.
    """
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}; use one of {', '.join(get_args(Split))}")
    if variant is not None and variant not in get_args(Variant):
        raise ValueError(f"variant is {variant!r}; use one of {', '.join(get_args(Variant))}")
    if not 1 <= min_ops <= max_ops:
        raise ValueError(f"need 1 <= min_ops <= max_ops, got {min_ops} and {max_ops}")
    if num < 0:
        raise ValueError(f"num is {num}; it cannot be negative")
    # Drawing until a new question turns up stays cheap only while at least half of them are left.
    drawn = _range(variant, min_ops, max_ops)
    heldout = drawn.size // HELDOUT_ONE_IN
    available = (heldout if split == "heldout" else drawn.size - heldout) // 2
    if num > available:
        raise ValueError(
            f"{num} {split} problems of {min_ops} to {max_ops} operations were asked for, but at "
            f"most {available} are given; ask for fewer or raise max_ops"
        )
    found: dict[str, Problem] = {}
    named = [name for name in ("tiny-arithmetic", variant, split) if name]
    draws = _draws(_rng(seed, "/".join(named)), drawn)
    while len(found) < num:
        problem = _problem(*next(draws), variant)
        if split_of(problem.question, variant) == split:
            found.setdefault(problem.question, problem)
    return list(found.values())


def split_of(question: str, variant: Variant | None = None) -> Split:
    """Return the split that a question belongs to: one question in eight, or order of operators, is held out by its hash."""
    decisive = order_of(question) if variant == "order" else question
    return "heldout" if int(_digest(decisive), 16) % HELDOUT_ONE_IN == 0 else "train"


def order_of(question: str) -> str:
    """Return the operators of a question in order: `*-` of `48*6-2=?`."""
    return "".join(character for character in question if character in OPERATORS)


def _range(variant: Variant | None, min_ops: int, max_ops: int) -> _Range:
    if variant == "longer":
        return _Range(range(6, 9))
    if variant == "numbers":
        return _Range(range(min_ops, max_ops + 1), starts=range(10), operands=range(10))
    return _Range(range(min_ops, max_ops + 1))


def _problem(start: int, operations: list[tuple[str, int]], variant: Variant | None) -> Problem:
    value = start
    expression = _two_digits(start)
    lines = []
    for operator, operand in operations:
        result = _apply(value, operator, operand)
        lines.append(f"{_two_digits(value)}{operator}{operand}={_two_digits(result)}")
        expression += f"{operator}{operand}"
        value = result
    question = f"{expression}=?"
    answer = _two_digits(value)
    named = [name for name in (variant, split_of(question, variant)) if name]
    return Problem(
        id=f"{'-'.join(named)}-{_digest(question)[:12]}",
        question=question,
        answer=answer,
        solution="\n".join([*lines, f"####{answer}"]),
    )


def _apply(value: int, operator: str, operand: int) -> int:
    results = {"+": value + operand, "-": value - operand, "*": value * operand}
    return results[operator] % MODULUS


def _two_digits(value: int) -> str:
    return f"{value:02d}"


def _draws(rng: random.Random, drawn: _Range) -> Iterator[tuple[int, list[tuple[str, int]]]]:
    """Yield random questions without end: the number of operations first, then everything uniformly."""
    while True:
        num_ops = rng.choice(drawn.num_ops)
        start = rng.choice(drawn.starts)
        yield start, [(rng.choice(OPERATORS), rng.choice(drawn.operands)) for _ in range(num_ops)]


def _rng(seed: int, purpose: str) -> random.Random:
    return random.Random(int(_digest(f"{seed}/{purpose}"), 16))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
