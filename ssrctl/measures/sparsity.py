"""Sparsity of the update between two checkpoints, and the size of its changes.

Three rules say when a weight is unchanged, and they are counted side by side in one pass:

- ``atol``: ``|tuned - base| <= atol`` for a fixed tolerance, 1e-5 in Mukherjee et al. 2025 (arXiv:2505.11711);
- ``bf16``: ``|tuned - base| <= eta max(|base|, |tuned|)`` of the values rounded to bfloat16, eta 1e-3 (Zhu et al.
  2025, arXiv:2511.08567, def. 2.1), which for finite bfloat16 weights is equality (their corollary E.4);
- ``bits``: equality bit for bit, 0 and -0 apart.

A fixed tolerance calls float32 weights changed that are the same in bfloat16 where weights are large, and hides real
changes where they are small (Zhu et al. 2025, app. E.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ssrctl.checkpoints.names import layer_index, matrix_kind
from ssrctl.checkpoints.pairs import RANGE, TensorPair
from ssrctl.configs import DiagnoseConfig
from ssrctl.measures.base import Findings, Mode, PairMeasure, register
from ssrctl.measures.group_tables import RowColumn, cell_map, row_bars, row_table
from ssrctl.measures.maths.change import FIXED_TOLERANCES, Change, add_up
from ssrctl.measures.maths.grouping import Grouped, group
from ssrctl.measures.maths.largest_changes import LargestChanges, WeightChange
from ssrctl.measures.maths.piece_pair import piece_pairs
from ssrctl.measures.maths.ulp import bin_label
from ssrctl.measures.published import PublishedKey
from ssrctl.report.document import Column, Histogram, Section, Table
from ssrctl.report.formats import count, number, percent

_PUBLISHED: tuple[PublishedKey, ...] = ("sparsity_1e-8", "sparsity_1e-7", "sparsity_1e-6", "sparsity_1e-5")


@dataclass(frozen=True)
class SparsityResult:
    """The changes of two checkpoints.

    Attributes:
        changes: counts and sums of all weights, by group and by tensor.
        shapes: of the tensors that these are in.
    """

    changes: Grouped[Change, Change]
    largest: LargestChanges
    shapes: Mapping[str, tuple[int, ...]]

    def numbers(self) -> dict[str, Any]:
        """Return the numbers of report.json; cells are in the order of the tensors."""
        cells = dict.fromkeys((layer_index(name), matrix_kind(name)) for name in self.changes.tensors)
        return self.changes.numbers(Change.numbers) | {
            "cells": [
                {"kind": kind, "layer": layer} | self.changes.cells[layer, kind].numbers() for layer, kind in cells
            ],
            "movers": {
                "absolute": [self._weight(one) for one in self.largest.absolute],
                "relative": [self._weight(one) for one in self.largest.relative],
            },
        }

    def _weight(self, one: WeightChange) -> dict[str, Any]:
        kept = {key: getattr(one, key) for key in ("name", "before", "after", "change", "relative_change")}
        return kept | {"position": list(one.position(self.shapes[one.name]))}


@register
class Sparsity(PairMeasure[tuple[list[Change], LargestChanges], SparsityResult]):
    """Changed weights by every rule, and the size of the changes; always counted, shown where it is wanted."""

    name = "sparsity"
    order = 30
    also = ("size",)
    default_in = frozenset({"pair", "several", "series", "run"})
    in_ranges = True

    @classmethod
    def wanted(cls, config: DiagnoseConfig, mode: Mode) -> bool:
        """Return True: other parts of a report need the counts."""
        return True

    def tensor(self, pair: TensorPair) -> tuple[list[Change], LargestChanges]:
        """Return the change of each range of elements, and the largest ones.

        Sums are made range by range, so that they do not depend on whether the tensor is whole in memory.
        """
        largest, ranges = LargestChanges(), dict[int, list[Change]]()
        for start, base, tuned in pair.pieces():
            found = ranges.setdefault(start // RANGE, [])
            for piece in piece_pairs(base, tuned):
                found += piece.changes(self.config.atol, self.config.bf16_rtol)
                largest.add(pair.name, piece.before, piece.after, piece.where, start)
                start += piece.numel
        return [add_up(parts) for parts in ranges.values()], largest

    def combine(self, parts: Mapping[str, list[tuple[list[Change], LargestChanges]]]) -> SparsityResult:
        """Return the changes by layer, kind and tensor."""
        largest, changes = LargestChanges(), dict[str, Change]()
        for name, ranges in parts.items():
            changes[name] = add_up(change for found, _ in ranges for change in found)
            for _, found in ranges:
                largest.merge(found)
        return SparsityResult(group(changes, add_up), largest, self.comparison.base.shapes)

    def present(self, result: SparsityResult) -> Findings:
        """Return the parts that the settings ask for: all, the size of the change only, or only numbers."""
        total, atol = result.changes.total, self.config.atol
        notes, numbers = nonfinite_notes(total), result.numbers()
        if self.config.wants("sparsity", default=True):
            published = dict(zip(_PUBLISHED, total.fixed_sparsity.values(), strict=True))
            return Findings(
                numbers=numbers,
                headlines=headlines(result.changes, atol),
                notes=notes,
                sections=sparsity_sections(result, atol),
                published=published | {"sparsity_bf16": total.sparsity_bf16},
            )
        sections = [size_section(result)] if self.config.wants("size", default=True) else []
        return Findings(numbers=numbers, notes=notes, sections=sections)

    def side_by_side(self, results: Mapping[str, SparsityResult]) -> list[Section]:
        """Return the checkpoints' sparsity in one table."""
        columns: list[RowColumn] = [
            (f"within {self.config.atol:g}", "sparsity", percent),
            ("bf16-aware", "sparsity_bf16", percent),
            ("bit-equal", "bit_equal_frac", percent),
            ("relative L2", "relative_l2", number),
            ("max |d|", "max_abs_difference", number),
        ]
        totals = {label: result.changes.total for label, result in results.items()}
        note = "Shares of unchanged weights by three rules; norm of the update over that of the base."
        table = row_table("Against the base", "checkpoint", totals, columns, note)
        return [Section(title="The checkpoints side by side", tables=[table])]


