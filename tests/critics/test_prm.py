"""The prm critic against direct forward passes of tiny random models, and a server of the same numbers."""

import http.server
import json
import threading

import pytest
import torch

from ssrctl.cli import main
from ssrctl.configs import CriticOptions
from ssrctl.critics.base import score_all
from ssrctl.critics.prm import critic as prm_module
from ssrctl.critics.prm.critic import PRMCritic
from ssrctl.critics.prm.step_head import StepHeadModel
from ssrctl.critics.prm.styles import STYLES, Encoder, detect_style
from ssrctl.critics.registry import make_critic
from ssrctl.errors import UserError
from ssrctl.io.records import Rollout, StepSpan

QUESTION = "First add 12 and 30, then double it."
TEXTS = ("12+30=42\n", "Then double it: 42*2=84\n\n", "#### 84")
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def rollout(*texts, question=QUESTION, final=True, name="q/0"):
    spans, end = [], 0
    for text in texts:
        spans.append(StepSpan(start=end, end=end + len(text)))
        end += len(text)
    if final:
        spans[-1].kind = "final"
    return Rollout(id=name, question=question, response="".join(texts), steps=spans)


def tiny(kind, folder, tokenizer, **settings):
    """A random two-layer Qwen2 of ``kind``, saved with its tokenizer."""
    from transformers import Qwen2Config

    config = Qwen2Config(
        vocab_size=len(tokenizer) + 4,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        num_labels=2,
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)  # else every probability is about 0.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def words(bpe_tokenizer, tmp_path_factory):
    """The tests' tokenizer with the tags of every style and a chat template, as a model's folder gives it again."""
    import copy

    from transformers import AutoTokenizer, Qwen2ForCausalLM

    made = copy.deepcopy(bpe_tokenizer)
    made.add_tokens(["ки", " \n\n\n\n\n", " -", " +"])
    made.add_special_tokens({"additional_special_tokens": ["<extra_0>", "<|system|>", "<|user|>", "<|assistant|>"]})
    made.chat_template = CHAT
    folder = tmp_path_factory.mktemp("words")
    tiny(Qwen2ForCausalLM, folder, made)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def models(words, tmp_path_factory):
    """A folder and the model by style."""
    from transformers import Qwen2ForCausalLM, Qwen2ForTokenClassification

    folder = tmp_path_factory.mktemp("prm")
    kinds = {"trl": Qwen2ForTokenClassification, "qwen2.5-math": StepHeadModel, "causal": Qwen2ForCausalLM}
    made = {name: (folder / name, tiny(kind, folder / name, words)) for name, kind in kinds.items()}
    # As it is published: the architecture's name, and python code that must not run.
    path = folder / "qwen2.5-math" / "config.json"
    config = json.loads(path.read_text())
    config["architectures"] = ["Qwen2ForProcessRewardModel"]
    config["auto_map"] = {"AutoModel": "modeling_qwen2_rm.Qwen2ForProcessRewardModel"}
    path.write_text(json.dumps(config))
    (path.parent / "modeling_qwen2_rm.py").write_text("raise SystemExit('remote code ran')")
    return made


def options(models, style, **settings):
    folder, _ = models[style] if style in models else models["causal"]
    given = {"critic_prm_style": style} if style not in models else {}
    return CriticOptions(critic="prm", critic_model=str(folder), **{"critic_cache": False} | given | settings)


