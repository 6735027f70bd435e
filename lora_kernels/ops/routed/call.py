"""One call of ``routed_lora`` or of a half of it, as its backends take it.

Dimensions: M tokens, P pairs, K in_features, N out_features of all slices, H the widest rank.
"""

from __future__ import annotations

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


class Needs(NamedTuple):
    """Whose gradients a backward computes beside those of the factors."""

    x: bool  # or h
    weights: bool = False  # of the pairs
    bias: bool = False


@dataclass(slots=True, eq=False)
class RoutedCall:
    """What a forward reads; for a backward also what the forward has saved."""

    bank: BankTensors
    routing: RoutingTensors
    backend: str  # the one that serves
    x: Tensor | None = None  # [M, K]; in a backward None where no A needs a gradient
    base: BaseWeight | None = None
    bias: Tensor | None = None  # [N]
    out: Tensor | None = None  # [M, N], added to
    seed: Tensor | None = None  # []; None where no adapter drops
    place: MaskPlace = MaskPlace()
    save: bool = False  # whether a backward follows
    h: Tensor | None = None  # [P, H], needed for the gradients of B and of the weights
    rows: int = 0  # M, of an expand
    dtype: torch.dtype | None = None  # of an expand's result
    dy: Tensor | None = None  # [M, N], or [P, H] the gradient of h
    mask: Tensor | None = None  # [P, ceil(K/8)]; drawn again where it was not stored
    layout: GradientLayout | None = None
    trained: TrainableFactors | None = None
    in_features: int = 0
    needs: Needs | None = None
    alone: bool = False  # whether nothing else has to see the call


def stores_mask(device: torch.device, seed: Tensor | None, backend: str) -> bool:
    """Whether the forward hands its packed keep-mask to the backward; else it is drawn again.

    Known from the arguments alone, so that fake tensors agree.
    """
    return seed is not None and (
        backend == "composed" or (backend == "native" and device.type in ("cpu", "meta"))
    )


class Result(NamedTuple):
    """What a forward computes: y, and what a backward may need where it follows."""

    y: Tensor | None  # [M, N]
    h: Tensor | None = None  # [P, H] in fp32, or the composed backend's dtype: D(x) A^T
    mask: Tensor | None = None  # [P, ceil(K/8)], of the pairs whose adapter drops


class Gradients(NamedTuple):
    """What a backward computes."""

    x: Tensor | None  # or of h
    factors: Tensor  # flat, see GradientLayout
    weights: Tensor | None = None  # [P]
    bias: Tensor | None = None  # [N]
