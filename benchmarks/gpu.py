"""Everything that needs a GPU, in one command of at most eight minutes: one table, and the same as json.

Parts, each in a process of its own so that one that fails or runs out of memory leaves the others alone:

- ``tests``: ``python -m pytest -m gpu``.
- ``stages``: every stage as its own command on the bundled reasoner.
- ``processes``: a run under ``torchrun`` with one process against a plain one. Shards need two GPUs.
- ``selection``: the 0.25% largest of 1.7B bfloat16 gradients, against the time of reading them once at the measured copy
  bandwidth (goal: at most 3 times), ``torch.topk``, and the same selection without the Triton kernels.
- ``step``: one KronosOpt step of one question on Qwen3-1.7B (its sizes, random weights, bfloat16): 8 responses of 2,048 and
  of 4,096 tokens in 16 steps, by each way of computing step gradients. Peak memory (goal: at most 60 GiB at 4,096), and
  seconds by phase.
- ``chunks``: recomputed gradients of two steps of such a question, in chunks of 1,024 and of 8,192 tokens.
- ``shards``: a claim and the optimizer's step, with the shards of a CPU and with those of a GPU.
- ``calibration``: single chunks against the cost model's numbers (``step_gradients.py --calibrate``).
- ``diagnose``: rank, spectrum and landing of an 8B pair (``diagnose_matrices.py``; goal: at most 3 hours).

It needs torch, transformers and, for the tests, pytest. Without a GPU it runs small sizes on the CPU, which shows only
that the script works.

    python benchmarks/gpu.py [-o gpu.json] [--parts tests selection step ...] [--seconds 480]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import Clock, goal, machine, peak_rss_bytes, table, timed

PARTS = ("tests", "stages", "processes", "selection", "step", "chunks", "shards", "calibration", "diagnose")
WAYS = ("recomputed", "chunked", "local")
RESPONSES, PROMPT, UNITS = 8, 128, 16
GIB = 2**30
Row = dict[str, Any]


def main() -> int:
    """Run the parts, print the table and the goals, write the json; return 1 if a part failed or a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=480, help="all parts together; what is left then is skipped")
    parser.add_argument("--tokens", type=int, nargs="+", help="lengths of the responses; by default 2048 4096")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # the one piece that this process runs
    given = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    lengths = given.tokens or ([2048, 4096] if on_gpu else [64, 128])
    if given.only:
        print(json.dumps(run_piece(given.only, "cuda" if on_gpu else "cpu")))
        return 0
    print(machine())
    pieces = [piece for part in given.parts for piece in pieces_of(part, lengths)]
    end = time.monotonic() + given.seconds
    rows = [in_own_process(piece, end - time.monotonic()) for piece in pieces]
    given.output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    print_rows(rows)
    print(f"\nwrote {given.output}")
    met = goals(rows, max(lengths)) if on_gpu else True
    return 0 if met and not any("failed" in row for row in rows) else 1


def pieces_of(part: str, lengths: list[int]) -> list[str]:
    if part != "step":
        return [part]
    return [f"step {tokens} {way}" for tokens in lengths for way in WAYS]


def in_own_process(piece: str, seconds: float) -> Row:
    """Run one piece; a failure, a timeout or a kill becomes the row's ``failed``."""
    if seconds < 10:
        return {"piece": piece, "failed": "skipped: no time left"}
    print(f"{piece} ...", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        try:
            done = subprocess.run(
                [sys.executable, __file__, "--only", piece],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                timeout=seconds,
                env=os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
            )
        except subprocess.TimeoutExpired:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["nothing"])[-1]
            return {"piece": piece, "failed": f"no end within {seconds:.0f} s; last it said: {last}"}
        errors.seek(0)
        said = errors.read().strip().splitlines()
    took = {"piece": piece, "process_seconds": round(time.monotonic() - started, 1)}
    if done.returncode:
        return took | {"failed": said[-1] if said else f"exit code {done.returncode}"}
    return took | json.loads(done.stdout.splitlines()[-1])


def run_piece(piece: str, device: str) -> Row:
    """Run one piece in this process and return its measurements."""
    name, *details = piece.split()
    whole = {"tests": tests, "stages": stages, "processes": processes}
    on_device = {"selection": selection, "chunks": chunks, "shards": shards}
    on_device |= {"calibration": calibration, "diagnose": diagnose}
    if name in whole:
        return whole[name]()
    if name in on_device:
        return on_device[name](device)
    return step(device, int(details[0]), details[1])


# --------------------------------------------------------------------------------------------------
# the pieces


