"""Signs that an update flipped, and how unevenly it is spread over the layers.

The Gini coefficient of layer sums x_1, ..., x_n is ``sum_ij |x_i - x_j| / (2 n^2 mean(x))``: 0 for layers that are all
equal, 1 - 1/n when everything is in one layer (``row_column_counts.gini``). It is taken of the changed weights and of
the squared change, and stands next to the value of a spread that follows the layers' sizes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ssrctl.measures.group_tables import RowColumn, row_dots, row_table
from ssrctl.measures.maths.averages import ratio
from ssrctl.measures.maths.change import Change
from ssrctl.measures.maths.grouping import Grouped
from ssrctl.measures.maths.row_column_counts import gini
from ssrctl.report.document import Figure, Lines, Section, spans_decades
from ssrctl.report.formats import count, number, percent


@dataclass(frozen=True, kw_only=True)
class LayerSpread:
    """Gini coefficients over layers; all are None for fewer than two layers, and where nothing changed.

    Attributes:
        num_layers: n.
        changed_gini: of the weights that are not equal bit for bit.
        expected_changed_gini: the same if as many weights were drawn at random from all of them.
        squared_gini: of the sums of squared differences.
        expected_squared_gini: the same if every weight changed alike: of the layers' sizes.
    """

    num_layers: int
    changed_gini: float | None
    expected_changed_gini: float | None
    squared_gini: float | None
    expected_squared_gini: float | None


@dataclass(frozen=True, kw_only=True)
class SpreadRow:
    """A group of tensors: its changes, and their spread over the layers."""

    change: Change
    spread: LayerSpread


def layer_spread(layers: Sequence[Change]) -> LayerSpread:
    """Measure how unevenly an update is spread over layers."""
    sizes, changed = [one.numel for one in layers], [one.num_bit_changed for one in layers]
    squares = [one.sum_sq for one in layers]
    several = len(layers) > 1
    return LayerSpread(
        num_layers=len(layers),
        changed_gini=gini(changed) if several else None,
        expected_changed_gini=expected_gini(sizes, sum(changed)) if several else None,
        squared_gini=gini(squares) if several else None,
        expected_squared_gini=gini(sizes) if several and any(squares) else None,
    )


def expected_gini(sizes: Sequence[int], num_changed: int) -> float | None:
    """Return the mean Gini coefficient of the counts of a random set over layers.

    Counts are multivariate hypergeometric. The difference of two has mean ``K (n_i - n_j) / N`` and variance
    ``K (N - K) / (N - 1) (n_i + n_j - (n_i - n_j)^2 / N) / N``; its mean size is taken as that of a normal law.

    Args:
        sizes: weights of each layer, N in all.
        num_changed: K, the size of the set, at most N.

    Returns:
        None when nothing changed.
    """
    numel = sum(sizes)
    if not num_changed or len(sizes) < 2:
        return None
    scale = num_changed * (numel - num_changed) / (numel - 1) / numel
    distances = []
    for a, b in itertools.combinations(sizes, 2):
        middle, variance = num_changed * (a - b) / numel, scale * (a + b - (a - b) ** 2 / numel)
        if variance <= 0:
            distances.append(abs(middle))
            continue
        ratio_of_both = middle / math.sqrt(2 * variance)
        folded = math.sqrt(2 * variance / math.pi) * math.exp(-(ratio_of_both**2)) + middle * math.erf(ratio_of_both)
        distances.append(folded)
    return math.fsum(distances) / (len(sizes) * num_changed)


def spread_rows(changes: Grouped[Change, Change]) -> dict[str, SpreadRow]:
    """Return the changes and their spread over the layers: of all weights, and of each kind of matrix within layers."""
    rows = {"all": SpreadRow(change=changes.total, spread=layer_spread(list(changes.numbered_layers.values())))}
    for kind, change in changes.kinds.items():
        layers = [one for (layer, of), one in changes.cells.items() if of == kind and layer is not None]
        rows[kind] = SpreadRow(change=change, spread=layer_spread(layers))
    return rows


def spread_numbers(changes: Grouped[Change, Change]) -> dict[str, Any]:
    """Return the form of the json report."""
    rows = spread_rows(changes)
    total = rows.pop("all")
    return {
        "total": asdict(total.spread),
        "kinds": [{"kind": kind} | asdict(row.spread) for kind, row in rows.items()],
    }


# --------------------------------------------------------------------------------------------------
# sentences, tables and figures

SPREAD_COLUMNS: tuple[RowColumn, ...] = (
    ("layers", "num_layers", count),
    ("Gini, changed", "changed_gini", number),
    ("by chance", "expected_changed_gini", number),
    ("Gini, squared", "squared_gini", number),
    ("by size", "expected_squared_gini", number),
)
_COLUMNS: tuple[RowColumn, ...] = (
    ("changed", "change.num_bit_changed", count),
    ("sign flips", "change.num_sign_flipped", count),
    ("of changed", "change.sign_flip_frac", percent),
    *((heading, f"spread.{path}", show) for heading, path, show in SPREAD_COLUMNS),
)
SPREAD_NOTE = (
    "Gini coefficient over layers, 0 (evenly) to 1 - 1/n (all in one of n), of the number of changed weights and of the "
    "sum of squared changes. By chance: as many weights drawn at random; by size: every weight changes alike."
)


def spread_headlines(changes: Grouped[Change, Change]) -> list[str]:
    """Return a sentence on signs and spread; none where nothing changed."""
    total, spread = changes.total, layer_spread(list(changes.numbered_layers.values()))
    if not total.num_bit_changed:
        return []
    line = f"{percent(total.sign_flip_frac)} of the changed weights changed their sign."
    if spread.changed_gini is not None and spread.squared_gini is not None:
        line += (
            f" Over the {spread.num_layers} layers the Gini coefficient of the changed weights is "
            f"{number(spread.changed_gini)} ({number(spread.expected_changed_gini)} by chance), of the squared change "
            f"{number(spread.squared_gini)} ({number(spread.expected_squared_gini)} if every weight changed alike)."
        )
    return [line]


def spread_section(changes: Grouped[Change, Change]) -> Section:
    """Return the section on signs and spread."""
    rows = {kind: row for kind, row in spread_rows(changes).items() if row.change.numel}
    note = f"Sign flips: from below 0 to above, or back; to and from exactly 0 is none. {SPREAD_NOTE}"
    return Section(
        title="Signs, and the spread over layers",
        text="How many changed weights crossed zero, and is the update spread evenly over the layers or concentrated in some?",
        figures=_figures(changes, rows) if changes.total.num_bit_changed else [],
        tables=[row_table("Signs and spread by kind of matrix", "kind", rows, _COLUMNS, note)],
    )


def _figures(changes: Grouped[Change, Change], rows: Mapping[str, SpreadRow]) -> list[Figure]:
    flips = row_dots(
        "Changed weights whose sign flipped",
        {kind: row.change for kind, row in rows.items()},
        {"sign flips": "sign_flip_frac"},
        "share of the changed weights",
    )
    layers, figures = changes.numbered_layers, list[Figure]([flips])
    if len(layers) > 1:
        parts: dict[str, list[float]] = {
            "changed weights": [one.num_bit_changed for one in layers.values()],
            "squared change": [one.sum_sq for one in layers.values()],
            "expected, by size": [one.numel for one in layers.values()],
        }
        series = {name: [ratio(value, math.fsum(values)) for value in values] for name, values in parts.items()}
        figures.append(
            Lines(
                title="The layers' parts of the update",
                x=list(layers),
                series=series,
                x_label="layer",
                y_label="share of all layers",
                shares=True,
                log_y=spans_decades(itertools.chain(*series.values())),
                caption="Of the weights that changed, and of the sum of squared changes; tensors outside of the layers "
                "are left out.",
            )
        )
    return figures
