"""Output on stderr: notes, warnings, tables and progress. Results go to stdout or files."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssrctl.io.visible import visible
from ssrctl.process_rank import rank

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


@functools.cache
def console() -> Console:
    """Return the console of stderr; of several processes only the first one's shows anything."""
    from ssrctl.io.terminal import SafeConsole

    return SafeConsole(stderr=True, highlight=False, soft_wrap=True, quiet=rank() > 0)


def note(text: str) -> None:
    """Print one plain line; nothing in it is taken as markup."""
    console().print(text, markup=False)


def warn(text: str) -> None:
    """Print one line that begins with a coloured "warning"."""
    from rich.text import Text

    console().print(Text.assemble(("warning: ", "yellow"), text))


def show_plan(title: str, plan: dict[str, Any]) -> None:
    """Show the resolved plan of ``--dry-run`` as a two-column table, without the first prompt, which has its own line."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    for key, value in plan.items():
        if key == "first_prompt":
            continue
        table.add_row(key.replace("_", " "), Text(visible(_shown(value))))  # before the width is measured
    console().print(table)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items()) or "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def show_file_plan(reads: Sequence[Path], writes: Path, more: Mapping[str, Any]) -> dict[str, Any]:
    """Show and return the plan of a command that turns files into a file: the files it would read and write."""
    from rich.filesize import decimal

    size = sum(one.stat().st_size for one in reads)
    plan = {"reads": [str(one) for one in reads], "read_bytes": size, "writes": str(writes), **more}
    shown = {key: decimal(value) if key.endswith("_bytes") else value for key, value in plan.items()}
    show_plan("plan", shown | {"reads": f"{reads[0]}" + (f" and {len(reads) - 1} more" if reads[1:] else "")})
    return plan


def show_rates(results: Sequence[Any]) -> None:
    """Show the curve of ``--find-lr``: one row per learning rate, with a bar for the late reward."""
    from rich.table import Table

    table = Table("learning rate", "late reward", "", "late accuracy", "grad norm", box=None, pad_edge=False)
    rewards = [made.late_reward for made in results]
    known = [reward for reward in rewards if reward is not None]
    low, high = min(known), max(known)
    for made, reward in zip(results, rewards, strict=True):
        if reward is None:
            table.add_row(f"{made.learning_rate:.1e}", "broke" if made.broke else "-", "", "-", "-")
            continue
        bar = "█" * (1 + round(19 * (reward - low) / (high - low))) if high > low else "█"
        norm = f"{sum(made.grad_norm) / len(made.grad_norm):.3f}"
        table.add_row(f"{made.learning_rate:.1e}", f"{reward:+.3f}", bar, f"{made.late_accuracy:.3f}", norm)
    console().print(table)


def progress(*, unit: str, lines: bool = True, transient: bool = False) -> Progress:
    """Make a progress bar with count, elapsed time and time left; when stderr is not a terminal, a line now and then.

    Args:
        unit: of the counts.
        lines: False prints no lines, for a caller that prints its own.
        transient: remove the bar at the end.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    if lines and not console().is_terminal:
        from ssrctl.io.terminal import PlainProgress

        return PlainProgress(unit, console())
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=console(),
        transient=transient,
        disable=not console().is_terminal,
    )


def tracked(names: Sequence[str], what: str) -> Iterator[str]:
    """Yield the names one by one, with a progress bar on stderr."""
    with progress(unit="tensors") as bar:
        task = bar.add_task(what, total=len(names), status="")
        for name in names:
            yield name
            bar.update(task, advance=1)
