"""How far two masks of one model agree, and how far random masks of their sizes would."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ssrctl.measures.maths.step_sets import expected_jaccard, expected_overlap
from ssrctl.report.document import Column, Document, Section, Table
from ssrctl.report.formats import count, percent

if TYPE_CHECKING:
    from ssrctl.core.mask import BlockMask


def compare_masks(one: BlockMask, other: BlockMask) -> dict[str, Any]:
    """Return overlap and Jaccard index of two masks of the same shapes, and what chance gives.

    Returns:
        ``selected_a``, ``selected_b`` and ``overlap`` in weights; ``jaccard``; ``expected_jaccard`` of uniformly random
        masks of these sizes (Mukherjee et al. 2025, app. E), and ``expected_jaccard_within_tensors`` of masks that are
        random within each tensor, with the counts that each has there: masks that prefer the same tensors agree by that.
    """
    a, b, shared = one.count(), other.count(), (one & other).count()
    within = math.fsum(
        expected_overlap(tiles.count(), other.tensors[name].count(), tiles.numel)
        for name, tiles in one.tensors.items()
        if tiles.numel
    )
    return {
        "selected_a": a,
        "selected_b": b,
        "overlap": shared,
        "jaccard": shared / (a + b - shared) if a + b else 0.0,
        "expected_jaccard": expected_jaccard(a, b, one.numel),
        "expected_jaccard_within_tensors": within / (a + b - within) if a + b else 0.0,
    }


def comparison_document(report: Mapping[str, Any]) -> Document:
    """Make the document that ``mask compare`` shows, of its report."""
    table = Table(
        title="Pairs of masks",
        columns=[
            "A",
            "B",
            Column("in A", count),
            Column("in B", count),
            Column("in both", count),
            Column("Jaccard", percent),
            Column("by chance", percent),
            Column("by chance within tensors", percent),
        ],
        rows=[list(pair.values()) for pair in report["pairs"]],
        note="By chance: masks of these sizes drawn from all weights; within tensors: with each mask's count in each tensor.",
    )
    headlines = [
        f"{pair['a']} and {pair['b']} share {percent(pair['jaccard'])} of what either selects (Jaccard index); by chance "
        f"{percent(pair['expected_jaccard'])}, or {percent(pair['expected_jaccard_within_tensors'])} among masks with the "
        "same counts in each tensor."
        for pair in report["pairs"][:3]
    ]
    facts = [("weights", f"{report['coordinates']:,}")]
    return Document(
        title="Masks compared", facts=facts, headlines=headlines, notes=[], sections=[Section(title="", tables=[table])]
    )
