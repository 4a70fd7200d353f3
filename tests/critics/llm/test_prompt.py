"""What the llm critic asks: rubrics, the two ways of asking, the repair, what is too long, and the cache's text."""

import hashlib
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_parts import make_rollout, parts_of

from ssrctl.critics.llm.prompt import (
    HEADING_BYTES,
    MAX_DATA_BYTES,
    MAX_RUBRIC_BYTES,
    PROMPT_VERSION,
    Rubric,
    asked_steps,
    load_rubric,
    repair_messages,
    request_text,
    step_messages,
    trace_messages,
)
from ssrctl.critics.llm.verdicts import StepVerdict, Verdicts
from ssrctl.errors import UserError
from ssrctl.io.package_data import shipped_names

RUBRIC = Rubric(name="r", step="STEP RULES", final="FINAL RULES", reference="WITH ONE", no_reference="WITHOUT ONE")
CODE = "c0de" * 4
# What PROMPT_VERSION is of. When the wording changes, raise the version and put the new digest here: replies that are
# kept under the old version were given to other words.
PINNED = (1, "886260e840c5ee28")


def rendered():
    """Every form of prompt there is, with fixed data and code."""
    rollout = make_rollout("48*6=288\n", "288-2=286\n", "####286", answer="286")
    too_long = make_rollout("48*6=288\n", "x" * MAX_DATA_BYTES)
    trace = trace_messages(RUBRIC, rollout, reference=True, boundary=CODE)
    return [
        trace,
        trace_messages(RUBRIC, make_rollout("####286"), reference=False, boundary=CODE),
        trace_messages(RUBRIC, too_long, reference=True, boundary=CODE),
        step_messages(RUBRIC, rollout, 1, reference=True, boundary=CODE),
        repair_messages(trace, "x" * 5_000, "PROBLEM"),
        [
            Verdicts.__doc__,
            StepVerdict.__doc__,
            [(name, f.description) for name, f in StepVerdict.model_fields.items()],
        ],
    ]


def test_another_wording_needs_another_version():
    digest = hashlib.sha256(json.dumps(rendered(), sort_keys=True).encode()).hexdigest()[:16]
    assert (PROMPT_VERSION, digest) == PINNED, "raise PROMPT_VERSION and pin it with this digest"


def test_one_call_asks_for_all_steps_by_number_and_kind():
    rollout = make_rollout("48*6=288\n", "288-2=286\n", "####286", answer="286")
    system, user = trace_messages(RUBRIC, rollout, reference=True)
    parts = parts_of(user["content"])
    assert parts.sections == [
        ("problem", "48*6-2=?"),
        ("reference answer", "286"),
        ("step 1", "48*6=288"),
        ("step 2", "288-2=286"),
        ("final 3", "####286"),
    ]
    assert parts.closings[0].endswith('Score steps 1 to 3: "scores" has 3 entries, with the indices 1 to 3.')
    assert asked_steps(rollout, reference=True) == [(1, "step"), (2, "step"), (3, "final")]
    for words in ("STEP RULES", "FINAL RULES\nWITH ONE", "-100 to 100", "0 to 100", '{"scores": [{"index": 1,'):
        assert words in system["content"]
    assert "WITHOUT" not in system["content"] and "286" not in system["content"]


def test_one_call_per_step_shows_the_steps_before_and_none_after():
    rollout = make_rollout("48*6=288\n", "288-2=286\n", "####286")
    system, user = step_messages(RUBRIC, rollout, 1, reference=True)
    parts = parts_of(user["content"])
    assert parts.sections == [("problem", "48*6-2=?"), ("earlier step 1", "48*6=288"), ("step 2", "288-2=286")]
    assert parts.closings[0].endswith('Score step 2 alone: "scores" has one entry, with the index 2.')
    assert "####" not in user["content"]
    assert asked_steps(rollout, 1, reference=True) == [(2, "step")]
    assert parts_of(step_messages(RUBRIC, rollout, 2, reference=True)[1]["content"]).sections[-1] == (
        "final 3",
        "####286",
    )
    # The same rules for both ways of asking: their scores can be compared.
    assert system == trace_messages(RUBRIC, rollout, reference=True)[0]


