"""``lora_linear`` with the compiled extension's CUDA kernels: backend ``native`` on a GPU.

Dimensions: M tokens, D the main reduction, C columns of a result, R rank.

A forward of at most 64 tokens without dropout and output scale is one kernel that streams the base
weight once, with the adapter inside. Everything else is Triton's kernels; on compute capability 9.0
its two wide GEMMs, y and dx, are CUDA kernels wherever the copy engine can address their operands.
Elsewhere (8.x, 10.0) they stay Triton's.
"""

import torch
from torch import Tensor

from lora_kernels.base_weights import matrix_of
from lora_kernels.ops.linear.call import Gradients, LinearBackward, LinearCall, Result
from lora_kernels.ops.linear.triton import gemm, launch, tiles, why_not  # noqa: F401  (of a backend)
from lora_kernels.ops.linear.triton.operands import NO_DROPOUT, Dropout, outer_axis
from lora_kernels.runtime import cpu_extension, cuda_extension
from lora_kernels.runtime.device_limits import limits_of
from lora_kernels.runtime.eager import below_autograd, restore_leading_dims


@below_autograd
def forward(call: LinearCall) -> Result:
    (a, b, scaling, output_scale, _), weight = call.factors, matrix_of(call.base)
    drops = call.dropout is not None
    if weight is None or cuda_extension.why_not_decode_linear(
        call.x, weight, a.shape[0], drops, output_scale
    ):
        return launch.forward(call, gemm_with_tail)
    rows = cpu_extension.rows_of(call.x)
    h = rows.new_empty((rows.shape[0], a.shape[0]), dtype=torch.float32)
    y = cuda_extension.decode_linear(rows, weight, a, b, scaling, call.bias, h)
    return Result(restore_leading_dims(y, call.x), h, None, None)


@below_autograd
def backward(call: LinearBackward) -> Gradients:
    return launch.backward(call, gemm_with_tail)


def gemm_with_tail(
    cell: tiles.LinearCell,
    left: Tensor,  # [M, D]
    right: Tensor | None,  # [D, C]
    tail_left: Tensor,  # [M, R]
    tail_right: Tensor,  # [R, C]
    out: Tensor,  # [M, C] contiguous, written
    *,
    unscaled: Tensor | None = None,  # [M, C] contiguous, written
    bias: Tensor | None = None,  # [C]
    output_scale: Tensor | None = None,  # [C]
    drop: Dropout = NO_DROPOUT,  # of the tail
) -> None:
    """:func:`gemm.gemm_with_tail`, by the CUDA kernel where it can."""
    others = (tail_left, tail_right, out, bias, output_scale)
    if (
        right is None
        or unscaled is not None
        or cuda_extension.missing_gemm_tail(left.device) is not None
        or left.dtype not in cuda_extension.DTYPES
        or any(tensor is not None and tensor.dtype != left.dtype for tensor in (right, *others))
        or not _are_addressed(left, right, tail_left, tail_right, out, drop)
    ):
        gemm.gemm_with_tail(
            cell, left, right, tail_left, tail_right, out, unscaled=unscaled, bias=bias,
            output_scale=output_scale, drop=drop,
        )  # fmt: skip
        return
    tile = tiles.tuned(cell, limits_of(left.device)).get("native", {})
    cuda_extension.gemm_tail(
        left, right, tail_left, tail_right, out, bias, output_scale, drop, **tile
    )


def _are_addressed(
    left: Tensor, right: Tensor, tail_left: Tensor, tail_right: Tensor, out: Tensor, drop: Dropout
) -> bool:
    """Whether the copy engine can address the matrices: the left ones and the result by rows, the
    right ones both by rows, or without dropout both by columns."""
    by_rows = all(outer_axis(matrix) == 0 for matrix in (left, tail_left, out))
    axis = outer_axis(right)
    return by_rows and axis in ((0,) if drop.on else (0, 1)) and outer_axis(tail_right) == axis
