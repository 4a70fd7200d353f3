"""Optimizer state of a static 1% mask against dense AdamW, measured after one step of each.

The shapes are those of Qwen2.5-0.5B (494M coordinates, embeddings tied), the mask is random with the same share
of every tensor. Dense AdamW keeps two moments; Adewuyi et al. 2026, table 5, report 3,769.5 MiB for it and
75.6 MiB for the masked coordinates. Every layer is stepped on its own and its weights dropped after that, so
that the script fits in a few GiB; what is counted are the bytes of the state tensors that the optimizers hold.

    python benchmarks/static_mask_memory.py [--density 0.01] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator

import torch
from common import goal, machine, peak_rss_bytes, table

from ssrctl.core.mask import BlockMask, TileSet
from ssrctl.core.masked_adamw import MaskedAdamW

PAPER_FULL, PAPER_MASKED = 3769.5, 75.6  # MiB, at 99% sparsity
MIB = 2**20
Shapes = dict[str, tuple[int, ...]]


def qwen25_shapes() -> Iterator[Shapes]:
    """Yield the shapes of Qwen2.5-0.5B's trainable tensors, a layer at a time."""
    hidden, intermediate, query, key = 896, 4864, 14 * 64, 2 * 64
    yield {"model.embed_tokens.weight": (151936, hidden), "model.norm.weight": (hidden,)}
    for layer in range(24):
        shapes = {
            "self_attn.q_proj.weight": (query, hidden),
            "self_attn.q_proj.bias": (query,),
            "self_attn.k_proj.weight": (key, hidden),
            "self_attn.k_proj.bias": (key,),
            "self_attn.v_proj.weight": (key, hidden),
            "self_attn.v_proj.bias": (key,),
            "self_attn.o_proj.weight": (hidden, query),
            "mlp.gate_proj.weight": (intermediate, hidden),
            "mlp.up_proj.weight": (intermediate, hidden),
            "mlp.down_proj.weight": (hidden, intermediate),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
        yield {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}


def random_mask(shapes: Shapes, density: float, generator: torch.Generator) -> BlockMask:
    """Draw each coordinate with probability ``density``."""
    tensors = {}
    for name, shape in shapes.items():
        numel, found = int(torch.tensor(shape).prod()), []
        for start in range(0, numel, 1 << 24):
            draws = torch.rand(min(1 << 24, numel - start), generator=generator)
            found.append((draws < density).nonzero().flatten() + start)
        tensors[name] = TileSet.from_indices(shape, torch.cat(found))
    return BlockMask(tensors)


def state_bytes(optimizer: torch.optim.Optimizer) -> Counter[str]:
    """Count the bytes of every state tensor, by field."""
    sizes = Counter[str]()
    for state in optimizer.state.values():
        sizes.update({field: value.numel() * value.element_size() for field, value in state.items()})
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    print(machine())
    generator = torch.Generator().manual_seed(0)
    numel = trained = 0
    sizes = {"MaskedAdamW": Counter[str](), "AdamW, float32 moments": Counter[str]()}
    sizes[f"AdamW, {arguments.dtype} moments"] = Counter[str]()
    seconds = dict.fromkeys(sizes, 0.0)
    for shapes in qwen25_shapes():
        mask = random_mask(shapes, arguments.density, generator)
        numel, trained = numel + mask.numel, trained + mask.count()
        for name in sizes:
            # Dense AdamW keeps its moments in the weights' dtype; the paper's figure is for float32.
            wide = torch.float32 if "float32" in name else dtype
            params = {n: torch.nn.Parameter(torch.zeros(shape, dtype=wide)) for n, shape in shapes.items()}
            optimizer = (
                MaskedAdamW(params.items(), mask) if name == "MaskedAdamW" else torch.optim.AdamW(params.values())
            )
            for parameter in params.values():
                parameter.grad = torch.full_like(parameter, 1e-3)
            start = time.perf_counter()
            optimizer.step()
            seconds[name] += time.perf_counter() - start
            sizes[name].update(state_bytes(optimizer))
            del params, parameter, optimizer
    print(
        f"{numel / 1e6:.1f}M coordinates of {arguments.dtype}, {trained / 1e6:.2f}M in the mask ({trained / numel:.3%})"
    )
    rows = []
    for name, fields in sizes.items():
        total = sum(fields.values())
        rows.append([name, f"{total / MIB:.1f}", f"{total / trained:.2f}", f"{seconds[name]:.2f}"])
        rows += [[f"  {field}", f"{size / MIB:.1f}", f"{size / trained:.2f}", ""] for field, size in fields.items()]
    print(table(["state after one step", "MiB", "bytes per masked coordinate", "s per step"], rows))
    ours, dense = (sum(sizes[name].values()) / MIB for name in ("MaskedAdamW", "AdamW, float32 moments"))
    print(f"dense / masked: {dense / ours:.1f} here, {PAPER_FULL / PAPER_MASKED:.1f} in the paper")
    print(f"peak memory of this script: {peak_rss_bytes() / 2**30:.1f} GiB")
    goal("MiB of state for a 1% mask of Qwen2.5-0.5B", ours, at_most=PAPER_MASKED)


if __name__ == "__main__":
    main()
