"""A callback for TRL's trainers, and any other transformers ``Trainer``: the weights that an optimizer step changes."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ssrctl.core.bits import bit_patterns
from ssrctl.core.sparse_update import Survival
from ssrctl.errors import UserError

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class WeightChanges(TrainerCallback):
    """Adds to the trainer's logs the share of weights that optimizer steps change, and of updates that rounding swallows.

    Use::

        trainer = GRPOTrainer(..., callbacks=[WeightChanges()])

    Logged are means over the optimizer steps since the last log, all in [0, 1]. A step without a value is left out of the
    mean; a metric without any value is not logged. Steps that a loss scaler skips are left out.

    ``bit_changed_frac``
        With every optimizer: weights whose stored bits the step changed, over all weights of the optimizer (with LoRA, those
        of the adapter). 0 and -0 differ; a NaN equals the same NaN.
    ``updated_frac``, ``lost_update_frac``
        With optimizers of this package, as in `ssrctl train`: weights that the step updated, over all; intended nonzero updates
        that rounding to the weights' dtype loses without master values, over the intended ones. Optimizers with masters
        (the default) apply these updates in the end. No copy of the weights is made: the optimizer counts.
    ``nonzero_gradient_unchanged_frac``
        With any other optimizer, whose intended updates are not known: weights with a gradient other than 0 in the step whose
        stored bits it left as they were, over the weights with a gradient other than 0. It is near the share of
        swallowed updates for SGD and Adam in bfloat16; weights that the optimizer does not want to move count too,
        and those that only a moment or weight decay would move do not.

    Any other optimizer costs one copy of its weights in their dtype (2 bytes per bfloat16 weight) during each step,
    between ``on_pre_optimizer_step`` and ``on_optimizer_step``.

    The values reach ``trainer.state.log_history`` and the callbacks after this one. Reporters (``report_to``) come before
    ``callbacks=``; to reach them too, call ``trainer.callback_handler.callbacks.insert(0, WeightChanges())`` instead.

    Args:
        snapshot_device: device of that copy; None is each weight's own.

    Raises:
        UserError: at the start of training, if the weights are sharded over processes (FSDP, DeepSpeed, tensor parallel).
    """

    def __init__(self, snapshot_device: str | torch.device | None = None) -> None:
        self.snapshot_device = snapshot_device
        self._snapshot: list[Tensor] = []
        self._values: dict[str, list[float]] = defaultdict(list)  # by metric, of the steps since the last log

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse sharded weights; forget the steps of an earlier run."""
        optimizer = kwargs["optimizer"]
        setup = optimizer.accelerator_state.distributed_type if isinstance(optimizer, AcceleratedOptimizer) else None
        if setup in _SHARDED or any(isinstance(weight, DTensor) for weight in _weights(optimizer)):
            raise UserError(
                "WeightChanges compares whole weights, but these are sharded over processes "
                f"({setup or 'distributed tensors'})",
                "train without sharding, or leave the callback out",
            )
        self._snapshot = []
        self._values.clear()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy the weights, unless the optimizer counts what it changes."""
        if _counts(kwargs["optimizer"]) is None:
            self._snapshot = [
                weight.detach().to(self.snapshot_device or weight.device, copy=True)
                for weight in _weights(kwargs["optimizer"])
            ]

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the step's metrics; drop the copy."""
        optimizer = kwargs["optimizer"]
        before, self._snapshot = self._snapshot, []
        if getattr(optimizer, "step_was_skipped", False):
            return
        weights, counts = _weights(optimizer), _counts(optimizer)
        total = sum(weight.numel() for weight in weights)
        if counts is not None:
            self._note("bit_changed_frac", counts.num_changed, total)
            self._note("updated_frac", counts.num_updated, total)
            self._note("lost_update_frac", counts.num_lost, counts.num_intended)
            return
        num_changed = num_nonzero = num_unchanged = 0
        for weight, old in zip(weights, before, strict=True):
            changed = bit_patterns(weight) != bit_patterns(old.to(weight.device))
            num_changed += int(changed.sum())
            if weight.grad is not None:
                nonzero = weight.grad != 0
                num_nonzero += int(nonzero.sum())
                num_unchanged += int((nonzero & ~changed).sum())
        self._note("bit_changed_frac", num_changed, total)
        self._note("nonzero_gradient_unchanged_frac", num_unchanged, num_nonzero)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the means to a log of training steps; logs of an evaluation and of the whole run stay as they are."""
        if logs is None or "loss" not in logs:
            return
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        self._values.clear()
        logs.update(means)
        state.log_history[-1].update(means)  # the trainer copies the logs into it before it calls

    def _note(self, name: str, count: int, total: int) -> None:
        if total:
            self._values[name].append(count / total)


def _weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _counts(optimizer: torch.optim.Optimizer) -> Survival | None:
    """Return the counts of an optimizer of this package, as accelerate wraps it; None for any other."""
    own = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    counts = getattr(own, "survival", None)
    return counts if isinstance(counts, Survival) else None
