"""What every format of a frozen weight offers, and how one crosses an op.

Dimensions: M tokens, K in_features, N out_features, R rank.

An op takes a weight as its tensors, the name of its format and integers, so that graphs, fake
tensors and autograd see plain tensors; :func:`rebuild` makes the value again on the other side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

# The rows and the columns of a block in ``[N, K]``; slice(None) is all of them.
Place = tuple[slice, slice]


class BaseWeight:
    """A frozen weight W ``[N, K]``; subclasses are frozen dataclasses of plain tensors.

    The constructor of a format takes its tensors, then its integers.

    Attributes:
        format: its name, the only thing beside tensors and integers that crosses an op.
        meta: the integers that :func:`rebuild` needs beside the tensors.
        shape: ``(N, K)``.
        dtype: of its products and of what :meth:`dequantise` returns.
        device: where its tensors are.
    """

    __slots__ = ()
    format: ClassVar[str]
    meta: tuple[int, ...] = ()
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def __init_subclass__(cls) -> None:
        _FORMATS[cls.format] = cls

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the weight is stored as: an op takes and a backward saves them."""
        raise NotImplementedError

    def to(self, dtype: torch.dtype) -> BaseWeight:
        """The same weight with products in another dtype."""
        raise NotImplementedError

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x W^T + b``: ``[..., K] -> [..., N]``, exactly as the frozen layer computes it."""
        raise NotImplementedError

    def matmul_t(self, dy: Tensor) -> Tensor:
        """``dy W``: ``[..., N] -> [..., K]``."""
        raise NotImplementedError

    def add_matmul_(self, out: Tensor, x: Tensor) -> None:
        """``out += x W^T`` for ``[M, N]`` and ``[M, K]``."""
        out += self.matmul(x)

    def add_matmul_t_(self, out: Tensor, dy: Tensor) -> None:
        """``out += dy W`` for ``[M, K]`` and ``[M, N]``."""
        out += self.matmul_t(dy)

    def dequantise(self, rows: slice = slice(None)) -> Tensor:
        """The rows as numbers ``[n, K]`` in ``dtype``: what the weight is defined to be."""
        raise NotImplementedError

    def adapted_blocks(self, left: Tensor, right: Tensor) -> Iterator[tuple[Place, Tensor]]:
        """Blocks of ``W + left @ right`` (``[N, R]`` and ``[R, K]``), in left's dtype.

        All are the same buffer: one is valid until the next is asked for.
        """
        raise NotImplementedError

    def merged(self, blocks: Iterator[tuple[Place, Tensor]]) -> BaseWeight:
        """A new weight of this format with the values of ``blocks``.

        Raises:
            ValueError: a value is not finite once it is rounded.
        """
        raise NotImplementedError


_FORMATS: dict[str, type[BaseWeight]] = {}


def rebuild(tensors: Sequence[Tensor], format: str, meta: Sequence[int]) -> BaseWeight | None:
    """The weight that was passed as these; no tensors are no weight."""
    return _FORMATS[format](*tensors, *meta) if tensors else None


def rebuild_weight(tensors: Sequence[Tensor], format: str, meta: Sequence[int]) -> BaseWeight:
    """:func:`rebuild` where there is a weight."""
    return _FORMATS[format](*tensors, *meta)


def product_or_bias(
    base: BaseWeight | None,
    x: Tensor,  # [..., K]
    bias: Tensor | None,  # [N]
    out_features: int,
) -> tuple[Tensor, bool]:  # [..., N]
    """What an adapter's part is added to, and whether that holds anything: without a base weight
    it is the bias, without either it is uninitialised memory."""
    if base is not None:
        return base.matmul(x, bias), True
    y = x.new_empty((*x.shape[:-1], out_features))
    if bias is None:
        return y, False
    return y.copy_(bias), True
