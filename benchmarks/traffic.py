"""Bytes and seconds of a training step's exchange between processes, against a dense all-reduce of the same model.

Processes on this machine, joined by gloo over the loopback device, whose own counter of bytes is read before and after;
what other programs send over it in the meantime is counted too, so the least of some repeats is taken. The seconds of
the kept gradients are those of packing, sending and unpacking; adding them up is part of a step in one process too. Each
question has five units of 1% of the weights (B = 5%), selected from real gradients of a random model, or of ``--model``.

    python benchmarks/traffic.py
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import goal, machine, table
from shapes import llama_135m

from ssrctl.core.claims import KeptQuestion
from ssrctl.core.kept_bytes import Numbering
from ssrctl.core.kronos import KronosOpt
from ssrctl.distributed.exchange import exchange_questions
from ssrctl.distributed.world import LONGEST_WAIT, World

BUDGET, UNITS, TOKENS = 0.05, 5, 64
LIMIT = 1 / 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vocab", type=int, default=49152, help="rows of the embedding of the random model")
    parser.add_argument("--model", help="a model's folder instead of the random one")
    given = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            worker, (str(Path(folder) / "store"), given), nprocs=given.processes, start_method="fork"
        )


def worker(rank: int, store: str, given: argparse.Namespace) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // given.processes))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=given.processes, timeout=LONGEST_WAIT
    )
    world = World(rank, given.processes)
    model = load(given)
    optimizer = KronosOpt(model.named_parameters(), lr=1e-3, max_step_budget=BUDGET / UNITS)
    numbering, weights = Numbering(optimizer.shards, torch.bfloat16), optimizer.num_coordinates
    kept = {n: question(model, optimizer, n) for n in range(given.questions) if n % given.processes == rank}
    share = next(iter(kept.values()))
    claimed = sum(unit.count for unit in share.units) / weights
    dense = [torch.randn_like(p) for p in model.parameters()]

    def exchange() -> None:
        for _ in exchange_questions(world, kept, numbering):
            pass

    def add_up() -> None:
        for _ in range(given.questions):
            optimizer.add_question(share)
        optimizer._pending.clear()

    def all_reduce() -> None:
        for tensor in dense:
            world.add_up(tensor)

    sparse_bytes, sparse_seconds = measured(exchange, world, given.repeats)
    dense_bytes, dense_seconds = measured(all_reduce, world, given.repeats)
    _, adding_seconds = measured(add_up, world, 1)
    if world.is_main:
        coordinates = given.questions * claimed * weights
        print(
            f"{weights / 1e6:.1f}M weights in bfloat16, {given.questions} questions that keep {claimed:.1%} each, "
            f"{given.processes} processes\n"
        )
        rows = [
            ("kept gradients, packed", f"{sparse_bytes / 2**20:.1f}", f"{sparse_seconds:.2f}"),
            ("dense all-reduce", f"{dense_bytes / 2**20:.1f}", f"{dense_seconds:.2f}"),
        ]
        print(table(("exchange", "MiB on the device", "seconds"), rows))
        sent = 8 * sparse_bytes / (given.processes - 1) / coordinates
        print(f"\nbits per kept coordinate: {sent:.1f}; on a network of less than {even(rows)} packing pays in seconds")
        print(f"adding up {given.questions} questions, which one process does too: {adding_seconds:.2f} s")
        goal("bytes of the kept gradients, of the dense all-reduce's", sparse_bytes / dense_bytes, at_most=LIMIT)
    world.wait()
    torch.distributed.destroy_process_group()


def even(rows: list[tuple[str, str, str]]) -> str:
    """Return the speed of a network on which the exchange, packing included, takes as long as a dense all-reduce."""
    (_, few, slow), (_, many, fast) = rows
    saved, more = float(many) - float(few), float(slow) - float(fast)
    return "any speed" if more <= 0 else f"{saved / more:.0f} MiB/s"


def measured(run: Callable[[], None], world: World, repeats: int) -> tuple[int, float]:
    """Return the fewest bytes over the loopback device, and the fewest seconds."""
    found = []
    for _ in range(repeats):
        world.wait()
        before, started = loopback_bytes(), time.perf_counter()
        run()
        world.wait()
        found.append((loopback_bytes() - before, time.perf_counter() - started))
        world.wait()
    return min(number for number, _ in found), min(seconds for _, seconds in found)


def loopback_bytes() -> int:
    """Return the bytes that the loopback device has received."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split(":")[1].split()[0])


def question(model: torch.nn.Module, optimizer: KronosOpt, number: int) -> KeptQuestion:
    """Return what a question of five units keeps of the model's gradients."""
    generator = torch.Generator().manual_seed(number)
    optimizer.begin_question(UNITS)
    for _ in range(UNITS):
        ids = torch.randint(0, model.config.vocab_size, (1, TOKENS), generator=generator)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.claim()
    return optimizer.close_question()


def load(given: argparse.Namespace) -> torch.nn.Module:
    if given.model is None:
        return llama_135m(torch.bfloat16, vocab_size=given.vocab)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
