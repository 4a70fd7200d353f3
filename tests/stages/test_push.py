"""`ssrctl push`, ``--push-to-hub`` and names on the hub in place of files, against a hub on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from fake_hub import WRITER, Hub, Repo, serving
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from ssrctl import cli, tiny_reasoner
from ssrctl.configs import TINY
from ssrctl.io.hub import fetched
from ssrctl.io.manifest import file_hash
from ssrctl.io.package_data import profile_path

TOKEN_ENV = "HF_TOKEN"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with serving() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv(TOKEN_ENV, WRITER)
        yield hub


def run(*words: str) -> int:
    return cli.main(list(words))


def changed_copy(folder: Path, by: float) -> Path:
    """The bundled model with ``by`` added to some weights of a layer."""
    shutil.copytree(tiny_reasoner.path(), folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("q_proj.weight"))
    tensors[name].view(-1)[:7] += by
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def card(hub: Hub, name: str) -> tuple[dict, str]:
    text = hub.repos[name].files["README.md"].decode()
    assert WRITER not in text
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def test_a_mask_goes_to_the_hub_and_is_used_from_there(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    make = ("mask", "random", "--model", TINY, "-o", "a.safetensors", "--json")
    assert run(*make, "--push-to-hub", "me/mask", "--hub-private-repo") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["pushed"]["url"] == f"{hub.url}/me/mask" and hub.repos["me/mask"].private
    written = Path("a.safetensors").read_bytes()
    assert hub.repos["me/mask"].files["mask.safetensors"] == written
    header, body = card(hub, "me/mask")
    assert header == {"library_name": "ssrctl", "tags": ["ssrctl", "mask"]}  # the bundled model is not on the hub
    assert report["model"]["fingerprint"] in body and "density: 0.01" in body
    assert f"ssrctl train --model {TINY} --mask me/mask --dataset train.jsonl" in body

    assert run(*make) == 0 and Path("a.safetensors").read_bytes() == written, "uploading is not a setting of the mask"
    capsys.readouterr()
    assert run("mask", "compare", "me/mask", "a.safetensors", "--json") == 0
    assert json.loads(capsys.readouterr().out)["pairs"][0]["jaccard"] == 1.0
    assert run("train", "--mask", "me/other", "--dry-run") == 2
    assert "me/other is not a path here, and the hub gave no repository" in capsys.readouterr().err


def test_a_delta_goes_to_the_hub_and_is_applied_from_there(
    hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = changed_copy(Path("base"), 0.0), changed_copy(Path("tuned"), 0.5)
    hub.repos["org/base"] = Repo(files={one.name: one.read_bytes() for one in base.iterdir()})
    assert run("delta", "diff", "org/base", str(tuned), "-o", "d.safetensors") == 0
    assert run("push", "d.safetensors", "me/delta") == 0
    header, body = card(hub, "me/delta")
    address = f"org/base@{hub.repos['org/base'].sha}"
    assert header["base_model"] == "org/base" and "license" not in header
    assert f"ssrctl delta apply {address} me/delta -o tuned" in body and "the 7 of " in body

    assert run("delta", "apply", address, "me/delta", "-o", "again", "--push-to-hub", "me/model") == 0
    applied, right = load_file("again/model.safetensors"), load_file(tuned / "model.safetensors")
    assert all(torch.equal(applied[name], right[name]) for name in right)
    header, _ = card(hub, "me/model")
    assert header["library_name"] == "transformers" and header["base_model"] == "org/base"
    assert hub.repos["me/model"].files["model.safetensors"] == Path("again/model.safetensors").read_bytes()
    monkeypatch.setattr("ssrctl.report.write.missing_libraries", lambda: ["jinja2"])  # a page takes a second
    for tuned_name in ("me/delta", "me/model"):
        capsys.readouterr()
        assert run("diagnose", "org/base", tuned_name, "--measures", "sparsity", "-o", "report", "--json") == 0
        report = json.loads(capsys.readouterr().out)
        assert report["total"]["num_bit_changed"] == 7
        assert (report["base"], report["tuned"]) == ("org/base", tuned_name)
    assert run("diagnose", "me/delta", "org/base", "-o", "report") == 2
    assert "BASE me/delta is a delta" in capsys.readouterr().err


def test_a_profile_and_a_run_go_to_the_hub(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    profile = profile_path("budgets", TINY, ".json")
    assert run("push", str(profile), "me/budget", "--dry-run") == 0 and not hub.repos
    assert run("push", str(profile), "me/budget") == 0
    Path("chat.jinja").write_text("{{ messages[-1]['content'] }}")
    small = ("--questions-per-step", "1", "--num-generations", "2", "--max-new-tokens", "8")
    words = ("--max-steps", "1", *small, "--chat-template", "chat.jinja", "-o", "run", "--save-steps", "1")
    assert run("mask", "random", "--model", TINY, "-o", "a.safetensors", "--push-to-hub", "me/mask") == 0
    assert run("train", *words, "--budget-profile", "me/budget", "--protect", "me/mask", "--push-to-hub", "me/run") == 0
    repo = hub.repos["me/run"]
    assert repo.files["delta.safetensors"] == Path("run/checkpoints/000001/delta.safetensors").read_bytes()
    assert "contents" not in card(hub, "me/run")[1] and str(Path.cwd()) not in card(hub, "me/run")[1]
    inputs = json.loads(Path("run/manifest.json").read_text())["inputs"]
    assert inputs["protect"] == file_hash("a.safetensors") and inputs["budget_profile"] == file_hash(profile)
    assert run("delta", "apply", TINY, "me/run", "-o", "applied") == 0
    assert Path("applied/chat_template.jinja").read_text() == Path("chat.jinja").read_text()


def test_a_second_upload_keeps_what_others_wrote_on_the_card(hub: Hub) -> None:
    assert run("mask", "random", "--model", TINY, "-o", "a.safetensors", "--push-to-hub", "me/mask") == 0
    files = hub.repos["me/mask"].files
    files["README.md"] = files["README.md"].replace(b"---\n", b"---\nlicense: mit\n", 1)
    files["old.safetensors"] = b""
    assert run("mask", "random", "--model", TINY, "--seed", "1", "-o", "a.safetensors") == 0
    assert run("push", "a.safetensors", "me/mask") == 0
    header, body = card(hub, "me/mask")
    assert header["license"] == "mit" and "seed: 1" in body
    assert "old.safetensors" not in files and files["mask.safetensors"] == Path("a.safetensors").read_bytes()


@pytest.fixture
def mask(hub: Hub) -> str:
    assert run("mask", "random", "--model", TINY, "-o", "a.safetensors") == 0
    return "a.safetensors"


def test_no_token(hub: Hub, mask: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(TOKEN_ENV)
    assert run("push", mask, "me/mask") == 2
    assert "there is no Hugging Face token" in capsys.readouterr().err
    assert run("mask", "random", "--model", TINY, "-o", "b.safetensors", "--push-to-hub", "me/mask") == 2
    assert not Path("b.safetensors").exists(), "it is known before the work"


def test_offline(hub: Hub, mask: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run("push", mask, "me/mask") == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err and not hub.requests


def test_a_token_that_may_not_write_is_not_shown(
    hub: Hub, mask: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(TOKEN_ENV, "hf_reader0123456789")
    assert run("push", mask, "me/mask") == 2
    out, err = capfd.readouterr()
    assert "may not write here" in err and "hf_reader" not in out + err and len(err.splitlines()) == 2


def test_a_hub_that_fails_loses_nothing(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.broken = "/commit/"
    assert run("mask", "random", "--model", TINY, "-o", "b.safetensors", "--push-to-hub", "me/mask") == 3
    err = capsys.readouterr().err
    assert "b.safetensors is written, but not uploaded" in err and "`ssrctl push b.safetensors me/mask`" in err
    assert WRITER not in err and Path("b.safetensors").is_file()


def test_no_network(hub: Hub, mask: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert run("push", mask, "me/mask") == 2
    assert "cannot push to me/mask" in capsys.readouterr().err
    assert run("mask", "info", "me/mask") == 2
    assert "me/mask is not a path here" in capsys.readouterr().err


def test_a_repository_with_other_contents_is_left_alone(
    hub: Hub, mask: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repos["me/model"] = Repo(files={"config.json": b"{}", "README.md": b"---\ntags: [ssrctl, delta]\n---\n"})
    before = dict(hub.repos["me/model"].files)
    assert run("push", mask, "me/model") == 2
    assert "holds something else: config.json, README.md" in capsys.readouterr().err
    assert hub.repos["me/model"].files == before
    assert run("mask", "info", "me/model") == 2
    assert "holds no mask.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("push", "nothing", "me/x"), "nothing not found"),
        (("push", "base", "me/x"), "not a model folder that `ssrctl delta apply` wrote"),
        (("push", "base/model.safetensors", "me/x"), "neither a delta nor a mask"),
        (("push", "base/config.json", "me/x"), "is not a budget profile"),
        (("push", "a.safetensors", "x"), "give OWNER/NAME"),
        (("train", "--find-lr", "--push-to-hub", "me/x"), "leave one of them out"),
        (("train", "--hub-private-repo"), "--push-to-hub OWNER/NAME"),
    ],
)
def test_bad_input(mask: str, hub: Hub, words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    changed_copy(Path("base"), 0.0)
    capsys.readouterr()
    assert run(*words) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) <= 2 and not hub.requests


def test_what_is_not_a_name_on_the_hub() -> None:
    for name in ("masks/a.safetensors", "a/b/c", "/a/b", "runs", "auto", "data/x.jsonl"):
        assert fetched(name, ["*"]) == Path(name)
