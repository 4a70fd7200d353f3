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
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal, get_args

Split = Literal["train", "heldout"]

MODULUS = 100
FIRST_START, LAST_START = 10, 99
OPERATORS = "+-*"
OPERANDS = range(2, 10)  # 0 and 1 would make steps that need no arithmetic
HELDOUT_ONE_IN = 8


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


def problems(split: Split, num: int, seed: int, min_ops: int = 4, max_ops: int = 5) -> list[Problem]:
    """Return `num` different problems of `split` with `min_ops` to `max_ops` operations each.

    The same arguments always give the same list, and a longer list starts with the shorter one.
    `num=0` gives an empty list. Only the question itself decides whether it is held out, so
    the two splits are disjoint whatever the seeds. Asking for more than half of the questions that
    a split has is a ValueError.
    """
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}; use one of {', '.join(get_args(Split))}")
    if not 1 <= min_ops <= max_ops:
        raise ValueError(f"need 1 <= min_ops <= max_ops, got {min_ops} and {max_ops}")
    if num < 0:
        raise ValueError(f"num is {num}; it cannot be negative")
    # Drawing until a new question turns up stays cheap only while at least half of them are left.
    available = _expected_size(split, min_ops, max_ops) // 2
    if num > available:
        raise ValueError(
            f"{num} {split} problems of {min_ops} to {max_ops} operations were asked for, but at "
            f"most {available} are given; ask for fewer or raise max_ops"
        )
    found: dict[str, Problem] = {}
    draws = _draws(_rng(seed, f"tiny-arithmetic/{split}"), min_ops, max_ops)
    while len(found) < num:
        start, operations = next(draws)
        problem = _problem(start, operations)
        if problem.id.startswith(f"{split}-"):
            found.setdefault(problem.question, problem)
    return list(found.values())


def split_of(question: str) -> Split:
    """Return the split that a question belongs to: one question in eight is held out, by its hash."""
    return "heldout" if int(_digest(question), 16) % HELDOUT_ONE_IN == 0 else "train"


def _problem(start: int, operations: list[tuple[str, int]]) -> Problem:
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
    return Problem(
        id=f"{split_of(question)}-{_digest(question)[:12]}",
        question=question,
        answer=answer,
        solution="\n".join([*lines, f"####{answer}"]),
    )


def _apply(value: int, operator: str, operand: int) -> int:
    results = {"+": value + operand, "-": value - operand, "*": value * operand}
    return results[operator] % MODULUS


def _two_digits(value: int) -> str:
    return f"{value:02d}"


def _draws(rng: random.Random, min_ops: int, max_ops: int) -> Iterator[tuple[int, list[tuple[str, int]]]]:
    """Yield random questions without end: the number of operations first, then everything uniformly."""
    while True:
        num_ops = rng.randrange(min_ops, max_ops + 1)
        start = rng.randrange(FIRST_START, LAST_START + 1)
        yield (
            start,
            [
                (OPERATORS[rng.randrange(len(OPERATORS))], OPERANDS[rng.randrange(len(OPERANDS))])
                for _ in range(num_ops)
            ],
        )


def _expected_size(split: Split, min_ops: int, max_ops: int) -> int:
    choices = len(OPERATORS) * len(OPERANDS)
    num_starts = LAST_START - FIRST_START + 1
    total: int = sum(num_starts * choices**num_ops for num_ops in range(min_ops, max_ops + 1))
    heldout = total // HELDOUT_ONE_IN
    return heldout if split == "heldout" else total - heldout


def _rng(seed: int, purpose: str) -> random.Random:
    return random.Random(int(_digest(f"{seed}/{purpose}"), 16))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
