"""Exact selection of the k largest |g| over many tensors, against torch.topk, torch.kthvalue and the block method.

The floor is the time of one g.abs().sum() pass. torch.topk and torch.kthvalue get all coordinates as one tensor and |g|
is part of their time, as it is of ours; kthvalue gives only the threshold. Made-up gradients are normal times the
exponential of a normal (heavy-tailed), cut into matrices. "after 5%" is the selection when an earlier one has taken the
largest 5%.

    python benchmarks/selection.py [--sizes 10M,135M,1B] [--dtypes bfloat16,float32] [--fractions 0.0025,0.05]
    python benchmarks/selection.py --model FOLDER        # the gradient of a real model, and the block method's recall
    python benchmarks/selection.py --busy 2              # 0.05% of 10M coordinates beside two processes that spin
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
import torch
from common import goal, machine, table, timed
from torch import Tensor

from ssrctl.core.bits import bits_from_indices
from ssrctl.core.block_selection import recall, select_blocks
from ssrctl.core.topk import make_reader, select_topk

UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}
ROW = 1024
SLOW_FROM = {"cpu": 300_000_000, "cuda": 3_000_000_000}  # peers need minutes, or five times the gradient's memory
TEXT = """Question: A shop sells 12 boxes of 8 pencils on Monday and half as many boxes on Tuesday. A pencil costs 25 cents.
How much does the shop take in? Step 1: Monday's pencils are 12 * 8 = 96. Step 2: Tuesday's boxes are 12 / 2 = 6, so that
its pencils are 6 * 8 = 48. Step 3: Together they are 96 + 48 = 144 pencils. Step 4: 144 * 0.25 = 36. Answer: 36 dollars."""


Key = tuple[int, torch.dtype, float]  # size, dtype, fraction


@dataclass
class Reached:
    """Ratios for the goals: ours in floors and in bandwidth limits, and a peer's time in ours."""

    floors: dict[Key, float] = field(default_factory=dict)
    limits: dict[Key, float] = field(default_factory=dict)
    faster: dict[tuple[str, int, torch.dtype, float], float] = field(default_factory=dict)


def main() -> None:
    given = arguments()
    print(machine())
    bandwidth = copy_bandwidth() if given.device == "cuda" else None
    if bandwidth:
        print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s (read and written bytes)")
    if given.busy:
        beside_busy_processes(given)
        return
    reached = Reached()
    for dtype in (getattr(torch, name) for name in given.dtypes.split(",")):
        if given.model:
            compare(model_gradients(given.model, dtype, given.device), given, bandwidth, reached, given.model)
            continue
        for size in (parse_size(text) for text in given.sizes.split(",")):
            need = 4 * size * dtype.itemsize + 2**30
            free = torch.cuda.mem_get_info()[0] if given.device == "cuda" else psutil.virtual_memory().available
            if need > free:
                print(f"\nskipped {size / 1e6:.0f}M {dtype}: needs {need / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
                continue
            compare(made_up_gradients(size, dtype, given.tensors, given.device), given, bandwidth, reached, "made up")
    print()
    print_goals(reached, given.device)


def arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--sizes", help="coordinates, with K, M or B; by default 10M,135M and 1B (on CUDA 1.7B)")
    options.add_argument("--tensors", type=int, default=270, help="how many matrices the made-up gradient is cut into")
    options.add_argument("--dtypes", default="bfloat16,float32")
    options.add_argument("--fractions", default="0.0005,0.0025,0.01,0.05", help="k as shares of the coordinates")
    options.add_argument("--model", help="a causal LM's folder: use its gradient on a short text")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--busy", type=int, default=0, help="measure beside so many processes that never wait")
    given = options.parse_args()
    given.sizes = given.sizes or ("10M,135M,1.7B" if given.device == "cuda" else "10M,135M,1B")
    return given


def beside_busy_processes(given: argparse.Namespace) -> None:
    """Select 0.05% of 10M float32 coordinates in 271 tensors while other processes keep the cores busy.

    A parallel region waits for its slowest thread, which such a process may hold up for milliseconds.
    """
    gradients = made_up_gradients(10**7, torch.float32, given.tensors, given.device)
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients.values()])
    runs = {"ours": lambda: select_topk(gradients, 5000), "torch.topk": lambda: torch.topk(flat.abs(), 5000)}
    alone = {name: timed(run, given.repeats) for name, run in runs.items()}
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(given.busy)]
    try:
        beside = {name: timed(run, 4 * given.repeats) for name, run in runs.items()}
    finally:
        for process in spinning:
            process.kill()
            process.wait()
    rows = [[n, f"{1e3 * alone[n].median:.1f}", f"{1e3 * beside[n].median:.1f}"] for n in runs]
    print(table(["10.0M coordinates, k = 0.05%", "alone, ms", f"beside {given.busy} busy processes, ms"], rows))
    print()
    ratio = beside["ours"].median / beside["torch.topk"].median
    goal(f"beside {given.busy} busy processes: in times of torch.topk", ratio, at_most=1)


def parse_size(text: str) -> int:
    return int(float(text[:-1]) * UNITS[text[-1]]) if text[-1] in UNITS else int(text)


