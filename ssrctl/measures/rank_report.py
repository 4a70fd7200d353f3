"""The rank of updates in words, tables and figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ssrctl.measures.maths.grouping import grouped, layer_label
from ssrctl.measures.maths.matrices import OfMatrix, place_of, unmeasured
from ssrctl.measures.published import references
from ssrctl.measures.rank import UpdateRank
from ssrctl.report.document import Bars, Lines, Section, Table
from ssrctl.report.formats import count, number, percent

# (heading, key of the numbers, how it is written)
Column = tuple[str, str, Callable[[Any], str]]

_MEANS = (
    "rank_frac",
    "pattern_rank_frac",
    "effective_rank_frac",
    "expected_effective_rank_frac",
    "stable_rank_frac",
    "expected_stable_rank_frac",
)
_SHARED: tuple[Column, ...] = (
    ("rank", "rank_frac", percent),
    ("effective", "effective_rank_frac", percent),
    ("random effective", "expected_effective_rank_frac", percent),
    ("stable", "stable_rank_frac", percent),
    ("random stable", "expected_stable_rank_frac", percent),
)
_GROUP: tuple[Column, ...] = (
    ("matrices", "num_matrices", count),
    ("unchanged", "num_unchanged", count),
    ("full rank", "num_full_rank", count),
    *_SHARED,
    ("beyond chance", "signal_rank", count),
    ("rounding ratio", "rounding_ratio", number),
)
_TENSOR: tuple[Column, ...] = (
    ("maximum", "max_rank", count),
    ("changed rows or columns", "pattern_rank", count),
    *_SHARED,
    ("beyond chance", "signal_rank", count),
    ("tolerance", "tolerance", number),
    ("largest singular value", "spectral_norm", number),
    ("rounding ratio", "rounding_ratio", number),
)


def rank_numbers(found: Mapping[str, OfMatrix[UpdateRank]]) -> dict[str, Any] | None:
    """Ranks as the report stores them, by layer, kind and matrix; None when none was measured.

    Means are over the matrices that changed; None when none did.
    """
    if not found:
        return None
    ranks = {name: one.value for name, one in found.items() if isinstance(one.value, UpdateRank)}
    numbers = grouped(ranks, _summary)
    numbers["tensors"] = [place_of(name, found[name].shape) | one.numbers() for name, one in ranks.items()]
    numbers["unmeasured"] = unmeasured(found)
    return numbers


def _summary(ranks: Sequence[UpdateRank]) -> dict[str, Any]:
    changed = [one.numbers() for one in ranks if one.rank > 0]
    return {
        "num_matrices": len(ranks),
        "num_unchanged": len(ranks) - len(changed),
        "num_full_rank": sum(one["rank"] == one["max_rank"] for one in changed),
        "num_beyond_chance": sum(one["signal_rank"] > 0 for one in changed),
        "num_within_rounding": sum(one["rounding_ratio"] >= 1 for one in changed),
        "signal_rank": statistics.fmean(one["signal_rank"] for one in changed) if changed else None,
        "rounding_ratio": statistics.median(one["rounding_ratio"] for one in changed) if changed else None,
    } | {key: statistics.fmean(one[key] for one in changed) if changed else None for key in _MEANS}


def rank_headlines(numbers: Mapping[str, Any]) -> list[str]:
    """The answer in sentences, from ``rank_numbers``."""
    total = numbers["total"]
    if total["num_matrices"] == 0:
        return []
    if total["rank_frac"] is None:
        return [f"Rank: no update, since nothing changed in {_matrices(total['num_matrices'])}."]
    changed = total["num_matrices"] - total["num_unchanged"]
    return [
        f"Rank: the updates of {_matrices(changed)} have {percent(total['rank_frac'])} of the largest possible rank on "
        f"average, {count(total['num_full_rank'])} of them all of it. Weighed by their singular values it is "
        f"{percent(total['effective_rank_frac'])} (effective rank; random matrices: "
        f"{percent(total['expected_effective_rank_frac'])}).",
        f"{count(total['num_beyond_chance'])} of these {count(changed)} updates have directions that stand out from "
        "independent changes of the same sizes. Rounding the tuned weights once, which gives full rank by itself, "
        f"would change a typical matrix by {number(total['rounding_ratio'])} times the norm of its update.",
    ]


def _matrices(value: int) -> str:
    return "1 weight matrix" if value == 1 else f"{value:,} weight matrices"


def rank_section(numbers: Mapping[str, Any]) -> Section:
    """Figures and tables, from ``rank_numbers``."""
    kinds = numbers["kinds"]
    layers = [row for row in numbers["layers"] if row["layer"] is not None]
    figures: list[Bars | Lines] = []
    if kinds:
        figures.append(
            Bars(
                title="Rank of the updates by kind of matrix",
                labels=[row["kind"] for row in kinds],
                series={
                    "rank": [row["rank_frac"] for row in kinds],
                    "effective rank": [row["effective_rank_frac"] for row in kinds],
                    "expected effective rank of a random matrix": [
                        row["expected_effective_rank_frac"] for row in kinds
                    ],
                },
                axis="share of the largest possible rank",
                references=references("rank"),
                caption="Published: mean rank of the update matrices, tolerance not stated.",
            )
        )
    if len(layers) > 1:
        figures.append(
            Lines(
                title="Rank of the updates over layers",
                x=[row["layer"] for row in layers],
                series={
                    "rank": [row["rank_frac"] for row in layers],
                    "effective rank": [row["effective_rank_frac"] for row in layers],
                    "expected effective rank of a random matrix": [
                        row["expected_effective_rank_frac"] for row in layers
                    ],
                },
                x_label="layer",
                y_label="share of the largest possible rank",
                shares=True,
            )
        )
    return Section(
        title="Rank of the updates",
        text="Does training move each matrix in a few directions or in all of them? An update that is stored with "
        "rounding has full rank whatever training did, so look at the effective rank beside that of a random matrix, "
        "and at how many singular values stand out.",
        figures=[*figures],
        tables=_tables(numbers),
    )


def _tables(numbers: Mapping[str, Any]) -> list[Table]:
    note = (
        "Means over the matrices that changed, as shares of the smaller side. Rank: singular values above max(m, n) * "
        "2^-23 of the largest. Effective: exp of the entropy of the singular values. Stable: squared norms, Frobenius "
        "over spectral. Beyond chance: singular values above what random signs would give. Rounding ratio: what "
        "rounding the tuned weights once would change, over the update (median)."
    )
    details = (
        "Changed rows or columns: the smaller number of rows and columns that are not all unchanged, which no rank "
        "of these coordinates can exceed. Tolerance: as used for this matrix."
    )
    return measure_tables("Rank", numbers, (_GROUP, note), (_TENSOR, details))


def measure_tables(
    what: str,
    numbers: Mapping[str, Any],
    groups: tuple[Sequence[Column], str],
    matrices: tuple[Sequence[Column], str],
) -> list[Table]:
    """A measure by kind of matrix, by layer and by matrix, and the matrices that lack it; empty tables are left out.

    Args:
        what: the measure, as titles begin.
        numbers: with ``kinds``, ``layers``, ``tensors`` and ``unmeasured``.
        groups, matrices: columns and note of the tables of groups, and of that of matrices.
    """
    kinds, layers, tensors = numbers["kinds"], numbers["layers"], numbers["tensors"]
    by_layer = [layer_label(row["layer"]) for row in layers]
    names = [row["name"] for row in tensors]
    tables = (
        measure_table(f"{what} by kind of matrix", "kind", [row["kind"] for row in kinds], kinds, *groups),
        measure_table(f"{what} by layer", "layer", by_layer, layers, *groups, detail=True),
        measure_table(f"{what}, matrix by matrix", "matrix", names, tensors, *matrices, detail=True),
        unmeasured_table(f"Matrices without a {what.lower()}", numbers["unmeasured"]),
    )
    return [table for table in tables if table.rows]


def measure_table(
    title: str,
    what: str,
    labels: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[Column],
    note: str,
    detail: bool = False,
) -> Table:
    """A table of numbers, one row each, with the plain numbers beside what is shown.

    Args:
        what: heading of the first column, which holds ``labels``.
        detail: a long one that the page shows when asked to, and the terminal does not.
    """
    return Table(
        title=title,
        columns=[what, *(heading for heading, _, _ in columns)],
        rows=[[label, *(show(row[key]) for _, key, show in columns)] for label, row in zip(labels, rows, strict=True)],
        raw=[[label, *(row[key] for _, key, _ in columns)] for label, row in zip(labels, rows, strict=True)],
        note=note,
        terminal_rows=0 if detail else 48,
        collapsed=detail,
    )


def unmeasured_table(title: str, found: Sequence[Mapping[str, str]]) -> Table:
    """Names and reasons."""
    return Table(
        title=title,
        columns=["tensor", "reason"],
        rows=[[one["name"], one["reason"]] for one in found],
        terminal_rows=0,
        collapsed=True,
    )
