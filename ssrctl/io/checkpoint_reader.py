"""Reading checkpoints one tensor at a time: Hugging Face folders, single safetensors files, deltas.

Files are memory-mapped; a tensor's bytes are read when it is asked for, and a whole model is never held.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from ssrctl.configs import TINY
from ssrctl.errors import UserError
from ssrctl.io.artifacts import open_safetensors
from ssrctl.io.delta import KIND as DELTA_KIND
from ssrctl.io.delta import Delta, load_delta
from ssrctl.io.files import existing_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
DELTA_FILE = "delta.safetensors"
_COMPLETE = "COMPLETE"
_HEAD = re.compile(r"(^|\.)lm_head\.weight$")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings)\.weight$")

_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "U64": "uint64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


class TensorReader:
    """An open checkpoint: a model folder (one file or shards with an index) or one safetensors file.

    Attributes:
        label: its last path part, for reports.
        files: the safetensors files, in order.
        shapes: by tensor name, sorted.
        dtypes: by tensor name.

    Use as a context manager; tensors that were read stay valid afterwards.
    """

    def __init__(self, path: str | Path) -> None:
        """Open ``path`` and read the headers.

        Raises:
            UserError: nothing there, no safetensors in the folder, a shard that is missing or lies outside of
                the folder, an index that does not fit its shards, a torn file.
        """
        location = tiny_location() if str(path) == TINY else Path(path)
        self.label = TINY if str(path) == TINY else location.resolve().name
        self._places = _locate(location)
        self.files = sorted(set(self._places.values()))
        self._stack = contextlib.ExitStack()
        self._handles: dict[Path, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        try:
            self._read_headers()
        except BaseException:
            self.close()
            raise

    def _read_headers(self) -> None:
        import torch

        held = {}
        for file in self.files:
            self._handles[file] = self._stack.enter_context(open_safetensors(file))
            held[file] = set(self._handles[file].keys())
        if "" in self._places:  # one file: whatever it holds
            only = self._places.pop("")
            self._places = dict.fromkeys(held[only], only)
        for name in sorted(self._places):
            file = self._places[name]
            if name not in held[file]:
                raise UserError(f"{file}: the index says that it holds {name}, but it does not", "copy the model again")
            view = self._handles[file].get_slice(name)
            self.shapes[name] = tuple(view.get_shape())
            kind = view.get_dtype()
            if kind not in _DTYPES:
                raise UserError(f"{file}: {name} is stored as {kind}, which cannot be compared")
            self.dtypes[name] = getattr(torch, _DTYPES[kind])
        if not self.shapes:
            raise UserError(f"{self.label}: no tensors in it", "check the path")

    def tensor(self, name: str) -> Tensor:
        """One tensor, as stored."""
        from safetensors import SafetensorError

        file = self._places[name]
        try:
            return self._handles[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: {name} cannot be read: {error}", "it may be torn; copy it again") from error

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass
class DeltaReader:
    """A base with a delta on top, tensor by tensor.

    Attributes:
        label: of the delta, for reports.
        base: the open base.
        delta: the changes; its shapes were checked to be the base's.
    """

    label: str
    base: TensorReader
    delta: Delta

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.delta.shapes

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The delta's where it changes a tensor, the base's elsewhere."""
        return {name: self._dtype(name) for name in self.delta.shapes}

    def _dtype(self, name: str) -> torch.dtype:
        change = self.delta.changes.get(name)
        return self.base.dtypes[name] if change is None else change[1].dtype

    def base_tensor(self, name: str) -> Tensor:
        """The base's tensor as the run began from it: in the delta's dtype (exact when that is the wider one)."""
        return self.base.tensor(name).to(self._dtype(name))

    def tensor(self, name: str) -> Tensor:
        """The base's tensor with the delta's values put in."""
        tensor = self.base_tensor(name)
        if name in self.delta.changes:
            indices, values = self.delta.changes[name]
            tensor = tensor.clone()
            tensor.view(-1)[indices] = values
        return tensor


def tiny_location() -> Path:
    """The folder of the bundled model."""
    from ssrctl.models import tiny_reasoner

    return tiny_reasoner.path()


def find_delta(path: str | Path) -> Path | None:
    """The delta file that ``path`` means, or None when it is an ordinary checkpoint.

    A delta file means itself, a checkpoint folder its delta, a run directory its newest complete checkpoint.

    Raises:
        UserError: a run without any complete checkpoint, or a checkpoint that was not completed.
    """
    place = Path(path)
    if place.is_file():
        if place.suffix != ".safetensors":
            return None
        with open_safetensors(place) as file:
            return place if (file.metadata() or {}).get("ssrctl_kind") == DELTA_KIND else None
    if (place / _SINGLE).exists() or (place / _INDEX).exists():
        return None
    if (place / DELTA_FILE).exists():
        if not (place / _COMPLETE).exists():
            raise UserError(
                f"{place} is not a complete checkpoint: it has no {_COMPLETE} file",
                "use another checkpoint of the run, or name its delta.safetensors itself",
            )
        return place / DELTA_FILE
    if (place / "checkpoints").is_dir() or (place / "manifest.json").exists() or (place / "config.yaml").exists():
        return newest_checkpoint(place) / DELTA_FILE
    return None


