"""Planned against measured memory of one question's update, and the table of docs/memory.md.

    python benchmarks/memory_plan.py --model FOLDER [--tokens 512] [--responses 4]    measure, next to the plan
    python benchmarks/memory_plan.py --table plan Qwen3 from its configs

Measured are all live tensors at their peak, without the weights, over the units of one question of random tokens:
gradients, activations, logits, and the state of the update. A plan is met within 20%.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import goal, machine, table

from ssrctl.configs import ModelConfig, TrainConfig
from ssrctl.core.units import Unit
from ssrctl.models.loading import load_model
from ssrctl.training.checkpointing import enable_checkpointing
from ssrctl.training.live_bytes import LiveBytes
from ssrctl.training.memory_plan import GIB, MemoryPlanner
from ssrctl.training.step_gradients.task import Dials
from ssrctl.training.unit_gradients import make_batch, response_logprobs, trainable, unit_gradients
from ssrctl.training.updaters import make_updater

PROMPT, UNITS = 64, 2

# Qwen3's published configs: hidden size, intermediate size, layers, query heads, tied; 8 key heads of width 128 in all.
QWEN3 = {
    "0.6B": (1024, 3072, 28, 16, True),
    "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False),
}
CARDS = (16, 24, 48, 80)
LENGTHS = (1024, 4096, 16384)
UPDATES: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw"},
    "kronos, global": {},
    "kronos, tensor": {"scope": "tensor"},
    "static mask 1%": {"mask": Path("mask.safetensors")},
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", help="a causal LM's folder to measure")
    options.add_argument("--tokens", type=int, default=512, help="of each response")
    options.add_argument("--responses", type=int, default=4)
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options.add_argument("--only", default="", help="measure only updates whose name holds this text")
    options.add_argument("--table", action="store_true")
    given = options.parse_args()
    if given.table:
        print(markdown())
    if given.model:
        measure(given)


def measure(given: argparse.Namespace) -> None:
    """Print planned and measured peaks of several ways to update."""
    print(machine())
    base = TrainConfig(
        model=given.model, dtype=given.dtype, max_new_tokens=given.tokens, num_generations=given.responses,
        questions_per_step=1, temperature=0.9,
    )  # fmt: skip
    micro = PROMPT + given.tokens
    cases: dict[str, dict[str, Any]] = {
        "adamw": {"optimizer": "adamw"},
        "adamw, checkpointing": {"optimizer": "adamw", "gradient_checkpointing": True},
        "adamw, checkpointing, one response": {
            "optimizer": "adamw", "gradient_checkpointing": True, "micro_batch_tokens": micro,
        },
        "kronos global, checkpointing": {"gradient_checkpointing": True, "step_gradient": "kept"},
        "kronos global, recomputed": {"step_gradient": "recomputed", "units_at_once": 1, "gradient_chunk_tokens": 256},
        "kronos global, recomputed, 2 at once": {
            "step_gradient": "recomputed", "units_at_once": 2, "gradient_chunk_tokens": 256,
        },
        "kronos tensor, checkpointing": {"gradient_checkpointing": True, "step_gradient": "kept", "scope": "tensor"},
    }  # fmt: skip
    rows, ratios = [], []
    for name, changes in ((name, changes) for name, changes in cases.items() if given.only in name):
        config = dataclasses.replace(base, **changes)
        started = time.process_time()
        planned, state, measured = one(config)
        seconds = time.process_time() - started
        ratios.append(measured / planned)
        mib = [f"{size / 2**20:,.0f}" for size in (planned, state, measured)]
        rows.append([name, *mib, f"{ratios[-1]:.2f}", f"{seconds:.0f}"])
        print(rows[-1], flush=True)
    print(table(["update", "planned MiB", "of it state", "measured MiB", "measured / planned", "CPU s"], rows))
    goal("measured over planned, largest", max(ratios), at_most=1.2)
    goal("measured over planned, smallest", min(ratios), at_least=0.8)


def one(config: TrainConfig) -> tuple[int, int, int]:
    """Return (planned peak without the weights, its state, measured peak) of one question, in bytes."""
    loaded = load_model(ModelConfig(model=config.model, dtype=config.dtype, device="cpu"))
    model, generator = loaded.model, torch.Generator().manual_seed(0)
    plan = MemoryPlanner(model, PROMPT).breakdown(config)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    size, rows, width = len(loaded.tokenizer), config.num_generations, config.max_new_tokens
    prompt = torch.randint(size, (PROMPT,), generator=generator).tolist()
    responses = torch.randint(size, (rows, width), generator=generator).tolist()
    steps = [[place * UNITS // width for place in range(width)]] * rows
    advantages = tuple(0.5 - row / rows for row in range(rows))
    units = [Unit((step,), config.budget / UNITS, (advantages,)) for step in range(UNITS)]
    updater = make_updater(trainable(model), config)
    batch = make_batch(prompt, responses, [torch.zeros(width)] * rows, steps, pad_token_id=0, device=model.device)
    with torch.no_grad():  # the model's own, so that no token is clipped
        batch = dataclasses.replace(batch, old_logprobs=response_logprobs(model, batch, config.temperature).float())
    with LiveBytes() as live:
        live.ignore(*model.parameters(), *model.buffers())
        updater.add_question(
            unit_gradients(
                model, batch, updater.plan(units), temperature=config.temperature,
                method=config.step_gradient_method, micro_batch_tokens=config.micro_batch_tokens,
                on_unit=updater.before_unit, on_entropy=lambda _: None,
                dials=Dials(config.units_at_once, config.gradient_chunk_tokens),
            )
        )  # fmt: skip
        measured = live.peak
    del model, loaded, updater
    gc.collect()
    # the state of adamw is made by the first step, after this question
    state = plan.state if config.optimizer == "kronos" else 0
    return plan.gradients + plan.activations + plan.logits + state, state, measured


def markdown() -> str:
    """Return the table of what fits where: the settings that fit, by model, update, card and length."""
    lines = ["| model | update | tokens | GiB at the least | " + " | ".join(f"{card} GiB" for card in CARDS) + " |"]
    lines.append("|---" * (4 + len(CARDS)) + "|")
    for (name, update), planner in planners():
        for tokens in LENGTHS:
            config = TrainConfig(
                model=name, dtype="bfloat16", max_new_tokens=tokens, questions_per_step=4, num_generations=8,
                **UPDATES[update],
            )  # fmt: skip
            least = planner.breakdown(planner.smallest(config)).total / GIB
            cells = [settings(planner, config, card) for card in CARDS]
            lines.append(f"| {name} | {update} | {tokens:,} | {least:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def planners() -> Iterator[tuple[tuple[str, str], MemoryPlanner]]:
    """Yield (model, update) and its planner, built from the config on the meta device."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    for name, (hidden, inner, layers, heads, tied) in QWEN3.items():
        config = Qwen3Config(
            vocab_size=151936, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=8, head_dim=128, tie_word_embeddings=tied,
            max_position_embeddings=40960,
        )  # fmt: skip
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        for update in UPDATES:
            trained = 0.01 if update.startswith("static") else 1.0
            yield (name, update), MemoryPlanner(model, 256, trained)


def settings(planner: MemoryPlanner, config: TrainConfig, card: int) -> str:
    """Return the cheapest settings that fit a card: ``c`` checkpointing, ``mN`` micro-batches of N responses."""
    made = planner.cheapest(config, card * GIB)
    if made is None:
        return "-"
    parts = ["c"] if made.gradient_checkpointing else []
    if made.micro_batch_tokens is not None:
        parts.append(f"m{made.micro_batch_tokens // (planner.prompt_tokens + config.max_new_tokens)}")
    if made.sampling_batch_size != config.sampling_batch_size:
        parts.append(f"s{made.sampling_batch_size}")
    return " ".join(parts) or "plain"


if __name__ == "__main__":
    main()
