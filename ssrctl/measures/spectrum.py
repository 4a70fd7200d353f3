"""The rotation and stretching of the weight matrices' principal directions by training (Zhu et al. 2025, sec. 4.1).

``maths.spectrum_change`` measures one matrix; here are the rows by layer, kind and matrix, and their presentation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ssrctl.checkpoints.pairs import TensorPair
from ssrctl.core.seeds import derive_seed
from ssrctl.measures.base import Findings, register
from ssrctl.measures.group_tables import RowColumn, cell_map, group_tables, layer_lines, row_dots
from ssrctl.measures.maths.averages import mean, ratio
from ssrctl.measures.maths.grouping import Grouped
from ssrctl.measures.maths.matrices import base_spectrum
from ssrctl.measures.maths.spectrum_change import SpectrumChange, spectrum_change
from ssrctl.measures.maths.update_matrix import Unmeasured, UpdateMatrix
from ssrctl.measures.matrix_measure import MatrixMeasure, MatrixResult
from ssrctl.measures.spectrum_overlay import overlay_section
from ssrctl.report.document import Figure, Lines, Reference, Section
from ssrctl.report.formats import count, number, percent

_SIDES = ("left", "right")
_RANDOM = ("gaussian", "signs")
_ENERGIES = ("left", "right", "both")


@dataclass(frozen=True, kw_only=True)
class SpectrumRow:
    """The spectra of several matrices; means and maxima are over those that changed, None when none did.

    Attributes:
        num_matrices, num_unchanged: counts; the following two are among the matrices that changed.
        num_ill_defined: matrices whose update exceeds the gap after the k-th singular value.
        num_unresolved: matrices whose angles are not above the error of the computation.
        left_largest, right_largest, shift_largest: maxima; ``..._name`` says of which matrix.
        left_mean, right_mean: means of the matrices' mean angles, degrees.
        gaussian_..., signs_...: the same after random updates (``RandomUpdate``).
        shift_mean, expected_shift_mean, expected_shift_largest: of ``SpectrumChange.shift`` and ``expected_shift``.
        energy_left_ratio, ...: mean of the energy over that of chance.
    """

    num_matrices: int
    num_unchanged: int
    num_ill_defined: int
    num_unresolved: int
    left_largest: float | None
    left_largest_name: str | None
    left_mean: float | None
    gaussian_left_largest: float | None
    gaussian_left_mean: float | None
    signs_left_largest: float | None
    signs_left_mean: float | None
    right_largest: float | None
    right_largest_name: str | None
    right_mean: float | None
    gaussian_right_largest: float | None
    gaussian_right_mean: float | None
    signs_right_largest: float | None
    signs_right_mean: float | None
    shift_name: str | None
    shift_largest: float | None
    shift_mean: float | None
    expected_shift_largest: float | None
    expected_shift_mean: float | None
    energy_left_ratio: float | None
    energy_right_ratio: float | None
    energy_both_ratio: float | None

    @property
    def gaussian_largest(self) -> float | None:
        """The largest angle after random updates, of the larger side."""
        sides = (self.gaussian_left_largest, self.gaussian_right_largest)
        return max((angle for angle in sides if angle is not None), default=None)

    @property
    def relative_angle(self) -> float | None:
        """Mean angle over that of random updates; None where one is not known, or the latter is 0."""
        if self.left_mean is None or self.right_mean is None:
            return None
        random = (self.gaussian_left_mean or 0.0) + (self.gaussian_right_mean or 0.0)
        return ratio(self.left_mean + self.right_mean, random)


SpectrumResult = MatrixResult[SpectrumRow, SpectrumChange]


def _largest(spectra: Sequence[tuple[str, SpectrumChange]], key: str) -> tuple[float | None, str | None]:
    found = [(getattr(one, key), name) for name, one in spectra]
    return max(found, key=lambda item: item[0], default=(None, None))


# --------------------------------------------------------------------------------------------------
# the measure


@register
class SpectrumMeasure(MatrixMeasure[SpectrumChange, SpectrumRow]):
    """The rotation and stretching of the leading directions of each matrix."""

    name = "spectrum"
    order = 50

    def matrix(self, pair: TensorPair, label: str, update: UpdateMatrix) -> SpectrumChange | Unmeasured:
        """Return the change of one matrix's spectrum; the update's norm is the rank's, where that was measured."""
        seed = derive_seed(self.config.seed, "spectrum", label)
        norm = pair.memo.get(("spectral_norm", label))
        turns = update.norm > 0 and update.base_norm > 0
        base = base_spectrum(pair, label, update.base, self.config.device) if turns else None
        return spectrum_change(update, k=self.config.num_directions, seed=seed, update_norm=norm, base=base)

    @staticmethod
    def row(matrices: Sequence[tuple[str, SpectrumChange]]) -> SpectrumRow:
        """Summarise the spectra of several matrices."""
        changed = [(name, one) for name, one in matrices if one.gaussian is not None]
        found: dict[str, Any] = {}
        for side in _SIDES:
            found[f"{side}_largest"], found[f"{side}_largest_name"] = _largest(changed, f"{side}_largest")
            found[f"{side}_mean"] = mean(getattr(one, f"{side}_mean") for _, one in changed)
            for random in _RANDOM:
                draws = [getattr(one, random) for _, one in changed]
                found[f"{random}_{side}_largest"] = max(
                    (getattr(one, f"{side}_largest") for one in draws), default=None
                )
                found[f"{random}_{side}_mean"] = mean(getattr(one, f"{side}_mean") for one in draws)
        found["shift_largest"], found["shift_name"] = _largest(changed, "shift")
        expected = [one.expected_shift for _, one in changed if one.expected_shift is not None]
        for part in _ENERGIES:
            found[f"energy_{part}_ratio"] = mean(
                getattr(one, f"energy_{part}") / getattr(one, f"expected_energy_{part}") for _, one in changed
            )
        return SpectrumRow(
            num_matrices=len(matrices),
            num_unchanged=len(matrices) - len(changed),
            num_ill_defined=sum(not one.well_defined for _, one in changed),
            num_unresolved=sum(not one.resolved for _, one in changed),
            shift_mean=mean(one.shift for _, one in changed),
            expected_shift_largest=max(expected, default=None),
            expected_shift_mean=mean(expected),
            **found,
        )

    def describe(self, result: SpectrumResult) -> Findings:
        """Return sentences, figures and tables of spectra."""
        total = result.rows.total
        return Findings(
            headlines=spectrum_headlines(total), notes=spectrum_notes(total), sections=[spectrum_section(result)]
        )

    def side_by_side(self, results: Mapping[str, SpectrumResult]) -> list[Section]:
        """Return the checkpoints' spectra in one figure each."""
        rows = {label: result.rows for label, result in results.items() if result.shapes}
        return [overlay_section(rows, _GROUP, _GROUP_NOTE)] if rows else []


