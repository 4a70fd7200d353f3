"""The protocol of a measure, and the registry that `ssrctl diagnose` takes them from.

A measure is one class with three steps: ``tensor`` computes a part of each tensor, in a worker thread while the tensor
is in memory; ``combine`` makes a result of the parts; ``present`` puts it into words, tables and figures::

    @register
    class ChangedShare(PairMeasure[int, Share]):
        name = "changed-share"

        def tensor(self, pair: TensorPair) -> int:
            return int((pair.base != pair.tuned).sum())

        def combine(self, parts: Mapping[str, list[int]]) -> Share:
            return Share(sum(map(sum, parts.values())), sum(map(self.comparison.numel, parts)))

        def present(self, result: Share) -> Findings:
            return Findings(numbers={"changed_share": result.share}, headlines=[f"{percent(result.share)} changed."])

``ssrctl diagnose --measures changed-share`` then takes it, and json, csv, terminal and page show it.
"""

from __future__ import annotations

import abc
import importlib
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from ssrctl import measures
from ssrctl.checkpoints.pairs import Comparison, TensorPair, walk
from ssrctl.configs import DiagnoseConfig
from ssrctl.io.mask_log import StepMaskLog
from ssrctl.measures.published import PublishedKey
from ssrctl.report.document import Section

Part = TypeVar("Part")
Result = TypeVar("Result")

# The comparison: one checkpoint with its base, several of one base, checkpoints in the order of training, or all
# checkpoints of a run directory.
Mode = Literal["pair", "several", "series", "run"]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The presentation of a result.

    Attributes:
        numbers: for the json report, by key.
        headlines: the answer, in sentences with numbers.
        notes: sentences that a reader needs so as not to be misled.
        sections: figures and tables, those that answer before those that detail.
        details: further sections, shown below those of other measures.
        published: values to show next to published ones; None for one that is not defined here.
        failed: assertions that do not hold, in sentences; any makes the command exit with 4.
    """

    numbers: dict[str, Any] = field(default_factory=dict)
    headlines: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    details: list[Section] = field(default_factory=list)
    published: dict[PublishedKey, float | None] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def add(self, more: Findings) -> None:
        """Add everything of other findings but their numbers."""
        self.headlines.extend(more.headlines)
        self.notes.extend(more.notes)
        self.sections.extend(more.sections)
        self.details.extend(more.details)
        self.published.update(more.published)
        self.failed.extend(more.failed)


class Measure(abc.ABC, Generic[Part, Result]):
    """A family of numbers.

    Attributes:
        name: in `--measures`.
        also: further names in `--measures`, of parts of it.
        default_in: the modes in which it is taken unless `--measures` says otherwise.
        possible_in: the modes in which it can be taken at all.
        needs: the paths that it needs, for the error message.
        audits: True = shown for every checkpoint of several, with its headlines; other pair measures become
            collapsed details there.
    """

    name: ClassVar[str]
    also: ClassVar[tuple[str, ...]] = ()
    order: ClassVar[int] = 100
    default_in: ClassVar[frozenset[Mode]] = frozenset({"pair"})
    possible_in: ClassVar[frozenset[Mode]] = frozenset({"pair", "several", "series", "run"})
    needs: ClassVar[str] = ""
    audits: ClassVar[bool] = False

    def __init__(self, comparison: Comparison, config: DiagnoseConfig, run: Path | None = None) -> None:
        """Prepare to measure; read no weights yet.

        Args:
            comparison: the open checkpoints.
            config: the command's settings.
            run: the run directory that all checkpoints are of, if any.

        Raises:
            UserError: settings or files that this measure cannot work with.
        """
        self.comparison = comparison
        self.config = config
        self.run = run

    @classmethod
    def wanted(cls, config: DiagnoseConfig, mode: Mode) -> bool:
        """Return True if the measure is to be taken: asked for by name, or by default in this mode."""
        return mode in cls.possible_in and config.wants(cls.name, default=mode in cls.default_in)

    @abc.abstractmethod
    def combine(self, parts: Mapping[str, list[Part]]) -> Result:
        """Return the result from the parts of each tensor, by name, in the comparison's order.

        A tensor has one part, or with ``in_ranges`` one for each range, in order; a tensor without any is absent.
        """

    @abc.abstractmethod
    def present(self, result: Result) -> Findings:
        """Return headlines, notes, sections and numbers of a result."""


class PairMeasure(Measure[Part, Result]):
    """A measure of one checkpoint against its base, taken of each checkpoint by itself (of a series: of the last).

    Attributes:
        in_ranges: True = ``tensor`` reads a pair through ``pieces()`` only, so that tensors need not be whole in memory.
    """

    in_ranges: ClassVar[bool] = False

    @abc.abstractmethod
    def tensor(self, pair: TensorPair) -> Part | None:
        """Return the part of one tensor, None for no part; called in a worker thread."""

    def side_by_side(self, results: Mapping[str, Result]) -> list[Section]:
        """Return sections that show several checkpoints next to each other, by label; none by default."""
        return []


class JointMeasure(Measure[Part, Result]):
    """A measure of several checkpoints together, tensor by tensor."""

    @abc.abstractmethod
    def tensor(self, pairs: TensorSeries) -> Part | None:
        """Return the part of one tensor of all checkpoints, None for no part; called in a worker thread."""


class RunMeasure(Measure[Any, Result]):
    """A measure of a run's own logs; it reads no tensor, and ``combine`` gets no parts."""

    possible_in = frozenset({"run"})
    default_in = frozenset({"run"})
    needs = "a run directory"


