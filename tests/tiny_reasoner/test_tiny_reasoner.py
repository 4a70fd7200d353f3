"""The embedded tiny reasoner: its problems, its tokenizer and its weights."""

import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssrctl import tiny_reasoner
from ssrctl.tiny_reasoner.problems import Problem, order_of, problems, split_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

seeds = st.integers(min_value=-(2**63), max_value=2**63)
splits = st.sampled_from(["train", "heldout"])
operation_counts = st.tuples(st.integers(1, 6), st.integers(1, 6)).map(sorted)


def running_results(question: str) -> list[int]:
    """Every intermediate result, found without the generator: nested brackets given to Python.

    The reduction is done on the unreduced integers, which modular arithmetic says is the same.
    """
    expression = question.removesuffix("=?")
    start, *operations = re.findall(r"^\d+|[-+*]\d", expression)
    assert start + "".join(operations) == expression
    results = []
    nested = str(int(start))  # 07 is no number of Python's
    for operation in operations:
        nested = f"({nested}){operation}"
        results.append(eval(nested) % 100)
    return results


@settings(max_examples=40, deadline=None)
@given(train_seed=seeds, heldout_seed=seeds, counts=operation_counts)
def test_splits_never_share_a_question(train_seed, heldout_seed, counts):
    train = {p.question for p in problems("train", 60, train_seed, *counts)}
    heldout = {p.question for p in problems("heldout", 60, heldout_seed, *counts)}
    assert not train & heldout
    assert {split_of(question) for question in train} == {"train"}
    assert {split_of(question) for question in heldout} == {"heldout"}


def test_about_one_question_in_eight_is_held_out():
    questions = [f"{start}{op}{n}=?" for start in range(10, 100) for op in "+-*" for n in range(2, 10)]
    heldout = sum(split_of(question) == "heldout" for question in questions)
    # 2160 draws at 1/8: a standard deviation of 15, and the hash is fixed.
    assert 225 < heldout < 315


@settings(max_examples=40, deadline=None)
@given(split=splits, seed=seeds, counts=operation_counts)
def test_solutions_are_right_and_in_the_documented_form(split, seed, counts):
    min_ops, max_ops = counts
    for problem in problems(split, 20, seed, min_ops, max_ops):
        start, *operations = re.findall(r"^\d\d|[-+*][2-9]", problem.question.removesuffix("=?"))
        assert min_ops <= len(operations) <= max_ops
        assert 10 <= int(start) <= 99
        results = running_results(problem.question)
        *lines, final = problem.solution.split("\n")
        befores = [int(start), *results[:-1]]
        assert lines == [
            f"{before:02d}{operation}={after:02d}"
            for before, operation, after in zip(befores, operations, results, strict=True)
        ]
        assert final == f"####{problem.answer}"
        assert problem.answer == f"{results[-1]:02d}"


@settings(max_examples=20, deadline=None)
@given(split=splits, seed=seeds, counts=operation_counts)
def test_problems_are_distinct_deterministic_and_extend(split, seed, counts):
    found = problems(split, 80, seed, *counts)
    assert len({p.question for p in found}) == len({p.id for p in found}) == 80
    assert found == problems(split, 80, seed, *counts)
    assert found[:30] == problems(split, 30, seed, *counts)


def test_half_of_the_smallest_split_can_be_had():
    assert len({p.question for p in problems("heldout", 135, 0, 1, 1)}) == 135


def test_problems_differ_between_seeds():
    assert problems("train", 5, 0) != problems("train", 5, 1)


@pytest.mark.parametrize(
    ("split", "question", "identifier"),
    [("train", "38*2-8+2-8-5=?", "train-dd4c53ef6360"), ("heldout", "15*4*9*4*5=?", "heldout-015091ca29ae")],
)
def test_the_dataset_does_not_drift(split, question, identifier):
    [problem] = problems(split, 1, seed=0)
    assert (problem.question, problem.id) == (question, identifier)


IN_DISTRIBUTION = re.compile(r"[1-9]\d([-+*][2-9]){4,5}=\?")


@pytest.mark.parametrize("variant", ["longer", "numbers"])
def test_variants_are_outside_of_the_training_distribution(variant):
    trained = problems("train", 300, 0) + problems("heldout", 300, 0)
    assert all(IN_DISTRIBUTION.fullmatch(problem.question) for problem in trained)
    found = problems("heldout", 200, 3, variant=variant)
    assert not any(IN_DISTRIBUTION.fullmatch(problem.question) for problem in found)
    assert found == problems("heldout", 200, 3, variant=variant) and found[:50] == problems(
        "heldout", 50, 3, variant=variant
    )
    assert len({problem.id for problem in found}) == 200 and found[0].id.startswith(f"{variant}-heldout-")
    sizes = {len(order_of(problem.question)) for problem in found}
    assert sizes == ({6, 7, 8} if variant == "longer" else {4, 5})
    assert all(running_results(problem.question)[-1] == int(problem.answer) for problem in found)
    if variant == "numbers":
        assert all(int(problem.question[:2]) < 10 for problem in found)
        assert {operand for problem in found for operand in re.findall(r"[-+*](\d)", problem.question)} == set(
            "0123456789"
        )


