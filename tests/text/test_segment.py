"""Segmentation: spans cover the response, cuts fall where a reader would make them, and it stays linear."""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssrctl.text.segment import segment

PIECES = [
    "\n", "\n\n", " ", "a", "48*6=88", "3.5", "Mr.", "E.g.", "1.", "2.", "(a)", "(b)", "Step 1:", "Step 2:", "A:",
    "####", "#### 7", "\\boxed{4}", "\\[", "\\]", "$$", "```", ". ", "! ", "; ", ", therefore", "Therefore,", "- ", "###",
    "The answer is 5", "。", "🙂", "=", "<think>", "</think>", "<answer>", "$", "\\(", "\\)", "|", "\n|-|", "= 5", "So he has", "（1）",
    "（2）", "第一步：", "```py", "where", "\r\n",
]  # fmt: skip
STYLES = ["auto", "newline", "paragraph"]
texts = st.one_of(st.text(max_size=80), st.lists(st.sampled_from(PIECES), max_size=24).map("".join))


def parts(text, **settings):
    return [("*" if span.kind == "final" else "") + text[span.start : span.end] for span in segment(text, **settings)]


@settings(max_examples=200)
@given(texts, st.sampled_from(STYLES), st.integers(1, 6), st.integers(1, 6), st.integers(0, 30))
def test_spans_cover_in_order_and_only_the_last_is_final(text, style, max_steps, min_chars, max_chars):
    options = {"style": style, "max_steps": max_steps, "min_chars": min_chars, "max_chars": max_chars}
    spans = segment(text, **options)
    edges = [0, *(span.end for span in spans)]
    assert [span.start for span in spans] == edges[:-1]
    assert edges[-1] == len(text) and all(a < b for a, b in itertools.pairwise(edges))
    assert len(spans) <= max_steps and bool(spans) == bool(text)
    assert all(span.kind == "step" for span in spans[:-1])
    assert spans == segment(text, **options)


@given(texts, st.sampled_from(STYLES), st.integers(0, 30))
def test_white_space_belongs_to_the_step_before(text, style, max_chars):
    for span in segment(text, style=style, max_chars=max_chars)[1:]:
        assert not text[span.start].isspace()


@given(texts, st.sampled_from(STYLES), st.integers(1, 8))
def test_no_step_but_a_lone_one_is_without_content(text, style, min_chars):
    """Labels (headings, bare bullets) may stand alone at the very end, where nothing follows them."""
    spans = segment(text, style=style, min_chars=min_chars)
    for span in spans[:-1] if len(spans) > 1 else []:
        content = re.sub("</?(think|answer)>", "", text[span.start : span.end])
        assert any(map(str.isalnum, content)) and len(text[span.start : span.end].strip()) >= min_chars


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


