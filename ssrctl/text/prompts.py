"""Prompts: the wording around a question, as text and as token ids."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ssrctl.configs import DatasetConfig, PromptOptions, is_bundled
from ssrctl.errors import UserError, first_line
from ssrctl.io.files import existing_file
from ssrctl.io.package_data import profile_path
from ssrctl.io.row_fields import Message

SLOT = "{question}"
_SURROGATE = re.compile("[\ud800-\udfff]")
# Parameters of apply_chat_template that decide the form of its result.
_SET_HERE = frozenset(
    [
        "conversation",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "messages",
    ]
)
_PROBE = "4711"
_SHOWN_START, _SHOWN_END = 300, 100


def load_template(name: str, dataset: str) -> str:
    """Read the wording of a prompt, with ``{question}`` as its slot.

    Args:
        name: a name in profiles/prompts, a text file, or ``auto``: ``plain`` for the bundled problems, which
            are a language of their own, ``steps`` for all others.
        dataset: decides ``auto``.

    Raises:
        UserError: no such template, or one without ``{question}``.
    """
    if name == "auto":
        name = "plain" if is_bundled(dataset) else "steps"
    path = profile_path("prompts", name, ".txt")
    try:
        template = path.read_text(encoding="utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}", f"name a text file with {SLOT} in it") from error
    if SLOT not in template:
        raise UserError(f"{path} has no {SLOT} in it", f"write {SLOT} where the question goes")
    return template


@dataclass(frozen=True)
class PromptFormat:
    """The way from a question to its prompt.

    Attributes:
        wording: text around a question, with ``{question}`` as its slot.
        words_messages: apply the wording to the last of a row's chat messages too.
        system: system message for rows without one.
        chat_template: template to use instead of the tokenizer's; None keeps that.
        variables: further variables of the chat template.
    """

    wording: str = SLOT
    words_messages: bool = False
    system: str | None = None
    chat_template: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


def load_prompt_format(config: PromptOptions) -> PromptFormat:
    """Read the files that the settings of the prompt name.

    Raises:
        UserError: no such template, one without ``{question}``, or variables that ssrctl sets itself.
    """
    chat_template = None
    if config.chat_template is not None:
        path = existing_file(config.chat_template, "chat template")
        try:
            chat_template = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8: {error}", "name a text file with a jinja template") from error
    variables = config.chat_template_variables
    dataset = config.dataset if isinstance(config, DatasetConfig) else ""
    if taken := sorted(_SET_HERE & variables.keys()):
        raise UserError(f"--chat-template-kwargs: '{taken[0]}' is set by ssrctl", "leave it out")
    return PromptFormat(
        wording=load_template(config.prompt_template, dataset),
        words_messages=config.prompt_template != "auto",
        system=config.system_prompt,
        chat_template=chat_template,
        variables=variables,
    )


def use_chat_template(tokenizer: Any, prompt_format: PromptFormat) -> None:
    """Give the tokenizer the chat template of ``--chat-template``, if there is one."""
    if prompt_format.chat_template is not None:
        tokenizer.chat_template = prompt_format.chat_template


def build_prompt(
    tokenizer: Any, prompt_format: PromptFormat, question: str, messages: Sequence[Message] | None = None
) -> str:
    """Return the prompt as text: by the tokenizer's chat template where it has one, else the wording itself.

    Args:
        tokenizer: with or without a chat template.
        prompt_format: wording, system message and variables.
        question: as text.
        messages: chat messages of the row, whose last one is the question; their roles are kept.

    Raises:
        UserError: chat messages or a system prompt without a chat template; a template that fails or drops a text.
    """
    system = [] if prompt_format.system is None else [{"role": "system", "content": prompt_format.system}]
    if messages is None:
        # str.format would read every other brace of the template (LaTeX, json) as a field.
        content = prompt_format.wording.replace(SLOT, question)
        messages = [{"role": "user", "content": content}]
        if tokenizer.chat_template is None and not system:
            return content + "\n"
    elif prompt_format.words_messages:
        last = messages[-1] | {"content": prompt_format.wording.replace(SLOT, question)}
        messages = [*messages[:-1], last]
    if messages[0]["role"] != "system":
        messages = [*system, *messages]
    if tokenizer.chat_template is None:
        raise UserError(
            "chat messages and system prompts need a chat template, and the tokenizer has none",
            "give one with --chat-template FILE, or a model that was trained on chats",
        )
    prompt = _rendered(tokenizer, prompt_format, messages)
    if _dropped(messages, prompt) is not None:  # templates of multimodal models take a list of parts
        parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
        with contextlib.suppress(UserError):
            prompt = _rendered(tokenizer, prompt_format, parts)
    if (dropped := _dropped(messages, prompt)) is not None:
        raise UserError(
            f"the chat template drops the {dropped['role']} message: the prompt is {shown_prompt(prompt)}",
            "give a template that writes message['content'] with --chat-template FILE",
        )
    return prompt


def _rendered(tokenizer: Any, prompt_format: PromptFormat, messages: Sequence[Message]) -> str:
    try:
        prompt: str = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False, **prompt_format.variables
        )
    except Exception as error:  # a template is a program: it raises whatever its expressions raise
        roles = ", ".join(str(message["role"]) for message in messages)
        raise UserError(
            f"the chat template fails for messages of the roles {roles[:100]}: {first_line(error)}",
            "see --system-prompt and --chat-template-kwargs, or give another template with --chat-template FILE",
        ) from error
    return prompt


def _dropped(messages: Sequence[Message], prompt: str) -> Message | None:
    """Return the first user or system message whose text the prompt does not contain."""
    return next((m for m in messages if m["role"] in ("user", "system") and m["content"].strip() not in prompt), None)


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Return the token ids of a prompt; a chat template has written the special tokens itself.

    Raises:
        UserError: the tokenizer appends its end token, after which no response would follow.
    """
    text = without_surrogates(prompt)
    ids: list[int] = tokenizer(text, add_special_tokens=tokenizer.chat_template is None)["input_ids"]
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not text.rstrip().endswith(tokenizer.eos_token):
        raise UserError(
            f"the tokenizer appends its end token {tokenizer.eos_token!r} to a prompt, so responses would start after it",
            "set add_eos_token to false in its tokenizer_config.json, or remove the token from its post-processor",
        )
    return ids


def without_surrogates(text: str) -> str:
    """Return ``text`` with U+FFFD for every lone surrogate, which no tokenizer takes; as long as before."""
    return _SURROGATE.sub("\ufffd", text)


def turn_end_id(tokenizer: Any) -> int | None:
    """Return the token with which the chat template ends the assistant's turn; None if it writes none."""
    if tokenizer.chat_template is None:
        return None
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": _PROBE}]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template need not take these messages; prompts are built, and checked, elsewhere
        return None
    _, found, after = text.rpartition(_PROBE)
    ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"] if found else []
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def shown_prompt(prompt: str) -> str:
    """Return a prompt for one line of a log: escaped, and without its middle if it is long."""
    if len(prompt) <= _SHOWN_START + _SHOWN_END:
        return repr(prompt)
    left_out = len(prompt) - _SHOWN_START - _SHOWN_END
    return f"{prompt[:_SHOWN_START]!r} ... {left_out} characters ... {prompt[-_SHOWN_END:]!r}"
