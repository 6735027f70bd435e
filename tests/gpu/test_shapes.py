"""The sizes that models have, with dropout and without: correct, and compiled for what measures."""

import pytest
import torch
from linear_target import Target, check_policy
from targets import on
from torch import Tensor

from lora_kernels.testing import LoRAProblem

# M, K, N, R: Llama's linears and squares. In order of worth: a run cut short keeps the first ones.
SIZES = (
    (8192, 4096, 4096, 16),
    (8192, 4096, 14336, 16),
    (8192, 14336, 4096, 16),
    (8192, 4096, 4096, 64),
    (2048, 4096, 4096, 16),
    (8192, 4096, 1024, 16),
    (512, 4096, 4096, 16),
    (16384, 4096, 4096, 16),
    (8192, 8192, 8192, 16),
    (8192, 4096, 4096, 8),
    (8192, 4096, 4096, 128),
    (8192, 5120, 5120, 16),
    (2048, 8192, 28672, 16),
    (2048, 28672, 8192, 64),
    (16384, 4096, 14336, 64),
)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
@on("composed", "fused", "hybrid", "native")
def test_sizes(target, sizes, dropout_p):
    check_sizes(target, sizes, dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("sizes", SIZES[:2], ids=lambda sizes: "x".join(map(str, sizes)))
@on("cpu")
def test_small(target, sizes, dropout_p):
    """The same proportions."""
    m, k, n, rank = sizes
    check_sizes(target, (m // 64, k // 64, n // 64, rank), dropout_p)


def check_sizes(target: Target, sizes: tuple[int, int, int, int], dropout_p: float) -> None:
    """fp32 adapters over bf16, as PEFT has them. Drawn on the device, where it takes no time."""
    m, k, n, rank = sizes
    generator = torch.Generator(target.device).manual_seed(0)

    def draw(rows: int, columns: int, spread: float, dtype: torch.dtype) -> Tensor:
        values = torch.randn(rows, columns, generator=generator, device=target.device)
        return (values * spread).to(dtype)

    problem = LoRAProblem(
        x=draw(m, k, 1.0, torch.bfloat16),
        weight=draw(n, k, k**-0.5, torch.bfloat16),
        lora_a=draw(rank, k, k**-0.5, torch.float32),
        lora_b=draw(n, rank, rank**-0.5, torch.float32),
        scaling=torch.tensor(2.0, dtype=torch.float64),
        bias=None,
        output_scale=None,
        dropout_p=dropout_p,
        seed=torch.tensor(77, device=target.device) if dropout_p else None,
        dy=draw(m, n, 1.0, torch.bfloat16),
    )
    check_policy(target, problem)
