"""Sentence ends with and without punctuation; each row of the tables is the text with a bar where it is cut."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.text.segment_sentences import sentence_starts

PIECES = [" ", "  ", ". ", "! ", "; ", ", ", "So", "he", "Bob", "has", "of", "3", "3.5", "=", "= 4", "Mr.", "(b)", "。", "因此", "，", "J.", "1.",
          "x = 2", "\n", "A", "$5", '"', ")"]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES), max_size=24).map("".join)


def barred(text):
    edges = [0, *sentence_starts(text, 0, len(text)), len(text)]
    return "|".join(text[a:b] for a, b in itertools.pairwise(edges))


@pytest.mark.parametrize(
    "expected",
    [
        "He has 3. |She has 4! |Is it 7? |Yes… |It is.",
        'He said "stop." |Then (she left.) |*Done.* |**Next.** |"Now" it ends.',
        "so far. and on. it goes",
        "It is 3.5 kg. |72 follow. |$x$ follows. |\\(y\\) too.",
        "add 1,000.5 and .25 of v2.0 at 12.30 p.m. or later",
        "a; |b; |c",
        "It holds, |therefore we are done, so it is.",
        # abbreviations, initials, enumerators
        "Mr. Brown and Dr. A. B. Smith met St. Clair vs. Prof. Oak. |They spoke.",
        "See Fig. 3. |By eq. (4) and no. 7, e.g. Two, i.e. Three, cf. Lemma 2, it holds.",
        "It is approx. 5, resp. 6. |Done.",
        "The U.S. Army (b. 1775) grew.",
        "We go from A to B. |The way back is longer.",
        "2. Add. |3. Go on.",
        "The answer is 2. |Add it.",
        # Chinese
        "今天有三个。|明天有四个！|对吗？|小明说：“好。”|于是他走了；|完。",
        "每个3.5元，|因此一共7元。|所以是7。",
        "x是5。|Then y。",
        # other alphabets
        "Élan grows. |Él va. |Это так. |Ура.",
    ],
)
def test_sentences_with_marks(expected):
    assert barred(expected.replace("|", "")) == expected


@pytest.mark.parametrize(
    "expected",
    [
        # words that only open sentences
        "She sold 24 in May |So she has 3 left |Then he left |Therefore, it ends",
        "Let p be her income |This is why |We know that",
        # after a result: any capitalised word that goes on in lower case, and words like The
        "Natalia sold 48/2 = 24 clips in May |Natalia sold 48+24 = 72 clips |The total is 72",
        "It costs 5*7=$<<5*7=35>>35 |Bob's share = 5 |Ann pays",
        "He is 9+6 = 15 |Dallas was 3+1 = 4 years |In 5 years he is 20",
        "Cows = 4 heads |Pigs = 5 heads |Week 2: 5+2 = 7 |Total: 9",
        # after a result: another calculation or equation
        "4+5 = 9 |9*2 = 18 |18 - 3 = 15",
        "5x+7=52 |5x=45 |x=9",
        "2N = 8 |N = 4",
        "12/4 = 3 feet |7.5 feet - 3 feet = 4.5 feet",
        "1+2 = 3 hours each week |$6 * 3 = $18",
        # no end: the clause still waits for something
        "3*4 = 12 apples for John and Mary from The Hague on Monday",
        "he has 2+3 = 5 more than Ann and 7 less than Bob",
        "3 = 3 Golden Comets of 4 = 4 Newtons of force",
        "it is 2+1 = 3 x 4 = 12",
        "he needs 2 + 1 = 3 1/2 cups",
        "1+1 = 2 plus 3 + 4",
        "in case (b) There is none",
        "so z = y 3 + 4 is it",
        # no result so far: names and titles are left alone
        "Bob met Ann and Carl in The Hague",
        "She read So Long and saw The Matrix twice",
        "The Day After Tomorrow",
        "the distance from school Bob walks",
        "I think that He is",
        "says: He went, So it is (They know)",
    ],
)
def test_text_that_runs_on(expected):
    assert barred(expected.replace("|", "")) == expected


def test_a_result_counts_until_the_next_cut():
    assert barred("a = 5 of Ann. Then she saw Bob walk") == "a = 5 of Ann. |Then she saw Bob walk"
    assert barred("a = 5 of Ann then she saw Bob walk") == "a = 5 of Ann then she saw |Bob walk"


def test_only_the_given_part_is_looked_at():
    text = "One. Two. Three. Four."
    assert sentence_starts(text, 5, 16) == [10]
    assert sentence_starts(text, 0, 5) == []
    assert sentence_starts("the end She goes on", 8, 19) == []
    assert sentence_starts("", 0, 0) == []


@given(texts, st.integers(0, 30), st.integers(0, 30))
def test_starts_are_ascending_inside_and_at_no_white_space(text, start, end):
    start, end = sorted((min(start, len(text)), min(end, len(text))))
    starts = sentence_starts(text, start, end)
    assert all(a < b for a, b in itertools.pairwise([start, *starts, end]) if starts)
    assert not any(text[i].isspace() for i in starts)


@pytest.mark.parametrize(
    "piece",
    [" ", ".", ". ", "A", "A ", "A. B ", "Bob ", "= ", "=5", "=5 ", "= 5 a ", "=5 a b c ", "7", "7 ", "$", "(", "So a ", "; ", "。", "，", "“",
     "a = 5 Bob ", ". \n"],
)  # fmt: skip
def test_long_repetitions_end(piece):
    # Where time grows with the square, this is where it is felt; benchmarks/segmentation.py measures it.
    text = piece * (100_000 // len(piece))
    assert all(0 < cut < len(text) for cut in sentence_starts(text, 0, len(text)))
