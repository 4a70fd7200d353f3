"""One open question of KronosOpt: its claims, the budgets planned for its units, and the unit in progress."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from ssrctl.core.claims import Claims, Gradients, Indices, KeptUnit
from ssrctl.core.gradient_part import GradientPart


class Question:
    """The state between ``begin_question`` and ``end_question``.

    Args:
        claims: the coordinates that units may take and have taken.
        free: by parameter name, how many coordinates may be claimed at the start of the question.
        planned: budgets of the units to come, in coordinates; empty when each unit is given its own.

    Attributes:
        claims: as given.
    """

    def __init__(self, claims: Claims, free: Mapping[str, int], planned: Iterable[int] = ()) -> None:
        self.claims = claims
        self._free, self._num_free = free, sum(free.values())
        self._planned = list(planned)
        self._k: int | None = None  # of the unit in progress; None between units
        self._chosen: Indices = {}  # by the hooks, in the unit in progress

    @property
    def knows_next_budget(self) -> bool:
        """True if a backward pass may select: its unit was begun, or its budget is planned."""
        return self._k is not None or bool(self._planned)

    def begin_unit(self, k: int | None = None) -> None:
        """Begin a unit of ``k`` coordinates, or of the next planned budget."""
        if self._k is not None:
            raise RuntimeError("begin_unit() twice: claim() the unit before first")
        if k is None:
            if not self._planned:
                raise RuntimeError("no budget is planned for this unit: pass k, or tell begin_question() the units")
            k = self._planned.pop(0)
        if k < 0:
            raise ValueError(f"k must be at least 0, got {k}")
        self._k, self._chosen = k, {}
        self.claims.open_unit()

    def take(self, gradients: Gradients | GradientPart, k: int | None) -> Indices:
        """Claim for the unit in progress (begun now if need be), from whole gradients or a part of them, and end it."""
        if self._k is None:
            self.begin_unit(k)
        elif k is not None:
            raise RuntimeError("k was given to begin_unit() already")
        assert self._k is not None
        wanted, self._k = self._k, None
        try:
            if isinstance(gradients, GradientPart):
                return self.claims.take_part(gradients, wanted)
            return self.claims.take(gradients, wanted)
        except ValueError:
            self.claims.units.pop()
            raise

    def take_one(self, name: str, gradient: Tensor) -> None:
        """Claim one parameter's part of the unit in progress (begun now if need be): the same share of each.

        ``k * free coordinates of the parameter // all free ones``, so that the parts sum to at most k.
        """
        if self._k is None:
            self.begin_unit()
        if name in self._chosen:
            raise RuntimeError(
                f"{name} got a second gradient in one unit: with scope 'tensor' a unit is one backward()"
            )
        assert self._k is not None
        part = self._k * self._free[name] // self._num_free if self._num_free else 0
        self._chosen[name] = self.claims.take({name: gradient}, part)[name]

    def end_unit(self, k: int | None = None, *, gradient_left: bool = False) -> Indices:
        """End a unit that ``take_one`` has selected for; ``k`` must be None or the k it was begun with."""
        if self._k is None or not self._chosen:
            late = " k must be known before backward(): begin_unit(k), or begin_question(weights)."
            raise RuntimeError(
                "claim() found nothing that was selected during a backward pass." + (late if gradient_left else "")
            )
        if k is not None and k != self._k:
            raise RuntimeError(f"claim({k}) after a backward pass that selected for k = {self._k}")
        self._k = None
        return self._chosen

    def finish(self, gradients: Gradients) -> list[KeptUnit]:
        """Return each unit's kept gradient, in order; ``gradients`` are those left in the parameters.

        Raises:
            RuntimeError: a unit was begun, or its gradient computed, but not claimed.
        """
        pooled = self.claims.pools and bool(self.claims.units)
        if self._k is not None or (gradients and not pooled):
            raise RuntimeError("the question ends with an unclaimed gradient: claim() after each backward()")
        self.claims.finish(gradients)
        return self.claims.units
