"""Output through rich: a console that shows no text as commands, and progress that is also seen in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import Progress, TaskID
from rich.segment import Segment

from ssrctl.io.visible import visible

LINE_SECONDS = 15.0  # between two lines of progress where there is no terminal


class SafeConsole(Console):
    """A console that makes control characters of all text visible; rich's own styles and cursor movements stay."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


class PlainProgress(Progress):
    """Progress as plain lines, the first after ``LINE_SECONDS``; draws no bar.

    Args:
        unit: of the counts.
        console: where to print.
        get_time: seconds on a clock that is never set back.
    """

    def __init__(self, unit: str, console: Console, get_time: Callable[[], float] = time.monotonic) -> None:
        super().__init__(console=console, disable=True, get_time=get_time)
        self._unit = unit
        self._last = get_time()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._line(task_id)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._line(task_id)

    def _line(self, task_id: TaskID) -> None:
        now = self.get_time()
        if now - self._last < LINE_SECONDS:
            return
        self._last = now
        task = self._tasks[task_id]
        count = f"{task.completed:g}" if task.total is None else f"{task.completed:g}/{task.total:g}"
        left = "" if task.time_remaining is None else f", {_clock(task.time_remaining)} left"
        line = f"{task.description}: {count} {self._unit} in {_clock(task.elapsed or 0)}{left}"
        self.console.print(f"{line}  {task.fields.get('status', '')}".rstrip(), markup=False)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
