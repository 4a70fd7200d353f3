"""Turn the rows of a grid into tables, figures and verdicts; the rules are those of docs/study.md.

    python -m examples.study.summarise [GRID]

Of the full grid it writes the tables of docs/study.md between its markers, and its figure; of another one results/GRID.md.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssrctl.evaluation.intervals import POWER, holm
from ssrctl.report.charts import draw
from ssrctl.report.document import Dots

from .grid import Grid, arguments
from .tasks import EQUAL, FORMATS, NUM_SAMPLES

LEVEL = 0.95
Row = Mapping[str, Any]
PAIRS = ("alike", "opposite")  # steps whose numbers have the same parity, and the others
LISTS = ("energy", "reward")  # by step
MEASURED = {  # tables of measured numbers, by block
    "formats": ["entropy", "largest", "largest_equal", *FORMATS, "right_equal", "right_skipped"],
    "probes": ["in-distribution", "longer", "numbers", "order"],
}
DOCS = Path(__file__).parents[2] / "docs"
PAGE, PICTURE = DOCS / "study.md", DOCS / "images" / "study.svg"
INK = {"text": "#111", "rule": "#ccc", "muted": "#666", "series-1": "#2a78d6", "series-2": "#c9531d"}  # for white paper
COLLAPSE = 0.5  # a run collapsed if it ends below this share of the start's accuracy


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, in [-1, 1] for accuracies, with its 95% t interval.

    Attributes:
        p_value: two-sided, of the t test that the mean is 0.
        detectable: the true mean that such a test finds with 80% power, from the noncentral t law.
        count: number of seeds.
    """

    value: float
    low: float
    high: float
    p_value: float
    detectable: float
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of values, at least two of them, with interval, test and power."""
    from scipy.stats import t

    count, mean, spread = len(values), statistics.fmean(values), max(statistics.stdev(values), 1e-9)
    error = spread / math.sqrt(count)
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * error
    p_value = 2 * float(t.sf(abs(mean) / error, count - 1))
    return Estimate(mean, mean - half, mean + half, p_value, detectable(spread, count), count)


def detectable(spread: float, count: int) -> float:
    """Return the mean that a t test of ``count`` values with this standard deviation finds with 80% power."""
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    quantile = float(t.ppf((1 + LEVEL) / 2, count - 1))
    shift = brentq(lambda delta: nct.sf(quantile, count - 1, delta) - POWER, 0.1, 100)
    return float(shift) * spread / math.sqrt(count)


def difference(one: Mapping[int, Row], other: Mapping[int, Row], over: str = "seeds") -> Estimate | None:
    """Return the difference in accuracy of two methods, one minus other, over the seeds that both have (two or more).

    A seed decides the order of the questions and the samples; the problems of the evaluation are the same for all. With
    ``over`` "problems" the interval is over these, of their means over the seeds: it leaves out what other seeds would give.
    """
    seeds = sorted(one.keys() & other.keys())
    if len(seeds) < 2:
        return None
    if over == "seeds":
        return estimate([one[seed]["accuracy"] - other[seed]["accuracy"] for seed in seeds])
    right = [[[int(digit) for digit in rows[seed]["right"]] for seed in seeds] for rows in (one, other)]
    ours, theirs = ([statistics.fmean(counts) / NUM_SAMPLES for counts in zip(*rows, strict=True)] for rows in right)
    return estimate([a - b for a, b in zip(ours, theirs, strict=True)])


def verdict(rule: str, found: Estimate, p_value: float, claim: Mapping[str, Any]) -> str:
    """Return ``held``, ``not held`` or ``inconclusive`` by the interval; ``p_value`` is adjusted by Holm's method."""
    if rule == "better":  # by the claimed size
        if found.low > 0 and p_value < 1 - LEVEL:
            return "held"
        return "not held" if found.high < claim["by"] else "inconclusive"
    if rule == "as good":
        if found.low > -claim["margin"]:
            return "held"
        return "not held" if found.high < 0 else "inconclusive"
    low, high = claim.get("low", -math.inf), claim.get("high", math.inf)  # "within"
    if low <= found.low and found.high <= high:
        return "held"
    return "not held" if found.high < low or found.low > high else "inconclusive"


@dataclass
class Line:
    """One claim on one task and its result; None where rows are missing."""

    claim: Mapping[str, Any]
    task: str
    found: Estimate | None
    p_holm: float = 0.0

    @property
    def verdict(self) -> str:
        """The verdict, ``not run`` without rows."""
        return "not run" if self.found is None else verdict(self.claim["rule"], self.found, self.p_holm, self.claim)


