"""The start model's log-probabilities, for the KL term (``--beta``) and for its log."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch


class StartWeights:
    """A copy of the weights that training starts from, exchanged with the current ones for a forward pass.

    The exchange moves no data: each parameter points to the other storage for a while. Kept is the whole copy: KronosOpt touches
    up to a fifth of the coordinates in the first step and about half in a run, whose base values and indices would take as much.

    Args:
        named: the parameters by name, before their first update, and before a checkpoint is applied.
        copies: exchange the numbers instead, where the storage is also another's: the shards of FSDP.
    """

    def __init__(self, named: Mapping[str, torch.nn.Parameter], *, copies: bool = False) -> None:
        self.named, self.copies = dict(named), copies
        self._saved = {name: parameter.detach().clone() for name, parameter in self.named.items()}

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the start weights, without gradients; the current ones return to the bit."""
        self._exchange()
        try:
            with torch.no_grad():
                yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, parameter in self.named.items():
            if self.copies:
                now = parameter.detach().clone()
                parameter.data.copy_(self._saved[name])
                self._saved[name] = now
            else:
                parameter.data, self._saved[name] = self._saved[name], parameter.data
