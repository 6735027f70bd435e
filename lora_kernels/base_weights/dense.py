"""A frozen weight of plain numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_kernels.base_weights.base import BaseWeight, Place

# Elements of a block. On a CPU it stays near a second-level cache (smaller blocks were slower);
# a GPU wants few launches: 2**24 fp32 elements are 64 MiB, and one block of a 4096 x 4096 layer.
_CPU_BLOCK = 1 << 19
_DEVICE_BLOCK = 1 << 24

_ALL = slice(None)


@dataclass(frozen=True, slots=True)
class DenseWeight(BaseWeight):
    """W as one matrix ``[N, K]`` in bf16, fp16, fp32 or fp64, any strides."""

    weight: Tensor
    format: ClassVar[str] = "dense"

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def tensors(self) -> tuple[Tensor]:
        return (self.weight,)

    def to(self, dtype: torch.dtype) -> DenseWeight:
        return DenseWeight(self.weight.to(dtype)) if isinstance(self.weight, Tensor) else self

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, self.weight, bias)

    def matmul_t(self, dy: Tensor) -> Tensor:
        return torch.mm(dy, self.weight) if dy.ndim == 2 else torch.matmul(dy, self.weight)

    def add_matmul_(self, out: Tensor, x: Tensor) -> None:
        out.addmm_(x, self.weight.t())

    def add_matmul_t_(self, out: Tensor, dy: Tensor) -> None:
        out.addmm_(dy, self.weight)

    def dequantise(self, rows: slice = slice(None)) -> Tensor:
        return self.weight[rows]

    def adapted_blocks(self, left: Tensor, right: Tensor) -> Iterator[tuple[Place, Tensor]]:
        weight = self.weight
        by_columns = weight.stride(0) < weight.stride(1)  # whose columns lie together in memory
        if by_columns:
            weight, left, right = weight.t(), right.t(), left.t()
        rows, columns = weight.shape
        limit = _CPU_BLOCK if weight.device.type == "cpu" else _DEVICE_BLOCK
        step = min(max(limit // max(columns, 1), 1), max(rows, 1))
        buffer = left.new_empty((step, columns))
        for start in range(0, rows, step):
            lines = slice(start, min(start + step, rows))
            block = buffer[: lines.stop - start]
            if weight.dtype == left.dtype:
                torch.addmm(weight[lines], left[lines], right, out=block)
            else:
                block.copy_(weight[lines]).addmm_(left[lines], right)
            yield ((_ALL, lines), block.t()) if by_columns else ((lines, _ALL), block)

    def merged(self, blocks: Iterator[tuple[Place, Tensor]]) -> DenseWeight:
        merged = torch.empty_like(self.weight)
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for place, block in blocks:
            merged[place] = block
            finite &= torch.isfinite(merged[place]).all()
        if not finite:
            raise ValueError(
                f"merge: the merged weight is not finite in {self.dtype}; the adapter is broken or "
                "overflows the base layer's dtype"
            )
        return DenseWeight(merged)


def matrix_of(base: BaseWeight | None) -> Tensor | None:
    """W of a plain weight, for kernels that read no other; None without a weight."""
    return base.weight if isinstance(base, DenseWeight) else None


def base_of(weight: Tensor | BaseWeight | None) -> BaseWeight | None:
    """A weight as a value: a tensor is a plain one."""
    return DenseWeight(weight) if isinstance(weight, Tensor) else weight
