"""What steps want before masking, in words, tables and figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ssrctl.measures.step_geometry import GeometryPoint, PairMeans, RunGeometry
from ssrctl.report.document import Bars, Figure, Heatmap, Lines, Section, Table
from ssrctl.report.formats import number, percent, times

_MISSING_SETS = (
    "The mask logs hold neither unconstrained sets nor energies: they were written by an earlier version of ssrctl."
)
_MISSING_CONFLICT = "Gradients of steps were not compared before masking: train with --log-gradient-cosine for that."
_TERMINAL_PAIRS = 6
# Deviations from even odds smaller than this are not worth full colour.
_LEAST_SCALE = 0.05


def geometry_headlines(found: RunGeometry) -> list[str]:
    """The answer in sentences; none about what was not logged."""
    lines = []
    units, pairs = found.units, found.pairs
    if pairs.unconstrained_jaccard is not None:
        lines.append(
            "Without claims, two steps of a question would have taken sets with a mean Jaccard index of "
            f"{number(pairs.unconstrained_jaccard)} (chance: {number(pairs.expected_unconstrained_jaccard)}); on average "
            f"{percent(units.displaced_frac)} of what a step's gradient ranks highest was not its to take."
        )
    if units.captured is not None:
        line = f"A step's set holds {percent(units.captured)} of its gradient's squared norm on average"
        if units.unconstrained_captured is not None:
            line += f"; without claims it would hold {percent(units.unconstrained_captured)}"
        lines.append(line + ".")
    if pairs.conflict is not None:
        lines.append(
            f"Two steps' gradients disagree in sign at {percent(pairs.conflict)} of the coordinates where both are not "
            f"0 (weighted by size {percent(pairs.weighted_conflict)}; random signs: 50%), and at "
            f"{percent(pairs.top_conflict)} of those that either ranks highest."
        )
    if found.equal.cosine is not None and found.opposite.cosine is not None:
        lines.append(
            f"Steps with mean advantages of the same sign have a mean cosine of {number(found.equal.cosine, 'signed')} "
            f"({times(found.equal.num_cosines, 'pair')}), of opposite signs {number(found.opposite.cosine, 'signed')} "
            f"({times(found.opposite.num_cosines, 'pair')})."
        )
    return lines


def geometry_notes(found: RunGeometry) -> list[str]:
    """What is missing, and why; nothing where there are no units at all."""
    notes: list[str] = []
    if not found.units.num_units:
        return notes
    if found.units.captured is None and found.pairs.unconstrained_jaccard is None:
        notes.append(_MISSING_SETS)
    if found.pairs.num_pairs and not found.pairs.num_cosines:
        notes.append(_MISSING_CONFLICT)
    return notes


def geometry_sections(found: RunGeometry) -> list[Section]:
    """Energies, collisions, conflicts, and both over training; without a section for what was not logged."""
    sections = []
    if found.units.captured is not None:
        sections.append(_energy_section(found))
    if found.pairs.unconstrained_jaccard is not None:
        sections.append(_collision_section(found))
    if found.pairs.num_cosines:
        sections.append(_conflict_section(found))
    if found.pairs.unconstrained_jaccard is not None or found.pairs.num_cosines:
        sections.append(_advantage_section(found))
    if sections:
        sections.append(_training_section(found.over_training))
    return sections


def _labels(found: RunGeometry) -> list[str]:
    return [str((unit.position or 0) + 1) for unit in found.by_position]


def _square(found: RunGeometry, value: Callable[[PairMeans], float | None]) -> list[list[float | None]]:
    values = {(pair.i, pair.j): value(pair.means) for pair in found.by_pair}
    size = len(found.by_position)
    return [[values.get((min(i, j), max(i, j))) if i != j else None for j in range(size)] for i in range(size)]


def _energy_section(found: RunGeometry) -> Section:
    units = found.by_position
    figure = Bars(
        title="Energy held by each unit's set",
        labels=_labels(found),
        series={
            "selected": [unit.captured for unit in units],
            "without claims": [unit.unconstrained_captured for unit in units],
        },
        axis="share of the gradient's squared norm",
    )
    raw = [
        [
            (unit.position or 0) + 1, unit.num_units, unit.gradient_norm, unit.captured, unit.unconstrained_captured,
            unit.claims_loss, unit.displaced_frac, unit.unconstrained_uniqueness,
        ]
        for unit in units
    ]  # fmt: skip
    table = Table(
        title="Energy by unit",
        columns=["unit", "cases", "norm", "selected", "without claims", "lost to claims", "displaced", "unique"],
        rows=[[str(r[0]), str(r[1]), number(r[2]), *(percent(value) for value in r[3:])] for r in raw],
        raw=raw,
        note="Selected and without claims: share of the squared norm of the unit's gradient in its set, and in the set "
        "that it would have taken had nobody claimed anything. Displaced: the share of the latter that it did not get. "
        "Unique: the share of it that no other unit of the question would have taken.",
        terminal_rows=_TERMINAL_PAIRS,
        collapsed=len(units) > 30,
    )
    return Section(title="How much of its gradient a step keeps", figures=[figure], tables=[table])


def _collision_section(found: RunGeometry) -> Section:
    measured = _square(found, lambda means: means.unconstrained_jaccard)
    chance = _square(found, lambda means: means.expected_unconstrained_jaccard)
    scale = max((value or 0.0 for square in (measured, chance) for row in square for value in row), default=0.0)
    maps: list[Figure] = [
        Heatmap(
            title=title,
            labels=_labels(found),
            values=values,
            axis="update unit",
            scale=scale or None,
            decimals=3 if scale >= 0.01 else 4,
            caption=f"Full colour is {number(scale)}, the same in both maps.",
        )
        for title, values in (
            ("Jaccard index without claims, measured", measured),
            ("Jaccard index without claims, chance", chance),
        )
    ]
    return Section(
        title="What would have collided without claims",
        text="Every unit's largest gradient entries among the unprotected weights, as many as it was granted, compared "
        "as if no unit had claimed any. This is the interference that disjoint sets avoid.",
        figures=maps,
    )


def _conflict_section(found: RunGeometry) -> Section:
    columns: list[tuple[str, str]] = [
        ("conflict", "conflict"),
        ("weighted", "weighted_conflict"),
        ("in largest", "top_conflict"),
        ("weighted in largest", "top_weighted_conflict"),
    ]
    agreement = _square(found, lambda means: None if means.top_conflict is None else 1.0 - means.top_conflict)
    furthest = max((abs(value - 0.5) for row in agreement for value in row if value is not None), default=0.0)
    figure = Heatmap(
        title="Equal signs among the largest coordinates",
        labels=_labels(found),
        values=agreement,
        axis="update unit",
        centre=0.5,
        scale=max(furthest, _LEAST_SCALE),
        shares=True,
        decimals=0,
        caption="Of the coordinates that either unit ranks highest, the share where both gradients have the same sign. "
        "Random signs give 50%; blue is agreement, orange is conflict.",
    )
    raw: list[list[Any]] = [
        [f"{pair.i + 1}, {pair.j + 1}", pair.means.num_cosines, *(getattr(pair.means, key) for _, key in columns)]
        for pair in found.by_pair
        if pair.means.num_cosines
    ]
    table = Table(
        title="Sign conflict by pair of units",
        columns=["pair", "cases", *(name for name, _ in columns)],
        rows=[[row[0], str(row[1]), *(percent(value) for value in row[2:])] for row in raw],
        raw=raw,
        note="Conflict: share of the coordinates where neither gradient is 0 in which their signs differ. Weighted: "
        "share of the sum of |a b|. In largest: within the union of the two sets without claims. Random signs: 50%.",
        terminal_rows=_TERMINAL_PAIRS if len(raw) <= _TERMINAL_PAIRS else 0,
        collapsed=len(raw) > 30,
    )
    return Section(title="Where the steps' gradients conflict", figures=[figure], tables=[table])


def _advantage_section(found: RunGeometry) -> Section:
    raw: list[list[Any]] = [
        [
            label, means.num_pairs, means.num_cosines, means.cosine, means.negative_frac, means.conflict,
            means.weighted_conflict, means.top_conflict, means.unconstrained_jaccard,
        ]
        for label, means in (("equal", found.equal), ("opposite", found.opposite), ("all", found.pairs))
    ]  # fmt: skip
    table = Table(
        title="Conflict by the signs of the mean advantages",
        columns=[
            "signs", "pairs", "compared", "cosine", "negative", "conflict", "weighted", "in largest", "Jaccard without claims",
        ],
        rows=[
            [str(r[0]), str(r[1]), str(r[2]), number(r[3], "signed"), *(percent(v) for v in r[4:8]), number(r[8])]
            for r in raw
        ],
        raw=raw,
        note="A unit's mean advantage is over its steps and the responses that have them. "
        f"{times(found.num_without_signs, 'pair')} with a mean of 0 stand under all only.",
    )  # fmt: skip
    return Section(
        title="Does conflict follow the advantages",
        text="If steps interfere because one is rewarded and the other is not, pairs of opposite signs agree less than "
        "pairs of equal signs.",
        tables=[table],
    )


def _training_section(points: Sequence[GeometryPoint]) -> Section:
    raw = [
        [
            point.step, point.units.captured, point.units.unconstrained_captured, point.units.displaced_frac,
            point.pairs.unconstrained_jaccard, point.pairs.cosine, point.equal.cosine, point.opposite.cosine,
            point.pairs.conflict, point.pairs.top_conflict,
        ]
        for point in points
    ]  # fmt: skip
    table = Table(
        title="Before masking, by training step",
        columns=[
            "step", "selected energy", "without claims", "displaced", "Jaccard without claims", "cosine",
            "equal signs", "opposite signs", "conflict", "in largest",
        ],
        rows=[
            [
                str(r[0]), *(percent(v) for v in r[1:4]), number(r[4]), *(number(v, "signed") for v in r[5:8]),
                *(percent(v) for v in r[8:]),
            ]
            for r in raw
        ],
        raw=raw,
        terminal_rows=0,
        collapsed=len(points) > 30,
    )  # fmt: skip
    return Section(
        title="Before masking, over training",
        figures=_training_lines(points) if len(points) > 1 else [],
        tables=[table],
    )


def _training_lines(points: Sequence[GeometryPoint]) -> list[Figure]:
    """One figure per quantity that was logged at all."""
    series: list[tuple[str, str, bool, dict[str, list[float | None]]]] = [
        (
            "Energy held by a step's set",
            "share of the squared norm",
            True,
            {
                "selected": [point.units.captured for point in points],
                "without claims": [point.units.unconstrained_captured for point in points],
            },
        ),
        (
            "Overlap of a question's steps without claims",
            "mean Jaccard index",
            False,
            {
                "measured": [point.pairs.unconstrained_jaccard for point in points],
                "expected by chance": [point.pairs.expected_unconstrained_jaccard for point in points],
            },
        ),
        (
            "Sign conflict of a question's steps",
            "share of coordinates",
            True,
            {
                "all coordinates": [point.pairs.conflict for point in points],
                "largest coordinates": [point.pairs.top_conflict for point in points],
            },
        ),
        (
            "Gradient cosine by the signs of the advantages",
            "mean cosine",
            False,
            {
                "equal signs": [point.equal.cosine for point in points],
                "opposite signs": [point.opposite.cosine for point in points],
            },
        ),
    ]
    return [
        Lines(
            title=title,
            x=[point.step for point in points],
            series=lines,
            x_label="training step",
            y_label=label,
            shares=shares,
        )
        for title, label, shares, lines in series
        if any(value is not None for values in lines.values() for value in values)
    ]
