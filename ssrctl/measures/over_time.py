"""What a run changed as it went on: base, c_1, ..., c_T (Mukherjee et al. 2025, arXiv:2505.11711, sec. 6, app. D).

Notation: C_t the weights of checkpoint t that differ from the base, U_t the union of C_1 ... C_t, N all weights; C_T
is the final subnetwork. Sparsity is ``1 - |C_t| / N`` (figures 5 and 7a), between neighbours the same of c_(t-1) and c_t
(figure 7b). ``|C_t \\ C_T| / N`` is their figure 6.

Their text gives one number for changes that did not last, 8.5% of the weights ever changed, and their figure 2 another,
8% of all weights: both shares are measured here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssrctl.measures.base import Findings, JointMeasure, TensorSeries, register
from ssrctl.measures.maths.change_rule import Differs, change_rule
from ssrctl.measures.maths.grouping import grouped
from ssrctl.measures.maths.row_column_counts import Profile, mean, profile, stability, stacked

if TYPE_CHECKING:
    from torch import Tensor


_PART = 1 << 20  # elements compared at once


@dataclass(frozen=True, kw_only=True)
class OverTime:
    """One tensor over T checkpoints; lists run over t = 1 ... T.

    Attributes:
        numel: N.
        changed: ``|C_t|``.
        moved: weights that differ between c_(t-1) and c_t, with c_0 the base.
        ever: ``|U_t|``.
        outside_final: ``|C_t \\ C_T|``, 0 at the end.
        num_ever_outside: ``|U_T \\ C_T|``, changed at some checkpoint but not in the final subnetwork.
        num_cancelled: those of U_T that are, at the end, equal to the base bit for bit.
        row_stability, column_stability: rank correlation of the profile of C_t with that of C_T
            (``profiles.stability``); empty for a tensor that is no matrix.
    """

    numel: int
    changed: tuple[int, ...]
    moved: tuple[int, ...]
    ever: tuple[int, ...]
    outside_final: tuple[int, ...]
    num_ever_outside: int
    num_cancelled: int
    row_stability: tuple[float | None, ...] = ()
    column_stability: tuple[float | None, ...] = ()


def over_time(
    base: Tensor, last: Tensor, checkpoints: Iterable[Tensor], differs: Differs, bits_differ: Differs
) -> OverTime:
    """Follow one tensor through a run.

    Holds the base, three checkpoints and two sets (a byte for each weight) at a time: the last checkpoint, which tells
    the final subnetwork, stays in memory.

    Args:
        base: any shape.
        last: the tensor of c_T, of the base's shape.
        checkpoints: the tensors of c_1, ..., c_T, of the base's shape.
        differs: of two pieces of one shape, a bool tensor of it, True = changed.
        bits_differ: the same for any difference of the stored values.

    Raises:
        ValueError: no checkpoints, or another shape.
    """
    import torch

    # What touches pieces of a checkpoint is in functions of its own: a loop variable left over here would keep it alive.
    final = _changed(base, last, differs)
    ever = torch.zeros_like(final)
    counts: dict[str, list[int]] = {"changed": [], "moved": [], "ever": [], "outside_final": []}
    profiles = []
    before, now = base, base
    for after in checkpoints:
        before, now = now, after
        found, line = _interval(base, before, now, ever, final, differs)
        for key, value in found.items():
            counts[key].append(value)
        if line is not None:
            profiles.append(line)
    if not counts["changed"]:
        raise ValueError("a run over time needs at least one checkpoint")
    outside, cancelled = _at_the_end(base, now, ever, final, bits_differ)
    stable = stability(profiles)
    return OverTime(
        numel=base.numel(),
        **{key: tuple(values) for key, values in counts.items()},
        num_ever_outside=outside,
        num_cancelled=cancelled,
        row_stability=tuple(stable["rows"]),
        column_stability=tuple(stable["columns"]),
    )


def _changed(base: Tensor, tuned: Tensor, differs: Differs) -> Tensor:
    """bool of the base's shape."""
    import torch

    changed = torch.empty(base.shape, dtype=torch.bool)
    for part, a, b in _pieces(changed, base, tuned):
        part.copy_(differs(a, b))
    return changed


def _interval(
    base: Tensor, before: Tensor, now: Tensor, ever: Tensor, final: Tensor, differs: Differs
) -> tuple[dict[str, int], Profile | None]:
    """Count one checkpoint, with its profile if it is a matrix, and add its changes to ``ever`` in place."""
    found = dict.fromkeys(("changed", "moved", "ever", "outside_final"), 0)
    lines = []
    for start, a, b, union, kept in _pieces(base, before, now, ever, final):
        here = differs(start, b)
        union |= here
        lines.append(profile(here) if base.dim() == 2 else None)
        found["changed"] += int(here.count_nonzero())
        found["moved"] += int(differs(a, b).count_nonzero())
        found["ever"] += int(union.count_nonzero())
        found["outside_final"] += int((here & ~kept).count_nonzero())
    return found, stacked(lines)


