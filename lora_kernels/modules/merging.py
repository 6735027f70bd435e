"""The weight of a layer whose adapter is merged into it."""

import torch
from torch import Tensor

from lora_kernels.dtypes import accumulator_dtype
from lora_kernels.ops.lora_weight_norm.composed import (
    adapted_blocks,
    is_column_major,
)


def merged_weight(
    weight: Tensor,  # [N, K]
    lora_a: Tensor,  # [R, K]
    lora_b: Tensor,  # [N, R]
    scaling: Tensor,  # []
    output_scale: Tensor | None = None,  # [N]
) -> Tensor:  # [N, K]
    """``output_scale * (W + s B A)`` as a new tensor with weight's dtype and memory layout.

    Computed in fp32 (fp64 for fp64) and rounded once, one cache-sized block at a time.

    Raises:
        ValueError: the merged weight has elements that are not finite.
    """
    accumulator = accumulator_dtype(weight.dtype)
    left, right = lora_b.to(accumulator) * scaling, lora_a.to(accumulator)
    merged = torch.empty_like(weight)
    source, target = weight, merged
    if output_scale is not None:
        output_scale = output_scale.unsqueeze(1).expand(weight.shape)
    if is_column_major(weight):
        source, target, left, right = weight.t(), merged.t(), right.t(), left.t()
        output_scale = None if output_scale is None else output_scale.t()
    finite = torch.ones((), dtype=torch.bool, device=weight.device)
    for lines, block in adapted_blocks(source, left, right):
        if output_scale is not None:
            block *= output_scale[lines]
        target[lines] = block
        finite &= torch.isfinite(target[lines]).all()
    if not finite:
        raise ValueError(
            f"merge: the merged weight is not finite in {weight.dtype}; the adapter is broken or "
            "overflows the base layer's dtype"
        )
    return merged
