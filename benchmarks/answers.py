"""Equality of answers: references in twelve equivalent forms, and altered references.

Every reference is written in up to twelve ways that mean the same (the first is the reference itself) and compared with
the reference: all should be right. Then it is altered in up to six ways that change its value: none should be accepted.
math-verify with its default settings judges the same pairs. The styles with a data file are read from the data folder
and left out where it is absent; the others are generated here.

    python benchmarks/answers.py [--data FOLDER] [--limit 60] [--failures 20]

The data sets are read from $SSRCTL_DATA, or shared/data beside the repository.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

from common import goal, machine, table

from ssrctl.text.answer_equality import compare_answers
from ssrctl.text.answer_pool import ANSWER_TIMEOUT, MAX_WORKERS

FILES = {"math500": "answer", "gsm8k_test": "answer", "aime_1983_2024": "answer", "svamp": "Answer"}
RIGHT_GOAL, WRONG_GOAL, MARGIN = 0.985, 0.005, 0.01

Change = Callable[[str, random.Random], str | None]
INTEGER = re.compile(r"-?\d+")
FRACTION = re.compile(r"(?P<sign>-?)\\frac\{(?P<top>\d+)\}\{(?P<bottom>\d+)\}")
PAIR = re.compile(r"[(\[][^()\[\]]*,[^()\[\]]*[)\]]")


# --------------------------------------------------------------------------------------------------
# references


def olympiad(rng: random.Random) -> str:
    a, b, c = rng.randint(2, 30), rng.randint(2, 12), rng.randint(2, 9)
    return rng.choice(
        [
            f"{a}\\sqrt{{{b * b + 1}}}",
            f"\\{{{a}, {a + b}, {a + b + c}\\}}",
            f"(-\\infty, {a}] \\cup [{a + b}, \\infty)",
            f"[{-a}, {b})",
            f"\\frac{{{a}^n - 1}}{{{b}}}",
            f"({a}, {b}), ({b}, {a + b})",
            f"\\frac{{{a * b + 1}}}{{{a}}}\\pi",
            f"2^{{{a}}} - {b}",
            f"{a}n^2 + {b}n - {c}",
            f"\\binom{{{a + b}}}{{{c}}}",
            f"{a}!",
            f"\\frac{{1}}{{{10**6 + a}}}",
            f"{a} + {b}\\sqrt{{{c * c - 2}}}",
            "\\emptyset",
        ]
    )


def minerva(rng: random.Random) -> str:
    a, b = rng.randint(1000, 9999) / 1000, rng.randint(3, 24)
    return rng.choice(
        [f"{a:.2f} \\times 10^{{{b}}}", f"{a:.3f} \\times 10^{{-{b}}}", f"{a * b:.2f}", f"{a:.1f}e{b}", f"{a / 50:.4f}"]
    )


def amc(rng: random.Random) -> str:
    return rng.choice(["A", "B", "C", "D", "E"])


def asdiv(rng: random.Random) -> str:
    return rng.choice(
        [
            str(rng.randint(2, 99)),
            f"{rng.randint(1000, 99999):,}",
            f"{rng.randint(2, 40)}:{rng.choice((41, 43, 47))}",
            f"{rng.randint(100, 999) / 100:.2f}",
        ]
    )


GENERATED: dict[str, Callable[[random.Random], str]] = {
    "olympiad": olympiad, "minerva": minerva, "amc": amc, "asdiv": asdiv,
}  # fmt: skip


def references(folder: Path, limit: int) -> Iterator[tuple[str, list[str]]]:
    """Yield each style with its distinct references, ``limit`` of them at most."""
    for name, field in FILES.items():
        path = folder / f"{name}.jsonl"
        if not path.is_file():
            print(f"{path} is absent: left out")
            continue
        with path.open(encoding="utf-8") as stream:
            values = [str(json.loads(line)[field]) for line in stream]
        distinct = sorted({value.removesuffix(".0") if name == "svamp" else value for value in values})
        yield name, random.Random(0).sample(distinct, min(limit, len(distinct)))
    for name, make in GENERATED.items():
        rng = random.Random(name)
        yield name, sorted({make(rng) for _ in range(3 * limit)})[:limit]


# --------------------------------------------------------------------------------------------------
# twelve equivalent forms; None where a form does not fit a reference


def is_choice(reference: str) -> bool:
    return re.fullmatch(r"\\text\{\([A-E]\)\}|[A-E]", reference) is not None


def plain_number(reference: str) -> str | None:
    """Return a reference that is one integer without separators, else None."""
    bare = re.sub(r",(?:\\!)?\s*(?=\d{3})", "", reference)
    return bare if INTEGER.fullmatch(bare) else None


def sized(reference: str, rng: random.Random) -> str | None:
    if is_choice(reference):
        return f"\\textbf{{({reference[-3] if reference.startswith(chr(92)) else reference})}}"
    text = reference.replace("\\left", "").replace("\\right", "").replace("\\frac{", "\\dfrac{")
    return re.sub(r"([(\[])([^()\[\]]*)([)\]])", r"\\left\1\2\\right\3", text)


def delimited(reference: str, rng: random.Random) -> str | None:
    return rng.choice(["${}$", "\\({}\\)", "${}$.", "\\[{}\\]"]).format(reference)


def named(reference: str, rng: random.Random) -> str | None:
    if is_choice(reference) or re.search(r"=|\\in\b|\\text|,|_", reference):
        return None
    return f"{rng.choice(['Q', 'S', 'f(t)'])} = {reference}"


def with_unit(reference: str, rng: random.Random) -> str | None:
    if plain_number(reference) is None and not re.fullmatch(r"\d+\.\d+", reference):
        return None
    return reference + rng.choice(["\\text{ cm}", " (cm)", "\\ \\mathrm{km}", "^\\circ", " dollars", "\\%"])


def respaced(reference: str, rng: random.Random) -> str | None:
    text = re.sub(r"\s*([,+=])\s*", r" \1 " if "," not in reference else r"\1 ", reference)
    return None if re.search(r"\d,\s*(?:\\!\s*)?\d{3}", reference) else f" {text}  "


def grouped(reference: str, rng: random.Random) -> str | None:
    number = plain_number(reference)
    if number is None or abs(int(number)) < 1000:
        return None
    return f"{int(number):,}".replace(",", rng.choice([",", "{,}", "\\,", " ", ",\\!"]))


def bracketed(reference: str, rng: random.Random) -> str | None:
    if is_choice(reference):
        return f"({reference.strip('text{}()' + chr(92))}) 12"
    if re.search(r"=|\\in\b|\\text|,|\\cup", reference):
        return None
    return rng.choice(["({})", "{{{}}}", "\\left({}\\right)", "\\boxed{{{}}}"]).format(reference)


def decimal(reference: str, rng: random.Random) -> str | None:
    if number := plain_number(reference):
        return f"{number}.{'0' * rng.randint(1, 3)}"
    if match := FRACTION.fullmatch(reference.replace("dfrac", "frac")):
        value = Fraction(int(match["top"]), int(match["bottom"]))
        text = f"{float(value):.6f}"
        return match["sign"] + text if value > Fraction(1, 100) else None
    return None


def rewritten(reference: str, rng: random.Random) -> str | None:
    """Write a number as unsimplified fraction, power of ten or words; 1/2 as 2/4."""
    if match := FRACTION.fullmatch(reference.replace("dfrac", "frac")):
        k = rng.randint(2, 7)
        return f"{match['sign']}\\frac{{{k * int(match['top'])}}}{{{k * int(match['bottom'])}}}"
    if (number := plain_number(reference)) and abs(int(number)) < 10**6:
        return rng.choice(
            [f"\\frac{{{2 * int(number)}}}{{2}}", f"{number}/1", f"+{number}" if int(number) >= 0 else number]
        )
    return f"\\displaystyle {reference}"


def reordered(reference: str, rng: random.Random) -> str | None:
    if match := re.fullmatch(r"\\\{(.*)\\\}", reference):
        return "\\{" + ", ".join(reversed(re.split(r",\s*", match[1]))) + "\\}"
    if re.fullmatch(r"-?\d+(?:,\s*-?\d+)+", reference) and plain_number(reference) is None:
        return ", ".join(reversed(re.split(r",\s*", reference)))
    if match := re.fullmatch(r"(\d+) \+ (\d+\\sqrt\{\d+\})", reference):
        return f"{match[2]} + {match[1]}"
    return None


def unicode_signs(reference: str, rng: random.Random) -> str | None:
    text = re.sub(r"\\sqrt\{(\d+)\}", r"√\1", reference)
    text = re.sub(r"\\sqrt(\d)", r"√\1", text)
    for command, sign in (
        (r"\\pi(?![a-z])", "π"),
        (r"\\times", "×"),
        (r"\\infty", "∞"),
        (r"\\cup", "∪"),
        (r"\^\\circ", "°"),
        ("-", "−"),
    ):
        text = re.sub(command, sign, text)
    return text if text != reference else None


FORMS: dict[str, Change] = {
    "as it is": lambda reference, rng: reference, "sizes and fonts": sized, "delimiters": delimited, "name in front": named,
    "unit or percent": with_unit, "spaces": respaced, "thousands": grouped, "brackets": bracketed, "decimals": decimal,
    "unsimplified": rewritten, "order": reordered, "unicode": unicode_signs,
}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# alterations


def other_digit(reference: str, rng: random.Random) -> str | None:
    places = [match.start() for match in re.finditer(r"\d", reference)]
    if not places:
        return None
    place = rng.choice(places)
    return reference[:place] + str((int(reference[place]) + rng.randint(1, 9)) % 10) + reference[place + 1 :]


def other_sign(reference: str, rng: random.Random) -> str | None:
    if match := re.search(r"[-+]", reference):
        return reference[: match.start()] + ("+" if match.group() == "-" else "-") + reference[match.end() :]
    return (
        f"-{reference}"
        if re.fullmatch(r"[\d,.]+|\\d?frac\{\d+\}\{\d+\}", reference) and reference.strip("0.,")
        else None
    )


def next_number(reference: str, rng: random.Random) -> str | None:
    number = plain_number(reference)
    return None if number is None else str(int(number) + rng.choice([-1, 1, 10, -10]))


def upside_down(reference: str, rng: random.Random) -> str | None:
    match = FRACTION.fullmatch(reference.replace("dfrac", "frac"))
    return (
        f"{match['sign']}\\frac{{{match['bottom']}}}{{{match['top']}}}"
        if match and match["top"] != match["bottom"]
        else None
    )


def other_order(reference: str, rng: random.Random) -> str | None:
    text = re.sub(r"\\(?:left|right)", "", reference).strip()
    if not PAIR.fullmatch(text):
        return None
    parts = [part.strip() for part in text[1:-1].split(",")]
    return text[0] + ", ".join(reversed(parts)) + text[-1] if parts != parts[::-1] else None


def other_choice(reference: str, rng: random.Random) -> str | None:
    if not is_choice(reference):
        return None
    letter = reference.strip("text{}()" + chr(92))
    return f"({chr((ord(letter) - 64) % 5 + 65)})"


def missing_part(reference: str, rng: random.Random) -> str | None:
    if match := re.fullmatch(r"(\\\{|\(|\[)(.*),[^,]*(\\\}|\)|\])", reference):
        return match[1] + match[2] + match[3]
    if re.fullmatch(r"-?\d+(?:,\s*-?\d+)+", reference) and plain_number(reference) is None:
        return reference.rpartition(",")[0]
    return None


ALTERATIONS: dict[str, Change] = {
    "digit": other_digit, "sign": other_sign, "neighbour": next_number, "inverse": upside_down, "order": other_order,
    "choice": other_choice, "missing part": missing_part,
}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# measuring


def math_verify_says(answer: str, reference: str) -> bool:
    import math_verify

    delimited = re.search(r"\\[(\[]|(?<!\\)\$", answer)
    gold, found = (
        math_verify.parse(f"${reference}$"),
        math_verify.parse(answer if delimited else f"$\\boxed{{{answer}}}$"),
    )
    return bool(math_verify.verify(gold, found))


Row = tuple[str, str, bool, bool]  # style, form, ours, math-verify's


def judge(
    style: str, given: list[str], changes: dict[str, Change], failures: list[str], right: bool
) -> tuple[list[Row], float]:
    """Judge every changed reference by both; return the rows and the longest time of ours in seconds."""
    rng = random.Random(style)
    pairs = [(form, change(reference, rng), reference) for reference in given for form, change in changes.items()]
    wanted = [(form, answer, reference) for form, answer, reference in pairs if answer is not None]

    def ours(pair: tuple[str, str, str]) -> tuple[bool, float]:
        started = time.perf_counter()
        return compare_answers(pair[1], pair[2]) is True, time.perf_counter() - started

    with ThreadPoolExecutor(MAX_WORKERS) as threads:
        verdicts = list(threads.map(ours, wanted))
    rows: list[Row] = []
    for (form, answer, reference), (verdict, _) in zip(wanted, verdicts, strict=True):
        theirs = math_verify_says(answer, reference)
        rows.append((style, form, verdict, theirs))
        if verdict is not right:
            failures.append(
                f"{style:10} {form:16} {reference!r} {'!=' if right else '=='} {answer!r} (math-verify: {theirs})"
            )
    return rows, max((seconds for _, seconds in verdicts), default=0.0)


def shares(rows: list[Row], column: int) -> list[list[str]]:
    """Return a table by style (column 0) or form (column 1): pairs, our share of equal verdicts, math-verify's."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row[column]].append(row)
    found["all"] = rows
    return [
        [
            name,
            str(len(mine)),
            f"{sum(r[2] for r in mine) / len(mine):.4f}",
            f"{sum(r[3] for r in mine) / len(mine):.4f}",
        ]
        for name, mine in found.items()
    ]


