"""Every way to a unit's gradient, against one response at a time with no batch, cache or chunk.

In float64 the ways differ by round-off of about 1e-15 per operation; the models are small, and 1e-9 of a
tensor's largest entry leaves room for thousands of operations while a token left out would show in the second
digit.
"""

import copy
import random

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import policy_loss as reference

from ssrctl.core.units import Unit, plan_units
from ssrctl.errors import UserError
from ssrctl.models import gradients as front
from ssrctl.models.gradients import GradientTask, compare_methods, make_batch, paired_gradients, unit_gradients
from ssrctl.models.step_gradients import chunked
from ssrctl.models.step_gradients.shape import group_shape

EXACT = ("kept", "truncated", "chunked")
LEVELS = ("token", "step", "sequence")
VOCABULARY = 40
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
        "mistral": lambda: transformers.MistralConfig(**GROUPED | {"sliding_window": 4} | changes),
        # windows in some layers only; Gemma 2 caps its logits too
        "gemma3": lambda: transformers.Gemma3TextConfig(**MIXED | changes),
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


@pytest.fixture(scope="module", params=["qwen3", "llama", "gpt2", "mistral", "gemma3"])
def any_model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def qwen():
    return build("qwen3")


@pytest.fixture
def every_cut(monkeypatch):
    """A chunk for every unit and one for the prompt, which the cost model would not make of so few tokens."""

    def boundaries(shape, costs):
        return sorted({shape.prompt_length, *(shape.input_end(unit.end) for unit in shape.units)})

    monkeypatch.setattr(chunked, "plan_boundaries", boundaries)


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
                reference.step_loss(now, old, padded, step, values, 0.2, level)[1], dtype=torch.float64
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
    for name in found.keys() | expected.keys():
        mine, wanted = found.get(name, torch.zeros(1)), expected.get(name, torch.zeros(1))
        assert (mine - wanted).abs().max() <= tolerance * wanted.abs().max() + 1e-14, name


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


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_exact_gradients_are_those_of_each_response_alone(qwen, every_cut, case, method):
    case = case.near(qwen)
    found = found_gradients(qwen, case, method)
    assert [unit for unit, _ in found] == case.units
    for unit, gradient in found:
        assert_close(gradient, expected_gradient(qwen, case, unit, "sequence"))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("method", EXACT)
def test_every_kind_of_model_and_ratio(any_model, every_cut, method, level):
    case = CASES["ragged"].near(any_model)
    for unit, gradient in found_gradients(any_model, case, method, level):
        assert_close(gradient, expected_gradient(any_model, case, unit, level))


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_eager_attention(every_cut, kind, method):
    model = build(kind, attn_implementation="eager")
    case = CASES["fused"].near(model)
    for unit, gradient in found_gradients(model, case, method):
        # its softmax is computed in float32 whatever the model's precision
        assert_close(gradient, expected_gradient(model, case, unit, "sequence"), tolerance=1e-5)


@st.composite
def random_cases(draw):
    seed = draw(st.integers(0, 10**6))
    chance = random.Random(seed)
    rows = chance.randint(1, 4)
    steps = [[s for s in range(chance.randint(1, 5)) for _ in range(chance.randint(0, 3))] or [0] for _ in range(rows)]
    advantages = [[chance.choice([N, 0.0, chance.uniform(-1, 1)]) for _ in range(6)] for _ in range(rows)]
    advantages[0][steps[0][0]] = A  # something to learn
    units = plan_units(advantages, [0.01] * 6, fuse_tol=chance.choice([0.0, 0.8]))
    groups = [unit.steps for unit in units if unit.has_signal]
    cuts = chance.random()
    return Case(steps, advantages, groups, prompt_length=chance.randint(1, 4), seed=seed), cuts


@given(random_cases(), st.sampled_from(LEVELS))
@settings(max_examples=25)
def test_the_exact_ways_agree_wherever_the_chunks_are_cut(qwen, drawn, level):
    case, share = drawn
    case = case.near(qwen)

    def boundaries(shape, costs):
        cuts = sorted({shape.prompt_length, *(shape.input_end(unit.end) for unit in shape.units)})
        return [c for number, c in enumerate(cuts) if c == cuts[-1] or (number * 0.618) % 1 < share]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "plan_boundaries", boundaries)
        kept, truncated, in_chunks = (found_gradients(qwen, case, method, level) for method in EXACT)
    assert len(kept) == len(truncated) == len(in_chunks) > 0
    for (_, expected), (_, one), (_, other) in zip(kept, truncated, in_chunks, strict=True):
        assert_close(one, expected)
        assert_close(other, expected)


