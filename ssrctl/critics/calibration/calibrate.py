"""Measure a critic on solutions whose first wrong step is known, before paying for a training run.

Every score is on the scale of steps, [-100, 100]: a final answer's 0, 50 and 100 become -100, 0 and 100 (100 times
its reward), so that one threshold serves all.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ssrctl.critics.base import Critic
from ssrctl.critics.calibration.first_errors import (
    accuracies,
    best_random_f1,
    best_threshold,
    f1_estimate,
    f1_of,
    first_error,
    verdict,
)
from ssrctl.critics.calibration.retest import auc, changed_frac, kappa, point_biserial, score_noise
from ssrctl.errors import Stopped, UserError
from ssrctl.io.labelled import ALL_RIGHT, Labelled
from ssrctl.io.records import StepScore

if TYPE_CHECKING:
    from ssrctl.critics.calibration.judgements import Judgements

COST_FIELDS = ("calls", "cached", "prompt_tokens", "completion_tokens", "cost_usd")


@runtime_checkable
class Repeatable(Protocol):
    """A critic that gives the same answer again (from a cache, by a fixed seed) unless ``repeat`` changes."""

    repeat: int


@dataclass
class JudgedTrace:
    """A labelled trace with the critic's scores.

    Attributes:
        given: the trace.
        scores: per judgement, one number in [-100, 100] per step; None is missing.
        errors: number of missing scores, by class.
    """

    given: Labelled
    scores: list[list[float | None]] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, scores: Sequence[StepScore]) -> None:
        """Add one judgement."""
        steps = self.given.rollout.steps or ()
        self.scores.append([_on_step_scale(score, step.kind) for score, step in zip(scores, steps, strict=True)])
        self.errors.update(score.error or "unknown" for score in scores if score.score is None)


def _on_step_scale(score: StepScore, kind: str) -> float | None:
    if score.score is None or kind == "step":
        return score.score  # not from the reward, whose rounding could push 57 below a threshold of 57
    return 2 * (score.score - 50)


def calibrate(
    critic: Critic,
    labelled: Iterable[Labelled],
    *,
    repeats: int = 1,
    wrong_below: float = 0.0,
    seed: int = 0,
    kept: Judgements | None = None,
    on_done: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Judge every trace ``repeats`` times with ``critic`` and measure it; see ``measure`` for the result.

    A critic that stops at a limit is measured on its judgements until then; ``stopped`` in the result gives the reason.

    Args:
        critic: the critic to measure.
        labelled: the traces; all are held in memory.
        repeats: judgements of each trace, at least 1.
        wrong_below: a step whose score, in [-100, 100], is below this counts as called wrong.
        seed: seed of the interval's resamples.
        kept: file of the judgements: new ones are added, and those that it holds are not made again.
        on_done: called with the number of traces just judged (each counts once per judgement).

    Raises:
        UserError: no traces, or an error of the critic.
        Stopped: the critic stopped before it had judged anything.
    """
    judged = [JudgedTrace(given) for given in labelled]
    if not judged:
        raise UserError("no labelled solutions to measure the critic on", "give --calibrate a file with at least one")
    by_rollout = {id(mine.given.rollout): mine for mine in judged}
    before, started = critic.summary(), time.perf_counter()
    stopped: Stopped | None = None
    num_earlier = 0
    first_repeat = critic.repeat if isinstance(critic, Repeatable) else 0
    try:
        for repeat in range(repeats):
            if isinstance(critic, Repeatable):
                critic.repeat = first_repeat + repeat
            wanted = []
            for mine in judged:
                earlier = None if kept is None else kept.earlier(mine.given, repeat)
                if earlier is None:
                    wanted.append(mine.given.rollout)
                    continue
                mine.add(earlier)
                num_earlier += 1
                if on_done is not None:
                    on_done(1)
            for rollout, scores in critic.stream(wanted):
                mine = by_rollout[id(rollout)]
                if kept is not None:
                    kept.add(mine.given, repeat, scores)
                mine.add(scores)
                if on_done is not None:
                    on_done(1)
    except Stopped as stop:
        stopped = stop
    finally:
        if isinstance(critic, Repeatable):
            critic.repeat = first_repeat
    seconds = time.perf_counter() - started
    known = [mine for mine in judged if mine.scores]
    num_judgements = sum(len(mine.scores) for mine in known)
    if stopped is not None and not known:
        raise stopped
    assert stopped is not None or num_judgements == repeats * len(judged), (num_judgements, repeats, len(judged))
    return {
        "repeats": repeats,
        "judgements": num_judgements,
        "kept_from_before": num_earlier,
        "stopped": None if stopped is None else {"message": stopped.message, "remedy": stopped.remedy},
        "traces_given": len(judged),
        **measure(known, wrong_below=wrong_below, seed=seed),
        "cost": cost_per_trace(before, critic.summary(), num_judgements - num_earlier, seconds),
    }


