"""One call of ``lora_linear``, forward and backward: its sizes, its inputs, and its parts."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora_kernels.measuring.timed_calls import sets_past_cache
from lora_kernels.ops.linear import lora_linear
from lora_kernels.ops.linear.reference import lora_linear_reference
from lora_kernels.ops.linear.triton import tiles
from lora_kernels.testing import LoRAProblem, oracle_results, run_forward_backward

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SEED = 20_240_607  # of the mask that results are compared under; timed calls draw their own


class Typed:
    """A case whose ``dtype`` is a name in ``DTYPES``."""

    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class LinearCase(Typed):
    """m tokens, k in_features, n out_features."""

    operation: ClassVar[str] = "lora_linear"

    m: int
    k: int
    n: int
    dtype: str = "bf16"
    dropout: float = 0.0
    rank: int = 16
    alpha: float = 32
    device: str = "cpu"

    @property
    def title(self) -> str:
        sizes = f"M {self.m}, K {self.k}, N {self.n}, r {self.rank}"
        return f"lora_linear: {sizes}, {self.dtype}, dropout {self.dropout:g}"

    def cell(self, direction: str) -> tiles.LinearCell:
        """What a tuned table knows this call by."""
        activation = torch.empty(self.m, 0, dtype=self.torch_dtype, device="meta")
        return tiles.cell_of(direction, activation, self.k, self.n, self.rank, self.dropout > 0)

    @property
    def keys(self) -> dict[str, str]:
        """Of its cells, by direction."""
        return {direction: self.cell(direction).key for direction in ("forward", "backward")}


def problems_of(case: LinearCase) -> list[LoRAProblem]:
    """Sets of inputs, together larger than the last-level cache."""
    elements = case.m * case.k + case.n * case.k + case.m * case.n
    count = sets_past_cache(elements * case.torch_dtype.itemsize, torch.device(case.device))
    return [problem_of(case, seed) for seed in range(count)]


def problem_of(case: LinearCase, seed: int) -> LoRAProblem:
    """fp32 adapters, as PEFT makes them over any base; drawn on the case's device."""
    generator = torch.Generator(case.device).manual_seed(seed)

    def draw(rows: int, columns: int, spread: float, dtype: torch.dtype) -> Tensor:
        values = torch.randn(rows, columns, generator=generator, device=case.device)
        return (values * spread).to(dtype)

    return LoRAProblem(
        x=draw(case.m, case.k, 1.0, case.torch_dtype).requires_grad_(),
        weight=draw(case.n, case.k, case.k**-0.5, case.torch_dtype),
        lora_a=draw(case.rank, case.k, case.k**-0.5, torch.float32),
        lora_b=draw(case.n, case.rank, 0.01, torch.float32),
        scaling=torch.tensor(case.alpha / case.rank, dtype=torch.float64),
        bias=None, output_scale=None, dropout_p=case.dropout,
        seed=torch.tensor(SEED, device=case.device) if case.dropout else None,
        dy=draw(case.m, case.n, 1.0, case.torch_dtype),
    )  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A call on one set of inputs."""

    forward: Callable[[], Tensor]
    leaves: list[Tensor]  # what backward makes gradients for


def our_call(problem: LoRAProblem, backend: str = "auto") -> Call:
    """``lora_linear`` as it is trained: it draws its own mask."""
    x, weight, scaling, p = problem.x, problem.weight, problem.scaling.item(), problem.dropout_p
    lora_a, lora_b = (f.detach().clone().requires_grad_() for f in (problem.lora_a, problem.lora_b))
    return Call(
        lambda: lora_linear(x, weight, lora_a, lora_b, scaling, dropout_p=p, backend=backend),
        [x, lora_a, lora_b],
    )


def parts_of(calls: list[Call], problems: list[LoRAProblem]) -> dict[str, Callable[[int], object]]:
    """The forward and the backward of the call of a number."""
    results: dict[int, Tensor] = {}

    def forward(number: int) -> Tensor:
        results[number] = calls[number].forward()
        return results[number]

    def backward(number: int) -> tuple[Tensor, ...]:
        y, leaves = results.pop(number), calls[number].leaves
        return torch.autograd.grad(y, leaves, problems[number].dy)

    return {"forward": forward, "backward": backward}


class LinearInputs:
    """The sets of inputs of a case, and the eager formula's results of the first, and fp64's."""

    def __init__(self, case: LinearCase) -> None:
        self.sets = problems_of(case)
        self.eager = run_forward_backward(lora_linear_reference, self.sets[0])
        self.oracle = oracle_results(self.sets[0])

    def results(self, backend: str) -> dict[str, Tensor]:
        """Of the first set."""
        return run_forward_backward(functools.partial(lora_linear, backend=backend), self.sets[0])

    def parts(self, backend: str) -> list[dict[str, Callable[[int], object]]]:
        """What is timed together."""
        return [parts_of([our_call(each, backend) for each in self.sets], self.sets)]
