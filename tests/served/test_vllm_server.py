"""The client against a real vLLM on the CPU, in float32: `make test-vllm`, about three minutes.

$SSRCTL_VLLM_PYTHON is the Python of vLLM's environment, which has this package's plugin.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ssrctl.checkpoints.stored_tensors import StoredTensors
from ssrctl.configs import ModelConfig, SamplingConfig, ServeRolloutsConfig, TrainConfig
from ssrctl.configs.engines import RolloutOptions
from ssrctl.errors import Stopped, UserError
from ssrctl.io.jsonl import read_jsonl
from ssrctl.models.loading import load_model
from ssrctl.sampling.engines.base import Changes, Request, sample_all
from ssrctl.sampling.engines.vllm_engine import VllmServerEngine
from ssrctl.sampling.engines.vllm_http import VllmServer
from ssrctl.stages import serve_rollouts, train

PYTHON = os.environ.get("SSRCTL_VLLM_PYTHON", "")
pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not PYTHON, reason="SSRCTL_VLLM_PYTHON names no vLLM")]


@contextlib.contextmanager
def serving(log: Path, **variables: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start a server of the bundled model; yield its address and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    # blocks of 32 tokens: the model's context of 128 has room for several
    config = ServeRolloutsConfig(python=PYTHON, url=url, dtype="float32", vllm_arg=["--block-size=32"], log=log)
    needed, words = serve_rollouts.server_command(config, on_cpu=True)
    with log.open("ab") as output, serve_rollouts._running(words, needed | variables, output) as process:
        serve_rollouts._wait(VllmServer(url), process, config)
        yield url, process


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("vllm") / "log") as (address, _):
        yield address


def engine_of(url: str, **options: Any) -> VllmServerEngine:
    loaded = load_model(ModelConfig(dtype="float32"))
    made = RolloutOptions(rollout_engine="vllm-server", rollout_server_url=[url], rollout_server_timeout=0, **options)
    return VllmServerEngine(
        loaded, "tiny-reasoner", SamplingConfig(max_new_tokens=32), made, StoredTensors.same(loaded.shapes())
    )


def changed(engine: VllmServerEngine, seed: int) -> tuple[Changes, dict[str, torch.Tensor]]:
    """Change 2% of every tensor of the trainer; return the changes and the values before."""
    generator, changes, before = torch.Generator().manual_seed(seed), {}, {}
    for name, parameter in engine.loaded.model.named_parameters():
        count = max(1, parameter.numel() // 50)
        places = torch.randperm(parameter.numel(), generator=generator)[:count].sort().values
        flat = parameter.data.view(-1)
        before[name] = flat[places].clone()
        flat[places] += 0.05 * torch.randn(count, generator=generator)
        changes[name] = places, flat[places].clone()
    return changes, before


REQUESTS = [Request([1, 5, 6, 7, 9], 32, seed) for seed in range(8)]


@pytest.mark.parametrize("carrier", ["file", "inline"])
def test_changes_equal_a_push_of_all_weights(url: str, carrier: str) -> None:
    engine = engine_of(url, rollout_push=carrier)
    engine.connect()
    for seed in (1, 2):
        changes, before = changed(engine, seed)
        done = engine.push(changes, before if carrier == "file" else None)
        assert done.kind == "changes" and done.num_bytes < engine.full_bytes / 25
        sparse, samples = engine.check(), sample_all(engine, REQUESTS)
        assert sparse.gap_max < 1e-3
        engine.push(None)
        assert engine.check().same_as(sparse)
        for ours, theirs in zip(samples, sample_all(engine, REQUESTS), strict=True):
            assert ours.response_ids == theirs.response_ids
            assert torch.allclose(ours.logprobs, theirs.logprobs, atol=1e-5)


def test_a_push_to_another_base_is_refused_and_healed(url: str) -> None:
    first, second = engine_of(url), engine_of(url)
    first.connect()
    second.connect()  # the server holds this one's weights now
    assert first.push(*changed(first, 3)).kind == "full"
    assert first.check().gap_max < 1e-3
    second.servers[0].held = second._label
    with pytest.raises(Stopped, match="the probe failed"):
        second.check()


def test_a_stale_cache_is_noticed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(url)
    engine.connect()
    monkeypatch.setattr(VllmServer, "_forget_cache", lambda self: None)
    # the pause drops the cache as well
    plain = VllmServer.post
    monkeypatch.setattr(
        VllmServer,
        "post",
        lambda self, path, *a, **k: plain(self, path.replace("abort", "abort&clear_cache=false"), *a, **k),
    )
    engine.push(*changed(engine, 4))
    with pytest.raises(Stopped, match="does not compute with the trainer's weights"):
        engine.check()


def test_a_run_learns_from_the_server(url: str, tmp_path: Path) -> None:
    train.run(
        TrainConfig(
            output_dir=tmp_path, rollout_engine="vllm-server", rollout_server_url=[url], max_steps=5, questions_per_step=1,
            max_new_tokens=48, verify_engine_every=2, report=False,
        )
    )  # fmt: skip
    rows = [row for _, row in read_jsonl(tmp_path / "metrics.jsonl")]
    assert len(rows) == 5 and all(row["logprob_gap_max"] < 1e-3 for row in rows if row["logprob_gap_max"] is not None)
    assert any(row["push_kind"] == "changes" for row in rows)


def test_a_killed_server_ends_the_run_and_another_one_continues_it(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "output_dir": tmp_path / "run", "rollout_engine": "vllm-server", "max_steps": 3, "questions_per_step": 1,
        "max_new_tokens": 48, "report": False,
    }  # fmt: skip
    with serving(tmp_path / "log") as (address, process):
        plain, pushes = VllmServer.push, []

        def deadly(self: VllmServer, update: dict[str, Any]) -> None:
            pushes.append(update["base"])
            if len(pushes) == 2:
                os.killpg(process.pid, signal.SIGKILL)
            plain(self, update)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped, match="is gone"):
            patch.setattr(VllmServer, "push", deadly)
            train.run(TrainConfig(rollout_server_url=[address], **settings))
    assert pushes[0] is None and pushes[1] is not None
    with serving(tmp_path / "log") as (address, _):
        train.run(TrainConfig(rollout_server_url=[address], resume_from_checkpoint="latest", **settings))
    assert [row["step"] for _, row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]


def test_a_server_without_the_plugin_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the server ended"), serving(tmp_path / "log", VLLM_PLUGINS=""):
        pass
    assert "Invalid weight transfer backend: ssrctl" in (tmp_path / "log").read_text()
