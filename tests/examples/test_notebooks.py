"""The notebooks under examples/notebooks: nothing stored in them, and every cell runs."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from ssrctl import cli

FOLDER = Path(__file__).parent.parent.parent / "examples" / "notebooks"


def code_cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def shell(line: str) -> None:
    program, *words = shlex.split(line)
    assert program == "ssrctl" and cli.main(words) == 0, line


def run(path: Path) -> dict[str, Any]:
    """Run the code cells in one namespace, as a kernel does; ``!command`` takes ``{name}`` from it."""
    names: dict[str, Any] = {"shell": shell}
    for cell in code_cells(path):
        source = re.sub(r"^!(.*)$", lambda found: f"shell(f{found[1]!r})", "".join(cell["source"]), flags=re.MULTILINE)
        exec(compile(source, path.name, "exec"), names)
    return names


def test_nothing_of_a_machine_is_stored() -> None:
    cells = [cell for path in FOLDER.glob("*.ipynb") for cell in code_cells(path)]
    assert cells and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


@pytest.mark.slow
def test_diagnose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    report = run(FOLDER / "diagnose.ipynb")["report"]
    assert report["headlines"][0] in " ".join(capsys.readouterr().out.split())
    assert {kind["kind"] for kind in report["kinds"]} >= {"embed", "q", "down"}
    assert (tmp_path / "tuned" / "model.safetensors").is_file() and (tmp_path / "changed.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*deprecated and will be removed:FutureWarning")
def test_kronos_in_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    names = run(FOLDER / "kronos_in_trl.ipynb")
    logged = [row for row in names["trainer"].state.log_history if "bit_changed_frac" in row]
    assert len(logged) == 2 and all(0 < row["bit_changed_frac"] <= 0.0101 for row in logged)
