"""One call of ``routed_lora_linear``, without gradients and in training: sizes, inputs, parts."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora_kernels.measuring.linear_call import Typed
from lora_kernels.measuring.timed_calls import sets_past_cache
from lora_kernels.ops.routed import routed_lora_linear
from lora_kernels.ops.routed.cells import DIRECTIONS, TableCell
from lora_kernels.testing.routed_inputs import RoutedProblem


@dataclass(frozen=True)
class RoutedCase(Typed):
    """m tokens, k in_features, out_features of each slice; every adapter has the widest's rank."""

    operation: ClassVar[str] = "routed_lora"

    m: int
    k: int
    widths: tuple[int, ...]
    dtype: str = "bf16"
    dropout: float = 0.0
    rank: int = 16  # over all slices
    adapters: int = 1
    device: str = "cpu"

    @property
    def n(self) -> int:
        return sum(self.widths)

    @property
    def title(self) -> str:
        slices = f" in {len(self.widths)} slices" if len(self.widths) > 1 else ""
        sizes = f"M {self.m}, K {self.k}, N {self.n}{slices}, r {self.rank} x {self.adapters}"
        return f"routed_lora: {sizes}, {self.dtype}, dropout {self.dropout:g}"

    @property
    def keys(self) -> dict[str, str]:
        """Of its cells, by direction."""
        sizes = self.m, self.k, self.n, self.rank, self.adapters, self.dropout > 0
        return {each: TableCell(each, self.torch_dtype, *sizes).key for each in DIRECTIONS}


def problem_of(case: RoutedCase, seed: int) -> RoutedProblem:
    """Adapters follow one another, as the sequences of a batch do; fp32 over any base."""
    slices = len(case.widths)
    ranks = tuple(case.rank // slices + (s < case.rank % slices) for s in range(slices))
    return RoutedProblem.random(
        torch.arange(case.m) * case.adapters // max(case.m, 1),
        [ranks] * case.adapters,
        case.k,
        case.widths,
        dtype=case.torch_dtype,
        adapter_dtype=torch.float32,
        with_bias=False,
        dropout=case.dropout,
        device=case.device,
        generator_seed=seed,
    )


class RoutedCall:
    """A call on one set of inputs; a named seed draws one mask, none draws others each time."""

    def __init__(self, problem: RoutedProblem, backend: str, seed: Tensor | None = None) -> None:
        bank, weight = problem.bank(), problem.weight
        assert weight is not None, "problem_of draws one"
        bank.reserve()  # no other bank can be captured
        self._x, self._dy = problem.x.detach().requires_grad_(), problem.dy
        self._names, parameters = zip(*bank.named_parameters(), strict=True)
        self._leaves = [self._x, *parameters]
        self._call = functools.partial(
            routed_lora_linear, self._x, weight, bank, problem.routing(bank),
            seed=seed, backend=backend,
        )  # fmt: skip

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self._call()

    def training(self) -> tuple[Tensor, ...]:
        """y, and the gradients of x and of the parameters; None for adapters without tokens."""
        y = self._call()
        return y, *torch.autograd.grad(y, self._leaves, self._dy, allow_unused=True)

    def results(self) -> dict[str, Tensor]:
        named = zip(("y", "x", *self._names), self.training(), strict=True)
        return {name: tensor.detach() for name, tensor in named if tensor is not None}


class RoutedInputs:
    """The sets of inputs of a case, and the definition's results of the first, and in fp64."""

    def __init__(self, case: RoutedCase) -> None:
        elements = case.m * case.k + case.n * case.k + case.m * case.n
        bytes_of_one = elements * case.torch_dtype.itemsize
        bytes_of_one += 4 * case.adapters * case.rank * (case.k + case.n)
        count = sets_past_cache(bytes_of_one, torch.device(case.device))
        self.sets = [problem_of(case, seed) for seed in range(count)]
        self.eager = self.results("reference")
        double = self.sets[0].double()
        self.oracle = RoutedCall(double, "reference", double.seed).results()

    def results(self, backend: str) -> dict[str, Tensor]:
        """Of the first set."""
        return RoutedCall(self.sets[0], backend, self.sets[0].seed).results()

    def parts(self, backend: str) -> list[dict[str, Callable[[int], object]]]:
        """What is timed together: without gradients may be captured where training is not."""
        calls = [RoutedCall(each, backend) for each in self.sets]
        return [
            {"forward": lambda number: calls[number].forward()},
            {"training": lambda number: calls[number].training()},
        ]
