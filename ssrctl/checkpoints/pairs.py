"""A base and the checkpoints that were made from it, opened together and walked tensor by tensor.

``open_pairs`` opens them and finds the tensors that all of them have; ``walk`` hands each tensor to a function in
a few worker threads. A tensor is read from a file when it is first asked for, and once.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ssrctl.checkpoints.run_dir import DELTA_FILE, RunDir
from ssrctl.configs.common import PairOptions
from ssrctl.configs.layers import layer_ranges
from ssrctl.errors import UserError
from ssrctl.io.hub import fetched
from ssrctl.report.formats import text_safe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ssrctl.checkpoints.reader import DeltaReader, TensorReader

_HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json")


# Elements of a range: enough to be worth a task, and few enough that an embedding, far larger than any other tensor,
# is shared among workers.
RANGE = 1 << 23

Made = TypeVar("Made")


@dataclass(frozen=True)
class Checkpoint:
    """One open checkpoint.

    Attributes:
        label: name in reports, unique in a comparison.
        reader: the open checkpoint.
        is_delta: True = a delta on top of the base.
        step: the training step that made it; None when it does not say.
        own_base: the weights that it is compared with, where they are not those of the comparison's ``base``.
    """

    label: str
    reader: TensorReader | DeltaReader
    is_delta: bool
    step: int | None = None
    own_base: TensorReader | None = None


@dataclass(frozen=True)
class Comparison:
    """A base and its checkpoints, open.

    Attributes:
        base: the weights that training began from; of several pairs those of the first, whose shapes the others have.
        tuned: the checkpoints, in the order given.
        names: the tensors that all of them have and that are measured, sorted.
        notes: sentences that a reader needs so as not to be misled.
        one_sided: names of weights, or of tensors with rows, that one side lacks; none where the settings choose tensors.
    """

    base: TensorReader
    tuned: list[Checkpoint]
    names: list[str]
    notes: list[str]
    one_sided: list[str] = field(default_factory=list)

    def numel(self, name: str) -> int:
        """Return the number of elements of a tensor."""
        return math.prod(self.base.shapes[name])

    def base_of(self, checkpoint: Checkpoint) -> TensorReader:
        """Return the weights that a checkpoint is compared with."""
        return checkpoint.own_base or self.base

    @property
    def one_base(self) -> bool:
        """True if all checkpoints are compared with the same weights."""
        return all(one.own_base is None for one in self.tuned)


class TensorPair:
    """One tensor, or a range of its elements, in the base and in one checkpoint.

    Attributes:
        name: of the tensor.
        shape: of the whole tensor.
        start: flat index of the first element; 0 for a whole tensor.
        memo: values that several measures of this pair share, by a key of their choice.
    """

    def __init__(self, comparison: Comparison, checkpoint: Checkpoint, name: str, start: int | None = None) -> None:
        self.name = name
        self.checkpoint = checkpoint
        self.shape = comparison.base.shapes[name]
        self.start = start or 0
        self.memo: dict[Any, Any] = {}
        self._comparison = comparison
        self._stop = None if start is None else start + RANGE
        self._base: Tensor | None = None
        self._tuned: Tensor | None = None

    @property
    def base(self) -> Tensor:
        """The whole tensor as this checkpoint's training began from it."""
        from ssrctl.checkpoints.reader import DeltaReader

        if self._base is None:
            reader, base = self.checkpoint.reader, self._comparison.base_of(self.checkpoint)
            self._base = reader.base_tensor(self.name) if isinstance(reader, DeltaReader) else base.tensor(self.name)
        return self._base

    @property
    def tuned(self) -> Tensor:
        """The whole tensor of the checkpoint."""
        if self._tuned is None:
            self._tuned = self.base if self.unchanged else self.checkpoint.reader.tensor(self.name)
        return self._tuned

    @functools.cached_property
    def unchanged(self) -> bool:
        """True if both sides are known to be equal without reading them.

        They are the same bytes of one file (two revisions in the hub's cache, or hard links, share a shard), or a delta
        changes nothing of the tensor.
        """
        from ssrctl.checkpoints.reader import DeltaReader

        reader = self.checkpoint.reader
        if isinstance(reader, DeltaReader):
            return self.name not in reader.delta.changes
        return self._comparison.base_of(self.checkpoint).same_bytes(self.name, reader)

    def _base_pieces(self, first: int, last: int) -> Iterator[Tensor]:
        from ssrctl.checkpoints.reader import DeltaReader

        reader = self.checkpoint.reader
        if isinstance(reader, DeltaReader):
            return reader.base_pieces(self.name, first, last)
        return self._comparison.base_of(self.checkpoint).pieces(self.name, first, last, reuse=True)

    def pieces(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (flat index of the first element, base, tuned) for pieces of at most ``RANGE`` elements, in order.

        A tensor that is in memory is cut; otherwise a few megabytes of the file are read at a time, and a piece is
        valid until the next one is taken.
        """
        from ssrctl.checkpoints.reader import DeltaReader

        if self._base is not None or self._tuned is not None or self._stop is None:
            base, tuned = self.base.flatten(), self.tuned.flatten()
            for start in range(0, base.numel(), RANGE):
                before = base[start : start + RANGE]
                yield start, before, before if self.unchanged else tuned[start : start + RANGE]
            return
        reader, first, last = self.checkpoint.reader, self.start, self._stop
        both: Iterable[tuple[Tensor, Tensor]]
        if self.unchanged:
            both = ((piece, piece) for piece in self._base_pieces(first, last))
        else:
            if isinstance(reader, DeltaReader):
                theirs = reader.pieces(self.name, first, last)
            else:
                theirs = reader.pieces(self.name, first, last, reuse=True)
            both = zip(self._base_pieces(first, last), theirs, strict=True)
        for before, after in both:
            yield first, before, after
            first += before.numel()

    def share_base(self, other: TensorPair) -> None:
        """Take over the base tensor that ``other`` has read, where both began from the same values."""
        mine, theirs = self.checkpoint, other.checkpoint
        same = mine.own_base is theirs.own_base and not mine.is_delta and not theirs.is_delta
        if self._base is None and same:
            self._base = other._base

    def release(self) -> None:
        """Drop what was read and the memo; a base tensor that another pair took over stays with that one."""
        self._base = self._tuned = None
        self.memo.clear()


def walk(
    comparison: Comparison,
    work: Callable[[str, int | None], Made],
    *,
    num_workers: int,
    description: str,
    in_ranges: bool = False,
) -> Iterator[tuple[str, Made]]:
    """Yield (tensor name, result of ``work``); at most ``num_workers`` tensors are worked on at a time.

    Args:
        comparison: the open checkpoints.
        work: called in a worker thread with a name and, of a range, its first flat index (None: the whole tensor).
        num_workers: threads, at least 1.
        description: of the progress bar.
        in_ranges: call ``work`` for each range of ``RANGE`` elements, in the order in which tensors lie in the file,
            on one torch thread each; otherwise once for each tensor, in the order of ``comparison.names``.

    Results do not depend on the number of workers.
    """
    import torch

    from ssrctl.io.console import progress

    if in_ranges:
        names = comparison.base.in_file_order(comparison.names)
        tasks: list[tuple[str, int | None]] = [
            (name, start) for name in names for start in range(0, comparison.numel(name) or 1, RANGE)
        ]
    else:
        tasks = [(name, None) for name in comparison.names]
    threads = torch.get_num_threads()
    # As many threads of torch as cores are left, so that two decompositions do not compete for the same ones.
    each = 1 if in_ranges else max(1, threads // num_workers)
    try:
        with (
            ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(each,)) as pool,
            progress(unit="pieces", transient=True) as bar,
        ):
            shown = bar.add_task(description, total=len(tasks), status="")
            try:
                for (name, _), one in zip(tasks, pool.map(lambda task: work(*task), tasks), strict=True):
                    yield name, one
                    bar.advance(shown)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C nothing new is begun
    finally:
        torch.set_num_threads(threads)


def checkpoints_of(run: Path) -> tuple[Path, list[Path]]:
    """Return (the base that a run started from, its complete checkpoints, oldest first).

    Raises:
        UserError: the run has no checkpoint yet, or does not say its model.
    """
    folder = RunDir(run)
    model = folder.read_config().get("model")
    if not isinstance(model, str):
        raise UserError(f"{folder.config} does not name the model", "give it: ssrctl diagnose BASE RUN")
    found = folder.checkpoints()
    if not found:
        raise UserError(f"{run} has no complete checkpoint yet", "train further, or with a smaller --save-steps")
    return Path(model), found


def is_run(path: Path) -> bool:
    """Return True if ``path`` is a run directory rather than a model or a checkpoint."""
    return (path / "config.yaml").is_file() and (path / "checkpoints").is_dir()


def open_pairs(
    stack: contextlib.ExitStack,
    pairs: Sequence[tuple[Path, Path]],
    layers: str | None = None,
    options: PairOptions | None = None,
) -> Comparison:
    """Open checkpoints and the base of each, and find the tensors to compare.

    Args:
        stack: closes the files.
        pairs: (base, checkpoint), at least one. A base is a folder, a safetensors file, or a name on the hub; a
            checkpoint also a delta, or a run. A base of several pairs is opened once.
        layers: compare these only, as ``layer_ranges`` reads them; None is all.
        options: patterns of names, and whether every difference is refused; by default neither.

    Raises:
        UserError: a path that cannot be opened, a checkpoint that was not made from its base, or bases of different
            architectures.
    """
    from ssrctl.checkpoints.parameter_names import one_sided_weights
    from ssrctl.checkpoints.reader import TensorReader

    options = options or PairOptions()
    bases: dict[Path, TensorReader] = {}
    tuned: list[Checkpoint] = []
    found: list[set[str]] = []
    notes: list[str] = []
    one_sided: set[str] = set()
    for base_path, path in pairs:
        if base_path not in bases:
            bases[base_path] = _open_base(stack, base_path)
            if len(bases) > 1:
                first = next(iter(bases.values()))
                names, said = _matching(first, bases[base_path], options)
                found.append(set(names))
                notes += [f"{first.label} and {bases[base_path].label}, the bases of pairs: {note}" for note in said]
        base = bases[base_path]
        one, names, said = _open_tuned(stack, base, path, options, several=len(pairs) > 1)
        found.append(set(names))
        if isinstance(one.reader, TensorReader):
            one_sided |= one_sided_weights(base, one.reader, names)
        label = _unused(text_safe(one.reader.label), {other.label for other in tuned})
        own = None if base is next(iter(bases.values())) else base
        tuned.append(replace(one, label=label, own_base=own))
        notes += said + _dtype_notes(base, one.reader, names)
    first, shared = next(iter(bases.values())), set.intersection(*found)
    if len(bases) > 1:
        notes.append(
            "Each checkpoint is compared with its own base. Overlaps are of weights at the same places; what chance gives "
            "among weights of equal magnitude is not defined for several bases."
        )
    notes = list(dict.fromkeys(notes + _other_base_notes(first, tuned)))
    _crop_to_common_rows(list(bases.values()), tuned, shared, notes)
    names, said = chosen_names(sorted(shared), options, first.label)
    chosen = bool(options.include or options.exclude or layers)
    return Comparison(first, tuned, _in_layers(names, layers), notes + said, [] if chosen else sorted(one_sided))


def _open_base(stack: contextlib.ExitStack, path: Path) -> TensorReader:
    from ssrctl.checkpoints.reader import TensorReader, delta_meant_by

    place = local_copy(path)
    if delta_meant_by(place) is not None:
        raise UserError(f"BASE {path} is a delta, not whole weights", "give the model that the run started from")
    return stack.enter_context(TensorReader(place))


def _open_tuned(
    stack: contextlib.ExitStack, base: TensorReader, path: Path, options: PairOptions, *, several: bool
) -> tuple[Checkpoint, list[str], list[str]]:
    """Return (the checkpoint without a label, the names that it has in common with the base, notes)."""
    from ssrctl.checkpoints.gguf import SUFFIX, GgufReader
    from ssrctl.checkpoints.reader import TensorReader, delta_meant_by, open_delta

    place = local_copy(path)
    delta = delta_meant_by(place)
    if delta is not None:
        step = int(delta.parent.name) if delta.parent.name.isdecimal() else None
        or_else = ", or each checkpoint with its own base: --pairs BASE:TUNED ..." if several else ""
        one = Checkpoint("", open_delta(delta, base, or_else), True, step)
        return one, *_delta_names(base, one.reader)
    if place.is_file() and place.suffix == SUFFIX:
        other = GgufReader(place, base.shapes)
        stack.enter_context(other)
        names, said = _matching(base, other, options)
        return Checkpoint("", other, False), names, other.notes + said
    reader = stack.enter_context(TensorReader(place))
    return Checkpoint("", reader, False), *_matching(base, reader, options)


def _matching(base: TensorReader, tuned: TensorReader, options: PairOptions) -> tuple[list[str], list[str]]:
    from ssrctl.checkpoints.parameter_names import matching_names

    return matching_names(base, tuned, strict=options.strict)


def _other_base_notes(base: TensorReader, tuned: Sequence[Checkpoint]) -> list[str]:
    """Return sentences on checkpoints whose folder says that they were trained from other weights than their base.

    A folder that `delta apply` makes has the intervention.json of the model that the run started from.
    """
    from ssrctl.checkpoints.reader import TensorReader

    def intervention(reader: TensorReader) -> bytes | None:
        path = reader.folder / "intervention.json"
        return path.read_bytes() if path.is_file() else None

    notes = []
    for one in tuned:
        ours = one.own_base or base
        if isinstance(one.reader, TensorReader) and one.reader.folder != ours.folder:
            made = intervention(one.reader)
            if made is not None and made != intervention(ours):
                notes.append(
                    f"{one.label} comes from a model whose weights were rotated or permuted (its intervention.json), "
                    f"{text_safe(ours.label)} does not: that intervention is counted as update. --pairs BASE:TUNED "
                    "compares each checkpoint with its own base."
                )
    return notes


def chosen_names(names: list[str], options: PairOptions, owner: str) -> tuple[list[str], list[str]]:
    """Return (the names that --include and --exclude leave, in order; notes on the others).

    Raises:
        UserError: a pattern that matches nothing, or no name left.
    """
    from ssrctl.checkpoints.names import matching

    taken = matching(names, "--include", options.include, owner) if options.include else set(names)
    taken -= matching(names, "--exclude", options.exclude, owner)
    if not taken:
        raise UserError("no tensor is left to compare", "choose other patterns with --include and --exclude")
    left_out = len(names) - len(taken)
    notes = [f"{left_out} of {len(names)} tensors left out by --include and --exclude."] if left_out else []
    return [name for name in names if name in taken], notes


def _crop_to_common_rows(
    bases: Sequence[TensorReader], tuned: list[Checkpoint], shared: set[str], notes: list[str]
) -> None:
    """Let every checkpoint read only the rows that all have; next to a delta, a resized tensor is left out."""
    from ssrctl.checkpoints.reader import TensorReader

    readers = [one.reader for one in tuned]
    resized = sorted(name for name in shared if len({one.shapes[name] for one in (*bases, *readers)}) > 1)
    if not resized:
        return
    dense = [one for one in readers if isinstance(one, TensorReader)]
    if len(dense) < len(readers):
        shared.difference_update(resized)
        notes.append(f"Next to a delta, tensors with another number of rows were left out: {first_of(resized)}.")
        return
    for name in resized:
        rows = min(one.shapes[name][0] for one in (*bases, *dense))
        for one in (*bases, *dense):
            one.crop(name, rows)


def _unused(label: str, taken: set[str]) -> str:
    """``label``, numbered when it is taken."""
    numbered = (f"{label} #{number}" for number in itertools.count(2))
    return next(one for one in itertools.chain([label], numbered) if one not in taken)


def local_copy(path: Path) -> Path:
    """Return ``path``, or the folder or delta of a repository on the hub of that name, downloaded.

    Raises:
        UserError: neither a path here nor a repository that the hub gives.
    """
    found = fetched(path, _HUB_FILES)
    return found / DELTA_FILE if found != path and (found / DELTA_FILE).is_file() else found


def _in_layers(names: list[str], layers: str | None) -> list[str]:
    from ssrctl.checkpoints.names import layer_index

    if layers is None:
        return names
    wanted = {layer for span in layer_ranges(layers) for layer in span}
    known = sorted({layer for name in names if (layer := layer_index(name)) is not None})
    if unknown := sorted(wanted.difference(known)):
        raise UserError(
            f"--layers {layers}: there is no layer {unknown[0]}",
            f"the layers are {known[0]} to {known[-1]}" if known else "the tensors' names have no layer numbers",
        )
    return [name for name in names if layer_index(name) in wanted]


def _delta_names(base: TensorReader, tuned: TensorReader | DeltaReader) -> tuple[list[str], list[str]]:
    """Return (the tensors that were trained, notes on those of the base that were not)."""
    names = sorted(tuned.shapes)
    left_out = sorted(set(base.shapes) - set(names))
    if not left_out:
        return names, []
    return names, [
        f"{len(left_out)} tensors of the base are not parameters of the trained model (tied copies or buffers) and were "
        f"left out: {first_of(left_out)}."
    ]


def _dtype_notes(base: TensorReader, tuned: TensorReader | DeltaReader, names: list[str]) -> list[str]:
    """Return sentences on tensors whose dtypes differ, or that hold no floating-point numbers."""
    from ssrctl.checkpoints.reader import DeltaReader

    notes = []
    if isinstance(tuned, DeltaReader) and tuned.load_dtype is not None:
        asked = str(tuned.load_dtype).removeprefix("torch.")
        notes.append(
            f"The base's config.json asks for {asked}: its weights were rounded to that, as the run loaded them."
        )
    counts = collections.Counter(
        (base.dtypes[name], tuned.dtypes[name]) for name in names if base.dtypes[name] != tuned.dtypes[name]
    )
    for (before, after), number in counts.items():
        a, b = (str(dtype).removeprefix("torch.") for dtype in (before, after))
        if not isinstance(tuned, DeltaReader):
            wide = str(common_dtype(before, after)).removeprefix("torch.")
            notes.append(f"{number} tensors are {a} in BASE and {b} in TUNED; they were compared in {wide}.")
        elif common_dtype(before, after) == after:
            notes.append(
                f"The run trained in {b} from a base stored as {a}; {number} changed tensors were upcast, exactly."
            )
        else:
            notes.append(
                f"The run trained in {b} from a base stored as {a}; {number} changed tensors of the base were "
                f"rounded to {b}, which is what the run began from."
            )
    whole = [name for name in names if not base.dtypes[name].is_floating_point]
    if whole:
        notes.append(
            f"{len(whole)} tensors hold no floating-point numbers (quantised weights or buffers), so differences of "
            f"their codes were counted: {first_of(whole)}."
        )
    return notes


def first_of(names: list[str]) -> str:
    """Return the first three names, with a sign that there are more."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def common_dtype(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """Return the narrowest floating dtype that holds the values of both exactly; 8-bit floats meet in float32.

    Integers follow ``torch.promote_types``, which can round large ones that meet floats.
    """
    import torch

    if a == b:
        return a
    wide = [torch.float32 if dtype.is_floating_point and dtype.itemsize == 1 else dtype for dtype in (a, b)]
    return torch.promote_types(*wide)
