"""An output that is filled in any order, killed, and finished by the next run."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssrctl.errors import UserError
from ssrctl.io.resumable import ResumableOutput


def opened(path, identity="a", is_done=lambda row: row["made"] is not None):
    return ResumableOutput(path, identity=identity, identity_field="by", made_fields=["made"], is_done=is_done)


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def inputs(count):
    return [{"id": f"q{i}", "text": "x" * i} for i in range(count)]


def run(path, rows, finish_order, identity="a", value=1):
    """Do the rows of ``finish_order`` and stop there; returns the positions that were asked for."""
    output = opened(path, identity)
    asked = {place: output.reserve(row) for place, row in enumerate(rows)}
    todo = [place for place, position in asked.items() if position is not None]
    for place in finish_order:
        if place in todo:
            output.add(asked[place], rows[place] | {"made": value})
    if output.num_done == len(rows):
        output.finish()
    else:
        output.close()
    return todo


@settings(max_examples=60, deadline=None, derandomize=True)
@given(order=st.permutations(range(6)), cut=st.integers(0, 6))
def test_killed_anywhere_and_run_again_gives_the_file_of_one_run(tmp_path_factory, order, cut):
    path = tmp_path_factory.mktemp("out") / "out.jsonl"
    rows = inputs(6)
    assert run(path, rows, order[:cut]) == list(range(6))
    assert path.exists() == (cut == 6)
    assert sorted(run(path, rows, range(6))) == ([] if cut == 6 else sorted(set(range(6)) - set(order[:cut])))
    assert rows_of(path) == [row | {"made": 1, "by": "a"} for row in rows]
    assert [file.name for file in path.parent.iterdir()] == ["out.jsonl"]


def test_a_torn_last_line_is_done_again(tmp_path):
    path = tmp_path / "out.jsonl"
    run(path, inputs(3), [2, 0])
    partial = tmp_path / "out.jsonl.partial"
    partial.write_bytes(partial.read_bytes()[:-9])
    assert run(path, inputs(3), range(3)) == [0, 1]
    assert [row["made"] for row in rows_of(path)] == [1, 1, 1]


def test_a_finished_file_is_mended_where_rows_are_not_done(tmp_path):
    path = tmp_path / "out.jsonl"
    rows = inputs(3)
    output = opened(path)
    for place, row in enumerate(rows):
        output.add(output.reserve(row), row | {"made": None if place == 1 else 1})
    output.finish()
    assert run(path, rows, range(3), value=2) == [1]
    assert [row["made"] for row in rows_of(path)] == [1, 2, 1]


def test_another_input_is_done_and_leaves_no_old_row(tmp_path):
    path = tmp_path / "out.jsonl"
    run(path, inputs(3), range(3))
    changed = inputs(3)
    changed[1]["text"] = "other"
    changed = [changed[2], changed[1], {"id": "new", "text": ""}]
    assert run(path, changed, range(3), value=2) == [1, 2]
    assert [(row["id"], row["made"]) for row in rows_of(path)] == [("q2", 1), ("q1", 2), ("new", 2)]


def test_what_the_work_replaces_does_not_tell_inputs_apart(tmp_path):
    path = tmp_path / "out.jsonl"
    run(path, inputs(2), range(2))
    again = [row | {"made": "old", "by": "before"} for row in inputs(2)]
    assert run(path, again, range(2)) == []


def test_other_settings_replace_a_finished_file_but_not_an_unfinished_one(tmp_path):
    path = tmp_path / "out.jsonl"
    run(path, inputs(2), range(2))
    assert run(path, inputs(2), range(2), identity="b", value=2) == [0, 1]
    assert [(row["by"], row["made"]) for row in rows_of(path)] == [("b", 2)] * 2
    run(path, inputs(4), [2], identity="b")
    with pytest.raises(UserError, match=r"out\.jsonl\.partial:1 was made with other settings \('b', now 'c'\)"):
        opened(path, "c")
    assert (tmp_path / "out.jsonl.partial").exists()


def test_a_foreign_file_at_the_output_is_not_used(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'\xff\xfe no json\n[1]\n{"by": "a"')
    assert run(path, inputs(2), [1]) == [0, 1]
    assert path.read_bytes().startswith(b"\xff\xfe")  # kept until the new one is whole
    run(path, inputs(2), range(2))
    assert len(rows_of(path)) == 2


def test_equal_rows_of_an_input_each_get_theirs(tmp_path):
    path = tmp_path / "out.jsonl"
    run(path, [{"id": "q"}, {"id": "q"}], [1])
    assert run(path, [{"id": "q"}, {"id": "q"}], range(2)) == []  # the one that is done serves both
    assert len(rows_of(path)) == 2


def test_lone_surrogates_and_large_numbers_survive(tmp_path):
    path = tmp_path / "out.jsonl"
    rows = [{"id": "q", "text": "a\ud800b", "n": 2**70}]
    run(path, [*rows, {"id": "r"}], [0])
    run(path, [*rows, {"id": "r"}], range(2))
    assert rows_of(path)[0] == rows[0] | {"made": 1, "by": "a"}
