"""Weights that make activation spikes in MLP down projections.

Source: Yu et al. 2024, "The super weight in large language models". Such a weight sits where an outlier among the inputs of a down projection meets an outlier among its outputs:
input channel j and output channel i far above the layer's typical channel give the weight at (i, j).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssrctl.errors import UserError
from ssrctl.masks.superweights import Tick, no_tick

# c_proj is also the name of attention's output projection in GPT-2, so it has to be in an MLP.
_DOWN_PROJECTION = re.compile(r"(^|\.)(down_proj|dense_4h_to_h|fc2)$|(^|\.)(mlp|ffn|feed_forward)\.(.*\.)?c_proj$")
_ATTENTION = re.compile(r"(^|\.)\w*(attn|attention)\w*\.")


@dataclass(frozen=True)
class Spike:
    """The strongest input and output channel of one down projection.

    Attributes:
        parameter: name of the weight tensor.
        index: flat index of the weight in it.
        out_channel, in_channel: the output and input channel.
        weight: its value.
        input_max, output_max: the largest |activation| of these channels over all tokens.
        input_ratio, output_ratio: the same over the median channel's, in [1, inf].
    """

    parameter: str
    index: int
    out_channel: int
    in_channel: int
    weight: float
    input_max: float
    output_max: float
    input_ratio: float
    output_ratio: float

    @property
    def ratio(self) -> float:
        """The smaller of the two ratios: a spike is where both are large."""
        return min(self.input_ratio, self.output_ratio)


def down_projections(model: Any) -> dict[str, Any]:
    """Return the MLP down projections by module name: ``torch.nn.Linear`` or the Conv1D of GPT-2.

    Raises:
        UserError: there is none that is known by its name.
    """
    from transformers.pytorch_utils import Conv1D

    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and _DOWN_PROJECTION.search(name)
        and not _ATTENTION.search(name)
    }
    if not found:
        raise UserError(
            f"no MLP down projection found in {type(model).__name__} "
            "(looked for down_proj, c_proj, dense_4h_to_h and fc2 among its linear layers)",
            "use --method gradient",
        )
    return found


@torch.no_grad()
def strongest_channels(model: Any, prompts: Sequence[Tensor], tick: Tick = no_tick) -> list[Spike]:
    """Find for every down projection the input and output channel with the largest |activation| over all prompts.

    Args:
        model: a causal LM.
        prompts: int64 ``[T]`` each.
        tick: called after each prompt.

    Returns:
        One per layer, in the model's order; the caller decides which of them are spikes.

    Raises:
        UserError: no down projection, or activations that are NaN or infinite.
    """
    layers = down_projections(model)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def record(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            for store, activation in ((inputs, args[0]), (outputs, output)):
                largest = activation.detach().reshape(-1, activation.shape[-1]).abs().amax(0).float()
                store[name] = torch.maximum(store[name], largest) if name in store else largest

        return record

    handles = [module.register_forward_hook(hook(name)) for name, module in layers.items()]
    try:
        for ids in prompts:
            model(input_ids=ids.to(model.device).unsqueeze(0), use_cache=False)
            tick()
    finally:
        for handle in handles:
            handle.remove()
    # An expert that no token was routed to has no activations.
    return [_spike(name, layers[name], inputs[name], outputs[name]) for name in layers if name in inputs]


def _spike(name: str, module: Any, inputs: Tensor, outputs: Tensor) -> Spike:
    if not bool(inputs.isfinite().all() & outputs.isfinite().all()):
        raise UserError(f"the activations of {name} are NaN or infinite", "use --dtype float32")
    in_channel, out_channel = int(inputs.argmax()), int(outputs.argmax())
    if isinstance(module, torch.nn.Linear):  # weight is [out, in]
        row, column = out_channel, in_channel
    else:  # Conv1D: weight is [in, out]
        row, column = in_channel, out_channel
    return Spike(
        parameter=f"{name}.weight",
        index=row * module.weight.shape[1] + column,
        out_channel=out_channel,
        in_channel=in_channel,
        weight=float(module.weight[row, column]),
        input_max=float(inputs[in_channel]),
        output_max=float(outputs[out_channel]),
        input_ratio=_over_median(inputs, in_channel),
        output_ratio=_over_median(outputs, out_channel),
    )


def _over_median(channels: Tensor, channel: int) -> float:
    median = float(channels.median())
    largest = float(channels[channel])
    if median > 0:
        return largest / median
    return float("inf") if largest > 0 else 1.0