class ConstantPast:
    """Attention in which the keys and values of earlier blocks are constants, written out in full."""

    blocks: list[int] = []

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


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_local_takes_earlier_keys_and_values_as_constants(case):
    model = build("qwen3")
    case = case.near(model)
    found = found_gradients(model, case, "local")
    transformers.AttentionInterface.register("constant_past", ConstantPast.attend)
    model.set_attn_implementation("constant_past")
    for unit, gradient in found:
        assert_close(gradient, local_expected(model, case, case.units, unit))
    assert len(found) == len(case.units)


def test_local_is_exact_for_the_first_unit_and_not_for_later_ones(qwen):
    case = CASES["ragged"].near(qwen)
    cosines = compare_methods(qwen, case.batch(), case.units, "kept", "local")
    assert cosines[0] == pytest.approx(1.0, abs=1e-12)
    assert all(0.1 < cosine < 0.99 for cosine in cosines[1:])
    joined = [Unit((0, 1, 2), 0.01, tuple(column for unit in case.units for column in unit.advantages))]
    assert compare_methods(qwen, case.batch(), joined, "kept", "local") == [pytest.approx(1.0, abs=1e-12)]


@pytest.mark.parametrize("method", [*EXACT, "local", "auto"])
@pytest.mark.parametrize("level", LEVELS)
def test_all_log_probabilities_are_reported_before_the_first_unit(qwen, every_cut, method, level):
    case, events = CASES["gaps and a tail"].near(qwen), []
    made = unit_gradients(
        qwen,
        case.batch(),
        case.units,
        method=method,
        level=level,
        on_logprobs=lambda logprobs: events.append(logprobs),
        on_unit=lambda unit: events.append((unit, not taken(qwen))),
    )
    for number, gradient in enumerate(made, start=1):
        assert len(events) == 1 + number and events[-1] == (gradient.unit, True), "not told before the backward pass"
        assert taken(qwen)
    assert not events[0].requires_grad and events[0].shape == (2, 9)
    for row, response in enumerate(case.responses):
        with torch.no_grad():
            expected = alone(qwen, case.prompt, response)
        torch.testing.assert_close(events[0][row, : len(response)], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", EXACT)
def test_counts_and_losses_agree(qwen, every_cut, method):
    case = CASES["ragged"].near(qwen)
    kept = [*unit_gradients(qwen, case.batch(), case.units, level="token", method="kept")]
    found = [*unit_gradients(qwen, case.batch(), case.units, level="token", method=method, loss_scale=0.25)]
    taken(qwen)
    assert [(m.num_terms, m.num_clipped) for m in found] == [(m.num_terms, m.num_clipped) for m in kept]
    assert sum(m.num_clipped for m in found) > 0
    assert [m.loss for m in found] == pytest.approx([m.loss for m in kept], abs=1e-12)
    scaled = found_gradients(qwen, case, method, "token", loss_scale=0.25)
    for (_, quarter), (_, whole) in zip(scaled, found_gradients(qwen, case, "kept", "token"), strict=True):
        assert_close({name: 4 * gradient for name, gradient in quarter.items()}, whole)


def test_no_tokens_are_run_that_no_unit_needs(qwen, every_cut, monkeypatch):
    """The tail of 'gaps and a tail' stays out when neither the ratio nor anyone else asks for it."""
    case, seen = CASES["gaps and a tail"].near(qwen), []
    whole = qwen.forward

    def forward(*args, input_ids, past_key_values=None, use_cache=None, attention_mask=None, logits_to_keep=0):
        seen.append((tuple(input_ids.shape), logits_to_keep))
        return whole(
            input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache, logits_to_keep=logits_to_keep
        )

    monkeypatch.setattr(qwen, "forward", forward)
    # units end after 1 (2), 5 (4) and 6 (6) tokens, the prompt has 3, and the last token is no input
    found_gradients(qwen, case, "truncated", "token")
    assert seen == [((2, 4), 2), ((2, 7), 5), ((2, 8), 6)]
    seen.clear()
    found_gradients(qwen, case, "chunked", "token")
    assert seen == [((1, 3), 1), ((2, 1), 1), ((2, 3), 3), ((2, 1), 1)]
    seen.clear()
    found_gradients(qwen, case, "chunked", "sequence")
    assert seen == [((1, 3), 1), ((2, 1), 1), ((2, 3), 3), ((2, 1), 1), ((2, 3), 3)]


def test_rows_that_have_ended_are_not_run(qwen, every_cut, monkeypatch):
    case, seen = CASES["one token and more"].near(qwen), []
    whole = qwen.forward

    def forward(input_ids, past_key_values=None, use_cache=None, attention_mask=None, position_ids=None):
        seen.append(tuple(input_ids.shape))
        return whole(
            input_ids=input_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            attention_mask=attention_mask,
            position_ids=position_ids,
        )

    monkeypatch.setattr(qwen, "forward", forward)
    for method in ("chunked", "local"):
        seen.clear()
        found_gradients(qwen, case, method)
        assert seen == [(1, 3), (2, 1), (1, 1)]


def mamba():
    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def checkpointing():
    model = build("llama").train()
    model.gradient_checkpointing_enable()
    return model


@pytest.mark.parametrize(
    ("make", "reason"), [(mamba, "past_key_values"), (checkpointing, "gradient checkpointing is on")]
)
def test_a_model_without_a_usable_cache(make, reason):
    model = make()
    case = CASES["ragged"].near(model)
    for method in ("chunked", "local"):
        with pytest.raises(UserError, match=reason):
            unit_gradients(model, case.batch(), case.units, method=method)
    assert front.automatic_method(GradientTask(model, case.batch(), case.units)) in ("kept", "truncated")
    assert all(cosine > 1 - 1e-9 for cosine in compare_methods(model, case.batch(), case.units, "auto", "kept"))


def test_layers_that_are_not_attention(qwen, monkeypatch):
    case = CASES["ragged"]
    monkeypatch.setattr(qwen.config, "layer_types", ["full_attention", "linear_attention", "full_attention"])
    with pytest.raises(UserError, match="layers of other kinds"):
        unit_gradients(qwen, case.batch(), case.units, method="chunked")


def test_local_needs_the_window_to_hold_the_padded_steps():
    case = CASES["ragged"]
    with pytest.raises(UserError, match="last 4 columns only, and the padded steps take 12"):
        unit_gradients(build("mistral"), case.batch(), case.units, method="local")
    wide = build("mistral", sliding_window=12)
    assert len(found_gradients(wide, case.near(wide), "local")) == 3


def test_a_cache_that_is_not_filled_is_noticed(qwen, monkeypatch):
    case, whole = CASES["ragged"], qwen.forward

    def forward(input_ids, past_key_values=None, use_cache=None):
        return whole(input_ids=input_ids, use_cache=False)

    monkeypatch.setattr(qwen, "forward", forward)
    with pytest.raises(UserError, match="holds 0 keys after"):
        found_gradients(qwen, case, "chunked")


def test_unknown_methods_are_refused(qwen):
    case = CASES["ragged"]
    with pytest.raises(UserError, match="'exact'.*auto, kept, truncated, chunked, local"):
        unit_gradients(qwen, case.batch(), case.units, method="exact")


def test_pairs_hold_both_gradients_and_leave_none_behind(qwen):
    case = CASES["ragged"].near(qwen)
    pairs = [*paired_gradients(qwen, case.batch(), case.units, "truncated", "local", level="token", loss_scale=2.0)]
    assert not taken(qwen)
    truncated = found_gradients(qwen, case, "truncated", "token", loss_scale=2.0)
    local = found_gradients(qwen, case, "local", "token", loss_scale=2.0)
    for pair, (unit, first), (_, second) in zip(pairs, truncated, local, strict=True):
        assert pair.unit == unit
        assert_close(pair.first, first)
        assert_close(pair.second, second)
        flat = [torch.cat([g.flatten() for g in side.values()]) for side in (first, second)]
        assert pair.cosine == pytest.approx(float(torch.cosine_similarity(*flat, dim=0)), abs=1e-12)
    qwen.lm_head.weight.grad = torch.zeros_like(qwen.lm_head.weight)
    with pytest.raises(ValueError, match="already have a gradient"):
        paired_gradients(qwen, case.batch(), case.units, "kept", "local")
    taken(qwen)


def test_inner_products_are_exact_where_float32_sums_are_not():
    generator = torch.Generator().manual_seed(0)
    big = {"a": torch.rand(5_000_000, generator=generator), "b": torch.tensor([1e4]), "c": torch.ones(3)}
    other = {"a": big["a"], "b": torch.tensor([-2e4])}
    square = sum(float(part.double().square().sum()) for part in big["a"].split(1_000_000))
    assert front.gradient_dot(big, other) == pytest.approx(square - 2e8, rel=1e-13)
    assert front.gradient_cosine(big, {}) == 0.0
    assert front.gradient_cosine(big, big) == pytest.approx(1.0, abs=1e-15)


def test_the_shape_of_a_task(qwen):
    case = CASES["ragged"]
    shape = group_shape(GradientTask(qwen, case.batch(), case.units))
    assert (shape.prompt_length, shape.lengths, shape.width) == (3, (8, 4, 6), 8)
    # unit 0 has no score in the third response, unit 2 no tokens in the second
    assert [(u.start, u.end, u.num_rows) for u in shape.units] == [(0, 3, 2), (1, 6, 3), (3, 8, 2)]
    assert [shape.rows_beyond(column) for column in (0, 5, 6, 7, 8, 9, 10)] == [3, 3, 2, 2, 1, 1, 0]
