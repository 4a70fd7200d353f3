"""CPU time of rank, spectrum and landing of single weight matrices, and of an 8B pair by their sum.

Each shape is a random bfloat16 matrix and an update of a thousandth of its norm, measured as `ssrctl diagnose` measures
a pair, on one thread and once, since the parts are minutes of BLAS and LAPACK. The peer is one `torch.linalg.eigh` of a
Gram matrix of the larger side, in float64: whoever compares singular vectors before and after needs two. The 8B pair has
the matrices of Llama-3.1-8B; its embedding and head follow by the cost of a row, without landing.

    python benchmarks/diagnose_matrices.py
    python benchmarks/diagnose_matrices.py --device cuda
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from common import goal, machine, table

from ssrctl.checkpoints.pairs import Checkpoint, Comparison, TensorPair
from ssrctl.configs import DiagnoseConfig
from ssrctl.measures.landing import LandingMeasure
from ssrctl.measures.rank import RankMeasure
from ssrctl.measures.spectrum import SpectrumMeasure

GOAL_HOURS = 3
NAME = "model.layers.0.mlp.down_proj.weight"
SQUARE, WIDE, NARROW = (4096, 4096), (4096, 14336), (1024, 4096)
COUNTS = {SQUARE: 64, WIDE: 96, NARROW: 64}
EMBEDDINGS, VOCABULARY = 2, 128256


class InMemory:
    """One tensor, as a `TensorReader` gives it to measures of whole tensors."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensors = {NAME: tensor}
        self.shapes, self.dtypes = {NAME: tuple(tensor.shape)}, {NAME: tensor.dtype}

    def tensor(self, name: str) -> torch.Tensor:
        """Return the tensor."""
        return self.tensors[name]

    def same_bytes(self, name: str, other: object) -> bool:
        """Return False: the two sides differ."""
        return False


def costs(shape: tuple[int, int], device: str) -> dict[str, float]:
    """Return the CPU seconds of each measure of one matrix, on a GPU the seconds."""
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)
    moved = torch.randn(shape, generator=generator) * 2e-5
    readers = [InMemory(base), InMemory((base.float() + moved).to(torch.bfloat16))]
    comparison = Comparison(readers[0], [Checkpoint("tuned", readers[1], False)], [NAME], [])
    config = DiagnoseConfig(paths=[Path("base"), Path("tuned")], device=device)
    pair = TensorPair(comparison, comparison.tuned[0], NAME)
    found = {}
    clock = time.process_time if device == "cpu" else time.perf_counter
    for measure in (RankMeasure, SpectrumMeasure, LandingMeasure):
        start = clock()
        measure(comparison, config).tensor(pair)
        found[measure.name] = clock() - start
    return found


def peer(side: int, device: str) -> float:
    """Return the same for one decomposition of a Gram matrix."""
    matrix = torch.randn(side, side, dtype=torch.float64, device=device)
    matrix = matrix.T @ matrix
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    torch.linalg.eigh(matrix)[0].sum().item()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu", help="as of `ssrctl diagnose`")
    parser.add_argument("--side", type=int, default=4096, help="smaller side of the matrices; 4096 is the 8B model's")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    scale = args.side / 4096
    shapes = {one: (round(one[0] * scale), round(one[1] * scale)) for one in COUNTS}
    if args.device != "cpu":
        costs((256, 256), args.device)  # starts the libraries
    found = {one: costs(shape, args.device) for one, shape in shapes.items()}
    one_eigh = peer(args.side, args.device)
    rows = []
    for one, shape in shapes.items():
        total = sum(found[one].values())
        parts = [f"{found[one][name]:.1f}" for name in ("rank", "spectrum", "landing")]
        rows.append(["x".join(map(str, shape)), *parts, f"{total:.1f}", f"{total / one_eigh:.2f}"])
    print(table(["matrix", "rank", "spectrum", "landing", "seconds", "of one eigh"], rows))
    print(f"one eigh of {args.side} by {args.side}, float64: {one_eigh:.1f} s")
    if args.side != 4096:
        return
    without = {one: found[one]["rank"] + found[one]["spectrum"] for one in (SQUARE, WIDE)}
    per_row = (without[WIDE] - without[SQUARE]) / (WIDE[1] - SQUARE[1])
    seconds = sum(number * sum(found[one].values()) for one, number in COUNTS.items())
    seconds += EMBEDDINGS * (without[SQUARE] + per_row * (VOCABULARY - SQUARE[1]))
    goal(f"hours of an 8B pair on one {'core' if args.device == 'cpu' else 'GPU'}", seconds / 3600, at_most=GOAL_HOURS)


if __name__ == "__main__":
    main()