def tests() -> Row:
    """Run the tests that are marked ``gpu``."""
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    done = subprocess.run(words, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip().splitlines()
    made = {"tests": said[-1] if said else ""}
    return made if done.returncode == 0 else made | {"failed": made["tests"], "output": said[-200:]}


def stages() -> Row:
    """Run every stage on the device that ``auto`` finds, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return in_turn(
            [
                "superweights -o g.safetensors",
                "eval --limit 64 -o before",
                "segment before/samples.jsonl -o steps.jsonl",
                "critic steps.jsonl -o scored.jsonl",
                "profile-budget --protect g.safetensors --limit 16 -o budget.json",
                "train --optimizer kronos --protect g.safetensors --budget-profile budget.json --max-steps 6 --log-masks-every 1 -o run",
                "diagnose tiny-reasoner run --device auto -o diagnosis",
                "diagnose --jaccard run",
                "eval --limit 64 --checkpoint run --baseline before -o after",
            ],
            Path(folder),
        )


def processes() -> Row:
    """Compare the weights of a plain run and of one process under torchrun."""
    train = "train --max-steps 3 --sample-together question --no-report -o"
    with tempfile.TemporaryDirectory() as folder:
        row = in_turn(
            [f"{train} plain", f"torchrun {train} launched"],
            Path(folder),
        )
        if "failed" not in row and _written(Path(folder, "plain")) != _written(Path(folder, "launched")):
            row["failed"] = "the two runs changed the weights differently"
        return row


def _written(run: Path) -> dict[str, list[int]]:
    """Return the tensors of a run's deltas as bytes; the files say besides which settings made them."""
    from safetensors.torch import load_file

    return {
        f"{path.parent.name} {name}": tensor.flatten().view(torch.uint8).tolist()
        for path in sorted(run.glob("checkpoints/*/delta.safetensors"))
        for name, tensor in load_file(path).items()
    }


def in_turn(commands: list[str], folder: Path) -> Row:
    """Run commands of ssrctl one after another; return the seconds of each, and the first that failed with its last words."""
    seconds = {}
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent.parent}:{os.environ.get('PYTHONPATH', '')}"}
    for command in commands:
        print(command, flush=True, file=sys.stderr)
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "1"] if command.startswith("torchrun ") else []
        words = [sys.executable, *launcher, "-m", "ssrctl", *command.removeprefix("torchrun ").split()]
        started = time.monotonic()
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
        seconds[command] = round(time.monotonic() - started, 1)
        if done.returncode:
            said = (done.stdout + done.stderr).strip().splitlines()
            return {"failed": f"ssrctl {command}: {said[-1] if said else done.returncode}", "output": said[-60:]}
    return {"commands": seconds}


def selection(device: str) -> Row:
    """Time the selection of 0.25% and its peers."""
    import selection as script

    import ssrctl.core.topk as topk

    size = 1_720_000_000 if device == "cuda" else 10_000_000
    gradients = script.made_up_gradients(size, torch.bfloat16, 310, device)
    k = size // 400
    flat = next(iter(gradients.values()))._base
    assert flat is not None
    ours = timed(lambda: topk.select_topk(gradients, k), 5).best
    chosen = topk.select_topk(gradients, k)
    made: Row = {"coordinates": size, "reader": type(topk.make_reader(gradients, {})).__name__, "seconds": ours}
    made["seconds_torch_topk"] = timed(lambda: torch.topk(flat.abs(), k), 1).best
    topk.make_reader = topk.PlainReader
    made["seconds_without_triton"] = timed(lambda: topk.select_topk(gradients, k), 2).best
    plain = topk.select_topk(gradients, k)
    if any(not torch.equal(plain[name], chosen[name]) for name in plain):
        raise SystemExit("the Triton kernels select other coordinates than plain torch")
    if device == "cuda":
        bandwidth = script.copy_bandwidth()
        made |= {"bytes_per_second": bandwidth, "limits": ours / (size * flat.itemsize / bandwidth)}
    return made


def calibration(device: str) -> Row:
    """Time single chunks of two models against the cost model; the tables are kept as text."""
    models = ["--dtype", "bfloat16", "--model", "135m", "qwen3-1.7b"] if device == "cuda" else ["--model", "small"]
    return beside("step_gradients.py", "--calibrate", "--rounds", "3", *models)


def diagnose(device: str) -> Row:
    """Time the decompositions of an 8B pair; the table is kept as text."""
    return beside("diagnose_matrices.py", "--device", device, *([] if device == "cuda" else ["--side", "256"]))


def beside(script: str, *words: str) -> Row:
    """Run a script next to this one and return what it prints."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *words]
    return {"text": subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout}


def chunks(device: str) -> Row:
    """Time recomputed gradients of two units by the size of their chunks."""
    from ssrctl.training.unit_gradients import Dials

    model, tokens, found = build_model(device), 2048 if device == "cuda" else 64, {}
    for size in (1024, 8192):
        for _ in range(2):  # the second is measured
            clock = Clock()
            for _ in gradients_of(model, tokens, 2, "recomputed", dials=Dials(1, size))[1]:
                model.zero_grad(set_to_none=True)
            found[f"chunks of {size}"] = round(clock.lap(), 2)
    return {"commands": found}


def shards(device: str) -> Row:
    """Time a claim, the best of four, and the step by the size of the optimizer's shards."""
    from ssrctl.core import layout
    from ssrctl.core.kronos import KronosOpt

    model, found = build_model(device), {}
    gradients = {name: torch.randn_like(parameter) * 0.01 for name, parameter in model.named_parameters()}
    for size in (layout.SHARD, layout.DEVICE_SHARD):
        layout.SHARD = layout.DEVICE_SHARD = size
        optimizer = KronosOpt(model.named_parameters(), lr=1e-5)
        optimizer.begin_question(5)

        def claim(optimizer: Any = optimizer) -> None:
            for name, parameter in model.named_parameters():
                parameter.grad = gradients[name]
            optimizer.claim()

        found[f"claim, shards of {size}"] = round(timed(claim, 4).best, 4)
        clock = Clock()
        optimizer.step()
        found[f"step, shards of {size}"] = round(clock.lap(), 3)
    return {"commands": found}