class StepMeasure(abc.ABC, Generic[Part, Result]):
    """A measure of the coordinate sets of a run's steps (``--jaccard``), from its mask logs.

    Attributes:
        settings: of the run, from its config.yaml; empty when it has none.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    @abc.abstractmethod
    def log(self, log: StepMaskLog) -> Part:
        """Return the part of one logged training step.

        Raises:
            ValueError: a log that contradicts itself.
        """

    @abc.abstractmethod
    def combine(self, parts: Sequence[Part]) -> Result:
        """Return the result from the parts of all logged steps, in order."""

    @abc.abstractmethod
    def present(self, result: Result) -> Findings:
        """Return headlines, notes, sections and numbers of a result."""


class TensorSeries:
    """One tensor in all checkpoints; iterating yields each pair once, and drops its tensors when the next is taken.

    ``last`` may be read ahead of the iteration and stays in memory until the end.
    """

    def __init__(self, pairs: list[TensorPair], each: Mapping[int, Sequence[PairMeasure[Any, Any]]]) -> None:
        self.pairs = pairs
        self._parts: dict[tuple[str, int | None], Any] = {}
        self._each = each

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.pairs[0].name

    @property
    def last(self) -> TensorPair:
        """The pair of the last checkpoint."""
        return self.pairs[-1]

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[TensorPair]:
        before: TensorPair | None = None
        for place, pair in enumerate(self.pairs):
            if before is not None:
                pair.share_base(before)
                before.release()
            for measure in self._each.get(place, ()):
                if (measure.name, place) not in self._parts:
                    self._parts[measure.name, place] = measure.tensor(pair)
            yield pair
            before = pair

    def finish(self) -> dict[tuple[str, int | None], Any]:
        """Return the parts of the pair measures, by (name, place); take those that no iteration has taken."""
        wanted = {(measure.name, place) for place, some in self._each.items() for measure in some}
        if not wanted <= set(self._parts):
            for _ in self:
                pass
        return self._parts


_REGISTRY: dict[str, type[Measure[Any, Any]]] = {}
M = TypeVar("M", bound=Measure[Any, Any])


def register(measure: type[M]) -> type[M]:
    """Add a measure class to the registry; usable as a decorator.

    Raises:
        ValueError: another class has this name.
    """
    if _REGISTRY.setdefault(measure.name, measure) is not measure:
        raise ValueError(f"a measure of the name {measure.name!r} is registered already")
    return measure


def registered() -> dict[str, type[Measure[Any, Any]]]:
    """Return every measure by name, in the order of reports: all modules of this package, and those from outside."""
    for module in pkgutil.iter_modules(measures.__path__):
        importlib.import_module(f"{measures.__name__}.{module.name}")
    return dict(sorted(_REGISTRY.items(), key=lambda item: item[1].order))


# --------------------------------------------------------------------------------------------------
# taking measures


@dataclass(frozen=True)
class Taken(Generic[Result]):
    """A measure that was taken.

    Attributes:
        place: the number of the checkpoint, from 0; None for a measure of all of them.
    """

    measure: Measure[Any, Result]
    place: int | None
    result: Result
    findings: Findings


def take(
    comparison: Comparison, measures: Sequence[Measure[Any, Any]], mode: Mode, num_workers: int
) -> list[Taken[Any]]:
    """Walk the tensors once for all measures; return them in the order given, pair measures once per checkpoint.

    Of a series or a run, pair measures are taken of the last checkpoint only. Measures that read no tensors are taken
    before the walk, whose hours an error in them would lose.
    """
    joint = [one for one in measures if isinstance(one, JointMeasure)]
    pairwise = [one for one in measures if isinstance(one, PairMeasure)]
    last = len(comparison.tuned) - 1
    places = [last] if mode in ("series", "run") else list(range(last + 1))
    first = {one.name: one.combine({}) for one in measures if not isinstance(one, JointMeasure | PairMeasure)}
    keys = [(one, place) for one in measures for place in (places if isinstance(one, PairMeasure) else [None])]
    parts: dict[tuple[str, int | None], dict[str, list[Any]]] = {(one.name, place): {} for one, place in keys}

    def measure_tensor(name: str, start: int | None) -> dict[tuple[str, int | None], Any]:
        pairs = [TensorPair(comparison, checkpoint, name, start) for checkpoint in comparison.tuned]
        series = TensorSeries(pairs, dict.fromkeys(places, pairwise))
        found: dict[tuple[str, int | None], Any] = {(one.name, None): one.tensor(series) for one in joint}
        return found | series.finish()

    if joint or pairwise:
        names = " and ".join(dict.fromkeys(one.name for one in (*joint, *pairwise)))
        in_ranges = not joint and all(one.in_ranges for one in pairwise)
        for name, found in walk(
            comparison, measure_tensor, num_workers=num_workers, description=f"measuring {names}", in_ranges=in_ranges
        ):
            for key, part in found.items():
                if part is not None:
                    parts[key].setdefault(name, []).append(part)
    taken = []
    for one, place in keys:
        by_tensor = parts[one.name, place]
        in_order = {name: by_tensor[name] for name in comparison.names if name in by_tensor}
        result = first[one.name] if one.name in first else one.combine(in_order)
        taken.append(Taken(one, place, result, one.present(result)))
    return taken
