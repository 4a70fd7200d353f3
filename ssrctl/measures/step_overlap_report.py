"""The overlap of a run in words, tables and figures."""

from __future__ import annotations

from collections.abc import Sequence

from ssrctl.measures.step_overlap import StepOverlap
from ssrctl.measures.step_overlap_summary import PairSummary, RunOverlap, mean
from ssrctl.report.document import Bars, Document, Heatmap, Lines, Section, Table
from ssrctl.report.formats import count, number, percent, times

# Allocations under which no coordinate can belong to two steps of a question.
DISJOINT_ALLOCATIONS = ("disjoint", "shuffled")
_PAIR_COLUMNS = (
    "pair", "cases", "shared", "chance", "Jaccard", "chance", "share of i", "chance", "share of j", "chance",
)  # fmt: skip
# More pairs than four units have fill a screen; the sentences already hold their means.
_TERMINAL_PAIRS = 6
_CHANCE = "Chance is the expectation for uniformly random sets of the same sizes among the unprotected coordinates."


def disjoint_by_construction(allocation: str | None, reuse_factor: float | None) -> bool | None:
    """Could no two steps of a question share a coordinate? None when the run does not say how it allocated."""
    if allocation is None:
        return None
    return allocation in DISJOINT_ALLOCATIONS and not reuse_factor


def headlines(summary: RunOverlap, disjoint: bool | None) -> list[str]:
    """The answer in sentences.

    Args:
        summary: of the run.
        disjoint: from ``disjoint_by_construction``.
    """
    lines = [_overlap_line(summary, disjoint)]
    if summary.units.uniqueness is not None and summary.pairs.num_pairs:
        lines.append(
            f"On average {percent(summary.units.uniqueness)} of a step's coordinates were selected by no other "
            f"step of its question (chance: {percent(summary.units.expected_uniqueness)})."
        )
    if (cosine := summary.pairs.cosine) is not None:
        lines.append(
            f"The gradients of two steps have a mean cosine of {number(cosine.mean, 'signed')}, from "
            f"{number(cosine.min, 'signed')} to {number(cosine.max, 'signed')} over {times(cosine.num_pairs, 'pair')}; "
            f"{percent(cosine.conflict_frac)} of the pairs are in conflict (negative cosine)."
        )
    across = summary.cross_question
    if across.num_pairs:
        lines.append(
            f"Different questions of a batch overlap with a mean Jaccard index of {number(across.jaccard)}"
            f"{_against_chance(across)}; nothing keeps them apart."
        )
    if summary.touched_frac is not None:
        lines.append(
            f"A batch touched {percent(summary.touched_frac)} of the unprotected coordinates on average "
            f"(questions that overlap by chance alone: {percent(summary.expected_touched_frac)})."
        )
    return lines


def _overlap_line(summary: RunOverlap, disjoint: bool | None) -> str:
    pairs = summary.pairs
    if not pairs.num_pairs:
        return f"No question of {summary.num_questions} has two update units, so there are no pairs to compare."
    if summary.all_disjoint:
        line = f"No two steps of a question share a coordinate ({times(pairs.num_pairs, 'pair')}). "
        if disjoint:
            line += "Sets are disjoint by construction; the random expectation is what chance would give: "
        elif disjoint is None:
            line += (
                "The run does not say how it allocated coordinates; the disjoint allocation makes this so by "
                "construction. The random expectation is what chance would give: "
            )
        else:
            line += "This allocation did not forbid it. The random expectation is what chance would give: "
        shared = number(pairs.expected_overlap) if (pairs.expected_overlap or 0) < 10 else count(pairs.expected_overlap)
        return line + f"a Jaccard index of {number(pairs.expected_jaccard)}, {shared} shared coordinates per pair."
    line = (
        f"Two steps of a question select sets with a mean Jaccard index of {number(pairs.jaccard)}"
        f"{_against_chance(pairs)}, over {times(pairs.num_pairs, 'pair')}."
    )
    if disjoint:
        line += " The run's allocation should have kept them apart: its config and its mask logs do not fit."
    return line


def _against_chance(pairs: PairSummary) -> str:
    """``, 12.0 times chance (0.00400)``, or the chance alone where a ratio says nothing."""
    if pairs.jaccard and pairs.expected_jaccard:
        ratio = pairs.jaccard / pairs.expected_jaccard
        return f", {number(ratio)} times chance ({number(pairs.expected_jaccard)})"
    return f" (chance: {number(pairs.expected_jaccard)})"


