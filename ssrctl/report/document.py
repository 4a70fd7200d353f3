"""The parts of a report: plain data that the terminal and the html page both show.

A family of measures turns its numbers into ``Section``s; nothing here knows the families. Numbers that are
None, NaN or infinite are left blank in figures. Text may come from files: whatever shows it escapes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ssrctl.report.formats import text

Numbers = Sequence[float | None]
Cell = float | int | str | None
Interval = tuple[float, float]
Format = Callable[[Any], str]


@dataclass(frozen=True)
class Reference:
    """A published value or range, or the value expected by chance, that a figure shows next to the measured ones.

    Attributes:
        label: what it is, and its source: ``Mukherjee et al. 2025, table 1: 68.5-96.0%``.
        low: the value, or the lower end, in the units of the figure's numbers.
        high: the upper end of a range; None for a single value, drawn as a line.
    """

    label: str
    low: float
    high: float | None = None


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, and how a cell's value is written for people.

    Attributes:
        format: writes one value; the terminal and the page show its text, csv and json hold the value itself.
            ``formats.text`` marks a column of words, aligned left; all others are numbers, aligned right. A list
            has a format for each row, where rows have different units.
    """

    name: str
    format: Format | Sequence[Format] = text

    def written(self, row: int, value: Cell) -> str:
        """Return the text of the value in a row."""
        return self.format(value) if callable(self.format) else self.format[row](value)


