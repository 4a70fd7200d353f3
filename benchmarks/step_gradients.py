"""Cost of each way to compute the update units' gradients, in dense passes.

A dense pass is one forward and backward pass of the whole batch, as the kept graph does it for one unit; it is
measured in the same run, in turns with the methods, and the best of the rounds counts. Responses are ragged: step
lengths are drawn between half and one and a half of their mean, and every second response lacks its last quarter of
steps. Log-probabilities of all tokens are asked for, as the trainer does. In brackets: predicted over measured, with the
cost model of ssrctl.training.step_gradients.cost.

With --calibrate, single chunks are timed instead and set against the cost model's numbers, which says how to mend
them for another device.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import goal, machine, synchronize, table
from shapes import llama_135m, qwen3_1_7b
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from ssrctl import tiny_reasoner
from ssrctl.core.units import Unit
from ssrctl.training.step_gradients.cost import COSTS, ModelCosts
from ssrctl.training.step_gradients.shape import group_shape
from ssrctl.training.unit_gradients import GradientTask, GroupBatch, automatic_method, make_batch, unit_gradients

Shape = tuple[int, int, int, int]  # responses, prompt tokens, units, mean tokens of a step
EXACT = ("kept", "truncated", "chunked")
METHODS = (*EXACT, "local")
# hidden, intermediate, layers, query heads, key heads, vocabulary
SIZES = {"small": (192, 512, 6, 4, 2, 4096), "16m": (384, 1024, 8, 6, 2, 8192)}
# rows, tokens and cached tokens of the single chunks that --calibrate times
CHUNKS = [
    (rows, tokens, past) for past in (16, 128, 512) for rows, tokens in ((2, 4), (2, 64), (8, 4), (8, 16), (8, 64))
]


def build(name: str, dtype: torch.dtype) -> Any:
    """Load a folder, ``reasoner`` (the bundled model), or a random model: ``135m``, ``qwen3-1.7b`` or one of ``SIZES``."""
    if name in ("135m", "qwen3-1.7b"):
        model = llama_135m(dtype) if name == "135m" else qwen3_1_7b(dtype)
    elif name in SIZES:
        hidden, inner, layers, heads, key_heads, vocabulary = SIZES[name]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=hidden,
                intermediate_size=inner,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=key_heads,
                max_position_embeddings=8192,
                tie_word_embeddings=True,
            )
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(tiny_reasoner.path() if name == "reasoner" else name)
    return model.to("cuda" if torch.cuda.is_available() else "cpu", dtype).eval()


def group(model: Any, rows: int, prompt: int, num_units: int, step_tokens: int) -> tuple[GroupBatch, list[Unit]]:
    """Return a ragged group and one unit per step."""
    draw = random.Random(f"{rows}/{prompt}/{num_units}/{step_tokens}")
    steps, advantages = [], []
    for row in range(rows):
        mine = num_units - (num_units // 4 if row % 2 else 0)
        lengths = [draw.randint(max(1, step_tokens // 2), step_tokens * 3 // 2) for _ in range(mine)]
        steps.append([step for step, length in enumerate(lengths) for _ in range(length)])
        advantages.append([draw.uniform(-1, 1) if step < mine else None for step in range(num_units)])
    top = model.config.vocab_size
    responses = [[draw.randrange(4, top) for _ in row] for row in steps]
    batch = make_batch(
        [draw.randrange(4, top) for _ in range(prompt)],
        responses,
        [torch.full((len(row),), -3.0) for row in steps],
        steps,
        pad_token_id=0,
        device=model.device,
    )
    return batch, [Unit((step,), 0.01, (tuple(row[step] for row in advantages),)) for step in range(num_units)]


def run(model: Any, batch: GroupBatch, units: Sequence[Unit], method: str) -> None:
    """Compute all units' gradients and drop each at once."""
    for _ in unit_gradients(model, batch, units, method=method, level="token", on_logprobs=lambda logprobs: None):
        model.zero_grad(set_to_none=True)


