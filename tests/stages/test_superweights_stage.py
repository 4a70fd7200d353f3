import json
import os
from pathlib import Path

import pytest
import torch

from ssrctl.configs import SuperweightsConfig
from ssrctl.errors import UserError
from ssrctl.io.artifacts import load_mask, load_mask_for
from ssrctl.io.package_data import profile_path
from ssrctl.io.prompt_sets import load_prompt_set
from ssrctl.models.loading import load_model
from ssrctl.stages.superweights import run


def config(tmp_path: Path, **given: object) -> SuperweightsConfig:
    return SuperweightsConfig(output=tmp_path / "out" / "g.safetensors", **given)  # type: ignore[arg-type]


def few_prompts(tmp_path: Path) -> str:
    """Four of the shipped prompts, for tests that need no good measurement."""
    lines = profile_path("prompts", "tiny-reasoner", ".jsonl").read_text().splitlines()
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(json.dumps({"text": json.loads(line)["text"]}) for line in lines[:4]))
    return str(path)


@pytest.fixture(scope="module")
def minimal(tmp_path_factory: pytest.TempPathFactory) -> tuple[SuperweightsConfig, dict]:
    made = config(tmp_path_factory.mktemp("minimal"), minimal=True)
    return made, run(made)


def test_mask_belongs_to_the_model_and_has_the_size_reported(minimal: tuple[SuperweightsConfig, dict]) -> None:
    made, report = minimal
    loaded = load_model(made)
    mask = load_mask_for(made.output, loaded.shapes(), loaded.identity.fingerprint)
    assert mask.count() == report["mask"]["count"] == [row for row in report["sizes"] if row["critical"]][-1]["count"]
    assert load_mask(made.output)[1]["mask_kind"] == "superweights"
    on_disk = json.loads((made.output.parent / "g.report.json").read_text())
    assert on_disk == json.loads(json.dumps(report))
    assert str(made.output.parent) not in json.dumps(report) + json.dumps(load_mask(made.output)[1])


def test_reported_divergence_is_that_of_the_model_with_the_mask_zeroed(
    minimal: tuple[SuperweightsConfig, dict],
) -> None:
    made, report = minimal
    loaded, broken = load_model(made), load_model(made)
    with torch.no_grad():
        for name, selected in load_mask(made.output)[0].to_dense().items():
            dict(broken.model.named_parameters())[name][selected] = 0.0
    total, count = 0.0, 0
    for prompt in load_prompt_set(profile_path("prompts", "tiny-reasoner", ".jsonl")):
        if prompt.split == "heldout":
            ids = loaded.tokenizer(prompt.text, return_tensors="pt").input_ids
            with torch.no_grad():
                p = broken.model(ids).logits[0].double().softmax(-1)
                q = loaded.model(ids).logits[0].double().softmax(-1)
            total += float((p * (p.log() - q.log())).sum())
            count += ids.numel()
    chosen = [row for row in report["sizes"] if row["critical"]][-1]
    assert chosen["superweights"]["kl_masked_reference"] == pytest.approx(total / count, rel=1e-6)


def test_minimal_walks_down_until_the_first_size_below_the_threshold(minimal: tuple[SuperweightsConfig, dict]) -> None:
    _, report = minimal
    rows = report["sizes"]
    assert rows[0]["fraction"] == pytest.approx(0.04, abs=1e-5)
    assert [row["critical"] for row in rows] == [True] * (len(rows) - 1) + [False]
    for row in rows:
        assert row["critical"] == (row["superweights"]["kl_masked_reference"] >= 1.0)
        # On this model the threshold means something: random weights of the same number do far less.
        assert row["random"]["kl_masked_reference"] < row["superweights"]["kl_masked_reference"]
    assert report["reached_threshold"] is True


