"""The spectrum of weight matrices before and after training in words, tables and figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ssrctl.checkpoints.names import KINDS
from ssrctl.measures.maths.grouping import grouped
from ssrctl.measures.maths.matrices import OfMatrix, place_of, unmeasured
from ssrctl.measures.rank import unmeasured_note
from ssrctl.measures.rank_report import Column, measure_tables
from ssrctl.measures.spectrum import SpectrumChange
from ssrctl.report.document import Bars, Figure, Heatmap, Lines, Reference, Section, Table
from ssrctl.report.formats import count, number, percent

_SIDES = ("left", "right")
_RANDOM = ("gaussian", "signs")
_ENERGIES = ("left", "right", "both")
# Series that differ by more than this factor are drawn on a logarithmic axis.
_WIDE_RANGE = 30


def spectrum_numbers(found: Mapping[str, OfMatrix[SpectrumChange]]) -> dict[str, Any] | None:
    """Return what the report stores, ready for json; None when no matrix was measured.

    It has ``total``, ``layers``, ``kinds``, ``cells`` (layer and kind), ``tensors`` and ``unmeasured``. Angles of a
    group are the largest over its matrices (``..._largest``) or the mean over those that changed (``..._mean``).
    """
    if not found:
        return None
    rows = {
        name: place_of(name, one.shape) | one.value.numbers()
        for name, one in found.items()
        if isinstance(one.value, SpectrumChange)
    }
    numbers = grouped(rows, _summary)
    numbers["tensors"] = list(rows.values())
    numbers["unmeasured"] = unmeasured(found)
    return numbers


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    changed = [row for row in rows if row["gaussian"] is not None]
    found: dict[str, Any] = {
        "num_matrices": len(rows),
        "num_unchanged": len(rows) - len(changed),
        "num_ill_defined": sum(not row["well_defined"] for row in changed),
        "num_unresolved": sum(not row["resolved"] for row in changed),
    }
    for side in _SIDES:
        found |= _largest(changed, f"{side}_largest")
        found[f"{side}_mean"] = _mean([row[f"{side}_mean"] for row in changed])
        for random in _RANDOM:
            found[f"{random}_{side}_largest"] = max((row[random][f"{side}_largest"] for row in changed), default=None)
            found[f"{random}_{side}_mean"] = _mean([row[random][f"{side}_mean"] for row in changed])
    found |= _largest(changed, "shift")
    found["shift_largest"] = found.pop("shift")
    found["shift_mean"] = _mean([row["shift"] for row in changed])
    expected = [row["expected_shift"] for row in changed if row["expected_shift"] is not None]
    found["expected_shift_largest"] = max(expected, default=None)
    found["expected_shift_mean"] = _mean(expected)
    for part in _ENERGIES:
        found[f"energy_{part}_ratio"] = _mean(
            [row[f"energy_{part}"] / row[f"expected_energy_{part}"] for row in changed]
        )
    return found


def _largest(rows: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    top = max(rows, key=lambda row: row[key], default=None)
    return {key: top and top[key], f"{key}_name": top and top["name"]}


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def headlines(numbers: Mapping[str, Any]) -> list[str]:
    """Return the answer in sentences, from ``spectrum_numbers``."""
    return _spectrum_headlines(numbers["total"])


def _spectrum_headlines(total: Mapping[str, Any]) -> list[str]:
    if total["num_matrices"] == total["num_unchanged"]:
        return []
    turned = max(_SIDES, key=lambda side: total[f"{side}_largest"])
    return [
        f"Rotation: the leading singular directions of {total[f'{turned}_largest_name']} turn most, by "
        f"{_degrees(total[f'{turned}_largest'])}; the mean principal angle over all matrices is "
        f"{_degrees(total['left_mean'])} left and {_degrees(total['right_mean'])} right. Random updates of the same "
        f"norms turn them by {_degrees(total['gaussian_left_mean'])} and {_degrees(total['gaussian_right_mean'])} on "
        "average.",
        f"Singular values shift by {number(total['shift_mean'])} of their norm on average, at most "
        f"{number(total['shift_largest'])} ({total['shift_name']}); random updates: "
        f"{number(total['expected_shift_mean'])} on average.",
        f"The updates have {number(total['energy_left_ratio'])} times the energy that chance puts into the leading "
        f"left directions of the base, {number(total['energy_right_ratio'])} times in the right ones.",
    ]


def notes(numbers: Mapping[str, Any]) -> list[str]:
    """What a reader must know so as not to be misled, from ``spectrum_numbers``."""
    found = []
    total = numbers["total"]
    if total["num_ill_defined"]:
        found.append(
            f"In {count(total['num_ill_defined'])} of {count(total['num_matrices'])} matrices the gap between singular "
            "values k and k + 1 of the base is smaller than the update, so that directions may change places across "
            "the cut: their large angles need not mean much. Random updates show how large they get by chance."
        )
    if total["num_unresolved"]:
        found.append(
            f"In {count(total['num_unresolved'])} matrices the angles are not above the error of the "
            "computation, which is given beside them."
        )
    return found + unmeasured_note("spectrum", numbers["unmeasured"])


def _degrees(value: float | None) -> str:
    return "–" if value is None else f"{number(value)}°"


# --------------------------------------------------------------------------------------------------
# figures and tables


def spectrum_section(numbers: Mapping[str, Any]) -> Section:
    """Figures and tables, from the ``spectrum`` of ``spectrum_numbers``."""
    changed = [row for row in numbers["tensors"] if row["gaussian"] is not None]
    figures: list[Figure] = []
    layers = [row for row in numbers["layers"] if row["layer"] is not None]
    if changed and len(layers) > 1:
        figures += [_angle_lines(layers), _shift_lines(layers), _angle_map(numbers)]
    if changed:
        figures += [_energy_bars(numbers["kinds"]), *_example(changed)]
    return Section(
        title="Principal directions and singular values",
        text="Did training turn the leading singular directions of the weights, or stretch them? Compare with random "
        "updates of the same size applied to the same matrices: published RL turned them little, fine-tuning much "
        "(Zhu et al. 2025, section 4.1, figure 4).",
        figures=figures,
        tables=_tables(numbers),
    )


def _angle_lines(layers: Sequence[Mapping[str, Any]]) -> Lines:
    series = {side: [row[f"{side}_largest"] for row in layers] for side in _SIDES} | {
        "expected, random update of the same norm": [
            _larger(row["gaussian_left_largest"], row["gaussian_right_largest"]) for row in layers
        ]
    }
    return Lines(
        title="Largest principal angle in each layer",
        x=[row["layer"] for row in layers],
        series=series,
        x_label="layer",
        y_label="degrees",
        log_y=_spread(series),
        caption="Over the matrices of a layer, between the leading singular directions before and after. Expected: one "
        "draw, the larger side.",
    )


def _shift_lines(layers: Sequence[Mapping[str, Any]]) -> Lines:
    series = {
        "measured": [row["shift_largest"] for row in layers],
        "expected, random update of the same norm": [row["expected_shift_largest"] for row in layers],
    }
    return Lines(
        title="Largest normalised spectral shift in each layer",
        x=[row["layer"] for row in layers],
        series=series,
        x_label="layer",
        y_label="shift over norm",
        log_y=_spread(series),
        caption="Norm of the change of all singular values over the norm of the base's.",
    )


def _larger(first: float | None, second: float | None) -> float | None:
    return max((value for value in (first, second) if value is not None), default=None)


def _spread(series: Mapping[str, Sequence[float | None]]) -> bool:
    values = [value for some in series.values() for value in some if value]
    return bool(values) and max(values) > _WIDE_RANGE * min(values)


def _angle_map(numbers: Mapping[str, Any]) -> Heatmap:
    cells = {(row["layer"], row["kind"]): row for row in numbers["cells"] if row["layer"] is not None}
    layers = sorted({layer for layer, _ in cells})
    kinds = [kind for kind in KINDS if any(found == kind for _, found in cells)]
    values = [[_relative_angle(cells.get((layer, kind))) for layer in layers] for kind in kinds]
    return Heatmap(
        title="Mean principal angle over that of a random update",
        values=values,
        row_labels=kinds,
        column_labels=[str(layer) for layer in layers],
        row_axis="kind",
        column_axis="layer",
        centre=1.0,
        scale=1.0,
        decimals=2,
        caption="Mean of left and right. Below 1: the update turns the leading directions less than random changes of "
        "the same norm would.",
    )


def _relative_angle(cell: Mapping[str, Any] | None) -> float | None:
    if cell is None or cell["left_mean"] is None:
        return None
    random = cell["gaussian_left_mean"] + cell["gaussian_right_mean"]
    return (cell["left_mean"] + cell["right_mean"]) / random if random else None


def _energy_bars(kinds: Sequence[Mapping[str, Any]]) -> Bars:
    return Bars(
        title="Energy of the update in the base's leading directions",
        labels=[row["kind"] for row in kinds],
        series={side: [row[f"energy_{side}_ratio"] for row in kinds] for side in _SIDES},
        axis="times the energy that chance gives",
        shares=False,
        references=[Reference("by chance", 1.0)],
        caption="Share of the squared norm of the update in the leading left (right) singular directions of the base, "
        "over their share of all directions.",
    )


def _example(changed: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """The matrix with the largest shift: its singular values and its angles."""
    row = max(changed, key=lambda row: row["shift"])
    return [
        Lines(
            title=f"Singular values of {row['name']}",
            x=row["curve_index"],
            series={"base": row["curve_base"], "tuned": row["curve_tuned"]},
            x_label="index",
            y_label="singular value",
            log_x=True,
            caption=f"The matrix with the largest shift, {number(row['shift'])} of the norm.",
        ),
        Lines(
            title=f"Principal angles of {row['name']}",
            x=row["angle_index"],
            series={side: row[f"curve_{side}"] for side in _SIDES},
            x_label="index",
            y_label="degrees",
            caption=f"Between the {row['k']} leading singular directions before and after. The gap after them is "
            f"{percent(row['relative_gap'])} of the next singular value.",
        ),
    ]


_GROUP: tuple[Column, ...] = (
    ("matrices", "num_matrices", count),
    ("unchanged", "num_unchanged", count),
    ("small gap", "num_ill_defined", count),
    ("left, largest", "left_largest", _degrees),
    ("random, left", "gaussian_left_largest", _degrees),
    ("signs, left", "signs_left_largest", _degrees),
    ("right, largest", "right_largest", _degrees),
    ("random, right", "gaussian_right_largest", _degrees),
    ("signs, right", "signs_right_largest", _degrees),
    ("shift, mean", "shift_mean", number),
    ("random shift", "expected_shift_mean", number),
    ("energy left", "energy_left_ratio", number),
    ("energy right", "energy_right_ratio", number),
)
_TENSOR: tuple[Column, ...] = (
    ("k", "k", count),
    ("left, largest", "left_largest", _degrees),
    ("left, mean", "left_mean", _degrees),
    ("right, largest", "right_largest", _degrees),
    ("right, mean", "right_mean", _degrees),
    ("error", "angle_error", _degrees),
    ("angle at most", "wedin_angle", _degrees),
    ("gap", "relative_gap", percent),
    ("shift", "shift", number),
    ("shift at most", "shift_bound", number),
)


def _tables(numbers: Mapping[str, Any]) -> list[Table]:
    note = (
        "Largest principal angles over the matrices of a row. Random: after a random update of the same norm; signs: "
        "after the same changes with random signs; one draw each. Shift: normalised spectral shift. Energy: of the "
        "update in the base's leading directions, in multiples of chance. Small gap: matrices in which the update "
        "exceeds the gap after the k-th singular value."
    )
    details = (
        "Error: bound on the error of the angles. At most: what perturbation theory allows, blank where it "
        "excludes nothing. Gap: between the base's singular values k and k + 1, over the latter."
    )
    return measure_tables("Spectrum", numbers, (_GROUP, note), (_TENSOR, details))