def lines_of(grid: Grid) -> list[Line]:
    """Return the lines of all testable claims; p-values are adjusted over all comparisons that were made."""
    lines = []
    for claim in grid.data["claims"]:
        for task in claim.get("tasks", ()):
            block = claim["block"]
            one = grid.done(block, task, claim["of"])
            if claim["rule"] == "within":
                values = _values(one, claim["value"])
                if "to" in claim:
                    less = _values(grid.done(block, task, claim["to"]), claim["value"])
                    values = {seed: values[seed] - less[seed] for seed in values.keys() & less.keys()}
                found = estimate(list(values.values())) if len(values) > 1 else None
            else:
                found = difference(one, grid.done(claim.get("other_block", block), task, claim["to"]))
            lines.append(Line(claim, task, found))
    compared = [line for line in lines if line.found is not None and line.claim["rule"] != "within"]
    for line, adjusted in zip(compared, holm([one.found.p_value for one in compared if one.found]), strict=True):
        line.p_holm = adjusted
    return lines


def _values(rows: Mapping[int, Row], name: str) -> dict[int, float]:
    """Return a measured number by seed, of the rows that have it."""
    return {seed: value for seed, row in rows.items() if (value := _value(row, name)) is not None}


def _value(row: Mapping[str, Any], name: str) -> float | None:
    """Return a measured number; ``a/b`` is a quotient.

    ``energy`` is the last operation's share over the first's, ``right_equal`` the share of right answers in ``EQUAL`` formats.
    """
    measured = row.get("measured", {})
    if name == "right_equal":
        used = [format_ for format_ in EQUAL if measured.get(format_)]
        right = sum(measured[format_] * measured[f"right_{format_}"] for format_ in used)
        return right / sum(measured[format_] for format_ in used) if used else None
    if name == "energy":
        energy = measured.get("energy")
        return energy[-1] / energy[0] if energy else None
    over, _, under = name.partition("/")
    if over not in measured:
        return None
    return float(measured[over]) / (float(measured[under]) if under else 1.0)


def facts(grid: Grid) -> str:
    """Return the number of runs and their time; runs at rates that are no longer chosen are in no table."""
    seconds = sum(row["cpu_seconds"] for row in grid.rows.values())
    unused = len(grid.rows.keys() - {run.key for run in grid.planned()})
    more = f" {unused} of them, at rates that were chosen from fewer, are in no table." if unused else ""
    return f"{len(grid.rows)} runs, {seconds / 60:.0f} minutes of one core.{more}\n"


def claims_table(grid: Grid) -> str:
    """Return a table with a line per claim; its tasks are written below each other."""
    rows, lines = [], lines_of(grid)
    for claim in grid.data["claims"]:
        mine = [line for line in lines if line.claim is claim]
        if mine:
            compared = "`{value}` of {of}; {range}" if claim["rule"] == "within" else "{of} minus {to} ({block})"
            measured = "<br>".join([compared.format(**claim), *(f"{line.task}: {_measured(line)}" for line in mine)])
            verdicts = list(dict.fromkeys(line.verdict for line in mine))
            if len(verdicts) > 1:
                verdicts = [f"{line.task}: {line.verdict}" for line in mine]
        else:
            measured, verdicts = claim["why"], ["not testable here"]
        rows.append([claim["paper"], claim["claim"], measured, "<br>".join(verdicts)])
    return _table("paper | claim | measured | verdict", rows)


def _measured(line: Line) -> str:
    found = line.found
    if found is None:
        return "not run"
    if line.claim["rule"] == "within":
        return f"{found.value:.3g} ({found.low:.3g} to {found.high:.3g}), {found.count} seeds"
    ends = f"{100 * found.value:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f}) points, {found.count} seeds"
    return f"{ends}, p {line.p_holm:.2g}, could show {100 * found.detectable:.1f}"


def block_tables(grid: Grid) -> str:
    """Return the tables of all blocks: each method's accuracy on each task, and its difference to the reference."""
    parts = []
    for block, about in grid.data["blocks"].items():
        parts.append(f"### {block}\n\n{about['about']}\n")
        for task in about["tasks"]:
            accuracies = [row["accuracy"] for row in grid.done("start", task, "start").values()]
            start = statistics.fmean(accuracies or [math.nan])
            reference = grid.done(about.get("reference_block", block), task, about["reference"])
            rows = []
            for method in about["methods"]:
                if done := grid.done(block, task, method):
                    rows.append(_row(grid, task, method, done, start, reference))
            heads = (
                f"method | rate | seeds | accuracy | gain | minus {about['reference']} | p | could show | over problems"
            )
            parts.append(
                f"**{task}** (start: {start:.3f})\n\n"
                + (_table(f"{heads} | collapsed", rows) if rows else "Not run.\n")
            )
    return "\n".join(parts)


