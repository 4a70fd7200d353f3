"""A document with every part a report can have and numbers of a plausible size, to look at a page with."""

from __future__ import annotations

import math
import random

from ssrctl.measures.published import published, published_section, unusual
from ssrctl.report.document import (
    Column,
    Document,
    Dots,
    Figure,
    Heatmap,
    Lines,
    Reference,
    Section,
    Table,
)
from ssrctl.report.formats import count, number, percent

KINDS = ("embedding", "q", "k", "v", "o", "gate", "up", "down", "norm")
BANDS = [Reference("published elsewhere, table 1: 68.5% to 96.0%", 0.685, 0.96), Reference("one value: 7.0%", 0.07)]


def heatmaps(rng: random.Random) -> list[Figure]:
    layers = [str(layer) for layer in range(80)]
    sparsity: list[list[float | None]] = [
        [
            None if kind == "embedding" else 0.88 + 0.03 * math.sin(order / 9 + row) * rng.random() + 0.01 * row
            for order, _ in enumerate(layers)
        ]
        for row, kind in enumerate(KINDS)
    ]
    runs = ["DeepScaleR-1.5B-Preview", "DeepCoder-1.5B", "Archer-Code-1.5B", "NV-ProRL", "NV-ProRL-v2"]
    shared: list[list[float | None]] = [
        [None if i == j else 0.55 + 0.01 * (i + j) for j in range(len(runs))] for i in range(len(runs))
    ]
    landing: list[list[float | None]] = [[0.5 + 0.1 * math.sin(i + 2 * j) for j in range(8)] for i in range(4)]
    return [
        Heatmap(
            title="Update sparsity by kind and layer",
            row_labels=KINDS,
            column_labels=layers,
            values=sparsity,
            column_axis="layer",
            centre=0.85,
            shares=True,
            decimals=1,
            caption="bf16-aware rule.",
        ),
        Heatmap(title="Jaccard index of two runs", labels=runs, values=shared, axis="run", decimals=2),
        Heatmap(
            title="Overlap with the principal mask",
            row_labels=["q", "k", "v", "o"],
            column_labels=[f"checkpoint-{100 * step}" for step in range(1, 9)],
            values=landing,
            row_axis="kind",
            column_axis="checkpoint",
            centre=0.5,
            decimals=2,
            caption="Without colour: the mask's density, 0.5, which chance would give.",
        ),
    ]


def curves(rng: random.Random) -> list[Figure]:
    steps = list(range(100, 1300, 100))
    falling = [0.995 - 0.02 * math.sqrt(step / 100) for step in steps]
    spectrum = list(range(1, 65))
    chance: list[float | None] = [0.02] * len(steps)
    return [
        Lines(
            title="Sparsity against the base",
            x=steps,
            series={"bf16-aware": falling, "bit for bit": [value - 0.03 for value in falling]},
            x_label="training step",
            y_label="sparsity",
            shares=True,
            references=BANDS[:1],
            caption="Sparsity falls quickly at first, then slowly.",
        ),
        Lines(
            title="Overlap of a question's steps",
            x=steps,
            series={"measured": [0.12 + 0.02 * rng.random() for _ in steps], "expected by chance": chance},
            intervals={"measured": [(0.1, 0.16)] * len(steps)},
            x_label="training step",
            y_label="mean Jaccard index",
        ),
        Lines(
            title="Singular values of layer 12, q",
            x=spectrum,
            series={
                name: [scale * math.exp(-one / 12) for one in spectrum]
                for name, scale in (("base", 40.0), ("tuned", 40.4), ("update", 0.02))
            },
            x_label="index",
            y_label="singular value",
            log_y=True,
        ),
        Lines(
            title="Six rules side by side",
            x=[1, 2, 3, 4],
            series={
                name: [0.1 * place + 0.02 * one for one in range(4)]
                for place, name in enumerate(("1e-8", "1e-7", "1e-6", "1e-5", "bf16", "bits"))
            },
            x_label="checkpoint",
            y_label="share",
            shares=True,
        ),
    ]


