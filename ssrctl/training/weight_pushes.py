"""The pushes of a run: an engine with weights of its own gets the coordinates that the optimizer has written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ssrctl.core.bits import bit_patterns
from ssrctl.distributed.sharding import ShardedModel
from ssrctl.distributed.world import ALONE, World
from ssrctl.errors import Stopped
from ssrctl.io import console
from ssrctl.sampling.engines.base import ServedEngine
from ssrctl.training.updaters.base import Updater, values_at


class WeightPushes:
    """Collects the coordinates whose stored bits the optimizer's steps change, and pushes them before the next sampling.

    Of several processes the main one pushes; where each has a shard of the model, each collects in its own rows.

    Args:
        engine: that samples; it has the weights in force.
        updater: that writes them.
        named: the parameters by name, of a sharded model this process's rows.
        verify_every: number of steps after which the engine is compared with itself after a push of all weights; 0 never.
        world: the processes; all call the methods.
        sharded: the model, where each of them has a shard of it.
    """

    def __init__(
        self,
        engine: ServedEngine,
        updater: Updater,
        named: Mapping[str, Tensor],
        *,
        verify_every: int = 0,
        world: World = ALONE,
        sharded: ShardedModel | None = None,
    ) -> None:
        self.engine, self.updater, self.named, self.verify_every = engine, updater, named, verify_every
        self.sharded, self._collects = sharded, world.is_main or sharded is not None
        self._written: dict[str, list[tuple[Tensor, Tensor]]] = {}  # indices, and the values there before
        self._all = False  # any coordinate may have changed
        self._steps = 0

    @torch.no_grad()
    def step(self) -> dict[str, float | None]:
        """Let the updater step; note what it changes."""
        if not self._collects:
            return self.updater.step()
        places = self.updater.pending()
        if places is None:
            self._all = True
            return self.updater.step()
        before = {name: self.named[name].view(-1)[where] for name, where in places.items() if where.numel()}
        metrics = self.updater.step()
        for name, old in before.items():
            where = places[name]
            changed = bit_patterns(self.named[name].view(-1)[where]) != bit_patterns(old)
            self._written.setdefault(name, []).append((where[changed], old[changed]))
        return metrics

    def push(self) -> dict[str, Any]:
        """Push what was written since the push before, probe the engine, and return metrics.

        Raises:
            Stopped: the engine is gone, or does not compute with the trainer's weights.
        """
        changes = before = None
        if not self._all:
            written = {name: _joined(parts) for name, parts in self._written.items()}
            changes = values_at(self.named, {name: where for name, (where, _) in written.items()})
            if self.sharded is not None:
                changes, written = self.sharded.whole_changes(changes), self.sharded.whole_changes(written)
            before = {name: written[name][1].cpu() for name in changes}
        done = self.engine.push(changes, before)
        self._written, self._all = {}, False
        if done.kind != "none":
            self.engine.check()
        self._steps += 1
        if self.verify_every and self._steps % self.verify_every == 0 and done.kind == "changes":
            self._verify()
        probe = self.engine.probe
        return {
            "push_kind": done.kind,
            "push_coordinates": done.num_coordinates,
            "push_bytes": done.num_bytes,
            "push_seconds": done.seconds,
            "full_push_bytes": self.engine.full_bytes,
            "full_push_seconds": self.engine.full_seconds,
            "probe_gap_mean": probe and probe.gap_mean,
            "probe_gap_max": probe and probe.gap_max,
        }

    def _verify(self) -> None:
        """Compare the engine with itself after a push of all weights; both probes come right after a push.

        The cache that it has then is empty: reading a part of a prompt from it changes the rounding in half precision.
        """
        before = self.engine.probe
        full = self.engine.push(None)
        if before is None or not self.engine.check().same_as(before):
            raise Stopped(
                f"after a push of all {full.num_bytes} bytes the engine computes other log-probabilities than after the push "
                "of changes before it, which was not applied as it was sent"
            )
        console.note(f"the engine computes the same after a push of all {full.num_bytes} bytes")


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join (flat indices, values before) of several steps: ascending indices, each with its earliest value."""
    where, old = parts[0]
    for later, values in parts[1:]:
        fresh = ~torch.isin(later, where)
        where, old = torch.cat([where, later[fresh]]), torch.cat([old, values[fresh]])
    order = where.argsort()
    return where[order], old[order]
