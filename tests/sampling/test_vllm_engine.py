"""Sampling from a vLLM server that follows the trainer by pushes, and the faults of such a server."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import FakeVllm

from ssrctl.checkpoints.stored_tensors import StoredTensors
from ssrctl.configs import CriticConfig, CriticOptions, EvalConfig, ModelConfig, SamplingConfig, TrainConfig
from ssrctl.configs.engines import RolloutOptions
from ssrctl.core.bits import bit_patterns
from ssrctl.critics.rollout import RolloutCritic
from ssrctl.errors import Stopped, UserError
from ssrctl.io.jsonl import read_jsonl
from ssrctl.io.records import Rollout, StepSpan
from ssrctl.models.loading import LoadedModel, load_model
from ssrctl.sampling.engines import nearest
from ssrctl.sampling.engines.base import Request, sample_all
from ssrctl.sampling.engines.nearest import marked, place_tails
from ssrctl.sampling.engines.push_bytes import from_bytes, packed_changes, to_bytes, unpacked_changes
from ssrctl.sampling.engines.transformers_engine import TransformersEngine
from ssrctl.sampling.engines.vllm_engine import VllmServerEngine
from ssrctl.stages import eval as eval_stage
from ssrctl.stages import train


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(ModelConfig(dtype="float32"))


@pytest.fixture
def fake(loaded: LoadedModel) -> FakeVllm:
    return FakeVllm(loaded)


@pytest.fixture
def url(fake: FakeVllm) -> Iterator[str]:
    with fake.listening() as address:
        yield address


def engine_of(loaded: LoadedModel, url: str, sampling: SamplingConfig | None = None, **options: Any) -> Any:
    """Return the engine of a server with a copy of the model, whose weights a test may change."""
    import copy

    mine = dataclasses.replace(loaded, model=copy.deepcopy(loaded.model))
    options = {"rollout_server_timeout": 0.0, "rollout_server_url": [url], **options}
    made = RolloutOptions(rollout_engine="vllm-server", **options)
    return VllmServerEngine(
        mine, "tiny-reasoner", sampling or SamplingConfig(), made, StoredTensors.same(loaded.shapes())
    )


def changed(engine: VllmServerEngine, name: str = "model.norm.weight") -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Change two weights of the trainer; return the changes."""
    flat = dict(engine.loaded.model.named_parameters())[name].data.view(-1)
    flat[[3, 64]] += 0.5
    return {name: (torch.tensor([3, 64]), flat[[3, 64]].clone())}


def requests_of(loaded: LoadedModel) -> list[Request]:
    return [Request(loaded.tokenizer.encode("<bos>19-2-9*6=?\n", add_special_tokens=False), 24, n) for n in (11, 12)]


def settings(out: Path, **more: Any) -> TrainConfig:
    small = {"questions_per_step": 1, "num_generations": 4, "max_new_tokens": 16, "max_steps": 2, "log_masks_every": 0}
    return TrainConfig(output_dir=out, budget_profile="flat", **small | more)  # type: ignore[arg-type]


def metrics(out: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(out / "metrics.jsonl")]


