"""Sampling against fresh forward passes."""

import dataclasses
from collections import deque

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.configs import SamplingConfig, TrainConfig
from ssrctl.core.seeds import derive_seed
from ssrctl.errors import UserError
from ssrctl.io.artifacts import ModelIdentity
from ssrctl.models.loading import LoadedModel, load_model
from ssrctl.sampling.endings import StopTexts, end_token_ids, response_limit
from ssrctl.sampling.engines import transformers_engine
from ssrctl.sampling.engines.base import Request, Sample, sample_all
from ssrctl.sampling.engines.transformers_engine import TransformersEngine

QUESTION = "48*6-2=?\n"


@pytest.fixture(scope="module")
def bundled():
    """The bundled reasoner on the CPU."""
    return load_model(TrainConfig(device="cpu"))


def ids_of(loaded, text):
    return loaded.tokenizer(text)["input_ids"]


def logits_of(loaded, prompt, response):
    """float32 ``[R, V]``: what the model says before each response token, without a cache or padding."""
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].float()
    return logits[len(prompt) - 1 : -1]


def requests_of(loaded, prompts, config, seed):
    limits = [response_limit(prompt, config.max_new_tokens, loaded.context_length) for prompt in prompts]
    return [Request(p, n, derive_seed(seed, i)) for i, (p, n) in enumerate(zip(prompts, limits, strict=True))]


def sample_responses(loaded, prompts, config, seed, **engine):
    return sample_all(TransformersEngine(loaded, config, **engine), requests_of(loaded, prompts, config, seed))


def sampling(**settings):
    return SamplingConfig(**{"max_new_tokens": 24} | settings)


PROMPTS = ["3+4=?\n", QUESTION, "12+7-3*5=?\n"]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.7])
def test_recorded_logprobs_are_those_of_a_fresh_pass(bundled, temperature):
    prompts = [ids_of(bundled, text) for text in PROMPTS * 2]
    samples = sample_responses(bundled, prompts, sampling(temperature=temperature), seed=3)
    assert len(samples) == len(prompts)
    for prompt, sample in zip(prompts, samples, strict=True):
        rows = (logits_of(bundled, prompt, sample.response_ids) / temperature).log_softmax(-1)
        expected = rows[torch.arange(len(sample.response_ids)), torch.tensor(sample.response_ids)]
        assert sample.logprobs.dtype == torch.float32
        assert expected.min() < -0.05  # not all certain, so that temperature and order matter
        # float32 logits of size 20 through left padding and a cache: errors of a few 1e-6, over the temperature.
        torch.testing.assert_close(sample.logprobs, expected, rtol=0, atol=1e-4)


def test_logprobs_are_taken_before_top_p_and_top_k(bundled):
    prompts = [ids_of(bundled, QUESTION)] * 4
    for settings in ({"top_k": 1}, {"top_p": 0.5}, {"top_k": 2, "temperature": 0.7}):
        for sample in sample_responses(bundled, prompts, sampling(**settings), seed=0):
            rows = logits_of(bundled, prompts[0], sample.response_ids) / settings.get("temperature", 1.0)
            expected = rows.log_softmax(-1)[torch.arange(len(rows)), torch.tensor(sample.response_ids)]
            torch.testing.assert_close(sample.logprobs, expected, rtol=0, atol=1e-4)


def test_top_k_1_gives_the_likeliest_tokens(bundled):
    prompts = [ids_of(bundled, text) for text in PROMPTS]
    for seed in (0, 1):
        for prompt, sample in zip(prompts, sample_responses(bundled, prompts, sampling(top_k=1), seed), strict=True):
            assert logits_of(bundled, prompt, sample.response_ids).argmax(-1).tolist() == sample.response_ids


def test_top_p_keeps_to_the_nucleus(bundled):
    prompt = ids_of(bundled, QUESTION)
    for sample in sample_responses(bundled, [prompt] * 8, sampling(top_p=0.6, temperature=2.0), seed=0):
        for row, token in zip(logits_of(bundled, prompt, sample.response_ids), sample.response_ids, strict=True):
            likelihood = (row / 2.0).softmax(-1)
            # The nucleus is the shortest list of likeliest tokens that reaches 0.6: what is likelier than one of
            # its members sums to less.
            assert likelihood[likelihood > likelihood[token]].sum() < 0.6 + 1e-5


