"""Going through the tensors of open checkpoints, a few at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from ssrctl.stages.diagnose.deliver import stderr

if TYPE_CHECKING:
    from torch import Tensor

    from ssrctl.measures.sparsity import Rule

Made = TypeVar("Made")

RULES: dict[Rule, str] = {
    "bits": "any stored bit changed",
    "atol": "moved by more than {atol:g}",
    "bf16": "moved by more than {eta:g} of its size, as bf16 (Zhu et al. 2025, definition 2.1)",
}


def changed_rule(rule: Rule, atol: float, eta: float) -> tuple[Callable[[Tensor, Tensor], Tensor], str]:
    """(what tells changed weights, the same in words)."""
    from ssrctl.measures.sparsity import changed

    def differs(base: Tensor, tuned: Tensor) -> Tensor:
        return changed(base, tuned, rule, atol=atol, eta=eta)

    return differs, RULES[rule].format(atol=atol, eta=eta)


def each_tensor(
    names: Sequence[str], work: Callable[[str], Made], num_workers: int, what: str
) -> Iterator[tuple[str, Made]]:
    """Yield (name, result) in the order of ``names``; at most ``num_workers`` tensors are in work at once."""
    import torch
    from rich.progress import track

    threads = torch.get_num_threads()
    console = stderr()
    with ThreadPoolExecutor(num_workers) as pool, contextlib.ExitStack() as stack:
        # As many threads of torch as cores are left, so that two decompositions do not fight for both.
        torch.set_num_threads(max(1, threads // num_workers))
        stack.callback(torch.set_num_threads, threads)
        made = pool.map(work, names)
        yield from zip(
            names,
            track(made, what, total=len(names), console=console, transient=True, disable=not console.is_terminal),
            strict=True,
        )
