"""The contents of a mask by layer and by kind of matrix: numbers, and a document for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ssrctl.checkpoints.names import KINDS
from ssrctl.measures.maths.grouping import by_kind, by_layer
from ssrctl.report.document import Column, Document, Section, Table
from ssrctl.report.formats import count, percent, times

OUTSIDE = "other"  # where a tensor that lies in no layer is counted
_MOST_LAYERS = 200


def mask_numbers(shapes: Mapping[str, tuple[int, ...]], selected: Mapping[str, int]) -> dict[str, Any]:
    """Count a mask's coordinates, selected and all, in total and by layer, kind and tensor.

    Args:
        shapes: of the tensors, by name.
        selected: the number of selected coordinates of each.

    Returns:
        ``coordinates``, ``selected``, ``selected_frac`` (the density); ``num_tensors``, ``num_tensors_selected``;
        ``layers``, ``kinds`` and ``tensors``, one row of counts for each. A share of nothing is None.
    """
    counts = {name: (math.prod(shape), selected[name]) for name, shape in sorted(shapes.items())}
    return {
        **_counted(counts.values()),
        "num_tensors": len(counts),
        "num_tensors_selected": sum(number > 0 for _, number in counts.values()),
        "layers": [
            {"layer": OUTSIDE if layer is None else str(layer)} | _counted(pairs)
            for layer, pairs in by_layer(counts).items()
        ],
        "kinds": [{"kind": kind} | _counted(pairs) for kind, pairs in by_kind(counts).items()],
        "tensors": [{"name": name, "shape": list(shapes[name])} | _counted([pair]) for name, pair in counts.items()],
    }


def mask_document(report: Mapping[str, Any]) -> Document:
    """Make the document that the mask commands show.

    Args:
        report: the numbers of ``mask_numbers``, and ``mask`` (the file), ``mask_kind``, ``model`` (name and
            fingerprint, or None), ``bytes`` and ``notes``.
    """
    from rich.filesize import decimal

    model = report["model"]
    facts = [("mask", report["mask"]), ("kind", report["mask_kind"])]
    if model is None:
        facts.append(("model", "not recorded"))
    else:  # a foreign file may hold anything for these
        facts += [("model", str(model["name"])), ("fingerprint", str(model["fingerprint"]))]
    headline = (
        f"{report['selected']:,} of {report['coordinates']:,} weights selected ({percent(report['selected_frac'])}), in "
        f"{report['num_tensors_selected']} of {times(report['num_tensors'], 'tensor')}; {decimal(report['bytes'])}."
    )
    tables = [
        _table("By layer", "layer", report["layers"], _MOST_LAYERS),
        _table("By kind of matrix", "kind", report["kinds"], len(KINDS)),
    ]
    sections = [Section(title="", tables=tables)]
    return Document(title="Mask", facts=facts, headlines=[headline], notes=report["notes"], sections=sections)


def _counted(pairs: Iterable[tuple[int, int]]) -> dict[str, Any]:
    """Add up pairs of (coordinates, selected)."""
    listed = list(pairs)
    coordinates, selected = (sum(pair[place] for pair in listed) for place in (0, 1))
    return {
        "coordinates": coordinates,
        "selected": selected,
        "selected_frac": selected / coordinates if coordinates else None,
    }


def _table(title: str, key: str, rows: Iterable[Mapping[str, Any]], most: int) -> Table:
    return Table(
        title=title,
        columns=[key, Column("selected", count), Column("of", count), Column("share", percent)],
        rows=[[row[name] for name in (key, "selected", "coordinates", "selected_frac")] for row in rows],
        terminal_rows=most,
    )