def _row(
    grid: Grid, task: str, method: str, done: Mapping[int, Row], start: float, reference: Mapping[int, Row]
) -> list[str]:
    accuracies = [row["accuracy"] for row in done.values()]
    mean = statistics.fmean(accuracies)
    rates, rate = grid.data["methods"][grid.tuned(method)]["rates"], grid.rate(task, method)
    used = next(iter(done.values()))["settings"]["learning_rate"]
    edge = " (edge)" if len(rates) > 1 and rate in (min(rates), max(rates)) else ""
    compared = [""] * 4
    apart, of_problems = (difference(done, reference, over) for over in ("seeds", "problems"))
    if apart is not None and of_problems is not None and apart.high - apart.low > 1e-6:  # not the same runs
        compared = [f"{100 * apart.value:+.1f} ({100 * apart.low:+.1f} to {100 * apart.high:+.1f})"]
        compared += [f"{apart.p_value:.2g}", f"{100 * apart.detectable:.1f}"]
        compared += [f"{100 * of_problems.low:+.1f} to {100 * of_problems.high:+.1f}"]
    collapsed = sum(value < COLLAPSE * start for value in accuracies)
    cells = [
        method,
        f"{used:g}{edge}",
        str(len(done)),
        f"{mean:.3f}{_spread(accuracies, 3)}",
        f"{100 * (mean - start):+.1f}",
    ]
    return [*cells, *compared, str(collapsed)]


def steps_table(grid: Grid) -> str:
    """Return what was measured of the step gradients, per task."""
    rows = []
    kinds = ("cosine", "weighted_conflict", "top_conflict")
    for task in grid.data["tasks"] if "steps" in grid.data["blocks"] else ():
        for method in grid.data["blocks"]["steps"]["methods"]:
            if found := [row["measured"] for row in grid.done("steps", task, method).values()]:
                means = [statistics.fmean(one[f"{kind}_{pair}"] for one in found) for kind in kinds for pair in PAIRS]
                lists = [map(statistics.fmean, zip(*(one[name] for one in found), strict=True)) for name in LISTS]
                shown = [", ".join(f"{value:.2f}" for value in values) for values in lists]
                rows.append([task, grid.tuned(method), *(f"{mean:.2f}" for mean in means), *shown])
    heads = "task | sets | cosine, alike | other | conflict, alike | other | top, alike | other | energy | reward"
    return _table(heads, rows) if rows else ""


def measured_table(grid: Grid, block: str, names: Sequence[str]) -> str:
    """Return the means over seeds of measured numbers, and their standard deviations, for each method of a block."""
    rows = []
    about = grid.data["blocks"].get(block, {"tasks": [], "methods": []})
    for task, method in ((task, method) for task in about["tasks"] for method in about["methods"]):
        found = [list(_values(grid.done(block, task, method), name).values()) for name in names]
        if any(found):
            rows.append([method, *(f"{statistics.fmean(one):.2f}{_spread(one)}" if one else "" for one in found)])
    return _table(" | ".join(["method", *(name.replace("_", ", ") for name in names)]), rows) if rows else ""


def _spread(values: Sequence[float], digits: int = 2) -> str:
    return f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""


def _table(heads: str, rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, " | ".join("---" for _ in heads.split(" | ")), *(" | ".join(row) for row in rows)]
    return "".join(f"| {line} |\n" for line in lines)


def picture(grid: Grid, block: str) -> str:
    """Draw the differences of a block's methods to its reference, with a colour for each task, as a picture of its own."""
    about = grid.data["blocks"][block]
    rows = [(task, one) for task in about["tasks"] for one in about["methods"] if one != about["reference"]]
    apart = [difference(grid.done(block, task, one), grid.done(block, task, about["reference"])) for task, one in rows]
    shown = {
        task: [one if of == task else None for (of, _), one in zip(rows, apart, strict=True)] for task in about["tasks"]
    }
    dots = Dots(
        title="",
        labels=[f"{task}: {one}" for task, one in rows],
        series={task: [one and one.value for one in found] for task, found in shown.items()},
        intervals={task: [one and (one.low, one.high) for one in found] for task, found in shown.items()},
        axis=f"accuracy minus that of {about['reference']}",
    )
    drawn = re.sub(r"var\(--([\w-]+)\)", lambda name: INK[name[1]], draw(dots, "study"))
    ground = '<rect width="100%" height="100%" fill="#fff"/>'
    return re.sub(r"(<svg[^>]*)>", rf'\1 font-family="sans-serif">{ground}', drawn, count=1) + "\n"


def insert(text: str, name: str, table: str) -> str:
    """Return ``text`` with ``table`` between the markers of that name."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    return re.sub(pattern, lambda found: f"{found[1]}\n{table}\n{found[2]}", text, flags=re.DOTALL)


def main() -> None:
    """Write the tables and figures of a grid."""
    args = arguments(__doc__).parse_args()
    grid = Grid(args.grid, args.results)
    tables = {"facts": facts(grid), "claims": claims_table(grid), "steps": steps_table(grid)}
    tables |= {block: measured_table(grid, block, names) for block, names in MEASURED.items()}
    tables["blocks"] = block_tables(grid)
    if args.grid != "full" or args.results is not None:
        grid.file.with_suffix(".md").write_text("\n".join(filter(None, tables.values())), encoding="utf-8")
        return
    PICTURE.write_text(picture(grid, "main"), encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    for key, table in tables.items():
        page = insert(page, key, table)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
