"""The lengths that decide the cheapest method for the units' gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ssrctl.training.step_gradients.task import GradientTask


@dataclass(frozen=True)
class UnitSpan:
    """The place of the tokens of one unit's loss.

    Attributes:
        start, end: the first such response token over all responses, and one past the last.
        num_rows: responses that have any.
    """

    start: int
    end: int
    num_rows: int


@dataclass(frozen=True)
class GroupShape:
    """The lengths of one question's batch.

    Attributes:
        prompt_length: tokens of the prompt.
        lengths: tokens of each response.
        units: of the units that have a loss, in order.
    """

    prompt_length: int
    lengths: tuple[int, ...]
    units: tuple[UnitSpan, ...]

    @property
    def width(self) -> int:
        """Tokens of the longest response."""
        return max(self.lengths)

    def input_end(self, response_end: int) -> int:
        """Count the input tokens, with the prompt, that predict a response's first ``response_end`` tokens."""
        return self.prompt_length + response_end - 1

    def rows_beyond(self, column: int) -> int:
        """Count the responses with an input token at ``column`` that predicts a response token."""
        return sum(self.input_end(length) > column for length in self.lengths)


def group_shape(task: GradientTask) -> GroupShape:
    """Return the shape of a task's batch and of its active units."""
    return GroupShape(
        prompt_length=task.batch.prompt_length,
        lengths=tuple(task.batch.known.sum(1).tolist()),
        units=tuple(UnitSpan(active.start, active.end, len(active.rows)) for active in task.active),
    )


def units_shape(inside: Tensor, prompt_length: int) -> GroupShape:
    """Return the shape of responses that end with the last unit's token.

    Args:
        inside: bool ``[units, G, R]``, the tokens in the loss of each unit.
        prompt_length: tokens of the prompt.
    """
    spans = []
    for unit in inside:
        columns = unit.any(0).nonzero().flatten().tolist()
        if columns:
            spans.append(UnitSpan(columns[0], columns[-1] + 1, int(unit.any(1).sum())))
    ends = [row.nonzero().flatten().tolist()[-1:] for row in inside.any(0)]
    return GroupShape(prompt_length, tuple(end[0] + 1 if end else 0 for end in ends), tuple(spans))
