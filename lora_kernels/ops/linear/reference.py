"""The definition of ``lora_linear`` in plain differentiable torch: the oracle of every test."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.ops.linear.call import LinearCall
from lora_kernels.runtime.dropout import MaskPlace, drop_threshold, keep_mask, keep_scale
from lora_kernels.runtime.scaling import as_tensor


def reference(call: LinearCall) -> Tensor:
    """:func:`lora_linear_reference` of a call."""
    base, dropout = call.base, call.dropout
    factors = call.factors.without_rank_scale()
    operands = (
        call.x, None if base is None else base.dequantise(), factors.a, factors.b,
        as_tensor(factors.scaling), call.bias, factors.output_scale,
    )  # fmt: skip
    if dropout is None:
        return lora_linear_reference(*operands)
    return lora_linear_reference(*operands, dropout.p, dropout.seed, dropout.place)


def lora_linear_reference(
    x: Tensor,  # [..., K]
    weight: Tensor | None,  # [N, K]
    lora_a: Tensor,  # [R, K]
    lora_b: Tensor,  # [N, R]
    scaling: Tensor,  # []
    bias: Tensor | None = None,  # [N]
    output_scale: Tensor | None = None,  # [N]
    dropout_p: float = 0.0,
    seed: Tensor | None = None,  # [] int64
    place: MaskPlace = MaskPlace(),
) -> Tensor:  # [..., N]
    """``y = output_scale * (x W^T + scaling * D(x) A^T B^T) + bias``, rounding like eager torch."""
    dropped = x
    if drop_threshold(dropout_p) > 0:
        if seed is None:
            raise ValueError("seed: expected a tensor where something is dropped, got None")
        rows = x.shape[:-1].numel()
        keep = keep_mask(seed, dropout_p, rows, x.shape[-1], place=place).view(x.shape)
        dropped = torch.where(keep, x * keep_scale(dropout_p), 0)
    hidden = F.linear(dropped, lora_a.to(x.dtype))
    y = F.linear(hidden, lora_b.to(x.dtype)) * scaling
    if weight is not None:
        y = F.linear(x, weight) + y
    if output_scale is not None:
        y = y * output_scale.to(x.dtype)
    if bias is not None:
        y = y + bias
    return y
