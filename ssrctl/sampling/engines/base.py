"""The interface of the engines that sample responses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from ssrctl.errors import Stopped, UserError


@dataclass(frozen=True)
class Request:
    """One response to sample.

    Attributes:
        ids: tokens to continue, a prompt or a prompt with the beginning of a response; at least one.
        limit: most tokens to add, at least 1; ``len(ids) + limit`` is within the model's context.
        seed: seed of this response's random numbers.
    """

    ids: Sequence[int]
    limit: int
    seed: int


@dataclass(frozen=True)
class Sample:
    """One sampled response.

    Attributes:
        response_ids: the sampled tokens, through the end token, or the token that completes a text of ``--stop``.
        logprobs: float32 ``[len(response_ids)]`` on the CPU: log-probability of each sampled token under the
            temperature-scaled logits, before top-p or top-k; NaN where the engine gave none.
        text: the response without special tokens; a text of ``--stop`` stays in it, with the rest of its last token.
        finish_reason: ``stop`` if an end token or a text of ``--stop`` was sampled, ``length`` if the limit came first.
        version: of the weights that it was sampled from.
        stopped: True if a text of ``--stop`` ended it, so that no end token was sampled.
    """

    response_ids: list[int]
    logprobs: Tensor
    text: str
    finish_reason: Literal["stop", "length"]
    version: int
    stopped: bool = False

    @property
    def finished(self) -> bool:
        """True if the response ended by itself within the limit."""
        return self.finish_reason == "stop"


class Engine(Protocol):
    """An engine that samples responses from a model.

    A response is decided by the model, the settings, its tokens and its seed, not by the other requests, as far as the
    engine allows.

    Attributes:
        version: of the weights that it samples from; 0 at the start.
    """

    version: int

    def sample(self, requests: Sequence[Request]) -> Iterator[tuple[int, Sample]]:
        """Yield (place in ``requests``, sample), each place once, in the order in which the samples are complete."""


# By parameter name: ascending flat indices (int64) and the values there, on the CPU.
Changes = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Push:
    """One push of weights to an engine.

    Attributes:
        kind: ``changes``, ``full`` for all weights (also after changes that were not taken), ``none`` without a change.
        num_coordinates: that changed; 0 in a push of all weights that was asked for.
        num_bytes: that were sent.
        seconds: that it took.
    """

    kind: Literal["none", "changes", "full"]
    num_coordinates: int
    num_bytes: int
    seconds: float


@dataclass(frozen=True)
class Probe:
    """The answers of an engine to the probe.

    Attributes:
        gap_mean, gap_max: of \\|difference\\| between engine and trainer over the sampled tokens; NaN counts as infinite.
        answers: (tokens, the engine's log-probabilities) of each request.
    """

    gap_mean: float
    gap_max: float
    answers: list[tuple[list[int], Tensor]]

    def same_as(self, other: Probe) -> bool:
        """Return True if another probe has the same tokens, and log-probabilities that differ by rounding only."""
        return all(
            ours == theirs and torch.allclose(a, b, rtol=0, atol=1e-5)
            for (ours, a), (theirs, b) in zip(self.answers, other.answers, strict=True)
        )


class StaleSamples(Stopped):
    """Responses that were sampled from other weights than those in force."""


class ServedEngine(Engine, Protocol):
    """An engine with weights of its own, which follow the trainer's by pushes; all processes call its methods but ``sample``.

    Attributes:
        full_bytes: of all weights.
        full_seconds: of the last push of these; None before one.
        probe: the last one; None before one.
    """

    full_seconds: float | None
    probe: Probe | None

    @property
    def full_bytes(self) -> int: ...

    def push(self, changes: Changes | None, before: Mapping[str, Tensor] | None = None) -> Push:
        """Bring the engine to the trainer's weights.

        Args:
            changes: the coordinates that differ from the push before, with their values; None for all weights.
            before: the values there at the push before, by parameter name, which make a push smaller.

        Raises:
            Stopped: the engine is gone, or does not take the weights.
        """

    def heal(self, reason: str) -> None:
        """Bring the engine to the trainer's weights after ``StaleSamples`` in a process; ``reason`` is its message.

        Raises:
            Stopped: the engine is gone, or does not take the weights.
        """

    def check(self) -> Probe:
        """Compare the engine's log-probabilities of fixed prompts with the trainer's.

        Raises:
            Stopped: they are farther apart than rounding explains.
        """

    def close(self) -> None:
        """Release the engine."""


def sample_all(engine: Engine, requests: Sequence[Request]) -> list[Sample]:
    """Return one sample per request, in their order.

    Raises:
        UserError: the engine gave fewer samples than requests, or one without a token.
    """
    found = {place: sample for place, sample in engine.sample(requests) if sample.response_ids}
    if len(found) < len(requests):
        raise UserError(
            f"{type(engine).__name__} returned {len(found)} responses with at least one token, {len(requests)} were asked "
            "for",
            "look for errors of the engine that samples; nothing was learned from this batch",
        )
    return [found[place] for place in range(len(requests))]
