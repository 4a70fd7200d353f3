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
from typing import TYPE_CHECKING, Literal

from ssrctl.checkpoints.names import KINDS, layer_index, matrix_kind
from ssrctl.measures.maths.change import DEFAULT_ATOL, DEFAULT_ETA, Change, add_up
from ssrctl.measures.maths.largest_changes import TopMovers
from ssrctl.measures.maths.piece_pair import PiecePair, common_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from ssrctl.checkpoints.reader import DeltaReader, TensorReader

__all__ = [
    "Change",
    "Rule",
    "add_up",
    "changed",
    "common_dtype",
    "compare_all",
    "compare_pieces",
    "compare_tensors",
    "group_changes",
]

Rule = Literal["bits", "atol", "bf16"]

# Elements compared at once: their float64 copies stay near the caches.
_CHUNK = 1 << 18
# Elements that one worker takes at a time: enough to be worth a task, and few enough that the embedding, far larger
# than any other tensor, is shared.
_RANGE = 1 << 23


def changed(base: Tensor, tuned: Tensor, rule: Rule, *, atol: float = DEFAULT_ATOL, eta: float = DEFAULT_ETA) -> Tensor:
    """Which weights changed, by one rule (see the top of this file); works on whole tensors and on pieces.

    Args:
        base: any shape, any real dtype.
        tuned: the same shape; two dtypes are compared in the one that holds both exactly.
        rule: ``bits``, ``atol`` or ``bf16``.
        atol: of ``atol``, 0 or more.
        eta: of ``bf16``, 0 or more.

    Returns:
        bool in the shape of ``base``, True = changed. NaN and infinite weights changed unless they are equal bit for
        bit (for ``bf16`` also infinities of one sign). Of tensors that hold no floating-point numbers ``bf16`` asks
        what ``bits`` asks.

    Raises:
        ValueError: different shapes, complex tensors, or another rule.
    """
    import torch

    if rule not in ("bits", "atol", "bf16"):
        raise ValueError(f"no rule {rule!r}: bits, atol or bf16")
    _check_pair(base, tuned)
    marks = []
    for a, b in _slices(base, tuned):
        pair = PiecePair(a, b)
        mark = torch.zeros(pair.numel, dtype=torch.bool)
        mark.numpy()[pair.where] = (
            True if rule == "bits" else ~(pair.within(atol) if rule == "atol" else pair.same_bf16(eta))
        )
        marks.append(mark)
    return torch.cat(marks).view(base.shape) if marks else torch.zeros(base.shape, dtype=torch.bool)


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
        _check_pair(ours, theirs)
        for a, b in _slices(ours, theirs):
            pair = PiecePair(a, b)
            parts += pair.changes(atol, eta)
            if movers is not None:
                movers.add(name, pair.before, pair.after, pair.where, start)
            start += a.numel()
    return add_up(parts)


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


def _check_pair(base: Tensor, tuned: Tensor) -> None:
    if base.shape != tuned.shape:
        raise ValueError(f"shapes differ: {list(base.shape)} and {list(tuned.shape)}")
    if base.is_complex() or tuned.is_complex():
        raise ValueError("complex tensors are not compared")


def _slices(base: Tensor, tuned: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(base.flatten().split(_CHUNK), tuned.flatten().split(_CHUNK), strict=True)


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
