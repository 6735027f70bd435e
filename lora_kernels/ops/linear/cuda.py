"""``lora_linear`` with the compiled extension's CUDA kernels: backend ``native`` on a GPU.

Dimensions: M tokens, D the main reduction, C columns of a result, R rank.

Takes and returns what :mod:`launch` does. A forward of at most 64 tokens without dropout and output
scale is one kernel that streams the base weight once, with the adapter inside. Everything else is
:mod:`launch`'s Triton kernels; on compute capability 9.0 its two wide GEMMs, y and dx, are CUDA
kernels wherever the copy engine can address their operands. Elsewhere (8.x, 10.0) they stay
Triton's.
"""

from torch import Tensor

from lora_kernels.ops.linear.triton import gemm, launch, tiles
from lora_kernels.ops.linear.triton.operands import Dropout, outer_axis
from lora_kernels.runtime import cpu_extension, cuda_extension
from lora_kernels.runtime.device_limits import limits_of
from lora_kernels.runtime.dropout import drop_threshold
from lora_kernels.runtime.eager import like_rows_of


def forward(
    x: Tensor,  # [..., K]
    weight: Tensor | None,  # [N, K]
    lora_a: Tensor,  # [R, K]
    lora_b: Tensor,  # [N, R]
    scaling: Tensor,  # []
    bias: Tensor | None,  # [N]
    output_scale: Tensor | None,  # [N]
    dropout_p: float,
    seed: Tensor | None,  # []
    save_unscaled: bool,
) -> tuple[Tensor, Tensor, None, Tensor | None]:
    """``(y, h, None, unscaled)`` as :func:`launch.forward`, h in fp32."""
    drops, rank = drop_threshold(dropout_p) > 0, lora_a.shape[0]
    if cuda_extension.unfit_for_decode_linear(x, weight, rank, drops, output_scale) is None:
        rows = cpu_extension.rows_of(x)
        y, h = cuda_extension.decode_linear(
            rows, weight, lora_a, lora_b, scaling, bias, save_h=True
        )
        return like_rows_of(x, y), h, None, None
    return launch.forward(
        x, weight, lora_a, lora_b, scaling, bias, output_scale, dropout_p, seed, save_unscaled,
        gemm=gemm_with_tail,
    )  # fmt: skip


def backward(*arguments) -> tuple[Tensor | None, ...]:
    """:func:`launch.backward` with dx by our GEMM."""
    return launch.backward(*arguments, gemm=gemm_with_tail)


def gemm_with_tail(
    cell: tiles.Cell,
    left: Tensor,  # [M, D]
    right: Tensor | None,  # [D, C]
    tail_left: Tensor,  # [M, R]
    tail_right: Tensor,  # [R, C]
    out: Tensor,  # [M, C] contiguous, written
    *,
    unscaled: Tensor | None = None,  # [M, C] contiguous, written
    bias: Tensor | None = None,  # [C]
    output_scale: Tensor | None = None,  # [C]
    drop: Dropout | None = None,  # of the tail
) -> None:
    """:func:`gemm.gemm_with_tail`, by the CUDA kernel where it can."""
    reason = cuda_extension.missing_gemm_tail(left.device) or unfit(
        left, right, tail_left, tail_right, out, unscaled, bias, output_scale, drop
    )
    if reason is not None:
        gemm.gemm_with_tail(
            cell, left, right, tail_left, tail_right, out, unscaled=unscaled, bias=bias,
            output_scale=output_scale, drop=drop,
        )  # fmt: skip
        return
    tile = tiles.tuned(cell, limits_of(left.device)).get("native", {})
    cuda_extension.gemm_tail(
        left, right, tail_left, tail_right, out, bias, output_scale, drop, **tile
    )


def unfit(
    left: Tensor,  # [M, D]
    right: Tensor | None,  # [D, C]
    tail_left: Tensor,  # [M, R]
    tail_right: Tensor,  # [R, C]
    out: Tensor,  # [M, C]
    unscaled: Tensor | None = None,  # [M, C]
    bias: Tensor | None = None,  # [C]
    output_scale: Tensor | None = None,  # [C]
    drop: Dropout | None = None,
) -> str | None:
    """Why a GEMM is not :func:`cuda_extension.gemm_tail`'s; None when it is."""
    if right is None or unscaled is not None:
        return "there is no main product, or the unscaled result is wanted too"
    dtype = left.dtype
    same = (right, tail_left, tail_right, out, bias, output_scale)
    if dtype not in cuda_extension.DTYPES or any(t is not None and t.dtype != dtype for t in same):
        return "the operands are not all of one half-precision dtype"
    if any(outer_axis(matrix) != 0 for matrix in (left, tail_left, out)):
        return "a left operand or the result is not by rows of whole 16 bytes"
    axis = outer_axis(right)
    if axis is None or outer_axis(tail_right) != axis:
        return "the right operands are not both by rows, or both by columns, of whole 16 bytes"
    if axis == 1 and drop is not None and drop.on:
        return "with dropout the right operands have to be by rows"
    return None
