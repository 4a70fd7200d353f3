"""Shared set-up: one thread, no hub, reproducible examples."""

from __future__ import annotations

import os
from pathlib import Path

# Before any test imports transformers or datasets: these are read at import.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

settings.register_profile(
    "ssrctl",
    derandomize=True,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("ssrctl")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of public problem sets; tests that need it are skipped where it is absent."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SSRCTL_DATA") or beside)
    if not folder.is_dir():
        pytest.skip("no problem sets here: set SSRCTL_DATA to a folder that has gsm8k_test.jsonl and its like")
    return folder
