"""Text of others on the terminal, and progress without one."""

from __future__ import annotations

import io

import pytest
from rich.table import Table
from rich.text import Text

from ssrctl.cli.glue import say_error, warn
from ssrctl.io import console
from ssrctl.io.terminal import PlainProgress, SafeConsole
from ssrctl.io.visible import visible
from ssrctl.report.document import Document
from ssrctl.report.render import html_page

HOSTILE = "a\x1b[31mred\x9b2J\u202egnp\x07\rb"
SHOWN = r"a\x1b[31mred\x9b2J\u202egnp\x07\x0db"


def test_what_would_command_a_terminal_is_made_visible() -> None:
    assert visible(HOSTILE) == SHOWN
    assert visible("tab\tand\nline, ü 漢字 🙂") == "tab\tand\nline, ü 漢字 🙂"
    assert visible("\ud800") == r"\ud800"


def test_messages_and_tables_show_it_and_keep_their_own_colours() -> None:
    stream = io.StringIO()
    screen = SafeConsole(file=stream, force_terminal=True, width=80, color_system="standard", no_color=False)
    table = Table(title=Text(HOSTILE))
    table.add_column("x")
    table.add_row(Text(HOSTILE))
    screen.print(table)
    screen.print(Text.assemble(("warning: ", "yellow"), HOSTILE))
    out = stream.getvalue()
    assert "\x1b[33mwarning: \x1b[0m" in out and "\x1b[31m" not in out
    assert not set("\x9b\u202e\x07\r") & set(out) and r"\x1b[31mred" in out


def test_every_way_to_stderr_is_covered(capfd: pytest.CaptureFixture[str]) -> None:
    console.console.cache_clear()
    console.note(HOSTILE)
    console.warn(HOSTILE)
    console.show_plan("plan", {"reads": HOSTILE})
    say_error(HOSTILE, HOSTILE)
    warn(HOSTILE)
    err = capfd.readouterr().err
    # rich drops bells and carriage returns from styled text
    assert err.count(r"a\x1b[31mred\x9b2J\u202egnp") == 6
    assert "\x1b" not in err and "\u202e" not in err and "\x9b" not in err


def test_a_page_shows_it_too() -> None:
    pytest.importorskip("jinja2")
    page = html_page(Document(title=HOSTILE, facts=[], headlines=[], notes=[], sections=[]), "1")
    assert "\u202e" not in page and "\x1b" not in page and r"\u202e" in page


def test_progress_is_a_line_now_and_then_without_a_terminal() -> None:
    now = 100.0
    stream = io.StringIO()
    with PlainProgress("samples", SafeConsole(file=stream, width=120), lambda: now) as bar:
        task = bar.add_task("eval", total=100, completed=0, status="")
        bar.update(task, advance=10)
        assert stream.getvalue() == ""
        now += 20
        bar.update(task, advance=10, status="$0.10")
        bar.advance(task)
        assert stream.getvalue().startswith("eval: 20/100 samples in 0:00:20")
        assert stream.getvalue().endswith("  $0.10\n") and stream.getvalue().count("\n") == 1
        now += 20
        bar.advance(task)
    assert stream.getvalue().count("\n") == 2 and "eval: 22/100 samples" in stream.getvalue()


def test_a_log_gets_lines_and_a_terminal_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "console", lambda: SafeConsole(file=io.StringIO(), force_terminal=False))
    assert isinstance(console.progress(unit="x"), PlainProgress)
    assert not isinstance(console.progress(unit="x", lines=False), PlainProgress)
    monkeypatch.setattr(console, "console", lambda: SafeConsole(file=io.StringIO(), force_terminal=True))
    assert not isinstance(console.progress(unit="x"), PlainProgress)
