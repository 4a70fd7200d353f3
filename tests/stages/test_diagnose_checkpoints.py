"""`ssrctl diagnose BASE TUNED...` and `ssrctl diagnose RUN` through the command line: what was planted is reported."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ssrctl.checkpoints.delta import DeltaFile
from ssrctl.checkpoints.reader import TensorReader
from ssrctl.cli import main
from ssrctl.core.mask import BlockMask
from ssrctl.io.artifacts import ModelIdentity, save_mask
from ssrctl.measures import landing, over_time, sparsity
from ssrctl.measures import overlap as run_overlap
from ssrctl.report import write
from ssrctl.stages.diagnose import checkpoints

Weights = dict[str, torch.Tensor]

LAYERS, SIDE, WIDE = 3, 48, 96
PAIRWISE = ("sparsity", "size", "rank", "spectrum", "landing")
Q, DOWN = "model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.mlp.down_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture
def base() -> Weights:
    """Three layers of two matrices and a norm; every weight at least 0.01, far from 0."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        return (values.abs() + 0.01) * torch.where(values < 0, -1.0, 1.0)

    made = {Q.format(layer): draw(SIDE, SIDE) for layer in range(LAYERS)}
    made |= {DOWN.format(layer): draw(SIDE, WIDE) for layer in range(LAYERS)}
    return made | {NORM: draw(SIDE)}


def folder(where: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    where.mkdir(parents=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, where / "model.safetensors")
    return where


def moved(tensors: Weights, name: str, places: object, by: float = 0.5) -> Weights:
    """A copy with the weights at the flat ``places`` of one tensor moved."""
    made = {key: tensor.clone() for key, tensor in tensors.items()}
    made[name].view(-1)[torch.tensor(list(places))] += by  # type: ignore[call-overload]
    return made


class Shell:
    """Runs the command line in one folder; what it prints is checked for its form every time."""

    def __init__(self, at: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.at, self.capfd, self.monkeypatch = at, capfd, monkeypatch
        self.err = ""

    def __call__(self, *words: object, code: int = 0, page: bool = False) -> dict[str, Any]:
        """The report; empty when ``code`` is an error without one. A page takes a second, and is drawn if asked for."""
        self.capfd.readouterr()
        self.monkeypatch.setattr(write, "missing_libraries", (lambda: []) if page else (lambda: ["matplotlib"]))
        argv = ["diagnose", *map(str, words), "--json"]
        found = main(argv if "-o" in argv else [*argv, "-o", str(self.at / "out")])
        out, self.err = self.capfd.readouterr()
        assert found == code, self.err
        assert "Traceback" not in self.err
        if not out.strip():
            assert code in (1, 2, 4)
            return {}

        def refuse(name: str) -> None:
            raise AssertionError(f"{name} is not json")

        return json.loads(out, parse_constant=refuse)

    def refused(self, *words: object) -> str:
        """The one line (and its remedy) of an error of the user's; nothing is written."""
        assert self(*words, code=2) == {}
        lines = self.err.splitlines()
        assert lines[0].startswith("error: ") and len(lines) <= 2, self.err
        assert len(lines) == 1 or lines[1].startswith("  fix: ")
        assert not (self.at / "out").exists()
        return self.err

    def stored(self) -> dict[str, Any]:
        return json.loads((self.at / "out" / "diagnose.json").read_text(encoding="utf-8"))


@pytest.fixture
def shell(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(tmp_path, capfd, monkeypatch)


def numel(tensors: Weights) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in rows}


# --------------------------------------------------------------------------------------------------
# one pair


def test_sparsity_by_every_rule_is_what_was_planted(tmp_path: Path, shell: Shell, base: Weights) -> None:
    base = {name: torch.full_like(tensor, 2.0**-10) for name, tensor in base.items()}
    steps = {2.0**-28: 5, 2.0**-25: 7, 2.0**-22: 11, 2.0**-18: 13, 2.0**-10: 17}  # of 2^-10: exact in float32
    name, tuned, start = Q.format(1), {key: tensor.clone() for key, tensor in base.items()}, 0
    for step, count in steps.items():
        tuned[name].view(-1)[start : start + count] += step
        start += count
    report = shell(folder(tmp_path / "base", base), folder(tmp_path / "tuned", tuned), "--measures", "sparsity,size")
    total, size = report["total"], numel(base)
    assert total["numel"] == size and total["num_bit_changed"] == 53
    # 2^-28 < 1e-8 < 2^-25 < 1e-7 < 2^-22 < 1e-6 < 2^-18 < 1e-5 < 2^-10
    for key, changed in (("1e-08", 48), ("1e-07", 41), ("1e-06", 30), ("1e-05", 17)):
        assert total[f"sparsity_{key}"] == 1 - changed / size
    # 1e-3 of 2^-10 is 2^-20: the last two are more, but 2^-18 is less than half a step of bfloat16, 2^-17, and lost.
    assert total["sparsity_bf16"] == pytest.approx(1 - 17 / size)
    assert total["bit_equal_frac"] == 1 - 53 / size
    assert {row["name"] for row in report["tensors"] if row["num_bit_changed"]} == {name}
    assert [row["num_bit_changed"] for row in report["layers"] if row["layer"] is not None] == [0, 53, 0]
    assert {row["kind"]: row["num_bit_changed"] for row in report["kinds"]} == {"q": 53, "down": 0, "norm": 0}
    assert total["max_abs_difference"] == 2.0**-10
    assert shell.stored() == report and "rank" not in report


def test_an_update_of_rank_two_is_found(tmp_path: Path, shell: Shell, base: Weights) -> None:
    generator = torch.Generator().manual_seed(1)
    base = {name: tensor.double() for name, tensor in base.items()}
    rows, columns = (
        torch.linalg.qr(torch.randn(size, 2, dtype=torch.float64, generator=generator))[0] for size in (SIDE, WIDE)
    )
    update = rows @ torch.diag(torch.tensor([3e-2, 2e-2], dtype=torch.float64)) @ columns.T
    tuned = base | {DOWN.format(2): base[DOWN.format(2)] + update}
    report = shell(folder(tmp_path / "base", base), folder(tmp_path / "tuned", tuned), "--measures", "rank")
    ranks = by_name(report["rank"]["tensors"])
    found = ranks[DOWN.format(2)]
    assert (found["rank"], found["signal_rank"], found["max_rank"]) == (2, 2, SIDE)
    assert found["spectral_norm"] == pytest.approx(3e-2, rel=1e-5)
    assert found["frobenius_norm"] == pytest.approx(1e-2 * 13**0.5, rel=1e-5)
    assert ranks[Q.format(0)]["rank"] == 0
    assert report["rank"]["total"]["rank_frac"] == 2 / SIDE  # over the matrices that changed
    assert "spectrum" not in report and "landing" not in report


def test_a_rotation_of_the_leading_directions_is_found(tmp_path: Path, shell: Shell) -> None:
    """Turning left directions 2 and 3 (k = 2) into one another by 30 degrees leaves the singular values alone."""
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64, generator=generator))[0] for _ in range(2))
    values = torch.cat([torch.tensor([10.0, 8.0, 4.0]), torch.linspace(1.0, 0.5, 37)]).double()
    turned, angle = left.clone(), torch.tensor(torch.pi / 6).double()
    turned[:, 1] = angle.cos() * left[:, 1] + angle.sin() * left[:, 2]
    turned[:, 2] = angle.cos() * left[:, 2] - angle.sin() * left[:, 1]
    name = Q.format(0)
    pair = [{name: (side * values @ right.T).float()} for side in (left, turned)]
    paths = [folder(tmp_path / label, one) for label, one in zip("ab", pair, strict=True)]
    report = shell(*paths, "--measures", "spectrum", "--num-directions", 2)
    [found] = report["spectrum"]["tensors"]
    assert found["k"] == 2
    assert found["left_largest"] == pytest.approx(30.0, abs=0.01)
    assert found["right_largest"] == pytest.approx(0.0, abs=0.05)
    assert found["shift"] < 1e-6