@pytest.mark.parametrize(
    "optimizer", [{"rollout_push": "file"}, {"rollout_push": "inline", "optimizer": "adamw", "learning_rate": 1e-4}]
)
def test_a_run_on_a_server_learns_as_in_this_process(tmp_path: Path, fake: FakeVllm, url: str, optimizer: dict) -> None:
    pushed = settings(
        tmp_path / "served", rollout_engine="vllm-server", rollout_server_url=[url], verify_engine_every=2, **optimizer
    )
    train.run(pushed)
    train.run(settings(tmp_path / "here", **{k: v for k, v in optimizer.items() if k != "rollout_push"}))
    served, here = metrics(tmp_path / "served"), metrics(tmp_path / "here")
    for ours, theirs in zip(served, here, strict=True):
        assert ours["reward"] == theirs["reward"] and ours["response_tokens"] == theirs["response_tokens"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours["logprob_gap_max"] < 1e-4 and ours["probe_gap_max"] < 1e-4
        assert "push_bytes" not in theirs
    dense = optimizer.get("optimizer") == "adamw"
    assert [row["push_kind"] for row in served] == ["none", "full" if dense else "changes"]
    last = served[-1]
    assert last["full_push_bytes"] == 421_248 * 4
    if not dense:  # six to nine bits of index and three bytes of the value, of the coordinates that changed
        assert 0 < last["push_coordinates"] <= last["updated_frac"] * 421_248 * 1.6
        assert 3.75 < last["push_bytes"] / last["push_coordinates"] < 4.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_pushes_carry_every_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {"dense": (300, 70), "sparse": (1000, 200), "lone": (1,), "scalar": ()}
    weights = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    target = {name: tensor.clone() for name, tensor in weights.items()}
    target["dense"].view(-1)[::7] *= 1 + 2**-6
    target["dense"][3, :4] = torch.tensor([math.nan, -0.0, math.inf, 1e-30]).to(dtype)
    target["sparse"].view(-1)[::997] *= -1
    target["lone"] += 1
    target["scalar"] += 1
    places = {name: bit_patterns(weights[name]).view(-1) != bit_patterns(target[name]).view(-1) for name in weights}
    indices = {name: found.nonzero().flatten() for name, found in places.items()}
    changes = {name: (where, target[name].view(-1)[where]) for name, where in indices.items()}
    before = {name: weights[name].view(-1)[where] for name, where in indices.items()}
    sizes = []
    for known in (None, before):
        packed = to_bytes(*packed_changes(changes, shapes, known))
        sizes.append(len(packed))
        found = {name: tensor.clone() for name, tensor in weights.items()}
        for one in unpacked_changes(*from_bytes(packed)) * 2:  # a second time changes nothing
            if one.near[0].numel():
                place_tails(found[one.name].T, marked(one.shape, one.dtype, *one.near).T)
            found[one.name].view(-1)[one.far[0]] = one.far[1]
        assert all(bit_patterns(found[name]).equal(bit_patterns(target[name])) for name in found)
    assert sizes[1] < sizes[0] - 2_000 or dtype == torch.float64
    if dtype != torch.float64:
        computed = marked((4,), dtype, torch.tensor([1]), nearest.tails(torch.ones(1, dtype=dtype))) * -1
        with pytest.raises(ValueError, match="computes with them"):
            place_tails(torch.zeros(4, dtype=dtype), computed)


def test_the_servers_sample_from_pushed_weights(loaded: LoadedModel, fake: FakeVllm, url: str) -> None:
    engine = engine_of(loaded, url)
    engine.connect()
    before = sample_all(engine, requests_of(loaded))
    done = engine.push(changed(engine))
    assert (done.kind, done.num_coordinates) == ("changes", 2) and done.num_bytes < 20
    assert engine.check().gap_max < 1e-4
    after = sample_all(engine, requests_of(loaded))
    here = sample_all(TransformersEngine(engine.loaded, SamplingConfig()), requests_of(loaded))
    assert [s.response_ids for s in after] == [s.response_ids for s in here]
    assert not torch.equal(after[0].logprobs, before[0].logprobs) and {s.version for s in after} == {2}
    assert after[0].finish_reason == here[0].finish_reason and after[0].text == here[0].text


def test_stop_texts_and_missing_log_probabilities(loaded: LoadedModel, fake: FakeVllm, url: str) -> None:
    fake.drops_logprobs = True
    engine = engine_of(loaded, url, SamplingConfig(stop=["="]))
    engine.push(None)
    (sample,) = sample_all(engine, requests_of(loaded)[:1])
    assert sample.text.count("=") == 1 and sample.text.endswith("=") and sample.finished
    assert math.isnan(sample.logprobs[0]) and not sample.logprobs[1:].isnan().any()
    assert len(sample.logprobs) == len(sample.response_ids)
    cut = engine_of(loaded, url, SamplingConfig(top_k=3))
    cut.push(None)
    assert sample_all(cut, requests_of(loaded)[:1])[0].logprobs.isnan().all()


@pytest.mark.parametrize("fault", ["/update_weights", "/finish_weight_update", "/reset_prefix_cache", "/resume"])
def test_a_push_that_fails_is_healed_by_all_weights(
    loaded: LoadedModel, fake: FakeVllm, url: str, fault: str, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = engine_of(loaded, url)
    engine.connect()
    fake.faults[fault] = 1
    done = engine.push(changed(engine))
    assert done.kind == "full" and done.num_bytes > engine.full_bytes
    assert "did not take a push of changes (HTTP 500" in " ".join(capfd.readouterr().err.split())
    assert engine.check().gap_max < 1e-4 and not fake.paused
    fake.faults[fault] = 2
    with pytest.raises(Stopped, match="does not take the weights: HTTP 500"):
        engine.push(changed(engine))


def test_changes_to_another_base_are_refused_by_the_server(loaded: LoadedModel, fake: FakeVllm, url: str) -> None:
    engine = engine_of(loaded, url)
    engine.connect()
    fake.backend._version = "another-7"
    assert engine.push(changed(engine)).kind == "full"
    assert fake.backend._version == engine.servers[0].held
    fake.restart()  # the client believes that the server holds its weights
    assert engine.push(changed(engine)).kind == "full"


def test_samples_of_other_weights_are_drawn_again(
    loaded: LoadedModel, fake: FakeVllm, url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = engine_of(loaded, url)
    engine.connect()
    fake.restart()
    samples = sample_all(engine, requests_of(loaded))
    assert {sample.version for sample in samples} == {1}
    assert "sampled with version default of the weights" in " ".join(capfd.readouterr().err.split())


def test_a_server_that_does_not_apply_changes_is_found_out(loaded: LoadedModel, fake: FakeVllm, url: str) -> None:
    engine = engine_of(loaded, url)
    engine.connect()
    fake.ignores_changes = True
    engine.push(changed(engine))
    with pytest.raises(Stopped, match="does not compute with the trainer's weights"):
        engine.check()


def test_a_server_that_dies_ends_the_run_which_continues_on_another(
    tmp_path: Path, fake: FakeVllm, url: str, loaded: LoadedModel
) -> None:
    served = settings(tmp_path / "run", rollout_engine="vllm-server", rollout_server_url=[url])
    fake.gives_out = 2 + 2 + 4 + 2 + 1  # in the middle of the second step's responses
    with pytest.raises(Stopped, match=r"is gone: .*`ssrctl serve-rollouts --model tiny-reasoner") as stop:
        train.run(served)
    assert "after step 1" in str(stop.value.remedy) and len(metrics(tmp_path / "run")) == 1
    fake.gives_out = None
    with fake.listening() as other:
        train.run(dataclasses.replace(served, resume_from_checkpoint="latest", rollout_server_url=[other]))
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]


def test_a_server_that_comes_back_gets_all_weights(loaded: LoadedModel, fake: FakeVllm, url: str) -> None:
    engine = engine_of(loaded, url, rollout_server_return=30.0)
    engine.connect()
    fake.gives_out = 1

    def back(path: str, body: Any) -> tuple[int, Any]:
        if path == "/health":
            fake.restart()
            fake.gives_out = None
        return FakeVllm.reply(fake, path, body)

    fake.reply = back  # type: ignore[method-assign]
    samples = sample_all(engine, requests_of(loaded))
    assert len(samples) == 2 and engine.version == 1 and engine.check().gap_max < 1e-4


def test_several_servers_share_the_requests_and_only_the_one_that_was_gone_is_healed(
    loaded: LoadedModel, fake: FakeVllm, url: str
) -> None:
    other = FakeVllm(loaded)
    with other.listening() as second:
        engine = engine_of(loaded, url, rollout_server_url=[url, second])
        engine.connect()
        done = engine.push(changed(engine))
        assert done.kind == "changes" and engine.check().gap_max < 1e-4
        other.restart()
        asked = len(fake.requests)
        requests = [Request(one.ids, one.limit, seed) for seed in range(6) for one in requests_of(loaded)]
        samples = sample_all(engine, requests)
        here = sample_all(TransformersEngine(engine.loaded, SamplingConfig()), requests)
        assert [s.response_ids for s in samples] == [s.response_ids for s in here]
        drawn = [path for path, _ in fake.requests[asked:]]
        assert set(drawn) == {"/inference/v1/generate"} and 3 <= len(drawn) < 12 + 6
        updates = [body["update_info"]["base"] for path, body in other.requests if path == "/update_weights"]
        assert len(updates) == 3 and updates[1] is not None and updates[2] is None


def test_an_evaluation_continues_after_its_server_died(tmp_path: Path, fake: FakeVllm, url: str) -> None:
    def evaluated(out: str, **more: Any) -> dict[str, str]:
        small = {"limit": 2, "num_samples": 2, "max_new_tokens": 8, "sampling_batch_size": 1, "report": False}
        eval_stage.run(EvalConfig(output_dir=tmp_path / out, **small | more))  # type: ignore[arg-type]
        return {row["id"]: row["response"] for _, row in read_jsonl(tmp_path / out / "samples.jsonl")}

    fake.gives_out = 2 + 3
    served = {"rollout_engine": "vllm-server", "rollout_server_url": [url]}
    with pytest.raises(Stopped, match=r"is gone: .* the samples drawn so far are kept") as stop:
        evaluated("served", **served)
    assert "run the same command again" in str(stop.value.remedy)
    fake.gives_out = None
    asked = len(fake.requests)
    assert evaluated("served", **served) == evaluated("here")
    assert sum(path == "/inference/v1/generate" for path, _ in fake.requests[asked:]) == 2 + 1
    with pytest.raises(UserError, match="rollout_engine was 'vllm-server', is 'transformers'"):
        evaluated("served")


def test_the_rollout_critic_samples_from_the_server(loaded: LoadedModel, fake: FakeVllm, url: str) -> None:
    rollout = Rollout(id="a/0", question="3+4=?", answer="7", prompt="<bos>3+4=?\n", response="3+4=7\n#7\n",
                      steps=[StepSpan(start=0, end=6), StepSpan(start=6, end=9, kind="final")])  # fmt: skip
    sampling = SamplingConfig(max_new_tokens=16)
    engine = engine_of(loaded, url, sampling)
    engine.push(None)
    options = CriticOptions(critic="rollout", critic_rollouts=2)
    here, served = (RolloutCritic(options, loaded, sampling, 3, engine=one) for one in (None, engine))
    assert list(served.stream([rollout])) == list(here.stream([rollout]))
    assert fake.requests[-1][0] == "/inference/v1/generate" and served.identity != here.identity
    with pytest.raises(UserError, match="--rollout-engine vllm-server is for --critic rollout, not rule"):
        CriticConfig(input="steps.jsonl", critic="rule", rollout_engine="vllm-server")


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ({"dev_mode": False}, "is not a vLLM server in dev mode: HTTP 404"),
        ({"backend": None}, "its weight transfer is None"),
        ({"dtype": "torch.bfloat16"}, "computes in torch.bfloat16, the trainer in float32"),
        ({"max_model_len": 64}, "its context is 64 tokens, the model's 128"),
        ({"logprobs_mode": "raw_logprobs"}, "its log-probabilities are raw_logprobs"),
        ({"scale_out": False}, "refuses to sample: HTTP 403"),
    ],
)
def test_servers_that_cannot_follow_are_refused_with_the_command(
    loaded: LoadedModel, server: dict, message: str
) -> None:
    with FakeVllm(loaded, **server).listening() as url:
        engine = engine_of(loaded, url, SamplingConfig(temperature=0.7))
        with pytest.raises(UserError, match=message) as error:
            engine.connect()
    assert f"ssrctl serve-rollouts --model tiny-reasoner --dtype float32 --url {url}" in str(error.value.remedy)


