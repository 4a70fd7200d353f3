"""Do changed weights land on the principal weights, or on small ones? (Zhu et al. 2025, arXiv:2511.08567, sec. 4.2)

Notation: W ``[m, n]`` a base matrix, N = mn; M the set of its changed weights; P any fixed set of its coordinates.
The overlap of M with P is ``|M n P| / |M|``. A set drawn at random with as many coordinates as M has an overlap of
``|P| / N`` on average, the density of P, and ``|M n P|`` is then hypergeometric: its quantiles are exact, so no masks
are drawn.

Large weights need larger updates before their stored value moves, and principal weights tend to be large. Any update,
even noise, then seems to avoid them. So there is a second comparison for them, with random sets that have as many
weights of each magnitude (of each power of two) as M has: what is left is not due to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssrctl.checkpoints.names import matrix_kind
from ssrctl.core.seeds import derive_seed
from ssrctl.measures import matrices as matrix_measures
from ssrctl.measures.maths.grouping import grouped
from ssrctl.measures.maths.magnitude import count_by_magnitude
from ssrctl.measures.maths.row_column_counts import Profile, coarse_map, concentration, mean_concentration
from ssrctl.measures.maths.update_matrix import Unmeasured

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CONFIDENCE = 0.95
Landings = tuple["Landing", ...]
# The last is the first again, with another idea of chance: random weights of the same magnitudes as those that changed.
SETS = ("principal", "low_magnitude", "principal_not_low", "principal_same_size")
# Their rows are tokens: a reconstruction of low rank says nothing of them, and the paper leaves them out.
_LEFT_OUT = {"embed": "an embedding", "lm_head": "the output head"}


@dataclass(frozen=True, kw_only=True)
class Landing:
    """The changed weights of one matrix and one set of its coordinates, counted.

    Attributes:
        numel: N.
        num_set: ``|P|``.
        num_changed: ``|M|``.
        num_both: ``|M n P|``.
    """

    numel: int
    num_set: int
    num_changed: int
    num_both: int

    @property
    def overlap(self) -> float | None:
        """``|M n P| / |M|``, in [0, 1]; None when nothing changed."""
        return self.num_both / self.num_changed if self.num_changed else None

    @property
    def density(self) -> float:
        """``|P| / N``, what the overlap is on average by chance; 0 for an empty matrix."""
        return self.num_set / self.numel if self.numel else 0.0

    @property
    def expected_both(self) -> float:
        """``|M| |P| / N``, the mean of ``|M n P|`` by chance."""
        return self.num_changed * self.density

    @property
    def variance_both(self) -> float:
        """Variance of ``|M n P|`` by chance: ``|M| p (1 - p) (N - |M|) / (N - 1)`` with p the density of P."""
        if self.numel < 2:
            return 0.0
        left = (self.numel - self.num_changed) / (self.numel - 1)
        return self.num_changed * self.density * (1 - self.density) * left

    @property
    def least_both(self) -> int:
        """The smallest ``|M n P|`` that these sizes allow."""
        return max(0, self.num_changed + self.num_set - self.numel)

    @property
    def most_both(self) -> int:
        """The largest ``|M n P|`` that these sizes allow."""
        return min(self.num_changed, self.num_set)


def land(changed: Tensor, chosen: Tensor) -> Landing:
    """Count how two sets of one tensor's coordinates meet.

    Args:
        changed: bool, any shape, True = changed.
        chosen: bool, the same shape, True = in the set.

    Raises:
        ValueError: different shapes.
    """
    if changed.shape != chosen.shape:
        raise ValueError(f"sets over different shapes: {list(changed.shape)} and {list(chosen.shape)}")
    return Landing(
        numel=changed.numel(),
        num_set=int(chosen.count_nonzero()),
        num_changed=int(changed.count_nonzero()),
        num_both=int((changed & chosen).count_nonzero()),
    )


def chance_interval(landings: Sequence[Landing], confidence: float = CONFIDENCE) -> tuple[int, int]:
    """Where the total of ``|M n P|`` lies by chance: (low, high), both counted in, equal tails.

    Each matrix has its own random set, of as many coordinates as changed there. For a single matrix with changes the
    quantiles are those of the hypergeometric distribution; for several, whose counts add up, those of the normal
    distribution with the exact mean and variance, rounded outwards to whole counts within what is possible.

    Args:
        landings: of matrices that do not share coordinates; none gives (0, 0).
        confidence: level, in (0, 1).
    """
    from scipy.stats import hypergeom, norm

    free = [one for one in landings if one.most_both > one.least_both]
    fixed = sum(one.least_both for one in landings if one.most_both == one.least_both)
    if not free:
        return fixed, fixed
    if len(free) == 1:
        only = free[0]
        low, high = hypergeom(only.numel, only.num_set, only.num_changed).interval(confidence)
        return fixed + int(low), fixed + int(high)
    mean = math.fsum(one.expected_both for one in free)
    spread = float(norm.ppf((1 + confidence) / 2)) * math.sqrt(math.fsum(one.variance_both for one in free))
    low = max(math.floor(mean - spread), sum(one.least_both for one in free))
    high = min(math.ceil(mean + spread), sum(one.most_both for one in free))
    return fixed + low, fixed + high


def summary(landings: Sequence[Landing]) -> dict[str, float | int | None]:
    """One or several matrices, or parts of them, with one kind of set, weighted by their changed weights.

    Returns:
        ``num_changed``, ``num_both``; ``overlap``; ``expected_overlap`` by chance with its interval, ``expected_low``
        and ``expected_high``; ``ratio``, overlap over expected; ``density`` of the set, weighted by the matrices' sizes. What
        is not defined, as after no change, is None.
    """
    changed = sum(one.num_changed for one in landings)
    both = sum(one.num_both for one in landings)
    numel = sum(one.numel for one in landings)
    expected = math.fsum(one.expected_both for one in landings)
    low, high = chance_interval(landings)
    return {
        "num_changed": changed,
        "num_both": both,
        "density": sum(one.num_set for one in landings) / numel if numel else None,
        "overlap": both / changed if changed else None,
        "expected_overlap": expected / changed if changed else None,
        "expected_low": low / changed if changed else None,
        "expected_high": high / changed if changed else None,
        "ratio": both / expected if expected else None,
    }


def skip_reason(name: str, shape: Sequence[int], dtype: torch.dtype) -> str | None:
    """Why a tensor has no principal weights; None when it has. Needs no weights, so that none are read in vain."""
    kind = matrix_kind(name)
    return f"it is {_LEFT_OUT[kind]}" if kind in _LEFT_OUT else matrix_measures.skip_reason(shape, dtype)


def reference_sets(base: Tensor, *, rank_share: float, density: float, seed: int) -> dict[str, Tensor] | Unmeasured:
    """The sets that changes are compared with.

    ``principal``: the ``density`` share with the largest ``|U_k S_k V_k^T|``, k = ``rank_share`` of the smaller side;
    ``low_magnitude``: the ``density`` share with the smallest ``|W|``; ``principal_not_low``: in the first and not
    in the second.

    Args:
        base: W, ``[m, n]``, any floating dtype.
        rank_share: in (0, 1].
        density: alpha, in (0, 1).
        seed: of the randomised decomposition of large matrices.

    Returns:
        bool ``[m, n]`` by name, or why there are none: weights that are NaN or infinite.
    """
    import torch

    from ssrctl.core.static_masks import NonFiniteWeights, low_magnitude_mask, principal_mask, rank_of
    from ssrctl.measures.maths.low_rank import rank_k_svd

    def leading(weight: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        found = rank_k_svd(weight, k, seed=seed)
        return found.U, found.S, found.V

    ordered = base if base.dtype in (torch.float32, torch.bfloat16, torch.float16) else base.float()
    try:
        low = low_magnitude_mask(ordered, density)
        principal = principal_mask(base, rank_of(rank_share, base.shape), density, leading)
    except NonFiniteWeights as error:
        return Unmeasured(str(error))
    return {"principal": principal, "low_magnitude": low, "principal_not_low": principal & ~low}


def measure_landing(
    base: Tensor, changed: Tensor, *, rank_share: float, density: float, seed: int = 0
) -> dict[str, Landings] | Unmeasured:
    """Where the changes of one matrix landed, for each of ``SETS``; the last in one part for each power of two.

    Args:
        base: ``[m, n]``, any floating dtype.
        changed: bool ``[m, n]``, True = changed.
        rank_share, density, seed: see ``reference_sets``.
    """
    sets = reference_sets(base, rank_share=rank_share, density=density, seed=seed)
    if isinstance(sets, Unmeasured):
        return sets
    found: dict[str, Landings] = {name: (land(changed, chosen),) for name, chosen in sets.items()}
    return found | {"principal_same_size": land_by_magnitude(base, changed, sets["principal"])}


def land_by_magnitude(base: Tensor, changed: Tensor, chosen: Tensor) -> Landings:
    """``land`` among the weights of each power of two, of which those without weights are left out."""
    counts = count_by_magnitude(base, changed, chosen, changed & chosen)
    return tuple(
        Landing(numel=numel, num_set=chosen_here, num_changed=changed_here, num_both=both)
        for numel, changed_here, chosen_here, both in counts.T.tolist()
    )


def measure_tensor(
    name: str, base: Tensor, changed: Tensor, *, rank_share: float, density: float, seed: int = 0
) -> dict[str, dict[str, Landings] | Unmeasured]:
    """``measure_landing`` of one tensor for which ``skip_reason`` is None, by name.

    A stack of experts ``[experts, m, n]`` counts as matrices ``name.0``, ``name.1``, ...; of more than
    ``matrix_measures.MAX_EXPERTS`` so many are taken, evenly spread from the first to the last.

    Args:
        name: of the tensor; random draws derive from it and from ``seed``.
        base: any floating dtype.
        changed: bool, the same shape.
        rank_share, density: see ``reference_sets``.
    """
    labelled = {name: (base, changed)}
    if base.dim() == 3:
        count = base.shape[0]
        taken = min(count, matrix_measures.MAX_EXPERTS)
        places = sorted({round(place * (count - 1) / max(1, taken - 1)) for place in range(taken)})
        labelled = {f"{name}.{place}": (base[place], changed[place]) for place in places}
    return {
        label: measure_landing(
            one, hit, rank_share=rank_share, density=density, seed=derive_seed(seed, "principal", label)
        )
        for label, (one, hit) in labelled.items()
    }


def example(
    name: str, base: Tensor, changed: Tensor, *, rank_share: float, density: float, seed: int = 0
) -> dict[str, Any] | None:
    """Small pictures of one matrix: where its changes and its principal weights lie (Zhu et al. 2025, figure 7).

    Args:
        name: of the matrix.
        base, changed: ``[m, n]``, not empty.
        rank_share, density: see ``reference_sets``; the seed is that of ``measure_tensor``.

    Returns:
        ``name``, and ``changed`` and ``principal`` as ``profiles.coarse_map``; None for weights that are NaN or infinite.
    """
    seed = derive_seed(seed, "principal", name)
    sets = reference_sets(base, rank_share=rank_share, density=density, seed=seed)
    if isinstance(sets, Unmeasured):
        return None
    return {"name": name, "changed": coarse_map(changed), "principal": coarse_map(sets["principal"])}


def landing_numbers(
    found: Mapping[str, Mapping[str, Landings] | Unmeasured],
    profiles: Mapping[str, Profile],
    *,
    rank_share: float,
    density: float,
    rule: str,
    examples: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The report's numbers: ``total``, ``layers``, ``kinds``, ``cells`` and ``tensors``.

    Each row holds ``num_changed`` and, under the name of each of ``SETS``, its ``summary``. ``profiles`` holds the same
    groups with the means over matrices of ``profiles.concentration``.

    Args:
        found: of each tensor, by name.
        profiles: of the changes of each matrix, by name.
        rank_share, density: the sets were made with.
        rule: what counts as changed, in words.
        examples: from ``example``.
    """
    measured = {name: one for name, one in found.items() if not isinstance(one, Unmeasured)}
    return {
        "rank_share": rank_share,
        "density": density,
        "rule": rule,
        "confidence": CONFIDENCE,
        "examples": [dict(one) for one in examples],
        **grouped(measured, _row),
        "unmeasured": [
            {"name": name, "reason": one.reason} for name, one in found.items() if isinstance(one, Unmeasured)
        ],
        "profiles": grouped({name: concentration(one) for name, one in profiles.items()}, mean_concentration),
    }


def _row(tensors: Sequence[Mapping[str, Landings]]) -> dict[str, Any]:
    rows = {name: summary([part for one in tensors for part in one[name]]) for name in SETS}
    return {"num_changed": rows[SETS[0]]["num_changed"], **rows}
