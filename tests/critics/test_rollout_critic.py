"""The rollout critic against continuations drawn one at a time, exact enumeration, and corrupted solutions."""

import dataclasses
import itertools
import json
import statistics

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ssrctl.cli import main
from ssrctl.configs import CriticOptions, SamplingConfig, TrainConfig
from ssrctl.critics import rollout as rollout_module
from ssrctl.critics.base import score_all
from ssrctl.critics.rollout import RolloutCritic, prefix_seeds
from ssrctl.errors import UserError
from ssrctl.io.records import FinalAnswer, Rollout, StepSpan
from ssrctl.models.loading import load_model
from ssrctl.sampling.continuations import decode_continuation, encode_response, tokens_before
from ssrctl.text.answers import check_answer
from ssrctl.text.prompts import PromptFormat, build_prompt
from ssrctl.tiny_reasoner.problems import problems

# The reasoner knows questions of four operations and more; this one it gets right about every other time.
QUESTION, SOLUTION = "55-7*8+3+6=?", "55-7=48\n48*8=84\n84+3=87\n87+6=93\n####93"
WRONG = "55-7=48\n48*8=64\n64+3=67\n67+6=73\n####73"


@pytest.fixture(scope="module")
def bundled():
    """The bundled reasoner on the CPU."""
    return load_model(TrainConfig(device="cpu"))


def lines(response, kinds=None):
    """One span per line; the last is the final answer when it starts with #."""
    parts = response.splitlines(keepends=True)
    ends = list(itertools.accumulate(len(part) for part in parts))
    kinds = kinds or ["final" if part.startswith("#") else "step" for part in parts]
    return [StepSpan(start=e - len(p), end=e, kind=k) for p, e, k in zip(parts, ends, kinds, strict=True)]


def record(response=SOLUTION, *, answer="93", name="q/0", question=QUESTION, **fields):
    return Rollout(
        id=name,
        question=question,
        answer=answer,
        **{"prompt": f"<bos>{question}\n", "response": response, "steps": lines(response)} | fields,
    )


def critic(loaded, *, k=4, mode="value", seed=0, extraction="strict", **sampling):
    options = CriticOptions(
        critic="rollout", critic_rollouts=k, critic_rollout_value=mode, answer_extraction=extraction
    )
    return RolloutCritic(options, loaded, SamplingConfig(**{"max_new_tokens": 64} | sampling), seed)


def verdicts(scores):
    return [score.score if score.error is None else score.error for score in scores]


# --------------------------------------------------------------------------------------------------
# independent references


def continue_slowly(loaded, text, limit, seed, temperature=1.0):
    """One continuation of the bundled reasoner (a token is a character): no batch, no cache, float64 in numpy."""
    ids = loaded.tokenizer(text)["input_ids"]
    start = len(ids)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(limit):
        with torch.no_grad():
            logits = loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].double().numpy() / temperature
        waits = torch.empty(len(logits)).exponential_(generator=generator).double().numpy()
        # Of exponential clocks with rates p the first to ring is token t with probability p_t.
        token = int(np.argmin(np.log(waits) - logits))
        if token == loaded.tokenizer.eos_token_id:
            break
        ids.append(token)
    return loaded.tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_values_are_those_of_continuations_drawn_one_at_a_time(bundled):
    k, seed, temperature = 3, 11, 1.5
    rollouts = [
        record(),
        record(WRONG, name="q/1"),
        record("64-4=60\n60*8=80\n80*7=60\n60*9=40\n####40", question="64-4*8*7*9=?", answer="40", name="r/0"),
    ]
    found = score_all(critic(bundled, k=k, seed=seed, temperature=temperature, max_new_tokens=50), rollouts)
    shares = set()
    for rollout, scores in zip(rollouts, found, strict=True):
        for index, step in enumerate(rollout.steps):
            if step.kind == "final":
                continue
            before = rollout.response[: step.end]
            ids = bundled.tokenizer(rollout.prompt + before, add_special_tokens=False)["input_ids"]
            right = 0
            for one in prefix_seeds(seed, ids, k):
                text = continue_slowly(bundled, rollout.prompt + before, 50 - len(before), one, temperature)
                right += check_answer(before + text, rollout.answer).correct
            assert scores[index].score == pytest.approx((2 * right / k - 1) * 100)
            assert scores[index].rationale == f"{right} of {k} continuations end right"
            shares.add(right)
    assert len(shares) > 2  # neither all right nor all wrong, so that a shifted prefix shows


