"""Final answers: where they are found, when two are the same, and agreement with human labels."""

import json
import sys
import threading
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.errors import UserError
from ssrctl.text import answers
from ssrctl.text.answers import check_answer, extract_answer, find_marker, same_answer


@pytest.mark.parametrize(
    ("text", "value", "way"),
    [
        ("48*6=88\n####88", "88", "hashes"),
        ("#### 1\nno:\n#### 1,234.", "1,234", "hashes"),
        ("so \\boxed{\\frac{1}{2}} and \\boxed{3", "\\frac{1}{2}", "boxed"),
        ("\\boxed{1} then \\boxed{\\{2, 3\\}}", "\\{2, 3\\}", "boxed"),
        ("#### 5 \\boxed{6}", "6", "boxed"),
        ("so\nA: $1,200.", "$1,200", "marker"),
        ("**Answer:** 5", "5", "marker"),
        ("Final Answer:\n\n**12**", "12", "marker"),
        ("The answer is $42$.", "42", "phrase"),
        ("Thus the answer to the question is -1.5 hours", "-1.5", "phrase"),
        ("the answer is **7**, so 8 is out", "7", "phrase"),
        ("the answer is: \\( \\frac{1}{2} \\).", "\\frac{1}{2}", "phrase"),
        ("The answer is no.", "no", "phrase"),
        ("#### Step 2: add 3", "3", "last-number"),
        ("#### 1. Compute 9", "9", "last-number"),
        ("x = 5-3", "3", "last-number"),
        ("it fell to -7 degrees", "-7", "last-number"),
        ("it costs $1,250.50 now.", "$1,250.50", "last-number"),
    ],
)
def test_extraction(text, value, way):
    found = extract_answer(text)
    assert found is not None and (found.value, found.way) == (value, way)
    if way == "last-number":
        assert extract_answer(text, allow_last_number=False) is None


@pytest.mark.parametrize("text", ["", "####", "A:\n", "no number", "a: the first", "\\boxed{}"])
def test_nothing_to_extract(text):
    assert extract_answer(text) is None


def test_markers():
    assert find_marker("ab\n####7") == (3, True)
    assert find_marker("####7\nA: 8\nx") == (6, True)
    assert find_marker("the answer is 7 and the answer is 8") == (24, False)
    assert find_marker("the answer is found") is None


@pytest.mark.parametrize(
    ("extracted", "reference", "same"),
    [
        ("073", "73", True),
        ("07", "7", True),
        ("1,000.0", "1000", True),
        (" $1{,}000\\!", "1000", True),
        ("50\\%", "50", True),
        ("3/4", "0.75", True),
        ("\\frac{3}{4}", "0.75", True),
        ("−3", "-3", True),
        ("-3", "3", False),
        ("73", "37", False),
        ("10", "100", False),
        ("0.333", "1/3", False),
        ("1e3", "1000", True),
        ("x = 42", "42", True),
        ("42 apples", "42", True),
        ("1.8 billion", "1.8", False),
        ("70+3", "73", False),
        ("1,2", "12", False),
        ("1/0", "1", False),
        ("\\text{East}", "east", True),
        ("yes", "no", False),
        ("", "", False),
        ("", "5", False),
        ("9" * 5000, "9" * 5000, True),
        ("9" * 5000, "9" * 4999, False),
        ("1e999999999", "1", False),
    ],
)
def test_plain_answers(extracted, reference, same):
    assert same_answer(extracted, reference) is same


@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12))
def test_integers_agree_with_integers(a, b):
    assert same_answer(f"{a:,}", str(b)) is (a == b)
    assert same_answer(f"{a}.00", f"{a:+d}") is True


@given(st.integers(-999, 999), st.integers(1, 40), st.integers(-999, 999), st.integers(1, 40))
def test_fractions_agree_with_fractions(a, b, c, d):
    assert same_answer(f"{a}/{b}", f"{c}/{d}") is (Fraction(a, b) == Fraction(c, d))


@pytest.mark.parametrize(
    ("extracted", "reference", "same"),
    [
        ("2\\sqrt{3}", "\\sqrt{12}", True),
        ("2\\sqrt{3}", "\\sqrt{13}", False),
        ("(x+1)^2", "x^2+2x+1", True),
        ("(1,2)", "(1, 2)", True),
        ("(1,2)", "(2,1)", False),
        ("\\sqrt{4}", "2", True),
        ("9^{9^{9^9}}", "\\pi", False),
        ("((9^99)^99)^99", "\\pi", False),
    ],
)
def test_expressions_in_a_thread(extracted, reference, same):
    pytest.importorskip("math_verify")
    seen = []
    thread = threading.Thread(target=lambda: seen.append(same_answer(extracted, reference)))
    thread.start()
    thread.join()
    assert seen == [same] == [same_answer(extracted, reference)]


def test_without_math_verify_only_expressions_need_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    answers._math_verify.cache_clear()
    try:
        assert same_answer("3/4", "0.75") and not same_answer("7+*3", "73") and not same_answer("yes", "no")
        with pytest.raises(UserError, match=r"ssrctl\[math\]"):
            same_answer("\\sqrt{12}", "2\\sqrt{3}")
    finally:
        answers._math_verify.cache_clear()


def test_check_answer():
    assert check_answer("####73", "73").correct is True
    assert check_answer("####72", "73").correct is False
    assert check_answer("####73", None).correct is None
    assert check_answer("nothing", "73").correct is False and check_answer("nothing", "73").extracted is None
    assert check_answer("76-3=73", "73").correct is True
    assert check_answer("76-3=73", "73", allow_last_number=False).correct is False
    worked = check_answer("A: 18", "She has 16-3=13.\n9*2=18\n#### 18")
    assert (worked.correct, worked.extracted, worked.way) == (True, "18", "marker")
    assert check_answer("\\boxed{7}", "Hence $3+4=\\boxed{7}$ as claimed in 2024.").correct is True


def test_agreement_with_human_labels(data_dir):
    rows = [json.loads(line) for line in (data_dir / "gsm8k_model_responses.jsonl").open(encoding="utf-8")]
    agree = sum(check_answer(row["response"], row["answer"]).correct == row["is_correct"] for row in rows)
    assert len(rows) > 1000 and agree / len(rows) >= 0.99


@pytest.mark.parametrize(
    "piece",
    [
        "#### ",
        "1,111,",
        "\\boxed{",
        "{",
        "9",
        "A:",
        "A ",
        "the answer is ",
        "answer to ",
        "$",
        "\\text{",
        "-",
        "answer is $",
    ],
)
def test_long_repetitions_end(piece):
    text = piece * (100_000 // len(piece))
    check_answer(text, "5")
    check_answer("A" + " " * 100_000 + text, "5")
    same_answer(text, "\\pi")
    find_marker(text)
