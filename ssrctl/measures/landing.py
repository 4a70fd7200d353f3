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

from ssrctl.checkpoints.names import layer_index, matrix_kind
from ssrctl.core.seeds import derive_seed
from ssrctl.measures.base import Findings, PairMeasure, register
from ssrctl.measures.maths import matrices
from ssrctl.measures.maths.change_rule import change_rule
from ssrctl.measures.maths.grouping import grouped
from ssrctl.measures.maths.magnitude import count_by_magnitude, widened
from ssrctl.measures.maths.row_column_counts import Profile, coarse_map, concentration, mean_concentration, profile
from ssrctl.measures.maths.update_matrix import Unmeasured

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ssrctl.checkpoints.pairs import TensorPair

CONFIDENCE = 0.95
Landings = tuple["Landing", ...]
# The last is the first again, with another idea of chance: random weights of the same magnitudes as those that changed.
SETS = ("principal", "low_magnitude", "principal_not_low", "principal_same_size")
# Kinds of which a matrix is pictured, the first two that a model has.
PICTURED = ("q", "qkv", "gate", "up", "gate_up")
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
    return f"it is {_LEFT_OUT[kind]}" if kind in _LEFT_OUT else matrices.skip_reason(shape, dtype)


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


def measure_landing(base: Tensor, changed: Tensor, sets: Mapping[str, Tensor]) -> dict[str, Landings]:
    """Return where the changes of one matrix landed, for each of ``SETS``; the last in one part per power of two.

    Args:
        base: ``[m, n]``, any floating dtype.
        changed: bool ``[m, n]``, True = changed.
        sets: from ``reference_sets``.
    """
    found: dict[str, Landings] = {name: (land(changed, chosen),) for name, chosen in sets.items()}
    return found | {"principal_same_size": land_by_magnitude(base, changed, sets["principal"])}


def land_by_magnitude(base: Tensor, changed: Tensor, chosen: Tensor) -> Landings:
    """``land`` among the weights of each power of two, of which those without weights are left out."""
    counts = count_by_magnitude(base, changed, chosen, changed & chosen)
    return tuple(
        Landing(numel=numel, num_set=chosen_here, num_changed=changed_here, num_both=both)
        for numel, changed_here, chosen_here, both in counts.T.tolist()
    )


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


@dataclass(frozen=True)
class LandingPart:
    """What is kept of one tensor.

    Attributes:
        landings: by matrix label, for each of ``SETS``, or the reason why there is none.
        profile: changed weights by row and by column; None for a stack of matrices.
        picture: coarse maps of the changes and of the principal weights; None where none is shown.
    """

    landings: dict[str, dict[str, Landings] | Unmeasured]
    profile: Profile | None = None
    picture: dict[str, Any] | None = None


@register
class LandingMeasure(PairMeasure[LandingPart, dict[str, Any]]):
    """Where the changed weights of each matrix landed."""

    name = "landing"

    def tensor(self, pair: TensorPair) -> LandingPart | None:
        """Return the landings of a tensor's matrices; None for a tensor without principal weights."""
        dtype = self.comparison.base.dtypes[pair.name]
        if skip_reason(pair.name, pair.shape, dtype) is not None:
            return None
        if not bool(change_rule(self.config, "bits")[0](pair.base, pair.tuned).any()):
            return LandingPart({pair.name: Unmeasured("nothing in it changed")})
        differs, _ = change_rule(self.config)
        changed, base = differs(pair.base, pair.tuned), widened(pair.base)
        landings: dict[str, dict[str, Landings] | Unmeasured] = {}
        picture = None
        for label, (one, hit) in matrices.stacked(pair.name, base, changed):
            sets = reference_sets(
                one,
                rank_share=self.config.principal_rank,
                density=self.config.mask_density,
                seed=derive_seed(self.config.seed, "principal", label),
            )
            landings[label] = sets if isinstance(sets, Unmeasured) else measure_landing(one, hit, sets)
            if not isinstance(sets, Unmeasured) and base.dim() == 2 and matrix_kind(pair.name) in PICTURED:
                picture = {"name": label, "changed": coarse_map(hit), "principal": coarse_map(sets["principal"])}
        return LandingPart(landings, profile(changed) if changed.dim() == 2 else None, picture)

    def combine(self, parts: Mapping[str, list[LandingPart]]) -> dict[str, Any]:
        """Return the landings by layer, kind and tensor; empty when no tensor has principal weights."""
        found = {name: one for name, (one,) in parts.items()}
        landed = {label: landing for one in found.values() for label, landing in one.landings.items()}
        if not landed:
            return {}
        numbers = landing_numbers(
            landed,
            {name: one.profile for name, one in found.items() if one.profile is not None},
            rank_share=self.config.principal_rank,
            density=self.config.mask_density,
            rule=change_rule(self.config)[1],
            examples=_middle_pictures({name: one.picture for name, one in found.items() if one.profile is not None}),
        )
        return {"landing": numbers}

    def present(self, result: dict[str, Any]) -> Findings:
        """Return sentences, figures and tables of landings."""
        from ssrctl.measures.landing_report import headlines, landing_section

        if not result:
            return Findings()
        found = result["landing"]
        return Findings(numbers=result, headlines=headlines(found), sections=[landing_section(found)])


def _middle_pictures(pictures: Mapping[str, dict[str, Any] | None]) -> list[dict[str, Any]]:
    """Return the pictures of a query and a gate matrix of the middle layer of those where something changed."""
    layers = sorted({layer for name in pictures if (layer := layer_index(name)) is not None})
    if not layers:
        return []
    middle = layers[len(layers) // 2]
    kinds = {matrix_kind(name): name for name in pictures if layer_index(name) == middle}
    chosen = [kinds[kind] for kind in PICTURED if kind in kinds][:2]
    return [picture for name in sorted(chosen, key=list(pictures).index) if (picture := pictures[name]) is not None]
