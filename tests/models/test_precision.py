"""The precision in force: by device, in the log and the manifest, and the attention asked for."""

import json
from pathlib import Path

import pytest
import torch

from ssrctl.configs import ModelConfig, TrainConfig
from ssrctl.errors import UserError
from ssrctl.models import loading, precision
from ssrctl.models.loading import load_model
from ssrctl.models.precision import describe_precision, ordered_sums, precision_of, repeat_sums, settle_dtype
from ssrctl.stages import train


@pytest.mark.parametrize(
    ("device", "native", "expected"), [("cuda", True, "bfloat16"), ("cuda", False, "float32"), ("cpu", True, "float32")]
)
def test_auto_is_the_dtype_that_the_device_computes_in(monkeypatch, device, native, expected):
    monkeypatch.setattr(precision, "resolve_device", lambda name: torch.device(device))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native and not including_emulation)
    assert settle_dtype(ModelConfig()).dtype == expected
    for named in ("stored", "float32", "bfloat16", "float16"):
        assert settle_dtype(ModelConfig(dtype=named)).dtype == named


def test_attention_as_asked_for_and_refused_where_it_is_not_there():
    eager = load_model(ModelConfig(attn_implementation="eager", device="cpu")).model
    assert precision_of(eager)["attention"] == "eager"
    assert describe_precision(eager) == "precision: float32 on cpu, attention eager"
    with pytest.raises(UserError, match="cannot use --attn-implementation flash_attention_2") as refused:
        load_model(ModelConfig(attn_implementation="flash_attention_2", device="cpu"))
    assert refused.value.remedy == "use --attn-implementation auto"


def test_sums_repeat_on_cuda_only(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        repeat_sums(torch.device("cpu"))
        assert not torch.are_deterministic_algorithms_enabled()
        repeat_sums(torch.device("cuda"))
        assert torch.is_deterministic_algorithms_warn_only_enabled() and not torch.backends.cuda.cudnn_sdp_enabled()
        with ordered_sums():  # attention takes no fixed order while its like only warns
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        with pytest.raises(UserError, match="fixed order: median of CUDA is not") as refused, ordered_sums():
            raise RuntimeError("median of CUDA is not deterministic\nsecond line")
        assert refused.value.remedy == "give --no-repeatable-sums, or --device cpu"
        with pytest.raises(RuntimeError, match="out of memory"), ordered_sums():
            raise RuntimeError("out of memory")
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_cudnn_sdp(True)
    with ordered_sums():
        assert not torch.are_deterministic_algorithms_enabled()


def test_only_a_run_that_wants_no_repeatable_sums_has_none(monkeypatch):
    asked = []
    monkeypatch.setattr(loading, "repeat_sums", asked.append)
    for wanted in (False, True):
        load_model(TrainConfig(device="cpu", repeatable_sums=wanted))
        assert len(asked) == wanted


def test_a_run_states_its_precision(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    small = {"questions_per_step": 1, "num_generations": 2, "max_new_tokens": 8, "max_steps": 1}
    train.run(TrainConfig(output_dir=tmp_path / "run", device="cpu", budget_profile="flat", **small))
    assert "precision: float32 on cpu, attention sdpa" in capfd.readouterr().err
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["precision"] == {
        "dtype": "float32", "device": "cpu", "attention": "sdpa", "tf32": False, "repeatable_sums": True,
    }  # fmt: skip
