"""Safetensors with typed metadata: masks first of all.

Every artifact's metadata holds ``ssrctl_kind``, ``ssrctl_version``, and json under ``settings`` (what made
it); masks add their block size, counts, shapes, and the model they belong to.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ssrctl.core.tiles import TILE
from ssrctl.errors import UserError
from ssrctl.io.checked import Count, checked
from ssrctl.io.files import existing_file, whole_file
from ssrctl.io.hub import artifact_at
from ssrctl.io.packed_numbers import pack_indices, unpack_indices
from ssrctl.io.tensor_writing import write_tensors
from ssrctl.version import __version__

if TYPE_CHECKING:
    from pydantic import ConfigDict
    from torch import Tensor

    from ssrctl.core.mask import BlockMask, TileSet


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """The weights that an artifact belongs to.

    Attributes:
        name: as given to ``--model``; a local folder is known by its last part, so that no path of the
            machine is published with the artifact.
        revision: of a hub model.
        fingerprint: of the weights as stored, see ``checkpoints.fingerprint``.
    """

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}

    name: str
    revision: str | None
    fingerprint: str


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], kind: str, metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file, whole or not at all; metadata values that are not text are stored as json."""
    with whole_file(path) as temporary:
        write_tensors(temporary, tensors, header_metadata(kind, metadata))


def header_metadata(kind: str, metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of an artifact as safetensors takes it: text, other values as json."""
    header = {"ssrctl_kind": kind, "ssrctl_version": __version__, "format": "pt"}
    return header | {
        key: value if isinstance(value, str) else json.dumps(value, sort_keys=True) for key, value in metadata.items()
    }


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file of ours: (tensors, metadata).

    Raises:
        UserError: missing, truncated or foreign file, or an artifact of another kind.
    """
    metadata = read_metadata(path, kind)
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (not a dict)


def read_metadata(path: str | Path, kind: str) -> dict[str, str]:
    """Read only the metadata, checked to be of ``kind``; without torch."""
    with open_safetensors(path, "np") as file:
        metadata = dict(file.metadata() or {})
    found = metadata.get("ssrctl_kind")
    if found != kind:
        raise UserError(
            f"{path} is not a {kind} file: " + (f"it is a {found}" if found else "it has no ssrctl metadata"),
            f"give a {kind} file",
        )
    return metadata


def open_safetensors(path: str | Path, framework: str = "pt") -> Any:
    """Call ``safetensors.safe_open``, with a truncated or foreign file as a ``UserError``; "np" does not import torch."""
    from safetensors import SafetensorError, safe_open

    file = existing_file(path, "safetensors file")
    try:
        return safe_open(file, framework=framework)
    except (SafetensorError, OSError) as error:
        said = ascii(str(error)[:200])[1:-1]  # may quote a name from the file
        raise UserError(
            f"{file} is not a readable safetensors file ({file.stat().st_size} bytes): {said}",
            "it may be truncated; make or copy it again",
        ) from error


def json_field(metadata: Mapping[str, str], key: str, path: str | Path) -> Any:
    """Return a metadata value that is json; ``UserError`` when it is absent or malformed."""
    try:
        return json.loads(metadata[key])
    except (KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: metadata '{key}' is absent or not json") from error


def shapes_field(metadata: Mapping[str, str], path: str | Path) -> dict[str, tuple[int, ...]]:
    """Return the metadata's tensor shapes by name; ``UserError`` when they are anything else."""
    shapes = json_field(metadata, "shapes", path)
    if not isinstance(shapes, dict) or not all(
        isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape) for shape in shapes.values()
    ):
        raise UserError(f"{path}: metadata 'shapes' does not hold tensor shapes", "make the file again")
    return {name: tuple(shape) for name, shape in shapes.items()}


def identity_field(metadata: Mapping[str, str], key: str, path: str | Path) -> ModelIdentity | None:
    """Return the metadata's model identity, None where there is none; ``UserError`` when it is anything else."""
    fields = json_field(metadata, key, path)
    if fields is None:
        return None
    try:
        identity = ModelIdentity(**fields)
        if not all(isinstance(value, str) or (name == "revision" and value is None) for name, value in fields.items()):
            raise TypeError("its fields are not text")
        return identity
    except TypeError as error:
        raise UserError(f"{path}: metadata '{key}' does not name a model: {error}", "make the file again") from error


MASK_KIND = "mask"
MASK_FILE = "mask.safetensors"  # in a repository on the hub
_PARTS = ("crow_indices", "col_indices", "tiles")
_CODING = {"name": "gaps", "version": 1}
# A tensor with more than this share selected keeps its tiles, which are hardly larger then and several times as fast.
_MOST_GAPS = 1 / 4
# Memory of a selected weight while gaps become tiles: its index, and at worst a tile of its own with its number.
_BYTES_PER_GAP = 56


def save_mask(
    path: str | Path,
    mask: BlockMask,
    *,
    mask_kind: str,
    model: ModelIdentity | None,
    settings: Mapping[str, Any],
    small: bool = True,
) -> None:
    """Write a mask, whole or not at all.

    Args:
        path: the safetensors file.
        mask: the mask.
        mask_kind: the meaning of the selection: ``superweights``, ``steps``, ...
        model: whose coordinates these are.
        settings: what made it.
        small: write packed gaps between the selected indices of sparse tensors; False: block sparse rows with
            bit-packed 16x16 tiles for all.
    """
    counts = {name: tiles.count() for name, tiles in mask.tensors.items()}
    sparse = {name for name, tiles in mask.tensors.items() if small and counts[name] <= _MOST_GAPS * tiles.numel}
    metadata = {
        "mask_kind": mask_kind,
        "block_size": [TILE, TILE],
        "shapes": {name: list(shape) for name, shape in mask.shapes.items()},
        "counts": counts,
        "model": None if model is None else asdict(model),
        "settings": dict(settings),
    } | ({"coding": _CODING} if sparse else {})
    tensors: dict[str, Tensor] = {}
    for name, tiles in mask.tensors.items():
        if name in sparse:
            tensors[f"{name}.gaps"] = pack_indices(tiles.to("cpu").index_parts(), tiles.numel)
        else:
            tensors |= _tile_tensors(name, tiles)
    save_tensors(path, tensors, MASK_KIND, metadata)


def mask_tensors(mask: BlockMask, prefix: str = "") -> dict[str, Tensor]:
    """Return the stored form of a mask: ``NAME.crow_indices``, ``NAME.col_indices``, ``NAME.tiles`` per tensor."""
    tensors: dict[str, Tensor] = {}
    for name, tiles in mask.tensors.items():
        tensors |= _tile_tensors(f"{prefix}{name}", tiles)
    return tensors


def _tile_tensors(name: str, tiles: TileSet) -> dict[str, Tensor]:
    return dict(zip((f"{name}.{part}" for part in _PARTS), (*tiles.row_pointers(), tiles.tiles), strict=True))


def mask_from_tensors(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, Iterable[int]], path: str | Path, prefix: str = ""
) -> BlockMask:
    """Return the mask that ``mask_tensors`` stored, every tile checked against its shape.

    Raises:
        UserError: a part is absent, or the parts do not describe a set over a tensor of that shape.
    """
    from ssrctl.core.mask import BlockMask, TileSet

    loaded = {}
    for name, shape in shapes.items():
        try:
            loaded[name] = TileSet.from_row_pointers(shape, *(tensors[f"{prefix}{name}.{part}"] for part in _PARTS))
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path}: {name}: {error}", "make the file again") from error
    return BlockMask(loaded)


