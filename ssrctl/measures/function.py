"""Functional distance of a base and its checkpoints on prompts, and the part of it that the largest changes make.

For each prompt the mean over its positions of KL(base || tuned) and KL(tuned || base) of the next-token distributions,
in nats, computed with float32 weights; a prompt is the unit of means and intervals. The prune curve takes parts of the
update (``maths.pruned_update``): base weights with only the largest changes, next to as many random ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ssrctl.checkpoints.pairs import Checkpoint, Comparison
from ssrctl.checkpoints.reader import DeltaReader, TensorReader
from ssrctl.configs import DiagnoseConfig
from ssrctl.errors import UserError
from ssrctl.evaluation.intervals import Estimate, mean_interval
from ssrctl.io.console import progress
from ssrctl.io.prompt_sets import load_prompt_set, prompt_set_path
from ssrctl.measures.base import Findings, Measure, Mode, register
from ssrctl.measures.group_tables import RowColumn, row_table
from ssrctl.measures.maths.averages import ratio
from ssrctl.measures.maths.pruned_update import Order, PrunedUpdate
from ssrctl.models.function_probe import FunctionProbe, divergences
from ssrctl.models.stored_parameters import StoredParameters, stored_parameters
from ssrctl.report.document import Column, Dots, Figure, Lines, Section, Table, spans_decades
from ssrctl.report.formats import count, number, percent

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_ORDERS: tuple[Order, ...] = ("largest", "random")
_MOST_SENTENCES = 4


@dataclass(frozen=True, kw_only=True)
class PrunePoint:
    """An update of which a share of the changes is kept; all divergences are means over prompts, nats per token.

    Attributes:
        share: of the changed weights.
        num_kept: changed weights that are kept of the largest; the random part has as many, ties of its draws aside.
        largest_kl, random_kl: KL(base || part).
        largest_frac, random_frac: the same over KL(base || tuned); None where that is 0.
        largest_left, random_left: KL(tuned || part).
    """

    share: float
    num_kept: int
    largest_kl: float
    random_kl: float
    largest_frac: float | None
    random_frac: float | None
    largest_left: float
    random_left: float


@dataclass(frozen=True, kw_only=True)
class Distance:
    """The functional distance of a checkpoint from its base.

    Attributes:
        base_tuned: KL(base || tuned), mean over prompts with its interval.
        tuned_base: KL(tuned || base).
        same_top_frac: share of positions at which both prefer the same token, mean over prompts.
        num_changed: weights whose values differ; None without a prune curve.
        curve: the prune curve; empty where it was not asked for, or nothing changed.
    """

    base_tuned: Estimate
    tuned_base: Estimate
    same_top_frac: float
    num_changed: int | None = None
    curve: tuple[PrunePoint, ...] = ()

    def numbers(self) -> dict[str, Any]:
        """Return the form of the json report."""
        found: dict[str, Any] = {
            "kl_base_tuned": asdict(self.base_tuned),
            "kl_tuned_base": asdict(self.tuned_base),
            "same_top_frac": self.same_top_frac,
        }
        if self.num_changed is not None:
            found["prune"] = {"num_changed": self.num_changed, "curve": [asdict(one) for one in self.curve]}
        return found


@dataclass(frozen=True, kw_only=True)
class FunctionResult:
    """Functional distances.

    Attributes:
        prompts: name of the prompt set.
        num_positions: token positions of all prompts.
        steps: the training step of each checkpoint, where these are of one run in order; else empty.
        distances: by the checkpoint's label.
    """

    prompts: str
    num_prompts: int
    num_positions: int
    steps: list[int]
    distances: dict[str, Distance]

    def numbers(self) -> dict[str, Any]:
        """Return the form of the json report."""
        return {
            "prompts": self.prompts,
            "num_prompts": self.num_prompts,
            "num_positions": self.num_positions,
            "checkpoints": [{"label": label} | one.numbers() for label, one in self.distances.items()],
        }


# --------------------------------------------------------------------------------------------------
# one checkpoint


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def measure_distance(
    probe: FunctionProbe, tuned: StoredParameters | DeltaReader, *, prune: bool, seed: int, tick: Callable[[], None]
) -> Distance:
    """Measure one checkpoint; its values stay in the model.

    Args:
        tuned: the checkpoint, with the tensors of ``probe.base``.
        prune: measure the prune curve as well.
        seed: of its random parts and of the order of equal changes.
        tick: called after each model that was measured.
    """
    names = list(probe.base.names)
    probe.put(names, tuned.tensor)
    logits = probe.logits()
    tick()
    forward, backward = divergences(probe.reference, logits)
    pairs = zip(probe.reference, logits, strict=True)
    same = _mean([float((a.argmax(-1) == b.argmax(-1)).double().mean()) for a, b in pairs])
    update = PrunedUpdate(names, probe.base.tensor, tuned.tensor, seed) if prune else None
    return Distance(
        base_tuned=mean_interval(forward, least=0.0),
        tuned_base=mean_interval(backward, least=0.0),
        same_top_frac=same,
        num_changed=None if update is None else update.num_changed,
        curve=() if update is None else _prune_curve(probe, update, logits, _mean(forward), tick),
    )


def _prune_curve(
    probe: FunctionProbe, update: PrunedUpdate, tuned: Sequence[Tensor], whole: float, tick: Callable[[], None]
) -> tuple[PrunePoint, ...]:
    """Measure parts of an update.

    Args:
        tuned: logits ``[T, V]`` of the whole update on each prompt.
        whole: KL(base || tuned).
    """
    if not update.num_changed:
        return ()
    found: dict[float, dict[str, Any]] = {share: {"num_kept": update.num_changed} for share in SHARES}
    for order in _ORDERS:
        found[1.0] |= {f"{order}_kl": whole, f"{order}_frac": ratio(whole, whole), f"{order}_left": 0.0}
        for share, threshold in update.thresholds(order, SHARES[:-1]).items():
            num_kept = _put_part(probe, update, order, threshold)
            logits = probe.logits()
            tick()
            kl, left = (_mean(divergences(of, logits)[0]) for of in (probe.reference, tuned))
            found[share] |= {f"{order}_kl": kl, f"{order}_frac": ratio(kl, whole), f"{order}_left": left}
            if order == "largest":
                found[share]["num_kept"] = num_kept
    return tuple(PrunePoint(share=share, **values) for share, values in found.items())


def _put_part(probe: FunctionProbe, update: PrunedUpdate, order: Order, threshold: float) -> int:
    """Give the model the base's weights with a part of the update; return the number of changes in it."""
    counts = []

    def part(name: str) -> Tensor:
        values, num_kept = update.kept(name, order, threshold)
        counts.append(num_kept)
        return values

    probe.put(update.names, part)
    return sum(counts)


