"""The rotation and stretching of the principal directions of a weight matrix by training.

Principal angles between the top-k singular subspaces before and after, and the normalised shift of the singular values
(Zhu et al. 2025, arXiv:2511.08567, sec. 4.1), next to the effect of two random updates of the same size on the same
matrix, since one whose singular values lie close together turns easily, and to the bounds of perturbation theory.
"""

from __future__ import annotations

import functools
import math
import statistics
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ssrctl.core.seeds import derive_seed
from ssrctl.measures.maths.low_rank import (
    EPS,
    LowRank,
    Rows,
    Spectrum,
    eigenvectors,
    nearby_top_k,
    singular_values,
    spectrum,
)
from ssrctl.measures.maths.update_matrix import Unmeasured, UpdateMatrix

# By default a tenth of the smaller side, within these.
_MIN_K, _MAX_K, _K_SHARE = 8, 128, 10
# Relative norm up to which an update counts as small: first-order perturbation theory is good to some percent there.
_SMALL = 0.02
# Accuracy of the angles after random updates, relative to them, and iterations until they have it.
_RANDOM_TOLERANCE, _RANDOM_ITERATIONS = 0.01, 5
# The same of the measured angles; and the smaller side from which iterations take less time than all eigenvectors.
_TOLERANCE, _ITERATIONS, _ITERATED_SIDE = 1e-8, 12, 3072
# Points of a curve that are kept.
_CURVE_POINTS = 32
_RIGHT_ANGLE = 90.0


@dataclass(frozen=True, kw_only=True)
class RandomUpdate:
    """The effect of a random update on the base; one draw.

    Attributes:
        left_largest, left_mean, right_largest, right_mean: principal angles, degrees, good to about 1%. The largest differs between draws by a factor of two, the mean by little.
    """

    left_largest: float
    left_mean: float
    right_largest: float
    right_mean: float


@dataclass(frozen=True, kw_only=True)
class SpectrumChange:
    """The base W0 ``[m, n]`` against the tuned W1; s_i are singular values, D = W1 - W0, angles in degrees.

    Attributes:
        k: directions compared: as asked for, but less than min(m, n) and no more than the rank of W0.
        left, right: the k principal angles between the top-k left (right) subspaces, ascending, in [0, 90].
        angle_error: bound on their error from round-off; 90 when no angle is resolved.
        relative_gap: s_k(W0) / s_{k+1}(W0) - 1; None when s_{k+1} is 0 to the tolerance of the rank.
        well_defined: s_k(W0) - s_{k+1}(W0) > ||D||_2. Otherwise the update could exchange directions across the cut,
            and large angles need not mean much.
        wedin_angle: no angle can be larger: asin(||D||_2 / gap) with the larger of s_k(W0) - s_{k+1}(W1) and
            s_k(W1) - s_{k+1}(W0) as gap (Wedin 1972; Zhu et al., thm. 3.3, writes the gap of W0 only, which holds to
            first order). None when it excludes nothing.
        shift: normalised spectral shift ||s(W1) - s(W0)||_2 / ||s(W0)||_2, over all singular values.
        shift_bound: ||D||_F / ||W0||_F: no shift can be larger (Mirsky 1960; Zhu et al., cor. 3.4).
        expected_shift: by ``gaussian``: shift_bound / sqrt(max(m, n)), the first order of perturbation theory, for
            updates of at most 2% of the norm of W0; beyond, that of the draw itself. None when nothing changed.
        shift_top_k: the same over the first k values only.
        gaussian: a random update with independent normal entries and the Frobenius norm of D, in expectation.
        signs: D with random signs: the same coordinates and sizes. Both None when nothing changed.
        energy_left, energy_right, energy_both: share of ||D||_F^2 in the top-k left subspace of W0, in the right one,
            and in both at once: ||U^T D||_F^2, ||D V||_F^2, ||U^T D V||_F^2. By chance k/m, k/n, k^2/(m n)
            (``expected_energy_...``). None when nothing changed.
        curve_index: from 1, ascending; of ``curve_base`` and ``curve_tuned``, singular values at these places. Empty
            when nothing changed.
        angle_index: from 1, ascending; of ``curve_left`` and ``curve_right`` in ``numbers``.
        spectral_norm: ||D||_2.
    """

    k: int
    left: list[float]
    right: list[float]
    expected_energy_left: float
    expected_energy_right: float
    expected_energy_both: float
    # Defaults are the values of an update of zero.
    angle_error: float = 0.0
    relative_gap: float | None = None
    well_defined: bool = True
    wedin_angle: float | None = 0.0
    shift: float = 0.0
    shift_bound: float = 0.0
    expected_shift: float | None = None
    shift_top_k: float = 0.0
    gaussian: RandomUpdate | None = None
    signs: RandomUpdate | None = None
    energy_left: float | None = None
    energy_right: float | None = None
    energy_both: float | None = None
    curve_index: list[int] = field(default_factory=list)
    curve_base: list[float] = field(default_factory=list)
    curve_tuned: list[float] = field(default_factory=list)
    spectral_norm: float = 0.0

    @property
    def left_largest(self) -> float:
        """The largest left angle."""
        return self.left[-1]

    @property
    def right_largest(self) -> float:
        """The largest right angle."""
        return self.right[-1]

    @property
    def left_mean(self) -> float:
        """Mean of the left angles."""
        return statistics.fmean(self.left)

    @property
    def right_mean(self) -> float:
        """Mean of the right angles."""
        return statistics.fmean(self.right)

    @property
    def resolved(self) -> bool:
        """True if the largest angle is above the error of the computation."""
        return max(self.left[-1], self.right[-1]) > self.angle_error

    def numbers(self) -> dict[str, Any]:
        """Return the form of the json report: angles as largest and mean, curves at up to 32 points and six digits."""
        angle_index = curve_places(self.k)
        own = asdict(self)
        for side in ("left", "right"):
            degrees = own.pop(side)
            own |= {key: getattr(self, key) for key in (f"{side}_largest", f"{side}_mean")}
            own[f"curve_{side}"] = [degrees[place - 1] for place in angle_index]
        curves = {name: [float(f"{x:.6g}") for x in own[name]] for name in own if name.startswith("curve_")}
        return own | curves | {"curve_index": self.curve_index, "angle_index": angle_index, "resolved": self.resolved}


