"""The interface between the stages and the engine that samples responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

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
            temperature-scaled logits, before top-p or top-k.
        text: the response without special tokens; a text of ``--stop`` stays in it, with the rest of its last token.
        finished: True if an end token or a text of ``--stop`` was sampled within the limit.
        stopped: True if it is the text that ended the response; no end token was sampled then.
    """

    response_ids: list[int]
    logprobs: Tensor
    text: str
    finished: bool
    stopped: bool = False


class Sampler(Protocol):
    """An engine that samples responses from a model.

    A response is decided by the model, the settings, its tokens and its seed, not by the other requests, as far as the
    engine allows. ``generate.TransformersSampler`` is the engine in use; one that talks to a server has the same method.
    """

    def sample(self, requests: Sequence[Request]) -> Iterator[tuple[int, Sample]]:
        """Yield (place in ``requests``, sample), each place once, in the order in which the samples are complete."""


def sample_all(sampler: Sampler, requests: Sequence[Request]) -> list[Sample]:
    """Return one sample per request, in their order.

    Raises:
        UserError: the engine gave fewer samples than requests, or one without a token.
    """
    found = {place: sample for place, sample in sampler.sample(requests) if sample.response_ids}
    if len(found) < len(requests):
        raise UserError(
            f"{type(sampler).__name__} returned {len(found)} responses with at least one token, {len(requests)} were asked "
            "for",
            "look for errors of the engine that samples; nothing was learned from this batch",
        )
    return [found[place] for place in range(len(requests))]