def measure(judged: Sequence[JudgedTrace], *, wrong_below: float, seed: int = 0) -> dict[str, Any]:
    """Return every measure of a critic that its scores and the labels give.

    A trace with a missing score before the first step called wrong is undecided. It counts as a miss in the accuracies
    (as ProcessBench counts unreadable verdicts) and is also reported as a share. Several judgements of a trace count
    by the share of them that hit its label. Undefined measures are None.

    Args:
        judged: traces with at least one judgement each.
        wrong_below: threshold on the scale of steps.
        seed: seed of the interval's resamples.

    Returns:
        A json object; docs/metrics.md defines every entry.
    """
    labels = [mine.given.label for mine in judged]
    lengths = [len(mine.given.rollout.steps or ()) for mine in judged]
    problems = [mine.given.rollout.question for mine in judged]
    num_erroneous = sum(label != ALL_RIGHT for label in labels)
    return {
        "traces": len(judged),
        "erroneous": num_erroneous,
        "correct": len(judged) - num_erroneous,
        "problems": len(set(problems)),
        "steps": sum(lengths),
        "wrong_below": wrong_below,
        "first_error": _first_errors(judged, labels, problems, wrong_below, seed),
        "best_threshold": _best_threshold(judged, labels, wrong_below),
        "random_f1": best_random_f1(labels, lengths),
        "step_auc": _step_auc(judged),
        "step_kappa": _step_kappa(judged, wrong_below),
        "outcome": _outcome(judged),
        "noise": _noise(judged, wrong_below),
        "missing": _missing(judged),
    }


def _first_errors(
    judged: Sequence[JudgedTrace], labels: Sequence[int], problems: Sequence[Any], wrong_below: float, seed: int
) -> dict[str, Any]:
    predictions = _predictions(judged, wrong_below)
    hits = _hits(predictions, labels)
    erroneous, correct = accuracies(labels, hits)
    estimate = f1_estimate(labels, hits, problems, seed=seed)
    lenient = _predictions(judged, wrong_below, missing_is_right=True)
    whole_rounds = min(map(len, predictions))  # fewer than requested if the critic stopped
    rounds = [[[mine[number]] for mine in predictions] for number in range(whole_rounds)]
    return {
        "f1": None if estimate is None else asdict(estimate),
        "erroneous_accuracy": erroneous,
        "correct_accuracy": correct,
        "undecided_frac": fmean(fmean(found is None for found in mine) for mine in predictions),
        "erroneous_verdicts": _verdicts(predictions, labels, of_erroneous=True),
        "correct_verdicts": _verdicts(predictions, labels, of_erroneous=False),
        "f1_missing_as_right": f1_of(labels, _hits(lenient, labels)),
        "f1_by_repeat": [f1_of(labels, _hits(mine, labels)) for mine in rounds],
    }


def _hits(predictions: Sequence[Sequence[int | None]], labels: Sequence[int]) -> list[float]:
    """Return, per trace, the share of its judgements that hit the label."""
    return [fmean(found == label for found in mine) for mine, label in zip(predictions, labels, strict=True)]


def _predictions(
    judged: Sequence[JudgedTrace], wrong_below: float, *, missing_is_right: bool = False
) -> list[list[int | None]]:
    return [
        [first_error(scores, wrong_below, missing_is_right=missing_is_right) for scores in mine.scores]
        for mine in judged
    ]


def _verdicts(
    predictions: Sequence[Sequence[int | None]], labels: Sequence[int], *, of_erroneous: bool
) -> dict[str, float]:
    """Return the share of each verdict among the traces of a class, each trace counting once."""
    of_class = [
        [verdict(label, found) for found in mine]
        for mine, label in zip(predictions, labels, strict=True)
        if (label != ALL_RIGHT) == of_erroneous
    ]
    names = sorted({name for mine in of_class for name in mine})
    return {name: fmean(mine.count(name) / len(mine) for mine in of_class) for name in names}


def _best_threshold(judged: Sequence[JudgedTrace], labels: Sequence[int], wrong_below: float) -> dict[str, Any] | None:
    rounds = [
        (scores, label, 1 / len(mine.scores))
        for mine, label in zip(judged, labels, strict=True)
        for scores in mine.scores
    ]
    scores, repeated, weights = zip(*rounds, strict=True)
    best = best_threshold(scores, repeated, near=wrong_below, weights=weights)
    return None if best is None else {"wrong_below": best.wrong_below, "f1": best.f1}


def _step_auc(judged: Sequence[JudgedTrace]) -> float | None:
    """Return the chance that a step before the first error scores above a first error; later steps have no label."""
    right, wrong = [], []
    for mine in judged:
        label = mine.given.label
        for scores in mine.scores:
            right += [score for score in (scores if label == ALL_RIGHT else scores[:label]) if score is not None]
            if label != ALL_RIGHT and (score := scores[label]) is not None:
                wrong.append(score)
    return auc(right, wrong)