def in_turns(runs: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Return the best time of each over the rounds, after one run of the first to warm up."""
    next(iter(runs.values()))()
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, call in runs.items():
            best[name] = min(best[name], seconds_of(call, clock))
    return best


def seconds_of(call: Callable[[], object], clock: Callable[[], float]) -> float:
    synchronize()
    start = clock()
    call()
    synchronize()
    return clock() - start


@dataclass(frozen=True)
class Passes:
    """Measured cost of one batch in dense passes, and the cost model's estimates for the exact ways."""

    taken: dict[str, float]
    expected: dict[str, float]
    dense_seconds: float
    choice: str
    width: int

    def cell(self, method: str) -> str:
        if method not in self.taken:
            return ""
        taken = self.taken[method]
        return f"{taken:.2f}" + (f" ({self.expected[method] / taken:.2f})" if method in self.expected else "")


def passes(model: Any, shape: Shape, methods: Sequence[str], options: argparse.Namespace) -> Passes:
    batch, units = group(model, *shape)
    whole = [Unit(tuple(range(len(units))), 0.01, tuple(column for unit in units for column in unit.advantages))]
    runs: dict[str, Callable[[], object]] = {"dense": partial(run, model, batch, whole, "kept")}
    runs |= {method: partial(run, model, batch, units, method) for method in methods}
    best = in_turns(runs, options.rounds, options.clock)
    task = GradientTask(model, batch, units, on_logprobs=lambda logprobs: None)
    lengths, costs = group_shape(task), ModelCosts.of(model)
    dense = COSTS["kept"](group_shape(GradientTask(model, batch, whole)), costs, True)
    return Passes(
        taken={method: best[method] / best["dense"] for method in methods},
        expected={method: cost(lengths, costs, True) / dense for method, cost in COSTS.items()},
        dense_seconds=best["dense"],
        choice=automatic_method(task),
        width=batch.input_ids.shape[1],
    )


def measure(name: str, model: Any, options: argparse.Namespace) -> bool:
    """Print the table and the goals of one model; return True if all were met."""
    rows, prompt = options.rows, options.prompt_tokens
    lines, checks = [], []
    for num_units in options.units:
        found = passes(model, (rows, prompt, num_units, options.step_tokens), METHODS, options)
        cells = [found.cell(method) for method in METHODS]
        lines.append([num_units, found.width, f"{found.dense_seconds:.2f}", *cells, found.choice])
        mine = found.taken[found.choice]
        ratio = mine / min(found.taken[method] for method in EXACT)
        checks.append((f"{name}, T={num_units}: {found.choice} (automatic) over the best exact way", ratio, 1.1))
        if num_units == 16:
            checks.append((f"{name}, T=16: {found.choice} over 16 full passes", mine / 16, 0.45))
    for tokens, limit in ((128, 2.2), (1024, 1.5)):
        found = passes(model, (rows, prompt, 8, tokens // 8), ["local"], options)
        cells = [found.cell(method) for method in METHODS]
        lines.append([8, found.width, f"{found.dense_seconds:.2f}", *cells, ""])
        checks.append((f"{name}, {tokens} tokens in 8 steps: dense passes of local", found.taken["local"], limit))
    print(table(["T", "tokens", "dense s", *METHODS, "auto"], lines))
    met = [goal(text, reached, at_most=limit) for text, reached, limit in checks]
    return all(met)


def calibrate(model: Any, options: argparse.Namespace) -> None:
    """Time single chunks: forward, backward from their logits, backward from only their keys and values."""
    costs = ModelCosts.of(model)
    chunk_seconds(model, *CHUNKS[-1], options.clock)  # warm up
    measured, expected = [], []
    for rows, tokens, past in CHUNKS:
        times = [chunk_seconds(model, rows, tokens, past, options.clock) for _ in range(options.rounds)]
        measured.append([min(column) for column in zip(*times, strict=True)])
        directions = ((costs.forward, tokens), (costs.backward, tokens), (costs.backward, 0))
        expected.append([direction.of(rows, tokens, past, heads) for direction, heads in directions])
    token = sum(row[0] for row in measured) / sum(row[0] for row in expected)
    lines = [
        [*chunk, *(f"{m / token:.0f} ({e:.0f})" for m, e in zip(*pair, strict=True))]
        for chunk, *pair in zip(CHUNKS, measured, expected, strict=True)
    ]
    print("in forward passes of one token: measured (expected)")
    print(table(["rows", "tokens", "cached", "forward", "backward", "backward without logits"], lines))


def chunk_seconds(model: Any, rows: int, tokens: int, past: int, clock: Callable[[], float]) -> tuple[float, ...]:
    ids = torch.randint(4, model.config.vocab_size, (rows, past + tokens), device=model.device)
    before = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids[:, :past], past_key_values=before, use_cache=True, logits_to_keep=1)
    cache = DynamicCache([(layer.keys.requires_grad_(), layer.values.requires_grad_()) for layer in before.layers])
    losses: list[torch.Tensor] = []

    def forward() -> None:
        output = model(input_ids=ids[:, past:], past_key_values=cache, use_cache=True, logits_to_keep=tokens)
        losses.append(torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), ids[:, past:].flatten()))

    taken = [seconds_of(forward, clock)]
    losses.append(torch.stack([layer.keys.sum() + layer.values.sum() for layer in cache.layers]).sum())
    for loss in losses:
        taken.append(seconds_of(partial(loss.backward, retain_graph=True), clock))
        model.zero_grad(set_to_none=True)
    return tuple(taken)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        nargs="+",
        default=["reasoner", "small"],
        help=f"reasoner, {', '.join(SIZES)}, 135m, qwen3-1.7b, or a folder",
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--units", type=int, nargs="+", default=[4, 8, 16], help="numbers of units, T")
    parser.add_argument("--rows", type=int, default=8, help="responses in the group")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--step-tokens", type=int, default=16, help="mean tokens of a step")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, help="torch threads; default: one for reasoner, else all")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time: steadier on a shared machine, one thread"
    )
    parser.add_argument("--calibrate", action="store_true", help="time single chunks against the cost model's numbers")
    options = parser.parse_args()
    options.clock = time.process_time if options.cpu_time else time.perf_counter
    threads, met = torch.get_num_threads(), True
    for name in options.model:
        # the loader gives models below 5 million parameters one thread
        torch.set_num_threads(options.threads or (1 if name == "reasoner" or options.cpu_time else threads))
        model = build(name, getattr(torch, options.dtype))
        print(machine())
        print(f"\n{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {model.dtype}")
        if options.calibrate:
            calibrate(model, options)
        else:
            met &= measure(name, model, options)
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