def copy_bandwidth() -> float:
    """Measure the bytes read and written per second by a copy of 1 GiB on the device."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / timed(lambda: target.copy_(source), repeats=20).best


def made_up_gradients(size: int, dtype: torch.dtype, num_tensors: int, device: str) -> dict[str, Tensor]:
    """Return views of one flat tensor: ``num_tensors`` matrices of rows of 1024, and the rest."""
    generator = torch.Generator(device).manual_seed(0)
    flat = torch.empty(size, dtype=dtype, device=device)
    for part in flat.split(1 << 22):
        normal, other = torch.randn(2, part.numel(), generator=generator, device=device)
        part.copy_(normal * torch.exp(2 * other))
    each = size // num_tensors // ROW * ROW
    if each == 0:
        return {"all": flat}
    made = {f"w{i}": flat[i * each : (i + 1) * each].view(-1, ROW) for i in range(num_tensors)}
    if size > num_tensors * each:
        made["rest"] = flat[num_tensors * each :]
    return made


def model_gradients(folder: str, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Compute the gradient of a causal LM's next-token loss on a short text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids.to(device)
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(
    gradients: dict[str, Tensor], given: argparse.Namespace, bandwidth: float | None, reached: Reached, what: str
) -> None:
    """Print a table over the fractions for one gradient."""
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients.values()])
    size, dtype, device = flat.numel(), flat.dtype, flat.device.type
    floor = timed(lambda: flat.abs().sum(), given.repeats).best
    print(f"\n{what}: {size / 1e6:.1f}M coordinates in {len(gradients)} tensors, {dtype}, floor {1e3 * floor:.1f} ms")
    print(f"reader: {type(make_reader(gradients, {})).__name__}")
    taken = {n: bits_from_indices(i, gradients[n].numel()) for n, i in select_topk(gradients, size // 20).items()}
    rivals = peers(flat)
    if size >= SLOW_FROM[device]:
        print(f"skipped {', '.join(rivals)}: at this size they take minutes and several times the gradient's memory")
        rivals = {}
    header = ["k", "ours, ms", "floors", "after 5%", *(c for p in rivals for c in (f"{p}, ms", "/ ours"))]
    rows = []
    for fraction in map(float, given.fractions.split(",")):
        k, key = int(fraction * size), (size, dtype, fraction)
        ours = timed(lambda k=k: select_topk(gradients, k), given.repeats).best
        after = timed(lambda k=k: select_topk(gradients, k, taken), given.repeats).best
        row: list[object] = [f"{fraction:.2%}", f"{1e3 * ours:.1f}", f"{ours / floor:.2f}", f"{after / floor:.2f}"]
        reached.floors[key] = ours / floor
        for name, run in rivals.items():
            seconds = timed(lambda k=k, run=run: run(k), 2, warm_up=0).best
            row += [f"{1e3 * seconds:.0f}", f"{seconds / ours:.1f}"]
            reached.faster[(name, *key)] = seconds / ours
        block = timed(lambda k=k: select_blocks(gradients, k), 2, warm_up=0).best
        found = recall(select_blocks(gradients, k), select_topk(gradients, k))
        row += [f"{1e3 * block:.0f}", f"{found:.2f}"]
        if bandwidth:
            reached.limits[key] = ours / (size * dtype.itemsize / bandwidth)
            row.append(f"{reached.limits[key]:.2f}")
        rows.append(row)
    print(table([*header, "block, ms", "recall", *(["x limit"] if bandwidth else [])], rows))


def peers(flat: Tensor) -> dict[str, Callable[[int], object]]:
    """Return the peers' selections by name; sorting only on CUDA (the goal there is against it), if memory allows."""
    made: dict[str, Callable[[int], object]] = {
        "topk": lambda k: torch.topk(flat.abs(), k),
        "kthvalue": lambda k: torch.kthvalue(flat.abs(), flat.numel() - k + 1),
    }
    if flat.is_cuda and 40 * flat.numel() < torch.cuda.mem_get_info()[0]:  # values, int64 indices, and as much scratch
        made["sort"] = lambda k: torch.sort(flat.abs(), descending=True)
    return made


def print_goals(reached: Reached, device: str) -> None:
    """Check the goals for k = 0.25%: near 135M coordinates on a CPU, from 1.7B on CUDA."""
    for key in reached.floors:
        size, dtype, fraction = key
        where = f"{size / 1e6:.0f}M {dtype}, k = {fraction:.2%}"
        if fraction != 0.0025:
            continue
        if device == "cpu" and 130e6 <= size <= 140e6:
            goal(f"{where}: times as fast as torch.topk", reached.faster["topk", *key], at_least=8)
            if dtype == torch.bfloat16:
                goal(f"{where}: floors", reached.floors[key], at_most=3)
        if device == "cuda" and size >= 1.7e9:
            goal(f"{where}: times the bandwidth limit", reached.limits[key], at_most=3)
            if ("sort", *key) in reached.faster:
                goal(f"{where}: times as fast as sorting", reached.faster["sort", *key], at_least=16)


if __name__ == "__main__":
    main()