def main() -> int:
    """Measure and print."""
    repository = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("SSRCTL_DATA", repository.parent / "shared" / "data"))
    )
    parser.add_argument("--limit", type=int, default=60, help="references per style")
    parser.add_argument("--failures", type=int, default=20, help="failures that are printed")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    print(machine())
    failures: list[str] = []
    equal, altered, slowest = [], [], 0.0
    for style, given in references(options.data, options.limit):
        for changes, rows, right in ((FORMS, equal, True), (ALTERATIONS, altered, False)):
            new, seconds = judge(style, given, changes, failures, right)
            rows += new
            slowest = max(slowest, seconds)
    for title, rows in (("equivalent forms, share accepted", equal), ("altered references, share accepted", altered)):
        for column in (0, 1):
            print(f"\n{title}")
            print(table(["style" if column == 0 else "form", "pairs", "ours", "math-verify"], shares(rows, column)))
    print("\n" + "\n".join(failures[: options.failures]) + "\n")
    accepted, peer = (sum(row[k] for row in equal) / len(equal) for k in (2, 3))
    mistaken, peer_mistaken = (sum(row[k] for row in altered) / len(altered) for k in (2, 3))
    met = [
        goal("equivalent forms accepted", accepted, at_least=RIGHT_GOAL),
        goal("altered references accepted", mistaken, at_most=WRONG_GOAL),
        goal("behind math-verify on either", max(peer - accepted, mistaken - peer_mistaken), at_most=MARGIN),
        goal("seconds of the slowest comparison, start of a process included", slowest, at_most=2 * ANSWER_TIMEOUT),
    ]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