def spectrum_headlines(total: SpectrumRow) -> list[str]:
    """Return the answer in sentences."""
    if total.num_matrices == total.num_unchanged:
        return []
    left, right = total.left_largest or 0.0, total.right_largest or 0.0
    angle, name = (right, total.right_largest_name) if right > left else (left, total.left_largest_name)
    return [
        f"Rotation: the leading singular directions turn by {_degrees(total.left_mean)} left and "
        f"{_degrees(total.right_mean)} right on average (random updates of the same norms: "
        f"{_degrees(total.gaussian_left_mean)} and {_degrees(total.gaussian_right_mean)}), most in {name} "
        f"({_degrees(angle)}).",
    ]


def _shift_text(total: SpectrumRow) -> str:
    """Return the shift of singular values and the energy in leading directions, next to chance."""
    if total.num_matrices == total.num_unchanged:
        return ""
    return (
        f" Singular values shift by {number(total.shift_mean)} of their norm on average, at most "
        f"{number(total.shift_largest)} ({total.shift_name}); random updates: {number(total.expected_shift_mean)} on "
        f"average. The updates have {number(total.energy_left_ratio)} times the energy that chance puts into the leading "
        f"left directions of the base, {number(total.energy_right_ratio)} times in the right ones."
    )


def spectrum_notes(total: SpectrumRow) -> list[str]:
    """Return what a reader must know so as not to be misled."""
    found = []
    if total.num_ill_defined:
        found.append(
            f"In {count(total.num_ill_defined)} of {count(total.num_matrices)} matrices the gap between singular "
            "values k and k + 1 of the base is smaller than the update, so that directions may change places across "
            "the cut: their large angles need not mean much. Random updates show how large they get by chance."
        )
    if total.num_unresolved:
        found.append(
            f"In {count(total.num_unresolved)} matrices the angles are not above the error of the computation, which "
            "is given with them."
        )
    return found


