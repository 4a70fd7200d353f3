"""`ssrctl diagnose` from files to reports."""

from __future__ import annotations

import html
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssrctl import tiny_reasoner
from ssrctl.checkpoints.delta import Delta, changed_indices, save_delta
from ssrctl.checkpoints.fingerprint import fingerprint
from ssrctl.cli import main
from ssrctl.configs import DiagnoseConfig
from ssrctl.core.mask import BlockMask
from ssrctl.errors import UserError
from ssrctl.io.artifacts import ModelIdentity
from ssrctl.io.mask_log import CONFLICTS, QuestionLog, StepMaskLog, UnitLog, save_mask_log
from ssrctl.models import precision
from ssrctl.stages import diagnose

ATTACK = "<script>alert(1)</script>"
SHAPES = {"w": (20, 25)}
MOVED = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def question(*sets: range, name: str = "q1", cosine: list[list[float]] | None = None) -> QuestionLog:
    masks = [BlockMask.from_indices(SHAPES, {"w": torch.tensor(list(one), dtype=torch.int64)}) for one in sets]
    units = [UnitLog(steps=[i], budget=0.1, advantages=[0.5], mask=mask) for i, mask in enumerate(masks)]
    return QuestionLog(id=name, units=units, gradient_cosine=cosine)


def write_run(folder: Path, logs: dict[int, list[QuestionLog]], config: str | None = "allocation: disjoint\n") -> Path:
    (folder / "masks").mkdir(parents=True)
    if config is not None:
        (folder / "config.yaml").write_text(config)
    for step, questions in logs.items():
        log = StepMaskLog(step=step, num_coordinates=500, num_protected=100, questions=questions)
        save_mask_log(folder / "masks" / f"{step:06d}.safetensors", log)
    return folder


def typical(folder: Path, config: str | None = "allocation: disjoint\n") -> Path:
    """Two logged steps: a question with two units and a cosine, one with an id that would like to be code, one empty."""
    cosine = [[1.0, -0.5], [-0.5, 1.0]]
    logs = {
        10: [question(range(10), range(10, 30), cosine=cosine), question(range(5, 25), name=ATTACK)],
        20: [question(range(40), range(40, 60), range(60, 70)), question(name="without units")],
    }
    return write_run(folder, logs, config)


def jaccard(run: Path | None, **given: object) -> dict:
    return diagnose.run(DiagnoseConfig(paths=[run] if run else [], jaccard=True, **given))  # type: ignore[arg-type]


def pair(base: object, tuned: object, output: Path, **given: object) -> dict:
    paths = [Path(str(base)), Path(str(tuned))]
    return diagnose.run(DiagnoseConfig(paths=paths, output_dir=output, **given))  # type: ignore[arg-type]


def strict_json(path: Path) -> dict:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not json")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


# the steps of a run


