"""A format of a frozen weight that is not dense, and of which a tensor does not tell the shape."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora_kernels.base_weights import BaseWeight, DenseWeight
from lora_kernels.base_weights.base import Place


@dataclass(frozen=True, slots=True)
class PaddedWeight(BaseWeight):
    """W ``[N, K]`` as the first N rows of a taller matrix."""

    tall: Tensor
    rows: int
    format: ClassVar[str] = "padded"

    @staticmethod
    def of(weight: Tensor) -> "PaddedWeight":
        below = torch.full_like(weight[:3], torch.nan)
        return PaddedWeight(torch.cat([weight, below]), weight.shape[0])

    @property
    def meta(self) -> tuple[int]:
        return (self.rows,)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.rows, self.tall.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        return self.tall.dtype

    @property
    def device(self) -> torch.device:
        return self.tall.device

    def tensors(self) -> tuple[Tensor]:
        return (self.tall,)

    def to(self, dtype: torch.dtype) -> "PaddedWeight":
        return PaddedWeight(self.tall.to(dtype), self.rows)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._dense().matmul(x, bias)

    def matmul_t(self, dy: Tensor) -> Tensor:
        return self._dense().matmul_t(dy)

    def dequantise(self, rows: slice = slice(None)) -> Tensor:
        return self.tall[: self.rows][rows]

    def adapted_blocks(self, left: Tensor, right: Tensor) -> Iterator[tuple[Place, Tensor]]:
        return self._dense().adapted_blocks(left, right)

    def merged(self, blocks: Iterator[tuple[Place, Tensor]]) -> "PaddedWeight":
        return PaddedWeight.of(self._dense().merged(blocks).weight)

    def _dense(self) -> DenseWeight:
        return DenseWeight(self.tall[: self.rows])
