"""Gradient logs: what is written is read back, and what is damaged is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ssrctl.errors import UserError
from ssrctl.io.artifacts import save_tensors
from ssrctl.io.gradient_log import (
    KIND,
    GradientHeader,
    gradient_log_path,
    gradient_log_paths,
    load_gradient_log,
    read_gradient_header,
    save_gradient_log,
)

HEADER = GradientHeader(step=7, sketch="count-sketch", size=4, seed=2**62, num_coordinates=100)
METADATA = {"step": 7, "sketch": "count-sketch", "size": 4, "seed": 1, "num_coordinates": 100}


def test_logs_survive_the_file_and_come_in_order(tmp_path: Path) -> None:
    values = torch.tensor([1.5, -2.0, 0.0, 2.0**-30], dtype=torch.float64)
    for step in (1_000_000, 999_999, 7):
        save_gradient_log(gradient_log_path(tmp_path, step), HEADER, values)
    (tmp_path / "gradients" / "notes.safetensors").touch()
    paths = gradient_log_paths(tmp_path)
    assert [path.name for path in paths] == ["000007.safetensors", "999999.safetensors", "1000000.safetensors"]
    header, found = load_gradient_log(paths[0])
    assert header == read_gradient_header(paths[0]) == HEADER
    assert found.dtype == torch.float32 and torch.equal(found.double(), values)
    assert gradient_log_paths(tmp_path / "none") == []


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.tensor([0.0, float("nan"), 0.0, 0.0])])
def test_what_does_not_fit_is_not_written(tmp_path: Path, bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"a sketch of 4 numbers|NaN or infinity"):
        save_gradient_log(tmp_path / "g.safetensors", HEADER, bad)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tensors", "changes", "said"),
    [
        ({"gradient": torch.zeros(5)}, {}, "expected 4 float32 numbers"),
        ({"gradient": torch.zeros(4).double()}, {}, "expected 4 float32 numbers"),
        ({"other": torch.zeros(4)}, {}, "expected 4 float32 numbers"),
        ({"gradient": torch.tensor([0.0, 1.0, float("inf"), 0.0])}, {}, "1 of 4 numbers are NaN or infinite"),
        ({"gradient": torch.zeros(4)}, {"step": "x"}, "'step' is absent or not json"),
        ({"gradient": torch.zeros(4)}, {"size": 4.0}, "'size' must be a valid integer, found 4.0"),
        ({"gradient": torch.zeros(4)}, {"seed": True}, "'seed' must be a valid integer, found True"),
        (
            {"gradient": torch.zeros(4)},
            {"num_coordinates": -1},
            "'num_coordinates' must be greater than or equal to 0, found -1",
        ),
        ({"gradient": torch.zeros(4)}, {"sketch": "hash"}, "'sketch' must be 'exact' or 'count-sketch', found 'hash'"),
    ],
)
def test_damaged_logs_are_user_errors(tmp_path: Path, tensors: dict, changes: dict, said: str) -> None:
    path = tmp_path / "000007.safetensors"
    save_tensors(path, tensors, KIND, METADATA | changes)
    with pytest.raises(UserError, match=said) as caught:
        load_gradient_log(path)
    assert str(path) in str(caught.value)


def test_foreign_and_torn_files_are_user_errors(tmp_path: Path) -> None:
    path = tmp_path / "000007.safetensors"
    save_file({"gradient": torch.zeros(4)}, path)
    with pytest.raises(UserError, match="is not a gradient-sketch file"):
        load_gradient_log(path)
    save_gradient_log(path, HEADER, torch.zeros(4))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        read_gradient_header(path)
