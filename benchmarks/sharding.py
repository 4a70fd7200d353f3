"""Memory of a process that updates a sharded model, against one that has the whole model, and the bytes that it sends.

Processes on this machine, joined by gloo over the loopback device, whose counter of bytes is read; what other programs send
in the meantime is counted too, so the least of some repeats is taken. One question of random tokens goes forward once and
backward for each of its units, claims, and is applied. Memory is the resident set beyond that before the model was built,
its peak counted from after the loading (where a process holds the whole model for a while). Activations are divided too.

    python benchmarks/sharding.py --processes 4
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import goal, machine, table
from shapes import llama_135m, random_question
from traffic import loopback_bytes

from ssrctl.configs import TrainConfig
from ssrctl.distributed.sharding import ShardedModel
from ssrctl.distributed.traffic import sharded_bytes_sent
from ssrctl.distributed.world import LONGEST_WAIT, World
from ssrctl.training.checkpointing import outer_layers
from ssrctl.training.unit_gradients import trainable, unit_gradients
from ssrctl.training.updaters import make_updater

RESPONSES, PROMPT, TOKENS, UNITS = 8, 32, 96, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=49152, help="rows of the embedding")
    given = parser.parse_args()
    print(machine())
    found = {}
    for sharded in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            queue = torch.multiprocessing.get_context("fork").SimpleQueue()
            arguments = (str(Path(folder) / "store"), given, sharded, queue)
            torch.multiprocessing.start_processes(
                worker, arguments, nprocs=given.processes if sharded else 1, start_method="fork"
            )
            found[sharded] = queue.get()
    whole, shard = found[False], found[True]
    rows = [
        (name, *(f"{one[key] / 2**20:.0f}" for one in (whole, shard)))
        for name, key in (("weights, after loading", "loaded"), ("with bits and state, after a step", "kept"),
                          ("peak of the step", "peak"))
    ]  # fmt: skip
    print(
        f"\n{whole['weights'] / 1e6:.1f}M weights in bfloat16, {RESPONSES} responses of {PROMPT} + {TOKENS} tokens, {UNITS} units\n"
    )
    print(table(("MiB per process", "whole model", f"a shard of {given.processes}"), rows))
    formula = sharded_bytes_sent(
        whole["weights"], itemsize=2, questions=1, units=UNITS, sampling_passes=0, processes=given.processes
    )
    each = shard["bytes"] / given.processes
    print(
        f"\nsent per process: {each / 2**20:.0f} MiB; by the formula of --dry-run {formula / 2**20:.0f}, and with gloo, which "
        f"scatters sums by an all-reduce, {formula * (1 + 3 * UNITS) / (1 + 2 * UNITS) / 2**20:.0f}"
    )
    print(
        f"seconds: {whole['seconds']:.1f} alone, {shard['seconds']:.1f} in {given.processes} processes on these cores"
    )
    goal("peak of a shard, of the whole model's", shard["peak"] / whole["peak"], at_most=2 / given.processes)


def worker(rank: int, store: str, given: argparse.Namespace, shards: bool, queue: object) -> None:
    torch.set_num_threads(1)
    size = given.processes if shards else 1
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=LONGEST_WAIT
    )
    world = World(rank, size)
    import transformers.models.llama.modeling_llama  # noqa: F401 (it takes memory of its own)

    before = resident()
    sharded = None
    for turn in range(size):
        if turn == rank:
            model = llama_135m(torch.bfloat16, vocab_size=given.vocab).eval()
            if shards:
                sharded = ShardedModel(model, outer_layers(model), world)
        world.wait()
    if sharded is not None:
        sharded.begin()
    weights = sum(parameter.numel() for parameter in model.parameters())
    config = TrainConfig(budget=0.05, max_step_budget=0.01)
    updater = make_updater(trainable(model), config, sharded=sharded)
    gc.collect()
    loaded = resident() - before
    reset_peak()
    seconds, sent = [], []
    for repeat in range(given.repeats):
        batch, units = random_question(
            model, responses=RESPONSES, prompt=PROMPT, tokens=TOKENS, units=UNITS, logprob=-10.8, seed=repeat
        )
        world.wait()
        start, bytes_before = time.perf_counter(), loopback_bytes()
        share = None if sharded is None else sharded.share([TOKENS] * RESPONSES)
        settings = {"method": "kept", "share": share, "on_unit": updater.before_unit}
        updater.add_question(unit_gradients(model, batch, units, **settings))
        updater.step()
        world.wait()
        seconds.append(time.perf_counter() - start)
        sent.append(loopback_bytes() - bytes_before)
    if world.is_main:
        gc.collect()
        queue.put(
            {"loaded": loaded, "kept": resident() - before, "peak": peak() - before, "seconds": min(seconds),
             "bytes": min(sent), "weights": weights}
        )  # fmt: skip
    world.wait()
    torch.distributed.destroy_process_group()


def resident() -> int:
    """Return the bytes of this process's resident set."""
    return status("VmRSS")


def peak() -> int:
    """Return the largest resident set since ``reset_peak``."""
    return status("VmHWM")


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    # freed tensors go back to the system at once, so that the resident set is what is in use
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        small = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **small})
    main()
