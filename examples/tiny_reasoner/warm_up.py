"""Make the embedded tiny reasoner: supervised warm-up from random weights, stopped early.

    python examples/tiny_reasoner/warm_up.py --output-dir tiny-reasoner

The defaults made the weights that ship in `ssrctl/tiny_reasoner/weights`, and `warm_up.log`
beside this script is the log of that run (under two minutes on one core). Training ends on purpose
while the model is still wrong more often than right: reinforcement learning needs questions that
get both right and wrong answers.

Only problems of the train split are trained on. The accuracies in the log are those of held-out
problems, and the number of steps was picked by looking at them.
"""

import argparse
import json
import logging
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    get_linear_schedule_with_warmup,
)

from ssrctl.tiny_reasoner.problems import Problem, problems

SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<unk>"]
CHARACTERS = "0123456789+-*=?#\n"
# A conversation of five operations has 63 tokens; the rest is room for longer problems.
MAX_LENGTH = 128
MAX_NEW_TOKENS = 64
WARMUP_STEPS = 50
EVAL_BATCH_SIZE = 256
# System messages are dropped: every question means the same task. The `generation` block marks the
# tokens to train on.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
  {%- if message['role'] == 'user' %}
    {{- message['content'] + '\\n' }}
  {%- elif message['role'] == 'assistant' %}
    {%- generation %}
      {{- message['content'] + eos_token }}
    {%- endgeneration %}
  {%- endif %}
{%- endfor %}"""
FINAL_ANSWER = re.compile(r"####(\d\d)")

log = logging.getLogger("warm_up")


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s",
        handlers=[
            logging.StreamHandler(),
            logging.FileHandler(args.output_dir / "warm_up.log", mode="w"),
        ],
    )
    # One thread fixes the order of every sum, so the same machine gives the same weights.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.set_seed(args.seed)

    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    log.info(f"torch {torch.__version__}, transformers {transformers.__version__}")
    log.info(f"seed {args.seed}, {model.num_parameters()} parameters")
    train(model, tokenizer, args)

    # Other held-out problems than those watched during training.
    held_out = problems("heldout", args.num_final_problems, seed=args.seed + 1)
    report("final", *sampled_accuracy(model, tokenizer, held_out, args.seed + 1))
    save(model, tokenizer, args.output_dir)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-steps", type=int, default=450, help="stop after so many")
    parser.add_argument("--schedule-steps", type=int, default=1500, help="length of the learning-rate schedule")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--logging-steps", type=int, default=50)
    parser.add_argument("--num-eval-problems", type=int, default=256)
    parser.add_argument("--num-final-problems", type=int, default=4000)
    return parser.parse_args()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of one token per character; encoding adds none, since the chat template writes `<bos>`."""
    vocab = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    special_ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=416,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        dtype="float32",
        **special_ids,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_p=1.0, top_k=0, **special_ids)
    return model


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, output_dir: Path) -> None:
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    # transformers 5 writes its own new class name, which version 4 does not know; both know this.
    config_path = output_dir / "tokenizer_config.json"
    config = json.loads(config_path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_path.write_text(json.dumps(config, indent=2) + "\n")


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98))
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP_STEPS, args.schedule_steps)
    held_out = problems("heldout", args.num_eval_problems, seed=args.seed)
    losses = []
    batches = islice(curriculum(args.schedule_steps, args.seed), args.num_steps)
    for step, batch in enumerate(batches, start=1):
        model.train()
        loss = model(**encode(batch, tokenizer)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % args.logging_steps == 0:
            what = f"step {step:4d} loss {sum(losses) / len(losses):.4f}"
            report(what, *sampled_accuracy(model, tokenizer, held_out, args.seed))
            losses.clear()


def curriculum(num_steps: int, seed: int) -> Iterator[list[Problem]]:
    """Yield batches of train problems: a quarter of the schedule on short ones, the rest on long ones.

    Short ones teach the arithmetic at a lower cost.
    """
    num_short = num_steps // 4
    for steps, batch_size, min_ops, max_ops in (
        (num_short, 64, 1, 3),
        (num_steps - num_short, 32, 4, 5),
    ):
        pool = problems("train", steps * batch_size, seed, min_ops, max_ops)
        for start in range(0, len(pool), batch_size):
            yield pool[start : start + batch_size]


def encode(batch: list[Problem], tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """Return model inputs `[batch, length]`; labels are -100 outside the response and its `<eos>`."""
    chats = [
        [{"role": "user", "content": problem.question}, {"role": "assistant", "content": problem.solution}]
        for problem in batch
    ]
    encoded = tokenizer.apply_chat_template(
        chats,
        padding=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
    )
    in_response = encoded.pop("assistant_masks").bool()
    labels = encoded["input_ids"].masked_fill(~in_response, -100)
    return {**encoded, "labels": labels}


@torch.no_grad()
def sampled_accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, held_out: list[Problem], seed: int
) -> tuple[int, int, int]:
    """Sample one response a problem at temperature 1; return the numbers of correct, well-formed and all responses.

    Well-formed: ends with `####NN` and `<eos>`. Sampling does not change the random state of the training.
    """
    model.eval()
    num_right = num_formed = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(held_out), EVAL_BATCH_SIZE):
            batch = held_out[start : start + EVAL_BATCH_SIZE]
            prompts = tokenizer.apply_chat_template(
                [[{"role": "user", "content": problem.question}] for problem in batch],
                add_generation_prompt=True,
                padding=True,
                return_dict=True,
                return_tensors="pt",
            )
            output = model.generate(**prompts, max_new_tokens=MAX_NEW_TOKENS)
            responses = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :])
            for problem, response in zip(batch, responses, strict=True):
                body, eos, _ = response.partition("<eos>")
                final = FINAL_ANSWER.fullmatch(body.rpartition("\n")[2])
                num_formed += bool(eos and final)
                num_right += bool(eos and final and final[1] == problem.answer)
    return num_right, num_formed, len(held_out)


def report(what: str, num_right: int, num_formed: int, num: int) -> None:
    accuracy = num_right / num
    error = (accuracy * (1 - accuracy) / num) ** 0.5
    log.info(
        f"{what} accuracy {accuracy:.3f} +- {error:.3f} well-formed {num_formed / num:.3f} ({num} held-out samples)"
    )


if __name__ == "__main__":
    main()
