"""What made an artifact, and what must not get into it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssrctl.configs import CriticConfig, DatasetConfig, TrainConfig
from ssrctl.errors import UserError
from ssrctl.io.manifest import published_settings, settings_of
from ssrctl.io.problems import load_problems


def test_addresses_lose_query_and_fragment() -> None:
    config = CriticConfig(input="x", critic_api_base="https://host:8000/v1?version=2#part")
    assert settings_of(config)["critic_api_base"] == "https://host:8000/v1"
    assert settings_of(CriticConfig(input="x"))["critic_api_base"] is None


def test_published_settings_have_no_folders_of_the_machine(tmp_path: Path) -> None:
    config = TrainConfig(model=str(tmp_path / "model"), protect=tmp_path / "g.safetensors", output_dir=tmp_path / "run")
    published = published_settings(config)
    assert (published["model"], published["protect"], published["output_dir"]) == ("model", "g.safetensors", "run")
    assert str(tmp_path) not in str(published)


def test_a_split_of_a_jsonl_file_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('{"question": "q", "answer": "1"}\n')
    assert len(load_problems(DatasetConfig(dataset=str(data)), "train")) == 1
    with pytest.raises(UserError, match="has no splits"):
        load_problems(DatasetConfig(dataset=str(data), dataset_split="test"), "train")
