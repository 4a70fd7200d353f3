"""Bytes and seconds of a push of changes to a vLLM server, next to a push of all weights and to finding changes by a diff.

Needs a running server: ssrctl serve-rollouts --model MODEL --dtype bfloat16 --python VLLM/bin/python

Goal: a push of the coordinates that a step of KronosOpt changed takes at most 1/20 of the model's bytes. The peers, in the
same run: a push of all weights, vLLM's reload from disk, and a snapshot of the model with a diff, as trainers do that update
densely.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import goal, machine

from ssrctl.checkpoints.delta import changed_indices
from ssrctl.checkpoints.stored_tensors import StoredTensors
from ssrctl.configs import ModelConfig, SamplingConfig
from ssrctl.configs.engines import RolloutOptions
from ssrctl.core.kronos import KronosOpt
from ssrctl.models.loading import folder_of, load_model
from ssrctl.sampling.engines.base import Changes
from ssrctl.sampling.engines.vllm_engine import VllmServerEngine
from ssrctl.training.updaters.base import values_at

LIMIT = 1 / 20


def timed(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """Return (wall seconds, CPU seconds of this process, result)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def stepped(model: torch.nn.Module, share: float, lr: float, seed: int) -> tuple[Changes, dict[str, torch.Tensor]]:
    """Take one step of KronosOpt on random gradients; return the coordinates whose bits changed, and the values before."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = KronosOpt(model.named_parameters(), lr=lr, budget=share, max_step_budget=share)
    optimizer.begin_question(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.grad = (noise * noise.abs()).to(parameter.dtype)  # a few large ones
    optimizer.claim()
    optimizer.end_question()
    named = dict(model.named_parameters())
    places = optimizer.pending
    before = values_at(named, places)
    optimizer.step()
    after = values_at(named, places)
    changed = {name: changed_indices(before[name][1], after[name][1]) for name in before}
    changed = {name: kept for name, kept in changed.items() if kept.numel()}
    return (
        {name: (after[name][0][kept], after[name][1][kept]) for name, kept in changed.items()},
        {name: before[name][1][kept] for name, kept in changed.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-reasoner")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.05])
    parser.add_argument("--lr", type=float, default=3e-2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(machine())
    config = ModelConfig(model=args.model, dtype=args.dtype)
    loaded = load_model(config)
    options = RolloutOptions(rollout_engine="vllm-server", rollout_server_url=[args.url])
    stored = StoredTensors.of(folder_of(config), loaded.shapes())
    engine = VllmServerEngine(loaded, args.model, SamplingConfig(), options, stored)
    engine.connect()
    full = statistics.median(timed(lambda: engine.push(None))[0] for _ in range(args.repeats))
    reload = statistics.median(
        timed(lambda: engine.servers[0].post("/collective_rpc", {"method": "reload_weights"}))[0]
        for _ in range(args.repeats)
    )
    engine.push(None)
    print(f"{args.model}, {args.dtype}, {engine.full_bytes} bytes; push of all weights {full:.2f} s, ", end="")
    print(f"vLLM's reload from disk {reload:.2f} s (medians of {args.repeats})")
    snapshot = {name: parameter.detach().clone() for name, parameter in loaded.model.named_parameters()}
    print(
        f"{'selected':>9} {'changed':>9} {'bytes':>12} {'of all':>8} {'push, s':>8} {'ours, CPU s':>12} {'diff, CPU s':>12}"
    )
    for share in args.shares:
        rows = []
        for seed in range(args.repeats):
            changes, before = stepped(loaded.model, share, args.lr, seed)
            wall, cpu, done = timed(lambda new=changes, old=before: engine.push(new, old))  # type: ignore[misc]
            assert done.kind == "changes", done
            named = dict(loaded.model.named_parameters())
            _, diff, found = timed(lambda named=named: {n: changed_indices(snapshot[n], p) for n, p in named.items()})  # type: ignore[misc]
            assert sum(one.numel() for one in found.values()) == done.num_coordinates
            for name, (places, values) in changes.items():
                snapshot[name].view(-1)[places] = values
            rows.append((done.num_coordinates, done.num_bytes, wall, cpu, diff))
        count, sent, wall, cpu, diff = (statistics.median(column) for column in zip(*rows, strict=True))
        print(
            f"{share:>9.1%} {count / loaded.num_parameters:>9.2%} {sent:>12.0f} {sent / engine.full_bytes:>8.2%} {wall:>8.2f} "
            f"{cpu:>12.3f} {diff:>12.3f}"
        )
        goal(f"bytes of a push at {share:.0%} selected, over all", sent / engine.full_bytes, at_most=LIMIT)
    probe = engine.check()
    print(f"afterwards the log-probabilities are {probe.gap_mean:.2g} apart in the mean, {probe.gap_max:.2g} at most")


if __name__ == "__main__":
    main()