def test_changes_of_small_weights_are_found_to_land_there(tmp_path: Path, shell: Shell, base: Weights) -> None:
    name = Q.format(1)
    small = base[name].abs().flatten().argsort()[:200].tolist()
    paths = folder(tmp_path / "base", base), folder(tmp_path / "tuned", moved(base, name, small, 1e-3))
    report = shell(*paths, "--measures", "landing", "--mask-density", 0.25)
    found = by_name(report["landing"]["tensors"])[name]
    assert found["low_magnitude"]["overlap"] == 1.0  # the smallest 200 are among the smallest quarter of 2304
    assert found["low_magnitude"]["expected_overlap"] == pytest.approx(0.25, abs=1e-3)
    assert found["principal_not_low"]["overlap"] == 0.0
    assert set(by_name(report["landing"]["tensors"])) == {name}
    assert len(report["landing"]["unmeasured"]) == 2 * LAYERS - 1
    assert [one["name"] for one in report["landing"]["examples"]] == [name]  # the only matrix that changed


def test_the_matrix_that_is_pictured_can_be_chosen(tmp_path: Path, shell: Shell, base: Weights) -> None:
    names = [name for name, tensor in base.items() if tensor.dim() == 2 and "layers" in name]
    tuned = {name: tensor + 0.01 for name, tensor in base.items()}
    paths = folder(tmp_path / "base", base), folder(tmp_path / "tuned", tuned)
    assert "name one of" in shell.refused(*paths, "--picture", names[-1] + "x")
    assert "no effect without landing" in shell.refused(*paths, "--picture", names[-1], "--measures", "sparsity")
    report = shell(*paths, "--measures", "landing", "--picture", names[-1])
    assert [one["name"] for one in report["landing"]["examples"]] == [names[-1]]


