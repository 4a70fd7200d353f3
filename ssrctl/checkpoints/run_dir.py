"""The run directory: config, manifest, metrics, rollouts, mask logs, checkpoints.

::

    run/ config.yaml  manifest.json  metrics.jsonl  chat_template.jinja (if one was given)
         rollouts/000123.jsonl  masks/000123.safetensors
         gradients/000123.safetensors
         checkpoints/000200/ delta.safetensors  optimizer.safetensors  state.json  COMPLETE
                             adapter/ adapter_model.safetensors  adapter_config.json (with LoRA)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssrctl.checkpoints.delta import Delta, DeltaFile, save_delta
from ssrctl.errors import UserError
from ssrctl.io.artifacts import load_tensors, save_tensors
from ssrctl.io.console import note
from ssrctl.io.files import remove_parts_of_dead_processes, write_text
from ssrctl.io.hub import artifact_at
from ssrctl.io.jsonl import read_jsonl, write_jsonl
from ssrctl.io.manifest import write_settings
from ssrctl.io.mask_log import mask_log_paths

if TYPE_CHECKING:
    from torch import Tensor

OPTIMIZER_KIND = "optimizer"
COMPLETE = "COMPLETE"
RUNS = Path("runs")
CHAT_TEMPLATE = "chat_template.jinja"  # the name by which transformers finds it in a model's folder
DELTA_FILE = "delta.safetensors"
ADAPTER_KIND = "adapter"
ADAPTER_FILE = Path("adapter") / "adapter_model.safetensors"  # by this name peft finds it in the folder
_LOGS = (("rollouts", ".jsonl"), ("masks", ".safetensors"), ("gradients", ".safetensors"))


@dataclass(frozen=True)
class RunDir:
    """Paths in a run directory."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def chat_template(self) -> Path:
        """The template of ``--chat-template``; absent where the model's own is used."""
        return self.path / CHAT_TEMPLATE

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    def rollouts(self, step: int) -> Path:
        return self.path / "rollouts" / f"{step:06d}.jsonl"

    def masks(self, step: int) -> Path:
        return self.path / "masks" / f"{step:06d}.safetensors"

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"{step:06d}"

    def checkpoints(self) -> list[Path]:
        """Return complete checkpoints, oldest first; one that a kill left half-written does not count."""
        return [p for _, p in self._numbered("checkpoints", "") if (p / COMPLETE).is_file()]

    def _numbered(self, folder: str, suffix: str) -> list[tuple[int, Path]]:
        """Return the (step, path) entries of a sub-folder that are named by their training step; others are not ours."""
        named = [(p.name.removesuffix(suffix), p) for p in (self.path / folder).glob(f"[0-9]*{suffix}")]
        return sorted((int(stem), p) for stem, p in named if stem.isdecimal())

    def write_config(self, settings: Mapping[str, Any]) -> None:
        """Write the resolved settings as yaml that ``--config`` reads back."""
        write_settings(self.config, settings)

    def read_config(self) -> dict[str, Any]:
        """Return the run's settings."""
        import yaml

        try:
            loaded = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{self.config} cannot be read: {error}", "name a run directory of ssrctl train") from error
        if not isinstance(loaded, dict):
            raise UserError(f"{self.config} holds no settings", "name a run directory of ssrctl train")
        return loaded

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        write_text(self.manifest, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")

    def logged_after(self, step: int) -> str:
        """Describe what the run holds of the steps after ``step``; an empty text when there is nothing."""
        rows = sum(row["step"] > step for row in self._rows())
        rollouts = sum(number > step for number, _ in self._numbered("rollouts", ".jsonl"))
        checkpoints = [path.name for path in self.checkpoints() if int(path.name) > step]
        found = [f"{rows} rows of metrics"] * bool(rows) + [f"rollouts of {rollouts} steps"] * bool(rollouts)
        return ", ".join(found + [f"checkpoints {' '.join(checkpoints)}"] * bool(checkpoints))

    def rewind(self, step: int) -> None:
        """Drop what a run logged after ``step``, and what killed processes left: continuing from there writes it again."""
        rows = self._rows()
        if any(row["step"] > step for row in rows) or not self._ends_whole():
            write_jsonl(self.metrics, [row for row in rows if row["step"] <= step])
        for folder, suffix in _LOGS:
            for number, file in self._numbered(folder, suffix):
                if number > step:
                    file.unlink()
        for number, folder_of_step in self._numbered("checkpoints", ""):
            if number > step or not (folder_of_step / COMPLETE).is_file():
                _remove_checkpoint(folder_of_step)
        for place in (self.path, *(self.path / folder for folder, _ in _LOGS), *self.checkpoints()):
            remove_parts_of_dead_processes(place)

    def _rows(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl, without one that a kill truncated."""
        if not self.metrics.is_file() or not self.metrics.stat().st_size:
            return []
        return [row for _, row in read_jsonl(self.metrics, on_torn=lambda message: None, may_be_empty=True)]

    def _ends_whole(self) -> bool:
        return not self.metrics.is_file() or self.metrics.read_bytes()[-1:] in (b"", b"\n")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read back.

    Attributes:
        path: its folder.
        delta: what differs from the base model, checked.
        optimizer: the updater's tensors.
        state: step, learning-rate schedule, and whatever else json holds.
        adapter: tensors of the LoRA adapters by peft's names; empty where the model's own weights were trained.
    """

    path: Path
    delta: DeltaFile
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    adapter: dict[str, Tensor]


@dataclass(frozen=True)
class Adapter:
    """LoRA adapters in peft's form.

    Attributes:
        tensors: by peft's names.
        config: of adapter_config.json.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]


def save_checkpoint(
    folder: Path,
    delta: Delta,
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    settings: Mapping[str, Any],
    adapter: Adapter | None = None,
) -> None:
    """Write a checkpoint; the file COMPLETE comes last, so that a truncated one is known as such."""
    if folder.exists():
        _remove_checkpoint(folder)
    try:
        save_delta(folder / DELTA_FILE, delta, settings)
        save_tensors(folder / "optimizer.safetensors", optimizer, OPTIMIZER_KIND, {})
        if adapter is not None:
            save_tensors(folder / ADAPTER_FILE, adapter.tensors, ADAPTER_KIND, {})
            text = json.dumps(dict(adapter.config), indent=2, sort_keys=True) + "\n"
            write_text(folder / ADAPTER_FILE.with_name("adapter_config.json"), text)
        write_text(folder / "state.json", json.dumps(dict(state), indent=2) + "\n")
        write_text(folder / COMPLETE, "")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # a full disk needs the room
        raise


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a complete checkpoint; ``UserError`` when it is absent, truncated or half-written."""
    if not (folder / COMPLETE).is_file():
        raise UserError(f"{folder} is not a complete checkpoint", "name a folder that has a file COMPLETE in it")
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            raise ValueError("it does not say its step")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{folder / 'state.json'} cannot be read: {error}", "continue from an earlier checkpoint of the run"
        ) from error
    optimizer, _ = load_tensors(folder / "optimizer.safetensors", OPTIMIZER_KIND)
    adapter: dict[str, Tensor] = {}
    if (folder / ADAPTER_FILE.parent).is_dir():
        adapter, _ = load_tensors(folder / ADAPTER_FILE, ADAPTER_KIND)
    delta = DeltaFile(folder / DELTA_FILE)
    for name in delta.counts:
        delta.check(name)
    return Checkpoint(folder, delta, optimizer, state, adapter)


def newest_run(example: str) -> Path:
    """Return the run under ``runs/`` whose metrics or masks were written to last, and name it on stderr.

    Args:
        example: a command that names a run, for the error.

    Raises:
        UserError: there is none.
    """
    runs = [one for one in RUNS.glob("*") if (one / "config.yaml").exists() or (one / "masks").is_dir()]
    if not runs:
        raise UserError(
            f"no run found under {RUNS}/ in the current folder", f"name one: {example}; `ssrctl train` makes them"
        )
    newest = max(runs, key=lambda one: (_written(one), one.name))
    note(f"reading {newest}, the newest of {len(runs):,} run{'s' * (len(runs) != 1)} under {RUNS}/")
    return newest


def _written(run_folder: Path) -> float:
    places = [run_folder / "metrics.jsonl", *mask_log_paths(run_folder)]
    times = [one.stat().st_mtime for one in places if one.exists()]
    return max(times, default=run_folder.stat().st_mtime)


def newest_checkpoint(run: Path) -> Path:
    """Return the complete checkpoint folder of a run with the highest training step.

    Raises:
        UserError: there is none.
    """
    complete = RunDir(run).checkpoints()
    if not complete:
        raise UserError(
            f"{run} has no complete checkpoint", "train further, or lower --save-steps so that one is written"
        )
    return complete[-1]


def find_delta(path: Path) -> Path:
    """Return the delta of a run directory (its newest checkpoint's), of a checkpoint folder, or the file itself.

    Where there is no such path, a repository on the hub of that name gives its delta.

    Raises:
        UserError: there is none, or the checkpoint was not completed.
    """
    path = artifact_at(path, DELTA_FILE, CHAT_TEMPLATE)
    if path.is_file():
        return path
    if (path / DELTA_FILE).is_file():
        if not (path / COMPLETE).is_file():
            raise UserError(
                f"{path} is not a complete checkpoint: it has no {COMPLETE} file",
                f"use another checkpoint of the run, or name its {DELTA_FILE} itself",
            )
        return path / DELTA_FILE
    if not path.is_dir():
        raise UserError(f"checkpoint not found: {path}", "name a run directory, a checkpoint folder or a delta file")
    return newest_checkpoint(path) / DELTA_FILE


def chat_template_of(delta: Path) -> Path | None:
    """Return the chat template that a run, or a repository on the hub, keeps for its delta; None if it has none."""
    places = (delta.parent, delta.resolve().parent.parent.parent)
    return next((file for place in places if (file := place / CHAT_TEMPLATE).is_file()), None)


def prune_checkpoints(run: RunDir, keep: int | None) -> None:
    """Remove all but the newest ``keep`` checkpoints; None keeps all."""
    if keep is not None:
        for old in run.checkpoints()[:-keep]:
            _remove_checkpoint(old)


def _remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; the file COMPLETE goes first, so that the remains after a kill do not count."""
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder)
