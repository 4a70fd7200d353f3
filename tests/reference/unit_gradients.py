"""Gradients of a unit's loss from one response at a time: no batch, no padding, no cache, no chunks.

Small random models in float64, groups of responses given by their steps, and the local approximation written out as
attention with constants.
"""

import copy
import random
from typing import ClassVar

import torch
import transformers

from reference import policy_loss
from ssrctl.core.units import Unit
from ssrctl.training.unit_gradients import make_batch, unit_gradients

VOCABULARY = 20  # the bundled model has one more
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
GROUPED = SIZES | {"intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 6}
MIXED = GROUPED | {
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 6,
}


def build(kind, **changes):
    """A small random model in float64, its norms too (they compute in float32 otherwise)."""
    config = {
        "qwen3": lambda: transformers.Qwen3Config(**GROUPED | changes, tie_word_embeddings=True),
        "llama": lambda: transformers.LlamaConfig(**GROUPED | changes),
        "gpt2": lambda: transformers.GPT2Config(**SIZES | changes),
        "opt": lambda: transformers.OPTConfig(**SIZES | {"ffn_dim": 24, "word_embed_proj_dim": 16} | changes),
        "mistral": lambda: transformers.MistralConfig(**GROUPED | {"sliding_window": 4} | changes),
        # windows in some layers only; Gemma 2 caps its logits too
        "gemma3": lambda: transformers.Gemma3TextConfig(**MIXED | changes),
        "granite": lambda: transformers.GraniteConfig(**GROUPED | changes),
        "cohere": lambda: transformers.CohereConfig(**GROUPED | changes),
        "gemma2": lambda: transformers.Gemma2Config(**MIXED | changes),
    }[kind]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
        for parameter in model.parameters():
            parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            gain = 1.0 if type(module).__name__.startswith("Gemma") else 0.0
            eps = getattr(module, "variance_epsilon", None) or module.eps

            def norm(x, module=module, gain=gain, eps=eps):
                return (gain + module.weight) * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

            module.forward = norm
    return model


class Case:
    """A group given by its steps: ``steps[row]`` are the step of each token."""

    def __init__(self, steps, advantages, groups, prompt_length=3, seed=0):
        draw = random.Random(seed)
        self.prompt = [draw.randrange(2, VOCABULARY) for _ in range(prompt_length)]
        self.responses = [[draw.randrange(2, VOCABULARY) for _ in row] for row in steps]
        self.steps, self.advantages = steps, advantages
        self.units = [Unit(g, 0.01, tuple(tuple(self.value(row, s) for row in advantages) for s in g)) for g in groups]
        self.old = [[-draw.uniform(2, 6) for _ in row] for row in steps]

    @staticmethod
    def value(row, step):
        return row[step] if step < len(row) else None

    def batch(self):
        old = [torch.tensor(row) for row in self.old]
        return make_batch(self.prompt, self.responses, old, self.steps, pad_token_id=0, device=torch.device("cpu"))

    def near(self, model):
        """The same with old log-probabilities (float32) a little off those of now: some ratios are clipped."""
        draw, made = random.Random(7), copy.copy(self)
        with torch.no_grad():
            rows = [alone(model, self.prompt, response).float() for response in self.responses]
        made.old = [[value + draw.uniform(-0.3, 0.3) for value in row.tolist()] for row in rows]
        made.old = [torch.tensor(row).tolist() for row in made.old]
        return made

    def coefficients(self, unit, logprobs, level):
        """d(loss of the unit)/d(log-probability) of every token, by hand."""
        width = max(map(len, self.steps))
        padded = [row + [-1] * (width - len(row)) for row in self.steps]
        now, old = ([list(row) + [0.0] * (width - len(row)) for row in rows] for rows in (logprobs, self.old))
        total = torch.zeros(len(padded), width, dtype=torch.float64)
        for step in unit.steps:
            values = [self.value(row, step) for row in self.advantages]
            total += torch.tensor(
                policy_loss.step_loss(now, old, padded, step, values, 0.2, level)[1], dtype=torch.float64
            )
        return total


def alone(model, prompt, response):
    """float64 ``[len(response)]``: one response, whole, without padding or cache."""
    rows = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0].log_softmax(-1)
    return torch.stack([rows[len(prompt) + place - 1, token] for place, token in enumerate(response)])


def expected_gradient(model, case, unit, level):
    logprobs = [alone(model, case.prompt, response) for response in case.responses]
    weights = case.coefficients(unit, [row.detach().tolist() for row in logprobs], level)
    sum((row * weight[: len(row)]).sum() for row, weight in zip(logprobs, weights, strict=True)).backward()
    return taken(model)