def test_the_first_token_is_drawn_from_the_models_distribution(bundled):
    prompt = ids_of(bundled, QUESTION)
    count = 600
    config = sampling(temperature=1.5, max_new_tokens=1)
    drawn = torch.tensor([s.response_ids[0] for s in sample_responses(bundled, [prompt] * count, config, seed=0)])
    expected = (logits_of(bundled, prompt, [0])[0] / 1.5).softmax(-1)
    found = torch.bincount(drawn, minlength=len(expected)) / count
    # Five standard errors of each token's share; the seed is fixed.
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1 / count).all()


def test_the_seed_decides_and_nothing_else(bundled):
    prompts = [ids_of(bundled, QUESTION)] * 6
    config = sampling(temperature=1.3)
    first = sample_responses(bundled, prompts, config, seed=5)
    torch.manual_seed(99)
    torch.rand(7)
    again = sample_responses(bundled, prompts, config, seed=5)
    other = sample_responses(bundled, prompts, config, seed=6)
    assert [s.response_ids for s in first] == [s.response_ids for s in again]
    assert all(torch.equal(a.logprobs, b.logprobs) for a, b in zip(first, again, strict=True))
    assert [s.response_ids for s in first] != [s.response_ids for s in other]
    assert len({tuple(s.response_ids) for s in first}) > 1  # rows of one batch are drawn independently


def test_global_state_is_left_alone(bundled):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    config = bundled.model.generation_config.to_dict()
    sample_responses(bundled, [ids_of(bundled, QUESTION)] * 2, sampling(top_k=3), seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert bundled.model.generation_config.to_dict() == config
    assert not bundled.model.training


def test_a_response_ends_with_its_end_token(bundled):
    ends = end_token_ids(bundled)
    assert ends == [bundled.tokenizer.eos_token_id]
    prompts = [ids_of(bundled, text) for text in PROMPTS * 3]
    samples = sample_responses(bundled, prompts, sampling(max_new_tokens=64, temperature=3.0), seed=0)
    assert any(sample.finished for sample in samples)
    assert len({len(sample.response_ids) for sample in samples}) > 1  # so that rows end at different places
    for sample in samples:
        assert len(sample.logprobs) == len(sample.response_ids)
        assert sample.finished == (sample.response_ids[-1] in ends)
        assert not set(sample.response_ids[:-1]) & set(ends)
        assert sample.text == bundled.tokenizer.decode(sample.response_ids, skip_special_tokens=True)


def test_what_does_not_end_is_cut_at_the_limit(bundled):
    (sample,) = sample_responses(bundled, [ids_of(bundled, QUESTION)], sampling(max_new_tokens=3), seed=0)
    assert len(sample.response_ids) == 3 == len(sample.logprobs)
    assert not sample.finished


def test_each_response_ends_where_the_context_does(tiny_loaded, monkeypatch):
    """A long prompt does not shorten the response to a short one."""
    monkeypatch.setattr(transformers_engine, "end_token_ids", lambda loaded: [])
    samples = sample_responses(tiny_loaded, [[7] * 120, [9] * 4], sampling(max_new_tokens=64), seed=0)
    assert [len(sample.response_ids) for sample in samples] == [128 - 120, 64]


def test_prompts_of_all_lengths_go_together_up_to_the_context(tiny_loaded, monkeypatch):
    """Each response may fill the context; padding never takes the batch beyond it."""
    monkeypatch.setattr(transformers_engine, "end_token_ids", lambda loaded: [])
    prompts = [[7 + n] * n for n in (4, 60, 100, 120)]
    config = sampling(max_new_tokens=128, sampling_batch_size=3)
    alone = [
        sample_all(TransformersEngine(tiny_loaded, config), [one])[0]
        for one in requests_of(tiny_loaded, prompts, config, 0)
    ]
    rows = []

    def note(model, args, given):
        batch, new = given["input_ids"].shape
        rows.append((batch, given["past_key_values"].get_seq_length() + new))

    hook = tiny_loaded.model.register_forward_pre_hook(note, with_kwargs=True)
    together = sample_responses(tiny_loaded, prompts, config, seed=0)
    hook.remove()
    assert [len(one.response_ids) for one in together] == [128 - len(prompt) for prompt in prompts]
    assert [one.response_ids for one in together] == [one.response_ids for one in alone]
    assert rows[0][0] == 3 and max(columns for _, columns in rows) <= 128
    assert len(rows) <= 124 + 1, "one pass for each token of the longest response, one for the row that joined"


@pytest.mark.parametrize("size", [1, 3, 5, 100])
def test_a_response_does_not_depend_on_its_batch(bundled, size, monkeypatch):
    """Rows leave and join; float32 rounding could flip a token in principle, and does not with these seeds."""
    prompts = [ids_of(bundled, text) for text in PROMPTS * 4]
    config = sampling(temperature=4.0, max_new_tokens=40)
    alone = [
        sample_all(TransformersEngine(bundled, config, refill=False, leave=False), [request])[0]
        for request in requests_of(bundled, prompts, config, 4)
    ]
    joined = []
    real = transformers_engine._widen
    monkeypatch.setattr(
        transformers_engine, "_widen", lambda batch, columns: (joined.append(columns), real(batch, columns))
    )
    made = sample_responses(bundled, prompts, sampling(temperature=4.0, max_new_tokens=40, sampling_batch_size=size), 4)
    assert bool(joined) == (size in (3, 5)), "other rows joined a batch, or none did where some should"
    assert len({len(sample.response_ids) for sample in alone}) > 3
    for one, other in zip(alone, made, strict=True):
        assert (one.response_ids, one.text, one.finished) == (other.response_ids, other.text, other.finished)
        torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["windows", "state"])
