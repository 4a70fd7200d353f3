"""The overlap of changed weights with principal and with small weights (Zhu et al. 2025, arXiv:2511.08567, sec. 4.2).

Notation: W ``[m, n]`` a base matrix, N = mn; M the set of its changed weights; P any fixed set of its coordinates.
The overlap of M with P is ``|M n P| / |M|``. A set drawn at random with as many coordinates as M has an overlap of
``|P| / N`` on average, the density of P, and ``|M n P|`` is then hypergeometric: its quantiles are exact, so no masks
are drawn.

Large weights need larger updates before their stored value moves, and principal weights tend to be large. Any update,
even noise, then seems to avoid them. A second comparison for them therefore takes random sets that have as many weights
of each magnitude (of each power of two) as M has: a remaining difference is not due to rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ssrctl.checkpoints.names import layer_index, matrix_kind
from ssrctl.checkpoints.pairs import TensorPair
from ssrctl.core.static_masks import NonFiniteWeights, low_magnitude_mask, principal_mask, rank_of
from ssrctl.measures.base import Findings, PairMeasure, register
from ssrctl.measures.group_tables import RowColumn, cell_map, layer_lines, picture, row_dots, row_table
from ssrctl.measures.maths import matrices
from ssrctl.measures.maths.change_rule import change_rule
from ssrctl.measures.maths.grouping import Grouped, group, middle_layer
from ssrctl.measures.maths.landings import CONFIDENCE, Landings, SetLanding, land, land_by_magnitude, summary
from ssrctl.measures.maths.low_rank import Spectrum, spectrum, upright
from ssrctl.measures.maths.magnitude import widened
from ssrctl.measures.maths.row_column_counts import (
    CoarseMap,
    Concentration,
    Profile,
    coarse_map,
    concentration,
    mean_concentration,
    profile,
)
from ssrctl.measures.maths.update_matrix import Unmeasured
from ssrctl.measures.matrix_measure import listed
from ssrctl.report.document import Column, Dots, Figure, Lines, Reference, Section, Table
from ssrctl.report.formats import count, number, percent

# The last is the first again, with another idea of chance: random weights of the same magnitudes as those that changed.
SETS = {
    "principal": "principal",
    "low_magnitude": "low-magnitude",
    "principal_not_low": "principal, not low",
    "principal_same_size": "principal, same size",
}
# Kinds of matrices of which one is pictured; the first that a model has.
PICTURED = ("q", "qkv", "gate", "up", "gate_up")
# Their rows are tokens: a reconstruction of low rank says nothing of them, and the paper leaves them out.
_LEFT_OUT = {"embed": "an embedding", "lm_head": "the output head"}
_CHANCE = "expected by chance"


def skip_reason(name: str, shape: Sequence[int], dtype: torch.dtype) -> str | None:
    """Return the reason why a tensor has no principal weights, None when it has; read no weights."""
    kind = matrix_kind(name)
    return f"it is {_LEFT_OUT[kind]}" if kind in _LEFT_OUT else matrices.skip_reason(shape, dtype)


def reference_sets(
    base: Tensor,
    *,
    rank_share: float,
    density: float,
    decomposed: Callable[[], Spectrum] | None = None,
    device: str = "cpu",
) -> dict[str, Tensor] | Unmeasured:
    """Return the sets of weights that changes are compared with.

    ``principal``: the ``density`` share with the largest ``|U_k S_k V_k^T|``, k = ``rank_share`` of the smaller side;
    ``low_magnitude``: the ``density`` share with the smallest ``|W|``; ``principal_not_low``: in the first and not
    in the second.

    Args:
        base: W, ``[m, n]``, any floating dtype.
        rank_share: in (0, 1].
        density: alpha, in (0, 1).
        decomposed: returns the spectrum of W, if another measure has it.
        device: for the decomposition and the reconstruction.

    Returns:
        bool ``[m, n]`` by name, or the reason why there are none: weights that are NaN or infinite.
    """

    def leading(weight: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = upright(weight, device)
        found = (decomposed() if decomposed is not None else spectrum(rows)).top(rows, k)
        found = found if weight.shape[0] >= weight.shape[1] else found.transposed()
        return found.U, found.S, found.V

    ordered = base if base.dtype in (torch.float32, torch.bfloat16, torch.float16) else base.float()
    try:
        low = low_magnitude_mask(ordered, density)
        principal = principal_mask(base, rank_of(rank_share, base.shape), density, leading)
    except NonFiniteWeights as error:
        return Unmeasured(str(error))
    return {"principal": principal, "low_magnitude": low, "principal_not_low": principal & ~low}


def measure_landing(base: Tensor, changed: Tensor, sets: Mapping[str, Tensor]) -> dict[str, Landings]:
    """Return where the changes of one matrix landed, for each of ``SETS``; the last in one part per power of two.

    Args:
        base: ``[m, n]``, any floating dtype.
        changed: bool ``[m, n]``, True = changed.
        sets: from ``reference_sets``.
    """
    found: dict[str, Landings] = {name: (land(changed, chosen),) for name, chosen in sets.items()}
    return found | {"principal_same_size": land_by_magnitude(base, changed, sets["principal"])}


def landing_row(tensors: Sequence[Mapping[str, Landings]]) -> LandingRow:
    """Summarise the landings of several matrices, each given for every set."""
    rows = {name: summary([part for one in tensors for part in one[name]]) for name in SETS}
    return LandingRow(num_changed=rows["principal"].num_changed, **rows)


# --------------------------------------------------------------------------------------------------
# the result


@dataclass(frozen=True, kw_only=True)
class LandingRow:
    """Landings of several matrices on each of ``SETS``."""

    num_changed: int
    principal: SetLanding
    low_magnitude: SetLanding
    principal_not_low: SetLanding
    principal_same_size: SetLanding

    @property
    def sets(self) -> dict[str, SetLanding]:
        """The landings by the set's name in tables and figures."""
        return {words: getattr(self, name) for name, words in SETS.items()}


