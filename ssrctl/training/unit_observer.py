"""Observations of every unit's dense gradient, between its backward pass and its claim, for the logs.

Gradients are only read; training is not changed. With ``--scope tensor`` a whole gradient never exists, so each
tensor's gradient is read when autograd completes it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ssrctl.configs import TrainConfig
from ssrctl.core.bits import bits_from_mask
from ssrctl.core.budget import coordinates
from ssrctl.core.claims import KeptUnit
from ssrctl.core.mask import BlockMask
from ssrctl.core.seeds import derive_seed
from ssrctl.core.sign_conflict import SignConflict, sign_conflict, union_indices
from ssrctl.core.topk import NonFiniteGradient, select_topk
from ssrctl.core.units import Unit
from ssrctl.io.mask_log import CONFLICTS, Matrix
from ssrctl.training.gradient_sketch import GradientSketch
from ssrctl.training.unit_gradients import UnitGradient, gradient_dot


@dataclass(frozen=True)
class Wanted:
    """The observations to make of a training step's gradients.

    Attributes:
        sets: norms, and the coordinates that units would have taken without claims.
        conflict: cosines and sign conflicts, for which every unit's dense gradient is kept until the question ends.
        sketch: the sketch of the batch's gradient.
    """

    sets: bool = False
    conflict: bool = False
    sketch: bool = False

    def __bool__(self) -> bool:
        return self.sets or self.conflict or self.sketch


@dataclass(frozen=True)
class Conflict:
    """Cosines and sign conflicts between the units of a question, before masking.

    Attributes:
        cosine: ``[units][units]``, in float64; 0 where one gradient is zero.
        shares: by name (``io.mask_log.CONFLICTS``) ``[units][units]`` shares of opposite signs.
    """

    cosine: list[list[float]]
    shares: dict[str, Matrix]


@dataclass
class SeenUnit:
    """Observations of one unit's gradient before masking.

    Attributes:
        square: its squared L2 norm over all coordinates, in float64.
        top: ascending flat indices by name of the k largest |g| among the unprotected coordinates, as if nothing
            were claimed; None unless requested, or when the gradient was not finite there.
        top_square: the squared norm at ``top``.
        dense: the gradient itself, when conflicts are wanted.
    """

    square: float = 0.0
    top: dict[str, Tensor] | None = None
    top_square: float = 0.0
    dense: dict[str, Tensor] = field(default_factory=dict)

    @property
    def top_captured(self) -> float | None:
        """Share of the squared norm at ``top``; None when it is not known or the gradient is 0."""
        return self.top_square / self.square if self.top is not None and self.square > 0 else None

    def captured(self, kept: KeptUnit) -> float | None:
        """Share of the squared norm at the coordinates that the unit keeps; None when the gradient is 0."""
        inside = sum(float(values.double().square().sum()) for values in kept.values.values())
        return inside / self.square if self.square > 0 else None


class UnitObserver:
    """The state that the observations of a run share.

    Args:
        named: (name, parameter) of every trainable tensor.
        config: the run's settings.
        frozen: coordinates that never change.
    """

    def __init__(
        self, named: Sequence[tuple[str, torch.nn.Parameter]], config: TrainConfig, frozen: BlockMask | None
    ) -> None:
        self.named = dict(named)
        self.streams = config.optimizer == "kronos" and config.scope == "tensor"
        self._frozen = frozen
        counts = {} if frozen is None else {name: tiles.count() for name, tiles in frozen.tensors.items()}
        self.free = {name: parameter.numel() - counts.get(name, 0) for name, parameter in self.named.items()}
        self.sketch = GradientSketch(
            {name: parameter.numel() for name, parameter in self.named.items()},
            config.log_gradients_size,
            derive_seed(config.seed, "gradients"),
        )

    @cached_property
    def frozen(self) -> dict[str, Tensor]:
        """Bits of the coordinates that never change (True = frozen), by name; an absent name has none."""
        return {} if self._frozen is None else bits_from_mask(self._frozen)

    @property
    def num_free(self) -> int:
        """Coordinates that may change."""
        return sum(self.free.values())

    def question(self, wanted: Wanted) -> QuestionView:
        """Begin the observation of a question."""
        return QuestionView(self, wanted)


class QuestionView:
    """The observation of one question.

    Attributes:
        units: observations of each unit, in order.
        sketched: the sketch of the sum of their gradients, float64; None when it is not wanted.
    """

    def __init__(self, observer: UnitObserver, wanted: Wanted) -> None:
        self.observer, self.wanted = observer, wanted
        self.units: list[SeenUnit] = []
        device = next(iter(observer.named.values())).device
        self.sketched = observer.sketch.zeros(device) if wanted.sketch else None
        self._part: dict[str, int] = {}

    def before_unit(self, unit: Unit) -> None:
        """Prepare for the backward pass of a unit."""
        observer = self.observer
        k = coordinates(unit.budget, observer.num_free)
        self.units.append(SeenUnit(top={} if self.wanted.sets else None))
        if observer.streams:  # the same share of each tensor, as KronosOpt takes it
            self._part = {name: k * free // observer.num_free for name, free in observer.free.items()}
        else:
            self._part = {"": k}

    def watch(self, gradients: Iterator[UnitGradient]) -> Generator[UnitGradient, None, None]:
        """Yield the same units; each is observed when its gradient is complete, before it is claimed."""
        hooks = [p.register_hook(self._hook(name)) for name, p in self.observer.named.items() if self.observer.streams]
        try:
            for made in gradients:
                if not self.observer.streams:
                    found = {name: p.grad for name, p in self.observer.named.items() if p.grad is not None}
                    self._see(found, self._part[""])
                yield made
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def on_gradient(gradient: Tensor) -> None:
            self._see({name: gradient}, self._part[name])

        return on_gradient

    @torch.no_grad()
    def _see(self, gradients: Mapping[str, Tensor], k: int) -> None:
        seen, wanted = self.units[-1], self.wanted
        if wanted.sets or wanted.conflict:
            seen.square += gradient_dot(gradients, gradients)
        if seen.top is not None:
            self._select(seen, gradients, k)
        if wanted.conflict:
            seen.dense |= {name: gradient.clone() for name, gradient in gradients.items()}
        if self.sketched is not None:
            for name, gradient in gradients.items():
                self.observer.sketch.add(self.sketched, name, gradient)

    def _select(self, seen: SeenUnit, gradients: Mapping[str, Tensor], k: int) -> None:
        assert seen.top is not None
        frozen = {
            name: bits.to(gradients[name].device) for name, bits in self.observer.frozen.items() if name in gradients
        }
        try:
            chosen = select_topk(gradients, k, frozen)
        except NonFiniteGradient:
            # The claims, which read fewer coordinates, decide whether this drops the question.
            seen.top = None
            return
        for name, indices in chosen.items():
            if indices.numel():
                seen.top[name] = indices.clone()  # a view of all that was selected
                seen.top_square += float(gradients[name].reshape(-1)[indices].double().square().sum())

    def conflict(self) -> Conflict:
        """Compare the units' dense gradients, which ``Wanted.conflict`` has kept, and drop them."""
        number = len(self.units)
        cosine = [[0.0] * number for _ in range(number)]
        shares: dict[str, Matrix] = {key: [[None] * number for _ in range(number)] for key in CONFLICTS}
        for i, one in enumerate(self.units):
            cosine[i][i] = 1.0 if one.square > 0 else 0.0
            for j, other in enumerate(self.units[:i]):
                everywhere, inside = _compared(one, other)
                scale = (one.square * other.square) ** 0.5
                found = everywhere.dot / scale if scale > 0 else 0.0
                cosine[i][j] = cosine[j][i] = min(1.0, max(-1.0, found))
                values = (everywhere.frac, everywhere.weighted_frac, inside.frac, inside.weighted_frac)
                for key, value in zip(CONFLICTS, values, strict=True):
                    shares[key][i][j] = shares[key][j][i] = value
        for seen in self.units:
            seen.dense = {}
        return Conflict(cosine, shares)


def _compared(one: SeenUnit, other: SeenUnit) -> tuple[SignConflict, SignConflict]:
    """Compare two units' gradients over all coordinates, and within the union of their unconstrained sets."""
    inside = SignConflict()
    if one.top is not None and other.top is not None:
        inside = sign_conflict(one.dense, other.dense, union_indices(one.top, other.top))
    return sign_conflict(one.dense, other.dense), inside
