"""Reading checkpoints one tensor at a time: Hugging Face folders, single safetensors files, deltas.

Files are memory-mapped; a tensor's bytes are read when it is asked for, and a whole model is never held.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssrctl.configs import TINY
from ssrctl.errors import UserError
from ssrctl.io.artifacts import open_safetensors
from ssrctl.io.checkpoint_files import INDEX, SINGLE, locate, tiny_location
from ssrctl.io.delta import KIND as DELTA_KIND
from ssrctl.io.delta import Delta, load_delta
from ssrctl.io.run_dir import DELTA_FILE, find_delta

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_HEAD = re.compile(r"(^|\.)lm_head\.weight$")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings)\.weight$")
# Constants that older files store beside the weights: causal masks, rotary frequencies, position numbers.
_BUFFER = re.compile(r"(^|\.)((attn|attention)\.(masked_)?bias|rotary_emb\.inv_freq|position_ids)$")

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
        prefix: what ``align`` put before the names of the file; empty at first.

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
        self.prefix = ""
        self._places = locate(location)
        self.files = sorted(set(self._places.values()))
        self._stack = contextlib.ExitStack()
        self._handles: dict[Path, Any] = {}
        self._renamed: set[str] = set()
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
            stored = name.removeprefix(self.prefix) if name in self._renamed else name
            return self._handles[file].get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: {name} cannot be read: {error}", "it may be torn; copy it again") from error

    def align(self, names: Collection[str]) -> None:
        """Put a model prefix before this file's names when that is all that keeps them from ``names``.

        The hub's GPT-2 holds ``wte.weight`` where ``save_pretrained`` writes ``transformer.wte.weight``.
        """
        body = [name for name in self.shapes if not _HEAD.search(name)]
        if any(name in names for name in body):
            return
        hits = {
            prefix: sum(prefix + name in names for name in body)
            for prefix in {one.partition(".")[0] + "." for one in names}
        }
        prefix = max(sorted(hits), key=hits.__getitem__, default="")
        if not hits.get(prefix):
            return
        self.prefix = prefix
        longer = {name: prefix + name if prefix + name in names else name for name in self.shapes}
        self._renamed = {new for old, new in longer.items() if new != old}
        self._places = {longer[name]: file for name, file in self._places.items()}
        self.dtypes = {longer[name]: dtype for name, dtype in self.dtypes.items()}
        self.shapes = {longer[name]: self.shapes[name] for name in sorted(self.shapes, key=longer.__getitem__)}

    def load_dtype(self) -> torch.dtype | None:
        """The floating dtype that ``config.json`` beside the weights asks for, in which transformers loads them."""
        import torch

        try:
            config = json.loads((self.files[0].parent / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):  # a single file needs no config
            return None
        name = (config.get("dtype") or config.get("torch_dtype")) if isinstance(config, dict) else None
        dtype = getattr(torch, name, None) if isinstance(name, str) else None
        return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None

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
        load_dtype: what the base's weights were rounded to when the run loaded them; None: loaded as stored.
    """

    label: str
    base: TensorReader
    delta: Delta
    load_dtype: torch.dtype | None = None

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
        return _loaded(self.base.tensor(name), self.load_dtype).to(self._dtype(name))

    def tensor(self, name: str) -> Tensor:
        """The base's tensor with the delta's values put in."""
        tensor = self.base_tensor(name)
        if name in self.delta.changes:
            indices, values = self.delta.changes[name]
            tensor = tensor.clone()
            tensor.view(-1)[indices] = values
        return tensor


def delta_meant_by(path: str | Path) -> Path | None:
    """The delta file that ``path`` means (see ``run_dir.find_delta``), or None when it is an ordinary checkpoint.

    Raises:
        UserError: a run without any complete checkpoint, or a checkpoint that was not completed.
    """
    place = Path(path)
    if place.is_file():
        if place.suffix != ".safetensors":
            return None
        with open_safetensors(place) as file:
            return place if (file.metadata() or {}).get("ssrctl_kind") == DELTA_KIND else None
    if (place / SINGLE).exists() or (place / INDEX).exists():
        return None
    ours = (DELTA_FILE, "checkpoints", "manifest.json", "config.yaml")
    return find_delta(place) if any((place / name).exists() for name in ours) else None


def open_delta(path: Path, base: TensorReader) -> DeltaReader:
    """A delta on top of ``base``, checked to belong to it by shapes and by fingerprint (reads all of the base).

    Raises:
        UserError: other tensors, other shapes, or other weights.
    """
    from ssrctl.io.fingerprint import fingerprint

    delta = load_delta(path)
    base.align(delta.shapes)
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
    if found == delta.base.fingerprint:
        return DeltaReader(_delta_label(path), base, delta)
    dtype = base.load_dtype()
    if dtype is not None and any(base.dtypes[name] != dtype for name in delta.shapes):
        loaded = fingerprint((name, _loaded(base.tensor(name), dtype)) for name in delta.shapes)
        if loaded == delta.base.fingerprint:
            return DeltaReader(_delta_label(path), base, delta, dtype)
    raise UserError(
        f"{path} belongs to {delta.base.name} {delta.base.fingerprint}, {base.label} has {found}",
        "give the model that the run started from",
    )


def _loaded(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """As transformers loads a stored tensor: floating-point numbers in ``dtype``."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _delta_label(path: Path) -> str:
    """``RUN/checkpoints/000120`` for a run's delta; no more of the path than that is published."""
    parts = path.absolute().parts
    if path.name != DELTA_FILE:
        return path.name
    return "/".join(parts[-4:-1] if parts[-3:-2] == ("checkpoints",) else parts[-2:]).lstrip("/")


def matching_names(base: TensorReader, tuned: TensorReader) -> tuple[list[str], list[str]]:
    """(names to compare, sorted; notes on what was left out): a head that is only a tied copy counts once.

    Names that lack the model's prefix on one side get it, and constants that only one side stores are left out.

    Raises:
        UserError: names or shapes that differ, the first of them listed.
    """
    base.align(tuned.shapes)
    tuned.align(base.shapes)
    skipped, notes = set(), []
    for side, one, other in (("BASE", base, tuned), ("TUNED", tuned, base)):
        if one.prefix:
            notes.append(f"The names in {side} lack the prefix '{one.prefix}'; they were compared with it.")
        if constants := {name for name in one.shapes.keys() - other.shapes.keys() if _BUFFER.search(name)}:
            skipped |= constants
            notes.append(
                f"Constants that only {side} stores (attention masks, rotary frequencies, position numbers) were left "
                f"out, {len(constants)} in all, first {min(constants)}."
            )
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
