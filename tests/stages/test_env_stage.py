"""`ssrctl env`: versions and devices, and nothing private."""

import json
import platform
from pathlib import Path

import torch

import ssrctl
from ssrctl.cli import main


def test_versions_and_devices_as_json(capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-private-0123456789")
    assert main(["env", "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    assert (found["ssrctl"], found["torch"]) == (ssrctl.__version__, torch.__version__)
    assert len(found["devices"]) == torch.cuda.device_count() and found["memory_gib"] > 0
    assert "sk-private" not in out and platform.node() not in out and str(Path.home()) not in out


def test_the_table_says_what_is_not_installed(capsys, monkeypatch):
    from ssrctl.stages import env

    monkeypatch.setattr(env, "OPTIONAL", ("no-such-package",))
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert any(line.split() == ["no-such-package", "-"] for line in out.splitlines())