def _at_the_end(base: Tensor, last: Tensor, ever: Tensor, final: Tensor, bits_differ: Differs) -> tuple[int, int]:
    """(ever changed but not in the final subnetwork, ever changed but equal to the base bit for bit)."""
    outside = cancelled = 0
    for start, end, union, kept in _pieces(base, last, ever, final):
        outside += int((union & ~kept).count_nonzero())
        cancelled += int((union & ~bits_differ(start, end)).count_nonzero())
    return outside, cancelled


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of several tensors of one shape, as matrices of about ``_PART`` elements; views where they can be."""
    if any(one.shape != tensors[0].shape for one in tensors):
        raise ValueError(f"shapes differ: {[list(one.shape) for one in tensors]}")
    if not tensors[0].numel():
        return
    matrices = [one.flatten(1) if one.dim() > 1 else one.reshape(-1, 1) for one in tensors]
    yield from zip(*(one.split(max(1, _PART // one.shape[1])) for one in matrices), strict=True)


# --------------------------------------------------------------------------------------------------
# of one or several tensors


def series(tensors: Sequence[OverTime]) -> dict[str, Any]:
    """Some tensors over time, counted together.

    Returns:
        ``numel``; lists over t: ``sparsity``, ``neighbour_sparsity``, ``ever_frac`` (``|U_t| / N``),
        ``expected_ever_frac`` (what it would be if every interval moved random weights of each tensor, as many as it
        did), ``outside_final_frac`` (``|C_t \\ C_T| / N``), ``outside_final_of_changed`` (the same over ``|C_t|``),
        ``row_stability`` and ``column_stability`` (means over matrices); and at the end ``final_frac``,
        ``never_frac``, ``outside_final`` and ``cancelled`` (counts), ``outside_final_of_ever``,
        ``cancelled_of_ever``, ``ever_outside_frac`` and ``cancelled_frac`` (of all weights). Shares of nothing are None.
    """
    numel = sum(one.numel for one in tensors)
    steps = range(len(tensors[0].changed) if tensors else 0)
    changed, moved, ever, outside = (
        [sum(getattr(one, key)[t] for one in tensors) for t in steps]
        for key in ("changed", "moved", "ever", "outside_final")
    )
    at_random = [_expected_ever(one) for one in tensors]
    num_ever = ever[-1] if ever else 0
    num_outside = sum(one.num_ever_outside for one in tensors)
    cancelled = sum(one.num_cancelled for one in tensors)
    return {
        "numel": numel,
        "sparsity": [_ratio(numel - count, numel) for count in changed],
        "neighbour_sparsity": [_ratio(numel - count, numel) for count in moved],
        "ever_frac": [_ratio(count, numel) for count in ever],
        "expected_ever_frac": [_ratio(math.fsum(one[t] for one in at_random), numel) for t in steps],
        "outside_final_frac": [_ratio(count, numel) for count in outside],
        "outside_final_of_changed": [_ratio(outside[t], changed[t]) for t in steps],
        "row_stability": [mean([one.row_stability[t] for one in tensors if one.row_stability]) for t in steps],
        "column_stability": [mean([one.column_stability[t] for one in tensors if one.column_stability]) for t in steps],
        "final_frac": _ratio(changed[-1], numel) if changed else None,
        "never_frac": _ratio(numel - num_ever, numel),
        "outside_final": num_outside,
        "cancelled": cancelled,
        "outside_final_of_ever": _ratio(num_outside, num_ever),
        "cancelled_of_ever": _ratio(cancelled, num_ever),
        "ever_outside_frac": _ratio(num_outside, numel),
        "cancelled_frac": _ratio(cancelled, numel),
    }


def _expected_ever(one: OverTime) -> list[float]:
    """E|U_t| if the moved weights of every interval were drawn at random: ``N (1 - prod (1 - moved_s / N))``."""
    left, found = 1.0, []
    for count in one.moved:
        left *= 1 - count / one.numel if one.numel else 1.0
        found.append(one.numel * (1 - left))
    return found


def over_time_numbers(found: Mapping[str, OverTime], steps: Sequence[float], rule: str) -> dict[str, Any]:
    """The report's numbers: ``steps``, ``rule``, and ``series`` of all, by layer, by kind and of each tensor.

    Args:
        found: of each tensor, by name.
        steps: the training step of each checkpoint, or its number from 1; ascending.
        rule: what counts as changed, in words.

    Raises:
        ValueError: another number of steps than of checkpoints.
    """
    if any(len(one.changed) != len(steps) for one in found.values()):
        raise ValueError(f"{len(steps)} steps, but another number of checkpoints")
    return {"steps": list(steps), "rule": rule, **grouped(found, series)}


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


@register
class OverTimeMeasure(JointMeasure[OverTime, dict[str, Any]]):
    """What a series of checkpoints changed, kept and took back."""

    name = "time"
    default_in = frozenset({"series", "run"})
    possible_in = frozenset({"series", "run"})
    needs = "--series, or a run"

    def tensor(self, pairs: TensorSeries) -> OverTime:
        """Follow one tensor through the checkpoints."""
        differs, _ = change_rule(self.config)
        bits_differ, _ = change_rule(self.config, "bits")
        return over_time(pairs.last.base, pairs.last.tuned, (pair.tuned for pair in pairs), differs, bits_differ)

    def combine(self, parts: Mapping[str, list[OverTime]]) -> dict[str, Any]:
        """Return the series of all, by layer, by kind and of each tensor."""
        steps = [checkpoint.step for checkpoint in self.comparison.tuned]
        numbered = [place if step is None else step for place, step in enumerate(steps, start=1)]
        if None in steps or numbered != sorted(set(numbered)):
            numbered = list(range(1, len(steps) + 1))
        return over_time_numbers({name: one for name, (one,) in parts.items()}, numbered, change_rule(self.config)[1])

    def present(self, result: dict[str, Any]) -> Findings:
        """Return sentences, figures and tables of a run over time."""
        from ssrctl.measures.over_time_report import headlines, over_time_section

        total = result["total"]
        moved = [1 - share for share in total["neighbour_sparsity"] if share is not None]
        published: dict[str, Any] = {"atol": "sparsity_1e-5", "bf16": "sparsity_bf16", "bits": None}
        return Findings(
            numbers={"over_time": result},
            headlines=headlines(result),
            sections=[over_time_section(result, published[self.config.changed_by])],
            published={
                "changed_per_checkpoint": sum(moved) / len(moved) if moved else None,
                "outside_final": total["outside_final_of_ever"],
            },
        )