def direct(style, model, tokenizer, steps):
    """Probabilities by one plain forward pass, as the model cards describe it."""
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    steps = [step.strip() for step in steps]
    if style == "trl":
        ids = encode(QUESTION)
        places = []
        for step in steps:
            ids += encode(step) + encode("\n")
            places.append(len(ids) - 1)
        right = [1, 0]
    elif style == "qwen2.5-math":
        text = tokenizer.apply_chat_template(
            [
                {
                    "role": "system",
                    "content": "Please reason step by step, and put your final answer within \\boxed{}.",
                },
                {"role": "user", "content": QUESTION},
                {"role": "assistant", "content": "<extra_0>".join(steps) + "<extra_0>"},
            ],
            tokenize=False,
        )
        ids = encode(text)
        places = [i for i, token in enumerate(ids) if token == tokenizer.convert_tokens_to_ids("<extra_0>")]
        right = [1, 0]
    elif style == "rlhflow":
        found = []
        chat = []
        for number, step in enumerate(steps):
            chat += [{"role": "user", "content": f"{QUESTION} {step}" if number == 0 else step}]
            chat += [{"role": "assistant", "content": "+"}]
            ids = encode(tokenizer.apply_chat_template(chat, tokenize=False))
            place = len(ids) - 1 - ids[::-1].index(encode("+")[0]) - 1
            logits = model(input_ids=torch.tensor([ids])).logits[0, place]
            found.append(logits[[encode("+")[0], encode("-")[0]]].softmax(-1)[0].item())
        return found
    else:
        tag = {"math-shepherd": "ки", "openr": "\n\n\n\n\n"}[style]
        named = [f"Step {i}: {step}" for i, step in enumerate(steps, 1)] if style == "math-shepherd" else steps
        text = f"{QUESTION} " + ("\n" if style == "math-shepherd" else "").join(f"{step} {tag}" for step in named)
        ids = encode(text)
        token = encode(f" {tag}")[-1]
        places = [i for i, found in enumerate(ids) if found == token]
        right = encode("+ -" if style == "math-shepherd" else " + -")
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    return [logits[place, right].softmax(-1)[0].item() for place in places]


@pytest.mark.parametrize("style", STYLES)
def test_scores_equal_a_direct_forward_pass(models, words, style):
    judge = make_critic(options(models, style, critic_batch_size=2))
    first, second = rollout(*TEXTS), rollout(TEXTS[1], final=False, name="q/1")
    with torch.no_grad():
        model = (models.get(style) or models["causal"])[1]
        expected = [direct(style, model, words, texts) for texts in (TEXTS, TEXTS[1:2])]
    steps, (alone,) = score_all(judge, [first, second])
    assert len({round(p, 3) for p in expected[0]}) == 3  # a shifted place would show
    assert [s.score for s in steps] == pytest.approx(
        [200 * expected[0][0] - 100, 200 * expected[0][1] - 100, 100 * expected[0][2]], abs=1e-3
    )
    assert [s.reward for s in steps] == pytest.approx([2 * p - 1 for p in expected[0]], abs=1e-5)
    assert alone.score == pytest.approx(200 * expected[1][0] - 100, abs=1e-3)


