"""Reading checkpoints one tensor at a time: Hugging Face folders, single safetensors files, deltas.

A tensor's bytes are read when it is asked for, and a whole model is never held. ``tensor`` gives all of a
tensor, memory-mapped; ``pieces`` gives a few megabytes of it at a time, however large it is.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssrctl.checkpoints.delta import KIND as DELTA_KIND
from ssrctl.checkpoints.delta import Delta, DeltaFile
from ssrctl.checkpoints.files import INDEX, SINGLE, locate, refuse_adapter, tiny_location
from ssrctl.checkpoints.names import FUSED, NameMap, Part, replaced_prefix
from ssrctl.checkpoints.run_dir import DELTA_FILE, find_delta
from ssrctl.checkpoints.tensor_files import PIECE_ELEMENTS, StoredTensor, read_pieces, stored_tensors
from ssrctl.configs import TINY
from ssrctl.errors import UserError
from ssrctl.io.artifacts import ModelIdentity, open_safetensors
from ssrctl.io.hub import hub_origin, label_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class TensorReader:
    """An open checkpoint: a model folder (one file or shards with an index) or one safetensors file.

    Attributes:
        label: its name on the hub, or the last part of its path, for reports.
        path: of the folder or the file.
        folder: where the files are, and whatever belongs to them.
        files: the safetensors files, in order.
        sharded: a folder whose index says which file holds what.
        shapes: by tensor name, sorted.
        dtypes: by tensor name.
        name_map: from the file's names to those in ``shapes``; made by ``align``, at first they are the same.
        ties: {head: the embedding it is a copy of, or None} by the file's names, of the heads compared so far
            (``parameter_names.tied_embedding``).

    Use as a context manager; tensors that were read stay valid afterwards.
    """

    def __init__(self, path: str | Path) -> None:
        """Open ``path`` and read the headers.

        Raises:
            UserError: nothing there, no safetensors in the folder, a shard that is missing or lies outside of
                the folder, an index that does not fit its shards, a truncated file.
        """
        location = tiny_location() if str(path) == TINY else Path(path)
        self.label = TINY if str(path) == TINY else label_of(location)
        self.name_map = NameMap()
        self.ties: dict[str, str | None] = {}
        self.path = location
        self._places = self._locate(location)
        self.folder = location.parent if location.is_file() else location
        self.sharded = "" not in self._places
        self.files = sorted(set(self._places.values()))
        self._stored: dict[Path, dict[str, StoredTensor]] = {}
        self._stack = contextlib.ExitStack()
        self._handles: dict[Path, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._joined_shapes: dict[str, tuple[int, ...]] = {}
        self._ends: dict[str, list[int]] = {}
        self._cropped: set[str] = set()
        try:
            self._read_headers()
        except BaseException:
            self.close()
            raise

    def _locate(self, location: Path) -> dict[str, Path]:
        """Return {tensor name: file}, ``{"": file}`` for a single file."""
        return locate(location)

    def _read_headers(self) -> None:
        for file in self.files:
            self._stored[file] = stored_tensors(file)  # checks the header, which is then safe to open
            refuse_adapter(file, self._stored[file])
            self._handles[file] = self._stack.enter_context(open_safetensors(file))
        if "" in self._places:  # one file: whatever it holds
            only = self._places.pop("")
            self._places = dict.fromkeys(self._stored[only], only)
        for name in sorted(self._places):
            file = self._places[name]
            if name not in self._stored[file]:
                raise UserError(f"{file}: the index says that it holds {name}, but it does not", "copy the model again")
            stored = self._stored[file][name]
            if stored.dtype is None:
                raise UserError(
                    f"{file}: {name} is stored as {stored.stored_dtype}, which cannot be compared",
                    "give a checkpoint in bfloat16, float16 or float32",
                )
            self.shapes[name], self.dtypes[name] = stored.shape, stored.dtype
        if not self.shapes:
            raise UserError(f"{self.label}: no tensors in it", "check the path")
        self._file_of_stored = dict(self._places)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, as stored; one that is joined from several of the file is put together in memory."""
        import torch
        from safetensors import SafetensorError

        if name in self.name_map.joined:
            shape = self.shapes[name]
            whole = torch.empty(math.prod(shape), dtype=self.dtypes[name])
            self._fill(name, whole, 0)
            return whole.view(shape)
        file = self._places[name]
        try:
            stored = self._handles[file].get_slice(self.name_map.to_file(name)) if name in self._cropped else None
            tensor: Tensor = (
                self._handles[file].get_tensor(self.name_map.to_file(name))
                if stored is None
                else stored[: self.shapes[name][0]]
            )
        except (SafetensorError, OSError, RuntimeError, TypeError) as error:  # the last two: absurd empty shapes
            raise UserError(f"{file}: {name} cannot be read: {error}", "it may be truncated; copy it again") from error
        return tensor

    def pieces(self, name: str, start: int = 0, stop: int | None = None, *, reuse: bool = False) -> Iterator[Tensor]:
        """Read one tensor, as stored, in flat pieces of 2^20 elements in order; the last is shorter, an empty one has none.

        ``start`` and ``stop`` are flat indices, for a part of it; with ``reuse`` a piece is overwritten by the next one.
        Threads may read at the same time.
        """
        if name in self.name_map.joined:
            return self._joined_pieces(name, start, stop)
        if name in self._cropped:
            numel = math.prod(self.shapes[name])
            stop = numel if stop is None else min(stop, numel)
        return self._stored_pieces(self.name_map.to_file(name), start, stop, reuse=reuse)

    def _stored_pieces(self, name: str, start: int, stop: int | None, *, reuse: bool = False) -> Iterator[Tensor]:
        """Yield a tensor of the file, by its name there."""
        file = self._file_of_stored[name]
        return read_pieces(file, self._stored[file][name], start=start, stop=stop, reuse=reuse)

    def _joined_pieces(self, name: str, start: int, stop: int | None) -> Iterator[Tensor]:
        import torch

        numel = math.prod(self.shapes[name])
        end = numel if stop is None else min(stop, numel)
        for first in range(start, end, PIECE_ELEMENTS):
            piece = torch.empty(min(PIECE_ELEMENTS, end - first), dtype=self.dtypes[name])
            self._fill(name, piece, first)
            yield piece

    def _fill(self, name: str, room: Tensor, first: int) -> None:
        """Read elements ``first`` and on of a joined tensor into ``room``."""
        parts, ends = self.name_map.joined[name], self._ends[name]
        place, done = bisect.bisect_right(ends, first), 0
        while done < room.numel():
            part = parts[place]
            inside = first + done - (ends[place] - part.count)
            count = min(part.count - inside, room.numel() - done)
            begin = part.start + inside
            for piece in self._stored_pieces(part.name, begin, begin + count):
                room[done : done + piece.numel()] = piece
                done += piece.numel()
            place += 1

    def crop(self, name: str, rows: int) -> None:
        """Read only the first rows of a tensor from now on, as if it had no more."""
        if rows < self.shapes[name][0]:
            self._cropped.add(name)
            self.shapes[name] = (rows, *self.shapes[name][1:])

    def file_of(self, name: str) -> Path:
        """Return the file that holds a tensor, or the first piece of a joined one."""
        return self._places[name]

    def stored_in(self, file: Path) -> dict[str, StoredTensor]:
        """Return the tensors of a file by the names that it has for them, as far as the index names the file for them."""
        return {name: self._stored[file][name] for name, place in self._file_of_stored.items() if place == file}

    def same_bytes(self, name: str, other: TensorReader) -> bool:
        """Return True if a tensor of this name is the same bytes of the same file for both, whatever the file is called."""
        ours, theirs = ((one.dtypes[name], one.shapes[name], one._sources(name)) for one in (self, other))
        return ours == theirs

    def _sources(self, name: str) -> list[tuple[object, int, int]]:
        """Return (file, first byte, elements) of each piece of the file that a tensor consists of."""
        whole = Part(self.name_map.to_file(name), 0, math.prod(self.shapes[name]))
        found = []
        for part in self.name_map.joined.get(name) or (whole,):
            file = self._file_of_stored[part.name]
            stored = self._stored[file][part.name]
            assert stored.dtype is not None
            found.append((_inode(file), stored.start + part.start * stored.dtype.itemsize, part.count))
        return found

    def in_file_order(self, names: Collection[str]) -> list[str]:
        """Return the names in the order in which their bytes lie on disk."""
        return sorted(names, key=lambda name: (self._places[name], self._stored_tensor(name).start))

    def _stored_tensor(self, name: str) -> StoredTensor:
        parts = self.name_map.joined.get(name)
        return self._stored[self._places[name]][parts[0].name if parts else self.name_map.to_file(name)]

    def reopened(self, names: Collection[str]) -> TensorReader:
        """Open the same files once more, to be aligned with other names."""
        return TensorReader(self.path)

    def align(self, names: Collection[str]) -> None:
        """Take the names of ``names`` for this file's tensors, where a prefix or transformers' loading keeps them apart.

        See ``NameMap``; of what transformers makes of the tensors (``conversion``), the parameters in ``names`` are taken.
        """
        if self.name_map != NameMap():
            return
        found = NameMap.between(self.shapes, names)
        if any(found.to_file(name) not in self.shapes for name in names) and (self.folder / "config.json").is_file():
            found = self._conversion(names) or found
        if found.renamed or found.joined:
            self._rename(found)

    def align_prefix(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str] | None:
        """Take the names of ``shapes`` where a whole model lies under another prefix; returns it and its replacement."""
        if (
            self.name_map != NameMap()
            or (found := replaced_prefix(self.shapes, shapes)) is None
            or found[0] == found[1]
        ):
            return None
        old, new = found
        named = {name: new + name.removeprefix(old) for name in self.shapes if name.startswith(old)}
        self._rename(NameMap("", {name: target for name, target in named.items() if target in shapes}))
        return found

    @property
    def quantization(self) -> str | None:
        """The method by which the weights are quantised, by the ``config.json`` next to them; None when they are not."""
        settings = self._config().get("quantization_config")
        return str(settings.get("quant_method", "unknown")) if isinstance(settings, dict) else None

    def _config(self) -> dict[str, Any]:
        try:
            config = json.loads((self.files[0].parent / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):  # a single file needs no config
            return {}
        return config if isinstance(config, dict) else {}

    def _conversion(self, names: Collection[str]) -> NameMap | None:
        """Return what transformers makes of the tensors, as far as ``names`` has it; None without, or where it cannot."""
        from ssrctl.checkpoints.conversion import empty_model, parameter_parts

        try:
            model = empty_model(self.folder)
        except Exception:  # whatever a foreign config makes transformers raise; the names stay as they are then
            return None
        parts = parameter_parts(model, self.shapes)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        return self._joining({name: parts[name] for name in names if name in parts}, shapes)

    def _joining(self, parts: Mapping[str, tuple[Part, ...]], shapes: Mapping[str, tuple[int, ...]]) -> NameMap:
        """Return the map for tensors that consist of parts of one dtype, and keep their shapes."""
        even = {name: one for name, one in parts.items() if len({self.dtypes[part.name] for part in one}) == 1}
        found = NameMap.converted(even, {name: math.prod(shape) for name, shape in self.shapes.items()})
        self._joined_shapes = {name: shapes[name] for name in found.joined}
        return found

    def join_rows(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Join what ``shapes`` has as one matrix of several by rows (q, k and v; gate and up); returns the joined names."""
        parts = {}
        for name, shape in shapes.items():
            fused = next((one for one in FUSED if f".{one}." in name), None)
            if fused is None or name in self.shapes:
                continue
            pieces = [name.replace(f".{fused}.", f".{part}.") for part in FUSED[fused]]
            if all(one in self.shapes and self.shapes[one][1:] == shape[1:] for one in pieces):
                parts[name] = tuple(Part(one, 0, math.prod(self.shapes[one])) for one in pieces)
                if sum(part.count for part in parts[name]) != math.prod(shape):
                    del parts[name]
        if parts and self.name_map == NameMap():
            whole = {name: (Part(name, 0, math.prod(shape)),) for name, shape in self.shapes.items()}
            used = {part.name for one in parts.values() for part in one}
            self._rename(self._joining({n: one for n, one in whole.items() if n not in used} | parts, shapes))
        return sorted(self.name_map.joined.keys() & parts.keys())

    def _rename(self, found: NameMap) -> None:
        new = found.to_parameter
        self.name_map = found
        gone = {part.name for parts in found.joined.values() for part in parts}
        self._ends = {
            name: list(itertools.accumulate(part.count for part in parts)) for name, parts in found.joined.items()
        }
        first = {name: parts[0].name for name, parts in found.joined.items()}
        joined_dtypes = {name: self.dtypes[stored] for name, stored in first.items()}
        joined_places = {name: self._places[stored] for name, stored in first.items()}
        kept = [name for name in self.shapes if name not in gone]
        self._places = {new(name): self._places[name] for name in kept} | joined_places
        self.dtypes = {new(name): self.dtypes[name] for name in kept} | joined_dtypes
        shapes = {new(name): self.shapes[name] for name in kept} | self._joined_shapes
        self.shapes = dict(sorted(shapes.items()))

    def identity(self, fingerprint: str) -> ModelIdentity:
        """Return the identity of these weights; a model in the hub's cache has its name on the hub and its revision."""
        origin = hub_origin(self.path)
        revision = None if origin is None else origin[1]
        return ModelIdentity(name=self.label, revision=revision, fingerprint=fingerprint)

    def load_dtype(self) -> torch.dtype | None:
        """Return the floating dtype in which transformers loads the weights, by the ``config.json`` next to them."""
        import torch

        config = self._config()
        name = config.get("dtype") or config.get("torch_dtype")
        dtype = getattr(torch, name, None) if isinstance(name, str) else None
        return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _inode(file: Path) -> object:
    found = file.stat()
    # Some network file systems number no files: each path is a file of its own then.
    return (found.st_dev, found.st_ino, found.st_size) if found.st_ino else file.resolve()


@dataclass
class DeltaReader:
    """A base with a delta on top, tensor by tensor.

    Attributes:
        label: of the delta, for reports.
        base: the open base.
        delta: the changes; its shapes were checked to be the base's.
        load_dtype: the dtype that the base's weights were rounded to when the run loaded them; None: loaded as stored.
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
        """Return the base's tensor as the run began from it: in the delta's dtype (exact when that is the wider one)."""
        return _loaded(self.base.tensor(name), self.load_dtype).to(self._dtype(name))

    def base_pieces(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Yield ``base_tensor`` in flat pieces of 2^20 elements, from flat index ``start`` to before ``stop``."""
        dtype = self._dtype(name)
        return (_loaded(piece, self.load_dtype).to(dtype) for piece in self.base.pieces(name, start, stop))

    def pieces(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Yield ``tensor`` in flat pieces of 2^20 elements, from flat index ``start`` to before ``stop``."""
        import torch

        indices, values = self.delta.changes.get(name, (None, None))
        for piece in self.base_pieces(name, start, stop):
            end = start + piece.numel()
            if indices is not None and values is not None:
                first, last = torch.searchsorted(indices, torch.tensor([start, end])).tolist()
                piece[indices[first:last] - start] = values[first:last]
            yield piece
            start = end

    def tensor(self, name: str) -> Tensor:
        """Return the base's tensor with the delta's values put in."""
        tensor = self.base_tensor(name)
        if name in self.delta.changes:
            indices, values = self.delta.changes[name]
            tensor = tensor.clone()
            tensor.view(-1)[indices] = values
        return tensor


def delta_meant_by(path: str | Path) -> Path | None:
    """Return the delta file that ``path`` means (see ``run_dir.find_delta``), or None for an ordinary checkpoint.

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


def open_delta(path: Path, base: TensorReader, or_else: str = "") -> DeltaReader:
    """Open a delta on top of ``base``, checked to belong to it by shapes and by fingerprint (reads all of the base).

    ``or_else`` is added to the remedy of the last error.

    Raises:
        UserError: other tensors, other shapes, or other weights.
    """
    delta = DeltaFile(path)
    check_shapes(path, delta.base, delta.shapes, base)
    load_dtype = check_weights(path, delta.base, delta.shapes, base, or_else)

    def before(name: str, indices: Tensor) -> Tensor:
        return _loaded(base.tensor(name).flatten()[indices], load_dtype)

    return DeltaReader(_delta_label(path), base, delta.load(before), load_dtype)


def check_shapes(path: Path, wanted: ModelIdentity, shapes: Mapping[str, tuple[int, ...]], base: TensorReader) -> None:
    """Check that ``base``, its names aligned, has the tensors that a delta applies to.

    Raises:
        UserError: it lacks some, or their shapes differ.
    """
    base.align(shapes)
    differing = [name for name, shape in shapes.items() if base.shapes.get(name) != shape]
    if differing:
        name = differing[0]
        theirs = base.shapes.get(name)
        raise UserError(
            f"{path} does not fit {base.label}: {len(differing)} tensors differ, first {name}: "
            f"{list(shapes[name])} in the delta, {'absent' if theirs is None else list(theirs)} in the base",
            f"give the model that the run started from ({wanted.name})",
        )


def check_weights(
    path: Path, wanted: ModelIdentity, names: Collection[str], base: TensorReader, or_else: str = ""
) -> torch.dtype | None:
    """Check by fingerprint that a delta belongs to ``base``; reads all of it, in bounded memory.

    Args:
        path: the delta's file, for messages.
        wanted: the model that the delta names.
        names: the parameters; tied duplicates and buffers are in the file too, but were not trained.
        base: the open base, its shapes checked.
        or_else: added to the remedy.

    Returns:
        The dtype that the base's weights were rounded to when the run loaded them; None: loaded as stored.

    Raises:
        UserError: other weights.
    """
    from ssrctl.checkpoints.fingerprint import RunningFingerprint

    dtype = base.load_dtype()
    rounded = dtype is not None and any(base.dtypes[name] != dtype for name in names)
    candidates = {None: RunningFingerprint()} | ({dtype: RunningFingerprint()} if rounded else {})
    for name in base.in_file_order(names):
        for load_dtype, running in candidates.items():
            running.begin(name, _loaded_dtype(base.dtypes[name], load_dtype), base.shapes[name])
        for piece in base.pieces(name):
            for load_dtype, running in candidates.items():
                running.update(_loaded(piece, load_dtype))
    found = {load_dtype: running.digest() for load_dtype, running in candidates.items()}
    for load_dtype, digest in found.items():
        if digest == wanted.fingerprint:
            return load_dtype
    raise UserError(
        f"{path} belongs to {wanted.name} {wanted.fingerprint}, {base.label} has {found[None]}",
        "give the model that the run started from" + or_else,
    )


def _loaded(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a stored tensor as transformers loads it: floating-point numbers in ``dtype``."""
    return tensor.to(_loaded_dtype(tensor.dtype, dtype))


def _loaded_dtype(stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and stored.is_floating_point else stored


def _delta_label(path: Path) -> str:
    """Return ``RUN/checkpoints/000120`` for a run's delta; no more of the path than that is published."""
    parts = path.absolute().parts
    if path.name != DELTA_FILE or hub_origin(path) is not None:
        return label_of(path)
    return "/".join(parts[-4:-1] if parts[-3:-2] == ("checkpoints",) else parts[-2:]).lstrip("/")
