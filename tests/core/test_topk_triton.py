"""The Triton kernels, compared with plain torch: interpreted on the CPU, compiled without a GPU, run on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssrctl.core import topk
from ssrctl.core.bits import bits_from_indices
from ssrctl.core.topk import make_reader, select_topk
from ssrctl.core.topk_plain import PlainReader

triton = pytest.importorskip("triton", reason="needs Triton: pip install triton")

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_interpreted_kernels_do_what_plain_torch_does():
    """Triton decides at import whether it interprets, hence another process."""
    command = [sys.executable, "-m", "pytest", "-q", str(Path(__file__).with_name("interpreted_triton.py"))]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


TABLES = {"tables": "*i64", "num_tensors": "i32", "tensor_of": "*i64"}
BLOCKS = {"blocks": "*i64", "first": "i32"}
SIGNATURES = {
    "_count_kernel": TABLES | BLOCKS | {"bound": "i32", "counts": "*i32"},
    "_write_kernel": TABLES
    | BLOCKS
    | {"last": "i32", "bound": "i32", "counts": "*i32", "ends": "*i64", "positions": "*i64", "keys": "*i32"},
    "_histogram_kernel": TABLES | {"kinds": "*i64", "size": "i64", "stride": "i32", "counts": "*i64"},
}


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("kernel", SIGNATURES)
def test_kernels_compile_for_a_gpu_that_is_not_there(monkeypatch, tmp_path, kernel, kind):
    """What the interpreter accepts, the compiler may not; and full blocks are to be read 16 bytes at a time."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ssrctl.core import topk_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # there is no arithmetic to fuse; unset, Triton warns
    function = getattr(topk_triton, kernel)
    constants = {"KIND": kind, "ALIGNED": True, "BLOCK": topk_triton.BLOCK}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(function, SIGNATURES[kernel] | dict.fromkeys(constants, "constexpr"), constexprs=places)
    code = triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]
    assert "ALIGNED" not in constants or "ld.global.v4" in code


@pytest.mark.parametrize("dtypes", [*[(dtype,) for dtype in DTYPES], DTYPES], ids=str)
@pytest.mark.parametrize("path", ["counted", "sampled", "misled", "in prefixes"])
class TestOnAGpu:
    pytestmark = on_gpu

    def test_the_kernels_select_what_the_cpu_does(self, monkeypatch, dtypes, path):
        from ssrctl.core import topk_triton

        generator = torch.Generator().manual_seed(1)
        gradients = {
            f"p{i}": torch.randn(n, generator=generator).to(dtypes[i % len(dtypes)])
            for i, n in enumerate([1_000_003, 5, 4096, 70_001])
        }
        taken = {n: bits_from_indices(torch.arange(0, g.numel(), 5), g.numel()) for n, g in gradients.items()}
        if path in ("sampled", "misled"):
            monkeypatch.setattr(topk, "SAMPLED_FROM", 1)
            monkeypatch.setattr(topk, "MARGIN", 5.0 if path == "sampled" else -5.0)
        if path == "in prefixes":
            monkeypatch.setattr(topk_triton, "MANY", 10_000)
        on_device = {n: g.cuda() for n, g in gradients.items()}
        bits = {n: b.cuda() for n, b in taken.items()}
        assert isinstance(make_reader(on_device, bits), topk_triton.TritonReader)
        for k in (1, 3000, 400_000, 10**9):
            expected = select_topk(gradients, k, taken)
            found = select_topk(on_device, k, bits)
            assert all(torch.equal(found[name].cpu(), expected[name]) for name in expected)

    def test_plain_torch_on_the_device_does_too(self, monkeypatch, dtypes, path):
        if path != "counted":
            pytest.skip("one path is enough")
        monkeypatch.setattr(topk, "make_reader", PlainReader)
        generator = torch.Generator().manual_seed(2)
        gradients = {
            f"p{i}": torch.randn(40, 90, generator=generator).to(dtypes[i % len(dtypes)]).t() for i in range(3)
        }
        taken = {"p1": bits_from_indices(torch.arange(0, 3600, 7), 3600)}
        expected = select_topk(gradients, 50, taken)
        found = select_topk({n: g.cuda() for n, g in gradients.items()}, 50, {n: b.cuda() for n, b in taken.items()})
        assert all(torch.equal(found[name].cpu(), expected[name]) for name in expected)