@dataclass(frozen=True)
class Picture:
    """Coarse maps of the changes and of the principal weights of a matrix (Zhu et al. 2025, figure 7)."""

    name: str
    changed: CoarseMap
    principal: CoarseMap


@dataclass(frozen=True, kw_only=True)
class LandingResult:
    """Landings of all matrices.

    Attributes:
        rank_share, density: of the sets.
        rule: the criterion of a changed weight, in words.
        concentration: how unevenly changes spread over rows and columns, by the same groups; means over matrices.
        unmeasured: matrices without principal weights, with the reason.
    """

    rank_share: float
    density: float
    rule: str
    rows: Grouped[LandingRow, LandingRow]
    concentration: Grouped[Concentration, Concentration]
    unmeasured: dict[str, str]
    examples: list[Picture]

    def numbers(self) -> dict[str, Any]:
        """Return the form of the json report."""
        return {
            "rank_share": self.rank_share,
            "density": self.density,
            "rule": self.rule,
            "confidence": CONFIDENCE,
            "examples": [asdict(one) for one in self.examples],
            **self.rows.numbers(),
            "unmeasured": listed(self.unmeasured),
            "profiles": self.concentration.numbers(),
        }


# --------------------------------------------------------------------------------------------------
# the measure


@dataclass(frozen=True)
class LandingPart:
    """Landings of one tensor.

    Attributes:
        landings: by matrix label, for each of ``SETS``, or the reason why there is none.
        profile: changed weights by row and by column; None for a stack of matrices.
        picture: None where none is shown.
    """

    landings: dict[str, dict[str, Landings] | Unmeasured]
    profile: Profile | None = None
    picture: Picture | None = None


