"""From a question to the prompt's tokens."""

import pytest

from ssrctl.configs import TINY_DATASET
from ssrctl.errors import UserError
from ssrctl.io.package_data import shipped_names
from ssrctl.text.prompts import SLOT, PromptFormat, build_prompt, encode_prompt, load_template

CHAT = (
    "{% for m in messages %}<pad>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def chat_tokenizer(bpe_tokenizer, monkeypatch):
    """With a chat template that writes a special token itself."""
    monkeypatch.setattr(bpe_tokenizer, "chat_template", CHAT)
    return bpe_tokenizer


@pytest.fixture
def starting_tokenizer():
    """A base model's tokenizer, which begins every text with a special token unless told not to."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1, "3": 2, "+": 3, "4": 4}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("name", shipped_names("prompts", ".txt"))
def test_shipped_templates_ask_the_question_once(name):
    assert load_template(name, "any").count(SLOT) == 1


def test_auto_is_plain_for_the_bundled_problems_alone():
    assert load_template("auto", TINY_DATASET) == load_template("plain", "any") == SLOT
    assert load_template("auto", "gsm8k.jsonl") == load_template("steps", TINY_DATASET) != SLOT


def test_a_template_of_ones_own(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text('Reply with {"answer": \\boxed{n}}.\n{question}\n', encoding="utf-8")
    assert load_template(str(file), "any") == 'Reply with {"answer": \\boxed{n}}.\n{question}'
    file.write_text("No slot: {Question}", encoding="utf-8")
    with pytest.raises(UserError, match=r"mine\.txt has no \{question\}"):
        load_template(str(file), "any")
    with pytest.raises(UserError, match=r"'nowhere' is neither .*plain.*steps"):
        load_template("nowhere", "any")


def test_other_braces_of_template_and_question_are_left_alone(bpe_tokenizer):
    question = r"What is \frac{1}{2} of {x} in {0}?"
    template = 'Answer as {"n": ...}: ' + SLOT
    assert build_prompt(bpe_tokenizer, PromptFormat(template), question) == f'Answer as {{"n": ...}}: {question}\n'


def test_without_a_chat_template_the_wording_ends_with_a_line_break(bpe_tokenizer):
    assert build_prompt(bpe_tokenizer, PromptFormat("Q: {question}"), "3+4=?") == "Q: 3+4=?\n"


def test_a_chat_template_opens_the_assistants_turn(chat_tokenizer):
    assert build_prompt(chat_tokenizer, PromptFormat("Q: {question}"), "3+4=?") == "<pad>user: Q: 3+4=?\nassistant:"


def test_special_tokens_are_written_once(chat_tokenizer, starting_tokenizer):
    ids = encode_prompt(chat_tokenizer, build_prompt(chat_tokenizer, PromptFormat(), "3+4"))
    assert ids[0] == chat_tokenizer.pad_token_id and ids.count(chat_tokenizer.pad_token_id) == 1
    assert encode_prompt(starting_tokenizer, "3+4") == [0, 2, 3, 4]
    starting_tokenizer.chat_template = CHAT.replace("<pad>", "<s>")
    ids = encode_prompt(starting_tokenizer, build_prompt(starting_tokenizer, PromptFormat(), "3+4"))
    assert ids.count(0) == 1
