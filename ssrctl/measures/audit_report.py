"""The audit of protected weights in words, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ssrctl.measures.maths.grouping import layer_label
from ssrctl.report.document import Bars, Section, Table
from ssrctl.report.formats import count, number, percent, times

_COLUMNS = ["weights", "protected", "changed", "both", "of protected", "of changed", "by chance", "ratio"]


def headlines(numbers: Mapping[str, Any]) -> list[str]:
    """The answer in sentences.

    Args:
        numbers: from ``audit.audit_numbers``.
    """
    total, spikes = numbers["total"], numbers["spikes"]
    lines = [_protected_sentence(total)]
    if total["num_changed"] and total["num_protected"]:
        lines.append(
            f"{percent(total['overlap'])} of the changed weights are protected ones; at random it would be "
            f"{percent(total['expected_overlap'])}."
        )
    if spikes:
        inside, moved = (sum(spike[key] for spike in spikes) for key in ("protected", "moved"))
        lines.append(
            f"Of {times(len(spikes), 'activation outlier')}, {inside} {'has its' if inside == 1 else 'have their'} "
            f"weight inside the protected set; {moved} {'was' if moved == 1 else 'were'} changed."
        )
    if total["num_protected"] == 0:
        lines.append(_moved_sentence(numbers["tensors"]))
    if missing := numbers["not_compared"]:
        lines.append(f"{times(len(missing), 'tensor')} of the mask could not be compared: the checkpoints lack them.")
    return lines


def _protected_sentence(total: Mapping[str, Any]) -> str:
    if total["num_protected"] == 0:
        return "No protected weight was compared."
    protected = f"{times(total['num_protected'], 'protected weight')} ({percent(total['protected_frac'])} of all)"
    if total["num_protected_changed"] == 0:
        return f"None of {protected} changed."
    return (
        f"Of {protected}, {count(total['num_protected_changed'])} changed ({percent(total['protected_changed_frac'])})."
    )


def _moved_sentence(tensors: Sequence[Mapping[str, Any]]) -> str:
    return f"{sum(row['num_changed'] > 0 for row in tensors):,} of {times(len(tensors), 'tensor')} changed."


def audit_section(numbers: Mapping[str, Any]) -> Section:
    """Protected weights that moved, by kind, layer and tensor, and the weights behind activation outliers.

    Where nothing is protected, which tensors changed.

    Args:
        numbers: from ``audit.audit_numbers``.
    """
    if numbers["total"]["num_protected"] == 0:
        return Section(
            title="Which tensors changed?",
            text=f"No protected weight was compared. {_moved_sentence(numbers['tensors'])}",
            tables=[_moved_table(numbers["tensors"]), *_spike_tables(numbers["spikes"])],
        )
    kinds = [row for row in numbers["kinds"] if row["num_protected"]]
    layers = [row for row in numbers["layers"] if row["num_protected"]]
    tensors = [row for row in numbers["tensors"] if row["num_protected"]]
    return Section(
        title="Did protected weights move?",
        text="A frozen weight has to be equal to what it was. Without protection, as large a share of the changed "
        "weights would be protected ones as chance gives (as many changed weights of each tensor, at random).",
        figures=[
            *_figure("Changed share of the protected weights, by kind", [row["kind"] for row in kinds], kinds),
            *_figure(
                "Changed share of the protected weights, by layer",
                [layer_label(row["layer"]) for row in layers],
                layers,
            ),
        ],
        tables=[
            _table("Protected weights by kind of matrix", "kind", [row["kind"] for row in kinds], kinds),
            _table("Protected weights by layer", "layer", [layer_label(row["layer"]) for row in layers], layers),
            *_spike_tables(numbers["spikes"]),
            _table("Protected weights by tensor", "tensor", [row["name"] for row in tensors], tensors),
        ],
    )


def _figure(title: str, labels: list[str], rows: Sequence[Mapping[str, Any]]) -> list[Bars]:
    """Nothing where nothing moved: all bars would be empty."""
    if not any(row["num_protected_changed"] for row in rows):
        return []
    return [
        Bars(
            title=title,
            labels=labels,
            series={
                "protected": [row["protected_changed_frac"] for row in rows],
                "expected by chance: all weights": [row["changed_frac"] for row in rows],
            },
            axis="share that changed",
        )
    ]


def _table(title: str, what: str, labels: list[str], rows: Sequence[Mapping[str, Any]]) -> Table:
    counts = ("numel", "num_protected", "num_changed", "num_protected_changed")
    shares = ("protected_changed_frac", "overlap", "expected_overlap")
    return Table(
        title=title,
        columns=[what, *_COLUMNS],
        rows=[
            [label, *(count(row[key]) for key in counts), *(percent(row[key]) for key in shares), number(row["ratio"])]
            for label, row in zip(labels, rows, strict=True)
        ],
        raw=[
            [label, *(row[key] for key in (*counts, *shares, "ratio"))] for label, row in zip(labels, rows, strict=True)
        ],
        note="Of protected: both over protected. Of changed: both over changed; by chance: what random changes would "
        "give; ratio: of these two. Tensors without protected weights are left out.",
        terminal_rows=0 if what == "tensor" else 48,
        collapsed=what == "tensor",
    )


def _moved_table(tensors: Sequence[Mapping[str, Any]]) -> Table:
    keys = ("numel", "num_changed", "changed_frac")
    return Table(
        title="Changed weights by tensor",
        columns=["tensor", "weights", "changed", "share"],
        rows=[
            [row["name"], count(row["numel"]), count(row["num_changed"]), percent(row["changed_frac"])]
            for row in tensors
        ],
        raw=[[row["name"], *(row[key] for key in keys)] for row in tensors],
        terminal_rows=0,
        collapsed=True,
    )


def _spike_tables(spikes: Sequence[Mapping[str, Any]]) -> list[Table]:
    if not spikes:
        return []
    columns = ["tensor", "out channel", "in channel", "protected", "changed"]
    cells = [
        [
            str(spike["parameter"]),
            str(spike.get("out_channel", "")),
            str(spike.get("in_channel", "")),
            "yes" if spike["protected"] else "no",
            "yes" if spike["moved"] else "no",
        ]
        for spike in spikes
    ]
    return [
        Table(
            title="Weights behind activation outliers",
            columns=columns,
            rows=cells,
            note="The weight where the strongest input channel of a down projection meets its strongest output channel "
            "(Yu et al. 2024, the super weight).",
        )
    ]