def default_k(m: int, n: int) -> int:
    """Return the default number of directions: a tenth of the smaller side, in [8, 128] and below that side."""
    side = min(m, n)
    return max(1, min(side - 1, max(_MIN_K, min(_MAX_K, side // _K_SHARE))))


def spectrum_change(
    update: UpdateMatrix,
    *,
    k: int | None = None,
    seed: int,
    update_norm: float | None = None,
    base: Spectrum | None = None,
) -> SpectrumChange | Unmeasured:
    """Compare the spectra of a matrix before and after.

    Args:
        update: at least 2 by 2.
        k: by default ``default_k``.
        seed: of the random updates; derive it from the tensor's name.
        update_norm: ||D||_2 if known, to save its computation.
        base: the spectrum of the base if known, likewise.

    Returns:
        ``Unmeasured`` when the base is zero, which has no principal directions.

    Raises:
        ValueError: a side of 1, or k below 1.
    """
    rows, columns = update.shape
    if columns < 2 or (k is not None and k < 1):
        raise ValueError(f"k is {k} for a matrix of {rows} by {columns}")
    if update.base_norm == 0:
        return Unmeasured("the base is zero and has no principal directions")
    k = min(k or default_k(rows, columns), columns - 1)
    if update.norm == 0:
        zeros = [0.0] * k
        return _turned(update, SpectrumChange(k=k, left=zeros, right=zeros, **_expected_energies(rows, columns, k)))
    around = base or spectrum(update.base_rows)
    # One direction more than is compared, for the gap after the last.
    before = around.top(update.base_rows, k + 1)
    floor = rows * EPS * float(before.S[0])
    k = min(k, int(before.S.gt(floor).sum()))
    after, tuned_values = _tuned(update, around, k + 1)
    if update_norm is None:
        update_norm = float(singular_values(update.update_rows.gram())[0])
    # The largest are known better from the matrix itself than from its square.
    base_values = torch.cat((before.S, around.values[len(before.S) :]))
    gaussian, gaussian_values = _random_update(update, "gaussian", around, before, k, seed)
    signs, _ = _random_update(update, "signs", around, before, k, seed)
    gap = float(before.S[k - 1] - before.S[k])
    places = curve_places(columns)
    change = SpectrumChange(
        k=k,
        left=principal_angles(before.U[:, :k], after.U[:, :k]),
        right=principal_angles(before.V[:, :k], after.V[:, :k]),
        angle_error=min(_RIGHT_ANGLE, _subspace_error(before, k, rows) + _subspace_error(after, k, rows)),
        relative_gap=gap / float(before.S[k]) if float(before.S[k]) > floor else None,
        well_defined=gap > update_norm,
        wedin_angle=_wedin_angle(before.S, after.S, k, update_norm),
        shift=float((tuned_values - base_values).norm()) / update.base_norm,
        shift_bound=update.norm / update.base_norm,
        expected_shift=_expected_shift(update, base_values, gaussian_values),
        shift_top_k=float((after.S[:k] - before.S[:k]).norm() / before.S[:k].norm()),
        gaussian=gaussian,
        signs=signs,
        **_energies(update, before.U[:, :k], before.V[:, :k]),
        **_expected_energies(rows, columns, k),
        curve_index=places,
        curve_base=[float(base_values[place - 1]) for place in places],
        curve_tuned=[float(tuned_values[place - 1]) for place in places],
        spectral_norm=update_norm,
    )
    return _turned(update, change)


def principal_angles(first: Tensor, second: Tensor) -> list[float]:
    """Return the principal angles (degrees, ascending) between the column spans of two orthonormal float64 ``[n, k]``.

    cos(t_i) = s_i(first^T second). Below 45 degrees from the sines instead, the singular values of
    second - first first^T second, because a cosine near 1 has lost half the digits (Bjorck and Golub 1973).
    """
    # Not scipy.linalg.subspace_angles, which makes both orthonormal once more, by SVDs that take 10 to 40 times as long.
    inner = first.T @ second
    cosines = torch.linalg.svdvals(inner).clamp_(max=1.0)
    sines = torch.linalg.svdvals(second - first @ inner).clamp_(max=1.0).flip(0)
    angles = torch.where(cosines.square() >= 0.5, sines.asin(), cosines.acos())
    return [float(angle) for angle in angles.rad2deg()]


def curve_places(length: int) -> list[int]:
    """Return at most 32 of the places 1..length, evenly spread on a log scale, with both ends."""
    if length <= _CURVE_POINTS:
        return list(range(1, length + 1))
    ratios = (math.exp(math.log(length) * step / (_CURVE_POINTS - 1)) for step in range(_CURVE_POINTS))
    return sorted({round(ratio) for ratio in ratios})


def _subspace_error(found: LowRank, k: int, rows: int) -> float:
    """Return a bound (degrees) on the angle between the computed and the true top-k subspaces."""
    largest, last, following = (float(found.S[place]) for place in (0, k - 1, k))
    # The Gram matrix is good to max(m, n) eps s_1^2, its eigenvectors to that over the gap of the squares.
    noise, gap = rows * 2.0**-52 * largest**2, last**2 - following**2
    return _degrees_of_sine(noise, gap)


def _wedin_angle(base: Tensor, tuned: Tensor, k: int, update_norm: float) -> float | None:
    gap = max(float(base[k - 1] - tuned[k]), float(tuned[k - 1] - base[k]))
    return math.degrees(math.asin(update_norm / gap)) if gap > update_norm else None


def _degrees_of_sine(numerator: float, denominator: float) -> float:
    """Return asin(numerator / denominator) in degrees; 90 where that is not a sine."""
    if denominator <= numerator:
        return _RIGHT_ANGLE
    return math.degrees(math.asin(numerator / denominator))


def _tuned(update: UpdateMatrix, base: Spectrum, k: int) -> tuple[LowRank, Tensor]:
    """Return the top k of the tuned matrix, and all its singular values."""
    rows = update.tuned_rows
    gram, found = rows.gram(), None
    if update.shape[1] >= _ITERATED_SIDE and update.norm <= _SMALL * update.base_norm:
        times = functools.partial(torch.mm, gram)
        found = nearby_top_k(rows, base, k, tolerance=_TOLERANCE, iterations=_ITERATIONS, normal_times=times)
    if found is None:
        whole = eigenvectors(gram)
        found, values = whole.top(rows, k), whole.values
    else:
        values = singular_values(gram)
    return found, torch.cat((found.S, values[k:]))


def _random_update(
    update: UpdateMatrix, kind: Literal["gaussian", "signs"], around: Spectrum, base: LowRank, k: int, seed: int
) -> tuple[RandomUpdate, Tensor | None]:
    """Return the effect of a random update on the base, and all singular values after it, if they were computed."""
    rows, values = _perturbed(update, kind, seed), None
    found = None
    if update.norm <= _SMALL * update.base_norm:
        found = nearby_top_k(rows, around, k, tolerance=_RANDOM_TOLERANCE, iterations=_RANDOM_ITERATIONS)
    if found is None:
        whole = spectrum(rows)
        found = whole.top(rows, k)
        values = torch.cat((found.S, whole.values[k:]))
    left = principal_angles(base.U[:, :k], found.U[:, :k])
    right = principal_angles(base.V[:, :k], found.V[:, :k])
    means = {"left_mean": statistics.fmean(left), "right_mean": statistics.fmean(right)}
    return RandomUpdate(left_largest=left[-1], right_largest=right[-1], **means), values


def _expected_shift(update: UpdateMatrix, base: Tensor, values: Tensor | None) -> float | None:
    """Return the shift by the Gaussian update; ``values`` are the base's after it, where they were computed."""
    if update.norm <= _SMALL * update.base_norm:
        # Each value moves by u^T E v, normal with the variance of E's entries; there are min(m, n) of them.
        return update.norm / update.base_norm / math.sqrt(update.shape[0])
    if values is None:
        return None
    return float((values - base).norm()) / update.base_norm


def _perturbed(update: UpdateMatrix, kind: Literal["gaussian", "signs"], seed: int) -> Rows:
    """Return the base plus a random update: a small matrix is kept, a large one is computed again in every pass."""
    scale = update.norm / math.sqrt(update.base.numel())
    base_rows, update_rows = update.base_rows, update.update_rows

    def piece(start: int, stop: int) -> Tensor:
        # Each piece has its own seed, so that it is the same in every pass.
        generator = torch.Generator().manual_seed(derive_seed(seed, kind, start))
        shape = (stop - start, update.shape[1])
        if kind == "gaussian":
            noise = torch.randn(shape, generator=generator).to(update.device).to(torch.float64) * scale
        else:
            signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)
            noise = update_rows.piece(start, stop) * signs.to(update.device)
        return noise.add_(base_rows.piece(start, stop))

    return Rows(update.shape, piece, update.device).held()


def _energies(update: UpdateMatrix, left: Tensor, right: Tensor) -> dict[str, float]:
    projected = torch.zeros(left.shape[1], right.shape[0], dtype=torch.float64, device=left.device)
    right_square = 0.0
    for start, stop, piece in update.update_rows.pieces():
        projected.addmm_(left[start:stop].T, piece)
        right_square += float((piece @ right).square().sum())
    squares = (float(projected.square().sum()), right_square, float((projected @ right).square().sum()))
    # Sums that differ in order can pass the whole by a rounding.
    shares = [min(1.0, square / update.norm**2) for square in squares]
    return dict(zip(("energy_left", "energy_right", "energy_both"), shares, strict=True))


def _expected_energies(rows: int, columns: int, k: int) -> dict[str, Any]:
    return {
        "expected_energy_left": k / rows,
        "expected_energy_right": k / columns,
        "expected_energy_both": k * k / (rows * columns),
    }


def _turned(update: UpdateMatrix, change: SpectrumChange) -> SpectrumChange:
    """Return the change with left and right as in the given matrix, where that was transposed."""
    if not update.wide:
        return change
    return replace(
        change,
        left=change.right,
        right=change.left,
        gaussian=_swapped(change.gaussian),
        signs=_swapped(change.signs),
        energy_left=change.energy_right,
        energy_right=change.energy_left,
        expected_energy_left=change.expected_energy_right,
        expected_energy_right=change.expected_energy_left,
    )


def _swapped(random: RandomUpdate | None) -> RandomUpdate | None:
    if random is None:
        return None
    left, right = (random.left_largest, random.left_mean), (random.right_largest, random.right_mean)
    return RandomUpdate(left_largest=right[0], left_mean=right[1], right_largest=left[0], right_mean=left[1])
