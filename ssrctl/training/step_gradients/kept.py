"""One forward pass whose graph is kept for as many backward passes as there are units."""

from __future__ import annotations

from collections.abc import Iterator

from ssrctl.models.precision import ordered_sums
from ssrctl.training.step_gradients.batch import response_values
from ssrctl.training.step_gradients.task import GradientTask, UnitGradient


def kept_gradients(task: GradientTask) -> Iterator[UnitGradient]:
    """Backpropagate the units' losses one after the other through one kept graph.

    Every backward pass walks the whole batch, whatever part of it the unit depends on. Works with every causal
    LM. Memory: the activations of the whole batch until the last unit is done.
    """
    logprobs, entropy = response_values(task.model, task.batch, task.head)
    task.report(logprobs, entropy)
    for number, active in enumerate(task.active, start=1):
        made, derivative = task.differentiate(active.unit, logprobs)
        task.announce(active.unit)
        with ordered_sums():
            logprobs.backward(derivative, retain_graph=number < len(task.active))
        yield made
