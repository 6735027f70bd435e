"""One call of ``lora_linear`` as its backends take it.

Dimensions: M tokens, K in_features, N out_features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from lora_kernels.adapters.factors import LoRAFactors
from lora_kernels.base_weights import BaseWeight
from lora_kernels.runtime.dropout import ActiveDropout

if TYPE_CHECKING:
    from lora_kernels.ops.linear.plan import LinearPlan


# A [R, K] and s B [N, R] in x's dtype, each where the forward had to round it.
Rounded = tuple[Tensor | None, Tensor | None]


class Needs(NamedTuple):
    """Whose gradients a backward computes."""

    x: bool
    lora_a: bool
    lora_b: bool
    bias: bool
    output_scale: bool


@dataclass(slots=True, eq=False)
class LinearCall:
    """What a forward reads. A backend's factors have no rank_scale."""

    x: Tensor  # [..., K]
    base: BaseWeight | None
    factors: LoRAFactors
    bias: Tensor | None  # [N]
    dropout: ActiveDropout | None  # None where nothing is dropped
    backend: str = "auto"  # as it was asked for
    plan: LinearPlan | None = None  # None for a call of an op
    save_unscaled: bool = False
    save: bool = True  # what a backward may need


@dataclass(slots=True, eq=False)
class LinearBackward:
    """What a backward reads. The factors have no rank_scale.

    x, h and unscaled are there where the one gradient that reads them is needed, and for a
    backend nowhere else: it computes that gradient where they are.
    """

    dy: Tensor  # [..., N]
    base: BaseWeight | None
    factors: LoRAFactors
    dropout: ActiveDropout | None  # None where nothing is dropped
    needs: Needs
    x: Tensor | None = None  # [..., K], for the gradient of A
    h: Tensor | None = None  # [M, R], for that of B
    unscaled: Tensor | None = None  # [M, N], for that of output_scale
    mask: Tensor | None = None  # [M, ceil(K/8)]; drawn again where it was not stored
    rounded: Rounded = (None, None)


class Result(NamedTuple):
    """What a forward computes: y, and what a backward may need."""

    y: Tensor  # [..., N]
    # [M, R] in fp32, or composed's product_dtype: D(x) A^T. None where nothing is saved.
    h: Tensor | None
    mask: Tensor | None  # [M, ceil(K/8)], the packed keep-mask
    unscaled: Tensor | None  # [M, N], the result before output_scale and bias, where asked for
    rounded: Rounded = (None, None)  # handed to a backward that was planned with the forward


class Gradients(NamedTuple):
    """What a backward computes; None where it is not needed."""

    x: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    bias: Tensor | None = None
    output_scale: Tensor | None = None