def newest_checkpoint(run: Path) -> Path:
    """The checkpoint folder of a run with the highest training step among the complete ones.

    Raises:
        UserError: there is none.
    """
    folders = [one for one in (run / "checkpoints").glob("*") if one.name.isdecimal() and one.is_dir()]
    complete = [one for one in folders if (one / _COMPLETE).exists() and (one / DELTA_FILE).exists()]
    if not complete:
        raise UserError(
            f"{run}: {len(folders)} checkpoints, none of them complete",
            "train further, or lower --save-steps so that one is written",
        )
    return max(complete, key=lambda one: int(one.name))


def open_delta(path: Path, base: TensorReader) -> DeltaReader:
    """A delta on top of ``base``, checked to belong to it by shapes and by fingerprint (reads all of the base).

    Raises:
        UserError: other tensors, other shapes, or other weights.
    """
    from ssrctl.io.fingerprint import fingerprint

    delta = load_delta(path)
    differing = [name for name, shape in delta.shapes.items() if base.shapes.get(name) != shape]
    if differing:
        name = differing[0]
        theirs = base.shapes.get(name)
        raise UserError(
            f"{path} does not fit {base.label}: {len(differing)} tensors differ, first {name}: "
            f"{list(delta.shapes[name])} in the delta, {'absent' if theirs is None else list(theirs)} in the base",
            f"give the model that the run started from ({delta.base.name})",
        )
    # Tied duplicates and buffers are in the file but are no parameters of the model that was trained.
    found = fingerprint((name, base.tensor(name)) for name in delta.shapes)
    if found != delta.base.fingerprint:
        raise UserError(
            f"{path} belongs to {delta.base.name} {delta.base.fingerprint}, {base.label} has {found}",
            "give the model that the run started from",
        )
    label = path.name if path.name != DELTA_FILE else "/".join(path.absolute().parts[-4:-1])
    return DeltaReader(label, base, delta)


def matching_names(base: TensorReader, tuned: TensorReader) -> tuple[list[str], list[str]]:
    """(names to compare, sorted; notes on what was left out): a head that is only a tied copy counts once.

    Raises:
        UserError: names or shapes that differ, the first of them listed.
    """
    skipped, notes = set(), []
    for head in sorted(name for name in base.shapes.keys() | tuned.shapes.keys() if _HEAD.search(name)):
        holders = [one for one in (base, tuned) if head in one.shapes]
        if all(_is_tied_copy(one, head) for one in holders):
            skipped.add(head)
            where = "both" if len(holders) == 2 else "BASE" if holders[0] is base else "TUNED"
            notes.append(f"{head} is stored in {where} as a copy of the embedding (tied) and was counted once.")
    ours, theirs = base.shapes.keys() - skipped, tuned.shapes.keys() - skipped
    differences = [f"{name} only in BASE" for name in sorted(ours - theirs)]
    differences += [f"{name} only in TUNED" for name in sorted(theirs - ours)]
    differences += [
        f"{name} is {list(base.shapes[name])} in BASE, {list(tuned.shapes[name])} in TUNED"
        for name in sorted(ours & theirs)
        if base.shapes[name] != tuned.shapes[name]
    ]
    if differences:
        raise UserError(
            f"{base.label} and {tuned.label} are not the same architecture, {len(differences)} tensors differ: "
            + "; ".join(differences[:5]),
            "compare checkpoints of one model",
        )
    return sorted(ours), notes


def _is_tied_copy(reader: TensorReader, head: str) -> bool:
    """Is the output head stored bit for bit as the input embedding is?"""
    from ssrctl.io.delta import same_bits

    for name, shape in reader.shapes.items():
        if _EMBEDDING.search(name) and shape == reader.shapes[head] and reader.dtypes[name] == reader.dtypes[head]:
            pairs = zip(reader.tensor(name).split(4096), reader.tensor(head).split(4096), strict=True)
            return all(bool(same_bits(a, b).all()) for a, b in pairs)
    return False


def _locate(place: Path) -> dict[str, Path]:
    """Tensor name -> file; ``{"": file}`` for a single file, whose names come from its header."""
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
    if (place / _SINGLE).exists():
        return {"": existing_file(place / _SINGLE, "model file")}
    if (place / _INDEX).exists():
        return dict(_indexed(place))
    others = sorted(
        one.name for one in place.iterdir() if one.suffix in (".bin", ".pt", ".pth", ".gguf", ".safetensors")
    )
    raise UserError(
        f"{place}: neither {_SINGLE} nor {_INDEX} in it" + (f", but {', '.join(others[:3])}" if others else ""),
        "name the .safetensors file itself"
        if any(name.endswith(".safetensors") for name in others)
        else "give a model folder saved with save_pretrained (safetensors)",
    )


def _indexed(folder: Path) -> Iterator[tuple[str, Path]]:
    """(tensor name, shard) pairs of a sharded model, every shard checked to be there."""
    index = folder / _INDEX
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
