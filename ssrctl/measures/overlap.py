"""The overlap of the weights that several runs from one base changed.

Notation: A_i the set of weights that run i changed, p_i its density in one tensor of N weights.

* one-sided overlap ``o = |A_i n A_j| / |A_i|`` (Mukherjee et al. 2025, arXiv:2505.11711, section 5; their o1 and o2
  are rows and columns of one matrix);
* Jaccard index ``|A_i n A_j| / |A_i u A_j|`` (Zhu et al. 2025, arXiv:2511.08567, section 2.2);
* consensus: how many of the runs changed a weight (Zhu et al., section 2.2, figure 2: C = that number over runs).

Chance is independence within each tensor: ``E|A_i n A_j| = N p_i p_j``, which gives the Jaccard index
``p q / (p + q - p q)`` (Zhu et al., section 2.2), and one-sided overlaps equal to the other set's density (Mukherjee
et al., appendix E). Over several tensors expectations are added up before any division: runs that change the same
tensors overlap more than the model's density says, and that is not yet agreement on weights. Nor is it if both move
small weights, whose stored values move more easily: hence a second expectation among weights of equal magnitude.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ssrctl.checkpoints.names import layer_index
from ssrctl.core.mask import TileSet
from ssrctl.measures.base import Findings, JointMeasure, TensorSeries, register
from ssrctl.measures.group_tables import RowColumn, layer_lines, off_diagonal, picture, row_dots, row_table
from ssrctl.measures.maths.averages import mean, ratio
from ssrctl.measures.maths.change_rule import change_rule
from ssrctl.measures.maths.grouping import Grouped, group, middle_layer
from ssrctl.measures.maths.magnitude import count_by_magnitude, widened
from ssrctl.measures.maths.row_column_counts import CoarseMap, coarse_map, profile
from ssrctl.measures.maths.run_sets import (
    RunOverlap,
    at_least,
    bernoulli_jaccard,
    expected_shared,
    expected_shared_same_size,
    run_overlap,
)
from ssrctl.measures.published import references
from ssrctl.report.document import Column, Dots, Figure, Heatmap, Reference, Section, Table
from ssrctl.report.formats import count, number, percent

Matrix = list[list[float | None]]
_CHANCE = "expected by chance"


@dataclass(frozen=True, kw_only=True)
class PairMatrices:
    """Overlaps of every pair of runs over some tensors; row i, column j.

    Diagonals are 1 where A_i is not empty, expected ones too.

    Attributes:
        one_sided: ``|A_i n A_j| / |A_i|``, None for an empty A_i.
        jaccard: Jaccard index, None when both sets are empty.
        expected_one_sided, expected_jaccard: by chance within each tensor.
        expected_one_sided_same_size, expected_jaccard_same_size: by chance among weights of one tensor and of equal
            magnitude, None where that was not counted.
    """

    one_sided: Matrix
    jaccard: Matrix
    expected_one_sided: Matrix
    expected_jaccard: Matrix
    expected_one_sided_same_size: Matrix
    expected_jaccard_same_size: Matrix


@dataclass(frozen=True, kw_only=True)
class WholeModel:
    """Overlaps by chance if changes could lie anywhere in the model (Mukherjee et al., appendix E)."""

    expected_one_sided: Matrix
    expected_jaccard: Matrix


@dataclass(frozen=True, kw_only=True)
class ConsensusRow:
    """Weights that at least ``runs`` of the runs changed.

    By chance, independent within each tensor, the number of runs that change a weight is Poisson-binomial with the
    tensor's densities; expected shares are ratios of expectations.

    Attributes:
        runs: r, from 1.
        count: of the weights.
        frac, expected_frac: share of all weights.
        frac_of_ever, expected_frac_of_ever: share of those that any run changed.
    """

    runs: int
    count: int
    frac: float | None
    expected_frac: float | None
    frac_of_ever: float | None
    expected_frac_of_ever: float | None


@dataclass(frozen=True, kw_only=True)
class OverlapRow:
    """Overlaps in some tensors; means are over pairs of different runs.

    Attributes:
        numel: number of weights.
        num_changed: by each run.
        one_sided: mean over both directions; ``expected_...`` as in ``PairMatrices``.
        jaccard: mean index; ``expected_...`` over the same pairs.
        all_runs_of_ever: share of ever changed weights that all runs changed, and by chance.
        row_agreement, column_agreement: means over tensors.
    """

    numel: int
    num_changed: list[int]
    one_sided: float | None
    expected_one_sided: float | None
    expected_one_sided_same_size: float | None
    jaccard: float | None
    expected_jaccard: float | None
    expected_jaccard_same_size: float | None
    all_runs_of_ever: float | None
    expected_all_runs_of_ever: float | None
    row_agreement: float | None
    column_agreement: float | None


@dataclass(frozen=True)
class Consensus:
    """A picture of a matrix: the share of the runs that changed a weight, averaged over blocks (Zhu et al., figure 2)."""

    name: str
    consensus: CoarseMap


@dataclass(frozen=True, kw_only=True)
class OverlapResult:
    """Overlaps of two or more runs.

    Attributes:
        rule: the criterion of a changed weight, in words.
        matrices, whole_model, consensus: of the whole model.
        rows: by group, and of each tensor.
    """

    runs: list[str]
    rule: str
    matrices: PairMatrices
    whole_model: WholeModel
    consensus: list[ConsensusRow]
    rows: Grouped[OverlapRow, OverlapRow]
    examples: list[Consensus]

    def numbers(self) -> dict[str, Any]:
        """Return the form of the json report."""
        whole = {key: value for key, value in asdict(self).items() if key != "rows"}
        return whole | self.rows.numbers()


# --------------------------------------------------------------------------------------------------
# measured and expected, of one or several tensors


def pair_matrices(tensors: Sequence[RunOverlap]) -> PairMatrices:
    """Compare every pair of runs over some tensors."""
    runs = range(tensors[0].num_runs if tensors else 0)
    sizes = [sum(one.sizes[i] for one in tensors) for i in runs]
    shared: dict[str, Matrix] = {
        "{}": [[sum(one.shared[i][j] for one in tensors) for j in runs] for i in runs],
        "expected_{}": [[expected_shared(tensors, i, j) for j in runs] for i in runs],
        "expected_{}_same_size": [[expected_shared_same_size(tensors, i, j) for j in runs] for i in runs],
    }
    found: dict[str, Matrix] = {}
    for name, both in shared.items():
        for i in runs:
            both[i][i] = sizes[i]
        found[name.format("one_sided")] = [[ratio(both[i][j], sizes[i]) for j in runs] for i in runs]
        found[name.format("jaccard")] = [[_jaccard(sizes[i], sizes[j], both[i][j]) for j in runs] for i in runs]
    return PairMatrices(**found)


def _jaccard(a: int, b: int, shared: float | None) -> float | None:
    return None if shared is None else ratio(shared, a + b - shared)


def as_one_tensor(tensors: Sequence[RunOverlap]) -> WholeModel:
    """Return what chance gives when it may place changes anywhere in the model."""
    runs = range(tensors[0].num_runs if tensors else 0)
    numel = sum(one.numel for one in tensors)
    sizes = [sum(one.sizes[i] for one in tensors) for i in runs]
    density = [size / numel if numel else 0.0 for size in sizes]
    same = [ratio(size, size) for size in sizes]
    return WholeModel(
        expected_one_sided=[[same[i] if i == j else density[j] if sizes[i] else None for j in runs] for i in runs],
        expected_jaccard=[
            [same[i] if i == j else bernoulli_jaccard(density[i], density[j]) for j in runs] for i in runs
        ],
    )


def consensus(tensors: Sequence[RunOverlap]) -> list[ConsensusRow]:
    """Return for r = 1 ... R the weights that at least r of the R runs changed, and the same by chance."""
    num_runs = tensors[0].num_runs if tensors else 0
    numel = sum(one.numel for one in tensors)
    counts = [sum(sum(one.depth[runs:]) for one in tensors) for runs in range(num_runs + 1)]
    chances = [at_least(one.densities) for one in tensors]
    expected = [
        math.fsum(one.numel * chance[runs] for one, chance in zip(tensors, chances, strict=True))
        for runs in range(num_runs + 1)
    ]
    return [
        ConsensusRow(
            runs=runs,
            count=counts[runs],
            frac=ratio(counts[runs], numel),
            expected_frac=ratio(expected[runs], numel),
            frac_of_ever=ratio(counts[runs], counts[1]),
            expected_frac_of_ever=ratio(expected[runs], expected[1]),
        )
        for runs in range(1, num_runs + 1)
    ]


def consensus_example(name: str, changed: Sequence[Tensor]) -> Consensus:
    """Draw the consensus of one matrix.

    Args:
        changed: bool ``[m, n]``, not empty, of each of up to 255 runs.
    """
    times = torch.zeros(changed[0].shape, dtype=torch.uint8)
    for one in changed:
        times += one
    blocks = coarse_map(times)
    shares = [[value / len(changed) for value in row] for row in blocks.shares]
    return Consensus(name, CoarseMap(blocks.rows, blocks.columns, shares))


def overlap_row(tensors: Sequence[RunOverlap]) -> OverlapRow:
    """Summarise the overlaps in some tensors."""
    found, steps = pair_matrices(tensors), consensus(tensors)
    pairs = list(combinations(range(len(steps)), 2))
    both_ways = pairs + [(j, i) for i, j in pairs]

    means = {
        name: mean(matrix[i][j] for i, j in (both_ways if "one_sided" in name else pairs))
        for name, matrix in vars(found).items()
    }
    return OverlapRow(
        numel=sum(one.numel for one in tensors),
        num_changed=[sum(one.sizes[i] for one in tensors) for i in range(len(steps))],
        all_runs_of_ever=steps[-1].frac_of_ever if steps else None,
        expected_all_runs_of_ever=steps[-1].expected_frac_of_ever if steps else None,
        row_agreement=mean(one.row_agreement for one in tensors),
        column_agreement=mean(one.column_agreement for one in tensors),
        **means,
    )


def overlap_result(
    found: Mapping[str, RunOverlap], runs: Sequence[str], rule: str, examples: Sequence[Consensus] = ()
) -> OverlapResult:
    """Return the overlaps of the whole model, and by group.

    Args:
        runs: names of the runs, two or more, in the order of the sets.
        rule: the criterion of a changed weight, in words.
        examples: from ``consensus_example``.

    Raises:
        ValueError: another number of runs than of sets.
    """
    tensors = list(found.values())
    if any(one.num_runs != len(runs) for one in tensors):
        raise ValueError(f"{len(runs)} names of runs, but {tensors[0].num_runs} sets")
    return OverlapResult(
        runs=list(runs),
        rule=rule,
        matrices=pair_matrices(tensors),
        whole_model=as_one_tensor(tensors),
        consensus=consensus(tensors),
        rows=group(found, overlap_row),
        examples=list(examples),
    )


# --------------------------------------------------------------------------------------------------
# the measure


@register
class OverlapMeasure(JointMeasure[tuple[RunOverlap, Consensus | None], OverlapResult]):
    """The overlap of the changed sets of several checkpoints."""

    name = "overlap"
    order = 70
    default_in = frozenset({"several"})
    possible_in = frozenset({"several"})
    needs = "two or more checkpoints, not in a series"

    def tensor(self, pairs: TensorSeries) -> tuple[RunOverlap, Consensus | None]:
        """Return the counts of one tensor, and a picture of the consensus where one is shown."""
        differs, _ = change_rule(self.config)
        changed = [differs(pair.base, pair.tuned) for pair in pairs]
        base = pairs.last.base if not pairs.last.checkpoint.is_delta else self.comparison.base.tensor(pairs.name)
        by_magnitude = self.comparison.one_base and base.dtype.is_floating_point
        found = run_overlap(
            [TileSet.from_dense(one) for one in changed],
            [profile(one) for one in changed],
            count_by_magnitude(widened(base), *changed) if by_magnitude else None,
        )
        return found, consensus_example(pairs.name, changed) if pairs.name == self._pictured else None

    @functools.cached_property
    def _pictured(self) -> str | None:
        """The matrix that was chosen, or the first one of the middle layer."""
        if self.config.picture is not None:
            return self.config.picture
        shapes = self.comparison.base.shapes
        names = [name for name in self.comparison.names if len(shapes[name]) == 2]
        middle = middle_layer(names)
        return None if middle is None else next(name for name in names if layer_index(name) == middle)

    def combine(self, parts: Mapping[str, list[tuple[RunOverlap, Consensus | None]]]) -> OverlapResult:
        """Return the overlaps by pair of runs, layer, kind and tensor."""
        found = {name: one for name, ((one, _),) in parts.items()}
        examples = [example for ((_, example),) in parts.values() if example is not None]
        labels = [checkpoint.label for checkpoint in self.comparison.tuned]
        return overlap_result(found, labels, change_rule(self.config)[1], examples)

    def present(self, result: OverlapResult) -> Findings:
        """Return sentences, figures and tables of overlaps; published values are of the bf16-aware rule."""
        total = result.rows.total
        return Findings(
            numbers={"overlap": result.numbers()},
            headlines=headlines(result),
            sections=[overlap_section(result, references("run_jaccard") if self.config.changed_by == "bf16" else [])],
            published={"run_overlap": total.one_sided, "run_jaccard": total.jaccard},
        )


def headlines(result: OverlapResult) -> list[str]:
    """Return the answer in sentences."""
    total, num_runs = result.rows.total, len(result.runs)
    if total.jaccard is None:
        return ["No run changed any weight, so that there is nothing to overlap."]
    chance, same_size = total.expected_jaccard, total.expected_jaccard_same_size
    index = number(total.jaccard)
    beside = [
        f"{number(total.jaccard / by)} times chance{words} ({number(by)})"
        for by, words in ((chance, ""), (same_size, " among weights of the same magnitudes"))
        if by
    ]
    lines = [
        f"{num_runs} runs agree on which weights change with a Jaccard index of {index}"
        + (f", {' and '.join(beside)}" if beside else "")
        + "."
    ]
    if total.one_sided is not None:
        lines.append(
            f"{percent(total.one_sided)} of what one run changed, another changed too; "
            f"{percent(total.expected_one_sided)} would be chance."
        )
    if num_runs > 2:
        lines.append(
            f"All {num_runs} runs changed {percent(total.all_runs_of_ever)} of the weights that any of them changed; "
            f"{percent(total.expected_all_runs_of_ever)} would be chance."
        )
    return lines


_COLUMNS: tuple[RowColumn, ...] = (
    ("weights", "numel", count),
    ("Jaccard", "jaccard", number),
    ("chance", "expected_jaccard", number),
    ("at equal magnitude", "expected_jaccard_same_size", number),
    ("one-sided", "one_sided", percent),
    ("chance, one-sided", "expected_one_sided", percent),
    ("all runs", "all_runs_of_ever", percent),
    ("chance, all runs", "expected_all_runs_of_ever", percent),
    ("rows", "row_agreement", number),
    ("columns", "column_agreement", number),
)
_CONSENSUS_COLUMNS: tuple[RowColumn, ...] = (
    ("weights", "count", count),
    ("of all", "frac", percent),
    ("chance", "expected_frac", percent),
    ("of ever changed", "frac_of_ever", percent),
    ("chance of ever changed", "expected_frac_of_ever", percent),
)
_NOTE = (
    "Means over pairs of runs. At equal magnitude: the Jaccard index by chance among weights of one power of two, "
    "since small weights move more easily. All runs: share of ever changed weights that every run changed. Rows, columns: "
    "rank correlation of the changes per row, per column."
)


def overlap_section(result: OverlapResult, published: Sequence[Reference] = ()) -> Section:
    """Return figures and tables: every pair of runs, consensus, and groups.

    Args:
        published: Jaccard indices to show next to the measured ones.
    """
    title, rows = "Overlap between runs", result.rows
    if not rows.tensors:
        return Section(title=title, text="There are no weights to compare.")
    caption = "Mean share of the runs that changed a weight, by block of the matrix; without colour: the mean."
    return Section(
        title=title,
        text=f"Do different runs change the same weights? Changed: {result.rule}. Chance is "
        "independence within each tensor, so that runs which change the same tensors are not yet counted as agreeing.",
        figures=[
            *_maps(result),
            _consensus_figure(result.consensus),
            *_kind_figures(rows.kinds, published),
            *layer_lines(
                "One-sided overlap in each layer",
                rows,
                {"measured": "one_sided", _CHANCE: "expected_one_sided"},
                "share of one run's changes that another made too",
                shares=True,
                caption="Mean over pairs of runs, both ways. With --pairs: layers whose base was rotated fall to chance "
                "(compare Zhu et al. 2025, figure 6).",
            ),
            *(picture(f"Consensus of runs on {one.name}", one.consensus, caption) for one in result.examples),
        ],
        tables=[
            _pair_table(result),
            row_table(
                "Consensus of runs",
                Column("runs", _or_more),
                {row.runs: row for row in result.consensus},
                _CONSENSUS_COLUMNS,
                "Weights that at least this number of runs changed (Zhu et al. 2025, section 2.2).",
            ),
            row_table("Overlap by kind of matrix", "kind", rows.kinds, _COLUMNS, _NOTE),
            row_table("Overlap by layer", "layer", rows.labelled_layers, _COLUMNS, _NOTE),
            row_table("Overlap by tensor", "tensor", rows.tensors, _COLUMNS, _NOTE, terminal_rows=0),
        ],
    )


def _maps(result: OverlapResult) -> list[Figure]:
    if len(result.runs) < 2 or len(result.runs) > 80:
        return []
    found = result.matrices
    jaccard = "Shared weights of two runs over all that either changed."
    one_sided = "Share of the row's changed weights that the column's run changed too."
    return [
        Heatmap(
            title=title,
            values=off_diagonal(matrix),
            labels=result.runs,
            axis="run",
            scale=1.0,
            shares=caption is one_sided,
            decimals=1 if caption is one_sided else 3,
            caption=caption,
        )
        for title, matrix, caption in (
            ("Jaccard index of runs", found.jaccard, jaccard),
            ("Jaccard index of runs, expected by chance", found.expected_jaccard, jaccard),
            ("One-sided overlap of runs", found.one_sided, one_sided),
            ("One-sided overlap of runs, expected by chance", found.expected_one_sided, one_sided),
        )
    ]


def _consensus_figure(rows: Sequence[ConsensusRow]) -> Dots:
    return row_dots(
        "Consensus of runs",
        {_or_more(row.runs): row for row in rows},
        {"measured": "frac_of_ever", _CHANCE: "expected_frac_of_ever"},
        "share of the weights that any run changed",
        caption="Weights that this number of runs changed.",
    )


def _or_more(runs: int) -> str:
    return f"{runs} or more"


def _kind_figures(kinds: Mapping[str, OverlapRow], published: Sequence[Reference]) -> list[Figure]:
    figures: list[Figure] = [
        row_dots(
            "Jaccard index by kind of matrix",
            kinds,
            {"measured": "jaccard", _CHANCE: "expected_jaccard"},
            "mean over pairs of runs",
            references=published,
        )
    ]
    lined = {kind: row for kind, row in kinds.items() if (row.row_agreement, row.column_agreement) != (None, None)}
    if lined:
        figures.append(
            row_dots(
                "Do runs hit the same rows and columns?",
                lined,
                {"rows": "row_agreement", "columns": "column_agreement"},
                "rank correlation of changes per row, per column",
                shares=False,
                caption="Mean over pairs of runs and over matrices; 0 is chance, 1 the same order.",
            )
        )
    return figures


def _pair_table(result: OverlapResult) -> Table:
    runs, found, whole = result.runs, result.matrices, result.whole_model
    one_sided = (found.one_sided, found.expected_one_sided, whole.expected_one_sided)
    jaccard = (found.jaccard, found.expected_jaccard, found.expected_jaccard_same_size)
    shares = ("o1", "o1 chance", "o1 chance, model", "o2", "o2 chance", "o2 chance, model")
    indices = ("Jaccard", "Jaccard chance", "at equal magnitude")
    columns = [*(Column(name, percent) for name in shares), *(Column(name, number) for name in indices)]
    rows = []
    for i, j in combinations(range(len(runs)), 2):
        sides = [one[i][j] for one in one_sided] + [one[j][i] for one in one_sided]
        rows.append([runs[i], runs[j], *sides, *(one[i][j] for one in jaccard)])
    return Table(
        title="Pairs of runs",
        columns=["run 1", "run 2", *columns],
        rows=rows,
        note="o1, o2: shared weights over those that run 1, run 2 changed (Mukherjee et al. 2025, section 5). Chance: "
        "within each tensor; model: if changes could lie anywhere in the model; at equal magnitude: the Jaccard index by "
        "chance if each run changed as many weights of each power of two of each tensor as it did.",
    )