# --------------------------------------------------------------------------------------------------
# the measure


@register
class FunctionMeasure(Measure[Any, FunctionResult]):
    """The functional distance of each checkpoint from its base; only where it is named, since models are loaded."""

    name = "function"
    also = ("prune",)
    order = 90
    default_in = frozenset()

    @classmethod
    def wanted(cls, config: DiagnoseConfig, mode: Mode) -> bool:
        """Return True if the distance or the prune curve was asked for."""
        return any(config.wants(name, default=False) for name in (cls.name, *cls.also))

    def __init__(self, comparison: Comparison, config: DiagnoseConfig, run: Path | None = None) -> None:
        """Check that every checkpoint has the parameters of its base's model, and read the prompts; load no weights.

        Raises:
            UserError: a base without config.json, other parameters, prompts that cannot be read, or settings that
                restrict the tensors.
        """
        super().__init__(comparison, config, run)
        if config.layers or config.include or config.exclude:
            raise UserError(
                "function and prune measure whole models",
                "leave out --layers, --include and --exclude, or these measures",
            )
        for one in comparison.tuned:
            with self._opened(one):
                pass
        first = comparison.base.label
        path = prompt_set_path(config.prompts or "auto", first)
        self._texts = [prompt.text for prompt in load_prompt_set(path)]
        self._prompts = path.stem

    @contextlib.contextmanager
    def _opened(self, checkpoint: Checkpoint) -> Iterator[tuple[StoredParameters, StoredParameters | DeltaReader]]:
        """Open (the base, the checkpoint) once more, under the names of the model's parameters."""
        base = self.comparison.base_of(checkpoint)
        if not (base.folder / "config.json").is_file():
            raise UserError(
                f"function and prune load models, and there is no config.json next to {base.label}",
                "name a model folder as BASE, or leave these measures out",
            )
        with contextlib.ExitStack() as stack:
            ours = stored_parameters(stack.enter_context(TensorReader(base.path)))
            theirs: StoredParameters | DeltaReader
            if isinstance(checkpoint.reader, DeltaReader):
                theirs = checkpoint.reader
            else:
                reader = stack.enter_context(checkpoint.reader.reopened(ours.shapes))
                reader.align(ours.shapes)
                theirs = stored_parameters(reader)
            differing = [
                name
                for name in sorted(ours.shapes.keys() | theirs.shapes.keys())
                if ours.shapes.get(name) != theirs.shapes.get(name)
            ]
            if differing:
                name = differing[0]
                shapes = (list(one.shapes[name]) if name in one.shapes else "absent" for one in (ours, theirs))
                raise UserError(
                    f"function and prune: {checkpoint.label} does not have the parameters of {base.label}, {len(differing)} "
                    "differ, first {}: {} in BASE, {} in TUNED".format(name, *shapes),
                    "leave these measures out of --measures",
                )
            yield ours, theirs

    def combine(self, parts: Mapping[str, list[Any]]) -> FunctionResult:
        """Measure every checkpoint; a base of several is loaded once. The parts are not used."""
        in_order = self.config.series or self.run is not None
        tuned = self.comparison.tuned
        pruned = [one for one in tuned if self.config.wants("prune", default=False)][-1 if in_order else 0 :]
        total = len(tuned) + 2 * (len(SHARES) - 1) * len(pruned)
        distances: dict[str, Distance] = {}
        probe: FunctionProbe | None = None
        with progress(unit="models", transient=True) as bar:
            shown = bar.add_task("measuring function", total=total, status="")
            for checkpoint in sorted(tuned, key=lambda one: str(self.comparison.base_of(one).path)):
                with self._opened(checkpoint) as (base, other):
                    if probe is None or probe.base.reader.path != base.reader.path:
                        probe = None  # before another model is loaded
                        probe = FunctionProbe(base, self._texts)
                    probe.base = base  # whose files are open
                    distances[checkpoint.label] = measure_distance(
                        probe,
                        other,
                        prune=checkpoint in pruned,
                        seed=self.config.seed,
                        tick=lambda: bar.advance(shown),
                    )
        assert probe is not None
        steps = [one.step for one in tuned if one.step is not None]
        return FunctionResult(
            prompts=self._prompts,
            num_prompts=len(probe.ids),
            num_positions=sum(one.numel() for one in probe.ids),
            steps=steps if in_order and len(steps) == len(tuned) and steps == sorted(set(steps)) else [],
            distances={one.label: distances[one.label] for one in tuned},
        )

    def present(self, result: FunctionResult) -> Findings:
        """Return sentences, figures and tables of the distances and prune curves."""
        return Findings(
            numbers={"function": result.numbers()}, headlines=headlines(result), sections=[function_section(result)]
        )


