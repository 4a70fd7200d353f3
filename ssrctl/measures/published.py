"""What two papers measured on public checkpoints, to be shown beside one's own numbers.

Values are those of the papers' tables, as shares in [0, 1]. Sources: Mukherjee et al. 2025, *Reinforcement learning
finetunes small subnetworks in large language models*, arXiv:2505.11711; Zhu et al. 2025, *The path not taken*,
arXiv:2511.08567.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ssrctl.report.document import Ranges, Reference, Section, Table
from ssrctl.report.formats import number, percent, times

Measure = Literal[
    "sparsity_1e-8", "sparsity_1e-7", "sparsity_1e-6", "sparsity_1e-5", "sparsity_bf16",
    "rank", "run_overlap", "run_jaccard", "changed_per_checkpoint", "outside_final",
]  # fmt: skip
Training = Literal["RL", "SFT"]

MEASURES: dict[Measure, str] = {
    "sparsity_1e-8": "update sparsity, tolerance 1e-8",
    "sparsity_1e-7": "update sparsity, tolerance 1e-7",
    "sparsity_1e-6": "update sparsity, tolerance 1e-6",
    "sparsity_1e-5": "update sparsity, tolerance 1e-5",
    "sparsity_bf16": "update sparsity, bf16-aware",
    "rank": "rank of an update matrix over its maximum, mean",
    "run_overlap": "one-sided overlap of two runs",
    "run_jaccard": "Jaccard index of runs, changed weights of a matrix",
    "changed_per_checkpoint": "weights changed from one checkpoint to the next",
    "outside_final": "ever changed, but not in the final subnetwork",
}
MUKHERJEE, ZHU = "Mukherjee et al. 2025", "Zhu et al. 2025"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published number.

    Attributes:
        paper: ``MUKHERJEE`` or ``ZHU``.
        table: where in the paper: ``table 1``.
        measure: what was measured, a key of ``MEASURES``.
        model: the checkpoint, or the matrix or setting where the table has one model only.
        algorithm: how it was trained.
        training: RL (preference optimisation included) or SFT.
        value: a share in [0, 1].
        baseline: what the paper gives for chance, where it does.
    """

    paper: str
    table: str
    measure: Measure
    model: str
    algorithm: str
    value: float
    training: Training = "RL"
    baseline: float | None = None