# --------------------------------------------------------------------------------------------------
# sentences


def headlines(changes: Grouped[Change, Change], atol: float) -> list[str]:
    """Return the answer in sentences."""
    total = changes.total
    if total.num_bit_changed == 0:
        return [f"The two checkpoints are identical bit for bit: {count(total.numel)} weights, sparsity 1."]
    hidden = total.num_bit_changed - total.num_changed
    lines = [
        f"Update sparsity {percent(total.sparsity)}: this share of the {count(total.numel)} weights moved by no more "
        f"than {atol:g}.",
        f"Bit for bit, {percent(total.bit_equal_frac)} are unchanged: {count(total.num_bit_changed)} weights "
        f"changed, {count(hidden)} of them by no more than {atol:g}.",
        f"The update's norm is {number(total.relative_l2)} of the base's; the largest change of a weight is "
        f"{number(total.max_abs_difference)}.",
    ]
    if total.sparsity_bf16 != total.bit_equal_frac:
        lines.append(
            f"Compared as bfloat16, {percent(total.sparsity_bf16)} are unchanged (the rule of Zhu et al. 2025)."
        )
    if total.num_stepped:
        lines.append(
            f"Of the {count(total.num_stepped)} weights that moved by a representable step or more, "
            f"{percent(total.one_step_frac)} moved by exactly one."
        )
    # Small changes may all lie within the tolerance; then the stored bits tell the kinds apart.
    words = "sparsity" if total.num_changed else "unchanged bit for bit"
    shares = {
        kind: (one.num_within if total.num_changed else one.num_equal) / one.numel
        for kind, one in changes.kinds.items()
        if one.numel
    }
    if len(shares) > 1:
        most, least = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
        lines.append(
            f"Most changed: {most} ({words} {percent(shares[most])}); least: {least} ({percent(shares[least])})."
        )
    return lines


def nonfinite_notes(total: Change) -> list[str]:
    """Return a sentence on NaN and infinite weights, if there are any."""
    found = [
        f"{amount} {what} in {side}"
        for side in ("base", "tuned")
        for what in ("nan", "inf")
        if (amount := getattr(total, f"num_{what}_{side}"))
    ]
    if not found:
        return []
    return [
        f"NaN or infinite weights: {', '.join(found)}. They count as changed unless they are equal bit for bit; "
        "norms, means and maxima leave them out."
    ]


# --------------------------------------------------------------------------------------------------
# tables and figures


