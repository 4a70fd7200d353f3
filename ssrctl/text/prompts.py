"""Prompts: the wording around a question, as text and as token ids."""

from __future__ import annotations

from typing import Any

from ssrctl.configs import TINY_DATASET
from ssrctl.errors import UserError
from ssrctl.io.package_data import profile_path

SLOT = "{question}"


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
        name = "plain" if dataset == TINY_DATASET else "steps"
    path = profile_path("prompts", name, ".txt")
    template = path.read_text(encoding="utf-8").removesuffix("\n")
    if SLOT not in template:
        raise UserError(f"{path} has no {SLOT} in it", f"write {SLOT} where the question goes")
    return template


def build_prompt(tokenizer: Any, template: str, question: str) -> str:
    """Return the prompt as text: by the tokenizer's chat template where it has one, else the wording itself."""
    # str.format would read every other brace of the template (LaTeX, json) as a field.
    content = template.replace(SLOT, question)
    if tokenizer.chat_template is None:
        return content + "\n"
    messages = [{"role": "user", "content": content}]
    prompt: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return prompt


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Return the token ids of a prompt; a chat template has written the special tokens itself."""
    ids: list[int] = tokenizer(prompt, add_special_tokens=tokenizer.chat_template is None)["input_ids"]
    return ids
