"""The touched coordinates whose values differ from the base model bit for bit."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ssrctl.checkpoints.delta import changed_indices
from ssrctl.checkpoints.files import INDEX, SINGLE
from ssrctl.checkpoints.reader import TensorReader
from ssrctl.configs import TINY, ModelConfig
from ssrctl.errors import UserError
from ssrctl.models.stored_parameters import StoredParameters, stored_parameters
from ssrctl.training.updaters.base import Changes


def exact_changes(changes: Changes, config: ModelConfig) -> tuple[Changes, dict[str, Tensor] | None]:
    """Drop the coordinates that are stored as before: a touched bfloat16 weight often still rounds to its old value.

    The base is read from its files again, one touched tensor at a time, rather than kept in memory. Where that cannot be
    done (pickled weights, experts that are fused on loading, files that are gone since) all touched coordinates are
    kept and the base's values are unknown, which is larger and as correct.

    Args:
        changes: by parameter, sorted flat indices and the values in force there.
        config: the model that they started from, in the precision of the training.

    Returns:
        (the same for the coordinates whose value differs from the base's, as training loaded it, without tensors that
        have none; the base's values there, None where they are unknown).
    """
    folder = _folder(config)
    if folder is None:
        return changes, None
    try:
        with TensorReader(folder) as reader:
            return _differing(changes, stored_parameters(reader))
    except UserError:  # a checkpoint must not fail for the sake of its size
        return changes, None


def _differing(changes: Changes, base: StoredParameters) -> tuple[Changes, dict[str, Tensor] | None]:
    if not set(changes) <= set(base.names):
        return changes, None
    found: dict[str, tuple[Tensor, Tensor]] = {}
    values_before: dict[str, Tensor] = {}
    for name, (indices, values) in changes.items():
        before = base.tensor(name).flatten()[indices].to(values.dtype)
        kept = changed_indices(before, values)
        if kept.numel():
            found[name] = (indices[kept], values[kept])
            values_before[name] = before[kept]
    return found, values_before


def _folder(config: ModelConfig) -> Path | None:
    """Return the folder of the base's safetensors files on this machine; None when it has none."""
    if config.model == TINY:
        return Path(TINY)
    folder = Path(config.model).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:  # loading the model has put it there
            folder = Path(snapshot_download(config.model, revision=config.revision, local_files_only=True))
        except LocalEntryNotFoundError:
            return None
    return folder if (folder / SINGLE).is_file() or (folder / INDEX).is_file() else None
