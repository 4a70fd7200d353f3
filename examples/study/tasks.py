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
- ``formats``: four operations of the bundled arithmetic, with solutions in four formats, one drawn for each question. The
  start model is the bundled reasoner after a supervised warm-up on them, so that it writes all four. ``48*6-2`` is::

      plain      restated   paired         skipped
      48*6=88    48*6=88    48*6=88-2=86   48*6-2=86
      88-2=86    88
                 88-2=86
                 86

  The first three do the same sums; ``skipped`` has to do two at once.
- ``words``: a pretrained model on word problems, of words.py.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ssrctl import ResponseCritic, Rollout, StepScore, tiny_reasoner
from ssrctl.critics.base import missing, scored
from ssrctl.critics.rule import MISPLACED, RIGHT, WRONG, RuleCritic
from ssrctl.tiny_reasoner.problems import MODULUS, Problem, Split, problems, split_of

from . import words

SEED = 2026
SIZES = {"train": 2000, "valid": 256, "test": 256}
RIGHT_SIGN = 0.7
LONG = 11
WARM_UP = {"long": 300, "conflict": 300}  # supervised steps of 32 problems
NUM_SAMPLES = 4  # for each problem of an evaluation
CONSTANTS = [SEED, SIZES, RIGHT_SIGN, LONG, WARM_UP, NUM_SAMPLES]
# The lines that a solution in each format has: n is a number, o an operator.
FORMATS = {"plain": ["non=n"], "restated": ["non=n", "n"], "paired": ["non=non=n"], "skipped": ["nonon=n"]}
EQUAL = ("plain", "restated", "paired")  # the formats that do the same sums
OF_FORMATS = {"min_ops": 4, "max_ops": 4}
FORMATS_WARM_UP = 300
MORE_CONSTANTS = {  # of one task, to keep the others' keys
    "formats": [FORMATS, OF_FORMATS, FORMATS_WARM_UP],
    "words": words.CONSTANTS,
}
_OPERATION = re.compile(r"([-+*])(\d)(?:=(\d\d))?")
_LINE = re.compile(r"\d\d(?:[-+*]\d(?:=\d\d)?)*[-+*]\d=\d\d")


@dataclass(frozen=True)
class Task:
    """A task's inputs.

    Attributes:
        model: folder of the start model, or ``tiny-reasoner``.
        folder: has train.jsonl, valid.jsonl and test.jsonl.
        critic: scores the steps; None for the rule critic.
        operations: steps before the answer that every problem has; of ``words`` most problems.
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


class AnyFormat(ResponseCritic):
    """The rule critic for lines of one operation or more: the worst of its operations decides about a line.

    A line that restates the last result has no score: there is nothing to compute in it.
    """

    def score(self, rollout: Rollout) -> Sequence[StepScore | float | None]:
        """Return the scores of the steps."""
        question = rollout.question or ""
        value, links = question[:2], [link[:2] for link in _OPERATION.findall(question)]
        found: list[StepScore] = []
        for index, (step, judged) in enumerate(zip(rollout.steps or (), RuleCritic().score(rollout), strict=True)):
            line = rollout.step_text(index).strip()
            if step.kind == "final":
                found.append(judged)
            elif line == value:
                found.append(missing("no_equation"))
            elif not _LINE.fullmatch(line):
                found.append(scored(WRONG, "step"))
            else:
                operations = _OPERATION.findall(line[2:])
                here, links = links[: len(operations)], links[len(operations) :]
                follows = line[:2] == value and [operation[:2] for operation in operations] == here
                found.append(scored((RIGHT if follows else MISPLACED) if _is_true(line) else WRONG, "step"))
                value = line[-2:]
        return found


def _is_true(line: str) -> bool:
    """Compute a line from left to right and compare all results that it writes."""
    exact = int(line[:2])
    for operator, operand, result in _OPERATION.findall(line[2:]):
        exact = {"+": exact + int(operand), "-": exact - int(operand), "*": exact * int(operand)}[operator] % MODULUS
        if result and int(result) != exact:
            return False
    return True


def in_formats(split: Split, num: int, seed: int, **ops: int) -> list[Problem]:
    """Return problems whose solutions have one of the four formats, each as likely as the others."""
    rng = random.Random(f"{seed}/{split}/formats")
    return [in_format(one, rng.choice(list(FORMATS))) for one in problems(split, num, seed, **ops)]


def in_format(problem: Problem, name: str) -> Problem:
    """Return a problem with its solution rewritten in a format."""
    *lines, final = problem.solution.split("\n")
    if name == "restated":
        lines = [part for line in lines for part in (line, line[-2:])]
    elif name != "plain":
        end = -3 if name == "skipped" else None
        lines = [first[:end] + second[2:] for first, second in zip(lines[::2], lines[1::2], strict=True)]
    return replace(problem, solution="\n".join([*lines, final]))


def format_of(response: str) -> str:
    """Return the format of a response by the shapes of its lines, or these shapes if they are those of no format."""
    lines = [line for line in response.split("\n") if line and not line.startswith("####")]
    shapes = list(dict.fromkeys(re.sub("[-+*]", "o", re.sub(r"\d+", "n", line)) for line in lines))
    return next((name for name, wanted in FORMATS.items() if shapes == wanted), ", ".join(shapes))


def build(name: str, work: Path) -> Task:
    """Return a task, and make its files and its start model in ``work`` if they are not there."""
    folder = work / name
    if name == "words":
        return _words(folder)
    made = {"arithmetic": problems, "long": problems, "conflict": alternating, "formats": in_formats}[name]
    more = {"long": {"min_ops": LONG, "max_ops": LONG}, "formats": OF_FORMATS}.get(name, {})
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
        warm_up(made("train", 32 * WARM_UP.get(name, FORMATS_WARM_UP), SEED + 1, **more), model)
    critic = {"conflict": AlternatingSigns, "formats": AnyFormat}.get(name)
    return Task(str(model), folder, critic and critic(), LONG if name == "long" else 4)


def _words(folder: Path) -> Task:
    if not (folder / "test.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows = words.problems(SEED)
        for split in ("train", "valid", "test"):  # what is left over is for training
            size = len(rows) - SIZES["valid"] - SIZES["test"] if split == "train" else SIZES[split]
            _write(folder / f"{split}.jsonl", rows[:size])
            del rows[:size]
    if not (folder / "model" / "model.safetensors").exists():
        words.warm_up(folder / "model", SEED)
    return Task(str(folder / "model"), folder, None, 2)


def _write(path: Path, rows: Sequence[Problem] | Sequence[dict[str, str]]) -> None:
    records = [row.to_record() if isinstance(row, Problem) else row for row in rows]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


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
