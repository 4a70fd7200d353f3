"""Peak memory and time of `ssrctl delta diff` and `ssrctl delta apply`, and the size of the delta.

Makes a sharded bfloat16 checkpoint of the wanted size and a second one in which 1% of the coordinates changed,
runs both commands as users do (a process each), and compares `diff` with a plain read of both checkpoints, `apply`
with a plain copy of one. Everything lies in a temporary folder that is removed at the end. The files were just
written, so that they are read from the page cache as far as memory goes: the hardest case for the ratios.

    python benchmarks/delta.py
    python benchmarks/delta.py --gigabytes 8 --folder /scratch
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from common import goal, machine, table

from ssrctl.checkpoints.reader import TensorReader
from ssrctl.io.tensor_writing import NewTensor, stored_bytes, write_header

GOAL_RSS_GIB = 2.0
CHANGED_FRAC = 0.01
HIDDEN = 2048
EMBEDDING_FRAC = 0.4  # one tensor far larger than the rest, as the embeddings of small models are
SHARDS = 4
PIECE = 2**22


def make_pair(folder: Path, gigabytes: float) -> tuple[Path, Path]:
    """Write a base and a tuned checkpoint, piece by piece."""
    rows = int(gigabytes * 1e9 / 2 / HIDDEN)
    embedding = int(rows * EMBEDDING_FRAC)
    layers = 4 * SHARDS
    shapes = {"model.embed_tokens.weight": (embedding, HIDDEN)}
    shapes |= {f"model.layers.{i}.mlp.up_proj.weight": ((rows - embedding) // layers, HIDDEN) for i in range(layers)}
    names = list(shapes)
    shards = [names[:1], *(names[1 + i :: SHARDS] for i in range(SHARDS))]
    generator = torch.Generator().manual_seed(0)
    sides = [folder / "base", folder / "tuned"]
    for side in sides:
        side.mkdir()
        (side / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    weight_map = {}
    for number, members in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = [NewTensor(name, torch.bfloat16, shapes[name]) for name in members]
        with (sides[0] / file).open("wb") as base, (sides[1] / file).open("wb") as tuned:
            for stream in (base, tuned):
                write_header(stream, tensors, {"format": "pt"})
            for tensor in tensors:
                weight_map[tensor.name] = file
                write_tensor(base, tuned, tensor.nbytes // 2, generator)
    for side in sides:
        (side / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sides[0], sides[1]


def write_tensor(base, tuned, numel: int, generator: torch.Generator) -> None:
    """Write random weights to ``base``, and the same ones except for 1% to ``tuned``."""
    for start in range(0, numel, PIECE):
        length = min(PIECE, numel - start)
        bits = torch.randint(-(2**15), 2**15, (length,), generator=generator, dtype=torch.int16)
        base.write(stored_bytes(bits))
        changed = torch.randint(length, (int(length * CHANGED_FRAC),), generator=generator)
        bits[changed] ^= 1
        tuned.write(stored_bytes(bits))


@dataclass(frozen=True)
class Run:
    """Time and memory of one process."""

    seconds: float
    peak_bytes: int


# The system's own count for a process, ru_maxrss, begins with what its parent had used; VmHWM does not.
MEASURED = """
import sys
from ssrctl.cli import main
code = main(sys.argv[1:])
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
sys.exit(code)
"""


def run(*words: str | Path) -> Run:
    """Run ``ssrctl`` in a process of its own and take its peak resident set (Linux)."""
    start = time.perf_counter()
    call = [sys.executable, "-c", MEASURED, *map(str, words), "--json"]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    return Run(time.perf_counter() - start, int(done.stderr.splitlines()[-1]) * 1024)


def plain_read(folders: list[Path]) -> float:
    """Time one read of all weights of the folders, in seconds."""
    buffer = bytearray(16 * 2**20)
    start = time.perf_counter()
    for folder in folders:
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass
    return time.perf_counter() - start


def plain_copy(folder: Path, target: Path) -> float:
    """Time a copy of all weights of a folder onto the disk, in seconds."""
    target.mkdir()
    start = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as source, (target / file.name).open("wb") as sink:
            shutil.copyfileobj(source, sink, 16 * 2**20)
            sink.flush()
            os.fsync(sink.fileno())
    return time.perf_counter() - start


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def same_weights(one: Path, other: Path) -> bool:
    """Return True if two checkpoints hold the same tensors, bit for bit."""
    with TensorReader(one) as a, TensorReader(other) as b:
        return (a.shapes, a.dtypes) == (b.shapes, b.dtypes) and all(
            torch.equal(x.view(torch.int16), y.view(torch.int16))
            for name in a.shapes
            for x, y in zip(a.pieces(name), b.pieces(name), strict=True)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of each of the two checkpoints")
    parser.add_argument("--folder", type=Path, default=None, help="where to make the temporary folder")
    args = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        base, tuned = make_pair(folder, args.gigabytes)
        delta, applied = folder / "d.safetensors", folder / "applied"
        reading = min(plain_read([base, tuned]) for _ in range(2))
        copying = plain_copy(base, folder / "copy")
        shutil.rmtree(folder / "copy")
        started = run("delta", "diff", "tiny-reasoner", "tiny-reasoner", "-o", folder / "nothing.safetensors")
        diff = run("delta", "diff", base, tuned, "-o", delta)
        apply = run("delta", "apply", base, delta, "-o", applied)
        assert same_weights(tuned, applied), "the round trip is not bit-exact"
        dense, sparse = weight_bytes(tuned), delta.stat().st_size
    rows = [["plain read of both", f"{reading:.2f}", "", "", ""], ["plain copy of one", f"{copying:.2f}", "", "", ""]]
    for what, one, peer in (("start-up alone", started, None), ("diff", diff, reading), ("apply", apply, copying)):
        work = one.seconds - started.seconds
        ratio = [f"{work:.2f}", f"{work / peer:.1f}x"] if peer else ["", ""]
        rows.append([f"ssrctl delta: {what}", f"{one.seconds:.2f}", *ratio, f"{one.peak_bytes / 2**30:.2f}"])
    print(f"two checkpoints of {dense / 1e9:.2f} GB, largest tensor {EMBEDDING_FRAC:.0%}, {CHANGED_FRAC:.0%} changed")
    print(table(["", "seconds", "less start-up", "to read/copy", "peak GiB"], rows))
    print(f"delta: {sparse / 1e6:.1f} MB, {sparse / dense:.2%} of the dense weights; round trip bit-exact")
    for what, one in (("diff", diff), ("apply", apply)):
        goal(f"peak resident GiB of delta {what}", one.peak_bytes / 2**30, at_most=GOAL_RSS_GIB)


if __name__ == "__main__":
    main()
