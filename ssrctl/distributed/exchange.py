"""The exchange of a step: every process gets what the questions of all of them keep, in the order of the questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ssrctl.core.bits import bit_patterns
from ssrctl.core.claims import KeptQuestion, Tally
from ssrctl.core.kept_bytes import Numbering, pack_unit, unpack_unit
from ssrctl.distributed.world import World
from ssrctl.errors import Failed


def exchange_questions(world: World, mine: Mapping[int, KeptQuestion], numbering: Numbering) -> Iterator[KeptQuestion]:
    """Yield the questions of all processes in ascending order of their numbers, one in memory at a time.

    Args:
        world: the processes.
        mine: by number, the questions of this process; no number is in two processes.
        numbering: of the coordinates.
    """
    packed = {number: [pack_unit(unit, numbering) for unit in kept.units] for number, kept in mine.items()}
    sizes = {number: ([unit.numel() for unit in units], mine[number].tally) for number, units in packed.items()}
    everyone = world.gather(sizes)
    owners = sorted((number, source) for source, theirs in enumerate(everyone) for number in theirs)
    for number, source in owners:
        num_bytes, tally = everyone[source][number]
        if source == world.rank:
            units = packed.pop(number)
            _broadcast(world, units, num_bytes, source)
            yield mine[number]
        else:
            yield _received(world, num_bytes, source, tally, numbering)


def _broadcast(world: World, units: Sequence[Tensor], num_bytes: Sequence[int], source: int) -> None:
    if sum(num_bytes):
        world.broadcast_bytes(torch.cat(list(units)).to(world.device), sum(num_bytes), source)


def _received(world: World, num_bytes: Sequence[int], source: int, tally: Tally, numbering: Numbering) -> KeptQuestion:
    found = world.broadcast_bytes(None, sum(num_bytes), source)
    return KeptQuestion([unpack_unit(part, numbering) for part in found.split(list(num_bytes))], tally)


def check_replicas(fingerprints: Sequence[int], step: str) -> None:
    """Raise if the weights of the processes differ.

    Args:
        fingerprints: of the weights, by rank.
        step: words that say when, for the message.

    Raises:
        Failed: some differ from those of process 0.
    """
    if odd := [rank for rank, found in enumerate(fingerprints) if found != fingerprints[0]]:
        raise Failed(
            f"{step} the weights of process{'es' * (len(odd) > 1)} {', '.join(map(str, odd))} differ from those of "
            "process 0: the replicas have drifted apart",
            "resume from the last checkpoint; if it happens again, look for failing memory or different hardware",
        )


def weights_fingerprint(tensors: Sequence[Tensor]) -> int:
    """Return a sum over the bits of all weights, each tensor's times an odd number of its own, modulo 2**64.

    It reads every weight once, which takes a small part of a step's time, and any single change changes it.
    """
    total = 0
    for place, tensor in enumerate(tensors):
        words = bit_patterns(tensor.detach())
        total = (total + (2 * place + 1) * int(words.sum(dtype=torch.int64))) % 2**64
    return total
