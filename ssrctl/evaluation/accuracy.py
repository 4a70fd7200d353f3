"""Accuracy of graded responses with intervals, and the paired difference between two sets of them.

Samples of one problem are not independent, so everything is a mean over problems. Samples belong to one problem by
their ids (``q17/3`` and ``q17/4``) and, because ids in foreign files may mean anything, by their questions.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ssrctl.errors import UserError
from ssrctl.evaluation.intervals import accuracy_interval, paired_difference
from ssrctl.io.records import FinalAnswer, Rollout

OUTCOMES = ("correct", "wrong", "unparsed", "timed_out")


def summarise(samples: Sequence[Rollout], confidence: float) -> dict[str, Any]:
    """Return accuracy with its interval, the ways answers were found and the ends of responses.

    Args:
        samples: with ``final`` filled; a ``final`` without outcome has no reference and counts only in
            ``without_reference``. A comparison that timed out counts as wrong.
        confidence: level of the interval.

    Returns:
        The metrics of docs/metrics.md. ``finished_frac`` and ``mean_response_tokens`` are None when no sample
        records its end or length.

    Raises:
        UserError: no sample with a reference.
    """
    graded = with_reference(samples)
    by_problem = per_problem(graded)
    finals = [s.final for s in graded if s.final is not None]
    outcomes = Counter(str(final.outcome) for final in finals)
    lengths = [s.extra["num_tokens"] for s in graded if isinstance(s.extra.get("num_tokens"), int)]
    endings = [bool(s.extra["finished"]) for s in graded if "finished" in s.extra]
    return {
        "accuracy": asdict(accuracy_interval(list(by_problem.values()), confidence)),
        "num_problems": len(by_problem),
        "num_samples": len(graded),
        "without_reference": len(samples) - len(graded),
        "solved_at_least_once": sum(1 for share in by_problem.values() if share > 0) / len(by_problem),
        "outcomes": {name: outcomes[name] for name in OUTCOMES},
        "way_fracs": {way: count / len(finals) for way, count in _ways(finals).items()},
        "ways": dict(Counter(final.way for final in finals if final.way is not None).most_common()),
        "answered_frac": sum(final.extracted is not None for final in finals) / len(finals),
        "finished_frac": sum(endings) / len(endings) if endings else None,
        "mean_response_tokens": statistics.fmean(lengths) if lengths else None,
    }


def _ways(finals: Sequence[FinalAnswer]) -> dict[str, int]:
    """Count answers by the way they were found, the most frequent first; ``none`` are responses without an answer."""
    found = Counter(final.way or ("none" if final.extracted is None else "unknown") for final in finals)
    return dict(found.most_common())


def with_reference(samples: Sequence[Rollout]) -> list[Rollout]:
    """Return the samples that were compared with a reference; raise ``UserError`` when there is none."""
    graded = [s for s in samples if s.final is not None and s.final.outcome is not None]
    if not graded:
        raise UserError(
            f"none of the {len(samples)} responses has a reference answer",
            "give records with an 'answer', or name the data set that has them with --dataset",
        )
    return graded


def compare(before: Sequence[Rollout], after: Sequence[Rollout], confidence: float) -> dict[str, Any]:
    """Compare two evaluations over the problems that both have.

    Returns:
        ``baseline_accuracy`` and ``difference`` with intervals, and ``unpaired_problems``: the number of problems in
        only one of the two, which were left out.

    Raises:
        UserError: they share no problem, or one id names different questions.
    """
    questions = dict(zip(_problems(before), (s.question for s in before), strict=True))
    for problem, sample in zip(_problems(after), after, strict=True):
        if None not in (earlier := questions.get(problem), sample.question) and earlier != sample.question:
            raise UserError(
                f"problem {problem} has different questions in the two evaluations",
                "compare evaluations of the same data set",
            )
    old, new = per_problem(before), per_problem(after)
    shared = sorted(old.keys() & new.keys())
    if not shared:
        raise UserError(
            f"the baseline has {len(old)} problems, this evaluation {len(new)}, and none in common",
            "evaluate both on the same problems",
        )
    first, second = [old[p] for p in shared], [new[p] for p in shared]
    return {
        "baseline_accuracy": asdict(accuracy_interval(first, confidence)),
        "difference": asdict(paired_difference(first, second, confidence)),
        "unpaired_problems": len(old.keys() ^ new.keys()),
    }


def per_problem(samples: Sequence[Rollout]) -> dict[str, float]:
    """Return the fraction of correct samples of each problem; samples without a reference are left out."""
    right: dict[str, list[bool]] = defaultdict(list)
    for problem, sample in zip(_problems(samples), samples, strict=True):
        if sample.final is not None and sample.final.outcome is not None:
            right[problem].append(sample.final.correct is True)
    return {problem: sum(flags) / len(flags) for problem, flags in right.items()}


def _problems(samples: Sequence[Rollout]) -> list[str]:
    """Name each sample's problem.

    The name is the group of the sample's id. In a group with several questions (``algebra/1``, ``algebra/2``) it is
    the id; where several of these share one question (samples without ids), the alphabetically first of them.
    """
    questions: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        if sample.question is not None:
            questions[sample.group].add(sample.question)
    names = [s.id if len(questions[s.group]) > 1 else s.group for s in samples]
    first: dict[str, str] = {}
    for name, sample in zip(names, samples, strict=True):
        if sample.question is not None:
            first[sample.question] = min(name, first.get(sample.question, name))
    return [name if s.question is None else first[s.question] for name, s in zip(names, samples, strict=True)]
