"""`ssrctl doctor`: versions, devices and checks, and nothing private."""

import json
import platform
from collections import namedtuple
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import torch

import ssrctl
from ssrctl.cli import main
from ssrctl.stages import doctor


@pytest.fixture
def checks(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, dict[str, Any]]]:
    """Runs the command; returns the checks by name."""

    def run(code: int = 0) -> dict[str, dict[str, Any]]:
        assert main(["doctor", "--json"]) == code
        return {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}

    return run


@pytest.mark.parametrize("name", ["doctor", "env"])
def test_versions_devices_and_checks_as_json(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-private-0123456789")
    monkeypatch.setenv("HF_TOKEN", "hf_private0123456789")
    assert main([name, "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    assert (found["ssrctl"], found["torch"]) == (ssrctl.__version__, torch.__version__)
    assert len(found["devices"]) == torch.cuda.device_count() and found["memory_gib"] > 0
    states = {check["name"]: check["state"] for check in found["checks"]}
    assert states["python"] == states["packages"] == states["cpu"] == states["hub token"] == "ok"
    assert states["hub"] == "warn", "tests are offline"
    assert all((check["remedy"] is None) == (check["state"] == "ok") for check in found["checks"])
    assert "private" not in out and platform.node() not in out and str(Path.home()) not in out


def test_the_table_says_what_is_not_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "OPTIONAL", ("no-such-package",))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert any(line.split() == ["no-such-package", "-"] for line in out.splitlines())
    assert "warn  hub " in out and "fix: unset HF_HUB_OFFLINE" in out


def test_ranges_are_those_of_the_installed_metadata() -> None:
    metadata = Message()
    metadata["Requires-Python"] = ">=4"
    for text in ("torch>=2", "transformers>=99", "absent", "no-such>=1; extra == 'math'", "other; extra == 'dev'"):
        metadata["Requires-Dist"] = text
    found = {check.name: check for check in doctor.check_requirements(metadata)}
    assert {name: check.state for name, check in found.items()} == {
        "python": "fail", "packages": "fail", "extra math": "warn",
    }  # fmt: skip
    assert "is outside of >=99; absent is not installed" in found["packages"].text
    assert found["extra math"].remedy == "pip install 'ssrctl[math]'"


def test_a_source_that_was_not_installed(checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "distribution", absent)
    assert checks()["packages"]["state"] == "warn"


def test_a_failed_check_gives_exit_code_4(checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "access", lambda place, mode: False)
    found = checks(4)
    assert found["hub cache"]["state"] == found["current folder"]["state"] == "fail"
    assert "HF_HOME" in found["hub cache"]["remedy"]


def test_shortages_are_warned_about(checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: namedtuple("Usage", "free")(2**30))
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda kind: (256, 512))
    monkeypatch.setattr("psutil.virtual_memory", lambda: namedtuple("Memory", "total available")(2**33, 2**30))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    found = checks()
    assert {name for name, check in found.items() if check["state"] == "warn"} >= {
        "memory", "current folder", "hub cache", "open files", "hub token",
    }  # fmt: skip
    assert found["open files"]["remedy"] == "ulimit -n 512"


def test_a_device_that_computes_wrongly_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._check_device(torch.device("cpu")).state == "ok"
    if not torch.cuda.is_available():
        assert "multiply matrices: AssertionError: Torch not" in doctor._check_device(torch.device("cuda")).text
    monkeypatch.setattr(torch, "ones", torch.zeros)
    assert doctor._check_device(torch.device("cpu")).state == "fail"
    assert doctor._check_device(torch.device("meta")).state == "fail", "it has no values"


@pytest.mark.parametrize(
    ("points", "allowed", "said"),
    [((), None, "does not see"), (("ssrctl",), "other", "leaves the plugin out"), (("ssrctl",), None, "it sees")],
)
def test_the_plugin_of_vllm(
    points: tuple[str, ...], allowed: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: "0.32.0")
    found = [namedtuple("Point", "name")(name) for name in points]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: found)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if allowed is not None:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    (check,) = doctor._check_vllm()
    assert said in check.text