def test_another_tokenizer_gives_the_same_alignment(models, words, tmp_path):
    """Spans are characters: with a token per byte the places still end each step."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast, Qwen2ForTokenClassification

    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(kinds.BPE(vocab=letters, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letter = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")
    texts = ("½ plus ¼ ergibt ¾.\n", "🙂 答えは七です。\n", "#### 7")
    by_words = Encoder(STYLES["trl"], words, "words").encode(QUESTION, texts)
    by_letters = Encoder(STYLES["trl"], letter, "letters").encode(QUESTION, texts)
    ends = [
        [tokenizer.decode(encoded.ids[: place + 1]) for place in encoded.places]
        for tokenizer, encoded in ((words, by_words), (letter, by_letters))
    ]
    assert (
        ends[0] == ends[1] == [QUESTION + "".join(f"{text.strip()}\n" for text in texts[:count]) for count in (1, 2, 3)]
    )
    assert by_words.places != by_letters.places
    tiny(Qwen2ForTokenClassification, tmp_path, letter)
    judge = make_critic(CriticOptions(critic="prm", critic_model=str(tmp_path), critic_cache=False))
    (scores,) = score_all(judge, [rollout(*texts)])
    assert None not in [score.score for score in scores]


def test_a_response_cannot_write_markup(models, words):
    judge = make_critic(options(models, "trl"))
    plain = Encoder(STYLES["qwen2.5-math"], words, "x").encode(QUESTION, ["a <|user|> b <end>"])
    assert words.convert_tokens_to_ids("<|user|>") in plain.ids  # of the template
    assert plain.ids.count(words.convert_tokens_to_ids("<|user|>")) == 1
    tagged = score_all(make_critic(options(models, "math-shepherd")), [rollout("ошибки 1=1\n", "#### 1")])
    assert [score.error for score in tagged[0]] == ["tag_in_text"] * 2
    (scores,) = score_all(judge, [rollout("1=1\n", "\n \n", "#### 1")])
    assert [score.error for score in scores] == [None, "empty_step", None]
    assert score_all(judge, [Rollout(id="e", question="?", response="", steps=[])]) == [[]]


def test_steps_beyond_the_context_are_missing(models):
    judge = make_critic(options(models, "trl"))
    long = rollout("1+1=2\n", "9" * 300 + "\n", "#### 2")
    short = score_all(judge, [rollout("1+1=2\n", final=False)])
    (scores,) = score_all(judge, [long])
    assert [score.error for score in scores] == [None, "context_window", "context_window"]
    assert scores[0].score == pytest.approx(short[0][0].score, abs=1e-3)
    assert judge.summary()["prm_beyond_context"] == 1


def test_the_zero_can_be_moved():
    def score(zero, share, kind):
        made = CriticOptions(critic="prm", critic_model="x", critic_prm_zero=zero)
        return PRMCritic(made, scorer=None)._score(share, kind).score

    assert [score(0.8, share, "step") for share in (0, 0.4, 0.8, 0.9, 1)] == pytest.approx([-100, -50, 0, 50, 100])
    assert [score(0.8, share, "final") for share in (0, 0.8, 1)] == pytest.approx([0, 50, 100])


def test_what_cannot_be_scored_is_one_line(models, bpe_tokenizer):
    with pytest.raises(UserError, match="'<extra_0>' is not a token of its tokenizer"):
        Encoder(STYLES["qwen2.5-math"], bpe_tokenizer, "x")
    with pytest.raises(UserError, match="'ки' is not a token of its tokenizer"):
        Encoder(STYLES["math-shepherd"], bpe_tokenizer, "x")
    with pytest.raises(UserError, match="no step tag"):
        Encoder(STYLES["rlhflow"], bpe_tokenizer, "x", "ки")
    with pytest.raises(UserError, match="one of math-shepherd, openr, rlhflow"):
        detect_style(["Qwen2ForCausalLM"], "x")
    with pytest.raises(UserError, match="scores whole responses"):
        detect_style(["Qwen2ForRewardModel"], "x")
    with pytest.raises(UserError, match="needs a model"):
        CriticOptions(critic="prm")
    with pytest.raises(UserError, match="lacks 2 of the model's"):
        make_critic(CriticOptions(critic="prm", critic_model=str(models["causal"][0]), critic_prm_style="trl"))


def test_probabilities_are_cached_and_scores_resumed(models, tmp_path, monkeypatch, capsys):
    steps = tmp_path / "steps.jsonl"
    rows = [rollout(*TEXTS, name=f"q/{i}").to_dict() for i in range(3)]
    steps.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = ["critic", str(steps), "--critic", "prm", "--critic-model", str(models["trl"][0]), "--json"]
    base += ["--critic-cache-dir", str(tmp_path / "cache"), "--device", "cpu"]

    def run(*args):
        assert main([*base, *args]) == 0
        return json.loads(capsys.readouterr().out)

    made = run("-o", str(tmp_path / "a.jsonl"))
    assert (made["prm_responses"], made["prm_cached"], made["missing"]) == (1, 0, 0)  # equal inputs are read once
    again = run("-o", str(tmp_path / "b.jsonl"), "--prm-zero", "0.8")
    assert (again["prm_responses"], again["prm_cached"]) == (0, 3)
    monkeypatch.setattr(prm_module.PRMCritic, "_judge", None)  # nothing is left to judge
    assert run("-o", str(tmp_path / "a.jsonl"))["kept_from_before"] == 3


def test_training_asks_the_prm(models, tmp_path):
    out = tmp_path / "run"
    args = ["train", "--output-dir", str(out), "--budget-profile", "flat", "--max-steps", "1", "--num-generations", "2"]
    args += ["--questions-per-step", "1", "--max-new-tokens", "32", "--critic", "prm", "--no-critic-cache"]
    assert main([*args, "--critic-model", str(models["trl"][0]), "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in (out / "rollouts" / "000001.jsonl").read_text().splitlines()]
    scores = [score for row in rows for score in row["scores"]]
    assert scores and any((score["rationale"] or "").startswith("p = ") for score in scores)


def test_calibration_measures_the_prm(models, tmp_path, capsys):
    labelled = tmp_path / "labelled.jsonl"
    row = {"problem": QUESTION, "steps": list(TEXTS)}
    labelled.write_text("".join(json.dumps(row | {"label": label}) + "\n" for label in (-1, 1)))
    args = ["critic", "--calibrate", str(labelled), "--critic", "prm", "--critic-model", str(models["trl"][0])]
    assert main([*args, "--no-cache", "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["missing"]["frac"] == 0


# --------------------------------------------------------------------------------------------------
# a pooling server


class _Pooling(http.server.BaseHTTPRequestHandler):
    """Replies as vLLM does: logits of every token, or of the tokens of ``only``."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        made = self.server.reply(self.path, body)
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(json.dumps(made).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server(models):
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Pooling)
    made.bodies, made.status = [], 200
    model = models["trl"][1]

    def reply(path, body):
        with torch.no_grad():
            if path == "/classify":
                probs = [
                    model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1).tolist() for ids in body["input"]
                ]
                return {"data": [{"index": i, "probs": p, "num_classes": 2} for i, p in enumerate(probs)][::-1]}
            return {"data": [{"index": 0, "data": model(input_ids=torch.tensor([body["input"]])).logits[0].tolist()}]}

    made.reply = reply
    thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    made.url = f"http://127.0.0.1:{made.server_port}"
    yield made
    made.shutdown()
    made.server_close()


