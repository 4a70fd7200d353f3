"""The audit of protected weights: a mask of superweights against what an update changed (SSR section 2.2)."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssrctl.checkpoints.pairs import Comparison, TensorPair, first_of
from ssrctl.configs import DiagnoseConfig
from ssrctl.core.mask import BlockMask, TileSet
from ssrctl.core.tiles import matrix_shape
from ssrctl.errors import UserError
from ssrctl.io.artifacts import load_mask
from ssrctl.io.console import note
from ssrctl.measures.base import Findings, Mode, PairMeasure, register
from ssrctl.measures.group_tables import RowColumn, row_dots, row_table
from ssrctl.measures.maths.averages import ratio
from ssrctl.measures.maths.change_rule import change_rule
from ssrctl.measures.maths.grouping import Grouped, group
from ssrctl.report.document import Column, Dots, Section, Table
from ssrctl.report.formats import count, number, percent, times

_SHOWN_NAMES = 5


@dataclass(frozen=True)
class TensorAudit:
    """Counts of one tensor: its weights, the protected ones, the changed ones, and those that are both."""

    numel: int
    num_protected: int
    num_changed: int
    num_protected_changed: int


@dataclass(frozen=True)
class AuditRow(TensorAudit):
    """Counts of one or more tensors and their shares; a share of nothing is None.

    Attributes:
        protected_frac, changed_frac: over all weights.
        protected_changed_frac: changed over protected.
        overlap: the protected share of the changed weights.
        expected_overlap: the same if as many weights of each tensor had changed at random (for one tensor the
            protected density).
        ratio: ``overlap`` over ``expected_overlap``.
    """

    protected_frac: float | None
    changed_frac: float | None
    protected_changed_frac: float | None
    overlap: float | None
    expected_overlap: float | None
    ratio: float | None


@dataclass(frozen=True)
class SpikeAudit:
    """The weight behind an activation outlier.

    Attributes:
        spike: the outlier's entry in the report of ``ssrctl superweights``.
        index: flat index of the weight in its tensor.
    """

    spike: Mapping[str, Any]
    index: int
    protected: bool
    moved: bool

    def numbers(self) -> dict[str, Any]:
        """Return the spike with ``index``, ``protected`` and ``moved``."""
        return dict(self.spike) | {"index": self.index, "protected": self.protected, "moved": self.moved}


@dataclass(frozen=True)
class AuditResult:
    """The audit of a checkpoint.

    Attributes:
        not_compared: protected weights in tensors of the mask that the checkpoints do not have, by name.
    """

    rows: Grouped[AuditRow, AuditRow]
    spikes: Sequence[SpikeAudit] = ()
    not_compared: Mapping[str, int] = field(default_factory=dict)

    def numbers(self) -> dict[str, Any]:
        """Return the numbers of the json report."""
        return self.rows.numbers() | {
            "spikes": [one.numbers() for one in self.spikes],
            "not_compared": [{"name": name, "num_protected": size} for name, size in self.not_compared.items()],
        }


def audit_tensor(name: str, protected: TileSet | None, changed: Tensor) -> TensorAudit:
    """Count one tensor's protected weights, its changed weights, and those that are both.

    Args:
        protected: the mask's set; None where the mask lacks the tensor, and so protects nothing of it.
        changed: bool in the tensor's shape, True = changed.

    Raises:
        UserError: the mask is of a tensor of another shape.
    """
    num_changed = int(changed.sum())
    if protected is None:
        return TensorAudit(changed.numel(), 0, num_changed, 0)
    _check_shape(name, protected.shape, changed.shape)
    flat = changed.reshape(-1)
    both = sum(int(flat[part.to(flat.device)].sum()) for part in protected.index_parts())
    return TensorAudit(flat.numel(), protected.count(), num_changed, both)


def spike_audit(spike: Mapping[str, Any], protected: TileSet | None, changed: Tensor) -> SpikeAudit:
    """Look up the weight behind an activation outlier in the mask and in the changes.

    Args:
        spike: an entry of ``spikes`` in the report that ``ssrctl superweights`` writes: ``parameter``,
            ``out_channel`` and ``in_channel``, and ``index``, the weight's flat index (without it the tensor is taken
            as ``[out, in]``).
        protected: the mask's set of the tensor ``parameter``, None for nothing.
        changed: bool in that tensor's shape, True = changed.

    Raises:
        UserError: coordinates outside of this tensor, or a mask of another shape.
    """
    index = _flat_index(spike, tuple(changed.shape))
    inside = False
    if protected is not None:
        _check_shape(str(spike.get("parameter")), protected.shape, changed.shape)
        inside = _contains(protected, index)
    return SpikeAudit(spike, index, inside, bool(changed.reshape(-1)[index]))


def audit_row(audits: Sequence[TensorAudit]) -> AuditRow:
    """Return the counts and shares of several tensors together."""
    numel, protected, changed, both = (
        sum(getattr(audit, key) for audit in audits)
        for key in ("numel", "num_protected", "num_changed", "num_protected_changed")
    )
    by_chance = math.fsum(audit.num_changed * audit.num_protected / audit.numel for audit in audits if audit.numel)
    return AuditRow(
        numel=numel,
        num_protected=protected,
        num_changed=changed,
        num_protected_changed=both,
        protected_frac=ratio(protected, numel),
        changed_frac=ratio(changed, numel),
        protected_changed_frac=ratio(both, protected),
        overlap=ratio(both, changed),
        expected_overlap=ratio(by_chance, changed),
        ratio=ratio(both, by_chance),
    )


def _check_shape(name: str, of_mask: Sequence[int], shape: Sequence[int], mask: str = "the mask") -> None:
    if tuple(of_mask) != tuple(shape):
        raise UserError(
            f"{mask} has {name} with shape {list(of_mask)}, the checkpoints have it with {list(shape)}",
            "give a mask that was made for this model",
        )


def _flat_index(spike: Mapping[str, Any], shape: tuple[int, ...]) -> int:
    rows, columns = matrix_shape(shape)
    index, out_channel, in_channel = (spike.get(key) for key in ("index", "out_channel", "in_channel"))
    if index is None and _within(out_channel, rows) and _within(in_channel, columns):
        index = out_channel * columns + in_channel  # type: ignore[operator]
    if not _within(index, rows * columns):
        raise UserError(
            f"the spike at out_channel {out_channel!r}, in_channel {in_channel!r}, index {index!r} lies outside of "
            f"{spike.get('parameter')} with shape {list(shape)}",
            "give a report that was made for this model",
        )
    return index  # type: ignore[return-value]


def _within(value: object, size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < size


def _contains(tiles: TileSet, index: int) -> bool:
    return (
        TileSet.from_indices(tiles.shape, torch.tensor([index], device=tiles.device)).intersection(tiles).count() == 1
    )


@register
class Audit(PairMeasure[tuple[TensorAudit, list[SpikeAudit]], AuditResult]):
    """The protected weights that moved, and the tensors that did."""

    name = "audit"
    order = 80
    audits = True

    def __init__(self, comparison: Comparison, config: DiagnoseConfig, run: Path | None = None) -> None:
        """Read the mask and the list of activation outliers next to it, before anything slow."""
        super().__init__(comparison, config, run)
        path = config.assert_frozen or config.protect
        self.mask = _protected_weights(comparison, config)
        self.spikes = [] if path is None else _spikes(path)
        if unseen := sorted({spike["parameter"] for spike in self.spikes} - set(comparison.names)):
            note(f"{len(unseen)} tensors with activation outliers are not compared: {first_of(unseen)}")

    @classmethod
    def wanted(cls, config: DiagnoseConfig, mode: Mode) -> bool:
        """Return True if a mask or a pattern is given."""
        return not (config.protect is None and config.assert_frozen is None and config.assert_moved is None)

    def tensor(self, pair: TensorPair) -> tuple[TensorAudit, list[SpikeAudit]]:
        """Return the counts of one tensor, and the activation outliers in it."""
        changed = change_rule(self.config, "bits")[0](pair.base, pair.tuned)
        protected = self.mask.tensors.get(pair.name) if self.mask is not None else None
        mine = [spike_audit(spike, protected, changed) for spike in self.spikes if spike["parameter"] == pair.name]
        return audit_tensor(pair.name, protected, changed), mine

    def combine(self, parts: Mapping[str, list[tuple[TensorAudit, list[SpikeAudit]]]]) -> AuditResult:
        """Return the counts by layer, kind and tensor, the outliers, and the mask's tensors that were not compared."""
        found = {name: one for name, ((one, _),) in parts.items()}
        spikes = [spike for ((_, mine),) in parts.values() for spike in mine]
        held = {} if self.mask is None or self.config.layers else self.mask.tensors
        missing = {name: one.count() for name, one in held.items() if name not in found}
        return AuditResult(group(found, audit_row), spikes, missing)

    def present(self, result: AuditResult) -> Findings:
        """Return sentences and tables on protected weights, and the assertions that do not hold."""
        frozen, moved = self.config.assert_frozen is not None, self.config.assert_moved
        return Findings(
            numbers=result.numbers(),
            headlines=headlines(result),
            sections=[audit_section(result)],
            failed=failures(result, frozen=frozen, moved_pattern=moved),
        )