def test_orders_of_operators_are_held_out_whole():
    orders = {
        split: {order_of(problem.question) for problem in problems(split, 400, 0, variant="order")}
        for split in ("train", "heldout")
    }
    assert not orders["train"] & orders["heldout"]
    assert 10 < len(orders["heldout"]) < 81 and len(orders["train"]) > 150
    assert all(IN_DISTRIBUTION.fullmatch(problem.question) for problem in problems("heldout", 100, 0, variant="order"))


def test_record_has_the_documented_fields():
    [problem] = problems("heldout", 1, 3)
    record = problem.to_record()
    assert list(record) == ["id", "question", "answer", "solution", "modulus"]
    assert record["modulus"] == 100
    assert Problem(**record) == problem


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "train, heldout"),
        ({"num": -1}, "negative"),
        ({"min_ops": 0}, "min_ops"),
        ({"min_ops": 3, "max_ops": 2}, "min_ops"),
        ({"num": 136, "min_ops": 1, "max_ops": 1}, "at most 135"),
        ({"variant": "harder"}, "longer, numbers, order"),
    ],
)
def test_impossible_requests_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        problems(**{"split": "heldout", "num": 1, "seed": 0, **arguments})


def test_no_problems_asked_for_gives_none():
    assert problems("train", 0, 0) == []


def test_importing_the_package_is_light():
    code = (
        "import sys, ssrctl.tiny_reasoner.problems\n"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(tiny_reasoner.path())


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_reasoner.path()).eval()


@settings(max_examples=100, deadline=None)
@given(text=st.text("0123456789+-*=?#\n", max_size=100))
def test_tokenizer_round_trip_and_offsets(tokenizer, text):
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer.is_fast
    assert tokenizer.decode(encoded.input_ids) == text
    assert encoded.offset_mapping == [(i, i + 1) for i in range(len(text))]
    assert tokenizer.unk_token_id not in encoded.input_ids


def test_unknown_characters_are_one_unknown_token_each(tokenizer):
    assert tokenizer("a 1é").input_ids == [
        *[tokenizer.unk_token_id] * 2,
        tokenizer.convert_tokens_to_ids("1"),
        tokenizer.unk_token_id,
    ]


def test_special_tokens_agree_everywhere(tokenizer, model):
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<pad>", "<bos>", "<eos>"]
    for config in (model.config, model.generation_config):
        assert [config.pad_token_id, config.bos_token_id, config.eos_token_id] == ids
    assert tokenizer.padding_side == "left"
    assert len(tokenizer) == model.config.vocab_size


def test_chat_template(tokenizer):
    question = {"role": "user", "content": "48*6-2=?"}
    answer = {"role": "assistant", "content": "48*6=88\n88-2=86\n####86"}
    system = {"role": "system", "content": "Think."}
    prompt = tokenizer.apply_chat_template([question], add_generation_prompt=True, tokenize=False)
    assert prompt == "<bos>48*6-2=?\n"
    assert prompt == tokenizer.apply_chat_template([system, question], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([question, answer], tokenize=False)
    assert whole == prompt + answer["content"] + "<eos>"
    encoded = tokenizer.apply_chat_template([question, answer], return_dict=True, return_assistant_tokens_mask=True)
    num_prompt_tokens = len(tokenizer(prompt).input_ids)
    num_response_tokens = len(answer["content"]) + 1
    assert encoded["assistant_masks"] == [0] * num_prompt_tokens + [1] * num_response_tokens


def test_weights_are_a_tiny_qwen3(model):
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.num_parameters() == 421_248
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert all(p.isfinite().all() for p in model.parameters())


def test_folder_is_small():
    size = sum(file.stat().st_size for file in tiny_reasoner.path().rglob("*") if file.is_file())
    assert size <= 3_000_000


def test_generation_config_samples_the_model_itself(model):
    config = model.generation_config
    assert (config.do_sample, config.temperature, config.top_p, config.top_k) == (True, 1.0, 1.0, 0)


def test_sampled_accuracy_leaves_room_for_learning(tokenizer, model):
    heldout = problems("heldout", 100, seed=11)
    chats = [[{"role": "user", "content": problem.question}] for problem in heldout]
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        output = model.generate(**prompts, max_new_tokens=64, num_return_sequences=2)
    responses = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :])
    finals = [re.fullmatch(r"(?s).*\n####(\d\d)<eos>(<pad>)*", response) for response in responses]
    answers = [problem.answer for problem in heldout for _ in range(2)]
    right = [bool(f and f[1] == answer) for f, answer in zip(finals, answers, strict=True)]
    # The standard error of 200 samples is 0.034, so the band is three of them on either side.
    assert 0.25 < sum(right) / 200 < 0.5
    assert sum(map(bool, finals)) / 200 > 0.94
    # Groups with both a right and a wrong sample are what reinforcement learning needs.
    assert sum(a != b for a, b in zip(right[::2], right[1::2], strict=True)) > 15
