"""Accuracy and speed of cutting running text into steps.

Solutions that came with one step per line are given their newlines as spaces, and the cuts are compared with where the
lines began. A true boundary is found if a cut lies within two characters of it; a cut that belongs to none is invented
(many are true sentence ends inside a line, counted apart). Beside it the plain sentence splitter: a cut after every
full stop, exclamation or question mark that a capital follows. Problem texts, which have no lines of steps, show whether
ordinary prose is cut where no sentence ends.

The speed is that of one process on UTF-8 bytes, for every style, and on texts made to hurt; there the time for twice
the text shows whether it stays linear. Counted is the processor time of the process, so that other work on the machine
does not count as ours.

    python benchmarks/segmentation.py [--data FOLDER] [--repeats 5]

The data sets are read from $SSRCTL_DATA, or shared/data beside the repository.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from common import goal, machine, table

from ssrctl.text.segment import Style, segment

TOLERANCE = 2
STEP_SETS = (("gsm8k_train", "solution"), ("gsm8k_test", "solution"), ("gsm8k_model_responses", "response"))
PROSE_SETS = (("math500", "question"), ("aime_1983_2024", "question"), ("svamp", "Body"), ("multiarith", "input"))
STYLES: tuple[Style, ...] = ("auto", "newline", "paragraph")
HOSTILE = ["(", "$", "$a ", ". ", "7", "=5 ", "a\n", "\\[", "`a", "| a |\n", "1. ", "A. B ", "<think>", "。", "So a "]
HOSTILE_CHARS = 200_000
PLAIN = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
ENDS_SENTENCE = re.compile(r"[.!?;:][\"'”’)\]$\\,]*\s*$")


def main() -> None:
    given = arguments()
    if not given.data.is_dir():
        sys.exit(f"no data folder at {given.data}: give --data FOLDER or set SSRCTL_DATA")
    print(machine())
    quality(given.data)
    prose(given.data)
    speed(given.data, given.repeats)
    linearity(given.repeats)


def arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = os.environ.get("SSRCTL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
    options.add_argument("--data", type=Path, default=Path(folder), help="where the jsonl files are")
    options.add_argument("--repeats", type=int, default=5)
    return options.parse_args()


def texts(folder: Path, name: str, field: str) -> list[str]:
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        sys.exit(f"{path} is missing: the folder must hold the data sets named in this script")
    return [json.loads(line)[field] for line in path.read_text(encoding="utf-8").splitlines()]


def cuts_of(text: str) -> list[int]:
    return [span.start for span in segment(text)[1:]]


# --------------------------------------------------------------------------------------------------
# found and invented boundaries


def quality(folder: Path) -> None:
    """Measure recall and inventions on solutions whose newlines were replaced."""
    rows, reached = [], []
    for name, field in STEP_SETS:
        solutions = texts(folder, name, field)
        ours = compare(solutions, cuts_of)
        plain = compare(solutions, lambda text: [match.end() for match in PLAIN.finditer(text)])
        row: list[object] = [name, len(solutions), ours.true, f"{ours.recall:.3f}", f"{ours.invented:.3f}"]
        rows.append([*row, f"{ours.inside_lines:.3f}", f"{plain.recall:.3f}", f"{plain.invented:.3f}"])
        reached.append((name, ours))
    print("\nnewlines replaced by spaces; inventions per true boundary")
    header = ["data set", "texts", "boundaries", "recall", "invented", "of them sentence ends"]
    print(table([*header, "plain splitter: recall", "invented"], rows))
    for name, ours in reached:
        goal(f"{name}: boundaries found", ours.recall, at_least=0.80)
        goal(f"{name}: invented per true boundary", ours.invented, at_most=0.15)


class Compared:
    """Counts of true boundaries that were found and of cuts that belong to none, over several texts."""

    def __init__(self) -> None:
        self.true = self.found = self.extra = self.extra_ends = 0

    recall = property(lambda self: self.found / self.true)
    invented = property(lambda self: self.extra / self.true)
    inside_lines = property(lambda self: self.extra_ends / self.true)

    def add(self, text: str, true: list[int], cuts: Iterable[int]) -> None:
        left = sorted(cuts)
        self.true += len(true)
        for boundary in true:
            near = [cut for cut in left if abs(cut - boundary) <= TOLERANCE]
            if near:
                left.remove(min(near, key=lambda cut: abs(cut - boundary)))
                self.found += 1
        self.extra += len(left)
        self.extra_ends += sum(ENDS_SENTENCE.search(text[:cut]) is not None for cut in left)


def compare(solutions: list[str], cut: Callable[[str], list[int]]) -> Compared:
    compared = Compared()
    for solution in solutions:
        flat = solution.replace("\n", " ")
        starts = [match.end() for match in re.finditer(r"\n\s*", solution) if solution[: match.start()].strip()]
        compared.add(flat, [start for start in starts if start < len(solution)], cut(flat))
    return compared


def prose(folder: Path) -> None:
    """Count cuts of ordinary problem texts at which no sentence ends; there should be next to none."""
    rows = []
    for name, field in PROSE_SETS:
        problems = [text.replace("\n", " ") for text in texts(folder, name, field)]
        cuts = [(text, cut) for text in problems for cut in cuts_of(text)]
        bare = sum(ENDS_SENTENCE.search(text[:cut]) is None for text, cut in cuts)
        rows.append([name, len(problems), len(cuts), bare, f"{bare / max(1, len(cuts)):.3f}"])
    print("\nproblem texts, which have no lines of steps")
    print(table(["data set", "texts", "cuts", "at no sentence's end", "share"], rows))


# --------------------------------------------------------------------------------------------------
# speed


def speed(folder: Path, repeats: int) -> None:
    """Measure MB/s on realistic texts: short solutions in lines and in one run, and long responses of all kinds."""
    solutions = [text for name, field in STEP_SETS for text in texts(folder, name, field)]
    kinds = {
        "solutions in lines": solutions,
        "solutions in one run": [text.replace("\n", " ") for text in solutions],
        "long responses": [long_response(solutions[i : i + 12]) for i in range(0, len(solutions) - 12, 12)],
    }
    rows = []
    slowest = float("inf")
    for kind, responses in kinds.items():
        size = sum(len(text.encode()) for text in responses)
        row: list[object] = [kind, len(responses), f"{size / len(responses):.0f}"]
        for style in STYLES:
            rate = size / 1e6 / processor_seconds(lambda r=responses, s=style: run_all(r, s), repeats)
            slowest = min(slowest, rate)
            row.append(f"{rate:.1f}")
        rows.append(row)
    print("\nMB/s on one core")
    print(table(["texts", "number", "bytes each", *STYLES], rows))
    goal("MB/s of the slowest", slowest, at_least=5)


def processor_seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the least processor time of several runs."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds)


def run_all(responses: list[str], style: Style) -> None:
    for text in responses:
        segment(text, style=style)


def long_response(solutions: list[str]) -> str:
    """Compose a reasoning model's answer: thinking in paragraphs, then headings, lists, formulas, a table and code."""
    thinking = "\n\n".join(text.replace("\n", " ") for text in solutions[:8])
    listed = "\n".join(f"{i}. {line}" for i, line in enumerate(solutions[8].splitlines(), start=1))
    shown = "\n\n".join(
        f"We get\n\\[\n\\begin{{aligned}}\nx_{i} &= \\frac{{{i}}}{{2}} \\\\\n&= {i / 2}\n\\end{{aligned}}\n\\]\nso that "
        f"$x_{i} = {i / 2}$ holds, while the price stays at $5 per piece.\n{text}"
        for i, text in enumerate(solutions[9:12])
    )
    block = "| item | cost |\n|---|---|\n| pen | 3 |\n| book | 4 |\n\n```python\ntotal = 3 + 4\n\nprint(total)\n```"
    return f"<think>\n{thinking}\n</think>\n\n### Plan\n\n{listed}\n\n### Work\n\n{shown}\n\n{block}\n\n\\boxed{{7}}\n"


def linearity(repeats: int) -> None:
    """Time adversarial texts: the whole text against half of it."""
    rows, worst = [], 0.0
    for piece in HOSTILE:
        text = piece * (HOSTILE_CHARS // len(piece))
        whole = processor_seconds(lambda t=text: segment(t), repeats)
        half = processor_seconds(lambda t=text: segment(t[: len(t) // 2]), repeats)
        worst = max(worst, whole / half)
        rows.append(
            [repr(piece), f"{1e3 * whole:.1f}", f"{len(text.encode()) / 1e6 / whole:.1f}", f"{whole / half:.2f}"]
        )
    print(f"\none piece repeated to {HOSTILE_CHARS // 1000} KB")
    print(table(["piece", "ms", "MB/s", "time / time for half"], rows))
    goal("time for twice the text", worst, at_most=3)


if __name__ == "__main__":
    main()