def test_the_share_estimates_the_exact_value(bundled):
    """Two tokens are left, so every path of two tokens can be weighed; the answer has begun before."""
    prompt, before, answer = f"<bos>{QUESTION}\n", SOLUTION[:-1], "93"
    ids = bundled.tokenizer(prompt + before)["input_ids"]
    temperature, k = 4.0, 800
    vocabulary = range(len(bundled.tokenizer))
    with torch.no_grad():
        first = (bundled.model(input_ids=torch.tensor([ids])).logits[0, -1].double() / temperature).softmax(-1)
        batch = torch.tensor([[*ids, token] for token in vocabulary])
        second = (bundled.model(input_ids=batch).logits[:, -1].double() / temperature).softmax(-1)
    exact = 0.0
    for a, b in itertools.product(vocabulary, vocabulary):
        path = [a] if a == bundled.tokenizer.eos_token_id else [a, b]
        text = bundled.tokenizer.decode(path, skip_special_tokens=True)
        exact += float(first[a] * second[a, b]) * check_answer(before + text, answer).correct
    assert 0.1 < exact < 0.9
    steps = [StepSpan(start=0, end=len(before)), StepSpan(start=len(before), end=len(before) + 2, kind="final")]
    rollout = record(before + "3\n", steps=steps)
    judge = critic(bundled, k=k, temperature=temperature, max_new_tokens=len(before) + 2, sampling_batch_size=1000)
    ((score, final),) = score_all(judge, [rollout])
    share = (score.score / 100 + 1) / 2
    assert abs(share - exact) < 4 * (exact * (1 - exact) / k) ** 0.5  # four standard errors
    assert final.score == 100


def test_corrupted_steps_lower_the_difference(bundled):
    """A wrong result in step 2 of solutions: its difference falls, the step before keeps its own."""
    rights, wrongs = [], []
    for problem in problems("heldout", 12, seed=5, min_ops=4, max_ops=4):
        parts = problem.solution.split("\n")
        rights.append(record(problem.solution, question=problem.question, answer=problem.answer, name=problem.id))
        parts[1] = parts[1][:-2] + f"{(int(parts[1][-2:]) + 37) % 100:02d}"
        wrongs.append(
            record("\n".join(parts), question=problem.question, answer=problem.answer, name=problem.id + "/wrong")
        )
    judge = critic(bundled, k=4, mode="difference")
    clean, corrupted = score_all(judge, rights), score_all(judge, wrongs)
    assert all(a[0] == b[0] for a, b in zip(clean, corrupted, strict=True))
    gaps = [a[1].score - b[1].score for a, b in zip(clean, corrupted, strict=True)]
    # About 54 points with a standard error of 12.
    assert statistics.fmean(gaps) > 20 and statistics.fmean(b[1].score for b in corrupted) < 0


# --------------------------------------------------------------------------------------------------
# what the scores are made of


def test_differences_are_those_of_the_values(bundled):
    rollouts = [record(), record(WRONG, name="q/1")]
    values = score_all(critic(bundled, k=6, seed=2), rollouts)
    differences = score_all(critic(bundled, k=6, seed=2, mode="difference"), rollouts)
    for value, difference in zip(values, differences, strict=True):
        shares = [(score.score / 100 + 1) / 2 for score in value[:-1]]
        steps = [score.score / 100 for score in difference[:-1]]
        assert steps[1:] == pytest.approx([b - a for a, b in itertools.pairwise(shares)])
        assert value[-1] == difference[-1]
    assert len({round(d[0].score - (v[0].score + 100) / 2, 9) for v, d in zip(values, differences, strict=True)}) == 1
    assert [scores[-1].score for scores in values] == [100, 0]
    assert differences[0][1].rationale.endswith(" of 6 before")


