"""Run a grid of the study, and append a row per run as soon as it is done.

    python -m examples.study.run                           # make study: hours
    python -m examples.study.run quick                     # make study-quick: twelve minutes
    python -m examples.study.run pretrained                # SmolLM2 on word problems
    python -m examples.study.run --blocks tight --results again    # one block, its rows anew in a folder of your own

A run whose row is in results/GRID.jsonl is not run again, so the same command continues an interrupted study. Start
models, masks and runs that others need lie under ``--work``. ``--minutes`` starts no run after that time. ``--processes``
does as many runs at a time, each on one core.
"""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
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
from .grid import Grid, Run, arguments
from .measures import MEASURES, sampled

KEPT = ("weights", "places")  # runs that later ones are compared with


def main() -> None:
    """Do all runs of a grid that have no row."""
    parser = arguments(__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/study"))
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--blocks", nargs="+", help="only these blocks, and the rates that they need")
    args = parser.parse_args()
    _settle()
    grid, end = Grid(args.grid, args.results, args.blocks), time.monotonic() + 60 * args.minutes
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=context, initializer=_settle) as pool:
        try:
            _do_all(grid, pool, args.processes, args.work, end)
        except BaseException:
            for process in multiprocessing.active_children():  # their runs have no row and are done again
                process.terminate()
            raise
    if next_run(grid, []) is not None:
        print(f"stopped after {args.minutes:g} minutes; the same command continues")


def _do_all(grid: Grid, pool: ProcessPoolExecutor, processes: int, work: Path, end: float) -> None:
    """Do all runs that have no row, ``processes`` at a time, and start none after ``end``."""
    running: dict[Future[dict[str, Any]], Run] = {}
    while True:
        while len(running) < processes and time.monotonic() < end:
            run = next_run(grid, list(running.values()))
            if run is None:
                break
            prepare(run, work)
            # Ctrl-C is for this process to answer: one that is started meanwhile ignores it from its first line on.
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
            running[pool.submit(done, run, work)] = run
            signal.signal(signal.SIGINT, handler)
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            row, run = future.result(), running.pop(future)
            grid.add(row)
            print(
                f"{row['cpu_seconds']:5.1f} s  {row['accuracy']:.3f}  {run.task} {run.method} {run.split}", flush=True
            )


def next_run(grid: Grid, running: Sequence[Run]) -> Run | None:
    """Return the first run without a row that can go beside those that are running.

    A run that is compared with another one reads, or makes, that one's folder: neither may start while the other runs.
    """
    busy = {run.key for run in running}
    needed = {one.key for run in running for one in _compared(run)}
    for run in grid.planned():  # what follows a method's tuning comes up when its last row is there
        if run.key in grid.rows or run.key in busy | needed or any(one.key in busy for one in _compared(run)):
            continue
        return run
    return None


def _settle() -> None:
    console.console().quiet = True
    torch.set_num_threads(1)  # the models are tiny, and the order of sums is the same everywhere


def done(run: Run, work: Path) -> dict[str, Any]:
    """Train, evaluate and measure; return the row.

    ``right`` has a digit per problem, the number of its correct samples. Weights that diverge to NaN answer nothing: their
    accuracy is 0, and ``diverged`` says so.
    """
    cpu = time.process_time()
    task, other = prepare(run, work)
    folder = work / "runs" / run.key
    shutil.rmtree(folder, ignore_errors=True)
    settings = dict(run.settings)
    measure = settings.pop("measure", None)
    if settings.pop("rotated", False):
        task = replace(task, model=inputs.rotated(task))
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


def other_run(run: Run) -> Run | None:
    """Return the run that this one is compared with, if there is one."""
    measure, seed = run.settings.get("measure"), run.settings["seed"]
    if measure == "same":  # the full run with the same seed
        return run.but(measure="weights", mask=None)
    if measure == "places":  # from the start model that is not rotated
        return run.but(measure="weights", rotated=None)
    return run.but(seed=0) if measure == "weights" and seed else None


def _compared(run: Run) -> list[Run]:
    """Return the run that this one is compared with, the one that that one is compared with, and so on."""
    other = other_run(run)
    return [] if other is None else [other, *_compared(other)]


def prepare(run: Run, work: Path) -> tuple[tasks.Task, Path | None]:
    """Make what a run shares with others, where it is not there; return its task and the folder of ``other_run``."""
    task = tasks.build(run.task, work)
    if run.settings.get("rotated"):
        inputs.rotated(task)
    for name in ("mask", "protect"):
        if run.settings.get(name) not in (None, "diff"):
            inputs.mask_file(run.settings[name], task, run.settings["seed"])
    other = other_run(run)
    if other is None:
        return task, None
    folder = work / "runs" / other.key
    if not (folder / "checkpoints").exists():
        done(other, work)
    return task, folder


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
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues")
