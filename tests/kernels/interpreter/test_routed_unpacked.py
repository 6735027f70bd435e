"""The Triton kernels over adapters that lie apart in memory, each reached from the first one."""

import pytest
import torch
from torch.nn import functional as F

from lora_kernels.adapters.factors import LoRAFactors
from lora_kernels.base_weights import DenseWeight
from lora_kernels.ops.routed import unpacked
from lora_kernels.runtime import dispatch
from lora_kernels.testing import assert_within_policy

K, N = 23, 37
NAMES = ["two", "__base__", "last", "one", "two", "absent"]


def aligned(*shape: int, dtype: torch.dtype, generator) -> torch.Tensor:
    """Signed random, at a multiple of 64 elements in memory of its own, as on a device."""
    size = shape[0] * shape[1]
    memory = torch.full((size + 64,), torch.nan, dtype=dtype)
    start = -memory.data_ptr() // dtype.itemsize % 64
    tensor = memory[start : start + size].view(shape)
    return tensor.copy_(torch.randn(shape, generator=generator))


def eager(x, weight, bias, adapters, dtype):
    rows = []
    for name, row in zip(NAMES, x.to(dtype), strict=True):
        y = F.linear(row, weight.to(dtype), bias.to(dtype))
        if name in adapters:
            a, b, scaling, *_ = adapters[name]
            y = y + F.linear(F.linear(row, a.to(dtype)), b.to(dtype)) * scaling
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_scattered_adapters(dtype, adapter_dtype, monkeypatch):
    monkeypatch.setattr(dispatch, "PROCESS_DEFAULT", "triton")
    generator = torch.Generator().manual_seed(0)
    adapters = {
        name: LoRAFactors(
            aligned(rank, K, dtype=adapter_dtype, generator=generator),
            aligned(N, rank, dtype=adapter_dtype, generator=generator),
            scaling,
        )
        for name, rank, scaling in [("one", 3, 0.5), ("two", 17, -1.0), ("last", 1, 2.0)]
    }
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype) for shape in [(6, 5, K), (N, K), (N,)]
    )
    _, backend = unpacked._bank(list(enumerate(adapters.values())), 3, x, N, "auto")
    assert backend == "triton"
    y = unpacked.routed_linear_unpacked(x, DenseWeight(weight), bias, adapters, NAMES)
    plain = eager(x, weight, bias, adapters, dtype)
    assert_within_policy("y", y, plain, eager(x, weight, bias, adapters, torch.float64))
    base = [row for row, name in enumerate(NAMES) if name not in adapters]
    assert torch.equal(y[base], F.linear(x, weight, bias)[base])


def test_what_the_kernels_cannot_reach_goes_to_composed(monkeypatch):
    monkeypatch.setattr(dispatch, "PROCESS_DEFAULT", "triton")
    generator = torch.Generator().manual_seed(0)
    a = aligned(3, K, dtype=torch.float32, generator=generator)
    b = aligned(N, 3, dtype=torch.float16, generator=generator)
    adapters = {"one": LoRAFactors(a, b, 0.5)}
    x, weight, bias = torch.randn(6, 5, K), torch.randn(N, K), torch.randn(N)
    _, backend = unpacked._bank([(0, adapters["one"])], 1, x, N, "auto")
    assert backend == "composed"
    y = unpacked.routed_linear_unpacked(x, DenseWeight(weight), bias, adapters, NAMES)
    plain = eager(x, weight, bias, adapters, torch.float32)
    assert_within_policy("y", y, plain, eager(x, weight, bias, adapters, torch.float64))
