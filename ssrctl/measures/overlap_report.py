"""The overlap of several runs in words, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ssrctl.measures.maths.grouping import layer_label
from ssrctl.measures.maths.row_column_counts import map_figure
from ssrctl.measures.published import references
from ssrctl.report.document import Bars, Heatmap, Reference, Section, Table
from ssrctl.report.formats import count, number, percent

_CHANCE = "expected by chance"


def headlines(numbers: Mapping[str, Any]) -> list[str]:
    """The answer in sentences.

    Args:
        numbers: from ``run_overlap.run_overlap_numbers``.
    """
    total, runs = numbers["total"], numbers["runs"]
    if total["jaccard"] is None:
        return ["No run changed any weight, so that there is nothing to overlap."]
    lines = [
        f"{len(runs)} runs agree on which weights change with a Jaccard index of {number(total['jaccard'])}"
        f"{_times(total['jaccard'], total['expected_jaccard'])}."
    ]
    if total["expected_jaccard_same_size"]:
        lines.append(
            f"Against random weights of the same magnitudes the index is "
            f"{number(total['jaccard'] / total['expected_jaccard_same_size'])} times chance "
            f"({number(total['expected_jaccard_same_size'])})."
        )
    if total["one_sided"] is not None:
        lines.append(
            f"{percent(total['one_sided'])} of what one run changed, another changed too; "
            f"{percent(total['expected_one_sided'])} would be chance."
        )
    if len(runs) > 2:
        lines.append(
            f"All {len(runs)} runs changed {percent(total['all_runs_of_ever'])} of the weights that any of them changed; "
            f"{percent(total['expected_all_runs_of_ever'])} would be chance."
        )
    return lines


def _times(measured: float, expected: float | None) -> str:
    if not expected:
        return ""
    return f", {number(measured / expected)} times chance ({number(expected)})"


def run_overlap_section(numbers: Mapping[str, Any], published: bool = False) -> Section:
    """Overlap of every pair of runs, consensus, and by kind of matrix and layer.

    Args:
        numbers: from ``run_overlap.run_overlap_numbers``.
        published: show what was published for changes by the bf16-aware rule.
    """
    title = "Overlap between runs"
    if not numbers["tensors"]:
        return Section(title=title, text="There are no weights to compare.")
    return Section(
        title=title,
        text=f"Do different runs from one base change the same weights? Changed: {numbers['rule']}. Chance is "
        "independence within each tensor, so that runs which change the same tensors are not yet counted as agreeing.",
        figures=[
            *_maps(numbers),
            _consensus_figure(numbers),
            *_kind_figures(numbers, references("run_jaccard") if published else []),
            *[
                map_figure(
                    f"Consensus of runs on {one['name']}",
                    one["consensus"],
                    "Mean share of the runs that changed a weight, by block of the matrix; without colour: the mean.",
                )
                for one in numbers["examples"]
            ],
        ],
        tables=[
            _pair_table(numbers),
            _consensus_table(numbers),
            _group_table(
                "Overlap by kind of matrix", "kind", [row["kind"] for row in numbers["kinds"]], numbers["kinds"]
            ),
            _group_table(
                "Overlap by layer", "layer", [layer_label(row["layer"]) for row in numbers["layers"]], numbers["layers"]
            ),
            _group_table(
                "Overlap by tensor", "tensor", [row["name"] for row in numbers["tensors"]], numbers["tensors"]
            ),
        ],
    )


def _maps(numbers: Mapping[str, Any]) -> list[Heatmap]:
    found, runs = numbers["matrices"], numbers["runs"]
    if len(runs) < 2 or len(runs) > 80:
        return []
    captions = {
        "jaccard": "Shared weights of two runs over all that either changed.",
        "one_sided": "Share of the row's changed weights that the column's run changed too.",
    }
    titles = {"jaccard": "Jaccard index of runs", "one_sided": "One-sided overlap of runs"}
    return [
        Heatmap(
            title=titles[key] + suffix,
            values=[
                [None if i == j else value for j, value in enumerate(row)] for i, row in enumerate(found[prefix + key])
            ],
            labels=runs,
            axis="run",
            scale=1.0,
            shares=key == "one_sided",
            decimals=3 if key == "jaccard" else 1,
            caption=captions[key],
        )
        for key in ("jaccard", "one_sided")
        for prefix, suffix in (("", ""), ("expected_", ", expected by chance"))
    ]


def _consensus_figure(numbers: Mapping[str, Any]) -> Bars:
    rows = numbers["consensus"]
    return Bars(
        title="Consensus of runs",
        labels=[f"{row['runs']} or more" for row in rows],
        series={
            "measured": [row["frac_of_ever"] for row in rows],
            _CHANCE: [row["expected_frac_of_ever"] for row in rows],
        },
        axis="share of the weights that any run changed",
        caption="Weights that so many of the runs changed.",
    )


def _kind_figures(numbers: Mapping[str, Any], published: list[Reference]) -> list[Bars]:
    rows = numbers["kinds"]
    figures = [
        Bars(
            title="Jaccard index by kind of matrix",
            labels=[row["kind"] for row in rows],
            series={
                "measured": [row["jaccard"] for row in rows],
                _CHANCE: [row["expected_jaccard"] for row in rows],
            },
            axis="mean over pairs of runs",
            references=published,
        )
    ]
    lined = [row for row in rows if row["row_agreement"] is not None or row["column_agreement"] is not None]
    if lined:
        figures.append(
            Bars(
                title="Do runs hit the same rows and columns?",
                labels=[row["kind"] for row in lined],
                series={
                    "rows": [row["row_agreement"] for row in lined],
                    "columns": [row["column_agreement"] for row in lined],
                },
                axis="rank correlation of changes per row, per column",
                shares=False,
                caption="Mean over pairs of runs and over matrices; 0 is chance, 1 the same order.",
            )
        )
    return figures


def _pair_table(numbers: Mapping[str, Any]) -> Table:
    runs, found, whole = numbers["runs"], numbers["matrices"], numbers["whole_model"]
    pairs = [(i, j) for i in range(len(runs)) for j in range(i + 1, len(runs))]
    raw = [
        [
            runs[i],
            runs[j],
            found["one_sided"][i][j],
            found["expected_one_sided"][i][j],
            whole["expected_one_sided"][i][j],
            found["one_sided"][j][i],
            found["expected_one_sided"][j][i],
            whole["expected_one_sided"][j][i],
            found["jaccard"][i][j],
            found["expected_jaccard"][i][j],
            found["expected_jaccard_same_size"][i][j],
        ]
        for i, j in pairs
    ]
    return Table(
        title="Pairs of runs",
        columns=[
            "run 1",
            "run 2",
            "o1",
            "o1 chance",
            "o1 chance, model",
            "o2",
            "o2 chance",
            "o2 chance, model",
            "Jaccard",
            "Jaccard chance",
            "at equal magnitude",
        ],
        rows=[[*row[:2], *map(percent, row[2:8]), *map(number, row[8:])] for row in raw],
        raw=raw,
        note="o1, o2: shared weights over those that run 1, run 2 changed (Mukherjee et al. 2025, section 5). Chance: "
        "within each tensor; model: if changes could lie anywhere in the model; at equal magnitude: the Jaccard index by "
        "chance if each run changed as many weights of each power of two of each tensor as it did.",
        terminal_rows=24,
    )


def _consensus_table(numbers: Mapping[str, Any]) -> Table:
    keys = ("frac", "expected_frac", "frac_of_ever", "expected_frac_of_ever")
    rows = numbers["consensus"]
    return Table(
        title="Consensus of runs",
        columns=["runs", "weights", "of all", "chance", "of ever changed", "chance of ever changed"],
        rows=[[f"{row['runs']} or more", count(row["count"]), *(percent(row[key]) for key in keys)] for row in rows],
        raw=[[row["runs"], row["count"], *(row[key] for key in keys)] for row in rows],
        note="Weights that at least so many runs changed (Zhu et al. 2025, section 2.2).",
    )


def _group_table(title: str, what: str, labels: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Table:
    detail = what == "tensor"
    keys = (
        "jaccard", "expected_jaccard", "expected_jaccard_same_size", "one_sided", "expected_one_sided",
        "all_runs_of_ever", "expected_all_runs_of_ever", "row_agreement", "column_agreement",
    )  # fmt: skip
    shares = set(keys[3:7])
    return Table(
        title=title,
        columns=[
            what,
            "weights",
            "Jaccard",
            "chance",
            "at equal magnitude",
            "one-sided",
            "chance, one-sided",
            "all runs",
            "chance, all runs",
            "rows",
            "columns",
        ],
        rows=[
            [label, count(row["numel"]), *(percent(row[key]) if key in shares else number(row[key]) for key in keys)]
            for label, row in zip(labels, rows, strict=True)
        ],
        raw=[[label, row["numel"], *(row[key] for key in keys)] for label, row in zip(labels, rows, strict=True)],
        note="Means over pairs of runs. At equal magnitude: the Jaccard index by chance among weights of one power of two, "
        "since small weights move more easily. All runs: share of ever changed weights that every run changed. Rows, columns: "
        "rank correlation of the changes per row, per column.",
        terminal_rows=0 if detail else 48,
        collapsed=detail,
    )
