"""The geometry of a run's gradients in words, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ssrctl.report.document import Figure, Heatmap, Lines, Section, Table
from ssrctl.report.formats import count, number, percent, times

_CHANCE = "expected for independent directions"
_TOP_ROWS = 20


def headlines(numbers: Mapping[str, Any] | None) -> list[str]:
    """The answer in sentences; none without two gradients that are not zero.

    Args:
        numbers: from ``gradient_geometry.gradient_numbers``.
    """
    if numbers is None or numbers["num_gradients"] - numbers["num_zero"] < 2:
        return []
    found = numbers["gradients"]
    ranks = found["energy_ranks"]
    lines = [
        f"The {count(numbers['num_gradients'])} stored gradients have an effective rank of "
        f"{number(found['effective_rank'])} (independent directions of the same lengths: "
        f"{number(found['expected_effective_rank'])}); {times(ranks['0.9'], 'direction')} hold 90% of their energy, "
        f"{count(ranks['0.99'])} hold 99%."
    ]
    if numbers["mean_cosine"] is not None:
        lines.append(
            f"Two stored gradients have a mean cosine of {number(numbers['mean_cosine'], 'signed')}; counted by "
            f"direction alone their effective rank is {number(numbers['directions']['effective_rank'])} (chance: "
            f"{number(numbers['directions']['expected_effective_rank'])}), with "
            f"{times(numbers['directions']['num_shared'], 'direction')} beyond chance."
        )
    return lines


def gradient_section(numbers: Mapping[str, Any] | None) -> Section | None:
    """Eigenvalues, cumulative energy and cosines; None without stored gradients."""
    if numbers is None:
        return None
    figures: list[Figure] = []
    if numbers["gradients"]["effective_rank"] is not None:
        figures = [_eigenvalues(numbers), _energy(numbers)]
        if len(numbers["cosine_steps"]) > 1:
            figures += [_cosines(numbers), _neighbours(numbers)]
    return Section(
        title="How many directions the gradients span",
        text=_text(numbers),
        figures=figures,
        tables=[_ranks(numbers), _table(numbers)],
    )


def _text(numbers: Mapping[str, Any]) -> str:
    text = (
        f"Gradients of {times(numbers['num_gradients'], 'training step')} before masking, each the sum over a batch. "
        "Eigenvalues are those of the Gram matrix G G^T, one row of G per stored gradient; they are the energies along "
        "the principal directions, and their sum is that of all squared norms. "
    )
    if numbers["sketch"] == "exact":
        text += "The gradients are stored exactly."
    else:
        text += (
            f"Each is stored as a sketch of {count(numbers['size'])} numbers for {count(numbers['num_coordinates'])} "
            f"weights: inner products are off by at most {percent(numbers['inner_product_error'])} of the product of "
            f"the norms (standard deviation), eigenvalues by about {percent(numbers['eigenvalue_error'])} of "
            "themselves. The yardstick is sketched the same way."
        )
    if numbers["num_zero"]:
        text += (
            f" {times(numbers['num_zero'], 'gradient')} of norm 0 (no advantage differed from 0) count as rows of G."
        )
    return text


def _shares(values: Sequence[float]) -> list[float | None]:
    total = sum(values)
    return [value / total if total else None for value in values]


def _cumulative(values: Sequence[float]) -> list[float | None]:
    total, held, shares = sum(values), 0.0, []
    for value in values:
        held += value
        shares.append(min(1.0, held / total) if total else None)
    return shares


def _spectra(numbers: Mapping[str, Any]) -> dict[str, Sequence[float]]:
    found = numbers["gradients"]
    return {"measured": found["eigenvalues"], _CHANCE: found["expected_eigenvalues"]}


def _eigenvalues(numbers: Mapping[str, Any]) -> Lines:
    spectra = _spectra(numbers)
    return Lines(
        title="Eigenvalues of the gradients' Gram matrix",
        x=list(range(1, numbers["num_gradients"] + 1)),
        series={name: _shares(values) for name, values in spectra.items()},
        x_label="eigenvalue, from the largest",
        y_label="share of all energy",
        log_y=True,
        caption="Where the measured curve lies above the grey one, a direction is shared by more gradients than chance "
        "explains.",
    )


def _energy(numbers: Mapping[str, Any]) -> Lines:
    return Lines(
        title="Energy in the largest directions together",
        x=list(range(1, numbers["num_gradients"] + 1)),
        series={name: _cumulative(values) for name, values in _spectra(numbers).items()},
        x_label="directions, from the largest",
        y_label="share of all energy",
        shares=True,
    )


def _cosines(numbers: Mapping[str, Any]) -> Heatmap:
    matrix = [
        [None if row == column else value for column, value in enumerate(values)]
        for row, values in enumerate(numbers["cosines"])
    ]
    largest = max((abs(value) for values in matrix for value in values if value is not None), default=0.0)
    thinned = len(numbers["cosine_steps"]) < numbers["num_gradients"]
    return Heatmap(
        title="Cosine between the gradients of two training steps",
        labels=[str(step) for step in numbers["cosine_steps"]],
        values=matrix,
        axis="training step",
        scale=largest or None,
        decimals=2,
        caption=f"Full colour is ±{number(largest)}; blue is agreement, orange is conflict."
        + (f" {len(matrix)} of {numbers['num_gradients']} steps are shown." if thinned else ""),
    )


def _neighbours(numbers: Mapping[str, Any]) -> Lines:
    return Lines(
        title="Cosine between the gradients of neighbouring stored steps",
        x=numbers["steps"][1:],
        series={"measured": numbers["neighbour_cosines"]},
        x_label="training step",
        y_label="cosine to the one before",
    )


def _ranks(numbers: Mapping[str, Any]) -> Table:
    rows, raw = [], []
    for label, key in (("gradients", "gradients"), ("directions alone", "directions")):
        found = numbers[key]
        for name, prefix in ((label, ""), (f"{label}, by chance", "expected_")):
            energy = found[f"{prefix}energy_ranks"]
            shared = None if prefix else found["num_shared"]
            values = [found[f"{prefix}effective_rank"], found[f"{prefix}participation_ratio"], *energy.values(), shared]
            rows.append([name, *(number(value) for value in values[:2]), *(count(value) for value in values[2:])])
            raw.append([name, *values])
    return Table(
        title="Ranks of the stored gradients",
        columns=[
            "of",
            "effective rank",
            "participation ratio",
            "90% energy",
            "95% energy",
            "99% energy",
            "beyond chance",
        ],
        rows=rows,
        raw=raw,
        note=f"Of at most {count(numbers['num_gradients'])}. Directions alone: every gradient scaled to norm 1, so "
        "that a few large ones do not decide. By chance: independent random directions of the same norms. Beyond "
        "chance: eigenvalues above the largest of these.",
    )


def _table(numbers: Mapping[str, Any]) -> Table:
    found = numbers["gradients"]
    spectra = (found["eigenvalues"], found["expected_eigenvalues"])
    parts = [_shares(values) for values in spectra] + [_cumulative(found["eigenvalues"])]
    raw = [[place + 1, spectra[0][place], *(part[place] for part in parts)] for place in range(len(spectra[0]))]
    return Table(
        title="Eigenvalues",
        columns=["number", "eigenvalue", "share", "share by chance", "share of the first so many"],
        rows=[[str(row[0]), number(row[1]), *(percent(value) for value in row[2:])] for row in raw],
        raw=raw,
        terminal_rows=0,
        collapsed=len(raw) > _TOP_ROWS,
    )