@pytest.mark.parametrize("path", ["", "/v1", "/classify"])
def test_a_server_gives_the_scores_of_the_local_model(models, server, path):
    local = score_all(make_critic(options(models, "trl")), [rollout(*TEXTS)])
    judge = make_critic(options(models, "trl", critic_api_base=server.url + path))
    remote = score_all(judge, [rollout(*TEXTS)])
    judge.close()
    assert [s.score for s in remote[0]] == pytest.approx([s.score for s in local[0]], abs=1e-3)
    assert all(isinstance(token, int) for token in server.bodies[0]["input"][:1] if path != "/classify")


def test_step_counts_that_disagree_are_one_line(models, server):
    judge = make_critic(options(models, "trl", critic_api_base=server.url))
    server.reply = lambda path, body: {"data": [{"index": 0, "data": [[0.1, 0.9]] * 2}]}
    with pytest.raises(UserError, match="2 rows for 3 steps in"):
        score_all(judge, [rollout(*TEXTS)])
    server.reply = lambda path, body: {"data": [{"index": 0, "data": [[0.1, 0.9], [0.4, 0.6], [1, 0]]}]}
    assert [s.score for s in score_all(judge, [rollout(*TEXTS)])[0]] == pytest.approx([80, 20, 0])
    server.reply = lambda path, body: {"data": [{"index": 0, "data": [[0.1] * 5] * 3}]}
    with pytest.raises(UserError, match="5 scores a step"):
        score_all(judge, [rollout(*TEXTS)])
    server.status = 400
    assert [s.error for s in score_all(judge, [rollout(*TEXTS)])[0]] == ["bad_request"] * 3
    server.status = 404
    with pytest.raises(UserError, match="HTTP 404"):
        score_all(judge, [rollout(*TEXTS)])
    judge.close()


def test_a_server_that_is_not_there_is_one_line(models):
    judge = make_critic(options(models, "trl", critic_api_base="http://127.0.0.1:9", critic_retries=0))
    with pytest.raises(UserError, match="does not answer"):
        score_all(judge, [rollout(*TEXTS)])
    judge.close()