def _protected_weights(comparison: Comparison, config: DiagnoseConfig) -> BlockMask | None:
    """Read the mask of ``--protect`` or ``--assert-frozen``, if any.

    Raises:
        UserError: both, a mask that cannot be read, or one of other tensors.
    """
    if config.protect is not None and config.assert_frozen is not None:
        raise UserError(
            "--protect and --assert-frozen each name a mask", "give only --assert-frozen; it reports the same"
        )
    path = config.assert_frozen or config.protect
    if path is None:
        return None
    mask = load_mask(path)[0]
    shared = [name for name in mask.shapes if name in comparison.names]
    if not shared:
        raise UserError(f"{path} is a mask of other tensors: none of them is compared", "name the checkpoints' mask")
    for name in shared:
        _check_shape(name, mask.shapes[name], comparison.base.shapes[name], str(path))
    return mask


def _spikes(mask: Path) -> list[dict[str, Any]]:
    """Read the activation outliers that `ssrctl superweights` found, from the report next to its mask."""
    report = mask.with_name(mask.stem + ".report.json")
    if not report.is_file():
        return []
    try:
        spikes = json.loads(report.read_text(encoding="utf-8")).get("spikes") or []
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{report} cannot be read: {error}", "remove it, or make the mask again") from error
    wanted = ("parameter", "out_channel", "in_channel")
    if not all(isinstance(spike, dict) and all(key in spike for key in wanted) for spike in spikes):
        raise UserError(f"{report}: its list of spikes is not one of ours", "make the mask again")
    return list(spikes)