def test_nothing_depends_on_batches_order_or_company(bundled):
    others = [record(p.solution, question=p.question, answer=p.answer, name=p.id) for p in problems("train", 1, seed=1)]
    rollouts = [record(), *others, record("55-7=48\n", name="q/1")]

    def found(rollouts, repeat=0, **settings):
        judge = critic(bundled, k=2, mode="difference", **settings)
        judge.repeat = repeat
        return [verdicts(scores) for scores in score_all(judge, rollouts)]

    expected = found(rollouts)
    for size in (3, 1000):
        assert found(rollouts[::-1], sampling_batch_size=size)[::-1] == expected
    assert [found([rollout])[0] for rollout in rollouts] == expected
    assert found(rollouts, seed=1) != expected and found(rollouts, repeat=1) != expected
    fewer, more = prefix_seeds(0, (1, 2), 3), prefix_seeds(0, (1, 2), 5)
    assert more[:3] == fewer and len(set(more)) == 5 and prefix_seeds(0, (12,), 3) != fewer


def test_the_global_generator_is_left_alone(bundled):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    score_all(critic(bundled), [record()])
    assert torch.equal(torch.rand(3), expected)


def test_equal_prefixes_are_estimated_once(bundled):
    judge = critic(bundled, mode="difference")
    group = [record(name=f"q/{number}") for number in range(3)]
    first, second, third = score_all(judge, group)
    assert first == second == third
    summary = judge.summary()
    assert summary["prefixes"] == 5 and summary["shared_prefixes"] == 10 and summary["continuations"] == 20
    assert 0 < summary["continuation_tokens"] <= 20 * 64 and summary["answer_timeouts"] == 0
    other = critic(bundled, mode="difference")
    score_all(other, [record(), record(answer="94", name="q/1")])  # another answer, another value
    assert other.summary()["prefixes"] == 10


def test_rollouts_are_taken_as_they_are_needed(bundled):
    taken = []

    def source():
        for number in range(40):
            taken.append(number)
            yield record(name=f"q/{number}")

    judge = critic(bundled, k=2, sampling_batch_size=2)
    done = judge.stream(source())
    rollout, scores = next(done)
    assert rollout.id == "q/0" and len(scores) == 5
    assert len(taken) <= 4
    assert len(list(done)) == 39 and critic(bundled).stream([]) is not None
    assert list(critic(bundled).stream([])) == [] and critic(bundled).summary()["unfinished_frac"] is None


def test_what_decides_the_scores_is_in_the_identity(bundled):
    base = critic(bundled).identity
    assert base == critic(bundled, sampling_batch_size=3).identity
    others = [critic(bundled, **change).identity for change in ({"k": 5}, {"seed": 1}, {"mode": "difference"}, {"temperature": 0.5}, {"top_p": 0.5}, {"top_k": 3}, {"max_new_tokens": 20})]  # fmt: skip
    assert len({base, *others}) == len(others) + 1


# --------------------------------------------------------------------------------------------------
# ends of responses, limits, what cannot be scored


def test_a_response_that_ends_without_a_final_step(bundled):
    response = SOLUTION[:-7]
    for answer, extraction, score in (("93", "lenient", 100), ("75", "lenient", -100), ("93", "strict", -100)):
        ((*_, last),) = score_all(critic(bundled, extraction=extraction), [record(response, answer=answer)])
        assert last.score == score and last.rationale == "the response ends " + ("right" if score > 0 else "wrong")


def test_a_step_after_the_final_one(bundled):
    response = "55-7=48\n####48\n48*8=84\n"
    rollout = record(response, answer="84")
    ((first, final, last),) = score_all(critic(bundled, mode="difference"), [rollout])
    assert first.error is final.error is last.error is None and final.score in (0, 100)


def test_without_a_reference_nothing_is_estimated(bundled):
    judge = critic(bundled)
    assert verdicts(score_all(judge, [record(answer=None)])[0]) == ["no_reference"] * 5
    assert judge.summary()["continuations"] == 0


@pytest.mark.parametrize("prompt", [None, ""])
def test_a_record_without_a_prompt_is_refused(bundled, prompt):
    with pytest.raises(UserError, match=r"q/0 has no prompt.*'prompt'"):
        score_all(critic(bundled), [record(prompt=prompt)])
    assert score_all(critic(bundled), [record(prompt=prompt, steps=[])]) == [[]]