def overlap_document(
    steps: Sequence[StepOverlap],
    summary: RunOverlap,
    facts: list[tuple[str, str]],
    sentences: list[str],
    notes: list[str],
    before_masking: Sequence[Section] = (),
) -> Document:
    """The whole report of ``diagnose --jaccard``.

    Args:
        steps: the logged training steps.
        summary: of them.
        facts: what was read.
        sentences: from ``headlines``.
        notes: what else a reader must know.
        before_masking: sections on what the steps' gradients were before their sets were cut out.
    """
    sections = [_pair_section(summary), _position_section(summary)]
    if summary.pairs.cosine is not None:
        sections.insert(1, _cosine_section(summary))
    sections += before_masking
    sections += [_training_section(summary), _question_section(steps)]
    return Document(
        title="Do reasoning steps update the same weights?",
        facts=facts,
        headlines=sentences,
        notes=notes,
        sections=sections,
    )


def _labels(summary: RunOverlap) -> list[str]:
    return [str((unit.position or 0) + 1) for unit in summary.by_position]


def _square(summary: RunOverlap, values: dict[tuple[int, int], float | None]) -> list[list[float | None]]:
    size = len(summary.by_position)
    return [[values.get((min(i, j), max(i, j))) if i != j else None for j in range(size)] for i in range(size)]


def _key(pair: PairSummary) -> tuple[int, int]:
    assert pair.i is not None and pair.j is not None
    return pair.i, pair.j


def _pair_name(pair: PairSummary) -> str:
    i, j = _key(pair)
    return f"{i + 1}, {j + 1}"


def _pair_section(summary: RunOverlap) -> Section:
    measured = {_key(pair): pair.jaccard for pair in summary.by_pair}
    expected = {_key(pair): pair.expected_jaccard for pair in summary.by_pair}
    scale = max([value or 0.0 for value in (*measured.values(), *expected.values())], default=0.0)
    decimals = 3 if scale >= 0.01 else 4
    maps = [
        Heatmap(
            title=title,
            labels=_labels(summary),
            values=_square(summary, values),
            axis="update unit",
            scale=scale,
            decimals=decimals,
            caption=f"Full colour is {number(scale)}, the same in both maps.",
        )
        for title, values in (("Jaccard index, measured", measured), ("Jaccard index, chance", expected))
    ]
    table = Table(
        title="Overlap by pair of units (i, j)",
        columns=list(_PAIR_COLUMNS),
        rows=[
            [
                _pair_name(pair),
                str(pair.num_pairs),
                count(pair.overlap),
                count(pair.expected_overlap),
                number(pair.jaccard),
                number(pair.expected_jaccard),
                percent(pair.share_of_i),
                percent(pair.expected_share_of_i),
                percent(pair.share_of_j),
                percent(pair.expected_share_of_j),
            ]
            for pair in summary.by_pair
        ],
        note=f"Means over the cases: questions that have both units. {_CHANCE} Share of i: the part of unit i's "
        "set that is also in unit j's.",
        terminal_rows=_TERMINAL_PAIRS if len(summary.by_pair) <= _TERMINAL_PAIRS else 0,
        collapsed=len(summary.by_pair) > 30,
    )
    return Section(
        title="Which steps overlap",
        text="Units are the steps of a question in the order in which they claimed coordinates, numbered from 1; "
        "fused steps are one unit, and steps that claimed nothing are passed over.",
        figures=list(maps) if measured else [],
        tables=[table],
    )


def _cosine_section(summary: RunOverlap) -> Section:
    means: dict[tuple[int, int], float | None] = {}
    for pair in summary.by_pair:
        if pair.cosine is not None:
            means[_key(pair)] = pair.cosine.mean
    scale = max(abs(value or 0.0) for value in means.values())
    figure = Heatmap(
        title="Gradient cosine, mean",
        labels=_labels(summary),
        values=_square(summary, means),
        axis="update unit",
        scale=scale,
        decimals=2,
        caption=f"Full colour is ±{number(scale)}; blue is agreement, orange is conflict.",
    )
    rows = [
        [
            _pair_name(pair),
            str(pair.cosine.num_pairs),
            number(pair.cosine.mean, "signed"),
            number(pair.cosine.min, "signed"),
            number(pair.cosine.max, "signed"),
            percent(pair.cosine.conflict_frac),
        ]
        for pair in summary.by_pair
        if pair.cosine is not None
    ]
    table = Table(
        title="Gradient cosine by pair of units",
        columns=["pair", "cases", "mean", "min", "max", "in conflict"],
        rows=rows,
        note="Of the gradients before masking. In conflict: share of cases with a negative cosine.",
        terminal_rows=_TERMINAL_PAIRS if len(rows) <= _TERMINAL_PAIRS else 0,
        collapsed=len(rows) > 30,
    )
    return Section(title="Do the steps pull in the same direction", figures=[figure], tables=[table])


