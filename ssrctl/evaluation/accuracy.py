"""Accuracy of graded responses with intervals, pass@k and maj@n, and the paired difference between two sets of them.

Samples of one problem are not independent, so everything is a mean over problems. Samples belong to one problem by
their ids (``q17/3`` and ``q17/4``) and, because ids in foreign files may mean anything, by their questions.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ssrctl.errors import UserError
from ssrctl.evaluation.intervals import accuracy_interval, holm, least_detectable, mean_interval, paired_difference
from ssrctl.evaluation.step_patterns import FormatDiversity, compare_formats, signature
from ssrctl.io.records import FinalAnswer, Rollout
from ssrctl.report.formats import times

OUTCOMES = ("correct", "wrong", "unparsed", "timed_out")
GROUP_COLUMNS = ("level", "subject", "type", "difficulty", "category", "domain")
KL_TO_BASE = "kl_to_base"  # of a sample's record: mean over its tokens, nats
SIGNATURE = "step_patterns"  # field of records whose response was dropped to save memory
MOST_GROUPS = 24  # a column with more values names problems rather than groups of them


def summarise(samples: Sequence[Rollout], confidence: float, *, runs: int = 1) -> dict[str, Any]:
    """Return accuracy with its interval, the ways answers were found and the ends of responses.

    Args:
        samples: with ``final`` filled; a ``final`` without outcome has no reference and counts only in
            ``without_reference``. A comparison that timed out counts as wrong.
        confidence: level of the interval.
        runs: number of repeated evaluations in ``samples``; ids end in ``/NUMBER``, and run r has the r-th part of each
            problem's numbers.

    Returns:
        The metrics of docs/metrics.md. ``finished_frac`` and ``mean_response_tokens`` are None when no sample
        records its end or length.

    Raises:
        UserError: no sample with a reference.
    """
    graded = with_reference(samples)
    found = by_problem(graded)
    shares = [_share_right(finals) for finals in found.values()]
    smallest = min(map(len, found.values()))
    finals = [s.final for s in graded if s.final is not None]
    outcomes = Counter(str(final.outcome) for final in finals)
    lengths = [s.extra["num_tokens"] for s in graded if isinstance(s.extra.get("num_tokens"), int)]
    endings = [bool(s.extra["finished"]) for s in graded if "finished" in s.extra]
    return {
        "accuracy": asdict(accuracy_interval(shares, confidence)),
        "detectable_difference": least_detectable(shares, smallest, confidence),
        "pass_at_k": {str(k): statistics.fmean(pass_at_k(f, k) for f in found.values()) for k in _ks(smallest)},
        "maj_at_n": {"n": smallest, "value": statistics.fmean(majority(f[:smallest]) for f in found.values())},
        "runs": _runs(graded, runs),
        "groups": groups(graded, confidence),
        "num_problems": len(found),
        "num_samples": len(graded),
        "without_reference": len(samples) - len(graded),
        "solved_at_least_once": sum(share > 0 for share in shares) / len(shares),
        "outcomes": {name: outcomes[name] for name in OUTCOMES},
        "way_fracs": {way: count / len(finals) for way, count in _ways(finals).items()},
        "ways": dict(Counter(final.way for final in finals if final.way is not None).most_common()),
        "answered_frac": sum(final.extracted is not None for final in finals) / len(finals),
        "finished_frac": sum(endings) / len(endings) if endings else None,
        "mean_response_tokens": statistics.fmean(lengths) if lengths else None,
        "kl_to_base": _kl_to_base(graded, confidence),
        "formats": _formats(samples),
    }


def _kl_to_base(samples: Sequence[Rollout], confidence: float) -> dict[str, Any] | None:
    """Return the mean over problems of the samples' mean KL, with its interval; None where no sample records it."""
    found: dict[str, list[float]] = {}
    for sample in samples:
        value = sample.extra.get(KL_TO_BASE)
        if isinstance(value, float | int):
            found.setdefault(sample.group, []).append(value)
    means = [statistics.fmean(values) for values in found.values()]
    if len(means) > 1:
        return asdict(mean_interval(means, confidence, least=0.0))
    unknown = {"low": None, "high": None, "confidence": confidence, "num_problems": 1}
    return {"value": means[0]} | unknown if means else None


