"""Tables as csv and json: the values behind the page, at full precision, for programs and spreadsheets."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
from example_document import example_document
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.errors import UserError
from ssrctl.report.document import Column, Document, Section, Table
from ssrctl.report.formats import count, number, percent
from ssrctl.report.tables import (
    csv_text,
    distinct_columns,
    json_text,
    plain_rows,
    slug,
    table_names,
    unique_slugs,
    write_tables,
)


def report(*tables: Table) -> Document:
    return Document(title="", facts=[], headlines=[], notes=[], sections=[Section(title="all", tables=list(tables))])


def table(title: str = "By layer", cell: int = 1234) -> Table:
    return Table(title=title, columns=["layer", Column("n", count)], rows=[["0", cell]])


@given(st.text(max_size=8))
def test_any_cell_can_be_written(text: str) -> None:
    shown = Table(title=text, columns=[text, text], rows=[[text, text]])
    csv_text(shown).encode("utf-8")
    assert len(json.loads(json_text(Section(title=text), shown))["rows"]) == 1


def test_csv_is_what_a_reader_expects() -> None:
    shown = Table(
        title="",
        columns=["tensor", Column("n", count), Column("share", percent)],
        rows=[['a "quoted", name\nof two lines', 1234, 0.814], ["é", None, 0.0]],
    )
    rows = list(csv.DictReader(io.StringIO(csv_text(shown))))
    assert rows == [
        {"tensor": 'a "quoted", name\nof two lines', "n": "1234", "share": "0.814"},
        {"tensor": "é", "n": "", "share": "0.0"},
    ]


@pytest.mark.parametrize("name", ["=HYPERLINK(1)", "+1+cmd", "-1+cmd", "@SUM(A1)", "\tx"])
def test_spreadsheets_run_no_formula_from_a_name(name: str) -> None:
    shown = Table(title="", columns=["tensor", "n"], rows=[[name, -0.5]])
    ((cell, value),) = list(csv.reader(io.StringIO(csv_text(shown))))[1:]
    assert cell == f"'{name}" and value == "-0.5"
    assert json.loads(json_text(Section(title=""), shown))["rows"] == [[name, -0.5]]  # exact where nothing runs it


def test_numbers_keep_their_precision_and_are_never_nan() -> None:
    columns = [Column("layer", count), Column("share", percent), Column("size", number)]
    shown = Table(title="", columns=columns, rows=[[0, 0.123456789, 1 / 3], [1, float("nan"), None]])
    assert shown.formatted(1) == [["0", "12.35%", "0.333"]]
    assert plain_rows(shown) == [[0, 0.123456789, 1 / 3], [1, None, None]]
    assert csv_text(shown) == f"layer,share,size\n0,0.123456789,{1 / 3}\n1,,\n"
    read = json.loads(json_text(Section(title=""), shown))["rows"]
    assert read == [[0, 0.123456789, 1 / 3], [1, None, None]]
    assert [float(cell) for cell in list(csv.reader(io.StringIO(csv_text(shown))))[1]] == read[0]


def test_rows_must_fit_the_columns() -> None:
    with pytest.raises(ValueError, match="2 columns, but a row of 1"):
        Table(title="t", columns=["a", "b"], rows=[["1"]])


def test_columns_of_one_name_are_told_apart() -> None:
    columns = ["pair", "shared", "chance", "Jaccard", "chance", "chance", "pair"]
    found = distinct_columns(Table(title="", columns=columns, rows=[]))
    assert found == [
        "pair",
        "shared",
        "shared: chance",
        "Jaccard",
        "Jaccard: chance",
        "Jaccard: chance (2)",
        "chance: pair",
    ]


@given(st.lists(st.text(max_size=80), max_size=5))
def test_slugs_are_plain_and_unique(titles: list[str]) -> None:
    found = unique_slugs(titles, taken=["index"])
    assert len(set(found)) == len(titles) and "index" not in found
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", one) for one in found)
    assert slug("Overlap by pair of units (i, j)") == "overlap-by-pair-of-units-i-j"
    assert slug("../../etc/passwd") == "etc-passwd" and slug("…") == "table" and len(slug("a b" * 100)) <= 60


def test_all_tables_of_a_report_are_written(tmp_path: Path) -> None:
    document = example_document(rows=520)
    written = write_tables(document, tmp_path / "tables")
    assert {path.name for path in written} == {path.name for path in (tmp_path / "tables").iterdir()}
    index = json.loads((tmp_path / "tables" / "index.json").read_text())
    assert [entry["name"] for entry in index] == [name for name, _, _ in table_names(document)]
    assert index[-2] == {"name": "all-tensors", "section": "All tensors", "title": "All tensors", "rows": 520}
    held = json.loads((tmp_path / "tables" / "all-tensors.json").read_text())
    read = list(csv.reader((tmp_path / "tables" / "all-tensors.csv").open(encoding="utf-8", newline="")))
    assert len(held["rows"]) == len(read) - 1 == 520 and held["columns"] == read[0]
    for row, line in zip(held["rows"], read[1:], strict=True):
        assert ["" if cell is None else str(cell) for cell in row] == line


def test_the_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    first = {path.name: path.read_bytes() for path in write_tables(example_document(rows=3), tmp_path / "a")}
    again = {path.name: path.read_bytes() for path in write_tables(example_document(rows=3), tmp_path / "b")}
    assert first == again


def test_tables_without_rows_have_no_files(tmp_path: Path) -> None:
    written = write_tables(report(Table(title="empty", columns=["a"], rows=[]), table()), tmp_path / "tables")
    assert [path.name for path in written] == ["by-layer.csv", "by-layer.json", "index.json"]


def test_files_of_an_earlier_report_are_removed_and_others_kept(tmp_path: Path) -> None:
    write_tables(report(table("Old"), table("By layer", 1)), tmp_path / "tables")
    folder = tmp_path / "tables"
    (folder / "mine.csv").write_text("kept")
    write_tables(report(table("By layer", 2)), tmp_path / "tables")
    assert sorted(path.name for path in folder.iterdir()) == ["by-layer.csv", "by-layer.json", "index.json", "mine.csv"]
    assert (folder / "by-layer.csv").read_text() == "layer,n\n0,2\n"


@pytest.mark.parametrize(
    "index",
    ['[{"name": "../outside"}, {"name": "a/b"}, {"name": 3}, {"name": "index"}, 7]', "{", "7", "\xff", "[" * 100_000],
)
def test_a_changed_index_removes_nothing_elsewhere(index: str, tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    (tmp_path / "outside.csv").write_text("kept")
    (folder / "index.json").write_bytes(index.encode("latin-1"))
    write_tables(report(table()), tmp_path / "tables")
    assert (tmp_path / "outside.csv").read_text() == "kept"
    assert [entry["name"] for entry in json.loads((folder / "index.json").read_text())] == ["by-layer"]


def test_a_folder_that_cannot_be_made_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "tables").write_text("a file in the way")
    with pytest.raises(UserError, match="cannot write"):
        write_tables(report(table()), tmp_path / "tables")
