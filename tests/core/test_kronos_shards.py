"""KronosOpt over shards: two processes with the rows of each parameter do what one with whole parameters does."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ssrctl.core.bits import bits_to_indices
from ssrctl.core.kronos import KronosOpt
from ssrctl.core.mask import BlockMask
from ssrctl.core.topk import NonFiniteGradient

SHAPES = {"a": (37, 5), "short": (1, 9), "b": (64,), "c": (20, 3, 4)}  # the one row of "short" is in the first process
CASES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adam": {"update_rule": "adam", "max_grad_norm": 0.5},
    "rms, by tensor": {"update_rule": "rms", "scope": "tensor"},
    "overlap": {"allocation": "overlap"},
    "pooled": {"allocation": "pooled"},
    "shuffled": {"allocation": "shuffled"},
}


def rows(tensor: torch.Tensor, rank: int | None) -> torch.Tensor:
    """Return the rows of one of two processes, as ``torch.chunk`` has them; all of them without a rank."""
    if rank is None:
        return tensor.clone()
    parts = tensor.chunk(2)
    return parts[rank].clone() if rank < len(parts) else tensor[:0].clone()


def protected(rank: int | None) -> BlockMask:
    generator = torch.Generator().manual_seed(1)
    dense = {name: torch.rand(shape, generator=generator) < 0.2 for name, shape in SHAPES.items()}
    return BlockMask.from_dense({name: rows(one, rank) for name, one in dense.items()})


def trained(case: str, rank: int | None) -> dict[str, Any]:
    """Train two steps on fixed gradients with many ties; return by parameter the sets, weights and state."""
    generator = torch.Generator().manual_seed(2)
    dtype = torch.float32 if case == "adam" else torch.bfloat16
    named = {
        name: torch.nn.Parameter(rows(torch.randn(shape, generator=generator).to(dtype), rank))
        for name, shape in SHAPES.items()
    }
    group = None if rank is None else dist.group.WORLD
    optimizer = KronosOpt(
        named.items(), 0.1, protected=protected(rank), max_step_budget=0.04, process_group=group, **CASES[case]
    )
    stats, sets = [], []
    for _, units in itertools.product(range(2), (3, 2)):
        optimizer.begin_question(units)
        for _ in range(units):
            if case == "rms, by tensor" and rank is None:  # it selects during a backward pass
                sum(
                    (named[n] * torch.randn(s, generator=generator).mul(4).round().to(dtype)).sum()
                    for n, s in SHAPES.items()
                ).backward()
            else:
                for name, shape in SHAPES.items():
                    named[name].grad = rows(torch.randn(shape, generator=generator).mul(4).round().to(dtype), rank)
            optimizer.claim()
        sets += [{n: s.to_indices() for n, s in unit.sets.items()} for unit in optimizer.end_question()]
        if units == 2:
            made = dataclasses.asdict(optimizer.step())
            assert made.pop("selection_recall") is None
            stats.append(made)
    return {
        "stats": stats,
        "counts": [optimizer.num_coordinates, optimizer.num_unprotected, optimizer.num_protected],
        "sets": [{n: one.get(n, torch.empty(0, dtype=torch.int64)) for n in SHAPES} for one in sets],
        "weights": {n: p.detach() for n, p in named.items()},
        "touched": {n: bits_to_indices(bits, named[n].numel()) for n, bits in optimizer.touched.items()},
        "state": {
            n: {k: v for k, v in optimizer.state_dict()["state"].get(place, {}).items() if k != "bits"}
            for place, n in enumerate(SHAPES)
        },
    }


def part(whole: dict[str, Any], rank: int) -> dict[str, Any]:
    """Return the part of one process of what ``trained`` returned for whole parameters."""
    found = {"stats": whole["stats"], "counts": whole["counts"], "sets": [], "touched": {}, "weights": {}, "state": {}}
    for name, shape in SHAPES.items():
        place = rows(torch.arange(torch.Size(shape).numel()).view(shape), rank).flatten()
        first, last = (int(place[0]), int(place[-1])) if place.numel() else (10**6, -1)
        found["weights"][name] = rows(whole["weights"][name], rank)
        mine = (whole["touched"][name] >= first) & (whole["touched"][name] <= last)
        found["touched"][name] = whole["touched"][name][mine] - first
        found["state"][name] = {k: v[mine] for k, v in whole["state"][name].items()} if bool(mine.any()) else {}
        for number, one in enumerate(whole["sets"]):
            if len(found["sets"]) <= number:
                found["sets"].append({})
            inside = (one[name] >= first) & (one[name] <= last)
            found["sets"][number][name] = one[name][inside] - first
    return found


def worker(rank: int, store: str, wanted: dict[str, dict[str, Any]]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {case: trained(case, rank) for case in wanted}
    torch.testing.assert_close(found, {c: part(w, rank) for c, w in wanted.items()}, rtol=0, atol=0)
    named = {"w": torch.nn.Parameter(torch.ones(6))}
    optimizer = KronosOpt(named.items(), 0.1, budget=1.0, max_step_budget=1.0, process_group=dist.group.WORLD)
    named["w"].grad = torch.full((6,), torch.inf if rank else 1.0)
    with pytest.raises(NonFiniteGradient, match="the gradient of w has 6 values"):
        optimizer.step()
    optimizer.zero_grad()
    for _ in range(2):  # each finite, their sum is not
        optimizer.begin_question(1)
        named["w"].grad = torch.full((6,), 3e38 if rank else 1.0)
        optimizer.claim()
    with pytest.raises(NonFiniteGradient, match="the gradient of w has 6 values"):
        optimizer.step()
    dist.destroy_process_group()


def test_two_processes_claim_and_change_what_one_would() -> None:
    wanted = {case: trained(case, None) for case in CASES}
    for whole in wanted.values():
        assert sum(found.numel() for found in whole["touched"].values()) > 20
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            worker, (str(Path(folder) / "store"), wanted), nprocs=2, start_method="fork"
        )


def test_shards_need_exact_selection_without_reuse() -> None:
    named = {"w": torch.nn.Parameter(torch.ones(6))}.items()
    for odd in ({"selection": "block"}, {"reuse_factor": 2.0}):
        with pytest.raises(ValueError, match="exact selection and no reuse_factor"):
            KronosOpt(named, 0.1, process_group=object(), **odd)  # type: ignore[arg-type]