# Per cent: sparsity at a tolerance of 1e-5.
_MUKHERJEE_1 = (
    ("DPO", "Llama-3.1-Tulu-3-8B-DPO", 81.4),
    ("DPO", "Llama-3.1-Tulu-3-70B-DPO", 95.2),
    ("GRPO", "deepseek-math-7b-rl", 68.5),
    ("GRPO", "DeepSeek-R1-Zero", 86.0),
    ("ORPO", "mistral-orpo-beta", 76.9),
    ("KTO", "Eurus-7b-kto", 96.0),
    ("KTO", "Llama-3-Base-8B-SFT-KTO", 81.2),
    ("PPO", "math-shepherd-mistral-7b-rl", 80.8),
    # Table 6 gives this model 76.42, and 86.52 to Llama-3-Base-8B-SFT-SimPO.
    ("SimPO", "Llama-3-Instruct-8B-SimPO", 86.5),
    ("PRIME", "Eurus-2-7B-PRIME", 77.0),
)
# Per cent: sparsity at tolerances of 1e-8, 1e-7, 1e-6 and 1e-5.
_MUKHERJEE_6 = (
    ("DPO", "Llama-3.1-Tulu-3-8B-DPO", (76.04, 76.04, 76.14, 81.38)),
    ("DPO", "Llama-3.1-Tulu-3-70B-DPO", (87.58, 87.59, 87.79, 95.24)),
    ("GRPO", "deepseek-math-7b-rl", (68.14, 68.14, 68.14, 68.53)),
    ("ORPO", "mistral-orpo-beta", (73.16, 73.18, 73.23, 76.94)),
    ("ORPO", "mistral-orpo-alpha", (50.40, 50.41, 50.48, 53.23)),
    ("KTO", "Eurus-7b-kto", (71.78, 71.79, 73.14, 95.98)),
    ("PPO", "math-shepherd-mistral-7b-rl", (52.45, 52.47, 53.21, 80.77)),
    ("PRIME", "Eurus-2-7B-PRIME", (75.26, 75.27, 75.36, 77.04)),  # under PPO in table 6, under PRIME in table 1
    ("SimPO", "Llama-3-Instruct-8B-SimPO", (71.00, 71.00, 71.10, 76.42)),
    ("SimPO", "Llama-3-Base-8B-SFT-SimPO", (79.47, 79.47, 79.60, 86.52)),
    ("SimPO", "Mistral-7B-Instruct-SimPO", (59.37, 59.40, 60.31, 89.07)),
    ("SimPO", "Mistral-7B-Base-SFT-SimPO", (62.58, 62.60, 63.56, 91.44)),
)
_TOLERANCES: tuple[Measure, ...] = ("sparsity_1e-8", "sparsity_1e-7", "sparsity_1e-6", "sparsity_1e-5")
# Per cent: mean rank of the update matrices over their maximum.
_MUKHERJEE_2 = (
    ("DPO", "Tulu 8B", 99.8),
    ("PRIME", "Eurus 7B", 99.5),
    ("KTO", "Llama-3 8B", 99.2),
    ("GRPO", "DeepSeek Math 7B", 99.4),
)
# Per cent: what differs between the two runs, one-sided overlap o1 or o2, and the same by chance.
_MUKHERJEE_4 = (
    ("seed, o1", 60.5, 36.7),
    ("seed, o2", 60.6, 36.7),
    ("data, o1", 26.7, 14.6),
    ("data, o2", 67.1, 36.7),
    ("seed, data and algorithm, o1", 59.1, 23.0),
    ("seed, data and algorithm, o2", 33.2, 12.9),
)
# Per cent: bf16-aware sparsity.
_ZHU_1: tuple[tuple[Training, str, str, float], ...] = (
    ("SFT", "SFT", "DS-R1-Distill-Qwen-1.5B", 2.8),
    ("RL", "GRPO", "DeepScaleR-1.5B-Preview", 53.8),
    ("RL", "GRPO", "DeepCoder-1.5B-Preview", 45.5),
    ("RL", "GRPO", "Archer-Code-1.5B", 52.5),
    ("RL", "GRPO", "NV-ProRL", 38.4),
    ("RL", "Reinforcement++", "NV-ProRL-v2", 36.3),
    ("SFT", "SFT", "Klear-Reasoner-8B-SFT", 0.6),
    ("RL", "GRPO", "Klear-Reasoner-8B", 69.5),
    ("RL", "GRPO", "GT-Qwen3-8B-Base", 79.9),
    ("RL", "DAPO", "the authors' own, from Qwen3-8B-Base", 79.7),
    ("SFT", "SFT", "UniReason-Qwen3-14B-think-SFT", 18.8),
    ("RL", "GRPO", "UniReason-Qwen3-14B-RL", 68.3),
    ("RL", "DAPO", "Polaris-4B-Preview", 79.3),
    ("RL", "DAPO", "Polaris-7B-Preview", 61.7),
    ("RL", "GRPO", "UloRL-A3B", 91.7),
)
# Kind of matrix (as ``sparsity.matrix_kind`` names them), Jaccard index, and the same by chance; layer 13.
_ZHU_2 = (
    ("q", 0.580, 0.430),
    ("k", 0.580, 0.413),
    ("v", 0.597, 0.467),
    ("o", 0.552, 0.373),
    ("down", 0.585, 0.453),
    ("up", 0.578, 0.443),
    ("gate", 0.575, 0.437),
)


def _share(per_cent: float) -> float:
    """The nearest float to the printed number of per cent, which a division by 100 would miss."""
    return float(f"{per_cent}e-2")