def mask_at(path: str | Path) -> Path:
    """Return ``path``, or the mask of the repository on the hub that it names, downloaded."""
    return artifact_at(path, MASK_FILE)


def load_mask(path: str | Path) -> tuple[BlockMask, dict[str, str]]:
    """Read a mask file, or that of a repository on the hub: (mask, metadata), every tile checked against its shape.

    Raises:
        UserError: truncated or foreign file, or contents that do not describe a mask.
    """
    from ssrctl.core.mask import BlockMask

    tensors, metadata = load_tensors(mask_at(path), MASK_KIND)
    shapes, packed = _stored_shapes(tensors.keys(), metadata, path)
    tiled = {name: shape for name, shape in shapes.items() if name not in packed}
    found = dict(mask_from_tensors(tensors, tiled, path).tensors)
    if packed:
        found |= _from_gaps(tensors, packed, metadata, path)
    return BlockMask({name: found[name] for name in shapes}), metadata


def count_mask(path: str | Path) -> tuple[dict[str, tuple[int, ...]], dict[str, int], dict[str, str]]:
    """Check a mask file as ``load_mask`` does, and count its weights, without torch: (shapes, selected, metadata).

    Raises:
        UserError: as in ``load_mask``.
    """
    from ssrctl.io.mask_tiles import count_tiles

    place = mask_at(path)
    metadata = read_metadata(place, MASK_KIND)
    counts: dict[str, int] = {}
    with open_safetensors(place, "np") as file:
        shapes, packed = _stored_shapes(file.keys(), metadata, path)
        named = _named_counts(metadata, path) if packed else {}
        for name, shape in shapes.items():
            try:
                if name in packed:
                    counts[name] = sum(
                        map(len, _index_parts(file.get_tensor(f"{name}.gaps"), shape, named.get(name, 0)))
                    )
                else:
                    counts[name] = count_tiles(shape, *(file.get_tensor(f"{name}.{part}") for part in _PARTS))
            except (ValueError, TypeError) as error:
                raise UserError(f"{path}: {name}: {error}", "make the mask again") from error
    return shapes, counts, metadata


