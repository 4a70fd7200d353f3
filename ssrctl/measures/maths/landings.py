"""Changed weights that lie in a set of a tensor's coordinates, and how many would by chance.

``ssrctl.measures.landing`` has the notation: M the changed weights of N, P the set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ssrctl.measures.maths.averages import ratio
from ssrctl.measures.maths.magnitude import count_by_magnitude

CONFIDENCE = 0.95
Landings = tuple["Landing", ...]


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
        return ratio(self.num_both, self.num_changed)

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
    """Count two sets of one tensor's coordinates and their intersection.

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


def land_by_magnitude(base: Tensor, changed: Tensor, chosen: Tensor) -> Landings:
    """Count as ``land`` does among the weights of each power of two; leave out those without weights."""
    counts = count_by_magnitude(base, changed, chosen, changed & chosen)
    return tuple(
        Landing(numel=numel, num_set=chosen_here, num_changed=changed_here, num_both=both)
        for numel, changed_here, chosen_here, both in counts.T.tolist()
    )


def chance_interval(landings: Sequence[Landing]) -> tuple[int, int]:
    """Return the interval of the total of ``|M n P|`` by chance: (low, high), both included, equal tails.

    Each matrix has its own random set, of as many coordinates as changed there. For a single matrix with changes the
    quantiles are those of the hypergeometric distribution; for several, whose counts add up, those of the normal
    distribution with the exact mean and variance, rounded outwards to whole counts within what is possible.

    Args:
        landings: of matrices that do not share coordinates; none gives (0, 0).
    """
    from scipy.stats import hypergeom, norm

    free = [one for one in landings if one.most_both > one.least_both]
    fixed = sum(one.least_both for one in landings if one.most_both == one.least_both)
    if not free:
        return fixed, fixed
    if len(free) == 1:
        only = free[0]
        low, high = hypergeom(only.numel, only.num_set, only.num_changed).interval(CONFIDENCE)
        return fixed + int(low), fixed + int(high)
    mean = math.fsum(one.expected_both for one in free)
    spread = float(norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt(math.fsum(one.variance_both for one in free))
    low = max(math.floor(mean - spread), sum(one.least_both for one in free))
    high = min(math.ceil(mean + spread), sum(one.most_both for one in free))
    return fixed + low, fixed + high


@dataclass(frozen=True, kw_only=True)
class SetLanding:
    """Landings on one kind of set, of one or several matrices weighted by their changed weights.

    What is not defined, as after no change, is None.

    Attributes:
        num_changed, num_both: as in ``Landing``.
        density: of the set, weighted by the matrices' sizes.
        overlap: share of the changed weights that are in the set.
        expected_overlap: the same by chance, with its interval from ``expected_low`` to ``expected_high``.
        ratio: overlap over expected.
    """

    num_changed: int
    num_both: int
    density: float | None
    overlap: float | None
    expected_overlap: float | None
    expected_low: float | None
    expected_high: float | None
    ratio: float | None


def summary(landings: Sequence[Landing]) -> SetLanding:
    """Add up one or several matrices, or parts of them, with one kind of set."""
    changed = sum(one.num_changed for one in landings)
    both = sum(one.num_both for one in landings)
    expected = math.fsum(one.expected_both for one in landings)
    low, high = chance_interval(landings)
    return SetLanding(
        num_changed=changed,
        num_both=both,
        density=ratio(sum(one.num_set for one in landings), sum(one.numel for one in landings)),
        overlap=ratio(both, changed),
        expected_overlap=ratio(expected, changed),
        expected_low=ratio(low, changed),
        expected_high=ratio(high, changed),
        ratio=ratio(both, expected),
    )
