"""Accuracy of the rule critic: false alarms on correct solutions, planted errors, and a real model's mistakes.

GSM8K's own solutions are right, so every step that the critic calls false is a false alarm (or an author's slip). In
each of them one calculator result is then changed, in the mark and where it is copied. Last, the responses of a real
model are segmented and scored, and a false equality is held against whether the final answer is right.

    python benchmarks/rule_critic.py [--data FOLDER]

The data sets are read from $SSRCTL_DATA, or shared/data beside the repository.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from common import table

from ssrctl.critics.base import score_all
from ssrctl.critics.calibration.retest import auc
from ssrctl.critics.rule import WRONG, RuleCritic
from ssrctl.io.records import Rollout, StepScore, StepSpan
from ssrctl.text.segment import segment

MARK = re.compile(r"<<([^<>=]*)=([^<>=]*)>>([\d.,]*\d)")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = os.environ.get("SSRCTL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
    options.add_argument("--data", type=Path, default=Path(folder), help="where the jsonl files are")
    data = options.parse_args().data
    if not data.is_dir():
        sys.exit(f"no data folder at {data}: give --data FOLDER or set SSRCTL_DATA")
    solutions(data)
    responses(data)


def rows(data: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def by_line(row: dict[str, Any], text: str) -> Rollout:
    ends = [match.end() for match in re.finditer(r"[^\n]*\n|[^\n]+$", text)]
    steps = [StepSpan(start=a, end=b) for a, b in zip([0, *ends], ends, strict=False)]
    return Rollout(id=row["id"], question=row["question"], answer=row["answer"], response=text, steps=steps)


def judge(rollouts: list[Rollout]) -> list[list[StepScore]]:
    return score_all(RuleCritic(), rollouts)


def solutions(data: Path) -> None:
    """Count false alarms and planted errors."""
    shown = []
    for name in ("gsm8k_train", "gsm8k_test"):
        given = rows(data, name)
        scores = [score for mine in judge([by_line(row, row["solution"]) for row in given]) for score in mine]
        false = sum(score.score == WRONG for score in scores)
        silent = sum(score.score is None for score in scores)
        altered = list(changed(given))
        found = sum(
            mine[line].score == WRONG for (_, line), mine in zip(altered, judge([r for r, _ in altered]), strict=True)
        )
        shares = [f"{false / len(scores):.2%}", f"{silent / len(scores):.1%}", f"{found / len(altered):.3f}"]
        shown.append([name, str(len(scores)), str(false), *shares])
    print(table(["solutions", "steps", "called false", "share", "not judged", "changed results found"], shown))


def changed(given: list[dict[str, Any]]) -> Iterator[tuple[Rollout, int]]:
    """Yield each solution with one result changed, and the number of its line."""
    generator = random.Random(0)
    for row in given:
        text = row["solution"]
        marks = list(MARK.finditer(text))
        if not marks:
            continue
        mark = generator.choice(marks)
        try:
            value = Fraction(mark[2].strip().replace(",", ""))
        except ValueError:
            continue
        decimals = len(mark[2].strip().partition(".")[2])
        new = value + generator.choice([-1, 1]) * generator.choice([1, 2, 5, 10]) * Fraction(1, 10**decimals)
        written = f"{float(new):.{decimals}f}"
        other = text[: mark.start()] + f"<<{mark[1]}={written}>>{written}" + text[mark.end() :]
        yield by_line(row, other), text[: mark.start()].count("\n")


def responses(data: Path) -> None:
    """Compare the critic's verdicts on a model's responses with the correctness of their final answers."""
    given = rows(data, "gsm8k_model_responses")
    rollouts = [
        Rollout(
            id=r["id"], question=r["question"], answer=r["answer"], response=r["response"], steps=segment(r["response"])
        )
        for r in given
    ]
    verdicts: Counter[tuple[str, bool]] = Counter()
    means: dict[bool, list[float]] = {True: [], False: []}
    for row, rollout, scores in zip(given, rollouts, judge(rollouts), strict=True):
        assert rollout.steps is not None
        known = [
            s.score
            for s, step in zip(scores, rollout.steps, strict=True)
            if step.kind == "step" and s.score is not None
        ]
        verdict = "a false equality" if WRONG in known else "none" if known else "nothing to check"
        verdicts[verdict, row["is_correct"]] += 1
        if known:
            means[row["is_correct"]].append(statistics.fmean(known))
    kinds = ["a false equality", "none", "nothing to check"]
    print(
        table(
            ["responses with", "right", "wrong"], [[k, str(verdicts[k, True]), str(verdicts[k, False])] for k in kinds]
        )
    )
    print(f"AUC of the mean step score against the outcome: {auc(means[True], means[False]):.3f}")


if __name__ == "__main__":
    main()
