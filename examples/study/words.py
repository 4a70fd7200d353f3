"""The task ``words``: SmolLM2-135M-Instruct on the word problems of MultiArith and SVAMP.

The start model is the pretrained one after a short supervised warm-up on the solutions of GSM8K, so that it writes its steps
as sums, which the rule critic can score. The three sets are read from the folder ``SSRCTL_DATA`` (multiarith.jsonl,
svamp.jsonl, gsm8k_train.jsonl) if it is set, and from the hub otherwise; ``SSRCTL_STUDY_MODEL`` names another model or a
folder.
"""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB = {  # name, configuration
    "multiarith": ("ChilleD/MultiArith", None),
    "svamp": ("ChilleD/SVAMP", None),
    "gsm8k_train": ("openai/gsm8k", "main"),
}
STEPS, BATCH, RATE, LONGEST = 150, 32, 5e-5, 320  # of the warm-up: steps, solutions a step, learning rate, tokens
CONSTANTS = [STEPS, BATCH, RATE, LONGEST]


def model_name() -> str:
    """Return the pretrained model's name or folder."""
    return os.environ.get("SSRCTL_STUDY_MODEL", MODEL)


def rows(name: str) -> list[dict[str, Any]]:
    """Return a set's rows: those of its file in ``SSRCTL_DATA``, or all splits on the hub, of GSM8K the one for training."""
    folder = os.environ.get("SSRCTL_DATA")
    if folder is not None:
        with (Path(folder) / f"{name}.jsonl").open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    import datasets

    splits = datasets.load_dataset(*HUB[name])
    return [row for split in (["train"] if name == "gsm8k_train" else splits) for row in splits[split]]


def problems(seed: int) -> list[dict[str, str]]:
    """Return the problems of both evaluation sets in a random order: id, question and answer.

    Each question is there once; those whose answer is not a whole number are left out.
    """
    found = [
        (row.get("input") or row["question"], row.get("target", row.get("final_ans"))) for row in rows("multiarith")
    ]
    found += [(f"{row['Body'].rstrip('. ')}. {row['Question']}", row["Answer"]) for row in rows("svamp")]
    answers = {question.strip(): float(answer) for question, answer in found}
    order = sorted(question for question, answer in answers.items() if answer.is_integer())
    random.Random(seed).shuffle(order)
    return [{"id": str(n), "question": one, "answer": str(int(answers[one]))} for n, one in enumerate(order)]


def solutions() -> list[dict[str, str]]:
    """Return GSM8K's questions and solutions without calculator marks; a solution's last line is ``#### `` and the answer."""
    found = []
    for row in rows("gsm8k_train"):
        if "solution" in row:
            text = f"{row['solution']}\n#### {row['answer']}"
        else:  # on the hub both are one text
            text = row["answer"]
        found.append({"question": row["question"], "solution": re.sub(r"<<[^>]*>>", "", text)})
    return found


def warm_up(folder: Path, seed: int) -> None:
    """Train the pretrained model on the solutions, with a rate that falls to 0, and write it to ``folder`` in bfloat16."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_name())
    model = transformers.AutoModelForCausalLM.from_pretrained(model_name(), dtype=torch.float32).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    examples = [encode(row, tokenizer) for row in solutions()]
    order = random.Random(seed)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            model(**padded(order.sample(examples, BATCH), device)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def encode(row: dict[str, str], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens of a conversation, at most ``LONGEST``, and labels that are -100 outside of its response."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": row["question"]}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    response = tokenizer(row["solution"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return (prompt + response)[:LONGEST], ([-100] * len(prompt) + response)[:LONGEST]


def padded(batch: list[tuple[list[int], list[int]]], device: str) -> dict[str, Any]:
    """Return model inputs `[batch, length]`, padded on the right."""
    import torch

    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([one + [0] * (width - len(one)) for one, _ in batch], device=device)
    labels = torch.tensor([one + [-100] * (width - len(one)) for _, one in batch], device=device)
    lengths = torch.tensor([len(one) for one, _ in batch], device=device)
    mask = torch.arange(width, device=device)[None] < lengths[:, None]
    return {"input_ids": ids, "labels": labels, "attention_mask": mask.long()}
