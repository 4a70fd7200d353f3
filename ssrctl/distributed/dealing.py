"""Dealing work to processes by predicted cost: whole questions, or with fewer questions than processes their responses."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """The part of a question that a process works on.

    Attributes:
        question: number of the question.
        responses: ascending numbers of its responses that are this process's, at least one.
        team: the processes that share the question, with neighbouring ranks.
        leads: True in the first of them, which keeps the records of the whole question.
    """

    question: int
    responses: list[int]
    team: range
    leads: bool


def deal(costs: Sequence[float], num_processes: int) -> list[list[int]]:
    """Deal jobs so that the largest sum of costs is small: the costliest first, each to the process with least so far.

    (Longest processing time first, Graham 1969: at most 4/3 of the best possible.) Equal costs go by number, so every
    process finds the same.

    Args:
        costs: of each job, in any unit.
        num_processes: at least 1.

    Returns:
        By process, the ascending numbers of its jobs; some may have none with fewer jobs than processes.
    """
    dealt: list[list[int]] = [[] for _ in range(num_processes)]
    sums = [0.0] * num_processes
    for job in sorted(range(len(costs)), key=lambda job: (-costs[job], job)):
        least = min(range(num_processes), key=lambda process: (sums[process], len(dealt[process]), process))
        dealt[least].append(job)
        sums[least] += costs[job]
    return [sorted(jobs) for jobs in dealt]


def teams(num_questions: int, num_processes: int) -> list[range]:
    """Return the ranks that share one question each, the larger teams first; all of one with as many questions or more."""
    if num_processes <= num_questions:
        return [range(rank, rank + 1) for rank in range(num_processes)]
    size, larger = divmod(num_processes, num_questions)
    ends = list(itertools.accumulate(size + (place < larger) for place in range(num_questions)))
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def deal_questions(costs: Sequence[Sequence[float]], num_processes: int, *, split: bool = True) -> list[list[Share]]:
    """Deal the questions of a step; with more processes than questions, split each question's responses over a team.

    Args:
        costs: by question, of each of its responses, in any unit above 0.
        num_processes: at least 1.
        split: False keeps the responses of a question together, though processes then have none.

    Returns:
        By process, its shares in ascending order of the questions, none where there are fewer responses than processes;
        every process finds the same.
    """
    totals = [sum(of_question) for of_question in costs]
    if num_processes <= len(costs) or not split:
        return [
            [Share(job, list(range(len(costs[job]))), range(rank, rank + 1), leads=True) for job in jobs]
            for rank, jobs in enumerate(deal(totals, num_processes))
        ]
    dealt: list[list[Share]] = [[] for _ in range(num_processes)]
    costliest = sorted(range(len(costs)), key=lambda question: (-totals[question], question))
    for question, team in zip(costliest, teams(len(costs), num_processes), strict=True):
        for rank, responses in zip(team, deal(costs[question], len(team)), strict=True):
            if responses:
                dealt[rank].append(Share(question, responses, team, leads=rank == team.start))
    return dealt