# --------------------------------------------------------------------------------------------------
# sentences, tables and figures


def headlines(result: FunctionResult) -> list[str]:
    """Return the distance, and the part of it that the largest tenth of the changes makes, in a sentence for each checkpoint.

    Of a run those of the last, of more than ``_MOST_SENTENCES`` checkpoints the nearest and the farthest.
    """
    found = list(result.distances.items())
    if result.steps:
        found = found[-1:]
    elif len(found) > _MOST_SENTENCES:
        found.sort(key=lambda item: item[1].base_tuned.value)
        found = [found[0], found[-1]]
    several = len(result.distances) > 1
    return [
        f"As {'a function, ' + label + ' differs from its base' if several else 'functions, the two differ'} by KL(base, tuned) "
        f"{_with_interval(one.base_tuned)} and KL(tuned, base) {_with_interval(one.tuned_base)} nats per token{_tenth(one)}."
        for label, one in found
    ]


def _tenth(one: Distance) -> str:
    point = next((point for point in one.curve if point.share == 0.1), None)
    if point is None or point.largest_frac is None:
        return ""
    return (
        f"; the largest 10% of the changes give {percent(point.largest_frac)} of the former, a random 10% "
        f"{percent(point.random_frac)}"
    )


def _with_interval(one: Estimate) -> str:
    return f"{number(one.value)} ({number(one.low)} to {number(one.high)})"


