"""A model's log-probabilities of tokens through its output projection, without its logits.

The model runs as always, but its output projection gets no positions: the hidden states that it would have projected
are kept, and ``core.token_logprobs`` projects them in blocks. Models differ in the step from projection to logits
(a factor, a soft cap); the form is found once per model by comparison with the model's own logits. A model with
another form computes its logits as before.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssrctl.core.token_logprobs import LogitForm, Projection, token_logprobs

# Names under which configs keep the factor (or its inverse) and the bound of the logits.
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Size of the logits at which forms are compared: large enough for a soft cap to show.
PROBED_LOGIT = 64.0
LOGIT_CHUNK_TOKENS = 128

_forms: weakref.WeakKeyDictionary[torch.nn.Module, LogitForm | None] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class HeadSettings:
    """Settings of the log-probabilities.

    Attributes:
        temperature: of the sampling.
        chunk_tokens: positions whose logits may exist at once.
        with_entropy: compute the entropy of each distribution too.
    """

    temperature: float = 1.0
    chunk_tokens: int = LOGIT_CHUNK_TOKENS
    with_entropy: bool = False


def forward_parameters(model: Any) -> set[str]:
    """Return the names that the model's forward method takes."""
    return set(inspect.signature(model.forward).parameters)


def run_model(
    model: Any, targets: Tensor, wanted: Tensor, settings: HeadSettings, **inputs: Any
) -> tuple[Tensor, Tensor | None]:
    """Run the model and compute the log-probabilities of tokens from its last positions.

    Args:
        model: a causal LM.
        targets: int64 ``[G, w]``, the token that each of the last w positions predicts. With one row of inputs and
            several rows of targets, all use the same position.
        wanted: bool ``[G, w]``, True where the log-probability is computed.
        settings: see ``HeadSettings``.
        inputs: the arguments of the model, ``input_ids`` int64 ``[G, n]`` or ``[1, n]`` among them.

    Returns:
        The log-probabilities of the n wanted tokens, row by row, ``[n]`` (float32, float64 for a float64 model), with
        a graph where gradients are enabled, and the entropies ``[n]`` without one; None unless requested.
    """
    width = targets.shape[1]
    # without a wanted token one logit is computed nevertheless: 0 would mean all
    kept = {"logits_to_keep": max(1, width)} if "logits_to_keep" in forward_parameters(model) else {}
    form, head = logit_form(model, inputs["input_ids"]), model.get_output_embeddings()
    chosen = targets[wanted]
    settled = Projection(form or LogitForm(), settings.temperature, settings.chunk_tokens, settings.with_entropy)
    if form is not None:
        with projecting_nothing(head) as seen:
            model(**inputs, **kept)
        hidden = seen[0][:, seen[0].shape[1] - width :]
        states = hidden.expand(len(targets), -1, -1)[wanted]
        return token_logprobs(states, head.weight, head.bias, chosen, settled)
    logits = model(**inputs, **kept).logits
    logits = logits[:, logits.shape[1] - width :].expand(len(targets), -1, -1)[wanted]
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / settings.temperature
    logprobs = scaled.log_softmax(-1)
    entropy = torch.special.entr(logprobs.detach().exp()).sum(-1) if settings.with_entropy else None
    return logprobs.gather(-1, chosen[:, None]).squeeze(-1), entropy


@contextlib.contextmanager
def projecting_nothing(head: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Let the projection run on no position; the list receives the hidden states ``[G, n, H]`` of all."""
    seen: list[Tensor] = []

    def cut(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(args[0])
        return (args[0][:, :0], *args[1:])

    hook = head.register_forward_pre_hook(cut)
    try:
        yield seen
    finally:
        hook.remove()


def logit_form(model: Any, input_ids: Tensor) -> LogitForm | None:
    """Return the function from the output projection to the model's logits; None for one that is not known.

    Args:
        model: a causal LM.
        input_ids: int64 ``[G, n]``; the first tokens are run to compare, once per model.
    """
    if model not in _forms:
        with torch.no_grad():
            _forms[model] = _find_form(model, input_ids[:1, :2])
    return _forms[model]


def _find_form(model: Any, input_ids: Tensor) -> LogitForm | None:
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or type(head).forward is not torch.nn.Linear.forward:
        return None
    projected: list[Tensor] = []

    def enlarge(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].dim() != 3:
            return None
        plain = torch.nn.functional.linear(args[0], module.weight, module.bias)
        hidden = args[0] * (PROBED_LOGIT / plain.abs().max())
        projected.append(torch.nn.functional.linear(hidden, module.weight, module.bias))
        return (hidden, *args[1:])

    hook = head.register_forward_pre_hook(enlarge)
    try:
        logits = model(input_ids=input_ids).logits
    finally:
        hook.remove()
    if len(projected) != 1 or projected[0].shape != logits.shape or not bool(projected[0].isfinite().all()):
        return None
    # the model may compute the factor and the cap in its own precision, at most four rounded steps
    allowed = 4 * torch.finfo(projected[0].dtype).eps
    for form in _candidates(model.config.get_text_config()):
        expected = form.apply(projected[0].clone())
        if bool((expected - logits).abs().max() <= allowed * expected.abs().max()):
            return form
    return None


def _candidates(config: Any) -> Iterator[LogitForm]:
    factors = [value for name in SCALES if isinstance(value := getattr(config, name, None), (int, float)) and value]
    scales = [1.0, *(each for factor in factors for each in (float(factor), 1 / factor))]
    caps = [
        float(value) for name in SOFTCAPS if isinstance(value := getattr(config, name, None), (int, float)) and value
    ]
    yield from (LogitForm(scale, cap) for scale, cap in itertools.product(scales, [None, *caps]))
