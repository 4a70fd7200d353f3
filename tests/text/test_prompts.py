"""From a question to the prompt's tokens."""

import copy
from pathlib import Path

import pytest

from ssrctl.configs import TINY_DATASET, DatasetConfig
from ssrctl.errors import UserError
from ssrctl.io.package_data import shipped_names
from ssrctl.text.prompts import (
    SLOT,
    PromptFormat,
    build_prompt,
    encode_prompt,
    load_prompt_format,
    load_template,
    shown_prompt,
    turn_end_id,
    use_chat_template,
)

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


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3+4"}]
PARTS = "{% for m in messages %}{{ m['role'] }}:{% for c in m['content'] %}{{ c['text'] }}{% endfor %};{% endfor %}"


@pytest.mark.parametrize(
    ("made", "messages", "expected"),
    [
        (PromptFormat("Q: {question}"), MESSAGES, "<pad>system: Be brief.\n<pad>user: 3+4\nassistant:"),
        (PromptFormat("Q: {question}", words_messages=True), MESSAGES, "<pad>system: Be brief.\n<pad>user: Q: 3+4\nassistant:"),
        (PromptFormat(system="Think."), None, "<pad>system: Think.\n<pad>user: 3+4\nassistant:"),
        (PromptFormat(system="Think."), MESSAGES, "<pad>system: Be brief.\n<pad>user: 3+4\nassistant:"),
        (PromptFormat(system="Think."), MESSAGES[1:], "<pad>system: Think.\n<pad>user: 3+4\nassistant:"),
        (PromptFormat(), [*MESSAGES, {"role": "assistant", "content": "7"}, {"role": "user", "content": "3+4"}],
         "<pad>system: Be brief.\n<pad>user: 3+4\n<pad>assistant: 7\n<pad>user: 3+4\nassistant:"),
    ],
)  # fmt: skip
def test_chat_messages_keep_their_roles(chat_tokenizer, made, messages, expected):
    assert build_prompt(chat_tokenizer, made, "3+4", messages) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('A system message is required') }}",
            "fails for messages of the roles user: A system message",
        ),
        ("{{ messages[0]['content'] + nothing }}", "the chat template fails"),
        ("{% for m in messages %}{{ m }", "the chat template fails"),
        ("{{ 1 / 0 }}", "the chat template fails .* division by zero"),
        ("{{ messages[7]['content'] | length }}", "the chat template fails"),
        ({"rag": CHAT, "tool_use": CHAT}, "the chat template fails"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "drops the user message: the prompt is 'user'"),
        ("", "drops the user message: the prompt is ''"),
    ],
    ids=range(8),
)
def test_a_template_that_cannot_be_used_is_one_line(bpe_tokenizer, monkeypatch, template, message):
    monkeypatch.setattr(bpe_tokenizer, "chat_template", template)
    with pytest.raises(UserError, match=message) as caught:
        build_prompt(bpe_tokenizer, PromptFormat(), "3+4")
    assert "\n" not in caught.value.message and caught.value.remedy


def test_a_dropped_system_message_is_an_error(bpe_tokenizer, monkeypatch):
    monkeypatch.setattr(bpe_tokenizer, "chat_template", "{{ messages[-1]['content'] }}")
    assert build_prompt(bpe_tokenizer, PromptFormat(), "3+4") == "3+4"
    with pytest.raises(UserError, match="drops the system message"):
        build_prompt(bpe_tokenizer, PromptFormat(system="Think."), "3+4")


def test_a_template_for_parts_of_content_gets_them(bpe_tokenizer, monkeypatch):
    monkeypatch.setattr(bpe_tokenizer, "chat_template", PARTS)
    assert build_prompt(bpe_tokenizer, PromptFormat(system="Think."), "3+4") == "system:Think.;user:3+4;"


@pytest.mark.parametrize("made", [PromptFormat(system="Think."), PromptFormat()])
def test_roles_need_a_chat_template(bpe_tokenizer, made):
    with pytest.raises(UserError, match="need a chat template"):
        build_prompt(bpe_tokenizer, made, "3+4", None if made.system else MESSAGES[1:])


def test_settings_of_the_prompt(bpe_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(bpe_tokenizer, "chat_template", None)
    file = tmp_path / "own.jinja"
    file.write_text("{{ 'on' if thinking else 'off' }}:{{ messages[-1]['content'] }}", encoding="utf-8-sig")
    settings = {"chat_template": file, "chat_template_kwargs": '{"thinking": true}', "prompt_template": "plain"}
    made = load_prompt_format(DatasetConfig(**settings))
    use_chat_template(bpe_tokenizer, made)
    assert build_prompt(bpe_tokenizer, made, "3+4") == "on:3+4"
    assert made.words_messages and not load_prompt_format(DatasetConfig(dataset="x.jsonl")).words_messages


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chat_template": Path("absent.jinja")}, "chat template not found"),
        ({"chat_template_kwargs": "{thinking: no}"}, "--chat-template-kwargs is not valid json"),
        ({"chat_template_kwargs": "[1]"}, "--chat-template-kwargs must be a json object, got list"),
        ({"chat_template_kwargs": '{"tokenize": true}'}, "'tokenize' is set by ssrctl"),
    ],
)
def test_bad_settings_of_the_prompt(settings, message):
    with pytest.raises(UserError, match=message):
        load_prompt_format(DatasetConfig(**settings))


def test_variables_of_a_yaml_file_may_be_a_mapping():
    made = DatasetConfig(chat_template_kwargs={"enable_thinking": False})  # type: ignore[arg-type]
    assert made.chat_template_variables == {"enable_thinking": False}


def test_a_tokenizer_that_ends_prompts_is_refused(starting_tokenizer):
    from tokenizers import processors

    tokenizer = copy.deepcopy(starting_tokenizer)
    tokenizer.eos_token = "<s>"
    assert encode_prompt(tokenizer, "3+4") == [0, 2, 3, 4]  # begins with the end token, as GPT-2's may
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <s>", special_tokens=[("<s>", 0)]
    )
    with pytest.raises(UserError, match="appends its end token '<s>' to a prompt"):
        encode_prompt(tokenizer, "3+4")


def test_lone_surrogates_become_replacement_characters(bpe_tokenizer):
    ids = encode_prompt(bpe_tokenizer, "a\ud800b")
    assert bpe_tokenizer.decode(ids) == "a\ufffdb"


def test_shown_prompts_are_one_short_line():
    assert shown_prompt("a\n\x1b[31mé\ud800") == "'a\\n\\x1b[31mé\\ud800'"
    shown = shown_prompt("a" * 500 + "\nend")
    assert shown.startswith("'aaa") and "104 characters" in shown and shown.endswith("\\nend'")


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("{% for m in messages %}{{ m['role'] }} {{ m['content'] }}<pad>\n{% endfor %}", "<pad>"),
        ("{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <end>{% endfor %}", "<end>"),
        ("{% for m in messages %}{{ m['role'] }} {{ m['content'] }}\n{% endfor %}", None),
        ("{{ messages[0]['content'] }}", None),
        ("{{ raise_exception('no') }}", None),
        (None, None),
    ],
)
def test_the_end_of_a_turn_is_read_off_the_template(bpe_tokenizer, monkeypatch, template, end):
    monkeypatch.setattr(bpe_tokenizer, "chat_template", template)
    assert turn_end_id(bpe_tokenizer) == (None if end is None else bpe_tokenizer.convert_tokens_to_ids(end))
