"""Final answers: where they are found, how they are graded, and agreement with human labels."""

import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.text.answer_equality import decide
from ssrctl.text.answers import check_answer, check_answers, extract_answer, find_marker


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
        ("#### x^2+1", "x^2+1", "hashes"),
        ("#### (a+5)(b+2)", "(a+5)(b+2)", "hashes"),
        ("#### p - q", "p - q", "hashes"),
        ("#### A - the setup has 3 parts", "3", "last-number"),
        ("the answer is $\\$36$.", "\\$36", "phrase"),
        ("so the answer is x = 5.", "x = 5", "phrase"),
        ("Answer: The final answer is 5.", "5", "marker"),
        ("Answer:\n$$\n\\frac{1}{2}\n$$\nDone in 3 lines.", "\\frac{1}{2}", "marker"),
        ("Answer: $$7$$", "7", "marker"),
        ("因此，答案是 42。", "42", "phrase"),
        ("答案：42。", "42", "marker"),
        ("<think>\\boxed{3}? No.</think> The answer is 5.", "5", "phrase"),
        ("<think>It is \\boxed{3}.</think>", "3", "boxed"),
        ("<think>It is \\boxed{3}.", "3", "boxed"),
        ("<think>the answer is 3</think>\n4 it is", "4", "last-number"),
        ("\\boxed{3}? No.</think> It is \\boxed{8}.", "8", "boxed"),
        ("[THINK]\\boxed{3}[/THINK]The answer is 9.", "9", "phrase"),
        (
            "<|channel|>analysis<|message|>\\boxed{3}<|end|><|start|>assistant<|channel|>final<|message|>So 6.<|return|>",
            "6",
            "last-number",
        ),
        ("analysisIt is \\boxed{3}.assistantfinalThe answer is 7.", "7", "phrase"),
        ("<|channel|>analysis<|message|>the answer is 3", "3", "phrase"),
        # tags
        ("t</think><answer>\\frac{2}{9}</answer>", "\\frac{2}{9}", "answer-tag"),
        ("<answer>\n14\n</answer>\nI used 5 steps.", "14", "answer-tag"),
        ("<answer>5</answer> no: <answer>(6, 7)", "(6, 7)", "answer-tag"),
        ("<answer>As $3+4=7$, it is \\boxed{7}.</answer> 8", "7", "boxed"),
        ("<answer>2 and 2\nThe answer is 4.</answer>", "4", "phrase"),
        ("<Final_Answer>C</Final_Answer>", "C", "answer-tag"),
        # headings and display formulas
        ("so 3\n\n## Final Answer\n\n$17$\n", "17", "heading"),
        ("**Final Answer**\n\\[\n\\frac{1}{7}\n\\]\nin 3 lines", "\\frac{1}{7}", "heading"),
        ("### 4. Answer\nThe answer is 12.\n", "12", "heading"),
        ("Final answer\n\n(C)\n", "(C)", "heading"),
        ("Hence the answer is\n\\[\n\\frac{5}{9}.\n\\]", "\\frac{5}{9}.", "phrase"),
        ("the answer is:\n\n$$ x = 4 $$", "x = 4", "phrase"),
        # options
        ("The answer is (B).", "(B)", "phrase"),
        ("The answer is (B) because 3 < 4.", "(B)", "phrase"),
        ("So the correct option is (D).", "(D)", "phrase"),
        ("Choice A is out. Hence option (C) is correct.", "(C)", "phrase"),
        # boxes
        ("\\boxed{2} or \\boxed{3}", "2, 3", "boxed"),
        ("$x = \\boxed{2}$, $y = \\boxed{3}$ and $z = \\boxed{4}$.", "2, 3, 4", "boxed"),
        ("\\boxed{2}, so it is \\boxed{3}", "3", "boxed"),
        ("\\boxed{\\text{so }\\boxed{3}}", "3", "boxed"),
        # the last number, never inside a formula or a tag
        ("In 3 ways: $x^2 = 49$ and <img width=8>", "3", "last-number"),
        ("There are $12$.", "12", "last-number"),
        ("it is 5 \\frac{1}{2} x_3", "5", "last-number"),
    ],
)
def test_extraction(text, value, way):
    found = extract_answer(text)
    assert found is not None and (found.value, found.way) == (value, way)
    if way == "last-number":
        assert extract_answer(text, extraction="strict") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "####",
        "A:\n",
        "no number",
        "a: the first",
        "\\boxed{}",
        "<think>It is \\boxed{3}.</think> Done, see above.",
        "so $x = 5-3$",
        "<answer></answer>",
    ],
)
def test_nothing_to_extract(text):
    assert extract_answer(text) is None


def test_markers():
    assert find_marker("ab\n####7") == (3, True)
    assert find_marker("####7\nA: 8\nx") == (6, True)
    assert find_marker("the answer is 7 and the answer is 8") == (24, False)
    assert find_marker("the answer is found") is None
    assert find_marker("ab <answer>7</answer>") == (3, True)
    assert find_marker("ab\n## Final Answer\n7") == (3, True)
    assert find_marker("ab. The correct option is (B).") == (16, False)