def _formats(samples: Sequence[Rollout]) -> dict[str, Any] | None:
    """Return the diversity of the responses' formats; None where no record has its response."""
    found = [one for sample in samples if (one := _signature(sample)) is not None]
    return asdict(FormatDiversity.of(found)) if found else None


def _signature(sample: Rollout) -> str | None:
    kept: str | None = sample.extra.get(SIGNATURE) if sample.response is None else None
    return signature(sample) if kept is None else kept


def _signatures(samples: Sequence[Rollout]) -> dict[str, list[str]]:
    """Return the signatures of each problem's responses, in order."""
    made: dict[str, list[str]] = defaultdict(list)
    for problem, sample in zip(_problems(samples), samples, strict=True):
        if (one := _signature(sample)) is not None:
            made[problem].append(one)
    return dict(made)


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


def groups(samples: Sequence[Rollout], confidence: float) -> dict[str, dict[str, Any]]:
    """Return {column: {value: accuracy with its interval}} for the columns of the data that say what kind a problem is.

    Columns are those of ``GROUP_COLUMNS`` with two to ``MOST_GROUPS`` values; values are in natural order.
    """
    made = {}
    for column in GROUP_COLUMNS:
        parts: dict[str, list[Rollout]] = defaultdict(list)
        for sample in samples:
            if isinstance(value := sample.extra.get(column), str | int) and not isinstance(value, bool):
                parts[str(value)].append(sample)
        if 2 <= len(parts) <= MOST_GROUPS:
            made[column] = {
                value: asdict(accuracy_interval(list(per_problem(parts[value]).values()), confidence))
                for value in sorted(parts, key=lambda value: (len(value), value) if value.isdecimal() else (99, value))
            }
    return made


def pass_at_k(finals: Sequence[FinalAnswer], k: int) -> float:
    """Return the chance that k of a problem's n samples, drawn without replacement, have a correct one.

    1 - C(n - c, k) / C(n, k) with c correct samples, unbiased for k fresh samples (Chen et al. 2021, eq. 1).

    Raises:
        ValueError: k below 1 or above n.
    """
    count, right = len(finals), _num_right(finals)
    if not 1 <= k <= count:
        raise ValueError(f"pass@{k} of {count} samples")
    return 1.0 - math.comb(count - right, k) / math.comb(count, k)


def majority(finals: Sequence[FinalAnswer]) -> float:
    """Return the chance that the most frequent answer is correct; ties are broken by chance, so it may be a fraction.

    Correct samples are one answer, however they are written, and wrong ones are the same answer where the comparison of
    answers says so without computer algebra. Samples without an answer have no vote; without any vote it is 0.
    """
    from ssrctl.text.answer_equality import decide

    right = _num_right(finals)
    wrong: list[tuple[str, int]] = []
    for final in finals:
        if final.correct is True or final.extracted is None:
            continue
        for place, (answer, votes) in enumerate(wrong):
            if answer == final.extracted or decide(final.extracted, answer) is True:
                wrong[place] = (answer, votes + 1)
                break
        else:
            wrong.append((final.extracted, 1))
    most = max([right, *(votes for _, votes in wrong)])
    leaders = sum(votes == most for _, votes in wrong) + (right == most)
    return 1 / leaders if right == most and right else 0.0


