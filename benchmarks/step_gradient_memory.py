"""Peak memory and processor time of recomputed step gradients against those with every chunk's graph kept.

Each measurement is a fresh process, whose resident set counts from the loaded model on (Linux); memory that is freed
goes back at once. Peaks are those beside the weights and one gradient. The peak at twice the length is that of the last
units only, where it lies, and is compared beside keys and values and their gradients.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import goal, machine, table
from step_gradients import build, group

from ssrctl.training.step_gradients.task import Dials
from ssrctl.training.unit_gradients import unit_gradients

MIB = 2**20


def resident(field: str) -> int:
    """Return ``VmRSS`` or ``VmHWM`` of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def measure(options: argparse.Namespace, method: str, factor: int, last_only: bool) -> None:
    """Print the peak in MiB beside weights and one gradient, processor seconds, columns, and MiB of keys and values."""
    model = build(options.model, torch.float32)
    width, count = options.tokens // options.units, factor * options.units
    batch, units = group(model, options.rows, options.prompt_tokens, count, width)
    units = units[-options.units_at_once :] if last_only else units
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, start = resident("VmRSS"), time.process_time()
    made = unit_gradients(
        model,
        batch,
        units,
        method=method,
        level="token",
        dials=Dials(options.units_at_once, width),
        on_logprobs=lambda logprobs: None,
    )
    for _ in made:
        model.zero_grad(set_to_none=True)
    seconds = time.process_time() - start
    gradient = sum(parameter.nbytes for parameter in model.parameters())
    config = model.config.get_text_config()
    heads = config.num_key_value_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    store = 2 * config.num_hidden_layers * heads * 4 * batch.input_ids.numel()
    print((resident("VmHWM") - before - gradient) / MIB, seconds, batch.input_ids.shape[1], store / MIB)


def fresh(options: argparse.Namespace, method: str, factor: int = 1, last_only: bool = False) -> list[float]:
    """Return the numbers that ``measure`` prints in a process of its own."""
    child = [sys.executable, __file__, *sys.argv[1:], "--child", method, str(factor), str(int(last_only))]
    done = subprocess.run(
        child, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}, stdout=subprocess.PIPE, text=True, check=True
    )
    return [float(value) for value in done.stdout.split()[-4:]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="135m", help="a folder, or a size of step_gradients.py")
    parser.add_argument("--units", type=int, default=16)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--units-at-once", type=int, default=2)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        method, factor, last_only = options.child
        measure(options, method, int(factor), last_only == "1")
        return 0
    print(machine())
    lines, found = [], {}
    runs = {
        "chunked": ("chunked", 1, False),
        "recomputed": ("recomputed", 1, False),
        "recomputed, last units": ("recomputed", 1, True),
        "the same, twice the tokens": ("recomputed", 2, True),
    }
    for name, settings in runs.items():
        peak, seconds, columns, store = fresh(options, *settings)
        found[name] = peak, seconds, peak - (1 + options.units_at_once) * store
        lines.append([name, f"{columns:.0f}", f"{peak:.0f}", f"{seconds:.0f}", f"{store:.0f}"])
    print(table(["way", "columns", "peak MiB", "CPU s", "keys and values MiB"], lines))
    (peak, seconds, _), (other_peak, other_seconds, _) = found["recomputed"], found["chunked"]
    once, twice = found["recomputed, last units"][2], found["the same, twice the tokens"][2]
    met = [
        goal("peak of recomputed / chunked", peak / other_peak, at_most=0.25),
        goal("processor time of recomputed / chunked", seconds / other_seconds, at_most=1.35),
        goal("peak beside keys and values, twice the tokens / once", twice / once, at_most=1.3),
    ]
    return 0 if all(met) else 1


if __name__ == "__main__":
    raise SystemExit(main())
