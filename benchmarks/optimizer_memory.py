"""Memory of a training step on top of the weights: AdamW, SHiRA, and KronosOpt, on one model in one run.

Every optimizer takes a step of four questions with five units each, 1% of the weights per unit. A unit is a forward and
a backward pass over a few random tokens, so that activations are small beside gradients and state (they are counted
all the same). Counted are all live tensors at their peak, without the weights themselves.

    python benchmarks/optimizer_memory.py [--model FOLDER]
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
from collections.abc import Callable, Iterator

import torch
from common import goal, machine
from shapes import llama_135m

from ssrctl.core.bits import bits_to_indices
from ssrctl.core.kronos import KronosOpt
from ssrctl.training.live_bytes import LiveBytes

QUESTIONS, UNITS, TOKENS = 4, 5, 8
Model = torch.nn.Module
Run = Callable[[Model, LiveBytes], float]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", help="a causal LM's folder; by default random weights in SmolLM2-135M's shapes")
    options.add_argument(
        "--vocab",
        type=int,
        default=8192,
        help="vocabulary of the random model, untied; 8192 gives an embedding the share it has in models of several billion",
    )
    options.add_argument("--tied", action="store_true", help="one table for embedding and output")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--steps", type=int, default=2, help="the peak of the last one counts")
    given = options.parse_args()
    print(machine())
    model = load(given).to(given.device)
    count = sum(p.numel() for p in model.parameters())
    largest = max(p.numel() for p in model.parameters()) / count
    print(
        f"{count / 1e6:.1f}M bfloat16 weights, largest tensor {largest:.0%} of them; {QUESTIONS} questions x {UNITS} units\n"
    )
    print(f"{'optimizer':26} {'peak bytes/weight':>18} {'weights touched':>16}")
    reached = {}
    for name, run in RUNS.items():
        tried = copy.deepcopy(model)
        with LiveBytes() as live:
            live.ignore(*tried.parameters(), *tried.buffers())
            touched = steps(run, tried, live, given.steps)
        reached[name] = live.peak / count, touched
        print(f"{name:26} {live.peak / count:18.2f} {touched:16.1%}", flush=True)
        del tried
        gc.collect()
    if importlib.util.find_spec("bitsandbytes") is None:
        print("bitsandbytes is not installed: its 8-bit AdamW is left out")
    print()
    dense = reached["AdamW, float32 masters"][0]
    for name, limit in (("kronos sgd, global", 3.5), ("kronos sgd, tensor", 1.6)):
        peak, touched = reached[name]
        goal(
            f"{name}: peak beside {MASTER_BYTES} bytes per touched weight", peak - MASTER_BYTES * touched, at_most=limit
        )
        print(f"      AdamW with float32 masters takes {dense / peak:.1f} times as much")
    held = reached["kronos sgd, global"]
    print(
        f"masters: {MASTER_BYTES} bytes per touched weight, {MASTER_BYTES * held[1]:.3f} bytes per weight here (limit 3 per touched)"
    )


MASTER_BYTES = 2


def load(given: argparse.Namespace) -> Model:
    from transformers import AutoModelForCausalLM

    if given.model is None:
        return llama_135m(torch.bfloat16, vocab_size=given.vocab, tied=given.tied)
    return AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16)


def losses(model: Model, seed: int) -> Iterator[torch.Tensor]:
    """Yield the losses of one question, one per unit."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    for _ in range(UNITS):
        ids = torch.randint(0, model.config.vocab_size, (1, TOKENS), generator=generator).to(device)
        yield model(input_ids=ids, labels=ids, use_cache=False).loss


def steps(make: Run, model: Model, live: LiveBytes, count: int) -> float:
    """Run an optimizer's steps; the peak is that of the last step."""
    runner = make(model)
    for number in range(count):
        gc.collect()
        live.reset_peak()
        for question in range(QUESTIONS):
            runner.question(losses(model, 100 * number + question))
        runner.step()
    gc.collect()
    return runner.touched()


class Dense:
    """An optimizer that takes the sum of all gradients."""

    def __init__(self, model: Model, optimizer: torch.optim.Optimizer, trained: float = 1.0) -> None:
        self.model, self.optimizer, self.trained = model, optimizer, trained

    def question(self, units: Iterator[torch.Tensor]) -> None:
        for loss in units:
            loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def touched(self) -> float:
        return self.trained


class WithMasters(Dense):
    """AdamW on float32 copies of the weights, as mixed-precision training keeps them."""

    def __init__(self, model: Model) -> None:
        self.weights = list(model.parameters())
        self.masters = [w.detach().float() for w in self.weights]
        super().__init__(model, torch.optim.AdamW(self.masters, lr=1e-4))

    @torch.no_grad()
    def step(self) -> None:
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        super().step()
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.copy_(master)


class Kronos:
    """KronosOpt."""

    def __init__(self, model: Model, **settings: str) -> None:
        self.optimizer = KronosOpt(model.named_parameters(), lr=1e-4, **settings)

    def question(self, units: Iterator[torch.Tensor]) -> None:
        self.optimizer.begin_question(UNITS)
        for loss in units:
            loss.backward()
            self.optimizer.claim()

    def step(self) -> None:
        self.optimizer.step()

    def touched(self) -> float:
        named, touched = self.optimizer.named, self.optimizer.touched
        count = sum(bits_to_indices(touched[name], named[name].numel()).numel() for name in named)
        return count / self.optimizer.num_coordinates


def shira(model: Model) -> Dense:
    """PEFT's sparse high-rank adapter with about 1% of the weights of every linear layer."""
    from peft import ShiraConfig, get_peft_model

    # its rank r gives r * (rows + columns) weights per matrix
    linear = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    rank = max(1, round(0.01 * sum(m.weight.numel() for m in linear) / sum(sum(m.weight.shape) for m in linear)))
    names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if m in linear})
    adapted = get_peft_model(model, ShiraConfig(r=rank, target_modules=names, random_seed=0))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    share = sum(p.numel() for p in trained) / sum(p.numel() for p in model.parameters())
    return Dense(adapted, torch.optim.AdamW(trained, lr=1e-4), share)


RUNS = {
    "AdamW, bfloat16 state": lambda model: Dense(model, torch.optim.AdamW(model.parameters(), lr=1e-4)),
    "AdamW, float32 masters": WithMasters,
    "kronos sgd, global": lambda model: Kronos(model),
    "kronos sgd, tensor": lambda model: Kronos(model, scope="tensor"),
    "kronos adam, global": lambda model: Kronos(model, update_rule="adam"),
    "kronos adam, tensor": lambda model: Kronos(model, update_rule="adam", scope="tensor"),
}
if importlib.util.find_spec("peft") is not None:
    RUNS["PEFT SHiRA 1%, AdamW"] = shira
if importlib.util.find_spec("bitsandbytes") is not None:
    import bitsandbytes

    RUNS["AdamW 8-bit (bitsandbytes)"] = lambda model: Dense(
        model, bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-4)
    )

if __name__ == "__main__":
    main()
