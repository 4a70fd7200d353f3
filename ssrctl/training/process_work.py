"""The share of each process in a training step, and the check that all processes still have the same weights."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from ssrctl.distributed.dealing import Share
from ssrctl.distributed.exchange import check_replicas, weights_fingerprint
from ssrctl.distributed.world import World


class ProcessWork:
    """The work of this process in the training step in progress.

    Args:
        world: the processes that share a batch.

    Attributes:
        questions: that this process learned from, alone or with others.
        responses: of these that were its own.
        sample_seconds, learn_seconds: of its own work, without waiting for others.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.questions = self.responses = 0
        self.sample_seconds = self.learn_seconds = 0.0

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Time the sampling of this process's questions."""
        started = time.perf_counter()
        yield
        self.sample_seconds += time.perf_counter() - started

    @contextlib.contextmanager
    def learning(self, shares: Sequence[Share]) -> Iterator[None]:
        """Time one pass over this process's questions."""
        started = time.perf_counter()
        self.questions, self.responses = len(shares), sum(len(share.responses) for share in shares)
        yield
        self.learn_seconds += time.perf_counter() - started

    def shares(self, weights: Iterable[Tensor] | None) -> dict[str, Any]:
        """End the step: compare the processes' weights, and return the part of its metrics that says who did what.

        Args:
            weights: of this process's replica; None where each has a shard of its own.

        Returns:
            Empty with one process.

        Raises:
            Failed: the weights of some process differ.
        """
        seconds = {"sample_seconds": self.sample_seconds, "learn_seconds": self.learn_seconds}
        self.sample_seconds = self.learn_seconds = 0.0
        if self.world.size == 1:
            return {}
        work = {"rank": self.world.rank, "questions": self.questions, "responses": self.responses, **seconds}
        work |= self.world.take_traffic()
        everyone = self.world.gather((0 if weights is None else weights_fingerprint(list(weights)), work))
        check_replicas([found for found, _ in everyone], "after this step")
        return {"num_processes": self.world.size, "processes": [work for _, work in everyone]}