def test_run_report_in_all_its_forms(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = typical(tmp_path / "run")
    report = jaccard(run)
    out, err = capfd.readouterr()
    assert strict_json(run / "diagnose-steps.json") == report
    assert (report["kind"], report["run"], report["num_eligible"]) == ("step-overlap", "run", 400)
    assert str(tmp_path) not in json.dumps(report)
    summary = report["summary"]
    assert (summary["num_questions"], summary["num_single"], summary["all_disjoint"]) == (4, 2, True)
    first = report["steps"][0]["questions"][0]["pairs"][0]
    assert (first["overlap"], first["expected_overlap"], first["cosine"]) == (0, 10 * 20 / 400, -0.5)
    # {0..29} against {5..24}: 20 of 30
    assert report["steps"][0]["cross_question"][0]["jaccard"] == pytest.approx(2 / 3)
    assert report["steps"][0]["num_touched"] == 30 and report["steps"][1]["num_touched"] == 70
    assert "disjoint by construction" in report["headlines"][0]
    assert "Of 4 questions, 2 had fewer than two update units" in report["notes"][0]

    for line in report["headlines"]:
        assert line[:60] in out
    assert (
        "By training step" in out
        and "In diagnose-steps.html: " in out
        and "All questions (4 rows)" in " ".join(out.split())
    )
    assert ATTACK not in out and out.count("\n") < 75
    assert f"wrote {run}/diagnose-steps.json and {run}/diagnose-steps.html" in err

    page = (run / "diagnose-steps.html").read_text(encoding="utf-8")
    assert "<script" not in page and html.escape(ATTACK) in page
    for line in report["headlines"]:
        assert line in html.unescape(page)


@pytest.mark.usefixtures("no_matplotlib")
def test_without_matplotlib_the_numbers_are_written_and_one_line_says_what_to_install(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = typical(tmp_path / "run")
    report = jaccard(run)
    out, err = capfd.readouterr()
    assert strict_json(run / "diagnose-steps.json") == report and not (run / "diagnose-steps.html").exists()
    [line] = [line for line in err.splitlines() if "not installed" in line]
    assert "matplotlib not installed" in line and "pip install 'ssrctl[report]'" in line and "earlier" not in line
    assert "In diagnose-steps.json: " in out
    (run / "diagnose-steps.html").write_text("old")
    jaccard(run)
    assert "diagnose-steps.html is from an earlier report" in capfd.readouterr().err


@pytest.mark.usefixtures("no_matplotlib")
def test_many_pairs_stay_off_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sets = [range(20 * i, 20 * i + 10) for i in range(20)]
    jaccard(write_run(tmp_path / "run", {10: [question(*sets)]}))
    out = capfd.readouterr().out
    assert "Overlap by pair of units (i, j) (190 rows)" in out and "By training step" in out
    assert out.count("\n") < 30


@pytest.mark.usefixtures("no_matplotlib")
@pytest.mark.parametrize(
    ("config", "allocation", "said"),
    [
        ("seed: 0\n", "disjoint", "disjoint by construction"),
        ("allocation: overlap\n", "overlap", "did not forbid"),
        ("reuse-factor: 4.0\n", "disjoint", "did not forbid"),
        (None, None, "does not say how it allocated"),
    ],
)
def test_disjoint_by_construction_only_where_the_run_says_so(
    tmp_path: Path, config: str | None, allocation: str | None, said: str
) -> None:
    report = jaccard(typical(tmp_path / "run", config))
    assert report["allocation"] == allocation and said in report["headlines"][0]


@pytest.mark.usefixtures("no_matplotlib")
def test_overlapping_sets(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {10: [question(range(20), range(10, 40))]}, "allocation: overlap\n")
    report = jaccard(run)
    assert report["summary"]["all_disjoint"] is False
    # 10 shared of 40; chance: 20 * 30 / 400 = 1.5 shared of 48.5
    assert report["summary"]["pairs"]["jaccard"] == 0.25
    assert report["summary"]["pairs"]["expected_jaccard"] == pytest.approx(1.5 / 48.5)
    assert "mean Jaccard index of 0.250, 8.08 times chance" in report["headlines"][0]
    assert "construction" not in " ".join(report["headlines"])
    (run / "config.yaml").write_text("allocation: disjoint\n")
    assert "do not fit" in jaccard(run)["headlines"][0]


@pytest.mark.parametrize(
    ("parameters", "variable", "threads"),
    [(500, None, 2), (501, None, 1), (501, "2", 2)],
    ids=["large", "small", "set"],
)
def test_a_small_model_takes_one_thread(
    parameters: int, variable: str | None, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "SINGLE_THREAD_PARAMETERS", parameters)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        jaccard(write_run(tmp_path / "run", {10: [question(range(5))]}))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("questions", [[], [question()], [question(range(5))]])
def test_logs_without_pairs(tmp_path: Path, questions: list[QuestionLog]) -> None:
    run = write_run(tmp_path / "run", {10: questions})
    report = jaccard(run)
    assert "no pairs to compare" in report["headlines"][0]
    assert strict_json(run / "diagnose-steps.json") == report
    assert (run / "diagnose-steps.html").read_text().count("no pairs to compare") == 1


def test_what_steps_wanted_is_reported_beside_what_they_got(tmp_path: Path) -> None:
    logged = question(range(10), range(10, 20), cosine=[[1.0, -0.5], [-0.5, 1.0]])
    for unit, wanted in zip(logged.units, (range(10), range(5, 15)), strict=True):
        unit.unconstrained = BlockMask.from_indices(SHAPES, {"w": torch.tensor(list(wanted))})
        unit.gradient_norm, unit.captured, unit.unconstrained_captured = 2.0, 0.25, 0.5
    logged.conflict = {name: [[None, 0.75], [0.75, None]] for name in CONFLICTS}
    run = write_run(tmp_path / "run", {10: [logged], 20: [question(range(10))]})
    report = jaccard(run)
    assert strict_json(run / "diagnose-steps.json") == report
    found = report["before_masking"]
    [pair] = found["questions"][0]["pairs"]
    # {0..9} and {5..14}: 5 of 15
    assert (pair["unconstrained_overlap"], pair["unconstrained_jaccard"]) == (5, pytest.approx(1 / 3))
    assert (pair["advantage_signs"], pair["cosine"], pair["top_conflict"]) == ("equal", -0.5, 0.75)
    assert found["summary"]["units"]["claims_loss"] == 0.25 and found["summary"]["equal"]["num_pairs"] == 1
    assert [point["step"] for point in found["summary"]["over_training"]] == [10, 20]
    page = html.unescape((run / "diagnose-steps.html").read_text(encoding="utf-8"))
    for line in report["headlines"]:
        assert line in page
    assert "What would have collided without claims" in page and "Sign conflict by pair of units" in page
    assert not any("--sharding" in note for note in report["notes"])


@pytest.mark.usefixtures("no_matplotlib")
def test_newest_run_is_taken_without_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run found under runs/"):
        jaccard(None)
    for age, name in ((100, "b"), (50, "a"), (200, "c")):
        run = typical(tmp_path / "runs" / name)
        for file in run.rglob("*"):
            os.utime(file, (1e9 - age, 1e9 - age))
    (tmp_path / "runs" / "no run").mkdir()
    assert jaccard(None)["run"] == "a"
    assert f"reading {Path('runs/a')}, the newest of 3 runs" in capfd.readouterr().err
    (tmp_path / "runs" / "c" / "metrics.jsonl").touch()  # trained further, or written to, since
    assert jaccard(None)["run"] == "c"


@pytest.mark.parametrize(
    ("config", "masks", "said"),
    [
        ("log_masks_every: 0\noptimizer: kronos\n", True, "trained with --log-masks-every 0"),
        ("log_masks_every: 50\noptimizer: kronos\n", True, "smaller --log-masks-every"),
        ("optimizer: adamw\n", True, "whose updates are dense"),
        (None, False, "neither config.yaml nor masks/"),
        (": [", True, "config.yaml cannot be read"),
        ("[1]", True, "expected a mapping of settings, found list"),
    ],
)
def test_runs_without_mask_logs(tmp_path: Path, config: str | None, masks: bool, said: str) -> None:
    run = tmp_path / "run"
    (run / "masks" if masks else run).mkdir(parents=True)
    if config is not None:
        (run / "config.yaml").write_text(config)
    with pytest.raises(UserError) as caught:
        jaccard(run)
    assert said in str(caught.value) and caught.value.remedy
    assert not (run / "diagnose-steps.json").exists()


def test_damaged_logs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run directory not found"):
        jaccard(tmp_path / "nothing")
    run = write_run(tmp_path / "run", {10: [question(range(450))]})  # of 400 unprotected ones
    with pytest.raises(UserError, match="a set of 450 coordinates among 400 unprotected"):
        jaccard(run)
    log = run / "masks" / "000010.safetensors"
    log.write_bytes(log.read_bytes()[:-3])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        jaccard(run)


# two checkpoints


def tuned_folder(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The bundled model in ``dtype``, with three weights moved: one by 1e-6, two by 1/8."""
    tensors = {name: t.to(dtype) for name, t in load_file(tiny_reasoner.path() / "model.safetensors").items()}
    flat = tensors[MOVED].view(-1)
    flat[0] += 1e-6
    flat[[5, -1]] += 0.125
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned_folder(tmp_path_factory.mktemp("models") / "tuned")


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory, tuned: Path) -> Path:
    """The same change as ``tuned``, as a run's checkpoint."""
    base, after = (load_file(folder / "model.safetensors") for folder in (tiny_reasoner.path(), tuned))
    found = {name: changed_indices(base[name], after[name]) for name in base}
    made = Delta(
        ModelIdentity(name="tiny-reasoner", revision=None, fingerprint=fingerprint(base.items())),
        {name: tuple(tensor.shape) for name, tensor in base.items()},
        {name: (i, after[name].flatten()[i]) for name, i in found.items() if i.numel()},
    )
    folder = tmp_path_factory.mktemp("delta") / "run" / "checkpoints" / "000020"
    save_delta(folder / "delta.safetensors", made)
    (folder / "COMPLETE").touch()
    return folder.parents[1]


@pytest.mark.usefixtures("no_matplotlib")
def test_delta_and_materialised_model_give_the_same_numbers(tmp_path: Path, tuned: Path, delta: Path) -> None:
    whole = pair("tiny-reasoner", tuned, tmp_path / "a")
    assert (whole["total"]["num_bit_changed"], whole["total"]["num_changed"]) == (3, 2)
    assert whole["total"]["max_abs_difference"] == pytest.approx(0.125)
    assert [row["kind"] for row in whole["kinds"] if row["num_bit_changed"]] == ["up"]
    assert [row["layer"] for row in whole["layers"] if row["num_bit_changed"]] == [0]
    for path in (delta, delta / "checkpoints" / "000020", delta / "checkpoints" / "000020" / "delta.safetensors"):
        sparse = pair("tiny-reasoner", path, tmp_path / "b")
        assert sparse["tuned"] == "run/checkpoints/000020"
        for part in ("total", "kinds", "layers", "tensors", "headlines"):
            assert sparse[part] == whole[part]
    assert pair("tiny-reasoner", tuned, tmp_path / "c", atol=1.0)["total"]["sparsity"] == 1.0


def test_pair_report_in_all_its_forms(
    tmp_path: Path, tuned: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["diagnose", "tiny-reasoner", str(tuned), "--json"]) == 0
    out, err = capfd.readouterr()
    report = strict_json(tmp_path / "diagnose" / "diagnose.json")
    assert json.loads(out) == report  # nothing else on stdout
    assert "diagnose.html" in err
    assert str(tuned.parent) not in out
    written = {name: (tmp_path / "diagnose" / name).read_bytes() for name in ("diagnose.json", "diagnose.html")}
    page = written["diagnose.html"].replace(b"<wbr>", b"")
    assert MOVED.encode() in page and b"<script" not in page
    assert main(["diagnose", "tiny-reasoner", str(tuned)]) == 0
    assert written == {name: (tmp_path / "diagnose" / name).read_bytes() for name in written}
    out = capfd.readouterr().out
    assert "By kind of matrix" in out and "All tensors (24 rows)" in out
    index = json.loads((tmp_path / "diagnose" / "diagnose-tables" / "index.json").read_text(encoding="utf-8"))
    assert all((tmp_path / "diagnose" / "diagnose-tables" / f"{entry['name']}.csv").is_file() for entry in index)
    assert {"By kind of matrix", "All tensors"} <= {entry["title"] for entry in index}


@pytest.mark.usefixtures("no_matplotlib")
def test_model_against_itself_and_in_another_dtype(tmp_path: Path) -> None:
    same = pair("tiny-reasoner", tiny_reasoner.path(), tmp_path / "a")
    assert same["total"]["sparsity"] == same["total"]["bit_equal_frac"] == 1.0
    assert "identical bit for bit" in same["headlines"][0]
    narrow = pair("tiny-reasoner", tuned_folder(tmp_path / "bf16", torch.bfloat16), tmp_path / "b", measures="sparsity")
    assert narrow["notes"] == ["24 tensors are float32 in BASE and bfloat16 in TUNED; they were compared in float32."]
    assert 0.0 < narrow["total"]["bit_equal_frac"] < 0.1  # few fp32 weights are bf16 numbers


@pytest.mark.usefixtures("no_matplotlib")
def test_nan_is_counted_and_stays_out_of_the_json(tmp_path: Path, tuned: Path) -> None:
    tensors = load_file(tuned / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, tmp_path / "broken.safetensors")
    report = pair("tiny-reasoner", tmp_path / "broken.safetensors", tmp_path / "out")
    size = tensors["model.norm.weight"].numel()
    assert report["total"]["num_nan_tuned"] == size
    assert f"{size} nan in tuned" in report["notes"][0]
    [row] = [row for row in report["tensors"] if row["name"] == "model.norm.weight"]
    assert row["sparsity"] == 0.0 and row["mean_abs_difference"] is None and row["max_abs_difference"] is None
    assert strict_json(tmp_path / "out" / "diagnose.json") == report


def test_pairs_that_do_not_fit(tmp_path: Path, tuned: Path, delta: Path, capfd: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "adapter"
    other.mkdir()
    (other / "adapter_config.json").touch()
    for base, after, said in (
        (delta, tuned, "is a delta, not whole weights"),
        (tuned, delta, "delta.safetensors belongs to tiny-reasoner xxh3:"),
        ("tiny-reasoner", other, "is a LoRA adapter"),
        ("tiny-reasoner", tmp_path / "nothing", "checkpoint not found"),
    ):
        assert main(["diagnose", str(base), str(after), "-o", str(tmp_path / "out")]) == 2
        out, err = capfd.readouterr()
        assert said in err and out == "" and "Traceback" not in err
    assert main(["diagnose", str(tuned)]) == 2
    assert "is not a run directory with checkpoints" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def snapshot(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_dry_run_writes_nothing(tmp_path: Path, delta: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = typical(tmp_path / "run")
    before = snapshot(tmp_path)
    plan = jaccard(run, dry_run=True)
    assert [Path(one["path"]).name for one in plan["reads"]] == ["000010.safetensors", "000020.safetensors"]
    assert plan["writes"] == [
        str(run / "diagnose-steps.json"),
        str(run / "diagnose-steps.html"),
        str(run / "diagnose-steps-tables"),
    ]
    assert f"would write {run / 'diagnose-steps.json'}\n" in capfd.readouterr().out
    plan = pair("tiny-reasoner", delta, tmp_path / "out", dry_run=True, json=True)
    assert [Path(one["path"]).name for one in plan["reads"]] == ["model.safetensors", "delta.safetensors"]
    assert capfd.readouterr().out == ""
    assert snapshot(tmp_path) == before