def _mukherjee() -> list[Published]:
    def one(table: str, measure: Measure, model: str, how: str, value: float, **more: Any) -> Published:
        return Published(
            paper=MUKHERJEE, table=table, measure=measure, model=model, algorithm=how, value=_share(value), **more
        )

    found = [one("table 1", "sparsity_1e-5", model, how, value) for how, model, value in _MUKHERJEE_1]
    found += [one("table 2", "rank", model, how, value) for how, model, value in _MUKHERJEE_2]
    for what, value, chance in _MUKHERJEE_4:
        how = "DPO, PRIME" if "algorithm" in what else "DPO"
        model = f"runs that differ in {what}"
        found.append(one("table 4", "run_overlap", model, how, value, baseline=_share(chance)))
    for how, model, values in _MUKHERJEE_6:
        for measure, value in zip(_TOLERANCES, values, strict=True):
            found.append(one("table 6", measure, model, how, value))
    # Section 3 gives the range only, over the three SFT models of appendix C.
    for which, value in (("least", 6.0), ("most", 15.0)):
        found.append(one("section 3", "sparsity_1e-5", f"{which} of 3 models", "SFT", value, training="SFT"))
    found.append(one("section 6", "outside_final", "Eurus-2-7B-PRIME", "PRIME", 8.5))
    found.append(one("appendix D", "changed_per_checkpoint", "Eurus-2-7B-PRIME, mean", "PRIME", 7.0))
    return found


def _zhu() -> list[Published]:
    sparsity = [
        Published(
            paper=ZHU,
            table="table 1",
            measure="sparsity_bf16",
            model=model,
            algorithm=how,
            training=training,
            value=_share(value),
        )
        for training, how, model, value in _ZHU_1
    ]
    overlap = [
        Published(
            paper=ZHU,
            table="table 2",
            measure="run_jaccard",
            model=f"{kind} of layer 13, DS-R1-Distill-Qwen-1.5B, mean over the pairs of 5 runs",
            algorithm="GRPO, Reinforcement++",
            value=value,
            baseline=chance,
        )
        for kind, value, chance in _ZHU_2
    ]
    return sparsity + overlap


PUBLISHED = (*_mukherjee(), *_zhu())


# --------------------------------------------------------------------------------------------------
# as references in figures


def references(measure: Measure, training: Training | None = None) -> list[Reference]:
    """The published ranges of a measure, one for each table that has it (RL before SFT), for a figure of shares.

    Args:
        measure: a key of ``MEASURES``.
        training: RL or SFT only; None is both.
    """
    found = []
    for kind in ("RL", "SFT") if training is None else (training,):
        for paper, table in dict.fromkeys((one.paper, one.table) for one in PUBLISHED if one.measure == measure):
            values = [
                one.value
                for one in PUBLISHED
                if (one.measure, one.paper, one.table, one.training) == (measure, paper, table, kind)
            ]
            if values:
                found.append(_reference(f"{paper}, {table}, {kind}", measure, values))
    return found


def chance_references(measure: Measure) -> list[Reference]:
    """What the papers give for chance beside a measure's values, one range for each table."""
    tables = dict.fromkeys((one.paper, one.table) for one in PUBLISHED if one.measure == measure)
    found = []
    for paper, table in tables:
        values = [
            one.baseline
            for one in PUBLISHED
            if (one.measure, one.paper, one.table) == (measure, paper, table) and one.baseline is not None
        ]
        if values:
            found.append(_reference(f"{paper}, {table}, chance", measure, values))
    return found


def _reference(source: str, measure: Measure, values: Sequence[float]) -> Reference:
    low, high = min(values), max(values)
    return Reference(f"{source}: {_span(measure, low, high)}", low, high if high > low else None)


def _span(measure: Measure, low: float, high: float) -> str:
    if measure == "run_jaccard":
        return f"{low:.3f} to {high:.3f}"
    ends = [f"{100 * low:.1f}%"] + ([f"{100 * high:.1f}%"] if high > low else [])
    return " to ".join(ends)