@pytest.mark.parametrize(
    "block",
    [
        "\\[\na = b\n\nc = d\n\\]", "$$\n1\n2\n$$", "```py\nx = 1\n\ny = 2\n```", "| a | b |\n|---|---|\n| 1 | 2 |",
        "\\begin{aligned}\na &= b \\\\\n&= c\n\\end{aligned}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("style", ["auto", "newline"])
def test_blocks_are_not_cut_inside(block, style):
    assert parts(f"first one.\n{block}\nLast one", style=style) == ["first one.\n", f"{block}\n", "Last one"]


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


def test_merging_prefers_a_paragraph_and_keeps_thinking_apart():
    text = "aaaaaaa\nbbbbbbb\n\ncc\n\ndddd"
    assert parts(text, max_steps=3) == ["aaaaaaa\nbbbbbbb\n\n", "cc\n\n", "dddd"]
    assert parts(text, max_steps=2) == ["aaaaaaa\nbbbbbbb\n\n", "cc\n\ndddd"]
    thinking = "<think>\n" + "aaaa bbbb cccc\n" * 3 + "d\n</think>\n\nee\nff\n"
    kept = parts(thinking, max_steps=2)
    assert kept == [thinking[: thinking.index("ee")], "ee\nff\n"]
    assert parts(thinking, max_steps=1) == [thinking]


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
    assert parts("long enough\nab c\nanother line", min_chars=5) == ["long enough\nab c\n", "another line"]
    assert parts("long enough\nA: 5", min_chars=10) == ["long enough\n", "*A: 5"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # a formula belongs to the sentence that has not ended
        ("We get\n\\[x=1\\]\nThen stop.", ["We get\n\\[x=1\\]\n", "Then stop."]),
        ("We get:\n\n$$x=1$$\n\nIt is $2$.\nEnd", ["We get:\n\n$$x=1$$\n\n", "It is $2$.\n", "End"]),
        ("We get\n\\[x=1\\]\nwhere $x$ counts.\nthen stop", ["We get\n\\[x=1\\]\nwhere $x$ counts.\n", "then stop"]),
        ("We get\n\\[x=1\\]\n, which holds.\nEnd", ["We get\n\\[x=1\\]\n, which holds.\n", "End"]),
        ("We get\n\\[x=1.\\]\nwhere next", ["We get\n\\[x=1.\\]\n", "where next"]),
        ("It ends.\n\\[x=1\\]\nso on", ["It ends.\n", "\\[x=1\\]\n", "so on"]),
        ("The sum is\n\\(x=1\\).\nEnd", ["The sum is\n\\(x=1\\).\n", "End"]),
        ("We have:\n3+4=7\nNext is\n8\nEnd it", ["We have:\n3+4=7\n", "Next is\n8\n", "End it"]),
        ("x = 3*5\n= 15\n=> y\n= z", ["x = 3*5\n= 15\n", "=> y\n= z"]),
        ("1+2=3\n3+4=7\n\\(5\\)\n\\[6\\]", ["1+2=3\n", "3+4=7\n", "\\(5\\)\n\\[6\\]"]),
        ("So it is\n\\[\\boxed{5}\\]\nBye", ["*So it is\n\\[\\boxed{5}\\]\nBye"]),
        ("a b c\nSo it is\n\\[\\boxed{5}\\]", ["a b c\n", "*So it is\n\\[\\boxed{5}\\]"]),
        ("Solution:\n\\[x=1\\]\nwhere it is\nEnd", ["Solution:\n\\[x=1\\]\nwhere it is\n", "End"]),
        ("We have:\n- 3+4\n- 5+6\nEnd", ["We have:\n", "- 3+4\n", "- 5+6\n", "End"]),
        # labels go with what they name
        ("Solution:\nadd up\n**Step 2**\nstop", ["Solution:\nadd up\n", "**Step 2**\nstop"]),
        ("## Step 1: add\nfoo\n- bar\n* baz", ["## Step 1: add\nfoo\n", "- bar\n", "* baz"]),
        ("**It is done.**\nfoo", ["**It is done.**\n", "foo"]),
        ("第一步：加。第二步：减。", ["第一步：加。", "第二步：减。"]),
        ("在第二步，减。在第三步，乘。", ["在第二步，减。", "在第三步，乘。"]),
        ("先（1）加；（2）减", ["先（1）加；", "（2）减"]),
        ("算：①加 ②减 ③乘", ["算：", "①加 ", "②减 ", "③乘"]),
        # an answer behind "A:" is no reason to leave the rest in one piece
        ("It is 1+2 = 3 So he has 3+1 = 4 A: 4", ["It is 1+2 = 3 ", "So he has 3+1 = 4 ", "A: 4"]),
    ],
)
def test_formulas_and_labels(text, expected):
    assert parts(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nfoo. Bar.\nbaz\n</think>\n\n\\boxed{7}", ["<think>\nfoo. Bar.\n", "baz\n</think>\n\n", "*\\boxed{7}"]),
        ("<think>One is. Two is.</think>Three is. Four is.",
         ["<think>One is. ", "Two is.</think>", "Three is. ", "Four is."]),
        ("One is. Two is.\n</think>\n\none\ntwo", ["One is. ", "Two is.\n</think>\n\n", "one\n", "two"]),
        ("<think>\n\n</think>\n\nfoo\nbar", ["<think>\n\n</think>\n\nfoo\n", "bar"]),
        ("foo\n<think>bar\nbaz</think>", ["foo\n", "<think>bar\n", "baz</think>"]),
        ("<think>a b\n\\boxed{3}\nc d</think>\ne f", ["<think>a b\n", "\\boxed{3}\n", "c d</think>\n", "e f"]),
        ("<think>a b\n\\boxed{3}\n</think>\n \n", ["<think>a b\n", "*\\boxed{3}\n</think>\n \n"]),
        ("<think>a b\n\\boxed{3}\nc d", ["<think>a b\n", "\\boxed{3}\n", "c d"]),
        ("<think>One is. It is \\boxed{3}. Now on.", ["<think>One is. ", "It is \\boxed{3}. ", "Now on."]),
        ("<think>a\nb \\boxed{3}", ["<think>a\n", "*b \\boxed{3}"]),
        (
            "<think>a b\n\\boxed{3}</think>\nc d\nThe answer is 5",
            ["<think>a b\n", "\\boxed{3}</think>\n", "c d\n", "*The answer is 5"],
        ),
        ("<THINK>foo</THINK><answer>7</answer>", ["<THINK>foo</THINK>", "*<answer>7</answer>"]),
        ("<|channel|>analysis<|message|>One is. \\boxed{4}? No.<|end|><|start|>assistant<|channel|>final<|message|>One\nA: 5",
         ["<|channel|>analysis<|message|>One is. ", "\\boxed{4}? ",
          "No.<|end|><|start|>assistant<|channel|>final<|message|>", "One\n", "*A: 5"]),
        ("analysisOne is. The answer is 4? Two is.assistantfinalTwo is.\n\nA: 5",
         ["analysisOne is. ", "The answer is 4? ", "Two is.assistantfinal", "Two is.\n\n", "*A: 5"]),
        ("[THINK]foo\nbar[/THINK]\nthe end", ["[THINK]foo\n", "bar[/THINK]\n", "the end"]),
    ],
)  # fmt: skip
def test_thinking(text, expected):
    assert parts(text) == expected