@pytest.mark.parametrize("measure", PAIRWISE)
def test_only_the_measures_that_are_named(tmp_path: Path, shell: Shell, base: Weights, measure: str) -> None:
    paths = folder(tmp_path / "base", base), folder(tmp_path / "tuned", moved(base, Q.format(0), range(9)))
    report = shell(*paths, "--measures", measure)
    assert {key for key in ("rank", "spectrum", "landing") if report.get(key)} == {measure} - {"sparsity", "size"}
    index = json.loads((tmp_path / "out" / "diagnose-tables" / "index.json").read_text(encoding="utf-8"))
    titles = " ".join(entry["title"] for entry in index)
    word = {"sparsity": "By kind", "size": "Steps by kind", "rank": "ank", "spectrum": "Spectrum", "landing": "Landing"}
    assert index and word[measure] in titles
    assert all(word[other] not in titles for other in ("rank", "spectrum", "landing") if other != measure)


@pytest.mark.parametrize(("measure", "need"), [("overlap", "two"), ("time", "--series"), ("gradients", "run")])
def test_a_measure_that_the_paths_do_not_allow(
    tmp_path: Path, shell: Shell, base: Weights, measure: str, need: str
) -> None:
    paths = folder(tmp_path / "base", base), folder(tmp_path / "tuned", base)
    said = shell.refused(*paths, "--measures", f"size,{measure}")
    assert measure in said and need in said


@pytest.mark.parametrize(("measures", "said"), [("size,ranks", "'ranks'"), ("", "no measure"), ("size,", "''")])
def test_an_unknown_measure(shell: Shell, measures: str, said: str) -> None:
    assert said in shell.refused("tiny-reasoner", "tiny-reasoner", "--measures", measures)


def test_tensors_of_every_shape_and_dtype(tmp_path: Path, shell: Shell) -> None:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    layer = "model.layers.{}.{}.weight"
    base = {
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(1.0),
        "codes": torch.arange(12).view(3, 4),
        "bits": torch.ones(3, 4, dtype=torch.bool),
        layer.format(0, "mlp.up_proj"): torch.zeros(16, 24),
        layer.format(0, "mlp.gate_proj"): draw(1, 8),
        layer.format(0, "mlp.down_proj"): draw(8, 8).to(torch.float8_e4m3fn),
        layer.format(1, "self_attn.q_proj"): draw(8, 8).to(torch.float8_e5m2),
        layer.format(1, "mlp.up_proj"): draw(16, 24).bfloat16(),
        layer.format(1, "mlp.experts.up_proj"): draw(10, 6, 8).half(),
        "convolution": draw(4, 3, 2, 2),
    }
    still = {"empty", "bits"}
    tuned = {name: one if name in still else (one.float() * 2 + 1).to(one.dtype) for name, one in base.items()}
    huge = tuned | {layer.format(1, "mlp.up_proj"): torch.full((16, 24), 3e38).bfloat16()}
    paths = [folder(tmp_path / label, one) for label, one in (("base", base), ("tuned", tuned), ("huge", huge))]
    report = shell(*paths[:2], page=True)
    equal = {row["name"] for row in report["tensors"] if row["num_bit_changed"] == 0}
    assert equal == still
    landed = by_name(report["landing"]["tensors"])
    assert layer.format(0, "mlp.down_proj") in landed and layer.format(1, "self_attn.q_proj") in landed
    ranked = by_name(report["rank"]["tensors"])
    assert layer.format(1, "mlp.experts.up_proj") + ".9" in ranked
    shell(*paths, "--measures", ",".join([*PAIRWISE, "overlap"]))
    shell(*paths, "--series", "--measures", ",".join([*PAIRWISE, "time"]))


def test_layers_restrict_what_is_measured(tmp_path: Path, shell: Shell, base: Weights) -> None:
    paths = folder(tmp_path / "base", base), folder(tmp_path / "tuned", moved(base, Q.format(0), range(9)))
    report = shell(*paths, "--layers", "1-2")
    names = {row["name"] for row in report["tensors"]}
    assert names == {form.format(layer) for form in (Q, DOWN) for layer in (1, 2)}
    assert report["total"]["num_bit_changed"] == 0
    assert {row["name"] for row in report["rank"]["tensors"]} == names
    assert shell(*paths, "--layers", "0", "--measures", "size")["total"]["num_bit_changed"] == 9


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--device", "cuda:99", "--measures", "rank"), "device cuda:99 cannot be used"),
        (("--device", "gpu"), "device gpu cannot be used"),
        (("--device", "mps"), "--device mps: it has no float64"),
        (("--device", "cuda", "--measures", "sparsity"), "--device has no effect without rank, spectrum or landing"),
    ],
)
def test_a_device_that_cannot_be_used(
    tmp_path: Path, shell: Shell, base: Weights, words: tuple[str, ...], said: str
) -> None:
    assert said in shell.refused(folder(tmp_path / "base", base), folder(tmp_path / "tuned", base), *words)


@pytest.mark.parametrize("layers", ["7", "0,7", "2-1", "first"])
def test_layers_that_the_model_does_not_have(tmp_path: Path, shell: Shell, base: Weights, layers: str) -> None:
    paths = folder(tmp_path / "base", base), folder(tmp_path / "tuned", base)
    assert "--layers" in shell.refused(*paths, "--layers", layers)


