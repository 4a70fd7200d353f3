"""Speed and peak memory of the sparsity pass of `ssrctl diagnose` against a plain read of both checkpoints.

Makes a pair of sharded bfloat16 checkpoints, 4 GB together unless told otherwise, in which some of the weights moved to
the next representable number, and compares them in a process of its own: all rules, norms, distances and largest
changes. The plain read runs `readinto` over the same files, one after the other with one thread, and once more with
as many threads as the pass has. Everything lies in a temporary folder that is removed at the end. Both are timed twice:
from the disk, where checkpoints usually come from (the system is told to drop the files from its page cache before
each run), and from the page cache, where a read costs next to nothing. The cores must be free: on a busy machine the
wall clock says little, and CPU seconds are shown next to it.

    python benchmarks/diagnose.py
    python benchmarks/diagnose.py --gigabytes 16 --changed 0.6 --folder /scratch
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from common import goal, machine, table

from ssrctl.io.tensor_writing import NewTensor, stored_bytes, write_header

GOAL_SPEED = 0.5
GIB = 2**30
HIDDEN = 2048
EMBEDDING_FRAC = 0.2  # one tensor far larger than the rest, as the embeddings of small models are
SHARDS = 4
LAYERS = 16
PIECE = 2**22
BUFFER = 16 * 2**20
KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def make_pair(folder: Path, gigabytes: float, changed: float) -> tuple[list[Path], int]:
    """Write a base and a tuned checkpoint, piece by piece: (the two folders, bytes of the largest tensor)."""
    rows = int(gigabytes * 1e9 / 2 / 2 / HIDDEN)
    embedding = int(rows * EMBEDDING_FRAC)
    each = (rows - embedding) // (LAYERS * len(KINDS))
    shapes = {"model.embed_tokens.weight": (embedding, HIDDEN)}
    shapes |= {f"model.layers.{i}.{kind}.weight": (each, HIDDEN) for i in range(LAYERS) for kind in KINDS}
    names = list(shapes)
    sides = [folder / "base", folder / "tuned"]
    for side in sides:
        side.mkdir()
    weight_map = {}
    generator = torch.Generator().manual_seed(0)
    for number in range(SHARDS):
        file = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        tensors = [NewTensor(name, torch.bfloat16, shapes[name]) for name in names[number::SHARDS]]
        with (sides[0] / file).open("wb") as base, (sides[1] / file).open("wb") as tuned:
            for stream in (base, tuned):
                write_header(stream, tensors, {"format": "pt"})
            for tensor in tensors:
                weight_map[tensor.name] = file
                write_tensor(base, tuned, tensor.nbytes // 2, changed, generator)
    for side in sides:
        (side / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sides, 2 * max(rows * columns for rows, columns in shapes.values())


def write_tensor(base, tuned, numel: int, changed: float, generator: torch.Generator) -> None:
    """Write normal weights to ``base``, and to ``tuned`` the same with a share moved by one or two steps."""
    for start in range(0, numel, PIECE):
        length = min(PIECE, numel - start)
        weights = torch.randn(length, generator=generator).mul_(0.02).to(torch.bfloat16)
        base.write(stored_bytes(weights))
        moved = torch.rand(length, generator=generator) < changed
        steps = 1 + (torch.rand(length, generator=generator) < 0.1).to(torch.int16)
        tuned.write(stored_bytes(weights.view(torch.int16) + steps * moved))


@dataclass(frozen=True)
class Pass:
    """One comparison in a process of its own; times without the imports."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    start_bytes: int
    total: dict


# The system's own count for a process, ru_maxrss, begins with what its parent had used; VmHWM does not.
MEASURED = """
import contextlib, json, sys, time
from pathlib import Path
import torch
from ssrctl.checkpoints.pairs import open_pairs
from ssrctl.configs import DiagnoseConfig
from ssrctl.measures.base import take
from ssrctl.measures.sparsity import Sparsity
def peak():
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
workers, repeats = int(sys.argv[3]), int(sys.argv[4])
before, times, cpu = peak(), [], []
paths = list(map(Path, sys.argv[1:3]))
with contextlib.ExitStack() as stack:
    comparison = open_pairs(stack, [tuple(paths)])
    measure = Sparsity(comparison, DiagnoseConfig(paths=paths))
    for _ in range(repeats):
        start, begun = time.perf_counter(), time.process_time()
        [taken] = take(comparison, [measure], "pair", workers)
        times.append(time.perf_counter() - start)
        cpu.append(time.process_time() - begun)
print(json.dumps([min(times), min(cpu), peak(), before, taken.result.changes.total.numbers()]))
"""