# --------------------------------------------------------------------------------------------------
# assertions


def failures(result: AuditResult, *, frozen: bool, moved_pattern: str | None) -> list[str]:
    """Return the assertions that do not hold, in sentences.

    An assertion that holds because there was nothing to check is a failure.

    Args:
        frozen: no protected weight may have changed.
        moved_pattern: a glob pattern (``*`` also matches dots; upper and lower case differ): in every tensor whose
            name matches, at least one weight must have changed. None asserts nothing.
    """
    lines = _frozen_failures(result) if frozen else []
    if moved_pattern is not None:
        lines += _moved_failures(result.rows.tensors, moved_pattern)
    return lines


def _frozen_failures(result: AuditResult) -> list[str]:
    lines, total = [], result.rows.total
    if missing := {name: size for name, size in result.not_compared.items() if size}:
        lines.append(
            f"{times(sum(missing.values()), 'protected weight')} could not be compared: the checkpoints lack "
            f"{_listed(list(missing))}."
        )
    elif total.num_protected == 0:
        lines.append("The mask protects none of the weights that were compared, so nothing was asserted.")
    if total.num_protected_changed:
        moved = {name: row.num_protected_changed for name, row in result.rows.tensors.items()}
        order = sorted((name for name in moved if moved[name]), key=lambda name: -moved[name])
        names = _listed([f"{name} ({count(moved[name])})" for name in order])
        lines.append(
            f"{count(total.num_protected_changed)} of {times(total.num_protected, 'protected weight')} changed "
            f"({percent(total.protected_changed_frac)}), in {times(len(order), 'tensor')}: {names}."
        )
    return lines


def _moved_failures(tensors: Mapping[str, AuditRow], pattern: str) -> list[str]:
    # A tensor without weights cannot move.
    matching = [name for name, row in tensors.items() if row.numel and fnmatch.fnmatchcase(name, pattern)]
    if not matching:
        return [f"No tensor's name matches {pattern!r}; the compared tensors are {_listed(list(tensors))}."]
    still = [name for name in matching if tensors[name].num_changed == 0]
    if not still:
        return []
    return [
        f"{len(still)} of {times(len(matching), 'tensor')} that match {pattern!r} did not change: {_listed(still)}."
    ]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {more:,} more" if more > 0 else "")


# --------------------------------------------------------------------------------------------------
# sentences, tables and figures


