"""Activation checkpointing of models in eval mode.

The switch of transformers acts in training mode only. Training mode also turns on dropout, the jitter of routers and,
in some models, arguments that are required for training, so the recomputed pass and the importance ratios would
belong to another function than the one that was sampled from. Here the same layers are checkpointed in eval mode.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ssrctl.errors import UserError


def enable_checkpointing(model: Any) -> None:
    """Keep only the inputs of the model's layers for the backward pass, which recomputes each layer's activations.

    Passes without gradients, such as sampling, stay as they are. Calling it again changes nothing.

    Args:
        model: a model of transformers; its layers that are ``GradientCheckpointingLayer`` are checkpointed.

    Raises:
        UserError: the model has no such layer.
    """
    if is_checkpointed(model):
        return
    layers = outer_layers(model)
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no layers that can be checkpointed", "leave out --gradient-checkpointing"
        )
    for layer in layers:
        layer.forward = _Checkpointed(layer.forward)


def outer_layers(model: Any) -> list[torch.nn.Module]:
    """Return the ``GradientCheckpointingLayer`` modules of a model of transformers that are not inside another."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    inner = {id(part) for layer in layers for part in layer.modules() if part is not layer}
    return [layer for layer in layers if id(layer) not in inner]


def is_checkpointed(model: Any) -> bool:
    """Return True if a backward pass recomputes layers: by ``enable_checkpointing``, or by transformers in training."""
    return any(
        isinstance(vars(module).get("forward"), _Checkpointed)
        or (module.training and getattr(module, "gradient_checkpointing", False))
        for module in model.modules()
    )


class _Checkpointed:
    """A layer's forward method that keeps only its inputs where a graph is recorded."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)  # signatures are read through it
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        # In eval mode no layer draws random numbers.
        return checkpoint(self.forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