@dataclass(kw_only=True)
class Table:
    """Rows of values; each column says how its values are written.

    Attributes:
        columns: a heading by itself is a column of words.
        rows: raw values (numbers at full precision, shares in [0, 1], None where there is no value).
        terminal_rows: the terminal leaves longer tables to the page and names them; 0 leaves any.

    Raises:
        ValueError: a row with another number of cells than there are columns.
    """

    title: str
    columns: Sequence[Column | str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    terminal_rows: int = 16

    def __post_init__(self) -> None:
        if wrong := [len(row) for row in self.rows if len(row) != len(self.columns)]:
            raise ValueError(f"table {self.title!r}: {len(self.columns)} columns, but a row of {wrong[0]} cells")
        self._columns = [Column(one) if isinstance(one, str) else one for one in self.columns]

    @property
    def headings(self) -> list[str]:
        """The columns' names."""
        return [one.name for one in self._columns]

    @property
    def words(self) -> list[bool]:
        """For each column: True = words, aligned left; False = numbers. The first column names the row."""
        return [place == 0 or one.format is text for place, one in enumerate(self._columns)]

    def formatted(self, limit: int | None = None) -> list[list[str]]:
        """Return the first ``limit`` rows (all by default) as people read them."""
        return [
            [column.written(place, cell) for column, cell in zip(self._columns, row, strict=True)]
            for place, row in enumerate(self.rows[:limit])
        ]


@dataclass(kw_only=True)
class Heatmap:
    """A matrix, ``values[row][column]``; None is left blank. Up to 80 columns can be told apart.

    Attributes:
        labels: of rows and of columns, where they are the same.
        row_labels: of rows; ``labels`` when empty.
        column_labels: of columns; ``labels`` when empty.
        axis: label of both axes.
        row_axis: label of the rows; ``axis`` when empty.
        column_axis: label of the columns; ``axis`` when empty.
        centre: the value without colour. Larger ones take the first hue, smaller ones the second: with the least
            value as centre the scale is sequential, with a baseline in the middle it is diverging.
        scale: the distance from ``centre`` drawn in full colour; None is the largest there is.
        decimals: of the numbers in the cells, which are written only where they are few.
        shares: numbers are shares and shown as percentages (``decimals`` then counts those of the percentage).
        log: a logarithmic scale from the least positive value to the largest; 0, the centre, has no colour.
        marginals: bars at the top and on the right show the mean of each column and row.

    Raises:
        ValueError: values of another shape than the labels, or a logarithmic scale around another centre than 0.
    """

    title: str
    values: Sequence[Numbers]
    labels: Sequence[str] = ()
    row_labels: Sequence[str] = ()
    column_labels: Sequence[str] = ()
    axis: str = ""
    row_axis: str = ""
    column_axis: str = ""
    centre: float = 0.0
    scale: float | None = None
    decimals: int = 3
    shares: bool = False
    log: bool = False
    marginals: bool = False
    caption: str = ""

    def __post_init__(self) -> None:
        if self.log and self.centre:
            raise ValueError(f"heat map {self.title!r}: a logarithmic scale has no centre, not {self.centre}")
        self.row_labels = self.row_labels or self.labels
        self.column_labels = self.column_labels or self.labels
        self.row_axis = self.row_axis or self.axis
        self.column_axis = self.column_axis or self.axis
        shape = (len(self.row_labels), len(self.column_labels))
        if len(self.values) != shape[0] or any(len(row) != shape[1] for row in self.values):
            raise ValueError(f"heat map {self.title!r}: its values do not have the shape of its labels, {shape}")


@dataclass(kw_only=True)
class SeriesFigure:
    """Series of values by name, over common places; a series named ``expected ...`` is drawn grey.

    Attributes:
        intervals: per series, (low, high) around each value.
        references: published values, drawn across the whole figure.
    """

    along: ClassVar[str]  # name of the field that holds the places
    title: str
    series: Mapping[str, Numbers]
    intervals: Mapping[str, Sequence[Interval | None]] = field(default_factory=dict)
    references: Sequence[Reference] = ()
    caption: str = ""

    @property
    def places(self) -> Sequence[Any]:
        """The places that every series has a value for."""
        places: Sequence[Any] = getattr(self, self.along)
        return places

    def __post_init__(self) -> None:
        intervals = {f"interval of {name}": values for name, values in self.intervals.items()}
        _check_lengths(self.title, self.places, {**self.series, **intervals})


@dataclass(kw_only=True)
class Dots(SeriesFigure):
    """A row for each label, with a dot for each series on one axis that fits the numbers.

    Attributes:
        axis: meaning of the dots' places.
        shares: the axis is in per cent.
        log: a logarithmic axis; zeros are hollow dots at its lower end.
    """

    along = "labels"
    labels: Sequence[str]
    axis: str
    shares: bool = True
    log: bool = False


@dataclass(kw_only=True)
class Lines(SeriesFigure):
    """Series over a common x; an expected one is dashed, too, and intervals are drawn as a ribbon.

    Attributes:
        log_x, log_y: logarithmic axes; zeros are hollow marks at the lower end of y and left out of x.
        shares: y is shown in per cent.
    """

    along = "x"
    x: Sequence[float]
    x_label: str
    y_label: str
    log_x: bool = False
    log_y: bool = False
    shares: bool = False


Figure = Heatmap | Dots | Lines


# Values that differ by more than this factor are drawn on a logarithmic scale.
_DECADES = 30


def spans_decades(values: Iterable[float | None]) -> bool:
    """Return True if values need a logarithmic scale: none is negative, and the positive ones differ by decades."""
    found = [value for value in values if value is not None]
    positive = [value for value in found if value > 0]
    return bool(positive) and min(found) >= 0 and max(positive) > _DECADES * min(positive)


def _check_lengths(title: str, along: Sequence[Any], series: Mapping[str, Sequence[Any]]) -> None:
    for name, values in series.items():
        if len(values) != len(along):
            raise ValueError(f"figure {title!r}: {name!r} has {len(values)} values for {len(along)} places")


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """A response whose parts are coloured by their score; only the page shows it.

    Attributes:
        parts: (text, score in [-1, 1]); None for a part without a score.
    """

    title: str
    question: str
    parts: Sequence[tuple[str, float | None]]


@dataclass(kw_only=True)
class Section:
    """A heading with text, figures, tables and transcripts.

    Attributes:
        collapsed: a detail that the page shows only when asked to.
    """

    title: str
    text: str = ""
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    transcripts: list[Transcript] = field(default_factory=list)
    collapsed: bool = False


@dataclass(kw_only=True)
class Document:
    """A report that reads from top to bottom as an answer.

    Attributes:
        facts: the inputs, as (name, value).
        headlines: the answer, in sentences with numbers.
        unusual: unexpected values, in sentences; shown right under the headlines.
        notes: sentences that a reader needs so as not to be misled.
        sections: tables and figures, those that answer before those that detail.
    """

    title: str
    facts: list[tuple[str, str]]
    headlines: list[str]
    notes: list[str]
    sections: list[Section]
    unusual: list[str] = field(default_factory=list)
