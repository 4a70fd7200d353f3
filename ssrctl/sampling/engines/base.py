"""The interface of the engines that sample responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from ssrctl.errors import UserError


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
    """

    response_ids: list[int]
    logprobs: Tensor
    text: str
    finish_reason: Literal["stop", "length"]
    version: int

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