def test_a_prompt_is_made_from_the_question_only_where_it_is_said_how(bundled):
    made = critic(bundled)
    made.prompt_format = PromptFormat(wording="{question}")
    prompt = build_prompt(bundled.tokenizer, made.prompt_format, QUESTION)
    given, bare = record(name="q/0", prompt=prompt), record(name="q/1", prompt=None)
    first, second = score_all(made, [given, bare])
    assert verdicts(first) == verdicts(second)
    assert made.identity != critic(bundled).identity
    assert made.identity.startswith(critic(bundled).identity)


def test_the_command_continues_with_the_chat_template_that_it_is_given(tmp_path, capsys):
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ '2=' if tags else '' }}{{ m['content'] }}\n{% endfor %}")
    source = tmp_path / "s.jsonl"
    source.write_text(json.dumps(record(prompt=None).to_dict()) + "\n")
    words = ["critic", str(source), "--critic", "rollout", "--critic-rollouts", "1", "--max-new-tokens", "64"]
    assert main(words) == 2
    assert "or say how to make it" in capsys.readouterr().err
    identities = set()
    (tmp_path / "plain.txt").write_text("{question}")
    for more in ([], ["--chat-template-kwargs", '{"tags": true}'], ["--system-prompt", "7*8=?"]):
        target = tmp_path / f"{len(more)}-{len(identities)}.jsonl"
        assert main([*words, "--chat-template", str(template), "--prompt-template", str(tmp_path / "plain.txt"), *more,
                     "-o", str(target)]) == 0  # fmt: skip
        (row,) = map(json.loads, target.read_text().splitlines())
        assert all(score["error"] is None for score in row["scores"])
        identities.add(row["critic"])
    assert len(identities) == 3
    assert main([*words, "--chat-template", str(tmp_path / "none.jinja")]) == 2


def test_continuations_keep_within_what_the_policy_may_write(bundled):
    length = len(SOLUTION)
    judge = critic(bundled, max_new_tokens=length)
    assert all(score.error is None for score in score_all(judge, [record()])[0])
    # From the ends of four steps of eight tokens.
    assert judge.summary()["continuation_tokens"] <= 4 * (4 * length - 8 * (1 + 2 + 3 + 4))


def test_a_response_longer_than_the_policy_may_write(bundled, capsys):
    judge = critic(bundled, max_new_tokens=len(SOLUTION) - 1, mode="difference")
    assert verdicts(score_all(judge, [record(), record(name="q/1")])[0]) == ["too_long"] * 4 + [100]
    assert capsys.readouterr().err.count("--max-new-tokens") == 1
    assert judge.summary()["continuations"] == 0


def test_the_context_limits_too(bundled):
    prompt_length = len(bundled.tokenizer(f"<bos>{QUESTION}\n")["input_ids"])
    narrow = dataclasses.replace(bundled, context_length=prompt_length + len(SOLUTION) + 1)
    # One prompt is longer: its row cannot share a batch with the long continuations of the other.
    other = record("7+1=8\n####08", question="7+1" + "+0" * 12 + "=?", answer="08", name="long/0")
    found = score_all(critic(narrow, max_new_tokens=1000), [record(), other])
    assert all(score.error is None for scores in found for score in scores)
    too_narrow = dataclasses.replace(bundled, context_length=prompt_length + len(SOLUTION) - 1)
    assert verdicts(score_all(critic(too_narrow), [record()])[0]) == ["too_long"] * 4 + [100]
    none_left = dataclasses.replace(bundled, context_length=3)
    assert verdicts(score_all(critic(none_left), [record()])[0]) == ["too_long"] * 4 + [100]