def _degrees(value: float | None) -> str:
    return "–" if value is None else f"{number(value)}°"


_GROUP: tuple[RowColumn, ...] = (
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
_MATRIX: tuple[RowColumn, ...] = (
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
_GROUP_NOTE = (
    "Largest principal angles over the matrices of a row. Random: after a random update of the same norm; signs: "
    "after the same changes with random signs; one draw each. Shift: normalised spectral shift. Energy: of the "
    "update in the base's leading directions, in multiples of chance. Small gap: matrices in which the update "
    "exceeds the gap after the k-th singular value."
)
_MATRIX_NOTE = (
    "Error: bound on the error of the angles. At most: what perturbation theory allows, blank where it "
    "excludes nothing. Gap: between the base's singular values k and k + 1, over the latter."
)


def spectrum_section(result: SpectrumResult) -> Section:
    """Return figures and tables."""
    rows = result.rows
    changed = {name: one for name, one in rows.tensors.items() if one.gaussian is not None}
    figures: list[Figure] = []
    if changed:
        if len(rows.numbered_layers) > 1:
            figures += [*_angle_map(rows), *_layer_figures(rows)]
        figures += [
            row_dots(
                "Energy of the update in the base's leading directions",
                rows.kinds,
                {"left": "energy_left_ratio", "right": "energy_right_ratio"},
                "times the energy that chance gives",
                shares=False,
                references=[Reference("by chance", 1.0)],
                caption="Share of the squared norm of the update in the leading left (right) singular directions of "
                "the base, over their share of all directions.",
            ),
            *_example(changed),
        ]
    return Section(
        title="Principal directions and singular values",
        text="Did training turn the leading singular directions of the weights, or stretch them? Compare with random "
        "updates of the same size applied to the same matrices: published RL turned them little, fine-tuning much "
        "(Zhu et al. 2025, section 4.1, figure 4)." + _shift_text(rows.total),
        figures=figures,
        tables=group_tables("Spectrum", rows, (_GROUP, _GROUP_NOTE), (_MATRIX, _MATRIX_NOTE), result.unmeasured),
    )


def _layer_figures(rows: Grouped[SpectrumRow, SpectrumChange]) -> list[Lines]:
    random = "expected, random update of the same norm"
    angles = layer_lines(
        "Largest principal angle in each layer",
        rows,
        {"left": "left_largest", "right": "right_largest", random: "gaussian_largest"},
        "degrees",
        caption="Over the matrices of a layer, between the leading singular directions before and after. Expected: one "
        "draw, the larger side.",
    )
    shifts = layer_lines(
        "Largest normalised spectral shift in each layer",
        rows,
        {"measured": "shift_largest", random: "expected_shift_largest"},
        "shift over norm",
        caption="Norm of the change of all singular values over the norm of the base's.",
    )
    return [*angles, *shifts]


def _angle_map(rows: Grouped[SpectrumRow, SpectrumChange]) -> list[Figure]:
    found = cell_map(
        "Mean principal angle over that of a random update",
        rows.cells,
        "relative_angle",
        centre=1.0,
        scale=1.0,
        decimals=2,
        caption="Mean of left and right. Below 1: the update turns the leading directions less than random changes of "
        "the same norm would.",
    )
    return [] if found is None else [found]


def _example(changed: Mapping[str, SpectrumChange]) -> list[Figure]:
    """Return the singular values and the angles of the matrix with the largest shift."""
    name, one = max(changed.items(), key=lambda item: item[1].shift)
    row = one.numbers()
    return [
        Lines(
            title=f"Singular values of {name}",
            x=row["curve_index"],
            series={"base": row["curve_base"], "tuned": row["curve_tuned"]},
            x_label="index",
            y_label="singular value",
            log_x=True,
            caption=f"The matrix with the largest shift, {number(one.shift)} of the norm.",
        ),
        Lines(
            title=f"Principal angles of {name}",
            x=row["angle_index"],
            series={side: row[f"curve_{side}"] for side in _SIDES},
            x_label="index",
            y_label="degrees",
            caption=f"Between the {one.k} leading singular directions before and after. The gap after them is "
            f"{percent(one.relative_gap)} of the next singular value.",
        ),
    ]