def test_identical_checkpoints_have_no_division_by_zero(tmp_path: Path, shell: Shell, base: Weights) -> None:
    paths = folder(tmp_path / "base", base), folder(tmp_path / "tuned", base)
    report = shell(*paths, page=True)
    assert report["total"]["sparsity"] == report["total"]["bit_equal_frac"] == 1.0
    assert report["total"]["relative_l2"] == 0.0
    assert report["rank"]["total"]["num_unchanged"] == 2 * LAYERS and report["rank"]["total"]["rank_frac"] is None
    assert report["spectrum"]["total"]["num_unchanged"] == 2 * LAYERS
    assert (tmp_path / "out" / "diagnose.html").is_file()
    same = [paths[1]] * 3
    report = shell(paths[0], *same, "--measures", ",".join([*PAIRWISE, "overlap"]))
    assert report["overlap"]["total"]["num_changed"] == [0, 0, 0] and report["overlap"]["total"]["jaccard"] is None
    report = shell(paths[0], *same, "--series", "--measures", ",".join([*PAIRWISE, "time"]))
    assert report["over_time"]["total"]["ever_frac"] == [0.0, 0.0, 0.0]
    assert report["over_time"]["total"]["cancelled_of_ever"] is None
    assert "No weight changed at any checkpoint." in report["headlines"]