def bars_and_counts() -> list[Figure]:
    jaccard = {one.model.split()[0]: (one.value, one.baseline) for one in published() if one.measure == "run_jaccard"}
    return [
        Dots(
            title="Unchanged by kind",
            labels=KINDS,
            series={
                "within 1e-5": [0.99, 0.97, 0.96, 0.95, 0.97, 0.94, 0.95, 0.96, 1.0],
                "bit for bit": [0.95, 0.83, 0.82, 0.8, 0.85, 0.79, 0.8, 0.83, 1.0],
            },
            axis="share unchanged",
            references=BANDS,
        ),
        Dots(
            title="Jaccard index of five runs, layer 13",
            labels=list(jaccard),
            series={
                "measured": [value for value, _ in jaccard.values()],
                "expected by chance": [chance for _, chance in jaccard.values()],
            },
            intervals={"measured": [(value - 0.03, value + 0.03) for value, _ in jaccard.values()]},
            axis="Jaccard index",
            shares=False,
        ),
        Dots(
            title="Relative size of the update",
            labels=["model.layers.17.self_attn.q_proj.weight", "lm_head.weight", "model.norm.weight"],
            series={"relative L2": [3e-3, 4e-4, None]},
            axis="norm of the update over norm of the base",
            shares=False,
            log=True,
        ),
    ]


def tensor_table(rows: int, rng: random.Random) -> Table:
    values: list[list[float | int | str | None]] = []
    for order in range(rows):
        name = f"model.layers.{order // 7}.mlp.experts.{order % 7}.down_proj_with_a_long_name.weight"
        values.append([name, 4096 * 1536, 0.8 + 0.19 * rng.random(), None if order == 3 else 1e-3 * rng.random()])
    return Table(
        title="All tensors",
        columns=["tensor", Column("weights", count), Column("unchanged", percent), Column("relative L2", number)],
        rows=values,
        terminal_rows=0,
    )


def largest_changes() -> Table:
    return Table(
        title="Largest changes",
        columns=[
            "tensor",
            "kind",
            "row, column",
            Column("before", number),
            Column("after", number),
            Column("ULP", count),
        ],
        rows=[
            [
                f"model.layers.{layer}.self_attn.{kind}_proj.weight",
                kind,
                f"{7 * layer}, {3 * layer}",
                0.0312,
                -0.0294,
                9000 - layer,
            ]
            for layer, kind in ((3, "q"), (17, "down"), (22, "v"))
        ],
        note="By distance in units of the last place.",
    )


def example_document(rows: int = 520) -> Document:
    """The same document every time."""
    rng = random.Random(0)
    measured = {"sparsity_1e-5": 0.971, "sparsity_bf16": 0.9312, "rank": 0.994}
    published_numbers = published_section(measured)  # type: ignore[arg-type]
    return Document(
        title="What did training change?",
        facts=[
            ("base", "models/SmolLM2-135M-Instruct"),
            ("tuned", "runs/2025-11-03_kronos_a-very-long-run-name-that-has-to-be-broken/checkpoints/000200"),
            ("weights", "134,515,008 in 272 tensors"),
        ],
        headlines=[
            "93.12% of the weights are unchanged (bf16-aware rule); 9,254,632 of 134,515,008 moved.",
            "The update's norm is 0.000812 of the base's, and nearly of full rank (99.4% of the maximum).",
            "Most changed: gate (sparsity 79.00%); least: norm (100.00%).",
        ],
        unusual=[
            *unusual(measured),  # type: ignore[arg-type]
            "No norm weight changed at all, although norms were trainable.",
        ],
        notes=[
            "3 tensors are bfloat16 in BASE and float32 in TUNED; they were compared in float32.",
            "NaN or infinite weights: 2 nan in tuned. They count as changed.",
        ],
        sections=[
            Section(
                title="What changed",
                text="Shares of unchanged weights.",
                figures=bars_and_counts(),
                tables=[largest_changes()],
            ),
            Section(title="Where", text="By layer and kind of matrix.", figures=heatmaps(rng)),
            published_numbers,
            Section(title="Over training", figures=curves(rng)),
            Section(title="All tensors", tables=[tensor_table(rows, rng)]),
            Section(title="Details", text="What few readers need.", tables=[largest_changes()], collapsed=True),
        ],
    )
