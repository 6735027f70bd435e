"""What a check of ``lora_linear`` runs against, and how its results are held against fp64."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_kernels import lora_linear
from lora_kernels.testing import (
    LoRAProblem,
    assert_draws_within_policy,
    oracle_results,
    run_forward_backward,
)
from lora_kernels.testing.inputs import DIFFERENTIABLE
from lora_kernels.testing.policy import Draw

# M, K, N, R
SHAPES = {
    "aligned": (200, 136, 264, 16),
    "odd": (57, 101, 67, 3),
    "rank 64": (300, 512, 512, 64),
    "rank 100": (140, 320, 384, 100),
    "decode": (1, 4096, 1024, 16),
    "rank 160": (257, 264, 520, 160),
    "tiny": (7, 9, 5, 1),
}


@dataclass(frozen=True)
class Target:
    """A backend on a device; the strategy is Triton's."""

    device: str
    backend: str
    strategy: str = "fused"

    def call(self, **inputs) -> Tensor:
        return lora_linear(**inputs, backend=self.backend)

    def problem(self, *args, **options) -> LoRAProblem:
        return LoRAProblem.random(*args, device=self.device, **options)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` and its kin give NaN. On CUDA needs CUBLAS_WORKSPACE_CONFIG (see torch)."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before)


def check_policy(
    target: Target,
    problem: LoRAProblem,
    needs: tuple[str, ...] = DIFFERENTIABLE,
    autocast: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Our result and gradients in poisoned memory, after holding each against fp64."""
    definition = functools.partial(lora_linear, backend="reference")

    def draw(number: int) -> Draw:
        drawn = problem.redrawn(number)
        with poisoned_memory():
            ours = run_forward_backward(target.call, drawn, needs, autocast)
        eager = run_forward_backward(definition, drawn.tight(), needs, autocast)
        return ours, eager, oracle_results(drawn, needs)

    return assert_draws_within_policy(draw, autocast or problem.x.dtype)


def check_subsets_of_gradients(target: Target) -> None:
    problem = target.problem(
        (150,), 136, 264, 16, dtype=torch.bfloat16, dropout_p=0.2, with_output_scale=True
    )
    whole = run_forward_backward(target.call, problem)
    for needs in (("x",), ("lora_a",), ("lora_b",), ("bias",), ("output_scale",), ("x", "lora_a")):
        for name, result in check_policy(target, problem, needs).items():
            assert name == "y" or torch.isfinite(result).all()
            if name == "y":
                assert torch.equal(result, whole[name])
    y = run_forward_backward(target.call, problem, ())["y"]
    assert torch.equal(y, whole["y"]), "without gradients the result differs"


def amid(x: Tensor, gap: float) -> Tensor:
    """The same rows at odd elements of wider ones."""
    wide = x.new_full((x.shape[0], x.shape[1] + 9), gap)
    return wide[:, 1 : x.shape[1] + 1].copy_(x)
