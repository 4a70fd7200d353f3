"""The arithmetic of the exchange against what is packed, and against the plan that --dry-run prints."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ssrctl import tiny_reasoner
from ssrctl.cli import main
from ssrctl.configs import TrainConfig
from ssrctl.core.claims import KeptUnit
from ssrctl.core.kept_bytes import Numbering, pack_unit
from ssrctl.core.layout import Shards
from ssrctl.distributed.traffic import bits_per_coordinate, dense_bytes_sent, kept_bytes_sent
from ssrctl.training.time_plan import time_shares


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.bfloat16, 2), (torch.float32, 4)])
@pytest.mark.parametrize("share", [0.01, 0.0025])
def test_the_arithmetic_is_that_of_the_packed_bytes(dtype, itemsize, share) -> None:
    """Gaussian gradients have a lighter tail than those that the constant was measured on."""
    gradient = torch.randn(400_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    shards = Shards({"w": gradient})
    unit = KeptUnit(shards)
    unit.keep({"w": gradient}, {"w": gradient.abs().topk(int(share * 400_000)).indices.sort().values})
    packed = pack_unit(unit, Numbering(shards, dtype))
    assert 8 * packed.numel() / unit.count == pytest.approx(bits_per_coordinate(share, itemsize), abs=1.0)


def test_four_questions_at_five_percent_are_an_eighth_of_a_dense_all_reduce() -> None:
    for processes in (2, 8):
        dense = dense_bytes_sent(10**6, itemsize=2, processes=processes)
        sent = [
            kept_bytes_sent(10**6, itemsize=2, questions=q, budget=0.05, unit_share=0.01, processes=processes) / dense
            for q in (4, 33, 34)
        ]
        assert sent[0] < 1 / 8 and sent[1] < 1 < sent[2]


def test_the_plan_of_several_processes_starts_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run", "--json", "--num-processes", "4", "--dtype", "bfloat16"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["num_processes"] == 4 and plan["gib_per_process"] >= plan["gib_for_weights_and_updates"]
    assert plan["mib_sent_per_step_and_process"] < plan["mib_of_a_dense_all_reduce"] / 8
    assert sum(plan["shares_of_a_step"].values()) == pytest.approx(1.0, abs=3e-3)


def test_the_plan_counts_the_sum_over_those_who_share_a_question(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--questions-per-step", "2", "--num-generations", "8", "--dtype", "bfloat16", "--num-processes", "8"]
    assert main(["train", "--dry-run", "--json", *words]) == 0
    plan = json.loads(capsys.readouterr().out)
    count = plan["parameters"]
    kept = kept_bytes_sent(count, itemsize=2, questions=2, budget=0.05, unit_share=0.01, processes=8)
    # five units of 1%, three quarters of a dense gradient each
    assert plan["processes_per_question"] == 4
    assert plan["mib_sent_per_step_and_process"] == round((kept + 5 * count * 2 * 3 / 4) / 2**20, 3)


def test_the_plan_of_shards_divides_memory_and_counts_gathered_weights(capsys: pytest.CaptureFixture[str]) -> None:
    plans = {}
    for size in (2, 8):
        for weights in ("whole", "shards"):
            words = ["--sharding", "fsdp2", "--sampling-weights", weights, "--num-processes", str(size)]
            assert main(["train", "--dry-run", "--json", "--dtype", "bfloat16", "--max-new-tokens", "64", *words]) == 0
            plans[size, weights] = json.loads(capsys.readouterr().out)
    one, eight = plans[2, "whole"], plans[8, "whole"]
    assert one["gib_per_process"] == pytest.approx(4 * eight["gib_per_process"], abs=2e-3)
    # a forward pass, five units and the sampling's for each of four questions: 4 * (1 + 2 * 5) + 1 times the weights
    weights = one["parameters"] * 2 / 2**20
    assert one["mib_sent_per_step_and_process"] == pytest.approx(45 * weights / 2, abs=1e-3)
    assert plans[2, "shards"]["mib_sent_per_step_and_process"] == pytest.approx((44 + 2 * 64) * weights / 2, abs=1e-3)
    assert plans[2, "shards"]["gib_of_whole_weights_in_sampling"] == 0
    parts = [plans[key]["planned_gib_by_part"] for key in ((2, "whole"), (2, "shards"), (8, "shards"))]
    assert parts[0]["sampling"] > parts[1]["sampling"] > parts[2]["sampling"]
    assert parts[1]["activations"] == pytest.approx(4 * parts[2]["activations"], abs=5e-3)


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2), ("stored", 2)])
def test_the_plan_counts_the_dtype_of_the_run_not_of_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str, itemsize: int
) -> None:
    config = json.loads((tiny_reasoner.path() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}))
    words = ["train", "--dry-run", "--json", "--num-processes", "4", "--dtype", dtype, "--model", str(tmp_path)]
    assert main(words) == 0
    plan = json.loads(capsys.readouterr().out)
    dense = dense_bytes_sent(plan["parameters"], itemsize=itemsize, processes=4)
    assert plan["mib_of_a_dense_all_reduce"] == round(dense / 2**20, 3)


def shares(processes: int, **settings: Any) -> dict[str, float]:
    config = TrainConfig(sample_together="question", max_new_tokens=32, num_generations=2, **settings)
    found = time_shares(config, tiny(), 12, device="cpu", itemsize=4, processes=processes, sent=1e5 * (processes > 1))
    assert sum(found.values()) == pytest.approx(1.0) and min(found.values()) > 0
    return found


@functools.cache
def tiny() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_reasoner.path())


def test_the_plan_says_what_several_processes_do_not_divide() -> None:
    one, eight = (shares(processes, questions_per_step=64) for processes in (1, 8))
    assert list(one) == ["sampling", "passes", "selection", "update"] and list(eight) == [*one, "exchange"]
    for divided in ("sampling", "passes", "selection"):
        # every process adds up the kept gradients of all questions
        assert eight["update"] / eight[divided] == pytest.approx(8 * one["update"] / one[divided])
    dense = shares(1, questions_per_step=64, optimizer="adamw")
    assert "selection" not in dense and dense["passes"] < one["passes"], "one backward pass for all steps"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num-processes", "9"], "9 processes for 8 responses in a step (2 questions of 4): some would have none"),
        (["--num-processes", "3", "--scope", "tensor"], "--scope tensor selects before that"),
        (["--num-processes", "3", "--step-gradient", "local"], "--step-gradient local depends on all of them"),
    ],
)
def test_processes_that_cannot_be_dealt_to_are_refused(words, said, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run", "--questions-per-step", "2", "--num-generations", "4", *words]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
