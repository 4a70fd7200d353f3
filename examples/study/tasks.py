"""The study's tasks: problems, a start model and a critic each, made once into a folder.

- ``arithmetic``: the bundled reasoner on its own problems (4 or 5 operations).
- ``long``: the same arithmetic with 11 operations, 12 steps with the answer, the most that fit the model's context.
- ``conflict``: alternating signs. The question gives a number and operands without operators, ``48?6?2?9=?``; steps 1, 3,
  5 have to add and steps 2, 4 have to subtract::

      48+6=54
      54-2=52
      52+9=61
      ####61

  After the same text (a number, with the same operand to come) an odd step has to learn ``+`` and an even one ``-``: on
  weights that do not see the position the two gradients are opposite, and their sum cancels. The start model is the
  bundled reasoner after a short supervised warm-up in which each step has the right operator with probability
  ``RIGHT_SIGN`` only, so that it computes well, knows the position weakly, and is often wrong about the operator.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ssrctl import ResponseCritic, Rollout, StepScore, tiny_reasoner
from ssrctl.critics.rule import RuleCritic
from ssrctl.tiny_reasoner.problems import MODULUS, Problem, problems, split_of

SEED = 2026
SIZES = {"train": 2000, "valid": 256, "test": 256}
RIGHT_SIGN = 0.7
LONG = 11
WARM_UP = {"long": 300, "conflict": 300}  # supervised steps of 32 problems
NUM_SAMPLES = 4  # for each problem of an evaluation
CONSTANTS = [SEED, SIZES, RIGHT_SIGN, LONG, WARM_UP, NUM_SAMPLES]


@dataclass(frozen=True)
class Task:
    """A task's inputs.

    Attributes:
        model: folder of the start model, or ``tiny-reasoner``.
        folder: has train.jsonl, valid.jsonl and test.jsonl.
        critic: scores the steps; None for the rule critic.
        operations: steps before the answer that every problem has.
    """

    model: str
    folder: Path
    critic: ResponseCritic | None
    operations: int


class AlternatingSigns(ResponseCritic):
    """The rule critic on the question with the operators that it means: a true step with the wrong sign scores -50."""

    def score(self, rollout: Rollout) -> Sequence[StepScore | float | None]:
        """Return the scores of the steps."""
        return RuleCritic().score(replace(rollout, question=signed(rollout.question or "")))


def signed(question: str) -> str:
    """Return a question with its operators written out: ``48+6-2+9=?`` for ``48?6?2?9=?``."""
    start, *operands = question.removesuffix("=?").split("?")
    return start + "".join(f"{'+-'[place % 2]}{operand}" for place, operand in enumerate(operands)) + "=?"


def alternating(split: str, num: int, seed: int, right_sign: float = 1.0) -> list[Problem]:
    """Return ``num`` different problems of a split; below ``right_sign`` 1 some steps have the wrong sign, with true sums."""
    rng = random.Random(f"{seed}/{split}")
    found: dict[str, Problem] = {}
    while len(found) < num:
        value = rng.randrange(10, 100)
        operands = [rng.choice(range(2, 10)) for _ in range(rng.choice((4, 5)))]
        question = "?".join(map(str, [value, *operands])) + "=?"
        if split_of(question) != split:
            continue
        lines = []
        for place, operand in enumerate(operands):
            adds = (place % 2 == 0) == (rng.random() < right_sign)
            result = (value + operand if adds else value - operand) % MODULUS
            lines.append(f"{value:02d}{'+' if adds else '-'}{operand}={result:02d}")
            value = result
        lines.append(f"####{value:02d}")
        # a question drawn again keeps its place and has its last solution
        name = found[question].id if question in found else f"{split}-{len(found)}"
        found[question] = Problem(id=name, question=question, answer=f"{value:02d}", solution="\n".join(lines))
    return list(found.values())


def build(name: str, work: Path) -> Task:
    """Return a task, and make its files and its start model in ``work`` if they are not there."""
    folder = work / name
    made = {"arithmetic": _arithmetic, "long": _arithmetic, "conflict": alternating}[name]
    more = {"min_ops": LONG, "max_ops": LONG} if name == "long" else {}
    if not (folder / "test.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        heldout = made("heldout", SIZES["valid"] + SIZES["test"], SEED, **more)
        _write(folder / "train.jsonl", made("train", SIZES["train"], SEED, **more))
        _write(folder / "valid.jsonl", heldout[: SIZES["valid"]])
        _write(folder / "test.jsonl", heldout[SIZES["valid"] :])
    if name == "arithmetic":
        return Task("tiny-reasoner", folder, None, 4)
    model = folder / "model"
    if not (model / "model.safetensors").exists():
        if name == "conflict":
            more = {"right_sign": RIGHT_SIGN}
        warm_up(made("train", 32 * WARM_UP[name], SEED + 1, **more), model)
    if name == "conflict":
        return Task(str(model), folder, AlternatingSigns(), 4)
    return Task(str(model), folder, None, LONG)


def _arithmetic(split: str, num: int, seed: int, **more: int) -> list[Problem]:
    return problems(split, num, seed, **more)  # type: ignore[arg-type]


def _write(path: Path, rows: Sequence[Problem]) -> None:
    path.write_text("".join(json.dumps(row.to_record()) + "\n" for row in rows), encoding="utf-8")


def warm_up(rows: Sequence[Problem], folder: Path, rate: float = 1e-3) -> None:
    """Train the bundled reasoner on worked solutions, 32 a step, with a rate that falls to 0; write it to ``folder``."""
    import torch
    import transformers

    sys.path.append(str(Path(__file__).parent.parent / "tiny_reasoner"))
    from warm_up import encode, save

    torch.manual_seed(SEED)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_reasoner.path())
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_reasoner.path(), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    starts = range(0, len(rows), 32)
    for step, start in enumerate(starts):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / len(starts))
        model(**encode(list(rows[start : start + 32]), tokenizer)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    save(model, tokenizer, folder)
