"""Helpers of the benchmark scripts: the machine's description, timing, tables, goals."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


def machine() -> str:
    """Describe the machine in one line: cores, memory, threads, versions, and the GPU if there is one."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [
        f"{os.cpu_count()} cores ({_processor()})",
        f"{memory:.0f} GiB",
        f"{torch.get_num_threads()} torch threads",
        f"torch {torch.__version__}",
        f"Python {platform.python_version()}",
    ]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return "machine: " + ", ".join(parts)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs."""

    best: float
    median: float


def timed(run: Callable[[], object], repeats: int = 5, warm_up: int = 1) -> Timing:
    """Time ``run``; the best repeat is the one that other work on the machine disturbed least."""
    for _ in range(warm_up):
        run()
    seconds = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return Timing(min(seconds), statistics.median(seconds))


class Clock:
    """A stopwatch of the seconds since the last lap, of wall time on a GPU and of this process's CPU time otherwise.

    CPU time is that of all threads: compare it on one thread, since threads that wait for each other are counted too.
    """

    def __init__(self) -> None:
        self.read = time.perf_counter if torch.cuda.is_available() else time.process_time
        self.last = self.read()

    def lap(self) -> float:
        synchronize()
        before, self.last = self.last, self.read()
        return self.last - before


def peak_rss_bytes() -> int:
    """Return the largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Align rows as columns, numbers to the right."""
    cells = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def goal(text: str, reached: float, *, at_most: float | None = None, at_least: float | None = None) -> bool:
    """Print a goal next to the measured value; return True if it was met."""
    assert (at_most is None) != (at_least is None)
    limit = at_most if at_most is not None else at_least
    met = reached <= limit if at_most is not None else reached >= limit  # type: ignore[operator]
    word = "at most" if at_most is not None else "at least"
    print(f"goal: {text}: {word} {limit:g}; reached {reached:.3g}: {'met' if met else 'MISSED'}")
    return met
