"""Run directories: checkpoints that are whole or do not count, and rewinding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ssrctl.checkpoints.delta import Delta
from ssrctl.checkpoints.run_dir import COMPLETE, RunDir, find_delta, load_checkpoint, prune_checkpoints, save_checkpoint
from ssrctl.configs import TrainConfig, build_config
from ssrctl.errors import UserError
from ssrctl.io.artifacts import ModelIdentity
from ssrctl.io.jsonl import read_jsonl, write_jsonl
from ssrctl.io.manifest import file_hash, published_settings, settings_of, versions

BASE = ModelIdentity(name="tiny", revision=None, fingerprint="xxh3:base")


def save(run: RunDir, step: int, value: float = 1.0, before: float | None = None) -> Path:
    known = None if before is None else {"w": torch.tensor([before])}
    delta = Delta(BASE, {"w": (4,)}, {"w": (torch.tensor([2]), torch.tensor([value]))}, known)
    save_checkpoint(run.checkpoint(step), delta, {"m": torch.full((2,), value)}, {"step": step}, {"lr": 0.1})
    return run.checkpoint(step)


def test_paths(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.rollouts(123) == tmp_path / "rollouts" / "000123.jsonl"
    assert run.masks(123) == tmp_path / "masks" / "000123.safetensors"
    assert run.checkpoint(200) == tmp_path / "checkpoints" / "000200"


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    folder = save(RunDir(tmp_path), 5, 3.5)
    assert {p.name for p in folder.iterdir()} == {"delta.safetensors", "optimizer.safetensors", "state.json", COMPLETE}
    found = load_checkpoint(folder)
    assert found.path == folder and found.state == {"step": 5} and found.delta.base == BASE
    assert torch.equal(found.optimizer["m"], torch.full((2,), 3.5))
    assert found.delta.change("w")[1].tolist() == [3.5]
    save(RunDir(tmp_path), 5, 4.5)
    assert load_checkpoint(folder).delta.change("w")[1].tolist() == [4.5]


@pytest.mark.parametrize("damage", [COMPLETE, "state.json", "delta.safetensors", "optimizer.safetensors"])
def test_half_a_checkpoint_is_a_user_error(tmp_path: Path, damage: str) -> None:
    folder = save(RunDir(tmp_path), 5)
    (folder / damage).unlink()
    with pytest.raises(UserError, match=str(folder)):
        load_checkpoint(folder)
    if damage != COMPLETE:
        (folder / damage).write_text("{torn")
        with pytest.raises(UserError, match=damage):
            load_checkpoint(folder)
    assert bool(RunDir(tmp_path).checkpoints()) == (damage != COMPLETE)


def test_damage_within_a_delta_is_found_on_loading(tmp_path: Path) -> None:
    folder = save(RunDir(tmp_path), 5, before=0.5)
    path = folder / "delta.safetensors"
    assert load_checkpoint(folder).delta.small
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="w: the compressed data are corrupt"):
        load_checkpoint(folder)


def test_no_checkpoint_is_complete_before_its_last_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    save(RunDir(tmp_path), 5)
    monkeypatch.setattr("ssrctl.checkpoints.run_dir.write_text", die)
    for step in (5, 6):
        with pytest.raises(KeyboardInterrupt):
            save(RunDir(tmp_path), step)
    assert RunDir(tmp_path).checkpoints() == []


def test_a_removal_that_is_cut_short_leaves_no_complete_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    run = RunDir(tmp_path)
    for step in (1, 2):
        save(run, step)
    monkeypatch.setattr("shutil.rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoints(run, 1)
    assert [p.name for p in run.checkpoints()] == ["000002"]
    with pytest.raises(KeyboardInterrupt):
        save(run, 2)
    assert run.checkpoints() == []


def test_checkpoints_are_in_order_of_steps(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for step in (1_000_000, 20, 999_999):
        save(run, step)
    (tmp_path / "checkpoints" / "notes").mkdir()
    assert [p.name for p in run.checkpoints()] == ["000020", "999999", "1000000"]
    prune_checkpoints(run, None)
    assert len(run.checkpoints()) == 3
    prune_checkpoints(run, 2)
    assert [p.name for p in run.checkpoints()] == ["999999", "1000000"]
    prune_checkpoints(run, 5)
    assert len(run.checkpoints()) == 2
    assert find_delta(tmp_path) == tmp_path / "checkpoints" / "1000000" / "delta.safetensors"


def test_where_a_delta_is_looked_for(tmp_path: Path) -> None:
    folder = save(RunDir(tmp_path), 5)
    delta = folder / "delta.safetensors"
    assert find_delta(tmp_path) == find_delta(folder) == find_delta(delta) == delta
    with pytest.raises(UserError, match="checkpoint not found"):
        find_delta(tmp_path / "absent")
    (folder / COMPLETE).unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        find_delta(tmp_path)
    with pytest.raises(UserError, match="not a complete checkpoint"):
        find_delta(folder)


def test_rewinding_drops_what_came_later(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_jsonl(run.metrics, [{"step": step, "loss": 0.5} for step in range(1, 8)])
    with run.metrics.open("a") as stream:
        stream.write('{"step": 8, "lo')
    for step in range(1, 8):
        write_jsonl(run.rollouts(step), [{"id": "x"}])
        run.masks(step).parent.mkdir(exist_ok=True)
        run.masks(step).write_bytes(b"")
    for step in (3, 5, 7):
        save(run, step)
    run.rewind(5)
    assert [row["step"] for _, row in read_jsonl(run.metrics)] == [1, 2, 3, 4, 5]
    assert sorted(int(p.stem) for p in (tmp_path / "rollouts").iterdir()) == [1, 2, 3, 4, 5]
    assert sorted(int(p.stem) for p in (tmp_path / "masks").iterdir()) == [1, 2, 3, 4, 5]
    assert [p.name for p in run.checkpoints()] == ["000003", "000005"]
    run.rewind(0)
    assert run.metrics.read_text() == "" and run.checkpoints() == []
    run.rewind(0)
    RunDir(tmp_path / "new").rewind(3)


def test_the_config_of_a_run_can_be_given_again(tmp_path: Path) -> None:
    config = build_config(TrainConfig, {"output_dir": "out/ü", "limit": 3, "learning_rate": 1e-5, "protect": "g.st"})
    run = RunDir(tmp_path)
    run.write_config(settings_of(config))
    assert run.read_config() == settings_of(config)
    assert build_config(TrainConfig, {}, run.config) == config


@pytest.mark.parametrize("content", [None, b"[1, 2]", b"a: [", b"\xff\xfe\xfa"])
def test_a_run_without_a_config(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml") as caught:
        RunDir(tmp_path).read_config()
    assert caught.value.remedy == "name a run directory of ssrctl train"


def test_manifest(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.write_manifest({"versions": versions(), "name": "ü"})
    written = json.loads(run.manifest.read_text(encoding="utf-8"))
    assert written["name"] == "ü" and {"ssrctl", "python", "torch"} <= written["versions"].keys()
    (tmp_path / "abc").write_bytes(b"abc")
    # the well-known digest of FIPS 180-2
    assert file_hash(tmp_path / "abc") == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(UserError, match="input not found"):
        file_hash(tmp_path / "absent")


def test_published_settings_hold_no_path_of_the_machine() -> None:
    config = build_config(
        TrainConfig, {"model": "/home/me/models/qwen", "dataset": "org/data", "protect": "/home/me/g.st", "limit": 3}
    )
    found = published_settings(config)
    assert "/home" not in json.dumps(found)
    assert (found["model"], found["dataset"], found["protect"], found["limit"]) == ("qwen", "org/data", "g.st", 3)