@register
class LandingMeasure(PairMeasure[LandingPart, LandingResult]):
    """The landings of the changed weights of each matrix."""

    name = "landing"
    order = 60

    def tensor(self, pair: TensorPair) -> LandingPart | None:
        """Return the landings of a tensor's matrices; None for a tensor without principal weights."""
        dtype = self.comparison.base.dtypes[pair.name]
        if skip_reason(pair.name, pair.shape, dtype) is not None:
            return None
        if not bool(change_rule(self.config, "bits")[0](pair.base, pair.tuned).any()):
            return LandingPart({pair.name: Unmeasured("nothing in it changed")})
        differs, _ = change_rule(self.config)
        changed, base = differs(pair.base, pair.tuned), widened(pair.base)
        landings: dict[str, dict[str, Landings] | Unmeasured] = {}
        shown = None
        for label, (one, hit) in matrices.stacked(pair.name, base, changed):
            sets = reference_sets(
                one,
                rank_share=self.config.principal_rank,
                density=self.config.mask_density,
                decomposed=functools.partial(matrices.base_spectrum, pair, label, one, self.config.device),
                device=self.config.device,
            )
            landings[label] = sets if isinstance(sets, Unmeasured) else measure_landing(one, hit, sets)
            if not isinstance(sets, Unmeasured) and base.dim() == 2 and self._pictured(pair.name):
                shown = Picture(label, coarse_map(hit), coarse_map(sets["principal"]))
        return LandingPart(landings, profile(changed), shown)

    def _pictured(self, name: str) -> bool:
        """Return True if the matrix may be the one that is pictured."""
        chosen = self.config.picture
        return matrix_kind(name) in PICTURED if chosen is None else name == chosen

    def combine(self, parts: Mapping[str, list[LandingPart]]) -> LandingResult:
        """Return the landings by layer, kind and tensor."""
        found = {name: one for name, (one,) in parts.items()}
        landed = {label: landing for one in found.values() for label, landing in one.landings.items()}
        profiles = {name: one.profile for name, one in found.items() if one.profile is not None}
        return LandingResult(
            rank_share=self.config.principal_rank,
            density=self.config.mask_density,
            rule=change_rule(self.config)[1],
            rows=group({name: one for name, one in landed.items() if not isinstance(one, Unmeasured)}, landing_row),
            concentration=group({name: concentration(one) for name, one in profiles.items()}, mean_concentration),
            unmeasured={name: one.reason for name, one in landed.items() if isinstance(one, Unmeasured)},
            examples=_middle_pictures({name: found[name].picture for name in profiles}),
        )

    def present(self, result: LandingResult) -> Findings:
        """Return sentences, figures and tables of landings; none when no tensor has principal weights."""
        if not result.rows.tensors and not result.unmeasured:
            return Findings()
        return Findings(
            numbers={"landing": result.numbers()}, headlines=headlines(result), sections=[landing_section(result)]
        )


def _middle_pictures(pictures: Mapping[str, Picture | None]) -> list[Picture]:
    """Return the picture of the first of ``PICTURED`` in the middle layer of those where something changed."""
    found = {name: one for name, one in pictures.items() if one is not None}
    middle = middle_layer(found)
    kinds = {matrix_kind(name): one for name, one in found.items() if layer_index(name) == middle}
    return [kinds[kind] for kind in PICTURED if kind in kinds][:1] or list(found.values())[:1]


def headlines(result: LandingResult) -> list[str]:
    """Return the answer in sentences, each with its control; none when no matrix was measured."""
    total = result.rows.total
    if not result.rows.tensors:
        return []
    if not total.num_changed:
        return ["No weight of the measured matrices changed, so that nothing landed anywhere."]
    principal, low, same_size = total.principal, total.low_magnitude, total.principal_same_size
    return [
        f"{percent(principal.overlap)} of the changed weights are principal weights, {number(principal.ratio)} times "
        f"chance ({percent(principal.expected_overlap)}) and {number(same_size.ratio)} times chance among weights of equal "
        f"magnitude: {_controlled(principal, same_size)}.",
        f"{percent(low.overlap)} are low-magnitude weights, {number(low.ratio)} times chance "
        f"({percent(low.expected_overlap)}): {_verdict(low)}"
        + (", as rounding to storage does by itself." if low.ratio and low.ratio > 1 else "."),
    ]


def _controlled(raw: SetLanding, control: SetLanding) -> str:
    """Return the verdict on a set that its control leaves."""
    if _verdict(raw) == _verdict(control):
        return _verdict(raw)
    if _verdict(control) == _AS_CHANCE:
        return "their magnitude explains it"
    return f"at equal magnitude {_verdict(control)}"


_AS_CHANCE = "no more or less than chance explains"
# Millions of changes make a difference of a thousandth significant; one of less than this is not called one.
_NEGLIGIBLE = 0.02


def _verdict(row: SetLanding) -> str:
    assert row.overlap is not None and row.expected_low is not None and row.expected_high is not None
    if row.ratio is None or abs(row.ratio - 1) < _NEGLIGIBLE or row.expected_low <= row.overlap <= row.expected_high:
        return _AS_CHANCE
    return "changes avoid them" if row.overlap < row.expected_low else "changes prefer them"