def jaccard_by_kind() -> dict[str, tuple[float, float]]:
    """(Jaccard index, the same by chance) of five runs, for each kind of matrix of one layer (Zhu et al., table 2)."""
    return {kind: (value, chance) for kind, value, chance in _ZHU_2}


# --------------------------------------------------------------------------------------------------
# beside one's own numbers


def position(measure: Measure, value: float) -> Literal["below", "within", "above"]:
    """Where a value lies relative to everything that was published for RL."""
    values = [one.value for one in PUBLISHED if one.measure == measure and one.training == "RL"]
    if value < min(values):
        return "below"
    return "above" if value > max(values) else "within"


def unusual(values: Mapping[Measure, float | None]) -> list[str]:
    """A sentence for each value that lies outside of everything that was published for RL.

    Args:
        values: shares in [0, 1]; None was not measured. A measure with a single published number is left out, since
            one number is no range.
    """
    found = []
    for measure, value in values.items():
        ranges = [one for one in references(measure, "RL") if one.high is not None]
        if value is None or not ranges or (where := position(measure, value)) == "within":
            continue
        sft = [one for one in references(measure, "SFT") if one.high is not None and one.low <= value <= one.high]
        like_sft = f", and as published for SFT ({sft[0].label})" if sft else ""
        sources = "; ".join(one.label for one in ranges)
        name = MEASURES[measure]
        found.append(
            f"{name[0].upper()}{name[1:]}: {_shown(measure, value)}, {where} what was published ({sources}){like_sft}."
        )
    return found


def _shown(measure: Measure, value: float | None) -> str:
    return number(value) if measure == "run_jaccard" else percent(value)


def published_section(values: Mapping[Measure, float | None], title: str = "Beside what was published") -> Section:
    """A section that shows measured values beside the papers' ranges, and all published numbers collapsed.

    Args:
        values: shares in [0, 1] of the measures that were taken; None shows the published range alone.
        title: of the section.
    """
    labels = [MEASURES[measure] for measure in values]
    figure = Ranges(
        title="Measured values and published ranges",
        labels=labels,
        values=list(values.values()),
        references=[references(measure) for measure in values],
        axis="share",
        caption="Dots are this comparison; bars are the ranges over the papers' checkpoints.",
    )
    rows = [
        [
            MEASURES[measure],
            _shown(measure, value),
            "–" if value is None else position(measure, value),
            "; ".join(one.label for one in references(measure)),
        ]
        for measure, value in values.items()
    ]
    compared = Table(
        title="Measured and published",
        columns=["measure", "here", "against published RL", "published"],
        rows=rows,
        note="The published checkpoints are stored in bf16. Sparsity falls as training goes on (Mukherjee et al. "
        "2025, figure 5), so that a short run lies above the range.",
    )
    return Section(
        title=title,
        text="Does the update look like those of published RL checkpoints?",
        figures=[figure] if values else [],
        tables=[compared, published_table(list(values))],
    )


def published_table(measures: Sequence[Measure] = ()) -> Table:
    """The published numbers of some measures (of all when none is named), one row each."""
    kept = [one for one in PUBLISHED if not measures or one.measure in measures]
    shown = [
        {
            "model": one.model,
            "training": one.algorithm,
            "measure": MEASURES[one.measure],
            "value": _shown(one.measure, one.value),
            "chance": _shown(one.measure, one.baseline),
            "source": f"{one.paper}, {one.table}",
        }
        for one in kept
    ]
    numbers = [{"value": one.value, "chance": one.baseline} for one in kept]
    columns = ["model", "training", "measure", "value", "chance", "source"]
    if all(one.baseline is None for one in kept):
        columns.remove("chance")
    return Table(
        title="Published numbers",
        columns=columns,
        rows=[[row[column] for column in columns] for row in shown],
        raw=[[{**row, **more}[column] for column in columns] for row, more in zip(shown, numbers, strict=True)],
        note=f"{times(len(kept), 'number')} on public checkpoints.",
        terminal_rows=0,
        collapsed=True,
    )
