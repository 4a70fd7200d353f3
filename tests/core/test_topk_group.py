"""Selection over shards in two processes, compared with one process that holds everything."""

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from reference import selection

from ssrctl.core import topk, topk_plain
from ssrctl.core.bits import bits_from_indices
from ssrctl.core.topk import NonFiniteGradient, select_topk

NUM_PROCESSES = 2
CASES = ["counted", "sampled", "misled", "ties", "more than there are", "an empty shard"]


def shards(case):
    """(gradients, taken indices) of every process, and k."""
    generator = torch.Generator().manual_seed(CASES.index(case))
    made = []
    for rank in range(NUM_PROCESSES):
        gradients = {
            "a": torch.randn(211, 3, generator=generator),
            "b": torch.randn(400 + 100 * rank, generator=generator).bfloat16(),
        }
        if case == "ties":
            gradients = {name: torch.ones_like(g) for name, g in gradients.items()}
        if case == "an empty shard" and rank == 0:
            gradients = {name: g[:0] for name, g in gradients.items()}
        made.append((gradients, {name: set(range(rank, g.numel(), 3)) for name, g in gradients.items()}))
    return made, {"ties": 700, "more than there are": 10**6}.get(case, 120)


def bits(gradients, taken):
    return {
        n: bits_from_indices(torch.tensor(sorted(i), dtype=torch.int64), gradients[n].numel()) for n, i in taken.items()
    }


def expected(case):
    """By rank and name, the part of what one process selects that holds each tensor's rows of all ranks."""
    made, k = shards(case)
    names = list(made[0][0])
    whole = {name: torch.cat([gradients[name] for gradients, _ in made]) for name in names}
    before = {name: [0, made[0][0][name].numel()] for name in names}
    taken = {n: {i + before[n][rank] for rank, (_, t) in enumerate(made) for i in t[n]} for n in names}
    slow = selection.select(whole, k, taken)
    assert {n: i.tolist() for n, i in select_topk(whole, k, bits(whole, taken)).items()} == slow
    parts = {}
    for rank, (gradients, _) in enumerate(made):
        for n in names:
            ours = [i - before[n][rank] for i in slow[n]]
            parts[f"{rank} {n}"] = [i for i in ours if 0 <= i < gradients[n].numel()]
    return parts


def worker(rank, store, wanted):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=NUM_PROCESSES)
    group = dist.group.WORLD
    topk_plain.CHUNK = 64
    for case in CASES:
        topk.SAMPLED_FROM = 1 if case in ("sampled", "misled") else 10**9
        topk.SAMPLE, topk.MARGIN = 300, -4.0 if case == "misled" else 5.0
        made, k = shards(case)
        gradients, taken = made[rank]
        found = select_topk(gradients, k, bits(gradients, taken), process_group=group)
        assert {f"{rank} {n}": i.tolist() for n, i in found.items()} == {
            n: i for n, i in wanted[case].items() if n.startswith(str(rank))
        }, case
    broken = torch.ones(50)
    broken[: 7 * rank] = float("nan")
    with pytest.raises(NonFiniteGradient, match="the gradient of w has 7 values"):
        select_topk({"w": broken}, 2, process_group=group)
    dist.destroy_process_group()


def test_two_processes_select_what_one_would():
    wanted = {case: expected(case) for case in CASES}
    # of 700 equal ones, the 422 of the first tensor that are free in the first process and 278 in the second
    assert {name: len(i) for name, i in wanted["ties"].items()} == {"0 a": 422, "1 a": 278, "0 b": 0, "1 b": 0}
    with tempfile.TemporaryDirectory() as folder:
        arguments = (str(Path(folder) / "store"), wanted)
        torch.multiprocessing.start_processes(worker, arguments, nprocs=NUM_PROCESSES, start_method="fork")