def _runs(samples: Sequence[Rollout], runs: int) -> dict[str, Any] | None:
    """Return the accuracies of repeated evaluations, their mean and their standard deviation (n - 1); None of one."""
    if runs == 1:
        return None
    endings = [sample.id.rpartition("/")[2] for sample in samples]
    numbers = [int(ending) if ending.isdecimal() else -1 for ending in endings]
    of_problem: dict[str, list[int]] = defaultdict(list)
    for sample, place in zip(samples, numbers, strict=True):
        of_problem[sample.group].append(place)
    size = (max(numbers) + 1) // runs
    for problem, found in of_problem.items():
        if size < 1 or sorted(found) != list(range(size * runs)):
            raise UserError(
                f"{runs} runs need the ids PROBLEM/0 to PROBLEM/N of each problem, N + 1 a multiple of {runs}; {problem} "
                f"has {times(len(found), 'response')}",
                "give --runs 1 for responses of one run",
            )
    accuracies = []
    for run in range(runs):
        mine = [sample for sample, number in zip(samples, numbers, strict=True) if number // size == run]
        accuracies.append(statistics.fmean(per_problem(mine).values()))
    return {"accuracies": accuracies, "mean": statistics.fmean(accuracies), "sd": statistics.stdev(accuracies)}


def compare(before: Sequence[Rollout], after: Sequence[Rollout], confidence: float) -> dict[str, Any]:
    """Compare two evaluations over the problems that both have.

    Returns:
        ``baseline_accuracy`` and ``difference`` with intervals, ``formats`` (``step_patterns.compare_formats``), and
        ``unpaired_problems``: the number of problems in only one of the two, which were left out.

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
    old, new = by_problem(before), by_problem(after)
    shared = sorted(old.keys() & new.keys())
    if not shared:
        raise UserError(
            f"the baseline has {len(old)} problems, this evaluation {len(new)}, and none in common",
            "evaluate both on the same problems",
        )
    first, second = ([_share_right(found[p]) for p in shared] for found in (old, new))
    fewest = min(len(found[p]) for p in shared for found in (old, new))
    return {
        "baseline_accuracy": asdict(accuracy_interval(first, confidence)),
        "difference": asdict(paired_difference(first, second, confidence, num_samples=fewest)),
        "formats": compare_formats(_signatures(before), _signatures(after)),
        "unpaired_problems": len(old.keys() ^ new.keys()),
    }


def compare_all(evaluations: Sequence[Sequence[Rollout]], confidence: float) -> list[dict[str, Any]]:
    """Compare each evaluation after the first with the first, over the problems that all have.

    Returns:
        For each, the result of ``compare`` with ``p_value_holm`` in the difference, adjusted for their number, and
        ``accuracy`` with its interval over the same problems.

    Raises:
        UserError: as in ``compare``.
    """
    found = [set(_problems(samples)) for samples in evaluations]
    common = set.intersection(*(set(by_problem(samples)) for samples in evaluations))
    if not common:
        raise UserError(
            f"the {len(evaluations)} evaluations have {', '.join(str(len(one)) for one in found)} problems, and none in "
            "common",
            "evaluate all on the same problems",
        )
    kept = [
        [sample for problem, sample in zip(_problems(samples), samples, strict=True) if problem in common]
        for samples in evaluations
    ]
    made = []
    for samples in kept[1:]:
        accuracy = asdict(accuracy_interval(list(per_problem(samples).values()), confidence))
        made.append({"accuracy": accuracy, **compare(kept[0], samples, confidence)})
    for one, adjusted in zip(made, holm([one["difference"]["p_value"] for one in made]), strict=True):
        one["difference"]["p_value_holm"] = adjusted
        one["unpaired_problems"] = len(set().union(*found) - common)
    return made


def by_problem(samples: Sequence[Rollout]) -> dict[str, list[FinalAnswer]]:
    """Return the verdicts of each problem's samples, in order; samples without a reference are left out.

    Raises:
        UserError: an id occurs twice: a sample would count twice. Ids that only name problems, without ``/NUMBER``, may
            all occur equally often.
    """
    counts = Counter(sample.id for sample in samples)
    twice = [name for name, count in counts.items() if count > 1]
    if twice and (len({*counts.values()}) > 1 or any(name.rpartition("/")[2].isdecimal() for name in twice)):
        raise UserError(
            f"{len(twice)} ids occur more than once, '{twice[0]}' {counts[twice[0]]} times",
            "give each response an id of its own, such as PROBLEM/NUMBER",
        )
    made: dict[str, list[FinalAnswer]] = defaultdict(list)
    for problem, sample in zip(_problems(samples), samples, strict=True):
        if sample.final is not None and sample.final.outcome is not None:
            made[problem].append(sample.final)
    return dict(made)


def per_problem(samples: Sequence[Rollout]) -> dict[str, float]:
    """Return the fraction of correct samples of each problem; samples without a reference are left out."""
    return {problem: _share_right(finals) for problem, finals in by_problem(samples).items()}


def _num_right(finals: Sequence[FinalAnswer]) -> int:
    return sum(final.correct is True for final in finals)


def _share_right(finals: Sequence[FinalAnswer]) -> float:
    return _num_right(finals) / len(finals)


def _ks(most: int) -> list[int]:
    """Return 1, 2, 4, ... up to ``most``, and ``most``."""
    return sorted({*(2**power for power in range(most.bit_length())), most})


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
