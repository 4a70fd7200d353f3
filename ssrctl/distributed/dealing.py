"""Dealing work to processes by predicted cost."""

from __future__ import annotations

from collections.abc import Sequence


def deal(costs: Sequence[float], num_processes: int) -> list[list[int]]:
    """Deal jobs so that the largest sum of costs is small: the costliest first, each to the process with least so far.

    (Longest processing time first, Graham 1969: at most 4/3 of the best possible.) Equal costs go by number, so every
    process finds the same.

    Args:
        costs: of each job, in any unit.
        num_processes: at least 1.

    Returns:
        By process, the ascending numbers of its jobs; some may have none.
    """
    dealt: list[list[int]] = [[] for _ in range(num_processes)]
    sums = [0.0] * num_processes
    for job in sorted(range(len(costs)), key=lambda job: (-costs[job], job)):
        least = min(range(num_processes), key=lambda process: (sums[process], len(dealt[process]), process))
        dealt[least].append(job)
        sums[least] += costs[job]
    return [sorted(jobs) for jobs in dealt]