def sparsity_sections(result: SparsityResult, atol: float) -> list[Section]:
    """Return all sections on changed weights and the size of the changes, answers first and details last."""
    columns: list[RowColumn] = [
        ("weights", "numel", count),
        (f"within {atol:g}", "sparsity", percent),
        ("as bfloat16", "sparsity_bf16", percent),
        ("bit-equal", "bit_equal_frac", percent),
        ("relative L2", "relative_l2", number),
        ("mean |d|", "mean_abs_difference", number),
        ("max |d|", "max_abs_difference", number),
    ]
    note = (
        "Relative L2: norm of the difference over norm of the base. d: tuned minus base; its mean counts unchanged "
        "weights too."
    )
    changes = result.changes
    grouped = []
    for title, what, rows in (
        ("By kind of matrix", "kind", changes.kinds),
        ("By layer", "layer", changes.labelled_layers),
    ):
        series = {f"within {atol:g}": "sparsity", "as bfloat16": "sparsity_bf16", "bit for bit": "bit_equal_frac"}
        bars = row_bars(f"Unchanged weights {title.lower()}", rows, series, "share unchanged")
        table = row_table(title, what, rows, columns, note)
        grouped.append(Section(title=title, figures=[bars], tables=[table]))
    tensors = row_table("All tensors", "tensor", changes.tensors, columns, note, detail=True)
    return [
        rules_section(changes, atol),
        *grouped,
        size_section(result),
        Section(title="Tensor by tensor", tables=[tensors]),
    ]


def rules_section(changes: Grouped[Change, Change], atol: float) -> Section:
    """Return the shares unchanged by each rule, side by side, and a map of kinds of matrices over layers."""
    shown = {"all": changes.total, **{kind: change for kind, change in changes.kinds.items() if change.numel}}
    shares = [_shares_by_rule(change, atol) for change in shown.values()]
    table = Table(
        title="Unchanged weights by rule",
        columns=["rule", *(Column(label, percent) for label in shown)],
        rows=[[rule[0][0], *(share for _, share in rule)] for rule in zip(*shares, strict=True)],
        note="Fixed tolerances: Mukherjee et al. 2025, table 6. As bfloat16: |d| <= eta times the larger of the two "
        "magnitudes, both rounded to bfloat16 (Zhu et al. 2025, definition 2.1), which for bfloat16 weights is equality. "
        "A fixed tolerance hides real changes of small weights, and in wide dtypes calls large weights changed that "
        "bfloat16 stores as the same number.",
    )
    heat = cell_map(
        "Changed weights by kind and layer",
        {cell: change for cell, change in changes.cells.items() if change.numel},
        lambda change: change.num_bf16_changed / change.numel,
        shares=True,
        decimals=0,
        caption="Share of weights that changed as bfloat16; blank where a layer has no such matrix.",
    )
    return Section(title="By rule", figures=[heat] if heat else [], tables=[table])


def _shares_by_rule(change: Change, atol: float) -> list[tuple[str, float | None]]:
    """Return (rule in words, share unchanged by it)."""
    rules = [("bit for bit", change.bit_equal_frac), ("as bfloat16 (eta)", change.sparsity_bf16)]
    rules += [(f"within {tolerance:g}", share) for tolerance, share in change.fixed_sparsity.items()]
    return rules if atol in FIXED_TOLERANCES else [*rules, (f"within {atol:g}", change.sparsity)]


def size_section(result: SparsityResult) -> Section:
    """Return the size of the changes: representable steps, and the largest ones."""
    steps = row_table(
        "Steps by kind of matrix",
        "kind",
        result.changes.kinds,
        [
            ("moved", "num_stepped", count),
            ("by one step", "num_one_step", count),
            ("share of one step", "one_step_frac", percent),
            ("below a step", "num_below_step", count),
        ],
        "A step leads from a number to the next one that its dtype can represent; where the two checkpoints are "
        "stored in two dtypes, the narrower one's. Below a step: not equal bit for bit, yet the same number there.",
    )
    ulps = result.changes.total.ulps
    figure = Histogram(
        title="How many representable steps the weights moved",
        bins=list(map(bin_label, range(len(ulps)))),
        series={"changed weights": ulps},
        x_label="steps (units in the last place)",
        y_label="weights",
        log=True,
    )
    tables = [
        steps,
        _largest_table("Largest changes", result.largest.absolute, result.shapes),
        _largest_table("Largest relative changes", result.largest.relative, result.shapes),
    ]
    return Section(title="Size of the change", figures=[figure] if ulps else [], tables=tables)


def _largest_table(title: str, changes: list[WeightChange], shapes: Mapping[str, tuple[int, ...]]) -> Table:
    places = [", ".join(map(str, one.position(shapes[one.name]))) for one in changes]
    formats = {"before": "{:.6g}".format, "after": "{:.6g}".format, "change": "{:+.3g}".format, "relative": number}
    return Table(
        title=title,
        columns=["tensor", "position", *(Column(name, show) for name, show in formats.items())],
        rows=[
            [one.name, place, one.before, one.after, one.change, one.relative_change]
            for one, place in zip(changes, places, strict=True)
        ],
        note="Relative: the change over the weight's size before it; weights that were 0 have none.",
        terminal_rows=0,
        collapsed=True,
    )
