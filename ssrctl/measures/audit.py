"""Did protected weights move? A mask of superweights against what an update changed (SSR section 2.2)."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssrctl.checkpoints.pairs import Comparison, TensorPair, first_of
from ssrctl.core.mask import BlockMask, TileSet, matrix_shape
from ssrctl.errors import UserError
from ssrctl.io.console import note
from ssrctl.measures.base import Findings, Mode, PairMeasure, register
from ssrctl.measures.maths.change_rule import change_rule
from ssrctl.measures.maths.grouping import grouped
from ssrctl.report.formats import count, percent, times

if TYPE_CHECKING:
    from torch import Tensor

    from ssrctl.configs import DiagnoseConfig

_SHOWN_NAMES = 5


@dataclass(frozen=True)
class TensorAudit:
    """One tensor's counts.

    Attributes:
        numel: weights.
        num_protected: of these, the mask's.
        num_changed: those that changed.
        num_protected_changed: both.
    """

    numel: int
    num_protected: int
    num_changed: int
    num_protected_changed: int


def audit_tensor(name: str, protected: TileSet | None, changed: Tensor) -> TensorAudit:
    """Count one tensor's protected weights, its changed weights, and those that are both.

    Args:
        name: the tensor's, for the error.
        protected: the mask's set; None where the mask does not know the tensor, and so protects nothing of it.
        changed: bool in the tensor's shape, True = changed.

    Raises:
        UserError: the mask is of a tensor of another shape.
    """
    num_changed = int(changed.sum())
    if protected is None:
        return TensorAudit(changed.numel(), 0, num_changed, 0)
    _check_shape(name, protected, changed)
    flat = changed.reshape(-1)
    both = sum(int(flat[part.to(flat.device)].sum()) for part in protected.index_parts())
    return TensorAudit(flat.numel(), protected.count(), num_changed, both)


def spike_audit(spike: Mapping[str, Any], protected: TileSet | None, changed: Tensor) -> dict[str, Any]:
    """Whether the weight behind an activation outlier is protected, and whether it moved.

    Args:
        spike: an entry of ``spikes`` in the report that ``ssrctl superweights`` writes: ``parameter``,
            ``out_channel`` and ``in_channel``, and ``index``, the weight's flat index (without it the tensor is taken
            as ``[out, in]``).
        protected: the mask's set of the tensor ``parameter``, None for nothing.
        changed: bool in that tensor's shape, True = changed.

    Returns:
        The spike with ``protected`` and ``moved``.

    Raises:
        UserError: coordinates that are none of this tensor's, or a mask of another shape.
    """
    name = str(spike.get("parameter"))
    index = _flat_index(spike, tuple(changed.shape))
    inside = False
    if protected is not None:
        _check_shape(name, protected, changed)
        inside = _contains(protected, index)
    return dict(spike) | {"index": index, "protected": inside, "moved": bool(changed.reshape(-1)[index])}


def audit_numbers(
    found: Mapping[str, TensorAudit],
    spikes: Sequence[Mapping[str, Any]] = (),
    not_compared: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The audit's numbers: ``total``, ``layers``, ``kinds``, ``cells``, ``tensors``, ``spikes``, ``not_compared``.

    Each group has its counts; ``protected_frac``, protected over all weights; ``changed_frac``, changed over all;
    ``protected_changed_frac``, changed over protected; ``overlap``, the protected share of the changed weights;
    ``expected_overlap``, what that would be if as many weights of each tensor had changed at random (for one tensor
    the protected density); and ``ratio``, the first of these two over the second. A share of nothing is None.

    Args:
        found: ``audit_tensor`` of each tensor that was compared.
        spikes: ``spike_audit`` of each activation outlier.
        not_compared: protected weights in tensors of the mask that the checkpoints do not have, by name.
    """
    return grouped(found, _summary) | {
        "spikes": [dict(spike) for spike in spikes],
        "not_compared": [{"name": name, "num_protected": size} for name, size in (not_compared or {}).items()],
    }


def failures(numbers: Mapping[str, Any], *, frozen: bool, moved_pattern: str | None) -> list[str]:
    """What is not as it was asserted, in sentences; empty when all is well.

    An assertion that holds because there was nothing to check is a failure.

    Args:
        numbers: from ``audit_numbers``.
        frozen: no protected weight may have changed.
        moved_pattern: a glob pattern (``*`` also matches dots; upper and lower case differ): in every tensor whose
            name matches, at least one weight must have changed. None asserts nothing.
    """
    lines = _frozen_failures(numbers) if frozen else []
    if moved_pattern is not None:
        lines += _moved_failures(numbers["tensors"], moved_pattern)
    return lines


def _frozen_failures(numbers: Mapping[str, Any]) -> list[str]:
    lines, total = [], numbers["total"]
    if missing := {row["name"]: row["num_protected"] for row in numbers["not_compared"] if row["num_protected"]}:
        lines.append(
            f"{times(sum(missing.values()), 'protected weight')} could not be compared: the checkpoints lack "
            f"{_listed(list(missing))}."
        )
    elif total["num_protected"] == 0:
        lines.append("The mask protects none of the weights that were compared, so nothing was asserted.")
    if total["num_protected_changed"]:
        moved = sorted(
            (row for row in numbers["tensors"] if row["num_protected_changed"]),
            key=lambda row: -row["num_protected_changed"],
        )
        names = _listed([f"{row['name']} ({count(row['num_protected_changed'])})" for row in moved])
        lines.append(
            f"{count(total['num_protected_changed'])} of {times(total['num_protected'], 'protected weight')} changed "
            f"({percent(total['protected_changed_frac'])}), in {times(len(moved), 'tensor')}: {names}."
        )
    return lines


