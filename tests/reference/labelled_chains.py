"""Labelled solutions of the bundled task: right chains, and chains with one wrong step, the rest following from it."""

from __future__ import annotations

import random
from typing import Any

from ssrctl.tiny_reasoner.problems import MODULUS, problems

APPLY = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def labelled_chains(num: int, seed: int, wrong_frac: float = 0.5) -> list[dict[str, Any]]:
    """Rows in ProcessBench's form, every one to another problem.

    A wrong step either has a false result or uses another operand than the question; the steps after it go on from
    its result. The final answer stands in the last step. ``modulus`` is what the rule critic knows the task by.
    """
    draw = random.Random(seed)
    return [_row(problem, draw, draw.random() < wrong_frac) for problem in problems("train", num, seed)]


def as_record(row: dict[str, Any]) -> dict[str, Any]:
    """A row in the form of our own records, with the final answer as a step of its own."""
    steps = [*row["steps"][:-1], *row["steps"][-1].split("\n")]
    spans, position = [], 0
    for index, step in enumerate(steps):
        last = index + 1 == len(steps)
        end = position + len(step) + (not last)
        spans.append({"start": position, "end": end, "kind": "final" if last else "step"})
        position = end
    made = {key: row[key] for key in ("id", "modulus", "label")}
    final = {"extracted": steps[-1].strip("#"), "correct": row["final_answer_correct"]}
    more = {"question": row["problem"], "answer": row["reference"], "final": final}
    return made | more | {"response": "\n".join(steps), "steps": spans}


def _row(problem: Any, draw: random.Random, wrong: bool) -> dict[str, Any]:
    lines = problem.solution.split("\n")[:-1]
    label = draw.randrange(len(lines)) if wrong else -1
    value = int(lines[0][:2])
    steps = []
    for index, line in enumerate(lines):
        operator, operand = line[2], int(line[3])
        if index == label and draw.random() < 0.5:
            operand = draw.choice([other for other in range(2, 10) if other != operand])
            result = APPLY[operator](value, operand) % MODULUS
        else:
            slip = draw.randrange(1, MODULUS) if index == label else 0
            result = (APPLY[operator](value, operand) + slip) % MODULUS
        steps.append(f"{value:02d}{operator}{operand}={result:02d}")
        value = result
    steps[-1] += f"\n####{value:02d}"
    return {
        "id": problem.id,
        "generator": "none",
        "problem": problem.question,
        "steps": steps,
        "label": label,
        "final_answer_correct": f"{value:02d}" == problem.answer,
        "modulus": MODULUS,
        "reference": problem.answer,
    }
