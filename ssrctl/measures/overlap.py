"""Do several runs from one base change the same weights?

Notation: A_i the set of weights that run i changed, p_i its density in one tensor of N weights.

* one-sided overlap ``o = |A_i n A_j| / |A_i|`` (Mukherjee et al. 2025, arXiv:2505.11711, section 5; their o1 and o2
  are rows and columns of one matrix);
* Jaccard index ``|A_i n A_j| / |A_i u A_j|`` (Zhu et al. 2025, arXiv:2511.08567, section 2.2);
* consensus: how many of the runs changed a weight (Zhu et al., section 2.2, figure 2: C = that number over runs).

Chance is independence within each tensor: ``E|A_i n A_j| = N p_i p_j``, which gives the Jaccard index
``p q / (p + q - p q)`` (Zhu et al., section 2.2), and one-sided overlaps equal to the other set's density (Mukherjee
et al., appendix E). Over several tensors expectations are added up before any division: runs that change the same
tensors overlap more than the model's density says, and that is not yet agreement on weights. Nor is it if both move
small weights, whose stored values move more easily: hence a second expectation among weights of equal magnitude.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from ssrctl.checkpoints.names import layer_index
from ssrctl.measures.base import Findings, JointMeasure, TensorSeries, register
from ssrctl.measures.maths.change_rule import change_rule
from ssrctl.measures.maths.grouping import grouped
from ssrctl.measures.maths.magnitude import count_by_magnitude, widened
from ssrctl.measures.maths.row_column_counts import Profile, agreement, coarse_map, mean, profile

if TYPE_CHECKING:
    from torch import Tensor

    from ssrctl.core.mask import TileSet

Matrix = list[list[float | None]]

# Tiles compared at once: 1 MiB for each run.
_TILES = 1 << 15


@dataclass(frozen=True, kw_only=True)
class RunOverlap:
    """How the changed sets of R runs meet in one tensor.

    Attributes:
        numel: N.
        shared: ``[R][R]``, ``|A_i n A_j|``; the diagonal holds the sizes.
        depth: ``[R + 1]``, how many weights exactly r runs changed, r from 0.
        by_magnitude: for each power of two of the base's magnitudes, the weights and then ``|A_i|`` of each run there;
            empty when it was not counted.
        row_agreement, column_agreement: mean over pairs of runs of the rank correlation of their profiles
            (``profiles.agreement``); None where there is none.
    """

    numel: int
    shared: tuple[tuple[int, ...], ...]
    depth: tuple[int, ...]
    by_magnitude: tuple[tuple[int, ...], ...] = ()
    row_agreement: float | None = None
    column_agreement: float | None = None

    @property
    def num_runs(self) -> int:
        return len(self.shared)

    @property
    def sizes(self) -> list[int]:
        """``|A_i|`` of each run."""
        return [self.shared[i][i] for i in range(self.num_runs)]

    @property
    def densities(self) -> list[float]:
        """``|A_i| / N`` of each run; 0 in an empty tensor."""
        return [size / self.numel if self.numel else 0.0 for size in self.sizes]


def run_overlap(
    sets: Sequence[TileSet], profiles: Sequence[Profile | None] = (), by_magnitude: Tensor | None = None
) -> RunOverlap:
    """Count how the changed sets of one tensor meet, without unpacking them.

    Args:
        sets: one for each run, at least one, over the same tensor.
        profiles: of the same sets, made before they were packed (``profiles.profile``), to be compared as well.
        by_magnitude: ``magnitude.count_by_magnitude`` of the base with the same sets, for chance at equal magnitude.

    Raises:
        ValueError: no sets, or sets over different shapes.
    """
    import torch

    from ssrctl.core.popcount import popcount

    if not sets or any(one.shape != sets[0].shape for one in sets):
        raise ValueError(f"one tensor's sets are needed, got shapes {[list(one.shape) for one in sets]}")
    num_runs = len(sets)
    shared = [[0] * num_runs for _ in sets]
    depth = torch.zeros(num_runs + 1, dtype=torch.int64)
    for words in _aligned_words(sets):
        for i in range(num_runs):
            for j in range(i, num_runs):
                shared[i][j] += int(popcount(words[i] & words[j]).sum())
        for runs, chosen in enumerate(_exactly(words)):
            depth[runs] += popcount(chosen).sum()
    # What is in no tile at all, or in a tile's padding, was not counted as a coordinate that no run changed.
    depth[0] = sets[0].numel - int(depth[1:].sum())
    agreed = agreement([one for one in profiles if one is not None])
    return RunOverlap(
        numel=sets[0].numel,
        shared=tuple(tuple(shared[min(i, j)][max(i, j)] for j in range(num_runs)) for i in range(num_runs)),
        depth=tuple(depth.tolist()),
        by_magnitude=() if by_magnitude is None else tuple(map(tuple, by_magnitude.T.tolist())),
        row_agreement=agreed["rows"],
        column_agreement=agreed["columns"],
    )


def _aligned_words(sets: Sequence[TileSet]) -> Iterator[Tensor]:
    """int64 ``[runs, words]``: the same tiles of every run, strip by strip; tiles that no run has are left out."""
    import torch

    rows, columns = sets[0].grid
    for start in range(0, rows * columns, _TILES):
        edges = torch.tensor([start, start + _TILES])
        cuts = [torch.searchsorted(one.tile_ids, edges).tolist() for one in sets]
        ids = torch.cat([one.tile_ids[first:last] for one, (first, last) in zip(sets, cuts, strict=True)]).unique()
        if not ids.numel():
            continue
        strip = torch.zeros(len(sets), ids.numel(), sets[0].tiles.shape[1], dtype=torch.uint8)
        for run, (one, (first, last)) in enumerate(zip(sets, cuts, strict=True)):
            strip[run, torch.searchsorted(ids, one.tile_ids[first:last])] = one.tiles[first:last]
        yield strip.view(torch.int64).flatten(1)


def _exactly(words: Tensor) -> list[Tensor]:
    """For r = 0, 1, ... runs: the bits that are set in exactly r rows of int64 ``[runs, words]``.

    Rows are taken in one after another: what was in exactly r of those before is in r + 1 or stays in r.
    """
    import torch

    found = [torch.full_like(words[0], -1)]
    for row in words:
        taken = [one & row for one in found]
        found = [a & ~row for a in found] + [torch.zeros_like(row)]
        for runs, moved in enumerate(taken):
            found[runs + 1] |= moved
    return found


# --------------------------------------------------------------------------------------------------
# measured and expected, of one or several tensors


def matrices(tensors: Sequence[RunOverlap]) -> dict[str, Matrix]:
    """Overlaps of every pair of runs over some tensors; row i, column j.

    Returns:
        ``one_sided``: ``|A_i n A_j| / |A_i|``, None for an empty A_i; ``expected_one_sided`` the same by chance within
        each tensor; ``jaccard``, None when both are empty, and ``expected_jaccard``. ``..._same_size``: by chance among
        weights of one tensor and of equal magnitude, None where that was not counted. Diagonals are 1 where A_i is
        not empty, expected ones too.
    """
    num_runs = tensors[0].num_runs if tensors else 0
    runs = range(num_runs)
    sizes = [sum(one.sizes[i] for one in tensors) for i in runs]
    counts: dict[str, Matrix] = {
        "": [[sum(one.shared[i][j] for one in tensors) for j in runs] for i in runs],
        "expected_": [[expected_shared(tensors, i, j) for j in runs] for i in runs],
        "same_size": [[expected_shared_same_size(tensors, i, j) for j in runs] for i in runs],
    }
    found: dict[str, Matrix] = {}
    for chance, shared in counts.items():
        for i in runs:
            shared[i][i] = sizes[i]
        prefix, suffix = ("expected_", "_same_size") if chance == "same_size" else (chance, "")
        found[f"{prefix}one_sided{suffix}"] = [[_ratio(shared[i][j], sizes[i]) for j in runs] for i in runs]
        found[f"{prefix}jaccard{suffix}"] = [[_jaccard(sizes[i], sizes[j], shared[i][j]) for j in runs] for i in runs]
    return found


def expected_shared(tensors: Sequence[RunOverlap], i: int, j: int) -> float:
    """``E|A_i n A_j|`` of independent sets of the same sizes in each tensor: the sum of ``N p_i p_j``, i != j."""
    return math.fsum(one.sizes[i] * one.sizes[j] / one.numel for one in tensors if one.numel)


def expected_shared_same_size(tensors: Sequence[RunOverlap], i: int, j: int) -> float | None:
    """The same of sets that have as many weights of each magnitude as A_i and A_j; None where that was not counted.

    Runs that move small weights because those have small steps overlap so much without any other agreement.
    """
    if any(one.numel and not one.by_magnitude for one in tensors):
        return None
    return math.fsum(part[1 + i] * part[1 + j] / part[0] for one in tensors for part in one.by_magnitude)


def bernoulli_jaccard(p: float, q: float) -> float | None:
    """``p q / (p + q - p q)``, the Jaccard index of independent sets of densities p and q (Zhu et al., sec. 2.2).

    A ratio of expectations. None when both are 0.
    """
    return _ratio(p * q, p + q - p * q)


def consensus(tensors: Sequence[RunOverlap]) -> list[dict[str, float | int | None]]:
    """For r = 1 ... R: weights that at least r of the R runs changed, beside independence within each tensor.

    By chance the number of runs that change a weight is Poisson-binomial with the tensor's densities.

    Returns:
        ``runs``: r; ``count``; ``frac`` of all weights; ``frac_of_ever``, of those that any run changed;
        ``expected_frac`` and ``expected_frac_of_ever`` by chance (ratios of expectations).
    """
    num_runs = tensors[0].num_runs if tensors else 0
    numel = sum(one.numel for one in tensors)
    counts = [sum(sum(one.depth[runs:]) for one in tensors) for runs in range(num_runs + 1)]
    chances = [at_least(one.densities) for one in tensors]
    expected = [
        math.fsum(one.numel * chance[runs] for one, chance in zip(tensors, chances, strict=True))
        for runs in range(num_runs + 1)
    ]
    return [
        {
            "runs": runs,
            "count": counts[runs],
            "frac": _ratio(counts[runs], numel),
            "expected_frac": _ratio(expected[runs], numel),
            "frac_of_ever": _ratio(counts[runs], counts[1]),
            "expected_frac_of_ever": _ratio(expected[runs], expected[1]),
        }
        for runs in range(1, num_runs + 1)
    ]


def at_least(densities: Sequence[float]) -> list[float]:
    """For r = 0 ... R: the chance that at least r of R independent events happen (Poisson-binomial)."""
    exactly = [1.0]
    for p in densities:
        exactly = [a * (1 - p) + b * p for a, b in zip([*exactly, 0.0], [0.0, *exactly], strict=True)]
    return [math.fsum(exactly[runs:]) for runs in range(len(exactly))]


def consensus_example(name: str, changed: Sequence[Tensor]) -> dict[str, Any]:
    """A small picture of the consensus ratio of one matrix (Zhu et al. 2025, section 2.2 and figure 2).

    Args:
        name: of the matrix.
        changed: bool ``[m, n]``, not empty, of each of up to 255 runs.

    Returns:
        ``name``, and ``consensus`` as ``profiles.coarse_map``: the mean over a block of the share of runs that changed
        a weight.
    """
    import torch

    times = torch.zeros(changed[0].shape, dtype=torch.uint8)
    for one in changed:
        times += one
    picture = coarse_map(times)
    shares = [[value / len(changed) for value in row] for row in picture["shares"]]
    return {"name": name, "consensus": picture | {"shares": shares}}


def run_overlap_numbers(
    found: Mapping[str, RunOverlap], runs: Sequence[str], rule: str, examples: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """The report's numbers.

    Args:
        found: of each tensor, by name.
        runs: names of the runs, two or more, in the order of the sets.
        rule: what counts as changed, in words.
        examples: from ``consensus_example``.

    Returns:
        ``runs``, ``rule``; ``matrices`` and ``consensus`` of the whole model; ``whole_model``, the one-sided overlaps and
        Jaccard indices to be expected if the whole model were one tensor; ``total``, ``layers``, ``kinds``, ``cells``
        and ``tensors``, each with means over the pairs of runs.

    Raises:
        ValueError: another number of runs than of sets.
    """
    tensors = list(found.values())
    if any(one.num_runs != len(runs) for one in tensors):
        raise ValueError(f"{len(runs)} names of runs, but {tensors[0].num_runs} sets")
    return {
        "runs": list(runs),
        "rule": rule,
        "matrices": matrices(tensors),
        "whole_model": _as_one_tensor(tensors),
        "consensus": consensus(tensors),
        "examples": [dict(one) for one in examples],
        **grouped(found, pair_means),
    }


def pair_means(tensors: Sequence[RunOverlap]) -> dict[str, Any]:
    """Some tensors in a few numbers: sizes, means over pairs i != j, and what all runs agree on.

    Returns:
        ``numel``; ``num_changed`` of each run; ``one_sided`` (both directions), ``jaccard``, each with
        ``expected_...`` and ``expected_..._same_size`` over the same pairs; ``all_runs_of_ever``, share of ever changed weights that all runs
        changed, and ``expected_all_runs_of_ever``; ``row_agreement`` and ``column_agreement``, means over tensors.
    """
    found = matrices(tensors)
    steps = consensus(tensors)
    num_runs = len(steps)
    pairs = list(combinations(range(num_runs), 2))
    both_ways = pairs + [(j, i) for i, j in pairs]
    return {
        "numel": sum(one.numel for one in tensors),
        "num_changed": [sum(one.sizes[i] for one in tensors) for i in range(num_runs)],
        "one_sided": _mean_of(found["one_sided"], both_ways),
        "expected_one_sided": _mean_of(found["expected_one_sided"], both_ways),
        "expected_one_sided_same_size": _mean_of(found["expected_one_sided_same_size"], both_ways),
        "jaccard": _mean_of(found["jaccard"], pairs),
        "expected_jaccard": _mean_of(found["expected_jaccard"], pairs),
        "expected_jaccard_same_size": _mean_of(found["expected_jaccard_same_size"], pairs),
        "all_runs_of_ever": steps[-1]["frac_of_ever"] if steps else None,
        "expected_all_runs_of_ever": steps[-1]["expected_frac_of_ever"] if steps else None,
        "row_agreement": mean([one.row_agreement for one in tensors]),
        "column_agreement": mean([one.column_agreement for one in tensors]),
    }


def _as_one_tensor(tensors: Sequence[RunOverlap]) -> dict[str, Matrix]:
    """What chance gives when it may place changes anywhere in the model (Mukherjee et al., appendix E)."""
    num_runs = tensors[0].num_runs if tensors else 0
    numel = sum(one.numel for one in tensors)
    sizes = [sum(one.sizes[i] for one in tensors) for i in range(num_runs)]
    density = [size / numel if numel else 0.0 for size in sizes]
    runs = range(num_runs)
    return {
        "expected_one_sided": [
            [_ratio(sizes[i], sizes[i]) if i == j else density[j] if sizes[i] else None for j in runs] for i in runs
        ],
        "expected_jaccard": [
            [_ratio(sizes[i], sizes[i]) if i == j else bernoulli_jaccard(density[i], density[j]) for j in runs]
            for i in runs
        ],
    }


def _mean_of(matrix: Matrix, pairs: Sequence[tuple[int, int]]) -> float | None:
    return mean([matrix[i][j] for i, j in pairs])


def _jaccard(a: int, b: int, shared: float | None) -> float | None:
    return None if shared is None else _ratio(shared, a + b - shared)


def _ratio(part: float | None, whole: float) -> float | None:
    return None if part is None or not whole else part / whole


@register
class Overlap(JointMeasure[tuple[RunOverlap, "dict[str, Any] | None"], dict[str, Any]]):
    """How the changed sets of several checkpoints meet."""

    name = "overlap"
    default_in = frozenset({"several"})
    possible_in = frozenset({"several"})
    needs = "two or more checkpoints of one base, not in a series"

    def tensor(self, pairs: TensorSeries) -> tuple[RunOverlap, dict[str, Any] | None]:
        """Return the counts of one tensor, and a picture of the consensus where one is shown."""
        from ssrctl.core.mask import TileSet

        differs, _ = change_rule(self.config)
        changed = [differs(pair.base, pair.tuned) for pair in pairs]
        base = pairs.last.base if not pairs.last.checkpoint.is_delta else self.comparison.base.tensor(pairs.name)
        found = run_overlap(
            [TileSet.from_dense(one) for one in changed],
            [profile(one) if one.dim() == 2 else None for one in changed],
            count_by_magnitude(widened(base), *changed) if base.dtype.is_floating_point else None,
        )
        return found, consensus_example(pairs.name, changed) if pairs.name == self._pictured else None

    @functools.cached_property
    def _pictured(self) -> str | None:
        """The first matrix of the middle layer."""
        shapes = self.comparison.base.shapes
        layers = {name: layer_index(name) for name in self.comparison.names if len(shapes[name]) == 2}
        numbers = sorted({layer for layer in layers.values() if layer is not None})
        return next((name for name, layer in layers.items() if numbers and layer == numbers[len(numbers) // 2]), None)

    def combine(self, parts: Mapping[str, list[tuple[RunOverlap, dict[str, Any] | None]]]) -> dict[str, Any]:
        """Return the overlaps by pair of runs, layer, kind and tensor."""
        found = {name: one for name, ((one, _),) in parts.items()}
        pictures = [picture for ((_, picture),) in parts.values() if picture is not None]
        labels = [checkpoint.label for checkpoint in self.comparison.tuned]
        return run_overlap_numbers(found, labels, change_rule(self.config)[1], pictures)

    def present(self, result: dict[str, Any]) -> Findings:
        """Return sentences, figures and tables of overlaps."""
        from ssrctl.measures.overlap_report import headlines, run_overlap_section

        total = result["total"]
        return Findings(
            numbers={"overlap": result},
            headlines=headlines(result),
            sections=[run_overlap_section(result, published=self.config.changed_by == "bf16")],
            published={"run_overlap": total["one_sided"], "run_jaccard": total["jaccard"]},
        )