@pytest.mark.parametrize(("answer", "reference"), [("286", False), (None, True), ("", True), (" \n", True)])
def test_without_a_reference_the_judge_is_told_so(answer, reference):
    system, user = trace_messages(RUBRIC, make_rollout("a", "b", answer=answer), reference=reference)
    assert "FINAL RULES\nWITHOUT ONE" in system["content"] and "WITH ONE" not in system["content"]
    assert [name for name, _ in parts_of(user["content"]).sections] == ["problem", "step 1", "final 2"]


def test_the_code_is_new_in_every_message_and_never_in_the_data(monkeypatch):
    rollout = make_rollout("a", "b")
    codes = {parts_of(trace_messages(RUBRIC, rollout, reference=True)[1]["content"]).code for _ in range(50)}
    assert len(codes) == 50
    draws = iter(["1" * 16, "2" * 16])
    monkeypatch.setattr("ssrctl.critics.llm.prompt.secrets.token_hex", lambda n: next(draws))
    lucky = make_rollout(f"[{'1' * 16} end]", "b")
    assert parts_of(trace_messages(RUBRIC, lucky, reference=True)[1]["content"]).code == "2" * 16


# -- repair --------------------------------------------------------------------------------------------------------


def test_a_repair_is_the_request_with_the_reply_and_its_fault():
    request = step_messages(RUBRIC, make_rollout("a", "b"), 1, reference=True)
    before = json.dumps(request)
    system, user = repair_messages(request, "I like it: 85", 'it holds no JSON object with the key "scores"')
    assert json.dumps(request) == before
    assert system == request[0] and user["content"].startswith(request[1]["content"] + "\n")
    parts, asked = parts_of(user["content"]), parts_of(request[1]["content"])
    assert parts.sections == [*asked.sections, ("earlier reply", "I like it: 85")]
    assert 'it holds no JSON object with the key "scores"' in parts.closings[1]
    assert parts.closings[0].startswith(asked.closings[0])


FULL = MAX_DATA_BYTES - len("48*6-2=?") - len("y") - 3 * HEADING_BYTES  # leaves room for a second step of one byte


# -- what is too long ----------------------------------------------------------------------------------------------


