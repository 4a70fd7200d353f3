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

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssrctl.checkpoints.names import layer_index, matrix_kind
from ssrctl.checkpoints.pairs import RANGE, Comparison, TensorPair
from ssrctl.configs import DiagnoseConfig
from ssrctl.measures.base import Findings, Mode, PairMeasure, register
from ssrctl.measures.group_tables import RowColumn, cell_map, layer_lines, row_dots, row_table
from ssrctl.measures.layer_spread import (
    SPREAD_COLUMNS,
    SPREAD_NOTE,
    layer_spread,
    spread_headlines,
    spread_numbers,
    spread_section,
)
from ssrctl.measures.maths.change import FIXED_TOLERANCES, Change, add_up
from ssrctl.measures.maths.grouping import Grouped, group
from ssrctl.measures.maths.largest_changes import LargestChanges, WeightChange
from ssrctl.measures.maths.piece_pair import Tally, piece_pairs
from ssrctl.measures.published import PublishedKey, references
from ssrctl.report.document import Column, Figure, Heatmap, Lines, Section, Table, spans_decades
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
        """Return the numbers of the json report; cells are in the order of the tensors."""
        cells = dict.fromkeys((layer_index(name), matrix_kind(name)) for name in self.changes.tensors)
        return self.changes.numbers(Change.numbers) | {
            "cells": [
                {"kind": kind, "layer": layer} | self.changes.cells[layer, kind].numbers() for layer, kind in cells
            ],
            "layer_spread": spread_numbers(self.changes),
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

    def __init__(self, comparison: Comparison, config: DiagnoseConfig, run: Path | None = None) -> None:
        """Begin without any change."""
        super().__init__(comparison, config, run)
        # By checkpoint; another thread's may be lost, which costs time only.
        self._floors: dict[str, tuple[float, float]] = {}

    @classmethod
    def wanted(cls, config: DiagnoseConfig, mode: Mode) -> bool:
        """Return True: other parts of a report need the counts."""
        return True

    def tensor(self, pair: TensorPair) -> tuple[list[Change], LargestChanges]:
        """Return the change of each range of elements, and the largest ones.

        Sums are made range by range, so that they do not depend on whether the tensor is whole in memory.
        """
        label = pair.checkpoint.label
        largest, ranges = LargestChanges(floors=self._floors.get(label, (-1.0, -1.0))), dict[int, Tally]()
        for start, base, tuned in pair.pieces():
            if start // RANGE not in ranges:
                ranges[start // RANGE] = Tally(pair.name, self.config.atol, self.config.bf16_rtol, largest)
            for piece in piece_pairs(base, tuned):
                ranges[start // RANGE].add(piece, start)
                start += piece.numel
        found = [tally.total() for tally in ranges.values()]
        self._floors[label] = largest.floors
        return found, largest

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
                headlines=[*headlines(result.changes, atol), *spread_headlines(result.changes)],
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
            ("sign flips", "sign_flip_frac", percent),
        ]
        totals = {label: result.changes.total for label, result in results.items()}
        note = (
            "Shares of unchanged weights by three rules; norm of the update over that of the base; flipped signs among the "
            "weights that are not bit-equal."
        )
        spreads = {one: layer_spread(list(found.changes.numbered_layers.values())) for one, found in results.items()}
        tables = [
            row_table("Against the base", "checkpoint", totals, columns, note),
            row_table("Spread over layers", "checkpoint", spreads, SPREAD_COLUMNS, SPREAD_NOTE),
        ]
        kinds = [kind for kind, row in next(iter(results.values())).changes.kinds.items() if row.numel]
        shares = [[result.changes.kinds[kind].bit_changed_frac for kind in kinds] for result in results.values()]
        heat = Heatmap(
            title="Changed weights by checkpoint and kind, bit for bit",
            values=shares,
            row_labels=list(results),
            column_labels=kinds,
            row_axis="checkpoint",
            column_axis="kind",
            shares=True,
            decimals=1,
            log=spans_decades(itertools.chain(*shares)),
        )
        return [Section(title="The checkpoints side by side", figures=[heat], tables=tables)]


# --------------------------------------------------------------------------------------------------
# sentences


def headlines(changes: Grouped[Change, Change], atol: float) -> list[str]:
    """Return the answer in sentences: the changed share and its place, then the rules side by side."""
    total = changes.total
    if total.num_bit_changed == 0:
        return [f"The two checkpoints are identical bit for bit: {count(total.numel)} weights, sparsity 1."]
    words, attribute = _rule(total)
    lines = [
        f"{percent(getattr(total, attribute))} of the {count(total.numel)} weights changed {words}"
        f"{_extremes(attribute, changes)}.",
        f"Update sparsity: {percent(total.sparsity)} moved by no more than {atol:g} (Mukherjee et al. 2025), "
        f"{percent(total.sparsity_bf16)} are unchanged as bfloat16 (Zhu et al. 2025), {percent(total.bit_equal_frac)} "
        f"bit for bit. The update's norm is {number(total.relative_l2)} of the base's.",
    ]
    if total.num_from_zero:
        lines.append(
            f"{count(total.num_from_zero)} of the {count(total.num_bit_changed)} changed weights were exactly 0 before; "
            "they are counted as changed, but not in steps or relative changes."
        )
    return lines


def _rule(total: Change) -> tuple[str, str]:
    """Return the rule by which figures count changes, as (words, attribute of ``Change``).

    It is the bf16-aware one, or where bfloat16 shows no change, equality bit for bit.
    """
    if total.num_bf16_changed:
        return "as bfloat16 stores them", "bf16_changed_frac"
    return "bit for bit, none of them as bfloat16 stores them", "bit_changed_frac"


def _extremes(attribute: str, changes: Grouped[Change, Change]) -> str:
    """Return the kinds and the layers that changed most and least, as the rest of a sentence."""
    found = []
    for what, rows in (("", changes.kinds), ("layer ", changes.numbered_layers)):
        shares = {f"{what}{label}": getattr(row, attribute) for label, row in rows.items() if row.numel}
        if len(shares) > 1:
            most, least = max(shares, key=shares.__getitem__), min(shares, key=shares.__getitem__)
            found.append(f"most in {most} ({percent(shares[most])}), least in {least} ({percent(shares[least])})")
    return f": {'; '.join(found)}" if found else ""


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
        ("from 0", "num_from_zero", count),
        ("relative L2", "relative_l2", number),
        ("mean |d|", "mean_abs_difference", number),
        ("max |d|", "max_abs_difference", number),
    ]
    note = (
        "Shares of unchanged weights by three rules. From 0: weights that were exactly 0 and are not any more. Relative "
        "L2: norm of the difference over norm of the base. d: tuned minus base; its mean counts unchanged weights too."
    )
    changes = result.changes
    tables = [
        row_table("By kind of matrix", "kind", changes.kinds, columns, note),
        row_table("By layer", "layer", changes.labelled_layers, columns, note),
        row_table("All tensors", "tensor", changes.tensors, columns, note, terminal_rows=0),
    ]
    where = Section(title="Where weights changed", figures=_place_figures(changes, atol), tables=tables)
    return [where, spread_section(changes), rules_section(changes, atol), size_section(result)]


def _place_figures(changes: Grouped[Change, Change], atol: float) -> list[Figure]:
    """Return a map of kinds over layers, and the changed shares by kind and by layer next to published ranges."""
    words, attribute = _rule(changes.total)
    heat = cell_map(f"Changed weights {words}", changes.cells, attribute, shares=True, decimals=1)
    series = {
        "as bfloat16": "bf16_changed_frac",
        f"by more than {atol:g}": "changed_frac",
        "bit for bit": "bit_changed_frac",
    }
    kinds = {"all": changes.total} | {kind: row for kind, row in changes.kinds.items() if row.numel}
    settings: dict[str, Any] = {
        "shares": True,
        "references": references("sparsity_bf16", changed=True),
        "caption": "The published ranges are of whole models, compared as bfloat16.",
    }
    return [
        *([] if heat is None else [heat]),
        row_dots("Changed weights by kind of matrix", kinds, series, "share changed", **settings),
        *layer_lines("Changed weights by layer", changes, series, "share changed", **settings),
    ]


def rules_section(changes: Grouped[Change, Change], atol: float) -> Section:
    """Return the shares unchanged by each rule, side by side."""
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
    return Section(title="By rule", tables=[table])


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
            ("from 0", "num_from_zero", count),
        ],
        "A step leads from a number to the next one that its dtype can represent; where the two checkpoints are "
        "stored in two dtypes, the narrower one's. Below a step: not equal bit for bit, yet the same number there. From 0: "
        "weights that were exactly 0, which are not counted in steps: thousands lie between 0 and a small number.",
    )
    ulps = result.changes.total.ulps
    figure = Lines(
        title="How many representable steps the weights moved",
        x=[2**place for place in range(len(ulps))],
        series={"changed weights": ulps},
        x_label="at most this many steps (units in the last place)",
        y_label="weights",
        log_x=True,
        log_y=True,
        caption="Each point counts the weights beyond the one before.",
    )
    tables = [
        steps,
        _largest_table("Largest changes", result.largest.absolute, result.shapes),
        _largest_table("Largest relative changes", result.largest.relative, result.shapes),
    ]
    total = result.changes.total
    text = f"The largest change of a weight is {number(total.max_abs_difference)}."
    if total.num_stepped:
        text += (
            f" Of the {count(total.num_stepped)} weights that moved by a representable step or more, "
            f"{percent(total.one_step_frac)} moved by exactly one."
        )
    return Section(title="Size of the change", text=text, figures=[figure] if ulps else [], tables=tables)


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
    )
