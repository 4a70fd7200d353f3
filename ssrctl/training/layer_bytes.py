"""The memory of a model's layers from its config alone.

The first layers, up to the first of each kind, run forward and backward on tensors without data (torch's fake tensors,
which take the kernels of a CPU: fused attention keeps no matrix of scores). Their bytes are counted between the layers,
for one and two rows of three lengths, which extends them to any batch; each kind counts as often as the model has it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves

from ssrctl.errors import UserError, first_line
from ssrctl.models.loading import context_length
from ssrctl.training.checkpointing import enable_checkpointing, outer_layers
from ssrctl.training.live_bytes import LiveBytes
from ssrctl.training.lora import wrap
from ssrctl.training.step_gradients.head import projecting_nothing

# Tokens; longer responses follow from the parabola through the probed lengths. Layers with operations per token get fewer.
MOST_PROBED, MOST_PER_TOKEN = 1024, 128
CACHE_PROBES = (4, 8)  # tokens, fewer than any window has


class UnknownActivations(UserError):
    """A model whose layers cannot run on tensors without data."""


@dataclass(frozen=True)
class LayerBytes:
    """The activations of a batch.

    Attributes:
        kept: bytes that the model keeps until the backward pass.
        first: those of them that last until the backward pass of the first layer.
        backward: most bytes beyond those kept while a layer is backpropagated, one gradient of its weights included.
    """

    kept: float
    first: float
    backward: float


@dataclass(frozen=True)
class CacheBytes:
    """The cache of one response.

    Attributes:
        token: bytes of keys and values per token.
        state: bytes that do not grow with the length, as those of a linear attention.
        per_token: True if the layers walk through the tokens one by one.
    """

    token: float
    state: float
    per_token: bool


class LayerProbe:
    """The layers of one model, run without data.

    Args:
        model: on any device, the meta device included.

    The methods raise ``UnknownActivations`` for a model whose layers cannot run so.
    """

    def __init__(self, model: Any) -> None:
        self.described, self.adapters = model.config, getattr(model, "peft_config", {})
        self.kinds = [_kind(layer) for layer in outer_layers(model.get_decoder())]
        self.depth = max((self.kinds.index(kind) + 1 for kind in set(self.kinds)), default=1)
        self.context = context_length(model.config) or MOST_PROBED
        self._activations = functools.cache(self._probe_activations)
        self.cache = functools.cache(self._probe_cache)

    def activations(self, rows: int, tokens: int, checkpointed: bool, dtype: torch.dtype, attention: str) -> LayerBytes:
        """Return the activations of ``rows`` responses of ``tokens`` tokens each, their prompts included.

        Args:
            rows, tokens: of the batch.
            checkpointed: True if layers keep only their inputs.
            dtype: of weights and activations.
            attention: the name of the implementation; ``auto`` for the model's own.
        """
        probes = self._activations(checkpointed, dtype, attention)
        sizes = dict.fromkeys((field.name for field in fields(LayerBytes)), 0.0)
        for length, (single, double) in probes.items():
            factor = math.prod((tokens - other) / (length - other) for other in probes if other != length)
            for name in sizes:
                one, two = getattr(single, name), getattr(double, name)
                sizes[name] += factor * (one + (rows - 1) * (two - one))
        return LayerBytes(**{name: max(0.0, size) for name, size in sizes.items()})

    def _probe_activations(
        self, checkpointed: bool, dtype: torch.dtype, attention: str
    ) -> dict[int, tuple[LayerBytes, LayerBytes]]:
        """Return the activations of one and two rows, by their tokens."""
        most = min(self.context, MOST_PER_TOKEN if self.cache(dtype).per_token else MOST_PROBED)
        with self._without_data(dtype, attention) as model:
            if checkpointed:
                enable_checkpointing(model)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(_drop)
            lengths = (most // 4, most // 2, most)
            return {length: (self._measured(model, 1, length), self._measured(model, 2, length)) for length in lengths}

    def _measured(self, model: Any, rows: int, tokens: int) -> LayerBytes:
        """Run the layers forward and backward once, and count."""
        layers, live = outer_layers(model.get_decoder()), LiveBytes()
        entered: list[int] = []
        left: list[int] = []
        others: list[dict[weakref.ref[torch.UntypedStorage], int]] = []  # results besides the hidden states
        peaks: list[int] = []  # of the backward passes, from the last layer to the first

        def begin_backward(_: torch.Tensor) -> None:
            peaks.append(live.peak)
            live.reset_peak()

        def leave(_layer: Any, _given: Any, made: Any) -> None:
            left.append(live.now)
            states, *rest = [part for part in tree_leaves(made) if isinstance(part, torch.Tensor)]
            others.append({weakref.ref(part.untyped_storage()): part.untyped_storage().nbytes() for part in rest})
            states.register_hook(begin_backward)

        hooks = [layer.register_forward_pre_hook(lambda *_: entered.append(live.now)) for layer in layers]
        hooks += [layer.register_forward_hook(leave) for layer in layers]
        with live:
            out, _ = _run(model, rows, tokens)
            total = live.now
            dropped = [sum(size for part, size in made.items() if part() is None) for made in others]
            live.reset_peak()
            out.sum().backward()
            peaks.append(live.peak)
        for hook in hooks:
            hook.remove()
        each = [after - before - gone for before, after, gone in zip(entered, left, dropped, strict=True)]
        base = total - sum(each)
        # the peak in a layer's backward pass, beyond what it and those before it keep
        beyond = [
            peak - base - sum(each[: number + 1])
            for number, peak in zip(reversed(range(len(each))), peaks[1:], strict=True)
        ]
        return LayerBytes(base + self._over_all(each), base + each[0], max(0, *beyond))

    def _probe_cache(self, dtype: torch.dtype) -> CacheBytes:
        sizes, operations = [], []
        with self._without_data(dtype, "auto") as model, torch.no_grad():
            for tokens in CACHE_PROBES:
                with LiveBytes() as live:
                    _, made = _run(model, 1, tokens, use_cache=True)
                operations.append(live.operations)
                cache = getattr(made, "past_key_values", None) or getattr(made, "cache_params", None)
                each = [
                    sum(part.nbytes for part in tree_leaves(vars(layer)) if isinstance(part, torch.Tensor))
                    for layer in getattr(cache, "layers", ())
                ]
                sizes.append(self._over_all(each + [0] * (self.depth - len(each))))
        token = (sizes[1] - sizes[0]) / (CACHE_PROBES[1] - CACHE_PROBES[0])
        return CacheBytes(token, sizes[0] - token * CACHE_PROBES[0], operations[1] > operations[0])

    def _over_all(self, sizes: list[int]) -> float:
        """Return the sum over all layers of the model from the sizes of the first ones, each kind at its mean."""
        found = defaultdict(list)
        for kind, size in zip(self.kinds, sizes, strict=False):
            found[kind].append(size)
        return sum(count * sum(found[kind]) / len(found[kind]) for kind, count in Counter(self.kinds).items())

    @contextlib.contextmanager
    def _without_data(self, dtype: torch.dtype, attention: str) -> Iterator[Any]:
        """Build the first layers without data; errors of torch and transformers become ``UnknownActivations``."""
        from torch._subclasses.fake_tensor import FakeTensorMode
        from transformers import AutoModelForCausalLM, masking_utils
        from transformers.initialization import no_init_weights
        from transformers.integrations import moe

        chosen = {} if attention == "auto" else {"attn_implementation": attention}
        try:
            if not self.kinds:
                raise ValueError("it has no layers of transformers' type")
            # the fallback knows the sizes of its results in every precision; the batch is not a packed one, which
            # would have a mask
            with (
                FakeTensorMode(),
                mock.patch.object(moe, "_can_use_grouped_mm", lambda *_: False),
                mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda *_, **__: None),
            ):
                with no_init_weights():
                    model = AutoModelForCausalLM.from_config(
                        _shallow(self.described, self.depth), dtype=dtype, **chosen
                    )
                # torch cannot move parameters without data, and peft makes them where they belong
                with mock.patch.object(torch.nn.Module, "to", lambda module, *_, **__: module):
                    for settings in self.adapters.values():
                        wrap(model, settings)
                model.get_input_embeddings().register_forward_hook(_cut)
                yield model.eval()
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
            raise UnknownActivations(
                f"the memory of {self.described.model_type} cannot be planned from its config: {first_line(error)}"
            ) from error


def _kind(layer: torch.nn.Module) -> tuple[object, ...]:
    """Return the structure of a layer; layers of equal structure take equal memory."""
    return repr(layer), *((name, parameter.shape) for name, parameter in layer.named_parameters())


def _run(model: Any, rows: int, tokens: int, use_cache: bool = False) -> tuple[torch.Tensor, Any]:
    """Return the hidden states before the output projection, and what the model returns without logits."""
    body = model.get_decoder()  # the whole model in a few
    with projecting_nothing(model.get_output_embeddings()) as projected:
        made = body(input_ids=torch.zeros(rows, tokens, dtype=torch.int64), use_cache=use_cache)
    return (projected or made)[0], made


def _cut(_module: Any, _given: Any, made: torch.Tensor) -> torch.Tensor:
    """Begin the graph after the embedding, whose gradient is counted apart."""
    return made.detach().requires_grad_(torch.is_grad_enabled())


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _shallow(described: Any, num_layers: int) -> Any:
    """Return the config of the model with its first layers only."""
    config = copy.deepcopy(described)
    text = config.get_text_config()
    text.num_hidden_layers = num_layers
    if getattr(text, "num_kv_shared_layers", 0):
        text.num_kv_shared_layers = 0
    if getattr(text, "layer_types", None):
        with contextlib.suppress(AttributeError):  # some follow from the number of layers
            text.layer_types = list(text.layer_types)[:num_layers]
    rope = getattr(text, "rope_parameters", None) or {}
    for one in (rope, *(one for one in rope.values() if isinstance(one, dict))):
        if one.get("rope_type") == "dynamic":  # reads the positions
            one["rope_type"] = "default"
    return config