def test_steps_beyond_the_limit_are_neither_sent_nor_asked_for():
    texts = [f"{number:03d}" + "x" * 3_197 for number in range(64)]  # a response of 200 KB
    rollout = make_rollout(*texts)
    asked = asked_steps(rollout, reference=True)
    assert [number for number, _ in asked] == list(range(1, MAX_DATA_BYTES // (3_200 + HEADING_BYTES) + 1))
    user = trace_messages(RUBRIC, rollout, reference=True)[1]["content"]
    parts = parts_of(user)
    assert [text for _, text in parts.sections[1:]] == texts[: len(asked)]  # each of them whole
    assert f"The work goes on after step {len(asked)}" in parts.closings[0]
    assert f"Score steps 1 to {len(asked)}:" in parts.closings[0]
    assert len(user) < MAX_DATA_BYTES + 5_000
    for index in range(64):
        assert asked_steps(rollout, index, reference=True) == asked[index : index + 1]
    last = parts_of(step_messages(RUBRIC, rollout, len(asked) - 1, reference=True)[1]["content"])
    assert [text for _, text in last.sections[1:]] == texts[: len(asked)]
    with pytest.raises(AssertionError):
        step_messages(RUBRIC, rollout, len(asked), reference=True)


@pytest.mark.parametrize(
    ("texts", "question", "answer", "asked"),
    [
        (["x" * (FULL + 1), "y"], "48*6-2=?", None, 1),
        (["x" * FULL, "y"], "48*6-2=?", None, 2),
        (["x" * FULL, "y"], "48*6-2=?", "6", 1),  # the reference answer takes room
        (["é" * (MAX_DATA_BYTES // 2), "y"], "?", None, 0),  # two bytes each
        (["y"] * MAX_DATA_BYTES, "?", None, MAX_DATA_BYTES // (HEADING_BYTES + 1) - 1),
        (["a", "x" * 5_000_000, "b"], "?", None, 1),
        (["a", "b"], "x" * (MAX_DATA_BYTES + 1), None, 0),
        (["a", "b"], "?", "x" * (MAX_DATA_BYTES + 1), 0),
    ],
)
def test_the_limit_is_one_of_bytes_over_all_data(texts, question, answer, asked):
    rollout = make_rollout(*texts, question=question, answer=answer)
    assert len(asked_steps(rollout, reference=True)) == asked
    if asked:
        user = trace_messages(RUBRIC, rollout, reference=True)[1]["content"]
        assert len(user.encode()) < MAX_DATA_BYTES + 1_000


def test_no_steps_ask_for_nothing():
    assert asked_steps(make_rollout(), reference=True) == []
    assert asked_steps(make_rollout(), 0, reference=True) == []


# -- the text that a cache knows a request by ------------------------------------------------------------------------


def test_equal_requests_have_equal_texts_and_others_do_not():
    other = Rubric(name="r", step="STEP", final="RULESFINAL RULES", reference="WITH ONE", no_reference="WITHOUT ONE")
    base = make_rollout("a\n", "b\n", "c", answer="3")
    changes = [
        (RUBRIC, base, None, True),
        (RUBRIC, base, None, False),
        (RUBRIC, base, 0, True),
        (RUBRIC, base, 1, True),
        (other, base, None, True),
        (RUBRIC, make_rollout("a\n", "b\n", "c", answer="4"), None, True),
        (RUBRIC, make_rollout("a\n", "b\n", "c", answer="3", question="?"), None, True),
        (RUBRIC, make_rollout("a\n", "b\n", "d", answer="3"), None, True),
        (RUBRIC, make_rollout("a\nb\n", "c", answer="3"), None, True),
        (RUBRIC, make_rollout("a\n", "b\n", "c", answer="3", last="step"), None, True),
        (RUBRIC, make_rollout("a\n", "b\n", "c", "x" * MAX_DATA_BYTES, answer="3", last="final"), None, True),
        (RUBRIC, make_rollout("a\n", "b\n", answer="3", last="step"), None, True),
    ]
    texts = [request_text(r, rollout, index, reference=reference) for r, rollout, index, reference in changes]
    assert len(set(texts)) == len(texts)
    again = make_rollout("a\n", "b\n", "c", answer="3")
    again.id, again.extra = "other/7", {"x": 1}
    assert request_text(RUBRIC, again, None, reference=True) == texts[0]
    # What comes later is not part of a question about one step.
    assert request_text(RUBRIC, make_rollout("a\n", "z", answer="3"), 0, reference=True) == texts[2]


@given(
    st.lists(
        st.lists(st.sampled_from(["a", "b", "\n", '"', ",", "]"]), min_size=1).map("".join), min_size=1, max_size=3
    )
)
def test_texts_tell_apart_what_messages_tell_apart(texts):
    """Over all ways to cut the same characters into steps."""
    joined = "".join(texts)
    seen = {}
    for cuts in itertools.product([False, True], repeat=min(len(joined) - 1, 5)):
        places = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(joined)]
        rollout = make_rollout(*(joined[a:b] for a, b in itertools.pairwise(places)))
        text = request_text(RUBRIC, rollout, None, reference=True)
        messages = json.dumps(trace_messages(RUBRIC, rollout, reference=True, boundary=CODE))
        assert seen.setdefault(text, messages) == messages
    assert len(set(seen.values())) == len(seen)


# -- rubrics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["steps", "correctness", "progress", "clarity", "final"])
def test_shipped_rubrics_have_all_sections(name):
    assert name in shipped_names("rubrics", ".txt")
    rubric = load_rubric(name)
    assert all((rubric.name, rubric.step, rubric.final, rubric.reference, rubric.no_reference))
    assert rubric.name == name and "[" not in rubric.step
    assert rubric.final == load_rubric("final").final


def test_the_default_rubric_is_the_three_together_and_the_others_are_one_each():
    steps = {name: load_rubric(name).step for name in ("steps", "correctness", "progress", "clarity")}
    assert len(set(steps.values())) == 4
    assert all(word in steps["steps"] for word in ("correctness", "progress", "clarity"))
    for name in ("correctness", "progress", "clarity"):
        assert f"Judge {name} alone" in steps[name]
    assert load_rubric("final").step == steps["steps"]


def rubric_file(tmp_path, text):
    path = tmp_path / "mine.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_a_file_with_sections(tmp_path):
    text = "\ufeff[ Step ]\r\nJudge rhymes.\r\n\r\n[final]\r\nJudge {the} end.\r\n[No Reference]\r\nSing.\r\n"
    rubric = load_rubric(rubric_file(tmp_path, text))
    assert (rubric.step, rubric.final) == ("Judge rhymes.", "Judge {the} end.")
    assert (rubric.reference, rubric.no_reference) == ("", "Sing.")  # its own, none of them the shipped one's
    assert "Judge {the} end." in trace_messages(rubric, make_rollout("a"), reference=True)[0]["content"]


def test_a_file_without_sections_is_about_steps(tmp_path):
    rubric = load_rubric(rubric_file(tmp_path, "# Mine\nJudge [x] and rhymes.\n"))
    shipped = load_rubric("final")
    assert rubric.step == "# Mine\nJudge [x] and rhymes."
    assert (rubric.final, rubric.reference) == (shipped.final, shipped.reference)


def test_sections_that_a_file_leaves_out(tmp_path):
    rubric = load_rubric(rubric_file(tmp_path, "[reference]\nOnly this.\n[step]\n"))
    assert (rubric.step, rubric.final) == (load_rubric("steps").step, load_rubric("final").final)
    assert (rubric.reference, rubric.no_reference) == ("Only this.", "")
    rubric = load_rubric(rubric_file(tmp_path, "Before.\n[step]\nWithin.\n"))
    assert rubric.step == "Before.\nWithin."


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no text"),
        ("[step]\n \n[final]\n", "no text"),
        ("[steps]\nx", r"line 1: unknown section \[steps\].*\[no reference\]"),
        ("[step]\nx\n[STEP]\ny", "line 3.*twice"),
        (b"caf\xe9", r"not UTF-8 text \(byte 3\)"),
        ("Judge\x00", r"line 1: the character U\+0000 cannot be sent"),
        ("x" * (MAX_RUBRIC_BYTES + 1), "more than 65,536 bytes"),
    ],
)
def test_files_that_are_no_rubric(tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        load_rubric(rubric_file(tmp_path, text))


@pytest.mark.parametrize("name", ["absent", "", "steps.txt", "Judge the step by its rhymes. " * 200, "\0"])
def test_names_of_no_rubric(name):
    with pytest.raises(UserError, match="rubric") as raised:
        load_rubric(name)
    assert raised.value.remedy


def test_a_folder_is_no_rubric(tmp_path):
    with pytest.raises(UserError, match="rubric"):
        load_rubric(str(tmp_path))


def test_the_text_of_a_rubric_tells_sections_apart():
    texts = {Rubric(name="r", step="ab", final="c").text, Rubric(name="r", step="a", final="bc").text}
    assert len(texts) == 2
    assert Rubric(name="r", step="a", final="b").text == Rubric(name="other", step="a", final="b").text