def test_the_exit_code_is_that_of_diff(
    tmp_path: Path, shell: Shell, base: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, same = folder(tmp_path / "one", base), folder(tmp_path / "same", base)
    other = folder(tmp_path / "other", moved(base, NORM, [0], 1e-3))
    more = folder(tmp_path / "more", base | {"value_head.weight": torch.ones(1, SIDE)})
    words = ("--measures", "sparsity", "--exit-code")
    assert shell(one, same, *words)["identical"]
    assert not shell(one, other, *words, code=1)["identical"]
    assert not shell(one, same, other, *words, code=1)["identical"]
    assert not shell(more, one, *words, code=1)["identical"]  # nothing that both have differs
    assert shell(more, one, *words, "--include", "model*")["identical"]
    assert not shell(one, other, *words[:-1])["identical"]
    shell(one, tmp_path / "nowhere", *words, code=2)

    def full(*args: object, **settings: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_report", full)
    shell(one, same, *words, code=2)
    shell(one, same, *words[:-1], code=1)


@pytest.mark.parametrize("linked", ["hard link", "hub's cache"])
def test_a_shard_that_both_share_is_read_once(
    tmp_path: Path, shell: Shell, base: Weights, monkeypatch: pytest.MonkeyPatch, linked: str
) -> None:
    def write(tensors: Weights, revision: str) -> Path:
        place = tmp_path / "models--o--m" / "snapshots" / revision
        place.mkdir(parents=True)
        shards = {name: f"model-{1 + (name == NORM)}.safetensors" for name in tensors}
        for shard in set(shards.values()):
            save_file({name: tensors[name] for name in tensors if shards[name] == shard}, place / shard)
        (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
        return place

    before, after = write(base, "before"), write(moved(base, NORM, [1, 7]), "after")
    apart = shell(before, after)
    shared, blob = "model-1.safetensors", tmp_path / "models--o--m" / "blobs" / "0123abcd"
    if linked == "hard link":
        (after / shared).unlink()
        (after / shared).hardlink_to(before / shared)
    else:
        blob.parent.mkdir()
        (before / shared).rename(blob)
        (after / shared).unlink()
        for side in (before, after):
            (side / shared).symlink_to(Path("../../blobs") / blob.name)
    read, tensor, pieces = [], TensorReader.tensor, TensorReader.pieces

    def tensor_read(self: TensorReader, name: str) -> torch.Tensor:
        read.append((self.folder.name, name))
        return tensor(self, name)

    def pieces_read(self: TensorReader, name: str, *args: Any, **settings: Any) -> Iterator[torch.Tensor]:
        read.append((self.folder.name, name))
        return pieces(self, name, *args, **settings)

    monkeypatch.setattr(TensorReader, "tensor", tensor_read)
    monkeypatch.setattr(TensorReader, "pieces", pieces_read)
    assert shell(before, after) == apart
    assert {name for side, name in read if side == "after"} == {NORM}
    assert {name for side, name in read if side == "before"} == base.keys()
    read.clear()
    assert shell(before, after, "--measures", "sparsity")["total"] == apart["total"]
    assert {name for side, name in read if side == "after"} == {NORM}


def test_weights_that_are_no_numbers_are_said_and_hurt_no_measure(tmp_path: Path, shell: Shell, base: Weights) -> None:
    tuned = moved(base, Q.format(0), range(9)) | {DOWN.format(1): base[DOWN.format(1)].clone()}
    tuned[DOWN.format(1)][3, 4] = float("nan")
    tuned[Q.format(2)][5, 6] = float("inf")
    first, second, last = (folder(tmp_path / label, one) for label, one in (("b", base), ("t", tuned), ("c", base)))
    report = shell(first, second, page=True)
    assert (report["total"]["num_nan_tuned"], report["total"]["num_inf_tuned"]) == (1, 1)
    assert any("1 nan in tuned" in note for note in report["notes"])
    broken = {DOWN.format(1), Q.format(2)}
    for part in ("rank", "spectrum"):
        assert {row["name"] for row in report[part]["unmeasured"]} >= broken
        assert Q.format(0) in by_name(report[part]["tensors"])
    for paths in ((first, second, last), (second, first, last), (first, last, second, "--series")):
        measures = [*PAIRWISE, "time" if "--series" in paths else "overlap"]
        assert shell(*paths, "--measures", ",".join(measures))["notes"]
    # The base itself: nothing may be read as a number that is none.
    report = shell(second, first)
    assert (report["total"]["num_nan_base"], report["total"]["num_inf_base"]) == (1, 1)


# --------------------------------------------------------------------------------------------------
# several, and over time


def test_overlap_of_two_checkpoints_is_what_was_planted(tmp_path: Path, shell: Shell, base: Weights) -> None:
    name, size = Q.format(0), SIDE * SIDE
    first = folder(tmp_path / "x" / "tuned", moved(base, name, range(100)))
    second = folder(tmp_path / "y" / "tuned", moved(base, name, range(70, 120)))
    third = folder(tmp_path / "z" / "tuned", moved(base, DOWN.format(0), range(40)))
    report = shell(folder(tmp_path / "base", base), first, second, page=True)
    assert report["kind"] == "several-checkpoints"
    assert report["tuned"] == report["overlap"]["runs"] == ["tuned", "tuned #2"]
    assert [row["label"] for row in report["checkpoints"]] == ["tuned", "tuned #2"]
    assert [row["total"]["num_bit_changed"] for row in report["checkpoints"]] == [100, 50]
    found = report["overlap"]["matrices"]
    assert found["one_sided"] == [[1.0, 0.3], [0.6, 1.0]]  # 30 of 100, 30 of 50
    assert found["jaccard"][0][1] == 30 / 120
    # in the one tensor that both changed
    assert found["expected_one_sided"][0][1] == pytest.approx(50 / size)
    assert found["expected_one_sided"][1][0] == pytest.approx(100 / size)
    p, q = 100 / size, 50 / size
    assert found["expected_jaccard"][0][1] == pytest.approx(p * q / (p + q - p * q))
    p, q = 100 / numel(base), 50 / numel(base)
    assert report["overlap"]["whole_model"]["expected_jaccard"][0][1] == pytest.approx(p * q / (p + q - p * q))
    report = shell(tmp_path / "base", first, second, third, "--measures", "overlap")
    assert report["tuned"] == ["tuned", "tuned #2", "tuned #3"]
    assert [row[2] for row in report["overlap"]["matrices"]["one_sided"]] == [0.0, 0.0, 1.0]
    assert [row["count"] for row in report["overlap"]["consensus"]] == [160, 30, 0]


def test_pairs_are_compared_each_with_its_own_base(tmp_path: Path, shell: Shell, base: Weights) -> None:
    name, rotated = Q.format(0), {key: tensor.flip(0) for key, tensor in base.items()}
    paths = {
        label: folder(tmp_path / label, tensors)
        for label, tensors in {
            "base": base,
            "one": moved(base, name, range(100)),
            "rotated": rotated,
            "two": moved(rotated, name, range(50, 200)),
        }.items()
    }
    # `delta apply` copies what says that the base was rotated
    for label in ("rotated", "two"):
        (paths[label] / "intervention.json").write_text('{"kind": "rotate"}')
    words = [f"{paths['base']}:{paths['one']}", f"{paths['rotated']}:{paths['two']}"]
    report = shell("--pairs", *words)
    assert (report["base"], report["tuned"]) == (["base", "rotated"], ["one", "two"])
    assert [row["total"]["num_bit_changed"] for row in report["checkpoints"]] == [100, 150]
    found = report["overlap"]["matrices"]
    assert found["jaccard"][0][1] == 50 / 200
    assert found["expected_jaccard"][0][1] and found["expected_jaccard_same_size"][0][1] is None
    assert not any("intervention" in note for note in report["notes"])
    # in ranges, without whole tensors in memory, and whole for the matrices
    for measures in ("sparsity", "rank"):
        report = shell("--pairs", *reversed(words), "--measures", measures)
        assert [row["total"]["num_bit_changed"] for row in report["checkpoints"]] == [150, 100]
    one = shell("--pairs", words[1], "--measures", "sparsity")
    assert (one["kind"], one["base"], one["total"]["num_bit_changed"]) == ("checkpoint-difference", "rotated", 150)
    plan = shell("--pairs", *words, "--dry-run")
    assert [Path(one["path"]).parent.name for one in plan["reads"]] == ["base", "rotated", "one", "two"]
    without = shell(paths["base"], paths["one"], paths["two"], "--measures", "size")
    assert [row["total"]["num_bit_changed"] > 1000 for row in without["checkpoints"]] == [False, True]
    [said] = [note for note in without["notes"] if "intervention" in note]
    assert said.startswith("two comes from a model whose weights were rotated") and "--pairs" in said


def test_pairs_that_cannot_be_compared(tmp_path: Path, shell: Shell, base: Weights) -> None:
    good = folder(tmp_path / "good", base)
    other = folder(tmp_path / "other", {"unrelated": torch.ones(4)})
    assert "not the same architecture" in shell.refused("--pairs", f"{good}:{good}", f"{other}:{other}")
    assert "twice" in shell.refused("--pairs", f"{good}:{good}", f"{good}:{good}")
    assert "exclude each other" in shell.refused("--pairs", "--series", "a:b", "c:d", "e:f")
    assert "no effect" in shell.refused("--pairs", "--jaccard", good)
    assert "no colon" in shell.refused("--pairs", good, good)


def test_labels_are_unique_whatever_folders_are_called(tmp_path: Path, shell: Shell, base: Weights) -> None:
    names = ["a/x", "a/x #2", "b/x", "b/x #2", "c/x"]
    paths = [folder(tmp_path / name, base) for name in names]
    labels = shell(folder(tmp_path / "base", base), *paths, "--measures", "size")["tuned"]
    assert len(set(labels)) == 5 and labels[:2] == ["x", "x #2"]


def test_rules_of_what_counts_as_changed(tmp_path: Path, shell: Shell, base: Weights) -> None:
    tuned = moved(moved(base, Q.format(0), range(10), 1e-6), Q.format(0), range(10, 14), 0.5)
    paths = [folder(tmp_path / "base", base), *(folder(tmp_path / label, tuned) for label in "ab")]
    for words, changed in ((("bits",), 14), (("atol",), 4), (("atol", "--atol", "1e-9"), 14), (("bf16",), 4)):
        report = shell(*paths, "--measures", "overlap", "--changed-by", *words)
        assert report["overlap"]["total"]["num_changed"] == [changed, changed]


def test_a_weight_that_changes_and_comes_back_is_cancelled(tmp_path: Path, shell: Shell, base: Weights) -> None:
    name = Q.format(2)
    series = [
        moved(base, name, range(10)),
        moved(base, name, range(4, 14)),  # 0-3 come back; 10-13 are new
        moved(moved(base, name, range(6, 14)), name, [6], 0.25),  # 4, 5 come back; 6 moves again
    ]
    paths = [folder(tmp_path / str(place), one) for place, one in enumerate([base, *series])]
    report = shell(*paths, "--series", page=True)
    total, size = report["over_time"]["total"], numel(base)
    assert report["kind"] == "run-over-time" and report["over_time"]["steps"] == [1, 2, 3]
    assert total["sparsity"] == [1 - 10 / size, 1 - 10 / size, 1 - 8 / size]
    assert total["neighbour_sparsity"] == [1 - 10 / size, 1 - 8 / size, 1 - 3 / size]
    assert total["ever_frac"] == [10 / size, 14 / size, 14 / size]
    assert (total["outside_final"], total["cancelled"]) == (6, 6)
    assert total["cancelled_of_ever"] == pytest.approx(6 / 14)
    assert total["outside_final_frac"] == [6 / size, 2 / size, 0.0]
    assert report["last"]["label"] == "3" and report["last"]["total"]["num_bit_changed"] == 8
    # By a coarse rule 6, moved by 0.5 and 0.25 more, is the only one to leave the tolerance at the end.
    coarse = shell(*paths, "--series", "--measures", "time", "--changed-by", "atol", "--atol", "0.6")
    assert coarse["over_time"]["total"]["final_frac"] == 1 / size


def test_a_series_needs_two_checkpoints(shell: Shell) -> None:
    assert "--series" in shell.refused("tiny-reasoner", "tiny-reasoner", "--series")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training steps of the bundled model, each a checkpoint, with its gradients."""
    made = tmp_path_factory.mktemp("run") / "run"
    small = "--questions-per-step 1 --num-generations 4 --max-new-tokens 32 --max-steps 2 --budget-profile flat"
    assert main(["train", *small.split(), "--save-steps", "1", "--log-gradients", "1", "-o", str(made)]) == 0
    return made


def test_a_run_is_measured_over_time(run: Path, shell: Shell) -> None:
    report = shell(run)
    assert (report["kind"], report["base"]) == ("run-over-time", "tiny-reasoner")
    assert report["over_time"]["steps"] == [1, 2]
    ever = report["over_time"]["total"]["ever_frac"]
    assert 0 < ever[0] <= ever[1] < 1
    assert report["gradients"]["num_gradients"] == 2 and report["gradients"]["steps"] == [1, 2]
    assert report["last"]["label"].endswith("000002")
    changed = DeltaFile(run / "checkpoints" / "000002" / "delta.safetensors").count
    assert report["last"]["total"]["num_bit_changed"] == changed > 0
    pair = shell("tiny-reasoner", run / "checkpoints" / "000002", "--measures", "sparsity")
    assert pair["total"] == report["last"]["total"]
    assert not (run / "diagnose-run.json").exists()


def test_a_run_without_what_is_asked_for(run: Path, tmp_path: Path, shell: Shell) -> None:
    bare = tmp_path / "bare"
    (bare / "checkpoints").mkdir(parents=True)
    (bare / "config.yaml").write_text("model: tiny-reasoner\n")
    assert "no complete checkpoint" in shell.refused(bare)
    (bare / "config.yaml").write_text("seed: 0\n")
    assert "does not name the model" in shell.refused(bare)
    for step in ("000001", "000002"):
        target = bare / "checkpoints" / step
        target.mkdir()
        for file in (run / "checkpoints" / step).iterdir():
            (target / file.name).write_bytes(file.read_bytes())
    (bare / "config.yaml").write_text("model: tiny-reasoner\n")
    assert "no gradient logs" in shell.refused(bare, "--measures", "gradients")
    assert "gradients" not in shell(bare, "--measures", "time")


# --------------------------------------------------------------------------------------------------
# protected weights


@pytest.fixture
def guarded(tmp_path: Path, base: Weights) -> tuple[Path, Path, Path, Path]:
    """(base, one that keeps to the mask, one that does not, the mask of q_proj's first 20 weights in layer 1)."""
    name = Q.format(1)
    mask = BlockMask.from_indices({name: tuple(base[name].shape)}, {name: torch.arange(20)})
    save_mask(
        tmp_path / "g.safetensors",
        mask,
        mask_kind="superweights",
        model=ModelIdentity(name="base", revision=None, fingerprint="x"),
        settings={},
    )
    return (
        folder(tmp_path / "base", base),
        folder(tmp_path / "kept", moved(base, name, range(20, 30))),
        folder(tmp_path / "broken", moved(base, name, range(15, 30))),
        tmp_path / "g.safetensors",
    )


def test_protected_weights(shell: Shell, guarded: tuple[Path, Path, Path, Path]) -> None:
    base, kept, broken, mask = guarded
    report = shell(base, kept, "--assert-frozen", mask, "--measures", "size")
    assert report["failed"] == [] and report["audit"][0]["total"]["num_protected_changed"] == 0
    report = shell(base, broken, "--protect", mask, "--measures", "size")  # says it, asserts nothing
    assert report["failed"] == [] and report["audit"][0]["total"]["num_protected_changed"] == 5
    shell(base, broken, "--assert-frozen", mask, "--measures", "size", code=4)
    assert shell.err.splitlines()[-1].startswith("check failed: 5 of 20 protected weights changed")
    stored = shell.stored()
    assert stored["failed"] and stored["audit"][0]["total"]["num_protected_changed"] == 5
    shell(base, kept, broken, "--assert-frozen", mask, code=4)
    [line] = shell.stored()["failed"]
    assert line.startswith("broken: ")


def test_tensors_that_have_to_move(shell: Shell, guarded: tuple[Path, Path, Path, Path]) -> None:
    base, kept, broken, mask = guarded
    assert shell(base, kept, "--assert-moved", "*layers.1.*q_proj*", "--measures", "size")["failed"] == []
    shell(base, kept, "--assert-moved", "*q_proj*", "--measures", "size", code=4)
    assert "2 of 3 tensors that match '*q_proj*' did not change" in shell.stored()["failed"][0]
    shell(base, kept, "--assert-moved", "nothing", "--measures", "size", code=4)
    both = ("--assert-frozen", mask, "--assert-moved", "*down*", "--measures", "size")
    shell(base, broken, *both, code=4)
    assert len(shell.stored()["failed"]) == 2
    # Of a series what counts is how it ends.
    assert shell(base, base, kept, "--series", "--assert-moved", "*layers.1.*q_proj*")["failed"] == []


def test_of_a_run_what_counts_is_how_it_ends(run: Path, shell: Shell) -> None:
    report = shell(run, "--assert-moved", "*layers.0.*", "--measures", "size")
    assert [row["label"] for row in report["audit"]] == [report["last"]["label"]] and report["failed"] == []


@pytest.mark.parametrize(
    "words",
    [
        ("--protect", "g"),
        ("--assert-frozen", "g"),
        ("--assert-moved", "*"),
        ("--series",),
        ("--exit-code",),
        ("--device", "cuda"),
    ],
)
def test_nothing_is_asserted_in_vain(run: Path, shell: Shell, words: tuple[str, ...]) -> None:
    """Where no checkpoints are compared."""
    for mode in (["--jaccard", run], ["--intervene", "rotate", "tiny-reasoner"]):
        assert words[0] in shell.refused(*mode, *words)


def test_masks_that_do_not_fit(tmp_path: Path, shell: Shell, guarded: tuple[Path, Path, Path, Path]) -> None:
    base, kept, _, mask = guarded
    assert "nothing.safetensors" in shell.refused(base, kept, "--assert-frozen", tmp_path / "nothing.safetensors")
    other = tmp_path / "other.safetensors"
    identity = ModelIdentity(name="base", revision=None, fingerprint="x")
    for shapes, said in (({"w": (4, 4)}, "none of them"), ({Q.format(1): (4, 4)}, "shape [4, 4]")):
        indices = {name: torch.arange(3) for name in shapes}
        save_mask(other, BlockMask.from_indices(shapes, indices), mask_kind="superweights", model=identity, settings={})
        assert said in shell.refused(base, kept, "--protect", other, "--measures", "size")
    other.write_bytes(other.read_bytes()[:-3])
    shell.refused(base, kept, "--protect", other)
    assert "--protect" in shell.refused(base, kept, "--protect", other, "--assert-frozen", mask)


# --------------------------------------------------------------------------------------------------
# bad input


def test_a_hub_name_without_a_network(shell: Shell, base: Weights, tmp_path: Path) -> None:
    local = folder(tmp_path / "base", base)
    for pair in (("someone/some-model", local), (local, "someone/some-model")):
        said = shell.refused(*pair)
        assert "someone/some-model is not a path here" in said
    assert "checkpoint not found" in shell.refused(local, tmp_path / "nothing" / "here")
    shell.refused(local, "../nothing")


def test_a_file_where_the_report_should_be(
    shell: Shell, base: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, taken = folder(tmp_path / "base", base), tmp_path / "taken"
    taken.write_text("mine")
    monkeypatch.setattr(sparsity.Sparsity, "tensor", None)  # before anything is measured
    assert "taken is a file" in shell.refused(local, local, "-o", taken)
    assert taken.read_text() == "mine"


def test_a_dry_run_of_several_measures_nothing(
    tmp_path: Path, shell: Shell, base: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparsity.Sparsity, "tensor", None)
    paths = [folder(tmp_path / label, base) for label in ("base", "a", "b")]
    plan = shell(*paths, "--dry-run")
    assert [one["path"] for one in plan["reads"]] == [str(path / "model.safetensors") for path in paths]
    assert str(tmp_path / "out" / "diagnose.json") in plan["writes"] and not (tmp_path / "out").exists()
    size = (paths[0] / "model.safetensors").stat().st_size
    assert [one["bytes"] for one in plan["reads"]] == [size] * 3


def bad_checkpoints(base: Weights, at: Path) -> Iterator[tuple[Path, str]]:
    adapter = folder(at / "adapter", {"base_model.model.x.lora_A.weight": torch.ones(2, 4)})
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    yield adapter, "LoRA adapter"
    yield adapter / "adapter_model.safetensors", "LoRA adapter"
    yield folder(at / "none", {"unrelated": torch.ones(2)}), "unrelated"
    shards = folder(at / "shards", base)
    (shards / "model.safetensors").rename(shards / "model-00001-of-00002.safetensors")
    index = {"weight_map": {name: f"model-0000{1 + (name == NORM)}-of-00002.safetensors" for name in base}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    yield shards, "model-00002-of-00002.safetensors"
    for keep in (0, 4, 100, -7):
        torn = folder(at / f"torn{keep}", base)
        whole = (torn / "model.safetensors").read_bytes()
        (torn / "model.safetensors").write_bytes(whole[:keep])
        yield torn, "model.safetensors"
    (at / "empty").mkdir()
    yield at / "empty", "empty"
    (at / "text.safetensors").write_text("not at all")
    yield at / "text.safetensors", "text.safetensors"


def test_tensors_that_differ_are_left_out_or_refused(tmp_path: Path, shell: Shell, base: Weights) -> None:
    good = folder(tmp_path / "good", base)
    renamed = {name.replace(Q.format(0), "other.weight"): one for name, one in base.items()}
    pairs = [folder(tmp_path / "a", base | {Q.format(0): torch.ones(3, SIDE)}), folder(tmp_path / "b", renamed)]
    for bad in pairs:
        assert Q.format(0) in shell.refused(good, bad, "--strict")
    for bad in pairs:
        assert any(Q.format(0) in note and "1 of" in note for note in shell(good, bad)["notes"])


def test_checkpoints_that_cannot_be_compared(tmp_path: Path, shell: Shell, base: Weights) -> None:
    good = folder(tmp_path / "good", base)
    for bad, said in bad_checkpoints(base, tmp_path):
        assert said in shell.refused(good, bad), bad
        assert said in shell.refused(good, good, bad), bad
        assert shell.refused(bad, good), bad


@pytest.mark.parametrize(
    ("module", "name", "words"),
    [
        (sparsity, "piece_pairs", ()),
        (landing, "measure_landing", ("--measures", "landing")),
        (run_overlap, "run_overlap", ("--measures", "overlap")),
        (over_time, "over_time", ("--series", "--measures", "time")),
    ],
)
def test_an_interrupt_leaves_the_old_report(
    tmp_path: Path,
    shell: Shell,
    base: Weights,
    monkeypatch: pytest.MonkeyPatch,
    module: object,
    name: str,
    words: tuple,
) -> None:
    changed = moved(base, Q.format(0), range(9))
    paths = [folder(tmp_path / "base", base), folder(tmp_path / "a", changed)]
    paths += [folder(tmp_path / "b", changed)] if module in (run_overlap, over_time) else []
    shell(*paths, *words)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    def interrupt(*args: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, name, interrupt)
    shell(*paths, *words, code=1)
    assert "interrupted" in shell.err
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