def _moved_failures(tensors: Sequence[Mapping[str, Any]], pattern: str) -> list[str]:
    # A tensor without weights cannot move.
    matching = [row for row in tensors if row["numel"] and fnmatch.fnmatchcase(row["name"], pattern)]
    if not matching:
        names = _listed([row["name"] for row in tensors])
        return [f"No tensor's name matches {pattern!r}; the compared tensors are {names}."]
    still = [row["name"] for row in matching if row["num_changed"] == 0]
    if not still:
        return []
    return [
        f"{len(still)} of {times(len(matching), 'tensor')} that match {pattern!r} did not change: {_listed(still)}."
    ]


def _summary(audits: Sequence[TensorAudit]) -> dict[str, Any]:
    numel = sum(audit.numel for audit in audits)
    protected = sum(audit.num_protected for audit in audits)
    moved = sum(audit.num_changed for audit in audits)
    both = sum(audit.num_protected_changed for audit in audits)
    by_chance = math.fsum(audit.num_changed * audit.num_protected / audit.numel for audit in audits if audit.numel)
    return {
        "numel": numel,
        "num_protected": protected,
        "num_changed": moved,
        "num_protected_changed": both,
        "protected_frac": _share(protected, numel),
        "changed_frac": _share(moved, numel),
        "protected_changed_frac": _share(both, protected),
        "overlap": _share(both, moved),
        "expected_overlap": _share(by_chance, moved),
        "ratio": _share(both, by_chance),
    }


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _check_shape(name: str, protected: TileSet, changed: Tensor) -> None:
    if protected.shape != tuple(changed.shape):
        raise UserError(
            f"the mask has {name} with shape {list(protected.shape)}, the checkpoints have it with "
            f"{list(changed.shape)}",
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
    from torch import tensor

    return TileSet.from_indices(tiles.shape, tensor([index], device=tiles.device)).intersection(tiles).count() == 1


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {more:,} more" if more > 0 else "")


@register
class Audit(PairMeasure["tuple[TensorAudit, list[dict[str, Any]]]", "dict[str, Any]"]):
    """Whether protected weights moved, and which tensors did."""

    name = "audit"
    audits = True

    def __init__(self, comparison: Comparison, config: DiagnoseConfig, run: Path | None = None) -> None:
        """Read the mask and the list of activation outliers beside it, before anything slow."""
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

    def tensor(self, pair: TensorPair) -> tuple[TensorAudit, list[dict[str, Any]]]:
        """Return the counts of one tensor, and the activation outliers in it."""
        changed = change_rule(self.config, "bits")[0](pair.base, pair.tuned)
        protected = self.mask.tensors.get(pair.name) if self.mask is not None else None
        mine = [spike_audit(spike, protected, changed) for spike in self.spikes if spike["parameter"] == pair.name]
        return audit_tensor(pair.name, protected, changed), mine

    def combine(self, parts: Mapping[str, list[tuple[TensorAudit, list[dict[str, Any]]]]]) -> dict[str, Any]:
        """Return the counts by layer, kind and tensor, the outliers, and the mask's tensors that were not compared."""
        found = {name: one for name, ((one, _),) in parts.items()}
        spikes = [spike for ((_, mine),) in parts.values() for spike in mine]
        held = {} if self.mask is None or self.config.layers else self.mask.tensors
        return audit_numbers(found, spikes, {name: one.count() for name, one in held.items() if name not in found})

    def present(self, result: dict[str, Any]) -> Findings:
        """Return sentences and tables on protected weights, and the assertions that do not hold."""
        from ssrctl.measures.audit_report import audit_section, headlines

        frozen, moved = self.config.assert_frozen is not None, self.config.assert_moved
        return Findings(
            numbers=result,
            headlines=headlines(result),
            sections=[audit_section(result)],
            failed=failures(result, frozen=frozen, moved_pattern=moved),
        )


def _protected_weights(comparison: Comparison, config: DiagnoseConfig) -> BlockMask | None:
    """The mask of ``--protect`` or ``--assert-frozen``, if any.

    Raises:
        UserError: both, a mask that cannot be read, or one of other tensors.
    """
    from ssrctl.io.artifacts import load_mask

    if config.protect is not None and config.assert_frozen is not None:
        raise UserError(
            "--protect and --assert-frozen each name a mask", "give --assert-frozen alone; it reports the same"
        )
    path = config.assert_frozen or config.protect
    if path is None:
        return None
    mask = load_mask(path)[0]
    shared = [name for name in mask.shapes if name in comparison.names]
    if not shared:
        raise UserError(f"{path} is a mask of other tensors: none of them is compared", "name the checkpoints' mask")
    for name in shared:
        if mask.shapes[name] != comparison.base.shapes[name]:
            raise UserError(
                f"{path} has {name} with shape {list(mask.shapes[name])}, the checkpoints have it with "
                f"{list(comparison.base.shapes[name])}",
                "give a mask that was made for this model",
            )
    return mask


def _spikes(mask: Path) -> list[dict[str, Any]]:
    """The activation outliers that `ssrctl superweights` found, from the report beside its mask."""
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
