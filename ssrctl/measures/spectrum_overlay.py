"""The spectra of several checkpoints in one figure each, such as those of RL next to SFT (Zhu et al. 2025, figure 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ssrctl.measures.group_tables import RowColumn, row_table
from ssrctl.measures.maths.grouping import Grouped
from ssrctl.report.document import Figure, Lines, Numbers, Section, spans_decades
from ssrctl.report.formats import percent

# More lines cannot be told apart.
_MOST_LINES = 8


def overlay_section(rows: Mapping[str, Grouped[Any, Any]], columns: Sequence[RowColumn], note: str) -> Section:
    """Return the section that lays the spectra of several checkpoints over one another.

    Args:
        rows: ``SpectrumRow`` of groups and ``SpectrumChange`` of matrices, by the checkpoint's label.
        columns: of the table with a row for each checkpoint, attributes of ``SpectrumRow``.
        note: below it.
    """
    shown = dict(list(rows.items())[:_MOST_LINES])
    figures = [*_by_layer(shown), *_of_one_matrix(shown)]
    left_out = f" Figures show the first {_MOST_LINES} of {len(rows)} checkpoints." if len(shown) < len(rows) else ""
    return Section(
        title="Spectra side by side",
        text="Which update turned or stretched the principal directions more? Published RL left spectra nearly as they "
        f"were, fine-tuning did not (Zhu et al. 2025, figure 4).{left_out}",
        figures=figures,
        tables=[
            row_table(
                "Spectra of the checkpoints", "checkpoint", {one: of.total for one, of in rows.items()}, columns, note
            )
        ],
    )


def _by_layer(rows: Mapping[str, Grouped[Any, Any]]) -> list[Figure]:
    layers = sorted({layer for one in rows.values() for layer in one.numbered_layers})
    if len(layers) < 2:
        return []

    def series(value: Callable[[Any], float | None]) -> dict[str, Numbers]:
        found = {label: one.numbered_layers for label, one in rows.items()}
        return {label: [value(of[layer]) if layer in of else None for layer in layers] for label, of in found.items()}

    def expected(values: Mapping[str, Numbers]) -> dict[str, Numbers]:
        return {f"expected, random update like {label}": of for label, of in values.items()} if len(values) <= 2 else {}

    angles = series(_largest_angle) | expected(series(lambda row: row.gaussian_largest))
    shifts = series(lambda row: row.shift_largest) | expected(series(lambda row: row.expected_shift_largest))
    return [
        _lines("Largest principal angle in each layer", layers, angles, "layer", "degrees"),
        _lines("Largest normalised spectral shift in each layer", layers, shifts, "layer", "shift over norm"),
    ]


def _largest_angle(row: Any) -> float | None:
    return max((one for one in (row.left_largest, row.right_largest) if one is not None), default=None)


def _of_one_matrix(rows: Mapping[str, Grouped[Any, Any]]) -> list[Figure]:
    """Return the angles and the change of the singular values of the matrix that any of the checkpoints shifted most."""
    shifts = [
        (one.shift, name)
        for of in rows.values()
        for name, one in of.tensors.items()
        if one.gaussian is not None  # changed
    ]
    if not shifts:
        return []
    _, name = max(shifts)
    found = {label: of.tensors[name] for label, of in rows.items() if name in of.tensors}
    found = {label: one for label, one in found.items() if one.gaussian is not None}
    first = next(iter(found.values()))
    angles = {label: one.left for label, one in found.items() if one.k == first.k}
    changes = {
        label: [
            (after - before) / one.curve_base[0] for before, after in zip(one.curve_base, one.curve_tuned, strict=True)
        ]
        for label, one in found.items()
        if one.curve_index == first.curve_index
    }
    most = {label: percent(max(map(abs, values))) for label, values in changes.items()}
    caption = "The matrix with the largest shift of any checkpoint. Largest change: " + ", ".join(
        f"{label} {value}" for label, value in most.items()
    )
    return [
        Lines(
            title=f"Left principal angles of {name}",
            x=range(1, first.k + 1),
            series=angles,
            x_label="index",
            y_label="degrees",
            log_y=spans_decades(value for values in angles.values() for value in values),
            caption="Between the leading singular directions of base and checkpoint.",
        ),
        Lines(
            title=f"Change of the singular values of {name}",
            x=first.curve_index,
            series=changes,
            x_label="index",
            y_label="share of the base's largest",
            log_x=True,
            shares=True,
            caption=f"{caption}.",
        ),
    ]


def _lines(title: str, x: Sequence[int], series: Mapping[str, Numbers], x_label: str, y_label: str) -> Lines:
    log = spans_decades(value for values in series.values() for value in values)
    return Lines(title=title, x=x, series=series, x_label=x_label, y_label=y_label, log_y=log)
