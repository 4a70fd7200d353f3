"""Size of a delta, and time to write and read it, in each form; next to a copy of the model and an xor of its file.

Changes the weights of a model as sparse training does: the largest of clustered gradients |a_i b_j x| (log-normal row and
column scales, normal x), each moved by a multiple of its gradient from a float32 master value and rounded to bfloat16, until
the wanted share of the stored values differs. Then, for each share, writes and reads

- the whole model, as bytes (``cp``);
- the plain form: int32 indices and values;
- the small form: packed gaps and steps (``ssrctl.io.packed_numbers``);
- zstd (level 1) of the xor of the two files, which needs no indices.

Reading is onto the base in memory, and every form must give the same bits. The second table compares the codings that the
small form could have used, without files. CPU seconds are the best of some repeats; the disk is waited for in wall seconds.

    python benchmarks/delta_size.py --model SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import zstandard
from common import goal, machine, table
from safetensors.torch import load_file
from torch import Tensor

from ssrctl.checkpoints.delta import Delta, DeltaFile, apply_delta, save_delta
from ssrctl.io.artifacts import ModelIdentity
from ssrctl.io.packed_numbers import IndexPacker, StepPacker

SHARES = (0.0045, 0.045, 0.187)
CANDIDATES = 4  # gradients that are looked at, per weight that is to change
SMALLEST_STEP = 2e-4  # of the kept gradients: near a unit in the last place of a typical weight
BASE = ModelIdentity(name="base", revision=None, fingerprint="xxh3:base")
Weights = dict[str, Tensor]


def made_weights(numel: int) -> Weights:
    """Draw matrices of normal weights."""
    rows = numel // (16 * 1024)
    generator = torch.Generator().manual_seed(0)
    return {f"layers.{i}.weight": (torch.randn(rows, 1024, generator=generator) * 0.05).bfloat16() for i in range(16)}


def changed(base: Weights, share: float) -> Delta:
    """Move the weights with the largest drawn gradients, until a share of each tensor differs."""
    generator = torch.Generator().manual_seed(1)
    changes, before = {}, {}
    for name, weight in base.items():
        rows, columns = weight.shape if weight.dim() == 2 else (1, weight.numel())
        a, b = (torch.randn(size, generator=generator).exp() for size in (rows, columns))
        gradient = (a[:, None] * b * torch.randn(rows, columns, generator=generator)).flatten()
        wanted = int(share * weight.numel())
        if not wanted:
            continue
        size = gradient.abs()
        candidates = size.topk(min(weight.numel(), CANDIDATES * wanted)).indices
        old = weight.flatten()[candidates]
        new = (old.float() - gradient[candidates] * (SMALLEST_STEP / size[candidates[wanted - 1]])).bfloat16()
        kept = (new.view(torch.int16) != old.view(torch.int16)).nonzero().flatten()[:wanted]
        order = candidates[kept].sort()
        kept = kept[order.indices]
        if not len(kept):
            continue
        changes[name], before[name] = (order.values, new[kept]), old[kept]
    return Delta(BASE, {name: tuple(tensor.shape) for name, tensor in base.items()}, changes, before)


@dataclass(frozen=True)
class Cost:
    """CPU and wall seconds of the best of some repeats."""

    cpu: float
    wall: float

    def __str__(self) -> str:
        return f"{self.cpu:.2f} ({self.wall:.2f})"


def cost(run: Callable[[], object], repeats: int) -> Cost:
    found = []
    for _ in range(repeats):
        cpu, wall = time.process_time(), time.perf_counter()
        run()
        found.append((time.process_time() - cpu, time.perf_counter() - wall))
    return Cost(min(cpu for cpu, _ in found), min(wall for _, wall in found))


def whole_bytes(weights: Weights) -> np.ndarray:
    return torch.cat([tensor.flatten().view(torch.uint8) for tensor in weights.values()]).numpy()


def write(path: Path, data: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def copy(source: Path, target: Path) -> None:
    with source.open("rb") as one, target.open("wb") as other:
        shutil.copyfileobj(one, other, 16 * 2**20)
        other.flush()
        os.fsync(other.fileno())


def files(base: Weights, delta: Delta, folder: Path, repeats: int) -> list[tuple[str, int, Cost, Cost]]:
    """Return (form, bytes, cost of writing, cost of reading onto the base) of each form."""
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    for name, (indices, values) in delta.changes.items():
        tuned[name].view(-1)[indices] = values
    ours, theirs = whole_bytes(base), whole_bytes(tuned)
    model, rows = folder / "model", []
    write(model, theirs.data)
    writing = cost(lambda: copy(model, folder / "copy"), repeats)
    reading = cost(lambda: np.fromfile(folder / "copy", np.uint8), repeats)
    rows.append(("copy of the model", model.stat().st_size, writing, reading))
    for form, one in (("plain", replace(delta, before=None)), ("small", delta)):
        path = folder / form
        room = {name: tensor.clone() for name, tensor in base.items()}
        writing = cost(lambda path=path, one=one: save_delta(path, one), repeats)

        def read(path: Path = path, room: Weights = room) -> None:
            apply_delta(DeltaFile(path), room, BASE.fingerprint)

        first = cost(read, 1)
        assert np.array_equal(whole_bytes(room), theirs), f"{form} is not bit-exact"
        again = []
        for _ in range(repeats - 1):
            for name, tensor in base.items():
                room[name].copy_(tensor)
            again.append(cost(read, 1))
        reading = Cost(min(c.cpu for c in (first, *again)), min(c.wall for c in (first, *again)))
        rows.append((form, path.stat().st_size, writing, reading))
    packed = folder / "xor"
    writing = cost(lambda: write(packed, zstandard.ZstdCompressor(level=1).compress(ours ^ theirs)), repeats)
    unpack = zstandard.ZstdDecompressor()
    reading = cost(lambda: ours ^ np.frombuffer(unpack.decompress(packed.read_bytes()), np.uint8), repeats)
    rows.append(("zstd of the xor", packed.stat().st_size, writing, reading))
    return rows


def codings(delta: Delta) -> list[tuple[str, int, float]]:
    """Return (coding, bytes, CPU seconds) of gaps and of values, each compressed by zstd, of all tensors."""
    zstd = zstandard.ZstdCompressor(level=1).compress
    assert delta.before is not None
    found: dict[str, tuple[int, float]] = {}

    def add(coding: str, run: Callable[[], bytes]) -> None:
        start = time.process_time()
        size, seconds = len(run()), time.process_time() - start
        before = found.get(coding, (0, 0.0))
        found[coding] = (before[0] + size, before[1] + seconds)

    for name, (indices, values) in delta.changes.items():
        gaps = np.diff(indices.numpy(), prepend=-1) - 1
        new, old = (one.view(torch.int16).numpy() for one in (values, delta.before[name]))
        steps = new - old
        zigzag = ((steps << 1) ^ (steps >> 15)).view(np.uint16)
        one, other = IndexPacker(2**31), StepPacker(values.dtype)
        add("gaps: byte and escape (small form)", lambda i=indices, p=one: p.add(i) + p.finish())
        add("gaps: LEB128 varints", lambda g=gaps: zstd(leb128(g)))
        add(
            "steps: byte and escape (small form)",
            lambda v=values, b=delta.before[name], p=other: p.add(v, b) + p.finish(),
        )
        add("steps: LEB128 varints", lambda z=zigzag: zstd(leb128(z)))
        add("xor with the base: byte planes", lambda x=new ^ old: zstd(planes(x)))
        add("values: byte planes (no base needed)", lambda x=new: zstd(planes(x)))
    return [(coding, *figures) for coding, figures in found.items()]


def planes(numbers: np.ndarray) -> bytes:
    """Return the lowest bytes of all numbers, then the next ones."""
    return numbers.view(np.uint8).reshape(len(numbers), -1).T.tobytes()


def leb128(numbers: np.ndarray) -> bytes:
    """Return varints of seven bits a byte, the top bit set in all bytes but the last."""
    numbers = numbers.astype(np.uint64)
    lengths = np.ones(len(numbers), np.int64)
    for bits in range(7, 64, 7):
        lengths += (numbers >> np.uint64(bits)) != 0
    starts = lengths.cumsum() - lengths
    out = np.empty(int(lengths.sum()), np.uint8)
    for place in range(int(lengths.max(initial=0))):
        long = lengths > place
        low = ((numbers[long] >> np.uint64(7 * place)) & np.uint64(127)).astype(np.uint8)
        out[starts[long] + place] = low | np.where(lengths[long] > place + 1, 128, 0).astype(np.uint8)
    return out.tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="folder with model.safetensors in bfloat16; drawn weights without it"
    )
    parser.add_argument("--weights", type=int, default=2**27, help="number of drawn weights")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to make the temporary folder")
    args = parser.parse_args()
    print(machine())
    base = load_file(args.model / "model.safetensors") if args.model else made_weights(args.weights)
    numel = sum(tensor.numel() for tensor in base.values())
    dense = 2 * numel
    for share in SHARES:
        delta = changed(base, share)
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows = files(base, delta, Path(folder), args.repeats)
        print(f"\n{delta.count:,} of {numel:,} weights changed ({delta.count / numel:.2%}); seconds: CPU (wall)")
        listed = [[form, f"{size / 1e6:.2f}", f"{size / dense:.2%}", one, other] for form, size, one, other in rows]
        print(table(["", "MB", "of the model", "write", "read"], listed))
        of = {form: (size, one, other) for form, size, one, other in rows}
        for verb, place in (("write", 1), ("read", 2)):
            ratio = of["small"][place].wall / of["copy of the model"][1].wall
            goal(f"small form, wall seconds to {verb} in copies of the model", ratio, at_most=1)
        compared = codings(delta)
        rows = [[c, f"{size / delta.count:.3f}", f"{size / dense:.2%}", f"{s:.2f}"] for c, size, s in compared]
        print("\n" + table(["coding, then zstd", "bytes per change", "of the model", "CPU s"], rows))
        sizes = {coding: size for coding, size, _ in compared}
        ours, varints = (sum(size for one, size in sizes.items() if form in one) for form in ("escape", "LEB128"))
        goal("small form, bytes in those of LEB128 varints and zstd", ours / varints, at_most=1)


if __name__ == "__main__":
    main()