def build_model(device: str) -> Any:
    """Return a model of Qwen3-1.7B's sizes in the state in which a run has it; on a CPU a small one."""
    from step_gradients import build

    from ssrctl.models.precision import repeat_sums

    repeat_sums(torch.device(device))
    with torch.device(device):
        return build(*(("qwen3-1.7b", torch.bfloat16) if device == "cuda" else ("small", torch.float32)))


def gradients_of(model: Any, tokens: int, units: int, way: str, seed: int = 0, **more: Any) -> tuple[list[Any], Any]:
    """Return the units of a random question, and the iterator of their gradients."""
    from shapes import random_question

    from ssrctl.training.unit_gradients import unit_gradients

    batch, made = random_question(
        model, responses=RESPONSES, prompt=PROMPT, tokens=tokens, units=units, logprob=-12.0, seed=seed
    )
    settings = {"level": "sequence", "clip_epsilon": 0.9, "on_logprobs": lambda logprobs: None}
    return made, unit_gradients(model, batch, made, method=way, **settings, **more)


def step(device: str, tokens: int, way: str) -> Row:
    """Run two KronosOpt steps of one question; the second is measured, when state exists and kernels are loaded."""
    from ssrctl.core.kronos import KronosOpt

    model = build_model(device)
    optimizer = KronosOpt(model.named_parameters(), lr=1e-5)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = {}
    for seed in range(2):
        seconds = one_step(model, optimizer, tokens, way, seed)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_rss_bytes()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weight_bytes": weights,
        "peak_bytes": peak,
    } | seconds


def one_step(model: Any, optimizer: Any, tokens: int, way: str, seed: int) -> Row:
    """Return the seconds of one step by phase: gradients, claims, update."""
    units, gradients = gradients_of(model, tokens, UNITS, way, seed)
    seconds = dict.fromkeys(("gradient_seconds", "claim_seconds", "update_seconds"), 0.0)
    clock = Clock()
    optimizer.begin_question(len(units))
    seconds["claim_seconds"] += clock.lap()
    for _ in gradients:
        seconds["gradient_seconds"] += clock.lap()
        optimizer.claim()
        seconds["claim_seconds"] += clock.lap()
    seconds["gradient_seconds"] += clock.lap()
    optimizer.step()
    seconds["update_seconds"] += clock.lap()
    return seconds


# --------------------------------------------------------------------------------------------------
# what is printed


def print_rows(rows: list[Row]) -> None:
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append([row["piece"], "", "", "", "", f"FAILED: {row['failed'][:100]}"])
        elif "peak_bytes" in row:
            phases = [f"{row[f'{phase}_seconds']:.2f}" for phase in ("gradient", "claim", "update")]
            lines.append([row["piece"], f"{row['peak_bytes'] / GIB:.1f}", *phases, ""])
        elif "seconds" in row:
            ours = row["seconds"]
            peers = ", ".join(
                f"{name} {row[f'seconds_{name}'] / ours:.1f}" for name in ("torch_topk", "without_triton")
            )
            limit = f"{row['limits']:.2f} bandwidth limits; " if "limits" in row else ""
            lines.append([row["piece"], "", "", f"{ours:.4f}", "", f"{limit}times ours: {peers}"])
        else:
            took = ", ".join(
                f"{words.partition(' -')[0]} {seconds}" for words, seconds in row.get("commands", {}).items()
            )
            lines.append([row["piece"], "", "", "", "", row.get("tests", took)])
    print()
    print(table(["piece", "peak GiB", "gradients s", "claims s", "update s", ""], lines))
    for row in rows:
        if "text" in row:
            print("\n" + row["text"])


def goals(rows: list[Row], longest: int) -> bool:
    met = True
    for row in rows:
        if "limits" in row:
            met &= goal("selection at 1.7B: times the bandwidth limit", row["limits"], at_most=3)
        if row["piece"] == f"step {longest} recomputed" and "peak_bytes" in row:
            text = f"Qwen3-1.7B, 8 x {longest} tokens, T = 16, recomputed: peak GiB"
            met &= goal(text, row["peak_bytes"] / GIB, at_most=60)
    return met


if __name__ == "__main__":
    raise SystemExit(main())