def landing_section(result: LandingResult) -> Section:
    """Return figures and tables: the overlap of changes with each set, and how they spread over rows and columns."""
    title = "Where changes landed"
    rows = result.rows
    if not rows.tensors:
        return Section(title=title, text="No matrix of the kind that has principal weights was compared.")
    share = percent(result.density)
    tables = [
        row_table("Landing by kind of matrix", "kind", rows.kinds, _RATIOS, _RATIO_NOTE),
        row_table("Landing by layer", "layer", rows.labelled_layers, _RATIOS, _RATIO_NOTE),
        _tensor_table(rows.tensors),
    ]
    if result.unmeasured:
        reasons = list(result.unmeasured.items())
        tables.append(Table(title="Matrices without principal weights", columns=["tensor", "why"], rows=reasons))
    return Section(
        title=title,
        text=f"Do changes avoid the principal weights and prefer small ones? Principal: the {share} of a matrix with the "
        f"largest magnitude after reconstruction with rank {percent(result.rank_share)} of its smaller side. "
        f"Low-magnitude: the smallest {share}. Changed: {result.rule}. Zhu et al. 2025, section 4.2, find changes "
        "below chance on principal weights and above it on small ones. Large weights need larger updates before their "
        "stored value moves, so that even noise seems to avoid principal weights; at equal magnitude (the same power of "
        "two) it does not.",
        figures=[
            *_map(rows),
            _total_figure(rows.total.sets),
            *_layer_figures(rows),
            *_gini_figures(result.concentration.kinds),
            *_pictures(result.examples),
        ],
        tables=tables,
    )


def _total_figure(sets: Mapping[str, SetLanding]) -> Dots:
    intervals = [
        None if row.expected_low is None or row.expected_high is None else (row.expected_low, row.expected_high)
        for row in sets.values()
    ]
    return row_dots(
        "Changed weights in each set",
        sets,
        {"measured": "overlap", _CHANCE: "expected_overlap"},
        "share of the changed weights",
        intervals={_CHANCE: intervals},
        caption="By chance: as many weights of each matrix, drawn at random; the interval holds 95% of such draws. Same "
        "size: drawn with the magnitudes of the changed weights.",
    )


def _layer_figures(rows: Grouped[LandingRow, LandingRow]) -> list[Lines]:
    series = {words: f"{name}.ratio" for name, words in SETS.items()}
    return layer_lines(
        "Overlap over chance by layer", rows, series, "overlap / chance", references=[Reference("by chance", 1.0)]
    )


def _map(rows: Grouped[LandingRow, LandingRow]) -> list[Figure]:
    found = cell_map(
        "Principal weights hit, over chance at equal magnitude",
        rows.cells,
        "principal_same_size.ratio",
        centre=1.0,
        decimals=2,
        caption="1 is chance among weights of the same power of two. Blank: nothing changed, or no such matrix.",
    )
    return [found] if found is not None and len(rows.cells) > 1 else []


def _gini_figures(kinds: Mapping[str, Concentration]) -> list[Figure]:
    shown = {kind: row for kind, row in kinds.items() if row.row_gini is not None}
    if not shown:
        return []
    series = {
        "rows": "row_gini",
        "columns": "column_gini",
        "expected by chance, rows": "expected_row_gini",
        "expected by chance, columns": "expected_column_gini",
    }
    caption = "0: every row (column) has as many changes; near 1: few have them all. Mean over matrices."
    return [row_dots("Do changes fill rows and columns evenly?", shown, series, "Gini coefficient", caption=caption)]


def _pictures(examples: Sequence[Picture]) -> list[Figure]:
    caption = (
        "Share of each block of the matrix; bars: mean of each column and row. --picture NAME shows another matrix."
    )
    return [
        picture(f"{words} of {one.name}", blocks, caption)
        for one in examples
        for words, blocks in (("Changed weights", one.changed), ("Principal weights", one.principal))
    ]


_RATIOS: tuple[RowColumn, ...] = (
    ("changed", "num_changed", count),
    *((words, f"{name}.ratio", number) for name, words in SETS.items()),
)
_RATIO_NOTE = (
    "Share of the changed weights that lie in a set, over the share by chance. Same size: by chance among weights of each "
    "power of two. The shares and their intervals are in the table by tensor."
)
_COLUMNS: tuple[RowColumn, ...] = (
    ("changed", "num_changed", count),
    ("overlap", "overlap", percent),
    ("chance", "expected_overlap", percent),
    ("low", "expected_low", percent),
    ("high", "expected_high", percent),
    ("ratio", "ratio", number),
)


def _tensor_table(rows: Mapping[str, LandingRow]) -> Table:
    """Return a table with a line for each tensor and set."""
    return Table(
        title="Landing by tensor",
        columns=["tensor", "set", *(Column(heading, show) for heading, _, show in _COLUMNS)],
        rows=[
            [label, words, *(getattr(landing, key) for _, key, _ in _COLUMNS)]
            for label, row in rows.items()
            for words, landing in row.sets.items()
        ],
        note="Shares of the changed weights. 95% of random sets of as many weights overlap by something from low to "
        "high; for the same size, random sets with as many weights of each power of two. Ratio: overlap over chance.",
        terminal_rows=0,
    )
