"""Peak memory of the log-probabilities, forward and backward, against the log-softmax of all logits.

Hidden states of G responses of R tokens meet an output projection of V rows. Counted are live tensors beside the
inputs and the gradients of both, as a share of the logits ``[G, R, V]`` in float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from common import goal, machine, table
from live_bytes import LiveBytes

from ssrctl.core.token_logprobs import Projection, token_logprobs
from ssrctl.training.step_gradients.head import LOGIT_CHUNK_TOKENS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--logit-chunk-tokens", type=int, nargs="+", default=[32, LOGIT_CHUNK_TOKENS])
    parser.add_argument("--peer-tokens", type=int, default=64, help="positions of the log-softmax of all logits")
    options = parser.parse_args()
    print(machine())
    positions, dtype = options.rows * options.tokens, getattr(torch, options.dtype)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = torch.randn(positions, options.hidden, device=device).to(dtype).requires_grad_()
    weight = torch.randn(options.vocabulary, options.hidden, device=device).mul_(0.05).to(dtype).requires_grad_()
    targets = torch.randint(0, options.vocabulary, (positions,), device=device)

    def all_logits(count: int) -> None:
        logits = (hidden[:count] @ weight.mT).float()
        logits.log_softmax(-1).gather(-1, targets[:count, None]).sum().backward()

    def in_blocks(count: int, chunk_tokens: int) -> None:
        settings = Projection(chunk_tokens=chunk_tokens, with_entropy=True)
        token_logprobs(hidden[:count], weight, None, targets[:count], settings)[0].sum().backward()

    def measured(run: Callable[[], None], count: int) -> float:
        hidden.grad = weight.grad = None
        with LiveBytes() as live:
            live.ignore(hidden, weight, targets)
            run()
        assert hidden.grad is not None and weight.grad is not None
        beside = live.peak - hidden.grad.nbytes - weight.grad.nbytes
        return beside / (count * options.vocabulary * 4)

    count = min(positions, options.peer_tokens)
    share = measured(partial(all_logits, count), count)
    lines = [["all logits", count, f"{share:.2f}"]]
    reached = 0.0
    for chunk_tokens in options.logit_chunk_tokens:
        share = measured(partial(in_blocks, positions, chunk_tokens), positions)
        lines.append([f"--logit-chunk-tokens {chunk_tokens}", positions, f"{share:.3f}"])
        reached = share
    print(table(["way", "positions", "peak / logits"], lines))
    met = goal(f"peak beside gradients / [G, R, V] in float32, {options.dtype}", reached, at_most=0.15)
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