def headlines(result: AuditResult) -> list[str]:
    """Return the answer in sentences."""
    total, spikes = result.rows.total, result.spikes
    lines = [_protected_sentence(total)]
    if total.num_changed and total.num_protected:
        lines.append(
            f"{percent(total.overlap)} of the changed weights are protected ones; at random it would be "
            f"{percent(total.expected_overlap)}."
        )
    if spikes:
        inside, moved = sum(one.protected for one in spikes), sum(one.moved for one in spikes)
        lines.append(
            f"Of {times(len(spikes), 'activation outlier')}, {inside} {'has its' if inside == 1 else 'have their'} "
            f"weight inside the protected set; {moved} {'was' if moved == 1 else 'were'} changed."
        )
    if total.num_protected == 0:
        lines.append(_moved_sentence(result.rows.tensors))
    if missing := result.not_compared:
        lines.append(f"{times(len(missing), 'tensor')} of the mask could not be compared: the checkpoints lack them.")
    return lines


def _protected_sentence(total: AuditRow) -> str:
    if total.num_protected == 0:
        return "No protected weight was compared."
    protected = f"{times(total.num_protected, 'protected weight')} ({percent(total.protected_frac)} of all)"
    if total.num_protected_changed == 0:
        return f"None of {protected} changed."
    return f"Of {protected}, {count(total.num_protected_changed)} changed ({percent(total.protected_changed_frac)})."


def _moved_sentence(tensors: Mapping[str, AuditRow]) -> str:
    return f"{sum(row.num_changed > 0 for row in tensors.values()):,} of {times(len(tensors), 'tensor')} changed."


def audit_section(result: AuditResult) -> Section:
    """Return protected weights that moved, by kind, layer and tensor, and the weights behind activation outliers.

    Where nothing is protected, it shows which tensors changed.
    """
    rows, spikes = result.rows, _spike_tables(result.spikes)
    if rows.total.num_protected == 0:
        shares: RowColumn = ("share", "changed_frac", percent)
        moved: list[RowColumn] = [("weights", "numel", count), ("changed", "num_changed", count), shares]
        table = row_table("Changed weights by tensor", "tensor", rows.tensors, moved, terminal_rows=0)
        return Section(
            title="Which tensors changed?",
            text=f"No protected weight was compared. {_moved_sentence(rows.tensors)}",
            tables=[table, *spikes],
        )
    columns: list[RowColumn] = [
        ("weights", "numel", count),
        ("protected", "num_protected", count),
        ("changed", "num_changed", count),
        ("both", "num_protected_changed", count),
        ("of protected", "protected_changed_frac", percent),
        ("of changed", "overlap", percent),
        ("by chance", "expected_overlap", percent),
        ("ratio", "ratio", number),
    ]
    note = (
        "Of protected: both over protected. Of changed: both over changed; by chance: what random changes would "
        "give; ratio: of these two. Tensors without protected weights are left out."
    )
    kinds, layers, tensors = map(_protected, (rows.kinds, rows.labelled_layers, rows.tensors))
    return Section(
        title="Did protected weights move?",
        text="A frozen weight has to be equal to what it was. Without protection, as large a share of the changed "
        "weights would be protected ones as chance gives (as many changed weights of each tensor, at random).",
        figures=[
            *_figure("Changed share of the protected weights, by kind", kinds),
            *_figure("Changed share of the protected weights, by layer", layers),
        ],
        tables=[
            row_table("Protected weights by kind of matrix", "kind", kinds, columns, note),
            row_table("Protected weights by layer", "layer", layers, columns, note),
            *spikes,
            row_table("Protected weights by tensor", "tensor", tensors, columns, note, terminal_rows=0),
        ],
    )


def _protected(rows: Mapping[str, AuditRow]) -> dict[str, AuditRow]:
    return {label: row for label, row in rows.items() if row.num_protected}


def _figure(title: str, rows: Mapping[str, AuditRow]) -> list[Dots]:
    """Return bars of the changed shares; none where nothing moved, since all would be empty."""
    series = {"protected": "protected_changed_frac", "expected by chance: all weights": "changed_frac"}
    moved = any(row.num_protected_changed for row in rows.values())
    return [row_dots(title, rows, series, "share that changed")] if moved else []


def _spike_tables(spikes: Sequence[SpikeAudit]) -> list[Table]:
    if not spikes:
        return []
    return [
        Table(
            title="Weights behind activation outliers",
            columns=["tensor", Column("out channel", str), Column("in channel", str), "protected", "changed"],
            rows=[
                [
                    str(one.spike["parameter"]),
                    one.spike.get("out_channel", ""),
                    one.spike.get("in_channel", ""),
                    "yes" if one.protected else "no",
                    "yes" if one.moved else "no",
                ]
                for one in spikes
            ],
            note="The weight where the strongest input channel of a down projection meets its strongest output channel "
            "(Yu et al. 2024, the super weight).",
        )
    ]
