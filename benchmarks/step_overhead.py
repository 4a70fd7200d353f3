"""Time that KronosOpt adds to a training step over AdamW with the same backward passes.

One question of 8 samples x 256 tokens in T = 8 steps on a model of 135M float32 weights. Both optimizers get the same
backward passes. Besides these, the times are, for Kronos, of all claims, the end of the question and the step; for AdamW,
of its step. Sampling is not part of the step here: it would make the share look smaller. On a CPU the times are CPU
seconds of one thread, which busy neighbours disturb least.

    python benchmarks/step_overhead.py [--model FOLDER] [--samples 8] [--tokens 256] [--units 8]
"""

from __future__ import annotations

import argparse

import torch
from common import Clock, goal, machine, table
from shapes import llama_135m, random_question

from ssrctl.core.kronos import KronosOpt
from ssrctl.training.unit_gradients import unit_gradients


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", help="a causal LM's folder; by default random weights of a 135M Llama")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options.add_argument("--samples", type=int, default=8)
    options.add_argument("--tokens", type=int, default=256)
    options.add_argument("--units", type=int, default=8)
    options.add_argument("--method", default="auto", help="way of computing the per-step gradients")
    given = options.parse_args()
    torch.set_num_threads(1)
    print(machine())
    model = load(given.model, getattr(torch, given.dtype)).to(given.device)
    count = sum(p.numel() for p in model.parameters())
    print(
        f"{count / 1e6:.1f}M {given.dtype} weights, {given.samples} samples x {given.tokens} tokens, T = {given.units}\n"
    )

    kronos, adamw = {"backward": 0.0, "update": 0.0}, {"backward": 0.0, "update": 0.0}
    optimizer = KronosOpt(model.named_parameters(), lr=1e-5)
    dense = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for number in range(2):  # the first round allocates state and warms up
        kronos = one_step(model, given, number, optimizer.begin_question, optimizer.claim, optimizer.step)
        adamw = one_step(model, given, number, lambda units: None, lambda: None, dense.step)
        dense.zero_grad(set_to_none=True)
    rows = [[name, f"{t['backward']:.2f}", f"{t['update']:.2f}"] for name, t in (("kronos", kronos), ("AdamW", adamw))]
    print(table(["optimizer", "backward passes, s", "everything else, s"], rows))
    passes = min(kronos["backward"], adamw["backward"])
    added = (kronos["update"] - adamw["update"]) / (passes + adamw["update"])
    print()
    goal("added by Kronos, share of a step with AdamW", added, at_most=0.05)


def load(folder: str | None, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return llama_135m(dtype) if folder is None else AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def one_step(model, given, seed, begin, after_each, finish) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Time the backward passes and the rest of one step, in seconds."""
    # about log(1 / vocabulary): the ratio is near 1
    batch, units = random_question(
        model, responses=given.samples, prompt=32, tokens=given.tokens, units=given.units, logprob=-10.8, seed=seed
    )
    seconds = {"backward": 0.0, "update": 0.0}
    clock = Clock()
    begin(len(units))
    seconds["update"] += clock.lap()
    for _ in unit_gradients(model, batch, units, level="token", clip_epsilon=0.9, method=given.method):
        seconds["backward"] += clock.lap()
        after_each()
        seconds["update"] += clock.lap()
    seconds["backward"] += clock.lap()
    finish()
    seconds["update"] += clock.lap()
    return seconds


if __name__ == "__main__":
    main()
