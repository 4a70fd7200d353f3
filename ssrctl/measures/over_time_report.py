"""A run over time in words, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ssrctl.measures.maths.grouping import layer_label
from ssrctl.measures.published import PublishedKey, references
from ssrctl.report.document import Heatmap, Lines, Section, Table
from ssrctl.report.formats import count, number, percent

_MOST_COLUMNS = 80  # of a heat map


def headlines(numbers: Mapping[str, Any]) -> list[str]:
    """The answer in sentences; none when there are no weights.

    Args:
        numbers: from ``over_time.over_time_numbers``.
    """
    total = numbers["total"]
    if not total["sparsity"] or total["final_frac"] is None:
        return []
    first, last = total["sparsity"][0], total["sparsity"][-1]
    if total["ever_frac"][-1] == 0:
        return ["No weight changed at any checkpoint."]
    return [
        f"Sparsity against the base goes from {percent(first)} at {_step(numbers, 0)} to {percent(last)} at "
        f"{_step(numbers, -1)}.",
        f"{percent(total['outside_final_of_ever'])} of the weights that ever changed are not in the final subnetwork "
        f"({percent(total['ever_outside_frac'])} of all weights); {percent(total['cancelled_of_ever'])} are back at the "
        "base's value bit for bit.",
        f"{percent(total['never_frac'])} of the weights never changed at any checkpoint.",
    ]


def _step(numbers: Mapping[str, Any], place: int) -> str:
    return f"step {numbers['steps'][place]:g}"


def over_time_section(numbers: Mapping[str, Any], published: PublishedKey | None = None) -> Section:
    """Sparsity, union and subnetwork over the checkpoints of a run, by layer and by kind of matrix.

    Args:
        numbers: from ``over_time.over_time_numbers``.
        published: the published sparsity that was measured by the same rule, if any.
    """
    title = "The run over time"
    if not numbers["steps"] or not numbers["tensors"]:
        return Section(title=title, text="There are no checkpoints, or no weights in them.")
    return Section(
        title=title,
        text=f"How does the set of changed weights grow, and does it stay? Changed: {numbers['rule']}. The final "
        "subnetwork is what differs from the base at the last checkpoint.",
        figures=[*_lines(numbers, published), *_stability_figures(numbers), *_layer_map(numbers)],
        tables=[_step_table(numbers), _kind_table(numbers), _end_table(numbers)],
    )


def _lines(numbers: Mapping[str, Any], published: PublishedKey | None) -> list[Lines]:
    total, steps = numbers["total"], numbers["steps"]
    return [
        Lines(
            title="Update sparsity over time",
            x=steps,
            series={"against the base": total["sparsity"], "between neighbours": total["neighbour_sparsity"]},
            x_label="training step",
            y_label="share unchanged",
            shares=True,
            references=references(published, "RL") if published else [],
        ),
        Lines(
            title="Growth of the changed set",
            x=steps,
            series={
                "changed at some checkpoint so far": total["ever_frac"],
                "changed now": [None if one is None else 1 - one for one in total["sparsity"]],
                "expected, ever changed": total["expected_ever_frac"],
            },
            x_label="training step",
            y_label="share of all weights",
            shares=True,
            caption="Expected: if each interval moved as many weights of each tensor as it did, drawn at random. Below "
            "it, the same weights move again.",
        ),
        Lines(
            title="Changed, but not in the final subnetwork",
            x=steps,
            series={"of all weights": total["outside_final_frac"]},
            x_label="training step",
            y_label="share of all weights",
            shares=True,
            caption="Weights that differ from the base at this step and no longer at the end (Mukherjee et al. 2025, "
            "figure 6).",
        ),
    ]


def _stability_figures(numbers: Mapping[str, Any]) -> list[Lines]:
    total = numbers["total"]
    if len(numbers["steps"]) < 2 or all(one is None for one in (*total["row_stability"], *total["column_stability"])):
        return []
    return [
        Lines(
            title="Do the rows and columns that change stay the same?",
            x=numbers["steps"],
            series={"rows": total["row_stability"], "columns": total["column_stability"]},
            x_label="training step",
            y_label="rank correlation with the last step",
            caption="Changes per row, per column of each matrix; mean over matrices. 1 at the end by definition (Zhu "
            "et al. 2025, section 2.2).",
        )
    ]


def _layer_map(numbers: Mapping[str, Any]) -> list[Heatmap]:
    layers, steps = numbers["layers"], numbers["steps"]
    if len(layers) < 2:
        return []
    kept = _spread(len(steps), _MOST_COLUMNS)
    return [
        Heatmap(
            title="Changed share by layer over time",
            values=[
                [None if row["sparsity"][place] is None else 1 - row["sparsity"][place] for place in kept]
                for row in layers
            ],
            row_labels=[layer_label(row["layer"]) for row in layers],
            column_labels=[f"{steps[place]:g}" for place in kept],
            row_axis="layer",
            column_axis="training step",
            shares=True,
            decimals=1,
        )
    ]


def _spread(size: int, most: int) -> list[int]:
    """Up to ``most`` places among ``size``, evenly spread, with the first and the last."""
    if size <= most:
        return list(range(size))
    return [round(place * (size - 1) / (most - 1)) for place in range(most)]


def _step_table(numbers: Mapping[str, Any]) -> Table:
    keys = (
        "sparsity", "neighbour_sparsity", "ever_frac", "expected_ever_frac",
        "outside_final_frac", "outside_final_of_changed", "row_stability", "column_stability",
    )  # fmt: skip
    total = numbers["total"]
    raw = [[step, *(total[key][place] for key in keys)] for place, step in enumerate(numbers["steps"])]
    return Table(
        title="Checkpoints",
        columns=[
            "step",
            "sparsity",
            "to the one before",
            "ever changed",
            "ever, chance",
            "not in final",
            "not in final, of changed",
            "rows",
            "columns",
        ],
        rows=[[f"{row[0]:g}", *map(percent, row[1:7]), *map(number, row[7:])] for row in raw],
        raw=raw,
        note="Shares of all weights but for the share of changed ones. The first checkpoint's neighbour is the base. "
        "Rows, columns: rank correlation of the changes per row, per column with the last checkpoint's.",
        terminal_rows=24,
    )


_END = (
    "final_frac", "never_frac", "outside_final_of_ever", "cancelled_of_ever", "ever_outside_frac", "cancelled_frac",
)  # fmt: skip
_END_COLUMNS = [
    "weights", "in final", "never changed", "not in final, of ever", "cancelled, of ever",
    "not in final, of all", "cancelled, of all",
]  # fmt: skip
_END_NOTE = (
    "Ever: changed at some checkpoint. Not in final: changed then, but not at the last one. Cancelled: equal to the base "
    "bit for bit at the last one."
)


def _kind_table(numbers: Mapping[str, Any]) -> Table:
    return _at_end(
        "The end of the run by kind of matrix", "kind", [row["kind"] for row in numbers["kinds"]], numbers["kinds"]
    )


def _end_table(numbers: Mapping[str, Any]) -> Table:
    return _at_end(
        "The end of the run by tensor", "tensor", [row["name"] for row in numbers["tensors"]], numbers["tensors"]
    )


def _at_end(title: str, what: str, labels: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Table:
    detail = what == "tensor"
    labelled = list(zip(labels, rows, strict=True))
    return Table(
        title=title,
        columns=[what, *_END_COLUMNS],
        rows=[[label, count(row["numel"]), *(percent(row[key]) for key in _END)] for label, row in labelled],
        raw=[[label, row["numel"], *(row[key] for key in _END)] for label, row in labelled],
        note=_END_NOTE,
        terminal_rows=0 if detail else 48,
        collapsed=detail,
    )
