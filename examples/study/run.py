"""Run a grid of the study in one process, and append a row per run as soon as it is done.

    python -m examples.study.run           # make study: hours
    python -m examples.study.run quick     # make study-quick: twelve minutes

A run whose row is in results/GRID.jsonl is not run again, so the same command continues an interrupted study. Start
models, masks and runs that others need lie under ``--work``. ``--minutes`` starts no run after that time.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ssrctl import TrainConfig, __version__, train
from ssrctl.evaluation.accuracy import per_problem
from ssrctl.io import console
from ssrctl.sampling.engines.transformers_engine import NonFiniteLogits
from ssrctl.training.training_step import NonFiniteBatch

from . import inputs, tasks
from .grid import Grid, Run
from .measures import MEASURES, sampled

KEPT = ("weights", "places")  # runs that later ones are compared with


def main() -> None:
    """Do all runs of a grid that have no row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("grid", nargs="?", default="full", help="name of a grid in this folder")
    parser.add_argument("--work", type=Path, default=Path("runs/study"))
    parser.add_argument("--minutes", type=float, default=float("inf"))
    args = parser.parse_args()
    console.console().quiet = True
    torch.set_num_threads(1)  # the models are tiny, and the order of sums is the same everywhere
    grid, started = Grid(args.grid), time.monotonic()
    for run in grid.planned():
        if run.key in grid.rows:
            continue
        if time.monotonic() - started > 60 * args.minutes:
            print(f"stopped after {args.minutes:g} minutes; the same command continues")
            return
        row = done(run, args.work)
        grid.add(row)
        print(f"{row['cpu_seconds']:5.1f} s  {row['accuracy']:.3f}  {run.task} {run.method} {run.split}", flush=True)


def done(run: Run, work: Path) -> dict[str, Any]:
    """Train, evaluate and measure; return the row.

    ``right`` has a digit per problem, the number of its correct samples. Weights that diverge to NaN answer nothing: their
    accuracy is 0, and ``diverged`` says so.
    """
    cpu = time.process_time()
    task = tasks.build(run.task, work)
    folder = work / "runs" / run.key
    shutil.rmtree(folder, ignore_errors=True)
    settings = dict(run.settings)
    measure = settings.pop("measure", None)
    if settings.pop("rotated", False):
        task = replace(task, model=inputs.rotated(task))
    other = _other(run, work)
    for name in ("mask", "protect"):
        if settings.get(name) is not None:
            settings[name] = _mask(settings[name], task, other, settings["seed"])
    row: dict[str, Any] = {"key": run.key, "task": run.task, "method": run.method, "split": run.split}
    row |= {"settings": run.settings, "ssrctl_version": __version__, "diverged": False}
    try:
        if settings["max_steps"]:
            config = TrainConfig(
                model=task.model,
                output_dir=folder,
                report=False,
                **{"dataset": str(task.folder / "train.jsonl"), **settings},
            )
            row["changed_frac"] = (train(config, critic=task.critic) or {})["changed_frac"]
        right = _right(run, task, folder)
    except (NonFiniteBatch, NonFiniteLogits):
        row["diverged"] = True
        right = [0] * tasks.SIZES[run.split]
    if measure is not None and not row["diverged"]:
        row["measured"] = MEASURES[measure](task, folder, other, run.settings)
    if measure not in KEPT:
        shutil.rmtree(folder, ignore_errors=True)
    row |= {"accuracy": sum(right) / len(right) / tasks.NUM_SAMPLES, "right": "".join(map(str, right))}
    return row | {"cpu_seconds": round(time.process_time() - cpu, 1)}


def _right(run: Run, task: tasks.Task, folder: Path) -> list[int]:
    """Return the number of correct samples of each problem, in the order of their ids."""
    samples = sampled(task, folder, str(task.folder / f"{run.split}.jsonl"), folder / "eval", run.settings)
    shares = per_problem(samples)
    return [round(tasks.NUM_SAMPLES * shares[problem]) for problem in sorted(shares)]


def _other(run: Run, work: Path) -> Path | None:
    """Return the run that this one is compared with, and make it if it is not there."""
    measure, seed = run.settings.get("measure"), run.settings["seed"]
    if measure == "same":  # the full run with the same seed
        other = run.but(measure="weights", mask=None)
    elif measure == "places":  # from the start model that is not rotated
        other = run.but(measure="weights", rotated=None)
    elif measure == "weights" and seed:
        other = run.but(seed=0)
    else:
        return None
    folder = work / "runs" / other.key
    if not (folder / "checkpoints").exists():
        done(other, work)
    return folder


def _mask(name: str, task: tasks.Task, full: Path | None, seed: int) -> Path:
    """Return a mask's file; ``diff`` are the weights that the full run changed."""
    if name != "diff":
        return inputs.mask_file(name, task, seed)
    from ssrctl.configs import MaskDiffConfig
    from ssrctl.stages import mask

    assert full is not None
    path = full / "diff.safetensors"
    if not path.exists():
        mask.run_diff(MaskDiffConfig(base=Path(task.model), tuned=full, output=path, json=True))
    return path


if __name__ == "__main__":
    main()