def test_experts_on_a_cpu_are_refused(loaded: LoadedModel, url: str) -> None:
    engine = engine_of(loaded, url)
    engine.stored = StoredTensors.same(loaded.shapes() | {"model.layers.0.mlp.experts.0.up_proj.weight": (2, 2)})
    with pytest.raises(UserError, match=r"runs on a CPU, where vLLM .* multiplies experts by packed copies"):
        engine.connect()


def test_addresses_and_settings_that_cannot_be_meant(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no rollout server at http://127.0.0.1:9: .*refused.* \(waited 0 seconds\)"):
        engine_of(loaded, "http://127.0.0.1:9").connect()
    for address, found in (
        ("localhost:8000", "is not the address of a server"),
        ("http://me:secret@127.0.0.1:8000", "must not contain a user name or password"),
    ):
        with pytest.raises(UserError, match=found) as refused:
            settings(tmp_path, rollout_engine="vllm-server", rollout_server_url=[address])
        assert "secret" not in str(refused.value) + str(refused.value.remedy)
    with pytest.raises(UserError, match="--rollout-server-url is for --rollout-engine vllm-server"):
        settings(tmp_path, rollout_server_url=["http://127.0.0.1:8000"])
    with pytest.raises(UserError, match="--verify-engine-every is for"):
        settings(tmp_path, verify_engine_every=2)
    with pytest.raises(UserError, match="--sampling-weights shards is for --rollout-engine transformers"):
        settings(tmp_path, rollout_engine="vllm-server", num_processes=2, sharding="fsdp2", sampling_weights="shards")
    with pytest.raises(UserError, match="--find-lr samples in this process"):
        train.run(settings(tmp_path, rollout_engine="vllm-server", find_lr=True))
