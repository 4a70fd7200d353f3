"""Where a checkpoint keeps its tensors: one safetensors file, or shards with an index."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from ssrctl.errors import UserError
from ssrctl.io.files import existing_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def tiny_location() -> Path:
    """The folder of the bundled model."""
    from ssrctl.models import tiny_reasoner

    return tiny_reasoner.path()


def locate(place: Path) -> dict[str, Path]:
    """Tensor name -> file; ``{"": file}`` for a single file, whose names come from its header.

    Raises:
        UserError: nothing there, an adapter, no safetensors in the folder, a shard that is missing or lies outside.
    """
    if not place.exists():
        raise UserError(
            f"checkpoint not found: {place}",
            "give a local folder or safetensors file; `hf download` fetches a model from the hub",
        )
    if place.is_file():
        return {"": place}
    if (place / "adapter_config.json").exists():
        raise UserError(
            f"{place} is a LoRA adapter, not a model", "merge it first (peft: merge_and_unload, then save_pretrained)"
        )
    if (place / SINGLE).exists():
        return {"": existing_file(place / SINGLE, "model file")}
    if (place / INDEX).exists():
        return dict(_indexed(place))
    others = sorted(
        one.name for one in place.iterdir() if one.suffix in (".bin", ".pt", ".pth", ".gguf", ".safetensors")
    )
    raise UserError(
        f"{place}: neither {SINGLE} nor {INDEX} in it" + (f", but {', '.join(others[:3])}" if others else ""),
        "name the .safetensors file itself"
        if any(name.endswith(".safetensors") for name in others)
        else "give a model folder saved with save_pretrained (safetensors)",
    )


def _indexed(folder: Path) -> Iterator[tuple[str, Path]]:
    """(tensor name, shard) pairs of a sharded model, every shard checked to be there."""
    index = folder / INDEX
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = [(str(name), str(shard)) for name, shard in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of shards: {error}", "copy the model again") from error
    for shard in sorted({shard for _, shard in pairs}):
        # Only the name is judged: in the hub's cache the shards are links to files outside of the folder.
        posix, windows = PurePosixPath(shard), PureWindowsPath(shard)
        if posix.is_absolute() or windows.anchor or ".." in (*posix.parts, *windows.parts):
            raise UserError(f"{index}: shard {shard!r} lies outside of the model's folder", "do not use this model")
        if not (folder / shard).is_file():
            raise UserError(f"{index}: shard {shard} is missing", "download or copy the model again")
    for name, shard in pairs:
        yield name, folder / shard
