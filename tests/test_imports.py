"""What core and light modules import; the direction between rooms is a contract of import-linter (`make check`)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ssrctl

PACKAGE = Path(ssrctl.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


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


def test_core_knows_torch_and_the_standard_library_alone() -> None:
    allowed = {"torch", "ssrctl", "__future__", *sys.stdlib_module_names}
    for path in MODULES:
        if part_of(path) == "core":
            optional = {"triton"} if path.name == "topk_triton.py" else set()  # imported on CUDA only
            assert {name.split(".")[0] for name in imports(path)} <= allowed | optional, path
            assert all(name.startswith("ssrctl.core.") for name in imports(path) if name.startswith("ssrctl")), path


@pytest.mark.parametrize("module", ["ssrctl.cli.app", "ssrctl.configs", "ssrctl.io.records", "ssrctl.io.artifacts"])
def test_light_modules_load_no_heavy_library(module: str) -> None:
    heavy = ["torch", "transformers", "datasets", "litellm", "math_verify", "matplotlib", "scipy", "numpy"]
    code = f"import sys, {module}; sys.stdout.write(' '.join(m for m in {heavy!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