STYLED = "## Plan\nOne is. Two is.\n1. a b\n\n```\nx\n\ny\n```\n\n\nThe end:\n#### 5\n"


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("newline", ["## Plan\nOne is. Two is.\n", "1. a b\n\n", "```\nx\n\ny\n```\n\n\n", "The end:\n", "*#### 5\n"]),
        ("paragraph", ["## Plan\nOne is. Two is.\n1. a b\n\n", "```\nx\n\ny\n```\n\n\n", "*The end:\n#### 5\n"]),
    ],
)
def test_styles(style, expected):
    assert parts(STYLED, style=style) == expected


def test_other_styles_never_cut_inside_a_line():
    text = "Step 1: foo. Step 2: bar. So he has 3 = 3 Then (a) he (b) goes. <b>"
    assert parts(text, style="newline") == parts(text, style="paragraph") == [text]
    assert parts("We have:\n1+2=3", style="newline") == ["We have:\n", "1+2=3"]


def test_long_steps_are_cut_at_lines_then_sentences():
    lines = "aaa bbb\nccc ddd\neee fff"
    assert parts(lines, style="paragraph", max_chars=16) == ["aaa bbb\nccc ddd\n", "eee fff"]
    assert parts(lines, style="paragraph", max_chars=14) == ["aaa bbb\n", "ccc ddd\n", "eee fff"]
    assert parts(lines, style="paragraph", max_chars=0) == [lines]
    sentences = "Aaa is. Bbb is. Ccc is.\nx"
    assert parts(sentences, style="paragraph", max_chars=16) == ["Aaa is. Bbb is. ", "Ccc is.\nx"]
    assert parts(sentences, style="newline", max_chars=10, min_chars=1) == ["Aaa is. ", "Bbb is. ", "Ccc is.\n", "x"]
    long = "word " * 50
    assert parts(long, style="newline", max_chars=40) == [long]  # no end of anything in it
    assert parts(long + "end. Next one", style="newline", max_chars=40) == [long + "end. ", "Next one"]
    # the end of a line goes before that of a sentence, unless the piece would be short
    text = "Aaa bbb ccc ddd\nEee is. Fff ggg hhh"
    assert parts(text, style="paragraph", max_chars=24) == ["Aaa bbb ccc ddd\n", "Eee is. Fff ggg hhh"]
    text = "Aa\nBbb is ccc. Ddd eee fff ggg"
    assert parts(text, style="paragraph", max_chars=20) == ["Aa\nBbb is ccc. ", "Ddd eee fff ggg"]


def test_a_long_block_is_cut_at_its_lines_alone():
    code = "```py\nfirst = 1. \nsecond = 2\n\nthird = 3\n```"
    assert parts(f"{code}\nEnd", max_chars=60) == [f"{code}\n", "End"]
    assert parts(code, max_chars=29) == ["```py\nfirst = 1. \n", "second = 2\n\nthird = 3\n```"]
    around = "One two three four. " + "$a. B c. D e. F$" + ". Five six. "
    assert parts(around, style="paragraph", max_chars=30) == ["One two three four. ", "$a. B c. D e. F$. Five six. "]


def test_a_long_final_step_is_cut_before_its_answer():
    text = "Foo is it. Bar is it. It is \\boxed{5} now. Bye is it. Good day."
    assert parts(text, style="paragraph", max_chars=20) == [
        "Foo is it. ",
        "Bar is it. ",
        "*It is \\boxed{5} now. Bye is it. Good day.",
    ]
    assert parts(text, style="paragraph", max_chars=20, max_steps=2)[1].startswith("*It is")


@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(13, 40))
def test_no_step_is_over_the_limit_where_lines_are_short(lengths, max_chars):
    text = "".join("a" * length + "\n" for length in lengths)
    spans = segment(text, style="paragraph", max_chars=max_chars, min_chars=1)
    assert all(span.end - span.start <= max_chars for span in spans)
    greedy = [sum(group) for group in itertools.pairwise(span.end - span.start for span in spans)]
    assert all(pair > max_chars // 2 for pair in greedy)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": 0}, "at least 1"),
        ({"min_chars": 0}, "at least 1"),
        ({"max_chars": -1}, "0 for no limit"),
        ({"style": "lines"}, "auto, newline or paragraph"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        segment("a", **settings)


@pytest.mark.parametrize(
    "piece",
    [" ", "\n", "\n ", ". ", "; ", "\\[", "$$", "```", "1. ", "(a) (b) ", "Therefore, ", "#", "*", "a\n", "A B. ", "(", "$", "7", "<think>",
     "</think>a ", "\n\\[a\\]", "\n$a$", "=\n", "A: 1 ", "is\n5\n", "**a**\n"],
)  # fmt: skip
@pytest.mark.parametrize("style", STYLES)
def test_long_repetitions_end(piece, style):
    # Where time grows with the square, this is where it is felt; benchmarks/segmentation.py measures it.
    text = piece * (50_000 // len(piece))
    spans = segment(text, style=style)
    assert spans[-1].end == len(text) and len(spans) <= 64
