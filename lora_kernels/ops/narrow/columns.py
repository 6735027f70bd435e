"""Results of a whole layer by columns: scaled, and summed. In torch, by chunks of rows.

Dimensions: M tokens, N columns.
"""

import torch
from torch import Tensor

from lora_kernels.ops.narrow.products import row_chunks
from lora_kernels.runtime.dtypes import accumulator_dtype


def scale_columns(y: Tensor, output_scale: Tensor, bias: Tensor | None) -> Tensor:
    """``output_scale * y + bias`` in y's dtype ``[M, N]``, rounded once.

    The scale itself is not rounded to a half-precision dtype: its error would be the same in every
    row, and the sums over the rows in the gradients would not average it out.
    """
    out = torch.empty_like(y)
    if y.device.type == "cuda":  # where torch rounds mixed dtypes once, in one launch
        if bias is None:
            return torch.mul(y, output_scale, out=out)
        return torch.addcmul(bias.to(accumulator_dtype(y.dtype)), y, output_scale, out=out)
    accumulator = accumulator_dtype(y.dtype)
    scale = output_scale.to(accumulator)
    offset = None if bias is None else bias.to(accumulator)
    for chunk in row_chunks(*y.shape, y.device):
        product = y[chunk].to(accumulator) * scale
        out[chunk] = product if offset is None else product.add_(offset)
    return out


def column_dot(left: Tensor, right: Tensor) -> Tensor:
    """The sum over rows of ``left * right``: two ``[M, N]`` to ``[N]``, in fp32 by chunks."""
    accumulator = accumulator_dtype(left.dtype)
    out = left.new_zeros(left.shape[1], dtype=accumulator)
    for chunk in row_chunks(*left.shape, left.device):
        out += (left[chunk].to(accumulator) * right[chunk]).sum(0)
    return out