def taken(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return found


def found_gradients(model, case, method, level="sequence", **more):
    return [
        (made.unit, taken(model))
        for made in unit_gradients(model, case.batch(), case.units, level=level, method=method, **more)
    ]


def assert_close(found, expected, tolerance=1e-9):
    """Compare by the largest entry of each tensor, or by a thousandth of the largest of all.

    A tensor may have a true gradient of 0 (OPT's key biases, which the softmax cancels): it is then rounding alone.
    """
    largest = max((wanted.abs().max() for wanted in expected.values()), default=0.0)
    for name in found.keys() | expected.keys():
        mine, wanted = found.get(name, torch.zeros(1)), expected.get(name, torch.zeros(1))
        assert (mine - wanted).abs().max() <= tolerance * max(wanted.abs().max(), 1e-3 * largest) + 1e-14, name


A, N = 1.3, None
CASES = {
    # ragged; the middle response lacks step 2, one score is missing
    "ragged": Case(
        [[0, 0, 1, 1, 1, 1, 2, 2], [0, 0, 0, 1], [0, 1, 1, 2, 2, 2]],
        [[0.7, -A, 0.4], [-0.2, 0.9], [N, 0.6, -1.1]],
        [(0,), (1,), (2,)],
    ),
    "fused": Case(
        [[0, 0, 1, 2, 2, 3, 3, 3, 4], [0, 1, 1, 2, 3]],
        [[A, 0.1, -0.5, 0.3, 1.0], [-0.4, 0.8, A, -0.6]],
        [(0, 1), (2,), (3, 4)],
    ),
    # steps 1 and 4 are in no unit: their tokens lie before a unit and after the last
    "gaps and a tail": Case(
        [[0, 1, 1, 2, 2, 3, 4, 4, 4], [0, 0, 1, 2, 3, 3, 4]],
        [[A, 0.1, -0.5, 0.3, 1.0], [-0.4, 0.8, 0.2, -0.6, 0.1]],
        [(0,), (2,), (3,)],
    ),
    # a unit that ends before the one before it, since only short responses have a score for it
    "ends out of order": Case(
        [[0, 0, 0, 0, 0, 1, 2], [0, 1, 1, 2, 2, 2]],
        [[A, N, 0.3], [0.2, -0.9, 0.8]],
        [(0,), (1,), (2,)],
    ),
    # the second response starts with a step of the second unit
    "late start": Case(
        [[0, 0, 1], [1, 1, 1, 2], [0, 2]], [[A, -0.7, N], [N, 0.5, 0.4], [0.3, N, -1.0]], [(0,), (1, 2)]
    ),
    "one token each": Case([[0], [0]], [[A], [-0.4]], [(0,)]),
    "one token and more": Case([[0], [0, 1], [0, 1, 2]], [[A], [-0.4, 0.2], [0.1, 0.5, -0.9]], [(0,), (1,), (2,)]),
    "one response": Case([[0, 0, 1, 1, 2]], [[A, -0.4, 0.9]], [(0,), (1,), (2,)]),
    "prompt of one token": Case(
        [[0, 0, 1, 1], [1, 1, 2], [0, 2, 2]],
        [[A, 0.3], [N, -0.8, 0.2], [0.4, N, 1.0]],
        [(0,), (1,), (2,)],
        prompt_length=1,
    ),
}


class ConstantPast:
    """Attention in which the keys and values of earlier blocks are constants, written out in full."""

    blocks: ClassVar[list[int]] = []

    @classmethod
    def attend(cls, module, query, key, value, attention_mask, scaling, **kwargs):
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        block = torch.tensor(cls.blocks)
        own = block[:, None] == block[None, :]
        scores = torch.where(own, query @ key.mT, query @ key.detach().mT) * scaling
        places = torch.arange(len(block))
        weights = scores.masked_fill(places[:, None] < places[None, :], float("-inf")).softmax(-1)
        out = (weights * own) @ value + (weights * ~own) @ value.detach()
        return out.transpose(1, 2), None


def local_expected(model, case, active, unit):
    """The unit's loss on responses run alone, one graph each, with constants where earlier blocks are looked at."""
    last_steps = [max(other.steps) for other in active]
    logprobs = []
    for response, steps in zip(case.responses, case.steps, strict=True):
        # block of the input that predicts each token; beyond the last unit one block more
        owners = [next((k for k, last in enumerate(last_steps) if s <= last), len(active)) for s in steps]
        ConstantPast.blocks = [0] * len(case.prompt) + owners[1:] + [len(active)]
        logprobs.append(alone(model, case.prompt, response))
    weights = case.coefficients(unit, [row.detach().tolist() for row in logprobs], "sequence")
    sum((row * weight[: len(row)]).sum() for row, weight in zip(logprobs, weights, strict=True)).backward()
    return taken(model)
