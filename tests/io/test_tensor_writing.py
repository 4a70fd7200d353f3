"""Safetensors files that are the same bytes for the same contents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ssrctl.errors import UserError
from ssrctl.io.artifacts import save_tensors

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3).T,  # not contiguous
    "a": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4, dtype=torch.int64),
}
METADATA = {f"key{number}": number for number in range(20)}


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", TENSORS, "odds", METADATA)
    back = load_file(tmp_path / "x.safetensors")
    assert back.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata().items() >= {"ssrctl_kind": "odds", "key3": "3", "format": "pt"}.items()


def test_equal_contents_give_equal_bytes_in_any_order(tmp_path: Path) -> None:
    save_tensors(tmp_path / "one", TENSORS, "odds", METADATA)
    save_tensors(tmp_path / "two", dict(reversed(TENSORS.items())), "odds", dict(reversed(METADATA.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_nothing_but_metadata_is_a_file_too(tmp_path: Path) -> None:
    save_tensors(tmp_path / "none", {}, "odds", {})
    assert load_file(tmp_path / "none") == {}


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        with Path("/dev/full").open("wb", buffering=0) as device:
            device.write(b"x")

    monkeypatch.setattr("ssrctl.io.tensor_writing.write_header", full)
    with pytest.raises(UserError, match=r"cannot write .*x\.safetensors: No space left on device"):
        save_tensors(tmp_path / "x.safetensors", TENSORS, "odds", {})
    assert list(tmp_path.iterdir()) == []