def test_continuations_that_could_not_be_compared_count_neither_way(bundled, monkeypatch):
    given_up = FinalAnswer(extracted="1", correct=None, outcome="timed_out")

    def check_answers(pairs, extraction):
        outcomes = itertools.cycle((True, None, None, False, True, None))
        return [given_up if o is None else FinalAnswer(extracted="1", correct=o) for _, o in zip(pairs, outcomes)]  # noqa: B905

    monkeypatch.setattr(rollout_module, "check_answers", check_answers)
    monkeypatch.setattr(rollout_module, "check_answer", lambda *_, **__: given_up)
    judge = critic(bundled, k=6)
    assert verdicts(score_all(judge, [record()])[0]) == [pytest.approx(100 / 3)] * 4 + ["answer_timeout"]
    assert judge.summary()["answer_timeouts"] == 12
    monkeypatch.setattr(rollout_module, "check_answers", lambda pairs, extraction: [given_up] * len(pairs))
    for mode in ("value", "difference"):
        assert verdicts(score_all(critic(bundled, mode=mode), [record()])[0]) == ["answer_timeout"] * 5


@settings(max_examples=15)
@given(response=st.text(max_size=60), prompt=st.text(min_size=1, max_size=10), answer=st.text(max_size=5))
def test_no_text_raises(tiny_loaded_once, response, prompt, answer):
    """Lone surrogates, names of special tokens, characters of several tokens, any spans."""
    cut = len(response) // 2
    steps = [StepSpan(start=a, end=b) for a, b in ((0, cut), (cut, len(response))) if b > a]
    rollout = record(response + "<end>\ud83d", prompt=prompt + "\udc00", answer=answer, steps=steps)
    rollout.response = response if steps else ""
    (scores,) = score_all(critic(tiny_loaded_once, k=1, max_new_tokens=40, mode="difference"), [rollout])
    assert len(scores) == len(steps) and all((s.score is None) == (s.error is not None) for s in scores)


@pytest.fixture(scope="module")
def tiny_loaded_once(bpe_tokenizer):
    from ssrctl.io.artifacts import ModelIdentity
    from ssrctl.models.loading import LoadedModel

    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Qwen3ForCausalLM(config).eval()
    return LoadedModel(model, bpe_tokenizer, ModelIdentity(name="tiny", revision=None, fingerprint="x"), 512)


# --------------------------------------------------------------------------------------------------
# tokens


@example("7<end>8<pad>", 3)
@given(st.text(alphabet="First add 12 and 30.\n=+½🙂三é<end>", max_size=60), st.integers(0, 60))
def test_prefixes_end_where_tokens_do(bpe_tokenizer, text, place):
    ids, ends = encode_response(bpe_tokenizer, text)
    assert bpe_tokenizer.decode(ids) == text and not set(ids) & set(bpe_tokenizer.all_special_ids)
    count = tokens_before(ends, place)
    prefix = bpe_tokenizer.decode(ids[:count])
    assert len(prefix) <= place and text.startswith(prefix)
    # One token more would pass the place; characters of several tokens are taken whole.
    assert count == len(ids) or len(bpe_tokenizer.decode(ids[: count + 1]).rstrip("\ufffd")) + 1 > place


def test_a_token_across_the_end_of_a_step_is_left_out(bpe_tokenizer):
    text = "Then double it: 42*2=84 the answer is"
    ids, ends = encode_response(bpe_tokenizer, text)
    pieces = [bpe_tokenizer.decode([token]) for token in ids]
    index = next(i for i, piece in enumerate(pieces) if len(piece) > 2 and piece.startswith(" "))
    inside = ends[index] - 1
    assert tokens_before(ends, inside) == index and tokens_before(ends, ends[index]) == index + 1
    assert tokens_before(ends, 0) == 0 and tokens_before([], 5) == 0


def test_a_continuation_keeps_its_first_space():
    class DropsFirstSpace:
        def decode(self, ids, **options):
            return "".join(ids).removeprefix(" ")

    words = DropsFirstSpace()
    assert decode_continuation(words, [" The", " sum"], [" is", " 5"]) == " is 5"
    assert decode_continuation(words, [], [" is"]) == "is"


def test_a_models_own_generation_settings_do_not_warp(bundled):
    expected = score_all(critic(bundled, k=6), [record()])
    own = bundled.model.generation_config
    kept = own.to_dict()
    try:
        own.update(repetition_penalty=5.0, min_new_tokens=30, temperature=0.01)
        assert score_all(critic(bundled, k=6), [record()]) == expected
    finally:
        own.update(repetition_penalty=kept.get("repetition_penalty"), temperature=kept.get("temperature"))
        own.min_new_tokens = kept.get("min_new_tokens")
