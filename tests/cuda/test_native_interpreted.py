"""Backend native on a GPU, all of it: emulated CUDA kernels among interpreted Triton kernels.

    TRITON_INTERPRET=1 pytest tests/cuda/test_native_interpreted.py

In a process of its own, as tests/kernels/interpreter; fp16, the one half precision it multiplies
rightly. The public calls run on CPU tensors, forward and backward, as they would on a GPU.
"""

import os

import pytest
import torch
from routed_results import check_routed

from lora_kernels import lora_linear
from lora_kernels.ops.linear import op as autograd
from lora_kernels.ops.linear import plan
from lora_kernels.ops.routed import op as routed_op
from lora_kernels.runtime import cpu_extension as native
from lora_kernels.runtime import cuda_extension as native_cuda
from lora_kernels.testing import LoRAProblem, check_linear
from lora_kernels.testing.routed_inputs import RoutedProblem, some_ids

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)

FP16, FP32 = torch.float16, torch.float32


@pytest.fixture(autouse=True)
def calls(emulated, monkeypatch, plans_forgotten):
    """native as on a GPU, and how often each CUDA kernel was called."""
    from lora_kernels.ops.linear import cuda
    from lora_kernels.ops.routed import cuda as routed_cuda

    counts = {}

    def counted(name):
        call = getattr(native_cuda, name)

        def count(*args, **options):
            counts[name] = counts.get(name, 0) + 1
            return call(*args, **options)

        return count

    for name in ("decode_linear", "decode_routed_", "gemm_tail"):
        monkeypatch.setattr(native_cuda, name, counted(name))
    for module in (plan, autograd):
        monkeypatch.setattr(module, "module_of", lambda *args: cuda)
    monkeypatch.setattr(routed_op, "module_of", lambda backend, like: routed_cuda)
    monkeypatch.setattr(native, "missing", lambda: None)
    return counts


def ours(**inputs):
    return lora_linear(**inputs, backend="native")


def check(problem: LoRAProblem) -> None:
    check_linear(ours, problem)


@pytest.mark.parametrize("adapter_dtype", [None, FP32], ids=["same", "fp32_adapters"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("shape", "kernels"),  # leading, K, N, R; CUDA kernels without dropout, and with
    [
        (((140,), 136, 264, 24), ({"gemm_tail": 2}, {"gemm_tail": 2})),
        (((2, 6), 72, 264, 16), ({"decode_linear": 1, "gemm_tail": 1}, {"gemm_tail": 2})),
        (((12,), 101, 67, 3), ({"decode_linear": 1}, {})),  # no rows of whole 16 bytes
        (((70,), 101, 72, 5), ({}, {})),
        (((0,), 40, 56, 4), ({}, {})),
    ],
    ids=str,
)
def test_lora_linear(shape, kernels, dropout_p, adapter_dtype, calls, poisoned_memory):
    leading, *sizes = shape
    check(
        LoRAProblem.random(
            leading, *sizes, dtype=FP16, adapter_dtype=adapter_dtype, dropout_p=dropout_p
        )
    )
    assert calls == kernels[dropout_p > 0]


@pytest.mark.parametrize("scale_dtype", [FP16, FP32], ids=str)
def test_output_scale(scale_dtype, calls, poisoned_memory):
    """Its own dtype and a gradient of it: the unscaled result is wanted too, so y is Triton's."""
    problem = LoRAProblem.random((70,), 72, 104, 8, dtype=FP16, with_output_scale=True)
    check(problem.with_(output_scale=problem.output_scale.to(scale_dtype)))
    assert calls == {"gemm_tail": 1}  # dx
    p = problem
    y = ours(x=p.x, weight=p.weight, lora_a=p.lora_a, lora_b=p.lora_b, scaling=p.scaling,
             output_scale=p.output_scale.to(scale_dtype))  # fmt: skip
    assert torch.isfinite(y).all()
    assert calls["gemm_tail"] == 1 + (scale_dtype == FP16)


def test_strides(calls, poisoned_memory):
    problem = LoRAProblem.random((70,), 136, 72, 16, dtype=FP16, dropout_p=0.2)
    p = problem
    for changes in (
        {"x": p.x.t().contiguous().t()},
        {"x": p.x[:1].expand(70, 136)},
        {"dy": p.dy.t().contiguous().t()},
        {"dy": p.dy[:1].expand(70, 72)},
        {"weight": p.weight.t().contiguous().t()},
        {"lora_a": p.lora_a.t().contiguous().t()},
    ):
        check(problem.with_(**changes))


@pytest.mark.parametrize("mode", ["base", "alone", "into out"])
@pytest.mark.parametrize("adapter_dtype", [None, FP32], ids=["same", "fp32_adapters"])
def test_routed_lora(adapter_dtype, mode, calls, poisoned_memory):
    """A decode forward's h feeds Triton's backward."""
    problem = RoutedProblem.random(
        some_ids(30, 4), [(1, 8), (3, 0), (24, 5), (16, 16)], 72, (40, 24), dtype=FP16,
        adapter_dtype=adapter_dtype, with_weight=mode == "base", with_out=mode == "into out",
    )  # fmt: skip
    check_routed(problem, "native")
    assert calls == {"decode_routed_": 1}


def test_routed_lora_beyond_the_kernel(calls, poisoned_memory):
    for options in ({"weighted": True}, {"dropout": 0.3}):
        ids = some_ids(30, 3, 2 if "weighted" in options else 1)
        problem = RoutedProblem.random(ids, (3, 16, 8), 72, 40, dtype=FP16, **options)
        check_routed(problem, "native")
    assert calls == {}
