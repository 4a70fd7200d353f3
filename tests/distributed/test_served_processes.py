"""Training in several processes that sample from the same servers: the run of one process, with one push of each change."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import FakeVllm
from processes import Ended, run_processes
from safetensors.torch import load_file
from test_sharded_processes import assert_same_training

from ssrctl.checkpoints.run_dir import RunDir
from ssrctl.cli import main
from ssrctl.configs import ModelConfig
from ssrctl.io.jsonl import read_jsonl
from ssrctl.models.loading import load_model
from ssrctl.sampling.engines.vllm_http import VllmServer

SMALL = [
    "train", "--questions-per-step", "2", "--num-generations", "2", "--max-new-tokens", "16", "--save-steps", "1",
    "--seed", "1", "--log-masks-every", "0",
]  # fmt: skip


class Restarting(FakeVllm):
    """A server that restarts, with the original weights, at the second response of the first changed weights."""

    def reply(self, target: str, body: Any) -> tuple[int, Any]:
        if target == "/inference/v1/generate" and self.version.endswith("-2"):
            self.answered = getattr(self, "answered", 0) + 1
            if self.answered == 2 + 2:  # two are of the probe
                self.restart()
        return super().reply(target, body)


def on_servers(fakes: list[FakeVllm], run: Path, size: int, words: list[str], before: Any = None) -> list[Ended]:
    """Run a command with these servers; of one process check the exit code."""
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(fake.listening()) for fake in fakes]
        served = [word for url in urls for word in ("--rollout-server-url", url)]
        words = [*words, "--rollout-engine", "vllm-server", *served, "-o", str(run)]
        if size > 1:
            return run_processes(words, size, run.parent / "logs", before)
        assert main(words) == 0
        return []


def trained(fakes: list[FakeVllm], run: Path, size: int, words: list[str], before: Any = None) -> list[Ended]:
    return on_servers(fakes, run, size, [*SMALL, "--sample-together", "question", *words], before)


def fakes_of(*kinds: type[FakeVllm]) -> list[FakeVllm]:
    loaded = load_model(ModelConfig(dtype="float32"))
    return [kind(loaded) for kind in kinds]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(run / "metrics.jsonl")]


def test_two_processes_share_servers_of_which_one_restarts(tmp_path: Path) -> None:
    one, two = tmp_path / "1" / "run", tmp_path / "2" / "run"
    trained(fakes_of(FakeVllm), one, 1, ["--max-steps", "2"])
    fakes = fakes_of(FakeVllm, Restarting)
    ended = trained(fakes, two, 2, ["--max-steps", "2"])
    assert [process.code for process in ended] == [0, 0], ended
    said = " ".join(ended[0].err.split())
    assert said.count("sampled with version default of the weights") == 1 and "gets all weights again" in said
    for step in (1, 2):
        assert RunDir(one).rollouts(step).read_text() == RunDir(two).rollouts(step).read_text()
    deltas = [load_file(RunDir(run).checkpoint(2) / "delta.safetensors") for run in (one, two)]
    assert deltas[0].keys() == deltas[1].keys() and all(deltas[0][key].equal(deltas[1][key]) for key in deltas[0])
    rows = metrics(two)
    assert [row["push_kind"] for row in rows] == ["none", "changes"]
    for fake, full in zip(fakes, (1, 2), strict=True):
        updates = [body["update_info"]["base"] is None for path, body in fake.requests if path == "/update_weights"]
        assert Counter(updates) == {True: full, False: 1}
        assert sum(path == "/inference/v1/generate" for path, _ in fake.requests) > 2 * 2 + full
    assert rows[1]["push_bytes"] == 2 * metrics(one)[1]["push_bytes"]


def test_a_server_that_dies_ends_all_processes_with_a_checkpoint(tmp_path: Path) -> None:
    fakes = fakes_of(FakeVllm, FakeVllm)
    fakes[1].gives_out = 2 + 2 + 2 + 1  # in the second step
    ended = trained(fakes, tmp_path / "run", 2, ["--max-steps", "2"])
    assert [process.code for process in ended] == [3, 3], ended
    said = [line for process in ended for line in process.err.splitlines() if line.startswith("stopped: ")]
    assert len(said) == 1 and "is gone" in said[0] and "Traceback" not in ended[0].err + ended[1].err
    assert [path.name for path in RunDir(tmp_path / "run").checkpoints()] == ["000001"]


@pytest.mark.slow
def test_shards_are_pushed_whole(tmp_path: Path) -> None:
    one, two = tmp_path / "1" / "run", tmp_path / "2" / "run"
    trained(fakes_of(FakeVllm), one, 1, ["--max-steps", "2"])
    ended = trained(fakes_of(FakeVllm), two, 2, ["--max-steps", "2", "--sharding", "fsdp2"])
    assert [process.code for process in ended] == [0, 0], ended
    assert_same_training(one, two, 2)
    ours, theirs = metrics(two), metrics(one)
    assert [row["push_kind"] for row in ours] == ["none", "changes"]
    assert ours[1]["push_coordinates"] == pytest.approx(theirs[1]["push_coordinates"], rel=0.01)
    assert all(row["probe_gap_max"] < 1e-4 for row in ours)


@pytest.mark.slow
def test_an_address_that_is_another_server_elsewhere_is_named(tmp_path: Path) -> None:
    def before(rank: int) -> None:
        plain = VllmServer.get

        def get(self: VllmServer, path: str, **more: Any) -> Any:
            return {"weight_version": "default"} if rank and path == "/weight_info" else plain(self, path, **more)

        VllmServer.get = get  # type: ignore[method-assign]

    ended = trained(fakes_of(FakeVllm), tmp_path / "run", 2, ["--max-steps", "2"], before)
    assert [process.code for process in ended] == [2, 2], ended
    said = [line for process in ended for line in process.err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "process 1 finds default at http://127.0.0.1" in said[0]


@pytest.mark.slow
def test_an_evaluation_shares_the_servers_too(tmp_path: Path) -> None:
    words = ["eval", "--limit", "6", "--num-samples", "2", "--max-new-tokens", "8", "--sampling-batch-size", "2"]
    for size in (1, 2):
        fakes = fakes_of(FakeVllm, FakeVllm)
        ended = on_servers(fakes, tmp_path / str(size) / "eval", size, words)
        assert {process.code for process in ended} <= {0}, ended
        for fake in fakes:
            assert sum(path == "/update_weights" for path, _ in fake.requests) == 1
    one, two = (read_jsonl(tmp_path / size / "eval" / "samples.jsonl") for size in ("1", "2"))
    assert sorted((row["id"], row["response"]) for _, row in one) == sorted(
        (row["id"], row["response"]) for _, row in two
    )