def _step_kappa(judged: Sequence[JudgedTrace], wrong_below: float) -> dict[str, Any]:
    """Return Cohen's kappa between scores and labels over the steps that have both.

    A step is called right unless its score is below ``wrong_below``. Steps after the first error count only if they
    have labels of their own. The judgements of a trace share its weight.
    """
    called, labels, weights = [], [], []
    for mine in judged:
        for scores in mine.scores:
            for score, label in zip(scores, mine.given.step_labels, strict=True):
                if score is not None and label is not None:
                    called.append(score >= wrong_below)
                    labels.append(label)
                    weights.append(1 / len(mine.scores))
    return {"kappa": kappa(called, labels, weights), "steps": round(sum(weights))}


def _outcome(judged: Sequence[JudgedTrace]) -> dict[str, Any]:
    """Relate the mean and the minimum step score of a trace to its outcome, one data point per judgement.

    The outcome is whether the final answer is right; if no trace says so, whether no step is wrong. Scores of final
    answers are left out.
    """
    has_finals = any(mine.given.final_correct is not None for mine in judged)
    outcomes: list[bool] = []
    columns: dict[str, list[float]] = {"mean_score": [], "min_score": []}
    num_traces = 0
    for mine in judged:
        right = mine.given.final_correct if has_finals else mine.given.label == ALL_RIGHT
        found = [] if right is None else [known for scores in mine.scores if (known := _of_steps(mine, scores))]
        num_traces += bool(found)
        for known in found:
            outcomes.append(bool(right))
            columns["mean_score"].append(fmean(known))
            columns["min_score"].append(min(known))
    measured: dict[str, Any] = {"of": "final_answer" if has_finals else "label", "traces": num_traces}
    for name, column in columns.items():
        sides = [
            [value for value, right in zip(column, outcomes, strict=True) if right == side] for side in (True, False)
        ]
        measured[name] = {"auc": auc(*sides), "correlation": point_biserial(column, outcomes)}
    return measured


def _of_steps(mine: JudgedTrace, scores: Sequence[float | None]) -> list[float]:
    """Return the known scores of a judgement, without those of final answers."""
    steps = mine.given.rollout.steps or ()
    return [score for score, step in zip(scores, steps, strict=True) if score is not None and step.kind == "step"]


def _noise(judged: Sequence[JudgedTrace], wrong_below: float) -> dict[str, Any] | None:
    """Return the noise of repeated scores, or None if no step was scored twice."""
    steps = [
        [score for score in scores if score is not None] for mine in judged for scores in zip(*mine.scores, strict=True)
    ]
    noise = score_noise(steps)
    if noise is None:
        return None
    return {**noise.to_dict(), "first_error_changed_frac": changed_frac(_predictions(judged, wrong_below))}


def _missing(judged: Sequence[JudgedTrace]) -> dict[str, Any]:
    errors = sum((mine.errors for mine in judged), Counter[str]())
    total = sum(len(scores) for mine in judged for scores in mine.scores)
    return {
        "frac": errors.total() / total if total else None,
        "by_class": {name: count / total for name, count in errors.most_common()},
    }


def cost_per_trace(
    before: dict[str, Any], after: dict[str, Any], num_judgements: int, seconds: float
) -> dict[str, float | None]:
    """Return the cost of one judgement of one trace.

    Cached replies cost nothing now, but did once and will on new traces: cost and tokens are those of a call that was
    made, times the calls per judgement. When every reply came from the cache they are None.

    Args:
        before, after: the critic's summaries before and after the work.
        num_judgements: number of judgements over all traces, without those that an earlier run made.
        seconds: duration of the work.

    Returns:
        ``calls``, ``prompt_tokens``, ``completion_tokens``, ``cost_usd`` per judgement; ``cached_frac`` of the
        calls; ``seconds`` per judgement at the current concurrency (None when replies came from the cache) and
        ``seconds_per_call``; total ``spent_usd``. None where the critic does not report it.
    """
    spent = {name: _difference(before, after, name) for name in COST_FIELDS}
    made, cached = spent["calls"], spent["cached"] or 0
    asked = None if made is None else made + cached
    per: dict[str, float | None] = {"calls": None if asked is None or not num_judgements else asked / num_judgements}
    for name in ("prompt_tokens", "completion_tokens", "cost_usd"):
        total = spent[name]
        per[name] = (
            None
            if total is None or not made or not num_judgements or asked is None
            else total / made * asked / num_judgements
        )
    return {
        **per,
        "cached_frac": cached / asked if asked else None,
        "seconds": None if cached or not num_judgements else seconds / num_judgements,
        "seconds_per_call": after.get("mean_latency_s"),
        "spent_usd": spent["cost_usd"],
    }


def _difference(before: dict[str, Any], after: dict[str, Any], name: str) -> float | None:
    return None if after.get(name) is None else after[name] - (before.get(name) or 0)
