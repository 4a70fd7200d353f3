"""One question's responses as tensors, and the log-probabilities of their tokens.

Shapes: G responses of one question, P prompt tokens (the same for all), R response tokens (padded on the
right).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssrctl.core.engine_gap import Correction
from ssrctl.training.step_gradients.head import HeadSettings, run_model

if TYPE_CHECKING:
    from ssrctl.models.loading import LoadedModel
    from ssrctl.sampling.groups import Group


@dataclass(frozen=True)
class GroupBatch:
    """The responses to one question as tensors.

    Attributes:
        input_ids: int64 ``[G, P + R]``, prompt and response, padded on the right.
        attention_mask: int64 ``[G, P + R]``, 1 where there is a token.
        prompt_length: P, at least 1.
        old_logprobs: float32 ``[G, R]``, log-probabilities at sampling time, of the importance ratio; 0 in the padding.
        step_ids: int64 ``[G, R]``, each token's step, never falling along a response, -1 in the padding.
        reference: float ``[G, R]``, log-probabilities under the start model; None without a KL term.
        engine_logprobs: float32 ``[G, R]``, those that the engine gave; NaN where it gave none, 0 in the padding. None
            where no engine has sampled.
        correction: weights for what the engine sampled; None weighs all alike.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompt_length: int
    old_logprobs: Tensor
    step_ids: Tensor
    reference: Tensor | None = None
    engine_logprobs: Tensor | None = None
    correction: Correction | None = None

    @property
    def known(self) -> Tensor:
        """bool ``[G, R]``: True at response tokens, False in the padding."""
        return self.attention_mask[:, self.prompt_length :].bool()

    def of_responses(self, rows: Sequence[int]) -> GroupBatch:
        """Return some of the responses, in this order, as wide as the longest of them needs; without a correction."""
        assert self.correction is None, "its counts are of all responses"
        places = torch.tensor(list(rows), device=self.input_ids.device)
        width = int(self.known[places].sum(1).max())

        def some(values: Tensor | None, end: int = width) -> Any:
            return None if values is None else values[places, :end]

        return GroupBatch(
            some(self.input_ids, self.prompt_length + width),
            some(self.attention_mask, self.prompt_length + width),
            self.prompt_length,
            some(self.old_logprobs),
            some(self.step_ids),
            some(self.reference),
            some(self.engine_logprobs),
        )

    @property
    def targets(self) -> Tensor:
        """int64 ``[G, R]``: the response tokens; the logits at column P - 1 + t predict the t-th."""
        return self.input_ids[:, self.prompt_length :]


def make_batch(
    prompt_ids: Sequence[int],
    responses: Sequence[Sequence[int]],
    engine_logprobs: Sequence[Tensor],
    step_ids: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    device: torch.device,
) -> GroupBatch:
    """Pad one group's responses into a batch; every response needs at least one token.

    The old log-probabilities are the engine's, missing ones included.
    """
    prompt_length = len(prompt_ids)
    width = max(len(response) for response in responses)
    rows = len(responses)
    input_ids = torch.full((rows, prompt_length + width), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    old = torch.zeros(rows, width)
    steps = torch.full((rows, width), -1, dtype=torch.int64)
    input_ids[:, :prompt_length] = torch.tensor(list(prompt_ids))
    for row, response in enumerate(responses):
        end = prompt_length + len(response)
        input_ids[row, prompt_length:end] = torch.tensor(list(response))
        attention_mask[row, :end] = 1
        old[row, : len(response)] = engine_logprobs[row]
        steps[row, : len(response)] = torch.tensor(list(step_ids[row]))
    old = old.to(device)
    return GroupBatch(
        input_ids.to(device), attention_mask.to(device), prompt_length, old, steps.to(device), engine_logprobs=old
    )


def response_logprobs(
    model: Any,
    batch: GroupBatch,
    temperature: float = 1.0,
    *,
    rows: Tensor | None = None,
    end: int | None = None,
    settings: HeadSettings | None = None,
) -> Tensor:
    """Compute the log-probability of every response token under the temperature-scaled logits.

    Args:
        model: a causal LM.
        batch: the group.
        temperature: of the sampling.
        rows: int64 indices of the responses wanted; None for all.
        end: number of tokens of each; None for all.
        settings: in place of ``temperature``, with the size of a chunk of logits.

    Returns:
        float32 (float64 for a float64 model) ``[len(rows), end]``, 0 in the padding. The graph is kept where gradients
        are enabled.
    """
    settings = HeadSettings(temperature) if settings is None else settings
    return response_values(model, batch, settings, rows=rows, end=end)[0]


def response_values(
    model: Any, batch: GroupBatch, settings: HeadSettings, *, rows: Tensor | None = None, end: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Compute what ``response_logprobs`` does, and the entropies ``[len(rows), end]`` if the settings ask for them."""
    width = batch.step_ids.shape[1] if end is None else end
    # the last token predicts no token of the response
    inputs = batch.input_ids[:, : batch.prompt_length + width - 1]
    targets, known = batch.targets[:, :width], batch.known[:, :width]
    if rows is not None:
        inputs, targets, known = inputs[rows], targets[rows], known[rows]
    # The padding is on the right, which causal attention never reads; without a mask the faster attention kernels
    # are used.
    logprobs, entropy = run_model(
        model, targets, known, settings, input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False
    )
    places = known.nonzero(as_tuple=True)
    spread = [
        None if values is None else values.new_zeros(known.shape).index_put(places, values)
        for values in (logprobs, entropy)
    ]
    assert spread[0] is not None
    return spread[0], spread[1]


def group_batch(loaded: LoadedModel, group: Group, *, whole_response: bool = False) -> GroupBatch:
    """Return the group as padded tensors on the model's device.

    Args:
        loaded: the model.
        group: sampled and segmented.
        whole_response: treat each response as one step 0, as sequence-level credit does.
    """
    steps = [[0] * len(s.response_ids) for s in group.samples] if whole_response else group.token_steps
    return make_batch(
        group.prompted.prompt_ids,
        [sample.response_ids for sample in group.samples],
        [sample.logprobs for sample in group.samples],
        steps,
        pad_token_id=loaded.tokenizer.pad_token_id,
        device=loaded.device,
    )
