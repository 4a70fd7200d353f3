"""What is not cut inside: code, mathematics and tables, told apart from amounts of money and stray marks."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.text.segment_shield import Shield

PIECES = ["$", "$$", "\\(", "\\)", "\\[", "\\]", "`", "```", "~~~", "\n", "\n\n", " ", "a", "5", "|", "|-|", "\\begin{array}",
          "\\end{array}", "[asy]", "[/asy]", "\\", "=", ">"]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES), max_size=24).map("".join)


def stretches(text):
    return [(stretch.kind, text[stretch.start : stretch.end]) for stretch in Shield(text).stretches]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("let $x. Y$ be", [("inline", "$x. Y$")]),
        ("a \\$y$x; y$", [("inline", "$x; y$")]),
        ("let \\(x\ny\\) be", [("inline", "\\(x\ny\\)")]),
        ("so\n\\[\na\n\nb\n\\]\nand", [("display", "\\[\na\n\nb\n\\]")]),
        ("so $$a\nb$$ and", [("display", "$$a\nb$$")]),
        ("\\begin{align*}a\\end{align} b\\end{align*} c", [("display", "\\begin{align*}a\\end{align} b\\end{align*}")]),
        ("a `x; y` b ``c ` d`` e", [("code", "`x; y`")]),
        ("```py\na\n\nb\n```\nc", [("code", "```py\na\n\nb\n```")]),
        ("- ```py\n  a\n  ```\nb", [("code", "```py\n  a\n  ```")]),
        ("~~~\n```\n~~~", [("code", "~~~\n```\n~~~")]),
        ("```py\na\n\nb", [("code", "```py\na\n\nb")]),  # cut off in the middle of the code
        ("```a b``` c", [("code", "```a b```")]),
        ("[asy] a; $b$ [/asy] c", [("code", "[asy] a; $b$ [/asy]")]),
        ("x\n| a | b |\n|:--|--:|\n| $1$ | 2 |\ny", [("table", "| a | b |\n|:--|--:|\n| $1$ | 2 |")]),
        ("`a` then $b$ then \\[c\\]", [("code", "`a`"), ("inline", "$b$"), ("display", "\\[c\\]")]),
    ],
)
def test_stretches(text, expected):
    assert stretches(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "it costs $5 and $10",
        "he has $12 an hour and she has 3$",
        "$3 + $4 = $7",
        "from $5-$10 now",
        "prices of $10,$20,$30",
        "80*1.5=$<<80*1.5=120>>120 and 4*2=$<<8>>8",
        "an escaped \\$x\\$ sign",
        "a $ b $ c",
        "one $a\nb$ line",
        "\\(a\n\nb\\)",
        "$$a\n\nb$$",
        "\\[ never closed",
        "``` never closed",
        "in a line ``` of text",
        "\\begin{proof} a. B \\end{proof}",
        "\\\\[2pt] a \\]",
        "|x| = 5\n|y| = 6",  # absolute values
        "| a |\n\n|---|",
    ],
)
def test_what_protects_nothing(text):
    assert stretches(text) == []


@given(texts)
def test_stretches_are_ordered_and_apart_and_cover_their_inside(text):
    shield = Shield(text)
    assert all(a.end <= b.start for a, b in itertools.pairwise(shield.stretches))
    inside = {i for stretch in shield.stretches for i in range(stretch.start + 1, stretch.end)}
    assert shield.outside(range(len(text) + 1)) == [i for i in range(len(text) + 1) if i not in inside]
    assert all(shield.at(stretch.start) == stretch for stretch in shield.stretches)


@pytest.mark.parametrize("piece", ["$", "$a ", "$$", "`", "`a", "``` ", "\n```", "\n```a", "\\(", "\\[", "\\(\n\n", "$$\n\n", "|", "\n|-|",
                                   "\n|", "[asy]", "\\begin{array}", "$a\\$"])  # fmt: skip
def test_long_repetitions_end(piece):
    # Where time grows with the square, this is where it is felt; benchmarks/segmentation.py measures it.
    text = piece * (100_000 // len(piece))
    assert Shield(text + "\\)\\]$$x").outside([0]) == [0]