_COLUMNS: tuple[RowColumn, ...] = (
    ("KL(base, tuned)", "base_tuned.value", number),
    ("from", "base_tuned.low", number),
    ("to", "base_tuned.high", number),
    ("KL(tuned, base)", "tuned_base.value", number),
    ("from", "tuned_base.low", number),
    ("to", "tuned_base.high", number),
    ("same top token", "same_top_frac", percent),
)
_CURVE: tuple[RowColumn, ...] = (
    ("weights", "num_kept", count),
    ("KL, largest", "largest_kl", number),
    ("of whole", "largest_frac", percent),
    ("KL, random", "random_kl", number),
    ("of whole, random", "random_frac", percent),
    ("left, largest", "largest_left", number),
    ("left, random", "random_left", number),
)


def function_section(result: FunctionResult) -> Section:
    """Return the section on functional distance and prune curves."""
    note = "Nats per token; 95% intervals over prompts (Student's t). Same top token: share of positions."
    tables: list[Table] = [row_table("Functional distance", "checkpoint", result.distances, _COLUMNS, note)]
    curves = {label: one for label, one in result.distances.items() if one.curve}
    for label, one in curves.items():
        of = f" of {label}" if len(curves) > 1 else ""
        tables.append(
            row_table(
                f"Prune curve{of}",
                Column("changes kept", percent),
                {point.share: point for point in one.curve},
                _CURVE,
                "KL(base, part) in nats per token and over that of the whole update, for the largest changes of all tensors "
                "together and for as many random ones. Left: KL(tuned, part).",
            )
        )
    return Section(
        title="Functional distance",
        text=f"How far apart are the models as functions? On {count(result.num_positions)} positions of "
        f"{result.num_prompts} prompts ({result.prompts}), with float32 weights.",
        figures=[*_distance_figures(result), *_curve_figures(curves)],
        tables=tables,
    )


def _distance_figures(result: FunctionResult) -> list[Figure]:
    """Return the distances over a run, or next to one another; none for a single one, which a sentence tells."""
    found = result.distances.values()
    if len(found) == 1:
        return []
    sides = {"KL(base, tuned)": [one.base_tuned for one in found], "KL(tuned, base)": [one.tuned_base for one in found]}
    series = {name: [one.value for one in estimates] for name, estimates in sides.items()}
    intervals = {name: [(one.low, one.high) for one in estimates] for name, estimates in sides.items()}
    if result.steps:
        over_run = Lines(
            title="Functional distance from the base over the run",
            x=result.steps,
            series=series,
            intervals=intervals,
            x_label="training step",
            y_label="nats per token",
            caption="Ribbons: 95% intervals over prompts (compare Zhu et al. 2025, figures 9 and 15).",
        )
        return [over_run]
    values = [value for of in series.values() for value in of]
    dots = Dots(
        title="Functional distance from the base",
        labels=list(result.distances),
        series=series,
        intervals=intervals,
        axis="nats per token",
        shares=False,
        log=spans_decades(values),
        caption="95% intervals over prompts.",
    )
    return [dots]


def _curve_figures(curves: Mapping[str, Distance]) -> list[Figure]:
    if not curves:
        return []
    x = [100 * share for share in SHARES]
    whole: dict[str, list[float | None]] = {}
    left: dict[str, list[float | None]] = {}
    for label, one in curves.items():
        of = f", {label}" if len(curves) > 1 else ""
        for order, name in (("largest", f"largest changes{of}"), ("random", f"expected, random changes{of}")):
            whole[name] = [getattr(point, f"{order}_frac") for point in one.curve]
            left[name] = [getattr(point, f"{order}_left") for point in one.curve]
    return [
        Lines(
            title="The function of parts of the update",
            x=x,
            series=whole,
            x_label="changed weights that are kept, per cent",
            y_label="KL(base, part) over that of the whole",
            log_x=True,
            shares=True,
            caption="KL grows with the square of a small change: a tenth of the changes gives about 10% where changes are "
            "independent of one another, and 1% where they all act alike.",
        ),
        Lines(
            title="Distance left to the tuned model",
            x=x,
            series=left,
            x_label="changed weights that are kept, per cent",
            y_label="KL(tuned, part), nats per token",
            log_x=True,
        ),
    ]
