"""Optimizer state of only the touched coordinates: memory and time per step of four structures.

A tensor of the size of SmolLM2-135M's embedding. Some share of its coordinates was touched before; a step
touches 1% of them, half old and half new where there are enough old ones, and adds to an fp32 first and second
moment and a 16-bit remainder. Structures:

- bits+rank: ``ssrctl.core.sparse_state``, what KronosOpt uses
- index: ascending int32 indices of the touched coordinates, merged with ``searchsorted``
- pages: 256 neighbouring coordinates get state as soon as one of them is touched; a table of int32 finds them
- dense: state for every coordinate

    python benchmarks/state_bookkeeping.py [--numel 28311552] [--repeats 3]
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from common import goal, machine, table
from torch import Tensor

from ssrctl.core.sparse_state import SparseState

FIELDS = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32, "remainder": torch.int16}
PAYLOAD = 10  # bytes of one coordinate's fields
PAGE = 256


class BitsAndRank(SparseState):
    def __init__(self, numel: int) -> None:
        super().__init__(numel, FIELDS)

    def place(self, indices: Tensor) -> Tensor:
        return self.insert(indices)[0]


class SortedIndex:
    def __init__(self, numel: int) -> None:
        self.index = torch.empty(0, dtype=torch.int32)
        self.fields = {name: torch.empty(0, dtype=dtype) for name, dtype in FIELDS.items()}

    @property
    def num_bytes(self) -> int:
        return (4 + PAYLOAD) * self.index.numel()

    def place(self, indices: Tensor) -> Tensor:
        narrow = indices.to(torch.int32)
        found = torch.searchsorted(self.index, narrow)
        known = torch.zeros(indices.numel(), dtype=torch.bool)
        if self.index.numel():
            known = self.index[found.clamp(max=self.index.numel() - 1)] == narrow
        positions = found + (~known).cumsum(0) - (~known).long()
        total = self.index.numel() + int((~known).sum())
        old = torch.ones(total, dtype=torch.bool)
        old[positions[~known]] = False
        merged = torch.empty(total, dtype=torch.int32).masked_scatter_(old, self.index)
        merged[positions] = narrow
        self.index = merged
        for name, values in self.fields.items():
            self.fields[name] = values.new_zeros(total).masked_scatter_(old, values)
        return positions


class Pages:
    def __init__(self, numel: int) -> None:
        self.slot = torch.full((-(-numel // PAGE),), -1, dtype=torch.int32)
        self.fields = {name: torch.empty(0, dtype=dtype) for name, dtype in FIELDS.items()}

    @property
    def num_bytes(self) -> int:
        return 4 * self.slot.numel() + PAYLOAD * self.fields["remainder"].numel()

    def place(self, indices: Tensor) -> Tensor:
        page = indices >> 8
        absent = torch.unique_consecutive(page[self.slot[page] < 0])
        used = self.fields["remainder"].numel() // PAGE
        self.slot[absent] = torch.arange(used, used + absent.numel(), dtype=torch.int32)
        for name, values in self.fields.items():
            self.fields[name] = torch.cat([values, values.new_zeros(absent.numel() * PAGE)])
        return (self.slot[page].long() << 8) + (indices & 255)


class Dense:
    def __init__(self, numel: int) -> None:
        self.fields = {name: torch.zeros(numel, dtype=dtype) for name, dtype in FIELDS.items()}

    @property
    def num_bytes(self) -> int:
        return PAYLOAD * self.fields["remainder"].numel()

    def place(self, indices: Tensor) -> Tensor:
        return indices


STRUCTURES: dict[str, Callable[[int], BitsAndRank | SortedIndex | Pages | Dense]] = {
    "bits+rank": BitsAndRank,
    "index": SortedIndex,
    "pages": Pages,
    "dense": Dense,
}


def random_order(numel: int, generator: torch.Generator) -> Tensor:
    """Return all coordinates in the order in which they are first touched."""
    return torch.randperm(numel, generator=generator)


def clustered_order(numel: int, generator: torch.Generator) -> Tensor:
    """Order coordinates by random pages: half of each page's coordinates, then the other halves."""
    pages = torch.randperm(numel // PAGE, generator=generator)
    coordinates = (pages.unsqueeze(1) * PAGE + torch.arange(PAGE)).flatten()
    half = torch.rand(coordinates.numel(), generator=generator) < 0.5
    return torch.cat([coordinates[half], coordinates[~half]])


def update(state: BitsAndRank | SortedIndex | Pages | Dense, indices: Tensor, values: Tensor) -> None:
    """Take one step: find or make the coordinates' places, then read and write every field there."""
    positions = state.place(indices)
    for name, dtype in FIELDS.items():
        state.fields[name][positions] = (state.fields[name][positions] + values).to(dtype)


def seconds_of_a_step(
    state: BitsAndRank | SortedIndex | Pages | Dense, indices: Tensor, values: Tensor, repeats: int
) -> float:
    """Return the best time of some steps, each from the same state."""
    best = float("inf")
    for _ in range(repeats):
        fresh = copy.deepcopy(state)
        start = time.perf_counter()
        update(fresh, indices, values)
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=49152 * 576)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    numel = arguments.numel // PAGE * PAGE
    print(machine())
    print(f"{numel / 1e6:.1f}M coordinates, a step touches 1%; {PAYLOAD} bytes of a touched coordinate are its fields")
    generator = torch.Generator().manual_seed(0)
    k, rows, beyond_fields = numel // 100, [], 0.0
    for spread, make_order in (("random", random_order), ("clustered", clustered_order)):
        order = make_order(numel, generator)
        for density in (0.001, 0.01, 0.1, 0.4):
            touched = int(numel * density)
            num_old = min(k // 2, touched)
            old = order[torch.randperm(touched, generator=generator)[:num_old]]
            indices = torch.cat([old, order[touched : touched + k - num_old]]).sort().values
            values = torch.rand(k, generator=generator)
            before = order[:touched].sort().values
            row: list[object] = [spread, f"{density:.1%}"]
            seconds = {}
            for name, make in STRUCTURES.items():
                state = make(numel)
                state.place(before)
                row.append(f"{state.num_bytes / touched:.1f}")
                seconds[name] = seconds_of_a_step(state, indices, values, arguments.repeats)
                if name == "bits+rank":
                    beyond_fields = max(beyond_fields, (state.num_bytes - numel / 8) / touched - PAYLOAD)
            rows.append(row + [f"{1e3 * seconds[name]:.1f}" for name in STRUCTURES])
    header = ["touched", "density", *(f"{n} B" for n in STRUCTURES), *(f"{n} ms" for n in STRUCTURES)]
    print("bytes per touched coordinate (fields and bookkeeping), and milliseconds of one step")
    print(table(header, rows))
    goal(
        "bytes of a 16-bit remainder per touched coordinate, beside one bit per coordinate",
        2 + beyond_fields,
        at_most=3,
    )


if __name__ == "__main__":
    main()
