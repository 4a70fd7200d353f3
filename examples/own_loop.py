"""Step-wise reinforcement learning in a plain PyTorch loop, with KronosOpt as its optimizer.

    python examples/own_loop.py [--model FOLDER_OR_NAME] [--steps 20] [--lr 3e-2]

For each question: sample a group of responses, cut them into steps, reward every step, turn rewards into advantages,
and let each step claim its own coordinates. Any causal language model works, but a learning rate does not carry over
from one model to another. The loss is the plain policy gradient: each sample is used once, by the weights that drew it.
"""

import argparse
import random
import re

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ssrctl import KronosOpt, segment, tiny_reasoner, two_level_advantages

GROUP_SIZE, QUESTIONS_PER_STEP, NUM_HELD_OUT = 8, 4, 256
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 64}
TASK = {"role": "system", "content": "Work from left to right, one operation a line, like 12+3=15. End with ####15."}
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
EQUATION = re.compile(r"(\d+) ?([-+*]) ?(\d+) ?= ?(\d+)")


def new_question(rng: random.Random) -> tuple[str, int]:
    """Draw a chain of operations, worked from left to right modulo 100, and its answer: ("48*6-2*9+2=?", 76)."""
    text = str(value := rng.randrange(10, 100))
    for _ in range(4):
        sign, operand = rng.choice("+-*"), rng.randrange(2, 10)
        text, value = f"{text}{sign}{operand}", OPERATIONS[sign](value, operand) % 100
    return f"{text}=?", value


def step_reward(step: str, kind: str, answer: int) -> float | None:
    """Return 1 or -1 for a correct or wrong answer or equation; None (missing) if the step has neither."""
    if kind == "final":
        numbers = re.findall(r"\d+", step)
        return 1.0 if numbers and int(numbers[-1]) % 100 == answer else -1.0
    if not (found := EQUATION.search(step)):
        return None
    left, sign, right, result = found.groups()
    return 1.0 if (OPERATIONS[sign](int(left), int(right)) - int(result)) % 100 == 0 else -1.0


def read(tokenizer, ids: list[int], answer: int) -> tuple[list[int], list[float | None]]:
    """Return the step of each token of a response (-1 after its end), and the reward of each step."""
    length = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
    texts = [tokenizer.decode(ids[:end], skip_special_tokens=True) for end in range(length + 1)]
    spans = segment(texts[-1])
    steps = [sum(span.start <= len(text) for span in spans) - 1 for text in texts[:-1]]
    rewards = [step_reward(texts[-1][span.start : span.end], span.kind, answer) for span in spans]
    return steps + [-1] * (len(ids) - length), rewards


def sample(model, tokenizer, questions: list[str]) -> tuple[torch.Tensor, int]:
    """Sample one response to each question: token ids [n, P + R] and P, the prompts' length."""
    if chat := bool(tokenizer.chat_template):
        turns = [[TASK, {"role": "user", "content": question}] for question in questions]
        questions = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    made = tokenizer(questions, padding=True, padding_side="left", add_special_tokens=not chat, return_tensors="pt")
    return model.generate(made.input_ids, attention_mask=made.attention_mask, **SAMPLING), made.input_ids.shape[1]


def step_losses(model, tokenizer, question: str, answer: int) -> list[tuple[torch.Tensor, int]]:
    """Return, for each step with a signal in order, its policy-gradient loss and the number of responses that have it."""
    tokens, prompt_length = sample(model, tokenizer, [question] * GROUP_SIZE)
    targets = tokens[:, prompt_length:]
    step_ids, rewards = zip(*(read(tokenizer, row, answer) for row in targets.tolist()), strict=True)
    advantages = two_level_advantages(rewards, rule="group").values
    logits = model(tokens).logits[:, prompt_length - 1 : -1].float()
    logprobs = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    units = []
    for step in range(max(map(len, advantages))):
        inside = torch.tensor(step_ids) == step
        credit = [values[step] if step < len(values) else None for values in advantages]
        known = [row for row, value in enumerate(credit) if value is not None and inside[row].any()]
        if any(credit[row] for row in known):
            loss = -torch.stack([credit[row] * logprobs[row][inside[row]].mean() for row in known]).mean()
            units.append((loss, len(known)))
    return units


@torch.no_grad()
def mean_reward(model, tokenizer, questions: list[tuple[str, int]]) -> float:
    """Sample one response to each question and return the mean step reward."""
    tokens, prompt_length = sample(model, tokenizer, [question for question, _ in questions])
    pairs = zip(tokens[:, prompt_length:].tolist(), questions, strict=True)
    rewards = [reward for ids, (_, answer) in pairs for reward in read(tokenizer, ids, answer)[1] if reward is not None]
    return sum(rewards) / len(rewards) if rewards else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(tiny_reasoner.path()), help="folder or name on the hub")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=3e-2)
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = random.Random(0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    held_out = [new_question(rng) for _ in range(NUM_HELD_OUT)]
    print(f"mean step reward before: {mean_reward(model, tokenizer, held_out):+.3f}")
    optimizer = KronosOpt(model.named_parameters(), lr=args.lr)
    for step in range(1, args.steps + 1):
        for _ in range(QUESTIONS_PER_STEP):
            units = step_losses(model, tokenizer, *new_question(rng))
            optimizer.begin_question([num_responses for _, num_responses in units])
            for loss, _ in units:
                (loss / QUESTIONS_PER_STEP).backward(retain_graph=loss is not units[-1][0])
                optimizer.claim()
        stats = optimizer.step()
        print(f"step {step}: gradient norm {stats.grad_norm:.3f}, {stats.num_updated} coordinates updated")
    print(f"mean step reward after: {mean_reward(model, tokenizer, held_out):+.3f}")


if __name__ == "__main__":
    main()
