"""Conventions of process reward models: the text that they read, and the place where they score a step.

| style | model | text | read at | probability of a right step |
|---|---|---|---|---|
| trl | token classifier of two labels (TRL's PRMTrainer) | question, each step and a separator | the separator's last token | label 1 |
| qwen2.5-math | Qwen2 with a head of two layers | chat, steps joined by ``<extra_0>`` | ``<extra_0>`` | label 1 |
| math-shepherd | causal LM (Wang et al. 2024) | ``question Step 1: ... ки`` | ``ки`` | ``+`` among ``+`` and ``-`` |
| openr | causal LM (Wang et al. 2024b) | question, each step and five line breaks | the line breaks | the same |
| rlhflow | causal LM (Xiong et al. 2024) | chat, a user's turn per step answered by ``+`` | before each ``+`` | the same |

A model reads a step's place and what is before it, so the text ends at the last step's place. Text from outside is
encoded without special tokens: a response can neither end a turn nor write ``<extra_0>``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ssrctl.errors import UserError, first_line
from ssrctl.text.prompts import without_surrogates

StyleName = Literal["trl", "qwen2.5-math", "math-shepherd", "openr", "rlhflow"]

QWEN_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
_STEP_LABEL = re.compile(r"\s*Step \d+:")
# Places in a chat template, from the private use area: no template writes them, and text that does is refused.
_SLOTS = ("\ue0f0", "\ue0f1")
_FIRST_SLOT = 0xE100


@dataclass(frozen=True)
class Style:
    """One convention.

    Attributes:
        name: value of ``--critic-prm-style``.
        tag: text after each step; None where the form of the chat says where a step ends.
        candidates: texts whose tokens, two in all, stand for a right and a wrong step; empty for a classifier.
        architectures: endings of the config's architecture that belong to this style only.
    """

    name: StyleName
    tag: str | None
    candidates: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()


STYLES: dict[str, Style] = {
    style.name: style
    for style in (
        Style("trl", "\n", architectures=("ForTokenClassification",)),
        Style("qwen2.5-math", "<extra_0>", architectures=("ForProcessRewardModel",)),
        Style("math-shepherd", "ки", ("+ -",)),
        Style("openr", "\n\n\n\n\n", (" + -",)),
        Style("rlhflow", None, ("+", "-")),
    )
}


def detect_style(architectures: Sequence[str], model: str) -> Style:
    """Return the only style that a model's architecture allows.

    Raises:
        UserError: a causal LM, which may have any of several styles, or an architecture without step scores.
    """
    for style in STYLES.values():
        if any(name.endswith(style.architectures) for name in architectures if style.architectures):
            return style
    found = ", ".join(architectures) or "no architecture"
    if any(name.endswith(("ForSequenceClassification", "ForRewardModel")) for name in architectures):
        raise UserError(
            f"{model} ({found}) scores whole responses, not steps", "name a process reward model with --critic-model"
        )
    causal = ", ".join(name for name, style in STYLES.items() if style.candidates)
    raise UserError(f"{model} ({found}) does not say how it scores steps", f"give --critic-prm-style, one of {causal}")


@dataclass(frozen=True)
class Encoded:
    """The input of a process reward model.

    Attributes:
        ids: token ids.
        places: for each step, ascending, the position in ``ids`` whose output scores it.
        num_stray: step tags at other positions, which the question or the response wrote.
    """

    ids: list[int]
    places: list[int]
    num_stray: int = 0


class Encoder:
    """Turns a question and its steps into the input of one model.

    Args:
        style: the convention.
        tokenizer: the model's, a fast one.
        name: the model, for messages.
        tag: replaces the style's own tag; None keeps it.

    Raises:
        UserError: the tag or a candidate is not in the tokenizer, or its chat template drops a turn.

    Attributes:
        candidates: token ids of a right and a wrong step; empty for a classifier.
    """

    def __init__(self, style: Style, tokenizer: Any, name: str, tag: str | None = None) -> None:
        self.style, self.tokenizer, self.name = style, tokenizer, name
        self.tag = style.tag if tag is None else tag
        if tag is not None and style.tag is None:
            raise UserError(f"models of the style {style.name} have no step tag", "leave out --critic-prm-step-tag")
        self._tag_ids = [] if self.tag is None else self._ids(self.tag, special=True)
        self._tag_id = self._single_tag()
        self.candidates = [token for text in style.candidates for token in self._ids(text)]
        if style.candidates and len(self.candidates) != 2:
            raise UserError(
                f"{name}: {' and '.join(map(repr, style.candidates))} are {len(self.candidates)} tokens of its tokenizer, "
                f"the style {style.name} needs one each for right and wrong",
                "give another --critic-prm-style",
            )

    def encode(self, question: str, steps: Sequence[str]) -> Encoded:
        """Encode a question with its steps.

        Args:
            question: text.
            steps: at least one; none is blank. White space at their ends is not read.
        """
        texts = [without_surrogates(text.strip()) for text in (question, *steps)]
        match self.style.name:
            case "trl":
                ids, places = self._separated(texts[0], texts[1:])
            case "qwen2.5-math":
                ids, places = self._tagged_chat(texts[0], texts[1:])
            case "rlhflow":
                ids, places = self._turns(texts[0], texts[1:])
            case _:
                ids, places = self._tagged(texts[0], texts[1:])
        return Encoded(ids, places, 0 if self._tag_id is None else ids.count(self._tag_id) - len(places))

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        return list(
            self.tokenizer(text, add_special_tokens=False, split_special_tokens=not special)["input_ids"]
            if text
            else []
        )

    def _single_tag(self) -> int | None:
        """Return the token of the tag; None where the separator may have several tokens, or there is no tag."""
        if self.tag is None:
            return None
        if self.style.name == "trl":
            if not self._tag_ids or self.tokenizer.unk_token_id in self._tag_ids:
                raise UserError(
                    f"{self.name}: the step separator {self.tag!r} is not in its tokenizer",
                    "give the separator of its training with --critic-prm-step-tag",
                )
            return None
        found = self.tokenizer(f" {self.tag}", add_special_tokens=False, return_offsets_mapping=True)
        start, end = found["offset_mapping"][-1] if found["input_ids"] else (0, 0)
        if start > 1 or end != 1 + len(self.tag) or found["input_ids"][-1] == self.tokenizer.unk_token_id:
            raise UserError(
                f"{self.name}: the step tag {self.tag!r} is not a token of its tokenizer",
                "give --critic-prm-step-tag, or another --critic-prm-style",
            )
        return int(found["input_ids"][-1])

    # ----------------------------------------------------------------------------------------------
    # forms of the text

    def _separated(self, question: str, steps: list[str]) -> tuple[list[int], list[int]]:
        ids = self._ids(question)
        if self.tokenizer.bos_token_id is not None:
            ids = [self.tokenizer.bos_token_id, *ids]
        places = []
        for step in steps:
            ids += [*self._ids(step), *self._tag_ids]
            places.append(len(ids) - 1)
        return ids, places

    def _tagged(self, question: str, steps: list[str]) -> tuple[list[int], list[int]]:
        """Encode the text as a whole; a step's place is the token in which its tag ends."""
        text = f"{question} "
        ends: list[int] = []
        for number, step in enumerate(steps, start=1):
            if self.style.name == "math-shepherd":  # its steps are numbered, and a line each
                text += ("\n" if ends else "") + ("" if _STEP_LABEL.match(step) else f"Step {number}: ")
            text += f"{step} {self.tag}"
            ends.append(len(text))
        encoded = self.tokenizer(text, split_special_tokens=True, return_offsets_mapping=True)
        wanted, places = iter(ends), []
        end = next(wanted, None)
        for index, (start, stop) in enumerate(encoded["offset_mapping"]):
            while end is not None and start < end <= stop:
                places.append(index)
                end = next(wanted, None)
        assert len(places) == len(steps), (len(places), len(steps))
        return list(encoded["input_ids"]), places

    def _tagged_chat(self, question: str, steps: list[str]) -> tuple[list[int], list[int]]:
        messages = [
            {"role": "system", "content": QWEN_SYSTEM},
            {"role": "user", "content": _SLOTS[0]},
            {"role": "assistant", "content": _SLOTS[1]},
        ]
        before, between, _ = self._rendered(messages, _SLOTS)
        ids = [*self._ids(before, special=True), *self._ids(question), *self._ids(between, special=True)]
        places = []
        for step in steps:
            ids += [*self._ids(step), *self._tag_ids]
            places.append(len(ids) - 1)
        return ids, places

    def _turns(self, question: str, steps: list[str]) -> tuple[list[int], list[int]]:
        contents = [f"{question} {steps[0]}", *steps[1:]]
        slots = [chr(_FIRST_SLOT + i) for i in range(2 * len(contents))]
        messages = [{"role": "assistant" if i % 2 else "user", "content": slot} for i, slot in enumerate(slots)]
        parts = self._rendered(messages, slots)
        ids: list[int] = []
        places = []
        for turn, content in enumerate(contents):
            ids += [*self._ids(parts[2 * turn], special=True), *self._ids(content)]
            ids += self._ids(parts[2 * turn + 1], special=True)
            places.append(len(ids) - 1)
            ids.append(self.candidates[0])
        return ids[:-1], places

    def _rendered(self, messages: list[dict[str, str]], slots: Sequence[str]) -> list[str]:
        """Render the chat and return the text before, between and after the slots."""
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"{self.name} has no chat template, which models of the style {self.style.name} need",
                "give another --critic-prm-style",
            )
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        except Exception as error:  # a template is a program: it raises whatever its expressions raise
            raise UserError(f"the chat template of {self.name} fails: {first_line(error)}") from error
        parts = re.split("|".join(slots), text)
        if len(parts) != len(slots) + 1 or [text.count(slot) for slot in slots] != [1] * len(slots):
            raise UserError(
                f"the chat template of {self.name} does not keep {len(slots)} messages in their order",
                "give another --critic-prm-style",
            )
        return parts
