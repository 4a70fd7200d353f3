"""`ssrctl eval`: resumable sampling, intervals, paired comparison."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ssrctl import tiny_reasoner
from ssrctl.cli import main
from ssrctl.configs import EvalConfig, TrainConfig
from ssrctl.errors import UserError
from ssrctl.stages import eval as evaluate
from ssrctl.stages import train


def config(out: Path, **changes: object) -> EvalConfig:
    small = {"limit": 6, "num_samples": 4, "max_new_tokens": 48, "sampling_batch_size": 5, "json": True}
    return EvalConfig(**{"output_dir": out, **small, **changes})  # type: ignore[arg-type]


def test_an_interrupted_evaluation_goes_on_to_the_same_samples(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    summary = evaluate.run(config(whole))
    evaluate.run(config(parts))
    lines = (parts / "samples.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 24
    # as after a kill in the middle of the third batch: a torn line behind twelve samples
    (parts / "samples.jsonl").write_text("".join(lines[:12]) + lines[12][:30])
    assert evaluate.run(config(parts)) == summary
    assert (parts / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


def test_accuracy_is_the_mean_over_problems(tmp_path: Path) -> None:
    summary = evaluate.run(config(tmp_path / "e"))
    rows = [json.loads(line) for line in (tmp_path / "e" / "samples.jsonl").read_text().splitlines()]
    right = [row["response"].rstrip().endswith("####" + row["answer"]) for row in rows]
    assert summary["accuracy"]["value"] == pytest.approx(sum(right) / 24)
    assert summary["accuracy"]["low"] <= summary["accuracy"]["value"] <= summary["accuracy"]["high"]
    assert [row["final"]["correct"] for row in rows] == right


def test_another_evaluation_in_the_folder_is_refused(tmp_path: Path) -> None:
    evaluate.run(config(tmp_path / "e"))
    with pytest.raises(UserError, match=r"temperature was 1\.0, is 0\.5"):
        evaluate.run(config(tmp_path / "e", temperature=0.5))


def test_paired_comparison_of_a_model_with_itself_is_zero(tmp_path: Path) -> None:
    evaluate.run(config(tmp_path / "a"))
    paired = evaluate.run(config(tmp_path / "b", baseline=tmp_path / "a"))["paired"]
    difference = paired["difference"]
    assert (difference["value"], difference["p_value"]) == (0.0, 1.0)
    assert difference["low"] < 0 < difference["high"], "six problems alike do not prove that no problem differs"


def test_kl_to_the_base_is_that_of_the_samples_under_both_models(tmp_path: Path) -> None:
    tuned = shutil.copytree(tiny_reasoner.path(), tmp_path / "tuned")
    tensors = load_file(tuned / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in sorted(tensors):
        tensors[name] += 0.02 * torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    settings = {"num_samples": 2, "limit": 3, "max_new_tokens": 24, "temperature": 0.7}
    summary = evaluate.run(config(tmp_path / "e", model=str(tuned), kl_to="tiny-reasoner", **settings))
    rows = [json.loads(line) for line in (tmp_path / "e" / "samples.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (tuned, tiny_reasoner.path())]
    for row in rows:
        prompt, whole = (tokenizer(text)["input_ids"] for text in (row["prompt"], row["prompt"] + row["response"]))
        ids = torch.tensor([whole + [tokenizer.eos_token_id] * row["finished"]])
        assert ids.shape[1] - len(prompt) == row["num_tokens"]
        with torch.no_grad():
            logs = [model(ids).logits[0, len(prompt) - 1 : -1].double().div(0.7).log_softmax(-1) for model in models]
        ours, base = (one.gather(1, ids[0, len(prompt) :, None])[:, 0] for one in logs)
        assert row["kl_to_base"] == pytest.approx(float(((base - ours).exp() - (base - ours) - 1).mean()), rel=1e-4)
    by_problem = [sum(row["kl_to_base"] for row in rows[place : place + 2]) / 2 for place in (0, 2, 4)]
    assert summary["kl_to_base"]["value"] == pytest.approx(sum(by_problem) / 3)
    assert 0 <= summary["kl_to_base"]["low"] < summary["kl_to_base"]["value"] < summary["kl_to_base"]["high"]
    with pytest.raises(UserError, match="kl_to was 'tiny-reasoner'"):
        evaluate.run(config(tmp_path / "e", model=str(tuned), **settings))
    with pytest.raises(UserError, match="--kl-to would have no effect"):
        config(tmp_path / "f", responses="file.jsonl", kl_to="tiny-reasoner", limit=None, num_samples=8)


def test_runs_add_samples_and_stored_evaluations_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once = evaluate.run(config(tmp_path / "a", num_samples=2))
    first = (tmp_path / "a/samples.jsonl").read_text()
    twice = evaluate.run(config(tmp_path / "a", num_samples=2, runs=2))
    assert (tmp_path / "a/samples.jsonl").read_text().startswith(first)
    assert twice["runs"]["accuracies"][0] == once["accuracy"]["value"] and twice["num_samples"] == 24
    evaluate.run(config(tmp_path / "b", num_samples=2, seed=1, temperature=0.5, dataset_split="heldout"))
    capsys.readouterr()
    words = ["eval", "--compare", str(tmp_path / "a"), str(tmp_path / "b/samples.jsonl"), str(tmp_path / "a")]
    assert main([*words, "--json"]) == 2, "another seed of the bundled data has other problems"
    evaluate.run(config(tmp_path / "c", num_samples=2, temperature=0.5))
    capsys.readouterr()
    words = ["eval", "--compare", *(str(tmp_path / name) for name in "aca")]
    assert main([*words, "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["baseline_accuracy"] == twice["accuracy"]
    assert found["comparisons"][1]["difference"]["p_value_holm"] == 1.0
    assert "temperature 1.0 and 0.5" in shown.err
    assert main(words) == 0
    assert "adjusted for 2 comparisons (Holm)" in capsys.readouterr().out
    assert main(words[:3]) == 2 and main(["eval", str(tmp_path / "a")]) == 2
    assert "--compare needs two evaluations or more, got 1" in capsys.readouterr().err


def test_baseline_on_other_problems_is_refused(tmp_path: Path) -> None:
    evaluate.run(config(tmp_path / "a", dataset_split="train"))
    with pytest.raises(UserError, match="none in common"):
        evaluate.run(config(tmp_path / "b", baseline=tmp_path / "a"))
    with pytest.raises(UserError, match="evaluation not found"):
        evaluate.run(config(tmp_path / "c", baseline=tmp_path / "missing"))


def test_a_run_is_evaluated_by_its_newest_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    # a step far too large ruins the model, which only shows if the checkpoint is really applied
    train.run(TrainConfig(output_dir=run, max_steps=1, questions_per_step=1, num_generations=4, max_new_tokens=48,
                          learning_rate=50.0, optimizer="adamw", budget_profile="flat"))  # fmt: skip
    ruined = evaluate.run(config(tmp_path / "e", checkpoint=run))
    assert ruined["checkpoint"] == "run" and ruined["accuracy"]["value"] == 0.0
    same = evaluate.run(config(tmp_path / "f", model=str(run)))
    assert same["accuracy"] == ruined["accuracy"]
    assert evaluate.run(config(tmp_path / "g"))["accuracy"]["value"] > 0.0


def test_local_dataset_errors_name_line_and_field(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('{"question": "10+2+3+4+5=?", "answer": "24"}\n{"question": "11+2=?"}\n')
    assert main(["eval", "--dataset", str(data), "-o", str(tmp_path / "e")]) == 2
    err = capfd.readouterr().err
    assert "d.jsonl:2: no answer" in err and "--answer-column" in err
    assert not (tmp_path / "e").exists()


def test_table_goes_to_stdout_and_json_replaces_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "--limit", "2", "--num-samples", "2", "--max-new-tokens", "48", "-o", str(tmp_path / "e")]
    assert main(words) == 0
    out, _ = capfd.readouterr()
    assert "95% interval" in out
    assert main([*words, "--json"]) == 0
    out, _ = capfd.readouterr()
    assert json.loads(out)["num_samples"] == 4
