"""The weights that training changed, as a mask over the parameters of the model that it began from."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from ssrctl.checkpoints.fingerprint import RunningFingerprint
from ssrctl.checkpoints.parameter_names import matching_names, paired_pieces
from ssrctl.checkpoints.reader import TensorReader, check_weights
from ssrctl.errors import UserError
from ssrctl.masks.static_masks import Names
from ssrctl.models.stored_parameters import StoredParameters

if TYPE_CHECKING:
    from torch import Tensor

    from ssrctl.checkpoints.delta import DeltaFile
    from ssrctl.core.mask import BlockMask

Rule = Callable[["Tensor", "Tensor"], "Tensor"]  # flat pieces before and after -> bool, True = changed


def check_pair(base: StoredParameters, tuned: TensorReader, *, strict: bool = False) -> tuple[list[str], list[str]]:
    """Return (the parameters of ``base`` that ``tuned`` has as well, notes on the others); aligns its names.

    Raises:
        UserError: too little in common (``matching_names``), or ``strict`` and a parameter that is not.
    """
    tuned.align(base.names)
    shared, notes = matching_names(base.reader, tuned, strict=strict)
    names = [name for name in base.names if name in set(shared)]
    missing = [name for name in base.names if name not in tuned.shapes]
    if strict and missing:
        raise UserError(
            f"{tuned.label} lacks {len(missing)} of the parameters of {base.reader.label}, first {missing[0]}",
            "compare checkpoints of one model",
        )
    return names, notes


def changed_in_pair(
    base: StoredParameters, tuned: TensorReader, names: Collection[str], rule: Rule, one_by_one: Names
) -> tuple[BlockMask, str, str]:
    """Return (mask of the changes, fingerprint before, after) of two checkpoints that ``check_pair`` accepted.

    The mask is over all parameters of ``base``; those outside of ``names`` count as unchanged, and so do rows that only
    ``base`` has. The fingerprint after is that of ``base`` with what changed in ``names``, of these parameters only.

    Args:
        base: the parameters before, as training loads them.
        tuned: the checkpoint after, as stored.
        names: the parameters to compare.
        rule: compares values before and after; True = changed.
        one_by_one: follows the progress.
    """
    import torch

    from ssrctl.core.mask import BlockMask, TileSet

    before, after = RunningFingerprint(), RunningFingerprint()
    tensors = {}
    for name in one_by_one(base.reader.in_file_order(base.names)):
        shape, start = base.shapes[name], 0
        before.begin(name, base.dtype_of(name), shape)
        changed = torch.zeros(math.prod(shape), dtype=torch.bool)
        if name not in names:
            for ours in base.pieces(name):
                before.update(ours)
            tensors[name] = TileSet.empty(shape)
            continue
        after.begin(name, tuned.dtypes[name], shape)
        for ours, theirs in paired_pieces(base.pieces(name), tuned.pieces(name)):
            before.update(ours)
            after.update(theirs)
            changed[start : start + ours.numel()] = rule(ours, theirs)
            start += ours.numel()
        tensors[name] = TileSet.from_dense(changed.view(shape))
    return BlockMask({name: tensors[name] for name in base.names}), before.digest(), after.digest()


def changed_by_delta(base: TensorReader, delta: DeltaFile, path: Path, rule: Rule, one_by_one: Names) -> BlockMask:
    """Return the mask of a delta's changes; only the coordinates that it lists are compared, all others are equal.

    Args:
        base: open, its shapes checked against the delta's.
        delta: the changes.
        path: its file, for messages.
        rule: compares values before and after; True = changed.
        one_by_one: follows the progress.

    Raises:
        UserError: a delta of other weights, or a damaged one.
    """
    import torch

    from ssrctl.core.mask import BlockMask, TileSet

    load_dtype = check_weights(path, delta.base, delta.shapes, base)
    tensors = {name: TileSet.empty(shape) for name, shape in sorted(delta.shapes.items())}
    for name in one_by_one(sorted(delta.counts)):
        weight = base.tensor(name).flatten()
        changed = torch.zeros(weight.numel(), dtype=torch.bool)
        for indices, coded in delta.blocks(name):
            ours = weight[indices] if load_dtype is None else weight[indices].to(load_dtype)
            values = delta.values(name, coded, ours)
            changed[indices] = rule(ours.to(values.dtype), values)
        tensors[name] = TileSet.from_dense(changed.view(delta.shapes[name]))
    return BlockMask(tensors)
