"""The difference between two checkpoints in words, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssrctl.analysis.document import Bars, Document, Section, Table, count, number, percent
from ssrctl.analysis.sparsity import Change, add_up, group_changes, layer_index, matrix_kind

_OUTSIDE = "outside"


def sparsity_numbers(changes: Mapping[str, Change]) -> dict[str, Any]:
    """The report's numbers: ``total``, ``layers``, ``kinds`` and ``tensors`` (names in the order given)."""
    layers, kinds = group_changes(changes)
    return {
        "total": add_up(changes.values()).numbers(),
        "layers": [{"layer": layer} | change.numbers() for layer, change in layers.items()],
        "kinds": [{"kind": kind} | change.numbers() for kind, change in kinds.items()],
        "tensors": [
            {"name": name, "layer": layer_index(name), "kind": matrix_kind(name)} | change.numbers()
            for name, change in changes.items()
        ],
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
    kinds = [kind for kind in numbers["kinds"] if kind["numel"]]
    if len(kinds) > 1:
        most = min(kinds, key=lambda kind: kind["sparsity"])
        least = max(kinds, key=lambda kind: kind["sparsity"])
        lines.append(
            f"Most changed: {most['kind']} (sparsity {percent(most['sparsity'])}); least: {least['kind']} "
            f"({percent(least['sparsity'])})."
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


def sparsity_document(
    numbers: Mapping[str, Any],
    facts: list[tuple[str, str]],
    sentences: list[str],
    notes: list[str],
    atol: float,
) -> Document:
    """The whole report of ``diagnose BASE TUNED``."""
    within = f"within {atol:g}"
    return Document(
        title="Which weights did training change?",
        facts=facts,
        headlines=sentences,
        notes=notes,
        sections=[
            _group_section(
                "By kind of matrix", "kind", [row["kind"] for row in numbers["kinds"]], numbers["kinds"], within
            ),
            _group_section(
                "By layer",
                "layer",
                [_OUTSIDE if row["layer"] is None else str(row["layer"]) for row in numbers["layers"]],
                numbers["layers"],
                within,
            ),
            Section(
                title="Tensor by tensor",
                tables=[
                    _table(
                        "All tensors", "tensor", [row["name"] for row in numbers["tensors"]], numbers["tensors"], within
                    )
                ],
            ),
        ],
    )


def _group_section(title: str, what: str, labels: list[str], rows: list[dict[str, Any]], within: str) -> Section:
    figure = Bars(
        title=f"Unchanged weights {title.lower()}",
        labels=labels,
        series={
            within: [row["sparsity"] for row in rows],
            "bit for bit": [row["bit_equal_frac"] for row in rows],
        },
        axis="share unchanged",
    )
    return Section(title=title, figures=[figure], tables=[_table(title, what, labels, rows, within)])


def _table(title: str, what: str, labels: list[str], rows: list[dict[str, Any]], within: str) -> Table:
    tensors = what == "tensor"
    return Table(
        title=title,
        columns=[what, "weights", within, "bit-equal", "relative L2", "mean |d|", "max |d|"],
        rows=[
            [
                label,
                count(row["numel"]),
                percent(row["sparsity"]),
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
