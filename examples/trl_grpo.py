"""KronosOpt as the optimizer of an unmodified TRL GRPOTrainer (needs `pip install trl`).

    python examples/trl_grpo.py [--model FOLDER_OR_NAME] [--max-steps 4] [--lr 3e-2]

The trainer knows nothing about reasoning steps: it calls ``loss.backward()`` for every micro-batch and then ``optimizer.step()``.
KronosOpt takes the accumulated gradient as one question of one unit, so an optimizer step updates the
``max_step_budget`` (1%) of the unprotected coordinates with the largest gradients, and no others.
"""

import argparse
import random
import re
import tempfile

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from ssrctl import BlockMask, KronosOpt, select_topk, tiny_reasoner
from ssrctl.integrations.trl import WeightChanges

PROTECTED_FRAC = 0.005
NUM_GENERATIONS, QUESTIONS_PER_STEP = 8, 4


def sums(num: int) -> Dataset:
    """Draw sums of five numbers, modulo 100: conversational prompts and their answers."""
    rng = random.Random(0)
    numbers = [[rng.randrange(10, 100), *(rng.randrange(2, 10) for _ in range(4))] for _ in range(num)]
    prompts = [[{"role": "user", "content": "+".join(map(str, row)) + "=?"}] for row in numbers]
    return Dataset.from_dict({"prompt": prompts, "answer": [sum(row) % 100 for row in numbers]})


def right_answer(completions: list, answer: list[int], **_: object) -> list[float]:
    """Return 1 for a response whose last number is the answer, else 0."""
    numbers = [re.findall(r"\d+", completion[0]["content"]) for completion in completions]
    return [float(bool(found) and int(found[-1]) % 100 == right) for found, right in zip(numbers, answer, strict=True)]


def largest_weights(model: torch.nn.Module, fraction: float) -> BlockMask:
    """Select the coordinates with the largest |weight|, in place of the mask that `ssrctl superweights` finds."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    chosen = select_topk(weights, int(fraction * sum(weight.numel() for weight in weights.values())))
    return BlockMask.from_indices({name: weight.shape for name, weight in weights.items()}, chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(tiny_reasoner.path()), help="folder or name on the hub")
    parser.add_argument("--max-steps", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-2)
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model)
    protected = largest_weights(model, PROTECTED_FRAC)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    # The optimizer keeps its sets on the weights' device, so the model goes there first.
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = KronosOpt(model.named_parameters(), lr=args.lr, protected=protected, max_grad_norm=1.0)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            max_steps=args.max_steps,
            max_grad_norm=0.0,  # the trainer's clip would measure the dense gradient; KronosOpt clips what it keeps
            num_generations=NUM_GENERATIONS,
            per_device_train_batch_size=NUM_GENERATIONS,
            gradient_accumulation_steps=QUESTIONS_PER_STEP,
            max_completion_length=64,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            seed=0,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=right_answer,
            args=config,
            train_dataset=sums(args.max_steps * QUESTIONS_PER_STEP),
            processing_class=AutoTokenizer.from_pretrained(args.model, padding_side="left"),
            optimizers=(optimizer, None),
            callbacks=[WeightChanges()],  # logs the share of weights that each step changes
        )
        trainer.train()

    changed = BlockMask.from_dense({name: p.detach().cpu() != before[name] for name, p in model.named_parameters()})
    print(f"changed weights: {changed.count()} of {changed.numel} ({changed.density():.2%})")
    print(f"changed among the {protected.count()} protected ones: {(changed & protected).count()}")


if __name__ == "__main__":
    main()