def sparsity_pass(sides: list[Path], workers: int, repeats: int) -> Pass:
    """Compare the pair ``repeats`` times and return the best time."""
    call = [sys.executable, "-c", MEASURED, *map(str, sides), str(workers), str(repeats)]
    return Pass(*json.loads(subprocess.run(call, capture_output=True, text=True, check=True).stdout))


def drop_cache(files: list[Path]) -> None:
    """Drop the files from the page cache, so that the next read comes from the disk."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_file(file: Path) -> None:
    buffer = bytearray(BUFFER)
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def plain_read(files: list[Path], workers: int, repeats: int) -> tuple[float, float]:
    """Return (seconds, seconds of all cores) of the best of several reads of all files."""
    times, cpu = [], []
    with ThreadPoolExecutor(workers) as pool:
        for _ in range(repeats):
            start, begun = time.perf_counter(), time.process_time()
            list(pool.map(read_file, files))
            times.append(time.perf_counter() - start)
            cpu.append(time.process_time() - begun)
    return min(times), min(cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of both checkpoints together")
    parser.add_argument("--changed", type=float, default=0.2, help="share of the weights that moved")
    parser.add_argument("--num-workers", type=int, default=2, help="threads of the pass")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the best counts")
    parser.add_argument("--folder", type=Path, default=None, help="where to make the temporary folder")
    args = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        sides, largest = make_pair(Path(name), args.gigabytes, args.changed)
        files = [file for side in sides for file in sorted(side.glob("*.safetensors"))]
        size = sum(file.stat().st_size for file in files)
        drop_cache(files)
        cold_read = plain_read(files, 1, 1)
        drop_cache(files)
        cold_pass = sparsity_pass(sides, args.num_workers, 1)
        warm_read = plain_read(files, 1, args.repeats)
        together = plain_read(files, args.num_workers, args.repeats)
        found = sparsity_pass(sides, args.num_workers, args.repeats)
    rows = [
        [what, f"{seconds:.2f}", f"{cpu:.2f}", f"{size / seconds / 1e9:.2f}", f"{alone[0] / seconds:.2f}"]
        for what, (seconds, cpu), alone in (
            ("from disk: plain read, 1 thread", cold_read, cold_read),
            (f"from disk: pass, {args.num_workers} threads", (cold_pass.seconds, cold_pass.cpu_seconds), cold_read),
            ("from cache: plain read, 1 thread", warm_read, warm_read),
            (f"from cache: plain read, {args.num_workers} threads", together, warm_read),
            (f"from cache: pass, {args.num_workers} threads", (found.seconds, found.cpu_seconds), warm_read),
        )
    ]
    moved = 1 - found.total["bit_equal_frac"]
    print(f"{size / 1e9:.2f} GB pair in {len(files)} shards, {moved:.1%} of the weights changed")
    print(table(["", "seconds", "CPU seconds", "GB/s", "of the plain read"], rows))
    peak = found.peak_bytes / GIB
    print(f"peak resident {peak:.2f} GiB, {found.start_bytes / GIB:.2f} of it before anything was read")
    goal(
        "speed of the pass over that of one plain read, from disk",
        cold_read[0] / cold_pass.seconds,
        at_least=GOAL_SPEED,
    )
    goal("speed of the pass over that of one plain read, from cache", warm_read[0] / found.seconds, at_least=GOAL_SPEED)
    goal("peak resident GB, 2 GB and four times the largest tensor", found.peak_bytes / 1e9, at_most=2 + 4e-9 * largest)


if __name__ == "__main__":
    main()
