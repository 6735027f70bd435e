"""One call of ``routed_lora`` or of a half of it, as its backends take it.

Dimensions: M tokens, P pairs, K in_features, N out_features of all slices, H the widest rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.base_weights import BaseWeight
from lora_kernels.ops.routed.tensors import (
    BankTensors,
    GradientLayout,
    RoutingTensors,
    TrainableFactors,
)
from lora_kernels.runtime.dropout import MaskPlace

NOTHING_TRAINED = TrainableFactors([], [], [])


class Needs(NamedTuple):
    """Whose gradients a backward computes beside those of the factors."""

    x: bool  # or h
    weights: bool = False  # of the pairs
    bias: bool = False


@dataclass(slots=True, eq=False)
class RoutedCall:
    """What every step of a call reads."""

    bank: BankTensors
    routing: RoutingTensors
    backend: str  # the one that serves
    seed: Tensor | None = None  # []; None where no adapter drops
    place: MaskPlace = MaskPlace()
    alone: bool = False  # whether nothing else has to see the call
    trained: TrainableFactors = NOTHING_TRAINED


@dataclass(slots=True, eq=False, kw_only=True)
class ForwardCall(RoutedCall):
    """What ``routed_lora`` and ``routed_shrink`` read."""

    x: Tensor  # [M, K]
    base: BaseWeight | None = None
    bias: Tensor | None = None  # [N]
    out: Tensor | None = None  # [M, N], added to
    save: bool = False  # whether a backward follows
    layout: GradientLayout | None = None  # None where no gradient is recorded


@dataclass(slots=True, eq=False, kw_only=True)
class ExpandCall(RoutedCall):
    """What ``routed_expand`` reads."""

    h: Tensor  # [P, H]
    out: Tensor | None = None  # [M, N], added to; or instead of it
    rows: int = 0  # M, and
    dtype: torch.dtype | None = None  # of the result
    layout: GradientLayout | None = None


@dataclass(slots=True, eq=False, kw_only=True)
class BackwardCall(RoutedCall):
    """What every backward reads: the forward's arguments, and what it has saved."""

    dy: Tensor  # [M, N], or [P, H] the gradient of h
    layout: GradientLayout
    needs: Needs
    base: BaseWeight | None = None
    mask: Tensor | None = None  # [P, ceil(K/8)]; drawn again where it was not stored
    in_features: int = 0

    def new_weights(self, new: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Memory for the gradient of the pairs' weights ``[P]``; None where it is not needed."""
        weights = self.routing.pair_weights
        return None if weights is None or not self.needs.weights else new(weights)

    def base_gradient(self) -> Tensor:
        """The frozen layer's dx ``[M, K]``; zeros without one."""
        if self.base is not None:
            return self.base.matmul_t(self.dy)
        return self.dy.new_zeros((self.dy.shape[0], self.in_features))


@dataclass(slots=True, eq=False, kw_only=True)
class LoRABackward(BackwardCall):
    """What the backward of ``routed_lora`` reads."""

    x: Tensor | None  # [M, K]; None where no A needs a gradient
    h: Tensor | None  # [P, H]; None where neither a B nor the weights need one


@dataclass(slots=True, eq=False, kw_only=True)
class ShrinkBackward(BackwardCall):
    """What the backward of ``routed_shrink`` reads."""

    x: Tensor  # [M, K]
    h: None = None


@dataclass(slots=True, eq=False, kw_only=True)
class ExpandBackward(BackwardCall):
    """What the backward of ``routed_expand`` reads."""

    h: Tensor  # [P, H]
    x: None = None


def stores_mask(device: torch.device, seed: Tensor | None, backend: str) -> bool:
    """Whether the forward hands its packed keep-mask to the backward; else it is drawn again.

    Known from the arguments alone, so that fake tensors agree.
    """
    return seed is not None and (
        backend == "composed" or (backend == "native" and device.type in ("cpu", "meta"))
    )


class Result(NamedTuple):
    """What a forward computes: y, and what a backward may need where it follows."""

    y: Tensor  # [M, N]
    h: Tensor | None = None  # [P, H] in fp32, or the composed backend's dtype: D(x) A^T
    mask: Tensor | None = None  # [P, ceil(K/8)], of the pairs whose adapter drops


class Gradients(NamedTuple):
    """What a backward computes."""

    x: Tensor | None  # or of h
    factors: Tensor  # flat, see GradientLayout
    weights: Tensor | None = None  # [P]
    bias: Tensor | None = None  # [N]
