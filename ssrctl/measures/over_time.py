"""The changes of a run over its checkpoints c_1, ..., c_T (Mukherjee et al. 2025, arXiv:2505.11711, sec. 6, app. D).

Notation: C_t the weights of checkpoint t that differ from the base, U_t the union of C_1 ... C_t, N all weights; C_T
is the final subnetwork. Sparsity is ``1 - |C_t| / N`` (figures 5 and 7a), between neighbours the same of c_(t-1) and c_t
(figure 7b). ``|C_t \\ C_T| / N`` is their figure 6.

Their text gives one number for changes that did not last, 8.5% of the weights ever changed, and their figure 2 another,
8% of all weights: both shares are measured here.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssrctl.measures.base import Findings, JointMeasure, TensorSeries, register
from ssrctl.measures.group_tables import RowColumn, row_table
from ssrctl.measures.line_ratios import LineRatios, line_ratios, pictured, ratio_figures
from ssrctl.measures.maths.averages import mean, ratio
from ssrctl.measures.maths.change_rule import Differs, Rule, change_rule
from ssrctl.measures.maths.grouping import Grouped, group
from ssrctl.measures.maths.row_column_counts import Profile, profile, stability, stacked
from ssrctl.measures.published import PublishedKey, references
from ssrctl.report.document import Column, Figure, Heatmap, Lines, Numbers, Section, Table
from ssrctl.report.formats import count, number, percent

_PART = 1 << 20  # elements compared at once
_MOST_COLUMNS = 80  # of a heat map
# The published sparsities that were measured by the same rule.
_PUBLISHED: dict[Rule, PublishedKey] = {"atol": "sparsity_1e-5", "bf16": "sparsity_bf16"}


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
            (``row_column_counts.stability``); empty for a tensor that is not a matrix.
        profiles: of C_t, of a matrix where they were kept.
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
    profiles: tuple[Profile, ...] = ()


def over_time(
    base: Tensor,
    last: Tensor,
    checkpoints: Iterable[Tensor],
    differs: Differs,
    bits_differ: Differs,
    *,
    keep_profiles: bool = False,
) -> OverTime:
    """Follow one tensor through a run.

    Holds the base, three checkpoints and two sets (a byte for each weight) at a time: the last checkpoint, which defines
    the final subnetwork, stays in memory.

    Args:
        base: any shape.
        last: the tensor of c_T, of the base's shape.
        checkpoints: the tensors of c_1, ..., c_T, of the base's shape.
        differs: of two pieces of one shape, a bool tensor of it, True = changed.
        bits_differ: the same for any difference of the stored values.
        keep_profiles: return the profiles of a matrix.

    Raises:
        ValueError: no checkpoints, or another shape.
    """
    # Pieces of a checkpoint are handled in other functions: a loop variable left over here would keep it alive.
    final = _changed(base, last, differs)
    ever = torch.zeros_like(final)
    counts: dict[str, list[int]] = {"changed": [], "moved": [], "ever": [], "outside_final": []}
    profiles = []
    before = base
    for now in checkpoints:
        found, line = _interval(base, before, now, ever, final, differs)
        before = now
        for key, value in found.items():
            counts[key].append(value)
        if line is not None:
            profiles.append(line)
    if not counts["changed"]:
        raise ValueError("a run over time needs at least one checkpoint")
    outside, cancelled = _at_the_end(base, before, ever, final, bits_differ)
    row_stability, column_stability = stability(profiles)
    return OverTime(
        numel=base.numel(),
        **{key: tuple(values) for key, values in counts.items()},
        num_ever_outside=outside,
        num_cancelled=cancelled,
        row_stability=tuple(row_stability),
        column_stability=tuple(column_stability),
        profiles=tuple(profiles) if keep_profiles else (),
    )


def _changed(base: Tensor, tuned: Tensor, differs: Differs) -> Tensor:
    """Return a bool tensor of the base's shape, True = changed."""
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
    """Count (ever changed but not in the final subnetwork, ever changed but equal to the base bit for bit)."""
    outside = cancelled = 0
    for start, end, union, kept in _pieces(base, last, ever, final):
        outside += int((union & ~kept).count_nonzero())
        cancelled += int((union & ~bits_differ(start, end)).count_nonzero())
    return outside, cancelled


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same rows of several tensors of one shape as matrices of about ``_PART`` elements; views if possible."""
    if any(one.shape != tensors[0].shape for one in tensors):
        raise ValueError(f"shapes differ: {[list(one.shape) for one in tensors]}")
    if not tensors[0].numel():
        return
    matrices = [one.flatten(1) if one.dim() > 1 else one.reshape(-1, 1) for one in tensors]
    yield from zip(*(one.split(max(1, _PART // one.shape[1])) for one in matrices), strict=True)


# --------------------------------------------------------------------------------------------------
# of one or several tensors


@dataclass(frozen=True, kw_only=True)
class TimeRow:
    """Some tensors over time, counted together; shares of nothing are None.

    Lists run over t = 1 ... T.

    Attributes:
        numel: N.
        sparsity: ``1 - |C_t| / N``.
        neighbour_sparsity: the same between c_(t-1) and c_t.
        ever_frac: ``|U_t| / N``.
        expected_ever_frac: the same if every interval moved random weights of each tensor, as many as it did.
        outside_final_frac, outside_final_of_changed: ``|C_t \\ C_T|`` over N, and over ``|C_t|``.
        row_stability, column_stability: means over matrices.
        final_frac, never_frac: at the end, shares in the final subnetwork and never changed.
        outside_final, cancelled: at the end, counts of weights that changed but are not in the final subnetwork, and
            of those that are equal to the base bit for bit; as shares of the weights ever changed (``..._of_ever``) and
            of all (``ever_outside_frac``, ``cancelled_frac``).
    """

    numel: int
    sparsity: list[float | None]
    neighbour_sparsity: list[float | None]
    ever_frac: list[float | None]
    expected_ever_frac: list[float | None]
    outside_final_frac: list[float | None]
    outside_final_of_changed: list[float | None]
    row_stability: list[float | None]
    column_stability: list[float | None]
    final_frac: float | None
    never_frac: float | None
    outside_final: int
    cancelled: int
    outside_final_of_ever: float | None
    cancelled_of_ever: float | None
    ever_outside_frac: float | None
    cancelled_frac: float | None


@dataclass(frozen=True, kw_only=True)
class OverTimeResult:
    """A run over time.

    Attributes:
        steps: the training step of each checkpoint, or its number from 1; ascending.
        rule: the criterion of a changed weight, in words.
        ratios: of the rows and columns of some matrices.
    """

    steps: list[float]
    rule: str
    rows: Grouped[TimeRow, TimeRow]
    ratios: list[LineRatios]

    def numbers(self) -> dict[str, Any]:
        """Return the form of the json report."""
        ratios = [one.numbers() for one in self.ratios]
        return {"steps": self.steps, "rule": self.rule, **self.rows.numbers(), "line_ratios": ratios}


def time_row(tensors: Sequence[OverTime]) -> TimeRow:
    """Add up several tensors."""
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
    return TimeRow(
        numel=numel,
        sparsity=[ratio(numel - amount, numel) for amount in changed],
        neighbour_sparsity=[ratio(numel - amount, numel) for amount in moved],
        ever_frac=[ratio(amount, numel) for amount in ever],
        expected_ever_frac=[ratio(math.fsum(one[t] for one in at_random), numel) for t in steps],
        outside_final_frac=[ratio(amount, numel) for amount in outside],
        outside_final_of_changed=[ratio(outside[t], changed[t]) for t in steps],
        row_stability=[mean(one.row_stability[t] for one in tensors if one.row_stability) for t in steps],
        column_stability=[mean(one.column_stability[t] for one in tensors if one.column_stability) for t in steps],
        final_frac=ratio(changed[-1], numel) if changed else None,
        never_frac=ratio(numel - num_ever, numel),
        outside_final=num_outside,
        cancelled=cancelled,
        outside_final_of_ever=ratio(num_outside, num_ever),
        cancelled_of_ever=ratio(cancelled, num_ever),
        ever_outside_frac=ratio(num_outside, numel),
        cancelled_frac=ratio(cancelled, numel),
    )


def _expected_ever(one: OverTime) -> list[float]:
    """Return E|U_t| if the moved weights of every interval were drawn at random: ``N (1 - prod (1 - moved_s / N))``."""
    left, found = 1.0, []
    for moved in one.moved:
        left *= 1 - moved / one.numel if one.numel else 1.0
        found.append(one.numel * (1 - left))
    return found


def over_time_result(found: Mapping[str, OverTime], steps: Sequence[float], rule: str) -> OverTimeResult:
    """Group tensors by layer and kind.

    Args:
        rule: the criterion of a changed weight, in words.

    Raises:
        ValueError: another number of steps than of checkpoints.
    """
    if any(len(one.changed) != len(steps) for one in found.values()):
        raise ValueError(f"{len(steps)} steps, but another number of checkpoints")
    ratios = [line_ratios(name, one.profiles, steps) for name, one in found.items() if one.profiles]
    return OverTimeResult(steps=list(steps), rule=rule, rows=group(found, time_row), ratios=ratios)


# --------------------------------------------------------------------------------------------------
# the measure


@register
class OverTimeMeasure(JointMeasure[OverTime, OverTimeResult]):
    """The weights that a series of checkpoints changed, kept and took back."""

    name = "time"
    order = 10
    default_in = frozenset({"series", "run"})
    possible_in = frozenset({"series", "run"})
    needs = "--series, or a run"

    def tensor(self, pairs: TensorSeries) -> OverTime:
        """Follow one tensor through the checkpoints."""
        differs, _ = change_rule(self.config)
        bits_differ, _ = change_rule(self.config, "bits")
        return over_time(
            pairs.last.base,
            pairs.last.tuned,
            (pair.tuned for pair in pairs),
            differs,
            bits_differ,
            keep_profiles=pairs.name in self._pictured,
        )

    @functools.cached_property
    def _pictured(self) -> list[str]:
        return pictured(self.comparison.base.shapes, self.comparison.names, self.config.picture)

    def combine(self, parts: Mapping[str, list[OverTime]]) -> OverTimeResult:
        """Return the series of all, by layer, by kind and of each tensor."""
        steps = [checkpoint.step for checkpoint in self.comparison.tuned]
        numbered = [place if step is None else step for place, step in enumerate(steps, start=1)]
        if None in steps or numbered != sorted(set(numbered)):
            numbered = list(range(1, len(steps) + 1))
        return over_time_result({name: one for name, (one,) in parts.items()}, numbered, change_rule(self.config)[1])

    def present(self, result: OverTimeResult) -> Findings:
        """Return sentences, figures and tables of a run over time."""
        total = result.rows.total
        moved = [1 - share for share in total.neighbour_sparsity if share is not None]
        known = [checkpoint.step for checkpoint in self.comparison.tuned if checkpoint.step is not None]
        every_step = known == list(result.steps) and {b - a for a, b in itertools.pairwise(known)} == {1}
        per: PublishedKey = "changed_per_step" if every_step else "changed_per_checkpoint"
        return Findings(
            numbers={"over_time": result.numbers()},
            headlines=headlines(result),
            sections=[over_time_section(result, _PUBLISHED.get(self.config.changed_by))],
            published={
                per: sum(moved) / len(moved) if moved else None,
                "outside_final": total.outside_final_of_ever,
            },
        )


def _rest(share: float | None) -> float | None:
    return None if share is None else 1 - share


def headlines(result: OverTimeResult) -> list[str]:
    """Return the answer in sentences; none when there are no weights."""
    total, steps = result.rows.total, result.steps
    if not total.sparsity or total.final_frac is None:
        return []
    if total.ever_frac[-1] == 0:
        return ["No weight changed at any checkpoint."]
    return [
        f"Sparsity against the base goes from {percent(total.sparsity[0])} at step {steps[0]:g} to "
        f"{percent(total.sparsity[-1])} at step {steps[-1]:g}.",
        f"{percent(total.outside_final_of_ever)} of the weights that ever changed are not in the final subnetwork "
        f"({percent(total.ever_outside_frac)} of all weights); {percent(total.cancelled_of_ever)} are back at the "
        "base's value bit for bit.",
        f"{percent(total.never_frac)} of the weights never changed at any checkpoint.",
    ]


_AT_STEP: tuple[RowColumn, ...] = (
    ("sparsity", "sparsity", percent),
    ("to the one before", "neighbour_sparsity", percent),
    ("ever changed", "ever_frac", percent),
    ("ever, chance", "expected_ever_frac", percent),
    ("not in final", "outside_final_frac", percent),
    ("not in final, of changed", "outside_final_of_changed", percent),
    ("rows", "row_stability", number),
    ("columns", "column_stability", number),
)
_AT_END: tuple[RowColumn, ...] = (
    ("weights", "numel", count),
    ("in final", "final_frac", percent),
    ("never changed", "never_frac", percent),
    ("not in final, of ever", "outside_final_of_ever", percent),
    ("cancelled, of ever", "cancelled_of_ever", percent),
    ("not in final, of all", "ever_outside_frac", percent),
    ("cancelled, of all", "cancelled_frac", percent),
)
_END_NOTE = (
    "Ever: changed at some checkpoint. Not in final: changed then, but not at the last one. Cancelled: equal to the base "
    "bit for bit at the last one."
)


def over_time_section(result: OverTimeResult, published: PublishedKey | None = None) -> Section:
    """Return figures and tables: sparsity, union and subnetwork over the checkpoints, by layer and by kind of matrix.

    Args:
        published: the published sparsity that was measured by the same rule, if any.
    """
    title, rows = "The run over time", result.rows
    if not result.steps or not rows.tensors:
        return Section(title=title, text="There are no checkpoints, or no weights in them.")
    return Section(
        title=title,
        text=f"How does the set of changed weights grow, and does it stay? Changed: {result.rule}. The final "
        "subnetwork is what differs from the base at the last checkpoint.",
        figures=[
            *_layer_map(result),
            *_lines(result.steps, rows.total, published),
            *(figure for one in result.ratios for figure in ratio_figures(one)),
        ],
        tables=[
            _step_table(result.steps, rows.total),
            row_table("The end of the run by kind of matrix", "kind", rows.kinds, _AT_END, _END_NOTE),
            row_table("The end of the run by tensor", "tensor", rows.tensors, _AT_END, _END_NOTE, terminal_rows=0),
        ],
    )


def _lines(steps: Sequence[float], total: TimeRow, published: PublishedKey | None) -> list[Figure]:
    def over_steps(title: str, y_label: str, series: Mapping[str, Numbers], **settings: Any) -> Lines:
        return Lines(title=title, x=steps, series=series, x_label="training step", y_label=y_label, **settings)

    figures: list[Figure] = [
        over_steps(
            "Update sparsity over time",
            "share unchanged",
            {"against the base": total.sparsity, "between neighbours": total.neighbour_sparsity},
            shares=True,
            references=references(published, "RL") if published else [],
        ),
        over_steps(
            "Growth of the changed set",
            "share of all weights",
            {
                "changed at some checkpoint so far": total.ever_frac,
                "changed now": list(map(_rest, total.sparsity)),
                "expected, ever changed": total.expected_ever_frac,
            },
            shares=True,
            caption="Expected: if each interval moved as many weights of each tensor as it did, drawn at random. Below "
            "it, the same weights move again.",
        ),
        over_steps(
            "Changed, but not in the final subnetwork",
            "share of all weights",
            {"of all weights": total.outside_final_frac},
            shares=True,
            caption="Weights that differ from the base at this step and no longer at the end (Mukherjee et al. 2025, "
            "figure 6).",
        ),
    ]
    stable = {"rows": total.row_stability, "columns": total.column_stability}
    if len(steps) > 1 and any(one is not None for values in stable.values() for one in values):
        figures.append(
            over_steps(
                "Do the rows and columns that change stay the same?",
                "rank correlation with the last step",
                stable,
                caption="Changes per row, per column of each matrix; mean over matrices. 1 at the end by definition (Zhu "
                "et al. 2025, section 2.2).",
            )
        )
    return figures


def _layer_map(result: OverTimeResult) -> list[Figure]:
    layers = result.rows.labelled_layers
    if len(layers) < 2:
        return []
    kept = _spread(len(result.steps), _MOST_COLUMNS)
    return [
        Heatmap(
            title="Changed share by layer over time",
            values=[[_rest(row.sparsity[place]) for place in kept] for row in layers.values()],
            row_labels=list(layers),
            column_labels=[f"{result.steps[place]:g}" for place in kept],
            row_axis="layer",
            column_axis="training step",
            shares=True,
            decimals=1,
        )
    ]


def _spread(size: int, most: int) -> list[int]:
    """Return up to ``most`` places among ``size``, evenly spread, with the first and the last."""
    if size <= most:
        return list(range(size))
    return [round(place * (size - 1) / (most - 1)) for place in range(most)]


def _step_table(steps: Sequence[float], total: TimeRow) -> Table:
    return Table(
        title="Checkpoints",
        columns=[Column("step", "{:g}".format), *(Column(heading, show) for heading, _, show in _AT_STEP)],
        rows=[[step, *(getattr(total, key)[place] for _, key, _ in _AT_STEP)] for place, step in enumerate(steps)],
        note="Shares of all weights but for the share of changed ones. The first checkpoint's neighbour is the base. "
        "Rows, columns: rank correlation of the changes per row, per column with the last checkpoint's.",
    )