def _position_section(summary: RunOverlap) -> Section:
    units = summary.by_position
    figures = []
    if units:
        figures = [
            Bars(
                title="Uniqueness by unit",
                labels=_labels(summary),
                series={
                    "measured": [unit.uniqueness for unit in units],
                    "expected by chance": [unit.expected_uniqueness for unit in units],
                },
                axis="share of the set that no other unit selected",
            )
        ]
    table = Table(
        title="Uniqueness by unit",
        columns=["unit", "cases", "mean size", "uniqueness", "chance"],
        rows=[
            [
                str((unit.position or 0) + 1),
                str(unit.num_units),
                count(unit.size),
                percent(unit.uniqueness),
                percent(unit.expected_uniqueness),
            ]
            for unit in units
        ],
        note="Uniqueness: the share of a unit's set that no other unit of its question selected.",
        terminal_rows=0,
        collapsed=len(units) > 30,
    )
    return Section(title="How much of each set is its own", figures=list(figures), tables=[table])


def _training_section(summary: RunOverlap) -> Section:
    points = summary.over_training
    table = Table(
        title="By training step",
        columns=["step", "Jaccard", "chance", "uniqueness", "cosine", "across questions", "chance", "touched"],
        rows=[
            [
                str(point.step),
                number(point.pairs.jaccard),
                number(point.pairs.expected_jaccard),
                percent(point.units.uniqueness),
                number(None if point.pairs.cosine is None else point.pairs.cosine.mean, "signed"),
                number(point.cross_question.jaccard),
                number(point.cross_question.expected_jaccard),
                percent(point.touched_frac),
            ]
            for point in points
        ],
        note="Across questions: Jaccard index of the unions of two questions' sets, mean over the pairs of a batch.",
        collapsed=len(points) > 30,
    )
    figures = _training_lines(summary) if len(points) > 1 else []
    return Section(title="Over training", figures=list(figures), tables=[table])


def _training_lines(summary: RunOverlap) -> list[Lines]:
    """One figure per quantity that was measured at all."""
    points = summary.over_training
    figures = []

    def add(title: str, y_label: str, measured: list[float | None], chance: list[float | None] | None) -> None:
        if any(value is not None for value in measured):
            series = {"measured": measured} | ({} if chance is None else {"expected by chance": chance})
            steps = [point.step for point in points]
            figures.append(Lines(title=title, x=steps, series=series, x_label="training step", y_label=y_label))

    add(
        "Overlap of a question's steps",
        "mean Jaccard index",
        [point.pairs.jaccard for point in points],
        [point.pairs.expected_jaccard for point in points],
    )
    add(
        "Uniqueness",
        "mean share",
        [point.units.uniqueness for point in points],
        [point.units.expected_uniqueness for point in points],
    )
    cosines = [point.pairs.cosine for point in points]
    add(
        "Gradient cosine of a question's steps",
        "mean cosine",
        [None if cosine is None else cosine.mean for cosine in cosines],
        None,
    )
    add(
        "Overlap of different questions",
        "mean Jaccard index",
        [point.cross_question.jaccard for point in points],
        [point.cross_question.expected_jaccard for point in points],
    )
    add(
        "Coordinates touched by a batch",
        "share of the unprotected",
        [point.touched_frac for point in points],
        [point.expected_touched_frac for point in points],
    )
    return figures


# Beyond this many rows a page becomes slow and nobody reads them; report.json has all.
_MOST_QUESTIONS = 200


def _question_section(steps: Sequence[StepOverlap]) -> Section:
    questions = [question for step in steps for question in step.questions]
    rows = [
        [
            question.id,
            str(question.step),
            str(len(question.units)),
            count(sum(unit.size for unit in question.units)),
            number(mean(pair.jaccard for pair in question.pairs)),
            number(mean(pair.expected_jaccard for pair in question.pairs)),
            percent(mean(unit.uniqueness for unit in question.units)),
        ]
        for question in questions[:_MOST_QUESTIONS]
    ]
    shown = "" if len(questions) == len(rows) else f" The first {len(rows)} of {len(questions)} are shown."
    table = Table(
        title="All questions",
        columns=["question", "training step", "units", "selected", "Jaccard", "chance", "uniqueness"],
        rows=rows,
        note=f"Means over the question's pairs and units; the pairs themselves are in report.json.{shown}",
        terminal_rows=0,
        collapsed=True,
    )
    return Section(title="Question by question", tables=[table])
