"""Peak memory and processor time of recomputed step gradients against those with every chunk's graph kept.

Both run in one process, one after the other; live tensors are counted exactly. Peaks are those beside the weights and one
gradient. The peak at twice the length is that of the last units only, which is where the peak is, and is compared
beside keys and values and their gradients.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from common import goal, machine, table
from live_bytes import LiveBytes
from step_gradients import build, group

from ssrctl.core.units import Unit
from ssrctl.training.step_gradients.task import Dials
from ssrctl.training.unit_gradients import GroupBatch, unit_gradients

MIB = 2**20


def measure(model: Any, batch: GroupBatch, units: list[Unit], method: str, dials: Dials) -> tuple[float, float]:
    """Return the peak in MiB beside weights and one gradient, and processor seconds."""
    model.zero_grad(set_to_none=True)
    start = time.process_time()
    with LiveBytes() as live:
        live.ignore(*model.parameters(), *model.buffers())
        made = unit_gradients(
            model, batch, units, method=method, level="token", dials=dials, on_logprobs=lambda logprobs: None
        )
        for _ in made:
            model.zero_grad(set_to_none=True)
    gradient = sum(parameter.nbytes for parameter in model.parameters())
    return (live.peak - gradient) / MIB, time.process_time() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="135m", help="a folder, or a size of step_gradients.py")
    parser.add_argument("--units", type=int, default=16)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--units-at-once", type=int, default=2)
    options = parser.parse_args()
    model = build(options.model, torch.float32)
    print(machine())
    config = model.config.get_text_config()
    width = options.tokens // options.units
    batch, units = group(model, options.rows, options.prompt_tokens, options.units, width)
    dials = Dials(options.units_at_once, width)
    lines, found = [], {}
    for method in ("chunked", "recomputed"):
        found[method] = measure(model, batch, units, method, dials)
        lines.append([method, batch.input_ids.shape[1], *(f"{value:.0f}" for value in found[method])])
        print(lines[-1], flush=True)
    beside = []
    for factor in (1, 2):
        longer, all_units = group(model, options.rows, options.prompt_tokens, factor * options.units, width)
        last = all_units[-options.units_at_once :]
        peak, seconds = measure(model, longer, last, "recomputed", dials)
        store = (
            2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4 * longer.input_ids.numel()
        )
        beside.append(peak - (1 + options.units_at_once) * store / MIB)
        lines.append(["recomputed, last units", longer.input_ids.shape[1], f"{peak:.0f}", f"{seconds:.0f}"])
    print(table(["way", "columns", "peak MiB", "CPU s"], lines))
    (peak, seconds), (other_peak, other_seconds) = found["recomputed"], found["chunked"]
    met = [
        goal("peak of recomputed / chunked", peak / other_peak, at_most=0.25),
        goal("processor time of recomputed / chunked", seconds / other_seconds, at_most=1.35),
        goal("peak beside keys and values, twice the tokens / once", beside[1] / beside[0], at_most=1.3),
    ]
    return 0 if all(met) else 1


if __name__ == "__main__":
    raise SystemExit(main())