def _stored_shapes(
    stored: Iterable[str], metadata: Mapping[str, str], path: str | Path
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Return (all shapes, those of tensors stored as gaps) by name, checked against the names of the stored tensors."""
    there = set(stored)
    shapes = shapes_field(metadata, path)
    if json_field(metadata, "block_size", path) != [TILE, TILE]:
        raise UserError(f"{path}: block size {metadata['block_size']}, this version reads {TILE}x{TILE} only")
    packed = {name: shape for name, shape in shapes.items() if f"{name}.gaps" in there}
    expected = {f"{name}.{part}" for name in shapes.keys() - packed.keys() for part in _PARTS}
    if odd := sorted((expected | {f"{name}.gaps" for name in packed}) ^ there):
        raise UserError(f"{path}: tensors and shapes do not match, first difference: {odd[0]}", "make the mask again")
    return shapes, packed


def _named_counts(metadata: Mapping[str, str], path: str | Path) -> dict[str, int]:
    """Return the counts of selected weights that the metadata of a mask with gaps name, after a check of their coding."""
    if (coding := json_field(metadata, "coding", path)) != _CODING:
        raise UserError(f"{path}: it is coded as {ascii(coding)[:80]}, not {_CODING}", "install a newer ssrctl")
    return checked(dict[str, Count], json_field(metadata, "counts", path), f"{path}: counts", "make the mask again")


def _index_parts(gaps: Any, shape: tuple[int, ...], count: int) -> Iterator[Any]:
    """Yield the indices of a stream of gaps, a numpy array, part by part as numpy arrays.

    Raises:
        ValueError: not bytes, corrupt data, or not ``count`` indices.
    """
    if gaps.dtype != "uint8" or gaps.ndim != 1:
        raise ValueError(f"its gaps are {gaps.dtype} {list(gaps.shape)}, not bytes")
    left = count
    for part in unpack_indices(gaps.data, math.prod(shape)):
        left -= len(part)
        if left < 0:
            break
        yield part
    if left:
        raise ValueError(f"it does not hold the {count:,} coordinates that the metadata name")


def _from_gaps(
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str],
    path: str | Path,
) -> dict[str, TileSet]:
    """Return the sets of tensors that are stored as gaps."""
    import psutil
    import torch

    from ssrctl.core.mask import TileSet

    counts = _named_counts(metadata, path)
    # A few bytes may stand for more coordinates than fit into memory, or for a tensor of more rows.
    rows = sum(TileSet.empty(shape).grid[0] for shape in shapes.values())
    needed = _BYTES_PER_GAP * sum(counts.get(name, 0) for name in shapes) + 4 * rows
    if needed > (free := psutil.virtual_memory().available):
        raise UserError(
            f"{path}: the mask would take {needed / 1e9:,.0f} GB of memory, {free / 1e9:,.1f} are free",
            "it may be damaged; make it again, or use a larger machine",
        )
    found = {}
    for name, shape in shapes.items():
        try:
            parts = [*map(torch.from_numpy, _index_parts(tensors[f"{name}.gaps"].numpy(), shape, counts.get(name, 0)))]
            indices = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
            found[name] = TileSet.from_indices(shape, indices)
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: {name}: {error}", "make the mask again") from error
    return found


def load_mask_for(
    path: str | Path, shapes: Mapping[str, tuple[int, ...]], fingerprint: str, *, ignore_fingerprint: bool = False
) -> BlockMask:
    """Read a mask and check that it belongs to a model.

    Args:
        path: the mask file.
        shapes: the model's tensors.
        fingerprint: the model's, from ``checkpoints.fingerprint``.
        ignore_fingerprint: accept other weights of the same shapes.

    Raises:
        UserError: other tensors, other shapes, or other weights; the first difference is named.
    """
    mask, metadata = load_mask(path)
    for name in sorted(mask.shapes.keys() | shapes.keys()):
        theirs, ours = mask.shapes.get(name), shapes.get(name)
        if theirs != (None if ours is None else tuple(ours)):
            raise UserError(
                f"{path} does not fit the model: {name} is {_shape(theirs)} in the mask, {_shape(ours)} in the model",
                "make the mask for this model",
            )
    model = identity_field(metadata, "model", path)
    if model is not None and model.fingerprint != fingerprint and not ignore_fingerprint:
        raise UserError(
            f"{path} was made for other weights: {model.name} {model.fingerprint}, the model has {fingerprint}",
            "make the mask for this model, or give --ignore-fingerprint",
        )
    return mask


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "scalar"
