"""A delta as the sparse weight patches that a running vLLM server takes, without vLLM.

The format is that of ``vllm.distributed.weight_transfer.sparse_nccl_engine`` (backend ``sparse_nccl``), read in
the releases 0.30.0 to 0.33.0: a ``SparseWeightPatch`` has a ``name``, int32 flat ``indices``, as many ``values``,
and the ``full_shape`` of the tensor. In these releases names, shapes and indices are those of the *checkpoint*;
the server's own loader maps them to fused tensors (``qkv_proj``) and to its tensor-parallel ranks. Releases that
came before (documented for 0.23.0) address the *runtime* parameters of a server with one rank instead: fused
names, no ``full_shape``. ``layout`` chooses between the two.

Sending them from the trainer, with vLLM 0.30 or later::

    from vllm.distributed.weight_transfer.sparse_nccl_engine import SparseWeightPatch
    engine.send_weights([SparseWeightPatch(**patch._asdict()) for patch in vllm_sparse_patches(delta)])

A delta lists what differs from its base. A server that holds the base, or an earlier checkpoint of the same run
whose delta listed no coordinate that this one lacks, holds the tuned model afterwards.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ssrctl.checkpoints.delta import INT32_MAX, Delta, dtype_name
from ssrctl.checkpoints.names import FUSED
from ssrctl.checkpoints.stored_tensors import StoredTensors

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

_PART = re.compile(r"^(?P<parent>.*\.)(?P<module>q_proj|k_proj|v_proj|gate_proj|up_proj)\.(?P<kind>weight|bias)$")

_JOINED = re.compile(r"\.experts\.(?!\d)")  # not as experts.3.up_proj


class SparsePatch(NamedTuple):
    """New values for some entries of one tensor; the fields are those of vLLM's ``SparseWeightPatch``.

    Attributes:
        name: of the tensor, in the checkpoint or at run time.
        indices: int32 ``[k]``, ascending flat indices.
        values: ``[k]``, in the dtype that the server holds.
        full_shape: of the tensor that ``name`` names.
    """

    name: str
    indices: Tensor
    values: Tensor
    full_shape: tuple[int, ...]


def vllm_sparse_patches(
    delta: Delta,
    *,
    dtype: torch.dtype | None = None,
    layout: Literal["checkpoint", "runtime"] = "checkpoint",
    base: str | Path | None = None,
) -> list[SparsePatch]:
    """Return the patches that bring a vLLM server from a delta's base to the weights that the delta describes.

    Args:
        delta: the changes.
        dtype: what the server holds its weights in; values are rounded to it. None: they are that already.
        layout: ``checkpoint`` for vLLM 0.30 and later; ``runtime`` for earlier releases, one rank, and models whose
            fused modules are those of ``FUSED``.
        base: the folder that the server loaded, for a delta whose parameters transformers joins or renames on loading;
            patches then have the names and shapes of its tensors. Read are its config and headers.

    Returns:
        One patch per changed tensor, by name; none when nothing changed.

    Raises:
        ValueError: a value that is NaN (``checkpoint`` reserves it for "unchanged") or becomes infinite in
            ``dtype``, an index beyond int32, mixture-of-experts tensors with ``runtime``, joined ones without
            ``base``, or a ``base`` that lacks a tensor.
        UserError: ``base`` cannot be read.
    """
    rounded = {name: (indices, _rounded(name, values, dtype)) for name, (indices, values) in delta.changes.items()}
    shapes: Mapping[str, tuple[int, ...]] = delta.shapes
    if base is not None:
        stored = StoredTensors.of(base, delta.shapes)
        rounded, shapes = stored.changes(rounded), stored.shapes
    if layout == "checkpoint":
        for name, (_, values) in rounded.items():
            if base is None and _JOINED.search(name):
                raise ValueError(
                    f"{name} joins the experts of a checkpoint, by whose names vLLM knows them; give base=FOLDER"
                )
            if num_nan := int(values.isnan().sum()):
                raise ValueError(
                    f"{name}: {num_nan} of {len(values)} new values are NaN, which vLLM takes as unchanged"
                )
        return [
            _patch(name, indices, values, shapes[name])
            for name, (indices, values) in sorted(rounded.items())
            if len(indices)
        ]
    return _runtime_patches(rounded, shapes)


def vllm_update_info(patches: Iterable[SparsePatch]) -> dict[str, Any]:
    """Return the ``update_info`` for the server's ``update_weights`` while the patches are broadcast, in order."""
    listed = list(patches)
    return {
        "names": [patch.name for patch in listed],
        "dtype_names": [dtype_name(patch.values.dtype) for patch in listed],
        "shapes": [list(patch.full_shape) for patch in listed],
        "num_updates_list": [patch.indices.numel() for patch in listed],
    }


def _rounded(name: str, values: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or values.dtype == dtype:
        return values
    rounded = values.to(dtype)
    if lost := int((rounded.isinf() & ~values.isinf()).sum()):
        raise ValueError(f"{name}: {lost} of {len(values)} new values are beyond the range of {dtype_name(dtype)}")
    return rounded


def _patch(name: str, indices: Tensor, values: Tensor, shape: tuple[int, ...]) -> SparsePatch:
    import torch

    if int(indices[-1]) > INT32_MAX:
        raise ValueError(
            f"{name}: index {int(indices[-1])} does not fit int32, the only index type of vLLM's patches; "
            f"send the tensor (shape {list(shape)}) dense"
        )
    return SparsePatch(name, indices.to(torch.int32).contiguous(), values.contiguous(), shape)


def _runtime_patches(
    changes: Mapping[str, tuple[Tensor, Tensor]], shapes: Mapping[str, tuple[int, ...]]
) -> list[SparsePatch]:
    """Patches by runtime name: the parts of a fused tensor lie one below the other, so a row offset shifts indices."""
    import torch

    found: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    runtime_shapes: dict[str, tuple[int, ...]] = {}
    for name, (indices, values) in changes.items():
        if ".experts." in name:
            raise ValueError(f"{name}: the runtime layout of experts depends on the kernel; use layout='checkpoint'")
        runtime, shape, offset = _place(name, shapes)
        runtime_shapes[runtime] = shape
        found[runtime].append((indices + offset, values))
    patches = []
    for runtime, parts in sorted(found.items()):
        parts = sorted((part for part in parts if len(part[0])), key=lambda part: int(part[0][0]))
        if parts:
            indices, values = (torch.cat(column) for column in zip(*parts, strict=True))
            patches.append(_patch(runtime, indices, values, runtime_shapes[runtime]))
    return patches


def _place(name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, tuple[int, ...], int]:
    """Return (runtime name, its shape, flat offset in it) of a checkpoint tensor."""
    match = _PART.match(name)
    if match is None:
        return name, shapes[name], 0
    fused, parts = next((fused, parts) for fused, parts in FUSED.items() if match["module"] in parts)
    siblings = [f"{match['parent']}{part}.{match['kind']}" for part in parts]
    if any(sibling not in shapes for sibling in siblings):  # an up_proj without gate is not fused
        return name, shapes[name], 0
    offset = sum(math.prod(shapes[one]) for one in siblings[: siblings.index(name)])
    rows = sum(shapes[one][0] for one in siblings)
    return f"{match['parent']}{fused}.{match['kind']}", (rows, *shapes[name][1:]), offset