def test_other_caches_give_the_same_responses(bpe_tokenizer, kind):
    """Sliding windows let rows leave, and nobody joins; a recurrent state lets nobody leave."""
    transformers = pytest.importorskip("transformers")
    small = {
        "vocab_size": 300,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "eos_token_id": [*range(9, 40)],
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "windows":
            config = transformers.MistralConfig(**small, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, sliding_window=6)  # fmt: skip
            model = transformers.MistralForCausalLM(config).eval()
        else:
            model = transformers.MambaForCausalLM(transformers.MambaConfig(**small, state_size=4)).eval()
    loaded = LoadedModel(model, bpe_tokenizer, ModelIdentity(name="small", revision=None, fingerprint="x"), 64)
    prompts = [[50 + n] * (n % 5 + 2) for n in range(9)]
    alone = [
        sample_all(TransformersEngine(loaded, sampling()), [request])[0]
        for request in requests_of(loaded, prompts, sampling(), 1)
    ]
    made = sample_responses(loaded, prompts, sampling(sampling_batch_size=5), 1)
    assert [s.response_ids for s in made] == [s.response_ids for s in alone]
    assert len({len(s.response_ids) for s in made}) > 3


@given(
    st.lists(st.builds(lambda n, limit: Request([1] * n, limit, 0), st.integers(1, 20), st.integers(1, 20))),
    st.integers(1, 6),
    st.none() | st.integers(0, 15),
)
def test_padded_batches_fit_the_context(requests, size, slack):
    context = None if slack is None else slack + max((len(r.ids) + r.limit for r in requests), default=0)
    waiting, seen = deque(range(len(requests))), []
    beside: list[transformers_engine._Row] = []
    while waiting:
        places = transformers_engine._next_places(waiting, requests, beside, size, context)
        assert len(beside) + len(places) <= size
        beside += [transformers_engine._Row(place, requests[place], torch.Generator()) for place in places]
        assert beside
        if context is not None:
            assert max(len(r.request.ids) + len(r.ids) for r in beside) + max(r.request.limit - len(r.ids) for r in beside) <= context  # fmt: skip
        seen += places
        beside = [] if not places else beside[1:]
        for row in beside:
            if len(row.ids) < row.request.limit - 1:
                row.ids.append(1)
    assert seen == list(range(len(requests)))


def test_an_engine_that_returns_too_few_is_an_error():
    class Short:
        def sample(self, requests):
            yield 0, Sample([1], torch.zeros(1), "a", "stop", 0)
            yield 1, Sample([], torch.zeros(0), "", "stop", 0)

    with pytest.raises(UserError, match="Short returned 1 responses with at least one token, 3 were asked"):
        sample_all(Short(), [Request([1], 2, n) for n in range(3)])


def test_a_model_without_finite_probabilities_is_refused(tiny_loaded):
    with torch.no_grad():
        tiny_loaded.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(transformers_engine.NonFiniteLogits, match="NaN or infinite"):
        sample_responses(tiny_loaded, [[5, 6]], sampling(), 0)


def test_any_of_several_end_tokens_ends(tiny_loaded):
    model = tiny_loaded.model
    model.generation_config.eos_token_id = list(range(10, 250))
    ends = end_token_ids(tiny_loaded)
    assert set(ends) == {*range(10, 250), tiny_loaded.tokenizer.eos_token_id}
    for sample in sample_responses(tiny_loaded, [[5, 6]] * 4, sampling(), seed=0):
        assert sample.finished == (sample.response_ids[-1] in ends)
        assert not set(sample.response_ids[:-1]) & set(ends)


def test_a_models_own_generation_settings_do_not_warp(bundled):
    prompts = [ids_of(bundled, QUESTION)] * 4
    config = sampling(temperature=1.3)
    expected = sample_responses(bundled, prompts, config, seed=2)
    own = bundled.model.generation_config
    kept = own.to_dict()
    try:
        own.update(temperature=0.1, top_k=1, top_p=0.1, repetition_penalty=3.0, min_new_tokens=20)
        found = sample_responses(bundled, prompts, config, seed=2)
    finally:
        own.update(**{name: kept[name] for name in ("temperature", "top_k", "top_p", "repetition_penalty")})
        own.min_new_tokens = kept.get("min_new_tokens")
    assert [s.response_ids for s in found] == [s.response_ids for s in expected]


def test_a_sample_cannot_be_changed(bundled):
    (sample,) = sample_responses(bundled, [ids_of(bundled, QUESTION)], sampling(max_new_tokens=2), seed=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sample.text = "other"


@pytest.mark.parametrize("stops", [["="], ["4", "=1"], ["absent"]])
def test_a_stop_text_ends_a_response_where_the_rest_of_it_would_be(bundled, stops):
    """The same draws with and without: a response is the beginning of the one that went on, through the text."""
    prompts = [ids_of(bundled, text) for text in PROMPTS * 3]
    whole = sample_responses(bundled, prompts, sampling(), seed=0)
    cut = sample_responses(bundled, prompts, sampling(stop=stops), seed=0)
    stopped = 0
    for long, short in zip(whole, cut, strict=True):
        ids = [*long.response_ids]
        count = next((n for n in range(1, len(ids) + 1)
                      if any(s in bundled.tokenizer.decode(ids[:n], skip_special_tokens=True) for s in stops)), None)  # fmt: skip
        assert short.response_ids[: count or len(ids)] == ids[:count]
        assert len(short.logprobs) == len(short.response_ids) == (count or len(ids))
        assert short.finished == (long.finished or count is not None)
        assert short.stopped == (count is not None and ids[count - 1] not in end_token_ids(bundled))
        assert short.text == bundled.tokenizer.decode(short.response_ids, skip_special_tokens=True)
        torch.testing.assert_close(short.logprobs, long.logprobs[:count], rtol=0, atol=1e-4)
        stopped += count is not None and count < len(ids)
    assert bool(stopped) == (stops != ["absent"])


def test_a_stop_text_across_tokens_and_within_one(tiny_loaded):
    """``StopTexts`` on given tokens: the first token that completes the text counts."""
    tokenizer = tiny_loaded.tokenizer
    response = tokenizer("é and stop it, now")["input_ids"]
    for text, found in (("stop it", True), ("p i", True), ("é", True), ("it é", False), ("now!", False)):
        stops = StopTexts(tokenizer, [text])
        lengths = [n for n in range(1, len(response) + 1) if stops.completed(response[:n])]
        first = next((n for n in range(1, len(response) + 1) if text in tokenizer.decode(response[:n])), None)
        assert bool(lengths) == found == (first is not None)
        assert lengths[:1] == ([] if first is None else [first])


def test_the_templates_end_token_ends(tiny_loaded, monkeypatch):
    assert end_token_ids(tiny_loaded) == [tiny_loaded.tokenizer.eos_token_id]
    template = "{% for m in messages %}{{ m['content'] }}<pad>\n{% endfor %}"
    monkeypatch.setattr(tiny_loaded.tokenizer, "chat_template", template)
    assert end_token_ids(tiny_loaded) == [tiny_loaded.tokenizer.eos_token_id, tiny_loaded.tokenizer.pad_token_id]
