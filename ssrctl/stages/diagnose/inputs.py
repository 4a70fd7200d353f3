"""What `ssrctl diagnose` compares: a base, and checkpoints that were made from it."""

from __future__ import annotations

import collections
import contextlib
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ssrctl.checkpoints.run_dir import RunDir
from ssrctl.configs import TINY, DiagnoseConfig
from ssrctl.configs.layers import layer_ranges
from ssrctl.errors import UserError
from ssrctl.report.formats import text_safe

if TYPE_CHECKING:
    from torch import Tensor

    from ssrctl.checkpoints.reader import DeltaReader, TensorReader

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json")


@dataclass(frozen=True)
class Tuned:
    """One checkpoint.

    Attributes:
        label: for reports.
        reader: the open checkpoint.
        is_delta: a delta on top of the base.
        step: the training step that made it; None when it does not say.
    """

    label: str
    reader: TensorReader | DeltaReader
    is_delta: bool
    step: int | None = None

    def original(self, base: TensorReader, name: str) -> Tensor:
        """The base's tensor as this checkpoint's training began from it."""
        from ssrctl.checkpoints.reader import DeltaReader

        return self.reader.base_tensor(name) if isinstance(self.reader, DeltaReader) else base.tensor(name)


@dataclass(frozen=True)
class Inputs:
    """Everything that is open.

    Attributes:
        base: what training began from.
        tuned: in the order given.
        names: the tensors that all of them have and that are measured.
        notes: what a reader must know of them.
    """

    base: TensorReader
    tuned: list[Tuned]
    names: list[str]
    notes: list[str]


def checkpoints_of(run: Path) -> tuple[Path, list[Path]]:
    """(the base that a run started from, its complete checkpoints, oldest first).

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
    """Whether ``path`` is a run directory rather than a model or a checkpoint."""
    return (path / "config.yaml").is_file() and (path / "checkpoints").is_dir()


def open_inputs(stack: contextlib.ExitStack, base_path: Path, paths: list[Path], config: DiagnoseConfig) -> Inputs:
    """Open the base and every checkpoint, and find the tensors to compare.

    Raises:
        UserError: something that cannot be opened, or that was not made from the base.
    """
    from ssrctl.checkpoints.reader import TensorReader, delta_meant_by, matching_names, open_delta

    if base_path.exists() and delta_meant_by(base_path) is not None:
        raise UserError(f"BASE {base_path} is a delta, not whole weights", "give the model that the run started from")
    base = stack.enter_context(TensorReader(local_copy(base_path)))
    tuned: list[Tuned] = []
    shared: set[str] | None = None
    notes: list[str] = []
    for path in paths:
        delta = delta_meant_by(path) if path.exists() else None
        if delta is not None:
            step = int(delta.parent.name) if delta.parent.name.isdecimal() else None
            one = Tuned("", open_delta(delta, base), True, step)
            names, said = _delta_names(base, one.reader)
        else:
            reader = stack.enter_context(TensorReader(local_copy(path)))
            names, said = matching_names(base, reader)
            one = Tuned("", reader, False)
        label = _unused(text_safe(one.reader.label), {other.label for other in tuned})
        tuned.append(Tuned(label, one.reader, one.is_delta, one.step))
        shared = set(names) if shared is None else shared & set(names)
        notes += [note for note in said + _dtype_notes(base, one.reader, names) if note not in notes]
    assert shared is not None
    kept = _in_layers(sorted(shared), config.layers)
    return Inputs(base, tuned, kept, notes)


def _unused(label: str, taken: set[str]) -> str:
    """``label``, numbered when it is taken."""
    numbered = (f"{label} #{number}" for number in itertools.count(2))
    return next(one for one in itertools.chain([label], numbered) if one not in taken)


def local_copy(path: Path) -> Path:
    """``path`` itself, or the folder to which a model of that name is downloaded from the hub.

    Raises:
        UserError: neither a path here nor a model that the hub gives.
    """
    name = str(path)
    if name == TINY or path.exists() or not _HUB_NAME.fullmatch(name):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{name} is no path here, and the hub did not give a model of that name: {reason}", "check the name"
        ) from error


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
    """(the tensors that were trained, notes on those of the base that were not)."""
    names = sorted(tuned.shapes)
    left_out = sorted(set(base.shapes) - set(names))
    if not left_out:
        return names, []
    return names, [
        f"{len(left_out)} tensors of the base are no parameters of the trained model (tied copies or buffers) and were "
        f"left out: {first_of(left_out)}."
    ]


def _dtype_notes(base: TensorReader, tuned: TensorReader | DeltaReader, names: list[str]) -> list[str]:
    """Sentences on tensors whose dtypes differ, or that hold no floating-point numbers."""
    from ssrctl.checkpoints.reader import DeltaReader
    from ssrctl.measures.sparsity import common_dtype

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
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
