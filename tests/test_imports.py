"""The direction of imports: cli -> stages -> {critics, models, analysis, text, io} -> core."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ssrctl

PACKAGE = Path(ssrctl.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
HELPERS = {"critics", "models", "analysis", "text", "io"}
BASE = {"errors", "configs"}  # light modules at the top that everything above core shares
ALLOWED = {
    "cli": {"cli", "stages", *HELPERS, "core", *BASE},
    "stages": {"stages", *HELPERS, "core", *BASE},  # each its own, see below
    **{name: {*HELPERS, "core", *BASE} for name in HELPERS},
    "core": {"core"},
    "configs": {"configs", "io", "core", "errors"},
    "errors": set(),
}


def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, at any depth, with what is imported from packages of ours."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            found.add(node.module)
            if node.module == "ssrctl":
                found |= {f"ssrctl.{alias.name}" for alias in node.names}
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def ours(path: Path) -> set[str]:
    """The parts of the package that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("ssrctl.")} - {"__version__"}


def test_there_is_something_to_check() -> None:
    assert {part_of(path) for path in MODULES} >= {"cli", "stages", "core", *HELPERS}


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_parts_import_downwards_only(part: str) -> None:
    wrong = {
        str(path.relative_to(PACKAGE)): sorted(ours(path) - ALLOWED[part])
        for path in MODULES
        if part_of(path) == part and ours(path) - ALLOWED[part]
    }
    assert not wrong


def test_stages_never_import_each_other() -> None:
    for path in MODULES:
        if part_of(path) == "stages":
            own = path.relative_to(PACKAGE / "stages").parts[0].removesuffix(".py")
            others = {name.split(".")[2] for name in imports(path) if name.startswith("ssrctl.stages.")} - {own}
            assert not others, path


def test_core_knows_torch_and_the_standard_library_alone() -> None:
    allowed = {"torch", "ssrctl", "__future__", *sys.stdlib_module_names}
    for path in MODULES:
        if part_of(path) == "core":
            optional = {"triton"} if path.name == "topk_triton.py" else set()  # imported on CUDA only
            assert {name.split(".")[0] for name in imports(path)} <= allowed | optional, path
            assert all(name.startswith("ssrctl.core.") for name in imports(path) if name.startswith("ssrctl")), path


def test_every_module_belongs_to_a_known_part() -> None:
    assert {part_of(path) for path in MODULES} <= {*ALLOWED, "__init__", "__main__", "profiles"}


@pytest.mark.parametrize("module", ["ssrctl.cli.app", "ssrctl.configs", "ssrctl.io.records", "ssrctl.io.artifacts"])
def test_light_modules_load_no_heavy_library(module: str) -> None:
    heavy = ["torch", "transformers", "datasets", "litellm", "math_verify", "matplotlib", "scipy", "numpy"]
    code = f"import sys, {module}; sys.stdout.write(' '.join(m for m in {heavy!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
