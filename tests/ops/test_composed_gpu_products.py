"""``composed`` with the products of a GPU: operands in half precision, results in fp32.

torch has none of them on a CPU. Here they are made from fp32 operands, which changes the order of
the sums alone.
"""

from functools import partial

import pytest
import torch
from linear_target import SHAPES, Target, check_policy, check_subsets_of_gradients
from torch import Tensor

from lora_kernels import lora_linear
from lora_kernels.ops.linear import composed
from lora_kernels.ops.narrow import products
from lora_kernels.runtime.dtypes import accumulator_dtype
from lora_kernels.testing import LoRAProblem, oracle_results, run_forward_backward

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TARGET = Target("cpu", "composed")


def product_of_a_gpu(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    assert left.dtype == right.dtype, "a GEMM takes operands of one dtype"
    assert dtype == left.dtype or left.dtype.itemsize == 2
    wide = accumulator_dtype(left.dtype)
    return (left.to(wide) @ right.to(wide)).to(dtype)


@pytest.fixture
def gpu_products(monkeypatch):
    monkeypatch.setattr(products, "_product", product_of_a_gpu)
    for module in (products, composed):
        monkeypatch.setattr(module, "widens_first", lambda x: False)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("label", SHAPES)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_shapes(dtype, label, dropout_p, gpu_products):
    rows, *others = SHAPES[label]
    check_policy(TARGET, TARGET.problem((rows,), *others, dtype=dtype, dropout_p=dropout_p))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_fp32_adapters(dtype, dropout_p, gpu_products):
    check_policy(
        TARGET,
        TARGET.problem(
            (150,), 136, 264, 24, dtype=dtype, adapter_dtype=FP32, dropout_p=dropout_p,
            with_output_scale=True,
        ),
    )  # fmt: skip


def test_subsets_of_gradients(gpu_products):
    check_subsets_of_gradients(TARGET)


def test_fp16_does_not_underflow(gpu_products):
    """B and dy near 1e-5: against the result with B in the bits that fp16 has left there."""
    problem = LoRAProblem.random(
        (150,), 136, 264, 16, dtype=FP16, adapter_dtype=FP32, dropout_p=0.2
    )
    tiny = problem.with_(lora_b=problem.lora_b * 1e-5, dy=problem.dy * 1e-5)
    ours = run_forward_backward(partial(lora_linear, backend="composed"), tiny)
    scaled = (tiny.lora_b * tiny.scaling).half()
    exact = oracle_results(tiny.with_(lora_b=scaled.float() / tiny.scaling))
    for name in ("lora_a", "lora_b"):
        assert (ours[name].double() - exact[name]).norm() / exact[name].norm() < 2**-10


@pytest.mark.parametrize("on_device", [False, True], ids=["number", "on a device"])
@pytest.mark.parametrize("adapter_dtype", [FP16, FP32], ids=str)
@pytest.mark.parametrize("gpu", [False, True], ids=["a CPU's", "a GPU's"])
def test_a_scaled_h_beyond_fp16s_range(gpu, adapter_dtype, on_device, request, monkeypatch):
    """h is near 6000, and 50 h above the largest number; B is small, and all results fit."""
    if gpu:
        request.getfixturevalue("gpu_products")
    if on_device:
        monkeypatch.setattr(composed, "host_number", lambda scaling: scaling.float())
    problem = LoRAProblem.random((60,), 43, 29, 8, dtype=FP16, adapter_dtype=adapter_dtype)
    large = problem.with_(
        lora_a=problem.lora_a * 2000, lora_b=problem.lora_b / 2000, dy=problem.dy / 64,
        scaling=torch.tensor(50.0),
    )  # fmt: skip
    exact = oracle_results(large)
    ours = run_forward_backward(partial(lora_linear, backend="composed"), large)
    for name in ("y", "x", "lora_a", "lora_b"):
        assert (ours[name] - exact[name]).norm() / exact[name].norm() < 2**-9, name


@pytest.mark.parametrize("t", [1e-12, 1.0, 1e8], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_gradient_beyond_fp16s_range(t, side, gpu_products):
    """t lies below fp16's smallest number, or above its largest; its gradient is fp32's."""
    narrow, wide = torch.randn(70, 3) * t, torch.randn(70, 20).half()
    operands = (narrow, wide) if side == "left" else (wide, narrow)
    found = products.transposed_product(*operands, FP32, alpha=0.7)
    exact = operands[0].double().t() @ operands[1].double() * 0.7
    assert (found - exact).norm() / exact.norm() < 2**-11


@pytest.mark.parametrize("rows", [0, 5])
def test_a_gradient_of_nothing_is_zero(rows, gpu_products):
    found = products.transposed_product(torch.zeros(rows, 3), torch.ones(rows, 4).half(), FP32)
    assert torch.equal(found, torch.zeros(3, 4))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_is_not_lost(value, gpu_products):
    t, x = torch.ones(5, 2), torch.ones(5, 4).half()
    t[3, 1] = value
    assert not products.transposed_product(t, x, FP16)[1].isfinite().any()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("to", [BF16, FP16, FP32, torch.float64], ids=str)
def test_a_factor_is_rounded_once(dtype, to):
    factor = torch.randn(500).to(dtype)
    found = products.rounded(factor, to, 0.7)
    wide = torch.float64 if to == torch.float64 else torch.float32
    assert torch.equal(found, (factor.to(wide) * 0.7).to(to))