def test_outcomes():
    def graded(response, reference, **options):
        final = check_answer(response, reference, **options)
        return final.outcome, final.correct, final.extracted, final.way

    assert graded("####73", "73") == ("correct", True, "73", "hashes")
    assert graded("####72", "73") == ("wrong", False, "72", "hashes")
    assert graded("####73", None) == (None, None, "73", "hashes")
    assert graded("nothing", None) == (None, None, None, None)
    assert graded("nothing", "73") == graded("", "73") == ("unparsed", False, None, None)
    assert graded("76-3=73", "73") == ("correct", True, "73", "last-number")
    assert graded("76-3=73", "73", extraction="strict") == ("unparsed", False, None, None)


def test_references_may_be_worked_solutions():
    worked = check_answer("A: 18", "She has 16-3=13.\n9*2=18\n#### 18")
    assert (worked.correct, worked.extracted, worked.way) == (True, "18", "marker")
    assert check_answer("\\boxed{7}", "Hence $3+4=\\boxed{7}$ as claimed in 2024.").correct is True
    assert check_answer("\\boxed{2024}", "Hence $3+4=\\boxed{7}$ as claimed in 2024.").correct is False


def test_many_at_once_keep_their_order():
    pytest.importorskip("math_verify")
    pairs = [
        ("\\boxed{2\\sqrt{3}}", "\\sqrt{12}"),
        ("#### 5", "5"),
        ("", "5"),
        ("\\boxed{9^{9^{9^9}}}", "\\pi"),
        ("\\boxed{2\\sqrt{3}}", "\\sqrt{13}"),
        ("#### 6", None),
    ]
    done = []
    finals = check_answers(pairs, timeout=1.0, on_done=done.append)
    assert [final.outcome for final in finals] == ["correct", "correct", "unparsed", "timed_out", "wrong", None]
    assert finals[3].correct is None and finals[3].extracted == "9^{9^{9^9}}", "neither right nor wrong"
    assert done == [1] * 6
    assert check_answers([]) == []


def test_many_agree_with_one():
    pairs = [(f"the answer is {n}", "7") for n in range(6, 9)] + [("x", "7"), ("\\boxed{14/2}", "7"), ("7", None)]
    assert check_answers(pairs) == [check_answer(*pair) for pair in pairs]


def test_threads_grade_at_the_same_time():
    pytest.importorskip("math_verify")
    seen: dict[int, list] = {}

    def grade(number: int) -> None:
        pairs = [(f"\\boxed{{{k}\\sqrt{{{number}}}}}", f"\\sqrt{{{4 * number}}}") for k in (1, 2, 3)]
        seen[number] = [check_answer(*pair).correct for pair in pairs]

    threads = [threading.Thread(target=grade, args=(number,)) for number in (2, 3, 5, 7, 11, 13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {number: [False, True, False] for number in (2, 3, 5, 7, 11, 13)}


@given(st.text(alphabet=st.characters(), max_size=200), st.sampled_from(["5", "yes", "B", "x=5", "5 \\text{ cm}"]))
def test_any_text_has_an_outcome(text, reference):
    final = check_answer(text, reference, timeout=0.5)
    assert final.outcome in ("correct", "wrong", "unparsed", "timed_out")
    assert (final.outcome == "unparsed") == (final.extracted is None)
    if final.extracted is not None:
        assert all(part in text for part in final.extracted.split(", ")), "an answer is words of the response"


def test_agreement_with_human_labels(data_dir):
    rows = [json.loads(line) for line in (data_dir / "gsm8k_model_responses.jsonl").open(encoding="utf-8")]
    finals = check_answers([(row["response"], row["answer"]) for row in rows])
    agree = sum(final.correct == row["is_correct"] for final, row in zip(finals, rows, strict=True))
    assert len(rows) > 1000 and agree / len(rows) >= 0.995
    assert sum(final.correct for final in finals) > 200, "both labels occur"


def test_references_of_competitions_with_leading_zeros(data_dir):
    answers = [json.loads(line)["answer"] for line in (data_dir / "aime_1983_2024.jsonl").open(encoding="utf-8")]
    for answer, following in zip(answers, answers[1:] + answers[:1], strict=True):
        response = f"As $0 \\le n < 1000$, it is $\\boxed{{{answer:0>3}}}$."
        assert check_answer(response, answer).outcome == "correct"
        assert check_answer(response, following).correct is (int(answer) == int(following))


@pytest.mark.parametrize(
    "form",
    [
        "Adding 12 and 7 gives 19.\n\nThe final answer is \\[\\boxed{ANSWER}\\] I hope it is correct.",
        "so\n**Answer:** $ANSWER$",
        "so the answer is $ANSWER$.",
        "so\n#### ANSWER",
    ],
)
def test_references_of_math500_are_found_again(data_dir, form):
    references = [json.loads(line)["answer"] for line in (data_dir / "math500.jsonl").open(encoding="utf-8")]
    assert len(references) == 500
    finals = check_answers([(form.replace("ANSWER", reference), reference) for reference in references])
    assert [r for r, final in zip(references, finals, strict=True) if not final.correct] == []


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
        "answer is \\(",
        "答案是",
        "</think>",
        "Answer:\n$$\n",
        "\ud800",
        "<answer>",
        "<think>",
        "[THINK]a",
        "<|channel|>analysis<|message|>",
        "## Final Answer\n",
        "option ",
        "\\boxed{1}, ",
        "answer is \\[",
        "<a",
        "\\frac{1}",
        "$1$",
    ],
)
def test_long_repetitions_end(piece):
    text = piece * (100_000 // len(piece))
    check_answer(text, "5")
    check_answer("A" + " " * 100_000 + text, "5")
    decide(text, "\\pi")
    decide(text[:2000], "5")
    find_marker(text)
