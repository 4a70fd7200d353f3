"""A question whose responses are split over several processes: the part of each, and the units that all go through.

The loss of a unit is a sum over responses with weights that depend on the whole question (the number of responses that
have the step, the advantages). A part keeps these weights, so that the gradients of the parts sum to that of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ssrctl.core.units import Unit
from ssrctl.distributed.world import World
from ssrctl.training.step_gradients.batch import GroupBatch
from ssrctl.training.step_gradients.task import GradientTask, NonFiniteLoss, UnitGradient, scored_tokens


@dataclass(frozen=True)
class QuestionPart:
    """Some of the responses to a question.

    Attributes:
        batch: these responses.
        units: those of the whole question that have a loss, in order, with the advantages of all responses.
        own: of each of them, the same with the advantages of these responses; None where these have no token of it.
        num_responses: by step, the responses of the whole question that have it with a known advantage.
    """

    batch: GroupBatch
    units: list[Unit]
    own: list[Unit | None]
    num_responses: dict[int, int]

    @classmethod
    def of(cls, batch: GroupBatch, units: Sequence[Unit], rows: Sequence[int]) -> QuestionPart:
        """Return the part of the responses ``rows``; every process of a question passes the same but for these."""
        active = GradientTask(None, batch, units).active
        return cls(
            batch.of_responses(rows),
            [one.unit for one in active],
            [one.unit.of_responses(rows) if set(one.rows) & set(rows) else None for one in active],
            responses_by_step(batch, [one.unit for one in active]),
        )

    @property
    def own_units(self) -> list[Unit]:
        """The units that these responses have tokens of."""
        return [unit for unit in self.own if unit is not None]


def responses_by_step(batch: GroupBatch, units: Sequence[Unit]) -> dict[int, int]:
    """Count the responses that have a token of each step of the units and a known advantage for it."""
    return {
        step: int(scored_tokens(batch.step_ids, step, column).any(1).sum())
        for unit in units
        for step, column in zip(unit.steps, unit.advantages, strict=True)
    }


def units_of_parts(
    part: QuestionPart,
    own: Iterator[UnitGradient],
    team: World,
    *,
    combine: Callable[[], None],
    on_unit: Callable[[Unit], None],
) -> Iterator[UnitGradient]:
    """Yield all units of a question in all processes that share it, in the same order and at the same time.

    A process without a token of a unit takes part in it without a gradient of its own.

    Args:
        part: of this process.
        own: the gradients of ``part.own_units``.
        team: the processes that share the question.
        combine: called in all of them when each has its own gradient in ``parameter.grad``; leaves there what the
            process is to have.
        on_unit: called with each unit before it is yielded.

    Raises:
        NonFiniteLoss: in all processes, if a unit's loss is NaN or infinite in one.
    """
    if not part.own_units:
        next(own, None)  # its log-probabilities are wanted all the same
    for unit, mine in zip(part.units, part.own, strict=True):
        made: UnitGradient | NonFiniteLoss = UnitGradient(unit, 0.0, 0, 0)
        if mine is not None:
            try:
                made = replace(next(own), unit=unit)
            except NonFiniteLoss as error:
                made = error
        found = team.gather(made)
        known = [one for one in found if isinstance(one, UnitGradient)]
        if len(known) < len(found):
            raise next(one for one in found if isinstance(one, NonFiniteLoss))
        combine()
        on_unit(unit)
        yield UnitGradient(
            unit,
            sum(one.loss for one in known),
            sum(one.num_terms for one in known),
            sum(one.num_clipped for one in known),
        )
    for _ in own:  # nothing is left but the end of the method
        pass
