"""Segmentation: spans cover the response, cuts fall where a reader would make them, and it stays linear."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.text.segment import segment

PIECES = [
    "\n", "\n\n", " ", "a", "48*6=88", "3.5", "Mr.", "E.g.", "1.", "2.", "(a)", "(b)", "Step 1:", "Step 2:", "A:",
    "####", "#### 7", "\\boxed{4}", "\\[", "\\]", "$$", "```", ". ", "! ", "; ", ", therefore", "Therefore,", "- ", "###",
    "The answer is 5", "。", "🙂", "=",
]  # fmt: skip
texts = st.one_of(st.text(max_size=80), st.lists(st.sampled_from(PIECES), max_size=24).map("".join))


def parts(text, **settings):
    return [("*" if span.kind == "final" else "") + text[span.start : span.end] for span in segment(text, **settings)]


@given(texts, st.integers(1, 6), st.integers(1, 6))
def test_spans_cover_in_order_and_only_the_last_is_final(text, max_steps, min_chars):
    spans = segment(text, max_steps=max_steps, min_chars=min_chars)
    edges = [0, *(span.end for span in spans)]
    assert [span.start for span in spans] == edges[:-1]
    assert edges[-1] == len(text) and all(a < b for a, b in itertools.pairwise(edges))
    assert len(spans) <= max_steps and bool(spans) == bool(text)
    assert all(span.kind == "step" for span in spans[:-1])
    assert spans == segment(text, max_steps=max_steps, min_chars=min_chars)


@given(texts)
def test_white_space_belongs_to_the_step_before(text):
    for span in segment(text)[1:]:
        assert not text[span.start].isspace()


def test_the_bundled_task():
    assert parts("48*6=88\n88-2=86\n86*9=74\n####74") == ["48*6=88\n", "88-2=86\n", "86*9=74\n", "*####74"]
    assert parts("48*6=88\n####88") == ["48*6=88\n", "*####88"]
    assert parts("48*6=88\n88-2") == ["48*6=88\n", "88-2"]
    assert parts("####73") == ["*####73"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n ", [" \n "]),
        ("\n\nfoo\nbar", ["\n\nfoo\n", "bar"]),
        ("one\r\ntwo", ["one\r\n", "two"]),
        (
            "1. foo\n2. bar\n3. \\boxed{4}\nHope this helps!",
            ["1. foo\n", "2. bar\n", "*3. \\boxed{4}\nHope this helps!"],
        ),
        ("Step 1: do X. Step 2: do Y.", ["Step 1: do X. ", "Step 2: do Y."]),
        ("We do: (a) this (b) that", ["We do: ", "(a) this ", "(b) that"]),
        ("Both cases (a) and (b) hold", ["Both cases (a) and (b) hold"]),
        ("- a b\n* c d\n\n\n• e f", ["- a b\n", "* c d\n\n\n", "• e f"]),
        ("### Step 1\nfoo\n\n---\n\n2.\nbar", ["### Step 1\nfoo\n\n---\n\n", "2.\nbar"]),
        ("so 3*4=12 #### 12", ["so 3*4=12 ", "*#### 12"]),
        ("work\n#### Next part\nmore", ["work\n", "#### Next part\nmore"]),  # a heading, no answer
        ("x\n####5", ["*x\n####5"]),  # a crumb has only the answer to go with
    ],
)
def test_explicit_delimiters(text, expected):
    assert parts(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Mr. Smith has 3.5 kg. He eats 2; then he buys 4. The answer is 5.5.",
            ["Mr. Smith has 3.5 kg. ", "He eats 2; ", "then he buys 4. ", "*The answer is 5.5."],
        ),
        ("She has 3. She sells 2.\nA: 1", ["She has 3. ", "She sells 2.\n", "*A: 1"]),
        ("See Eq. 4 and Fig. 2, e.g. Two. Done!", ["See Eq. 4 and Fig. 2, e.g. Two. ", "Done!"]),
        ("Add 3, therefore 8 Thus, nine", ["Add 3, ", "therefore 8 ", "Thus, nine"]),
        ("He has 2.5 and 3.25 in no. 7", ["He has 2.5 and 3.25 in no. 7"]),
        ("今天有三个。明天有四个！", ["今天有三个。", "明天有四个！"]),
        ("A line. With sentences.\nAnd another. One more.", ["A line. With sentences.\n", "And another. One more."]),
    ],
)
def test_sentences_only_where_there_is_one_paragraph(text, expected):
    assert parts(text) == expected


@pytest.mark.parametrize("block", ["\\[\na = b\n\nc = d\n\\]", "$$\n1\n2\n$$", "```py\nx = 1\n\ny = 2\n```"])
def test_blocks_are_not_cut_inside(block):
    assert parts(f"first\n{block}\nlast one") == ["first\n", f"{block}\n", "last one"]


def test_an_unclosed_block_is_cut():
    assert parts("$$ is\nno math") == ["$$ is\n", "no math"]


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("work\n**Answer:** 5", "**Answer:** 5"),
        ("work\nFinal answer: 5\nBye.", "Final answer: 5\nBye."),
        ("work\nthe answer is 7", "the answer is 7"),
        ("work\nthe answer is 7\nGood luck!", "the answer is 7\nGood luck!"),
        ("the answer is 7\nbut wait, 3+5=8", None),
        ("the answer is found by adding\nthen stop", None),
        ("work\n\\boxed{7}\nCheck: 3+4=7", "\\boxed{7}\nCheck: 3+4=7"),
        ("\\boxed{3} first\nlater\nthen \\boxed{4}", "then \\boxed{4}"),
        ("work\n### Final Answer\n\n\\boxed{7}", "### Final Answer\n\n\\boxed{7}"),
        ("a: 5\nb: 6", None),
        ("no marker\nat all 7", None),
    ],
)
def test_the_final_step(text, final):
    spans = segment(text)
    assert [text[s.start : s.end] for s in spans if s.kind == "final"] == ([] if final is None else [final])


def test_max_steps_merges_the_shortest_neighbours_and_never_the_answer():
    text = "aaaa\nbb\ncc\ndddddd\n####5"
    assert parts(text, max_steps=4) == ["aaaa\n", "bb\ncc\n", "dddddd\n", "*####5"]
    assert parts(text, max_steps=3) == ["aaaa\nbb\ncc\n", "dddddd\n", "*####5"]
    assert parts(text, max_steps=2) == ["aaaa\nbb\ncc\ndddddd\n", "*####5"]
    assert parts(text, max_steps=1) == ["*" + text]
    assert parts("aa\nbb\ncc\ndd\n", max_steps=3) == ["aa\nbb\n", "cc\n", "dd\n"]  # the earliest of equals


@given(st.lists(st.integers(2, 9), min_size=2, max_size=9), st.integers(1, 8))
def test_merging_agrees_with_the_slow_way(lengths, max_steps):
    lines = ["a" * length + "\n" for length in lengths]
    slow = list(lines)
    while len(slow) > max_steps:
        pairs = [len(a) + len(b) for a, b in itertools.pairwise(slow)]
        place = pairs.index(min(pairs))
        slow[place : place + 2] = [slow[place] + slow[place + 1]]
    assert parts("".join(lines), max_steps=max_steps) == slow


def test_min_chars():
    text = "long enough\nabc\nanother line"
    assert parts(text, min_chars=3) == ["long enough\n", "abc\n", "another line"]
    assert parts(text, min_chars=4) == ["long enough\nabc\n", "another line"]


@pytest.mark.parametrize("settings", [{"max_steps": 0}, {"min_chars": 0}])
def test_impossible_settings(settings):
    with pytest.raises(ValueError, match="at least 1"):
        segment("a", **settings)


@pytest.mark.parametrize(
    "piece",
    [" ", "\n", "\n ", ". ", "; ", "\\[", "$$", "```", "1. ", "(a) (b) ", "Therefore, ", "#", "*", "a\n", "A B. "],
)
def test_long_repetitions_end(piece):
    # Quadratic time over 100,000 characters would take minutes; the suite would not end.
    text = piece * (100_000 // len(piece))
    spans = segment(text)
    assert spans[-1].end == len(text) and len(spans) <= 64
