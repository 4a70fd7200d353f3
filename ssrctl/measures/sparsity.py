"""How sparse is the update between two checkpoints?

Three rules say when a weight is unchanged, and they are counted side by side in one pass:

- ``atol``: ``|tuned - base| <= atol`` for a fixed tolerance, 1e-5 in Mukherjee et al. 2025 (arXiv:2505.11711);
- ``bf16``: ``|tuned - base| <= eta max(|base|, |tuned|)`` of the values rounded to bfloat16, eta 1e-3 (Zhu et al.
  2025, arXiv:2511.08567, def. 2.1), which for finite bfloat16 weights is equality (their corollary E.4);
- ``bits``: equality bit for bit, 0 and -0 apart.

A fixed tolerance calls float32 weights changed that are the same in bfloat16 where weights are large, and hides real
changes where they are small (Zhu et al. 2025, app. E.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ssrctl.checkpoints.names import KINDS, layer_index, matrix_kind
from ssrctl.checkpoints.pairs import RANGE, TensorPair
from ssrctl.measures.base import Findings, PairMeasure, register
from ssrctl.measures.maths.change import DEFAULT_ATOL, DEFAULT_ETA, FIXED_TOLERANCES, Change, add_up, tolerance_key
from ssrctl.measures.maths.change_rule import check_pair, slices
from ssrctl.measures.maths.largest_changes import TopMovers
from ssrctl.measures.maths.piece_pair import PiecePair
from ssrctl.report.document import Section

if TYPE_CHECKING:
    from torch import Tensor

    from ssrctl.checkpoints.reader import DeltaReader, TensorReader
    from ssrctl.configs import DiagnoseConfig
    from ssrctl.measures.base import Mode

__all__ = [
    "Change",
    "add_up",
    "compare_all",
    "compare_pieces",
    "compare_tensors",
    "group_changes",
]

# Elements that one worker takes at a time: enough to be worth a task, and few enough that the embedding, far larger
# than any other tensor, is shared.
_RANGE = 1 << 23


def compare_tensors(base: Tensor, tuned: Tensor, atol: float = DEFAULT_ATOL, eta: float = DEFAULT_ETA) -> Change:
    """Compare two tensors of one shape, of any real dtypes, in the wider of the two, in float64.

    Args:
        base: any shape, any real dtype, on the CPU.
        tuned: the same shape.
        atol: fixed tolerance of ``num_within``, 0 or more.
        eta: relative tolerance of ``num_same_bf16``, 0 or more.

    Raises:
        ValueError: different shapes, or complex tensors.
    """
    return compare_pieces([base], [tuned], atol=atol, eta=eta)


def compare_pieces(
    base: Iterable[Tensor],
    tuned: Iterable[Tensor],
    *,
    atol: float = DEFAULT_ATOL,
    eta: float = DEFAULT_ETA,
    movers: TopMovers | None = None,
    name: str = "",
    start: int = 0,
) -> Change:
    """Compare a tensor that comes in pieces, so that it is never whole in memory.

    Args:
        base, tuned: pieces in order, those of ``tuned`` cut as those of ``base`` are.
        atol, eta: as in ``compare_tensors``.
        movers: takes note of the weights that moved furthest.
        name: of the tensor, for ``movers``.
        start: flat index of the first element, for ``movers``.

    Raises:
        ValueError: pieces of different shapes, more of them on one side, or complex numbers.
    """
    parts = []
    for ours, theirs in zip(base, tuned, strict=True):
        parts += _piece_changes(ours, theirs, atol, eta, movers, name, start)
        start += ours.numel()
    return add_up(parts)


def _piece_changes(
    base: Tensor, tuned: Tensor, atol: float, eta: float, movers: TopMovers | None, name: str, start: int
) -> list[Change]:
    check_pair(base, tuned)
    parts: list[Change] = []
    for a, b in slices(base, tuned):
        pair = PiecePair(a, b)
        parts += pair.changes(atol, eta)
        if movers is not None:
            movers.add(name, pair.before, pair.after, pair.where, start)
        start += a.numel()
    return parts


def compare_all(
    base: TensorReader,
    tuned: TensorReader | DeltaReader,
    names: Collection[str],
    *,
    atol: float = DEFAULT_ATOL,
    eta: float = DEFAULT_ETA,
    num_workers: int = 2,
    movers: TopMovers | None = None,
    on_done: Callable[[str], None] | None = None,
) -> dict[str, Change]:
    """Compare two open checkpoints, reading a few megabytes of each at a time; the result does not depend on threads.

    Args:
        base: the base, names aligned (``matching_names``).
        tuned: the tuned checkpoint; for a delta, the base is taken as its run loaded it.
        names: tensors of both, of the same shapes.
        atol, eta: as in ``compare_tensors``.
        num_workers: threads that read and compare at once, at least 1; each uses one core.
        movers: takes note of the weights that moved furthest.
        on_done: called with a tensor's name when it was compared, in the order in which they lie on disk.

    Returns:
        By name, in the order of ``names``.

    Raises:
        UserError: a file that changes or cannot be read.
    """
    import torch

    from ssrctl.checkpoints.reader import DeltaReader

    def both(name: str, first: int) -> tuple[Iterator[Tensor], Iterator[Tensor]]:
        last = first + _RANGE
        if isinstance(tuned, DeltaReader):
            return tuned.base_pieces(name, first, last), tuned.pieces(name, first, last)
        return base.pieces(name, first, last, reuse=True), tuned.pieces(name, first, last, reuse=True)

    order = base.in_file_order(names)
    numels = {name: math.prod(base.shapes[name]) for name in order}
    ranges = [(name, first) for name in order for first in range(0, numels[name] or 1, _RANGE)]

    def compare(task: tuple[str, int]) -> tuple[Change, TopMovers | None]:
        name, first = task
        found = None if movers is None else TopMovers(movers.count)
        return compare_pieces(*both(name, first), atol=atol, eta=eta, movers=found, name=name, start=first), found

    changes = dict.fromkeys(names, Change())
    # A team of torch threads inside of every worker would be more threads than cores.
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for (name, first), (change, found) in zip(ranges, pool.map(compare, ranges), strict=True):
                changes[name] += change
                if movers is not None and found is not None:
                    movers.merge(found)
                if on_done is not None and first + _RANGE >= numels[name]:
                    on_done(name)
    finally:
        torch.set_num_threads(threads)
    return changes


def group_changes(changes: Mapping[str, Change]) -> tuple[dict[int | None, Change], dict[str, Change]]:
    """(by layer, by kind), each in order; layer None holds what is outside of the layers and comes last."""
    layers: dict[int | None, Change] = {}
    kinds: dict[str, Change] = {}
    for name, change in changes.items():
        layer, kind = layer_index(name), matrix_kind(name)
        layers[layer] = layers.get(layer, Change()) + change
        kinds[kind] = kinds.get(kind, Change()) + change
    by_layer = dict(sorted(layers.items(), key=lambda item: (item[0] is None, item[0] or 0)))
    return by_layer, {kind: kinds[kind] for kind in KINDS if kind in kinds}


@register
class Sparsity(PairMeasure[tuple[list[Change], TopMovers], dict[str, Any]]):
    """Which weights changed, by every rule, and how far they moved; always counted, shown where it is wanted."""

    name = "sparsity"
    also = ("size",)
    default_in = frozenset({"pair", "several", "series", "run"})
    in_ranges = True

    @classmethod
    def wanted(cls, config: DiagnoseConfig, mode: Mode) -> bool:
        """Return True: other parts of a report need the counts."""
        return True

    def tensor(self, pair: TensorPair) -> tuple[list[Change], TopMovers]:
        """Return the change of each range of elements, and the largest ones."""
        movers, ranges = TopMovers(), dict[int, list[Change]]()
        for start, base, tuned in pair.pieces():
            found = _piece_changes(base, tuned, self.config.atol, self.config.bf16_rtol, movers, pair.name, start)
            ranges.setdefault(start // RANGE, []).extend(found)
        return [add_up(parts) for parts in ranges.values()], movers

    def combine(self, parts: Mapping[str, list[tuple[list[Change], TopMovers]]]) -> dict[str, Any]:
        """Return the numbers by rule, kind, layer and tensor."""
        from ssrctl.measures.sparsity_report import sparsity_numbers

        movers, changes = TopMovers(), dict[str, Change]()
        for name, ranges in parts.items():
            changes[name] = Change()
            for found, largest in ranges:
                for change in found:
                    changes[name] += change
                movers.merge(largest)
        return sparsity_numbers(changes, movers, self.comparison.base.shapes)

    def present(self, result: dict[str, Any]) -> Findings:
        """Return what the settings ask for: everything, the size of the change only, or nothing but numbers."""
        from ssrctl.measures.sparsity_report import headlines, nonfinite_note, size_section, sparsity_sections

        total, atol = result["total"], self.config.atol
        odd = nonfinite_note(total)
        notes = [] if odd is None else [odd]
        if self.config.wants("sparsity", default=True):
            published = {
                f"sparsity_{one:.0e}".replace("e-0", "e-"): total[tolerance_key(one)] for one in FIXED_TOLERANCES
            }
            return Findings(
                numbers=result,
                headlines=headlines(result, atol),
                notes=notes,
                sections=sparsity_sections(result, atol),
                published=published | {"sparsity_bf16": total["sparsity_bf16"]},
            )
        sections = [size_section(result)] if self.config.wants("size", default=True) else []
        return Findings(numbers=result, notes=notes, sections=sections)

    def side_by_side(self, results: Mapping[str, dict[str, Any]]) -> list[Section]:
        """Return the checkpoints' sparsity in one table."""
        from ssrctl.measures.sparsity_report import side_by_side_table

        totals = {label: result["total"] for label, result in results.items()}
        return [Section(title="The checkpoints side by side", tables=[side_by_side_table(totals, self.config.atol)])]