def test_unions_are_compared_at_one_size_and_the_largest_divergence_wins(
    minimal: tuple[SuperweightsConfig, dict],
) -> None:
    _, report = minimal
    rows = report["unions"]
    assert len(rows) == 15 and len({row["count"] for row in rows}) == 1
    assert rows[-1]["count_before"] > rows[0]["count_before"] == int(0.05 * report["num_parameters"])
    best = max(rows, key=lambda row: row["kl_masked_reference"])
    assert report["chosen_union"] == best["subsets"]
    first = report["sizes"][0]["superweights"]
    assert first["kl_masked_reference"] == best["kl_masked_reference"]


def test_a_threshold_out_of_reach_keeps_the_first_size_and_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    report = run(config(tmp_path, minimal=True, kl_threshold=1000.0, num_subsets=1, prompts=few_prompts(tmp_path)))
    assert report["reached_threshold"] is False and len(report["sizes"]) == 1
    assert report["mask"]["fraction"] == pytest.approx(0.04, abs=1e-5)
    assert "below --kl-threshold 1000" in capfd.readouterr().err


def test_a_minimal_set_too_small_to_protect_is_pointed_out(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    report = run(config(tmp_path, minimal=True, kl_threshold=0.02, num_subsets=1, prompts=few_prompts(tmp_path)))
    assert report["mask"]["fraction"] < 0.001
    assert f"zeroing {report['mask']['count']} weights is already enough" in capfd.readouterr().err


def test_equal_runs_write_equal_masks(tmp_path: Path) -> None:
    prompts = few_prompts(tmp_path)
    first, second = (config(tmp_path / name, fraction=0.002, num_subsets=2, prompts=prompts) for name in "ab")
    assert run(first)["mask"] == run(second)["mask"]
    one, two = load_mask(first.output), load_mask(second.output)
    assert one[1] == two[1]
    for name, indices in one[0].to_indices().items():
        assert torch.equal(indices, two[0].to_indices()[name])


def test_no_spike(tmp_path: Path) -> None:
    made = config(tmp_path, method="activation")
    with pytest.raises(UserError, match=r"above 50 times .* the largest is \d.*--spike-threshold"):
        run(made)
    assert not made.output.exists()


def test_both_adds_the_spikes_to_the_gradients_mask(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    report = run(config(tmp_path, method="both", spike_threshold=1.5, fraction=0.0001))
    mask = load_mask(tmp_path / "out" / "g.safetensors")[0]
    selected = mask.to_indices()
    assert report["spikes"]
    for spike in report["spikes"]:
        assert spike["index"] in selected[spike["parameter"]].tolist()
        assert len(spike["gradient_rank_fracs"]) == 4
    assert report["sizes"][0]["count"] <= mask.count() <= report["sizes"][0]["count"] + len(report["spikes"])
    assert report["final"]["count"] == mask.count()
    assert report["published"] is None
    said = " ".join(capfd.readouterr().err.split())
    assert f"1 to 6 weights each, in layers 1 to 24; here {len(report['spikes'])} spike" in said


def test_dry_run_writes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    made = config(tmp_path, dry_run=True, num_subsets=3)
    plan = run(made)
    assert plan["unions"] == 7 and plan["backward_passes"] == 16
    assert not made.output.parent.exists()
    assert capfd.readouterr().err.startswith("model: tiny-reasoner")


def test_a_mask_cannot_be_cut_from_fewer_candidates(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"10.00% cannot be cut from candidates of 5.00%"):
        run(config(tmp_path, fraction=0.1))


def test_foreign_prompts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"100% of the tokens of prompt 1 .*--prompts FILE"):
        run(config(tmp_path, prompts="general"))


REAL = os.environ.get("SSRCTL_TEST_MODEL")


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="SSRCTL_TEST_MODEL names no pretrained model folder")
def test_spikes_of_a_pretrained_model_matter(tmp_path: Path) -> None:
    report = run(config(tmp_path, model=REAL, method="activation"))
    worst = max(report["spikes"], key=lambda spike: spike["kl_masked_reference"])
    assert worst["kl_masked_reference"] > 1.0
    assert max(worst["gradient_rank_fracs"]) < 0.01
