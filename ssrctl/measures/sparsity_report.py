"""The difference between two checkpoints in words, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ssrctl.checkpoints.names import KINDS, layer_index, matrix_kind
from ssrctl.measures.maths.change import FIXED_TOLERANCES, tolerance_key
from ssrctl.measures.maths.largest_changes import Mover, TopMovers
from ssrctl.measures.maths.ulp import bin_label
from ssrctl.measures.sparsity import Change, add_up, group_changes
from ssrctl.report.document import Bars, Column, Figure, Heatmap, Histogram, Section, Table
from ssrctl.report.formats import count, number, percent

_OUTSIDE = "outside"


def sparsity_numbers(
    changes: Mapping[str, Change],
    movers: TopMovers | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Any]:
    """The report's numbers: ``total``, ``layers``, ``kinds``, ``cells`` and ``tensors`` (names in the order given).

    Args:
        changes: by tensor name.
        movers: the weights that moved furthest, given under ``movers``.
        shapes: of the tensors that they are in; needed with ``movers``.
    """
    layers, kinds = group_changes(changes)
    cells: dict[tuple[str, int | None], Change] = {}
    for name, change in changes.items():
        key = matrix_kind(name), layer_index(name)
        cells[key] = cells.get(key, Change()) + change
    numbers = {
        "total": add_up(changes.values()).numbers(),
        "layers": [{"layer": layer} | change.numbers() for layer, change in layers.items()],
        "kinds": [{"kind": kind} | change.numbers() for kind, change in kinds.items()],
        "cells": [{"kind": kind, "layer": layer} | change.numbers() for (kind, layer), change in cells.items()],
        "tensors": [
            {"name": name, "layer": layer_index(name), "kind": matrix_kind(name)} | change.numbers()
            for name, change in changes.items()
        ],
    }
    if movers is not None:
        assert shapes is not None
        numbers["movers"] = {
            which: [_mover_numbers(one, shapes[one.name]) for one in kept]
            for which, kept in (("absolute", movers.absolute), ("relative", movers.relative))
        }
    return numbers


def _mover_numbers(mover: Mover, shape: tuple[int, ...]) -> dict[str, Any]:
    return {
        "name": mover.name,
        "position": list(mover.position(shape)),
        "before": mover.before,
        "after": mover.after,
        "change": mover.change,
        "relative_change": mover.relative_change,
    }


def headlines(numbers: Mapping[str, Any], atol: float) -> list[str]:
    """The answer in sentences.

    Args:
        numbers: from ``sparsity_numbers``.
        atol: the tolerance they were made with.
    """
    total = numbers["total"]
    if total["num_bit_changed"] == 0:
        return [f"The two checkpoints are identical bit for bit: {count(total['numel'])} weights, sparsity 1."]
    hidden = total["num_bit_changed"] - total["num_changed"]
    lines = [
        f"Update sparsity {percent(total['sparsity'])}: so many of the {count(total['numel'])} weights moved by no "
        f"more than {atol:g}.",
        f"Bit for bit, {percent(total['bit_equal_frac'])} are unchanged: {count(total['num_bit_changed'])} weights "
        f"changed, {count(hidden)} of them by no more than {atol:g}.",
        f"The update's norm is {number(total['relative_l2'])} of the base's; the largest change of a weight is "
        f"{number(total['max_abs_difference'])}.",
    ]
    if total["sparsity_bf16"] != total["bit_equal_frac"]:
        lines.append(
            f"Compared as bfloat16, {percent(total['sparsity_bf16'])} are unchanged (the rule of Zhu et al. 2025)."
        )
    if total["num_stepped"]:
        lines.append(
            f"Of the {count(total['num_stepped'])} weights that moved by a representable step or more, "
            f"{percent(total['one_step_frac'])} moved by exactly one."
        )
    kinds = [kind for kind in numbers["kinds"] if kind["numel"]]
    if len(kinds) > 1:
        # Small changes may all lie within the tolerance; then the stored bits tell the kinds apart.
        which, words = ("bit_equal_frac", "unchanged bit for bit")
        if total["num_changed"]:
            which, words = "sparsity", "sparsity"
        most = min(kinds, key=lambda kind: kind[which])
        least = max(kinds, key=lambda kind: kind[which])
        lines.append(
            f"Most changed: {most['kind']} ({words} {percent(most[which])}); least: {least['kind']} "
            f"({percent(least[which])})."
        )
    return lines


def nonfinite_note(total: Mapping[str, Any]) -> str | None:
    """A sentence on NaN and infinite weights, None when there are none."""
    found = [
        f"{total[f'num_{what}_{side}']} {what} in {side}"
        for side in ("base", "tuned")
        for what in ("nan", "inf")
        if total[f"num_{what}_{side}"]
    ]
    if not found:
        return None
    return (
        f"Weights that are no numbers: {', '.join(found)}. They count as changed unless they are equal bit for bit; "
        "norms, means and maxima leave them out."
    )


def sparsity_sections(numbers: Mapping[str, Any], atol: float) -> list[Section]:
    """Everything on which weights changed and how far: what answers first, what details last."""
    within = f"within {atol:g}"
    return [
        rules_section(numbers, atol),
        _group_section(
            "By kind of matrix", "kind", [row["kind"] for row in numbers["kinds"]], numbers["kinds"], within
        ),
        _group_section(
            "By layer",
            "layer",
            [_layer_label(row["layer"]) for row in numbers["layers"]],
            numbers["layers"],
            within,
        ),
        size_section(numbers),
        Section(
            title="Tensor by tensor",
            tables=[
                _table("All tensors", "tensor", [row["name"] for row in numbers["tensors"]], numbers["tensors"], within)
            ],
        ),
    ]


def rules_section(numbers: Mapping[str, Any], atol: float) -> Section:
    """What is unchanged by each rule, side by side, and where: kinds of matrices over layers."""
    total = numbers["total"]
    rules = [("bit for bit", "bit_equal_frac"), ("as bfloat16 (eta)", "sparsity_bf16")]
    rules += [(f"within {tolerance:g}", tolerance_key(tolerance)) for tolerance in FIXED_TOLERANCES]
    if atol not in FIXED_TOLERANCES:
        rules.append((f"within {atol:g}", "sparsity"))
    kinds = [row for row in numbers["kinds"] if row["numel"]]
    columns = [("all", total), *((row["kind"], row) for row in kinds)]
    table = Table(
        title="Unchanged weights by rule",
        columns=["rule", *(label for label, _ in columns)],
        rows=[[rule, *(percent(row[key]) for _, row in columns)] for rule, key in rules],
        raw=[[rule, *(row[key] for _, row in columns)] for rule, key in rules],
        note="Fixed tolerances: Mukherjee et al. 2025, table 6. As bfloat16: |d| <= eta times the larger of the two "
        "magnitudes, both rounded to bfloat16 (Zhu et al. 2025, definition 2.1), which for bfloat16 weights is equality. "
        "A fixed tolerance hides real changes of small weights, and in wide dtypes calls large weights changed that "
        "bfloat16 stores as the same number.",
    )
    return Section(title="By rule", figures=_heatmaps(numbers), tables=[table])


def _heatmaps(numbers: Mapping[str, Any]) -> list[Figure]:
    """Share changed as bfloat16, kinds x layers; none without layers."""
    cells = {(cell["kind"], cell["layer"]): cell for cell in numbers["cells"] if cell["numel"]}
    layers = sorted({layer for _, layer in cells if layer is not None})
    kinds = [kind for kind in KINDS if any((kind, layer) in cells for layer in layers)]
    if not layers:
        return []
    changed = [
        [cells[kind, layer]["num_bf16_changed"] / cells[kind, layer]["numel"] if (kind, layer) in cells else None for layer in layers]
        for kind in kinds
    ]  # fmt: skip
    return [
        Heatmap(
            title="Changed weights by kind and layer",
            values=changed,
            row_labels=kinds,
            column_labels=[str(layer) for layer in layers],
            row_axis="kind",
            column_axis="layer",
            shares=True,
            decimals=0,
            caption="Share of weights that changed as bfloat16; blank where a layer has no such matrix.",
        )
    ]


def size_section(numbers: Mapping[str, Any]) -> Section:
    """How far the weights moved: representable steps, and the largest movers."""
    total = numbers["total"]
    tables = [_steps_table(numbers["kinds"])]
    for which, rows in numbers.get("movers", {}).items():
        title = {"absolute": "Largest changes", "relative": "Largest relative changes"}[which]
        tables.append(_movers_table(title, rows))
    labels = _bins(total["ulp_distances"])
    figures: list[Figure] = []
    if labels:
        figures.append(
            Histogram(
                title="How many representable steps the weights moved",
                bins=labels,
                series={"changed weights": [total["ulp_distances"].get(label, 0) for label in labels]},
                x_label="steps (units in the last place)",
                y_label="weights",
                log=True,
            )
        )
    return Section(title="Size of the change", figures=figures, tables=tables)


def _bins(distances: Mapping[str, int]) -> list[str]:
    """The bins from the first to the last that holds anything."""
    labels: list[str] = []
    while not set(distances) <= set(labels):
        labels.append(bin_label(len(labels)))
    return labels


def _steps_table(kinds: Sequence[Mapping[str, Any]]) -> Table:
    return Table(
        title="Steps by kind of matrix",
        columns=["kind", "moved", "by one step", "share of one step", "below a step"],
        rows=[
            [
                row["kind"],
                count(row["num_stepped"]),
                count(row["ulp_distances"].get("1", 0)),
                percent(row["one_step_frac"]),
                count(row["num_below_step"]),
            ]
            for row in kinds
        ],
        note="A step leads from a number to the next one that its dtype can represent; where the two checkpoints are "
        "stored in two dtypes, the narrower one's. Below a step: not equal bit for bit, yet the same number there.",
    )


def _movers_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    return Table(
        title=title,
        columns=["tensor", "position", "before", "after", "change", "relative"],
        rows=[
            [
                row["name"],
                ", ".join(map(str, row["position"])),
                f"{row['before']:.6g}",
                f"{row['after']:.6g}",
                f"{row['change']:+.3g}",
                number(row["relative_change"]),
            ]
            for row in rows
        ],
        note="Relative: the change over the weight's size before it; weights that were 0 have none.",
        terminal_rows=0,
        collapsed=True,
    )


def _layer_label(layer: int | None) -> str:
    return _OUTSIDE if layer is None else str(layer)


def _group_section(title: str, what: str, labels: list[str], rows: list[dict[str, Any]], within: str) -> Section:
    figure = Bars(
        title=f"Unchanged weights {title.lower()}",
        labels=labels,
        series={
            within: [row["sparsity"] for row in rows],
            "as bfloat16": [row["sparsity_bf16"] for row in rows],
            "bit for bit": [row["bit_equal_frac"] for row in rows],
        },
        axis="share unchanged",
    )
    return Section(title=title, figures=[figure], tables=[_table(title, what, labels, rows, within)])


def _table(title: str, what: str, labels: list[str], rows: list[dict[str, Any]], within: str) -> Table:
    tensors = what == "tensor"
    return Table(
        title=title,
        columns=[what, "weights", within, "as bfloat16", "bit-equal", "relative L2", "mean |d|", "max |d|"],
        rows=[
            [
                label,
                count(row["numel"]),
                percent(row["sparsity"]),
                percent(row["sparsity_bf16"]),
                percent(row["bit_equal_frac"]),
                number(row["relative_l2"]),
                number(row["mean_abs_difference"]),
                number(row["max_abs_difference"]),
            ]
            for label, row in zip(labels, rows, strict=True)
        ],
        note="Relative L2: norm of the difference over norm of the base. d: tuned minus base; its mean counts "
        "unchanged weights too.",
        terminal_rows=0 if tensors else 48,
        collapsed=tensors,
    )


def side_by_side_table(totals: Mapping[str, Mapping[str, Any]], atol: float) -> Table:
    """Return a row for each checkpoint, by label."""
    keys = {
        f"within {atol:g}": ("sparsity", percent),
        "bf16-aware": ("sparsity_bf16", percent),
        "bit-equal": ("bit_equal_frac", percent),
        "relative L2": ("relative_l2", number),
        "max |d|": ("max_abs_difference", number),
    }
    return Table(
        title="Against the base",
        columns=["checkpoint", *(Column(name, show) for name, (_, show) in keys.items())],
        rows=[[label, *(total[key] for key, _ in keys.values())] for label, total in totals.items()],
        note="Shares of unchanged weights by three rules; norm of the update over that of the base.",
    )
