"""Peak memory and processor time of recomputed step gradients against those with every chunk's graph kept.

Responses of equal length, units of equal length, and the model's own log-probabilities as those of the sampling, so that every
token has a gradient. Each measurement is a fresh process. Peaks are those from the loaded model on, without one gradient: of live
tensors, and of the resident set (Linux), where freed memory goes back at once. The goals take the resident set. Times are those
of other processes, since giving memory back costs time. Only the last units reach all columns, and the peak lies
there: at twice the length they alone are run, and at the single length both they and all.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import goal, machine, table
from shapes import random_question
from step_gradients import build

from ssrctl.training.live_bytes import LiveBytes
from ssrctl.training.step_gradients.task import Dials
from ssrctl.training.unit_gradients import response_logprobs, unit_gradients

MIB = 2**20


def resident(field: str) -> int:
    """Return ``VmRSS`` or ``VmHWM`` of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def measure(options: argparse.Namespace, method: str, factor: int, last_only: bool, memory: bool) -> None:
    """Print the peaks of live tensors and of the resident set in MiB, or the processor seconds."""
    model = build(options.model, torch.float32)
    batch, units = random_question(
        model,
        responses=options.rows,
        prompt=options.prompt_tokens,
        tokens=factor * options.tokens,
        units=factor * options.units,
        logprob=0.0,
        seed=0,
    )
    with torch.no_grad():
        batch = dataclasses.replace(batch, old_logprobs=response_logprobs(model, batch).float())
    units = units[-options.units_at_once :] if last_only else units
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident set counts from here
    before, start = resident("VmRSS"), time.process_time()
    live = LiveBytes()
    live.ignore(*model.parameters(), *model.buffers())
    with live if memory else contextlib.nullcontext():
        for _ in unit_gradients(
            model, batch, units, method=method, level="token",
            dials=Dials(options.units_at_once, options.chunk_tokens), on_logprobs=lambda logprobs: None,
        ):  # fmt: skip
            model.zero_grad(set_to_none=True)
    seconds = time.process_time() - start
    gradient = sum(parameter.nbytes for parameter in model.parameters())
    if memory:
        print((live.peak - gradient) / MIB, (resident("VmHWM") - before - gradient) / MIB)
    else:
        print(seconds)


def fresh(method: str, *, factor: int = 1, last_only: bool = False, memory: bool) -> list[float]:
    """Return the numbers that ``measure`` prints in a process of its own."""
    how = [str(factor), str(int(last_only)), str(int(memory))]
    child = [sys.executable, __file__, *sys.argv[1:], "--child", method, *how]
    more = {"MALLOC_MMAP_THRESHOLD_": "65536"} if memory else {}
    done = subprocess.run(child, env=os.environ | more, stdout=subprocess.PIPE, text=True, check=True)
    return [float(value) for value in done.stdout.splitlines()[-1].split()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="135m", help="a folder, or a size of step_gradients.py")
    parser.add_argument("--units", type=int, default=16)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--units-at-once", type=int, default=2)
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        method, factor, last_only, memory = options.child
        measure(options, method, int(factor), last_only == "1", memory == "1")
        return 0
    print(machine())
    peaks = {
        "recomputed, last units": fresh("recomputed", last_only=True, memory=True),
        "recomputed, last units, twice the tokens": fresh("recomputed", factor=2, last_only=True, memory=True),
        "recomputed": fresh("recomputed", memory=True),
        "chunked": fresh("chunked", memory=True),
    }
    seconds = {method: fresh(method, memory=False)[0] for method in ("recomputed", "chunked")}
    lines = [
        [name, f"{live:.0f}", f"{peak:.0f}", f"{seconds[name]:.0f}" if name in seconds else ""]
        for name, (live, peak) in peaks.items()
    ]
    print(table(["way", "live MiB", "resident MiB", "CPU s"], lines))
    once, twice, mine, other = (peak for _, peak in peaks.values())
    met = [
        goal("peak of recomputed / chunked", mine / other, at_most=0.25),
        goal("processor time of recomputed / chunked", seconds["recomputed"] / seconds["chunked"], at_most=1.35),
        goal("peak at twice the tokens / once", twice / once, at_most=1.3),
    ]
    return 0 if all(met) else 1


if __name__ == "__main__":
    raise SystemExit(main())
