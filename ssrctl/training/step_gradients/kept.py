"""One forward pass whose graph is kept for as many backward passes as there are units."""

from __future__ import annotations

from collections.abc import Iterator

from ssrctl.training.step_gradients.batch import response_logprobs
from ssrctl.training.step_gradients.task import GradientTask, UnitGradient


def kept_gradients(task: GradientTask) -> Iterator[UnitGradient]:
    """Backpropagate the units' losses one after the other through one kept graph.

    Every backward pass walks the whole batch, whatever part of it the unit depends on. Works with every causal
    LM. Memory: the activations and logits of the whole batch until the last unit is done.
    """
    logprobs = response_logprobs(task.model, task.batch, task.temperature)
    if task.on_logprobs is not None:
        task.on_logprobs(logprobs.detach())
    for number, active in enumerate(task.active, start=1):
        yield task.backpropagate(active.unit, logprobs, retain_graph=number < len(task.active))
