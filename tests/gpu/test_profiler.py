"""Launches as counted on tensors that only say they are on a GPU, and as the profiler sees them."""

import json
from pathlib import Path

import pytest
import torch
from targets import on

from lora_kernels import lora_linear

ROOT = Path(__file__).resolve().parents[2]
COUNTED = ROOT / "benchmarks/results/counted/gpu.jsonl"
FEATURES, TOKENS, RANK = 4096, 8192, 16
ADAPTERS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def counted(adapters: str, dropout_p: float) -> dict:
    name = (
        f"linear lora_linear, M {TOKENS}, r {RANK}, bf16 x, {adapters} adapters, "
        f"p {dropout_p:g}, training"
    )
    rows = map(json.loads, COUNTED.read_text().splitlines())
    return next(row for row in rows if (row["case"], row["provider"]) == (name, "ours"))


@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
@pytest.mark.parametrize("adapters", ADAPTERS)
def test_what_is_compared_was_counted(adapters, dropout_p):
    row = counted(adapters, dropout_p)
    assert 0 < row["launches"] <= 16 and row["syncs"] == 0


@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
@pytest.mark.parametrize("adapters", ADAPTERS)
@on("composed")
def test_the_profiler_sees_as_many_launches(target, adapters, dropout_p, record_property):
    """As many, or more by the second kernels of split reductions, which are counted beside."""
    x = torch.randn(TOKENS, FEATURES, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(FEATURES, FEATURES, device="cuda", dtype=torch.bfloat16)
    a, b = (
        torch.randn(*shape, device="cuda", dtype=ADAPTERS[adapters], requires_grad=True)
        for shape in ((RANK, FEATURES), (FEATURES, RANK))
    )
    dy = torch.randn_like(x)

    def step():
        y = lora_linear(x, weight, a, b, 2.0, dropout_p=dropout_p, backend=target.backend)
        torch.autograd.grad(y, [x, a, b], dy)

    for _ in range(3):  # plans, tables, and what the vendor's library chooses
        step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and "Mem" not in event.name
    ]
    row = counted(adapters, dropout_p)
    record_property("kernels", kernels)
    record_property("counted", {name: row[name] for name in ("launches", "splits")})
    assert row["launches"] <= len(kernels) <= row["launches"] + row["splits"], kernels
