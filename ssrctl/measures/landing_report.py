"""Where changes landed, in words, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ssrctl.checkpoints.names import KINDS
from ssrctl.measures.landing import SETS
from ssrctl.measures.maths.grouping import layer_label
from ssrctl.measures.maths.row_column_counts import map_figure
from ssrctl.report.document import Bars, Heatmap, Lines, Section, Table
from ssrctl.report.formats import count, number, percent

WORDS = {
    "principal": "principal",
    "low_magnitude": "low-magnitude",
    "principal_not_low": "principal, not low",
    "principal_same_size": "principal, same size",
}
_CHANCE = "expected by chance"


def headlines(numbers: Mapping[str, Any]) -> list[str]:
    """The answer in sentences; none when no matrix was measured.

    Args:
        numbers: from ``landing.landing_numbers``.
    """
    if not numbers["tensors"]:
        return []
    if not numbers["total"]["num_changed"]:
        return ["No weight of the measured matrices changed, so that nothing landed anywhere."]
    total = numbers["total"]
    return [
        *(_sentence(WORDS[name], total[name]) for name in SETS if name != "principal_same_size"),
        f"Among weights of equal magnitude, principal ones are hit {number(total['principal_same_size']['ratio'])} times "
        f"as often as chance: {_verdict(total['principal_same_size'])}.",
    ]


def _sentence(what: str, row: Mapping[str, Any]) -> str:
    return (
        f"{percent(row['overlap'])} of the changed weights are {what} weights, {number(row['ratio'])} times chance "
        f"({percent(row['expected_overlap'])}): {_verdict(row)}."
    )


def _verdict(row: Mapping[str, Any]) -> str:
    if row["overlap"] < row["expected_low"]:
        return "changes avoid them"
    return "changes prefer them" if row["overlap"] > row["expected_high"] else "no more or less than chance explains"


def landing_section(numbers: Mapping[str, Any]) -> Section:
    """Overlap of the changes with the principal and the small weights, and how they spread over rows and columns.

    Args:
        numbers: from ``landing.landing_numbers``.
    """
    title = "Where changes landed"
    if not numbers["tensors"]:
        return Section(title=title, text="No matrix of the kind that has principal weights was compared.")
    share = percent(numbers["density"])
    return Section(
        title=title,
        text=f"Do changes avoid the principal weights and prefer small ones? Principal: the {share} of a matrix with the "
        f"largest magnitude after reconstruction with rank {percent(numbers['rank_share'])} of its smaller side. "
        f"Low-magnitude: the smallest {share}. Changed: {numbers['rule']}. Zhu et al. 2025, section 4.2, find changes "
        "below chance on principal weights and above it on small ones. Large weights need larger updates before their "
        "stored value moves, so that even noise seems to avoid principal weights; at equal magnitude (the same power of "
        "two) it does not.",
        figures=[
            _total_figure(numbers),
            *_layer_figures(numbers),
            *_maps(numbers),
            *_gini_figures(numbers),
            *_examples(numbers["examples"]),
        ],
        tables=[
            _table("Landing by kind of matrix", "kind", [row["kind"] for row in numbers["kinds"]], numbers["kinds"]),
            _table(
                "Landing by layer", "layer", [layer_label(row["layer"]) for row in numbers["layers"]], numbers["layers"]
            ),
            _table("Landing by tensor", "tensor", [row["name"] for row in numbers["tensors"]], numbers["tensors"]),
            *_unmeasured(numbers["unmeasured"]),
        ],
    )


def _total_figure(numbers: Mapping[str, Any]) -> Bars:
    rows = [numbers["total"][name] for name in SETS]
    return Bars(
        title="Changed weights in each set",
        labels=[WORDS[name] for name in SETS],
        series={
            "measured": [row["overlap"] for row in rows],
            _CHANCE: [row["expected_overlap"] for row in rows],
        },
        intervals={
            _CHANCE: [
                None if row["expected_low"] is None else (row["expected_low"], row["expected_high"]) for row in rows
            ]
        },
        axis="share of the changed weights",
        caption="By chance: as many weights of each matrix, drawn at random; the interval holds 95% of such draws. Same "
        "size: drawn with the magnitudes of the changed weights.",
    )


def _layer_figures(numbers: Mapping[str, Any]) -> list[Lines]:
    rows = [row for row in numbers["layers"] if row["layer"] is not None]
    if len(rows) < 2:
        return []
    return [
        Lines(
            title="Overlap over chance by layer",
            x=[row["layer"] for row in rows],
            series={WORDS[name]: [row[name]["ratio"] for row in rows] for name in SETS} | {_CHANCE: [1.0] * len(rows)},
            x_label="layer",
            y_label="overlap / chance",
        )
    ]


def _maps(numbers: Mapping[str, Any]) -> list[Heatmap]:
    cells = {(row["layer"], row["kind"]): row for row in numbers["cells"]}
    layers = [row["layer"] for row in numbers["layers"]]
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in numbers["kinds"])]
    if len(cells) < 2:
        return []
    return [
        Heatmap(
            title=f"Overlap over chance: {WORDS[name]}",
            values=[
                [cells[layer, kind][name]["ratio"] if (layer, kind) in cells else None for kind in kinds]
                for layer in layers
            ],
            row_labels=[layer_label(layer) for layer in layers],
            column_labels=kinds,
            row_axis="layer",
            column_axis="kind of matrix",
            centre=1.0,
            decimals=2,
            caption="1 is chance. Blank: nothing changed, or no such matrix.",
        )
        for name in SETS
    ]


def _examples(examples: Sequence[Mapping[str, Any]]) -> list[Heatmap]:
    words = {"changed": "Changed weights", "principal": "Principal weights"}
    return [
        map_figure(
            f"{words[key]} of {one['name']}",
            one[key],
            "Share of each block of the matrix; without colour: as many as in the whole matrix.",
        )
        for one in examples
        for key in words
    ]


def _gini_figures(numbers: Mapping[str, Any]) -> list[Bars]:
    rows = [row for row in numbers["profiles"]["kinds"] if row["row_gini"] is not None]
    if not rows:
        return []
    return [
        Bars(
            title=f"How unevenly changes spread over {side}s",
            labels=[row["kind"] for row in rows],
            series={
                "measured": [row[f"{side}_gini"] for row in rows],
                _CHANCE: [row[f"expected_{side}_gini"] for row in rows],
            },
            axis=f"Gini coefficient of the changes per {side}",
            shares=False,
            caption=f"0: every {side} has as many changes; near 1: few {side}s have them all. Mean over matrices.",
        )
        for side in ("row", "column")
    ]


def _table(title: str, what: str, labels: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each group and set, so that the csv file needs no taking apart."""
    detail = what == "tensor"
    lines = [(label, WORDS[name], row[name]) for label, row in zip(labels, rows, strict=True) for name in SETS]
    shares = ("overlap", "expected_overlap", "expected_low", "expected_high")
    return Table(
        title=title,
        columns=[what, "set", "changed", "overlap", "chance", "low", "high", "ratio"],
        rows=[
            [label, words, count(row["num_changed"]), *(percent(row[key]) for key in shares), number(row["ratio"])]
            for label, words, row in lines
        ],
        raw=[
            [label, words, row["num_changed"], *(row[key] for key in shares), row["ratio"]]
            for label, words, row in lines
        ],
        note="Shares of the changed weights. 95% of random sets of as many weights overlap by something from low to "
        "high; for the same size, random sets with as many weights of each power of two. Ratio: overlap over chance.",
        terminal_rows=0 if detail else 48,
        collapsed=detail,
    )


def _unmeasured(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    if not rows:
        return []
    return [
        Table(
            title="Matrices without principal weights",
            columns=["tensor", "why"],
            rows=[[row["name"], row["reason"]] for row in rows],
        )
    ]
