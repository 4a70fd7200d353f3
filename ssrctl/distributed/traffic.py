"""The arithmetic of a step's exchange: bytes per process for Kronos, and for a dense all-reduce of the same model."""

from __future__ import annotations

# Measured on SmolLM2-135M's gradients: an exponent in unary, counted from the unit's smallest (core.kept_bytes).
EXPONENT_BITS = 1.7


def bits_per_coordinate(unit_share: float, itemsize: int) -> float:
    """Return the bits of a kept coordinate on the wire.

    Args:
        unit_share: share of all coordinates that a unit keeps, in (0, 1].
        itemsize: bytes of a gradient value, 2 (bfloat16) or 4.
    """
    index = 8 + 1 + 1 / (256 * unit_share)
    return index + 8 + EXPONENT_BITS + 8 * (itemsize - 2)


def kept_bytes_sent(
    num_coordinates: int, *, itemsize: int, questions: int, budget: float, unit_share: float, processes: int
) -> float:
    """Return the bytes that a process sends per step, the mean over the processes, when every question fills its budget.

    Args:
        num_coordinates: of the model.
        itemsize: bytes of a gradient value.
        questions: of a step, over all processes.
        budget: B, share of the coordinates that a question keeps.
        unit_share: share that each of its units keeps.
        processes: number of them.
    """
    kept = questions * budget * num_coordinates
    return kept * bits_per_coordinate(unit_share, itemsize) / 8 * (processes - 1) / processes


def sharded_bytes_sent(
    num_coordinates: int, *, itemsize: int, questions: int, units: float, sampling_passes: int, processes: int
) -> float:
    """Return the bytes that a process sends per step of a sharded model: its shard, or a gradient's other shards, to all.

    Args:
        num_coordinates: of the model.
        itemsize: bytes of a weight and of a gradient value.
        questions: of a step.
        units: of a question: each gathers the weights for its backward pass and sums a gradient; one forward pass for all.
        sampling_passes: passes that gather the weights to sample with; 1 where they are gathered once.
        processes: number of them.
    """
    moved = sampling_passes + questions * (1 + 2 * units)
    return moved * num_coordinates * itemsize * (processes - 1) / processes


def scattered_bytes_sent(num_coordinates: int, *, itemsize: int, processes: int) -> float:
    """Return the bytes that a process sends in a reduce-scatter of the whole gradient around a ring."""
    return num_coordinates * itemsize * (processes - 1) / processes


def dense_bytes_sent(num_coordinates: int, *, itemsize: int, processes: int) -> float:
    """Return the bytes that a process sends in an all-reduce of the whole gradient around a ring."""
    return 2 * scattered_bytes_sent(num_coordinates, itemsize=itemsize, processes=processes)
