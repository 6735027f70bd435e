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
    for chunk in row_chunks(y.shape[0], y.shape[1], y.device):
        product = y[chunk].to(accumulator) * scale
        out[chunk] = product if offset is None else product.add_(offset)
    return out


def column_dot(left: Tensor, right: Tensor) -> Tensor:
    """The sum over rows of ``left * right``: two ``[M, N]`` to ``[N]``, in fp32 by chunks.

    On a device a chunk is as large as ``left`` in memory, which in half precision are two.
    """
    accumulator = accumulator_dtype(left.dtype)
    rows, columns = left.shape
    chunks = row_chunks(rows, columns, left.device)
    if left.device.type != "cpu":
        step = max(1, -(-rows * left.dtype.itemsize // accumulator.itemsize))
        chunks = [slice(start, start + step) for start in range(0, rows, step)]
    out = None
    for chunk in chunks:
        # In place where that is a copy, so that there is one in memory.
        wide = left[chunk].to(accumulator)
        wide = wide * right[chunk] if left.dtype == accumulator else wide.mul_(right[chunk])
        total = wide.sum(0)
        out = total if out is None else out.add_(total)
    return left.new_zeros(columns, dtype=accumulator) if out is None else out
