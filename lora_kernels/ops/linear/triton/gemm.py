"""Launches the GEMM with a tail of :mod:`ops.narrow.triton.gemm_tail`, fused or hybrid.

Dimensions: M tokens, D the main reduction, C columns of the result, R rank.

Tensor descriptors (TMA) are made on the host: as kernel arguments they need neither a workspace nor
Triton's allocator, which other threads would not see.
"""
# pyright: reportCallIssue=false
# A launch takes the compiler's options too, and strides by the tuple.

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.ops.linear.triton import tiles
from lora_kernels.ops.linear.triton.operands import NO_DROPOUT, Dropout, outer_axis
from lora_kernels.ops.narrow.triton.gemm_tail import gemm_tail_kernel, gemm_tail_tma_kernel
from lora_kernels.runtime.device_limits import cdiv, limits_of, precision


def gemm_with_tail(
    cell: tiles.LinearCell,
    left: Tensor,  # [M, D]
    right: Tensor | None,  # [D, C]; None: the tail alone
    tail_left: Tensor,  # [M, R]
    tail_right: Tensor,  # [R, C]
    out: Tensor,  # [M, C] contiguous, written
    *,
    unscaled: Tensor | None = None,  # [M, C] contiguous, written
    bias: Tensor | None = None,  # [C]
    output_scale: Tensor | None = None,  # [C]
    drop: Dropout = NO_DROPOUT,  # of the tail
) -> None:
    """``out = output_scale * (left @ right + D(tail_left @ tail_right)) + bias``."""
    limits = limits_of(left.device)
    if right is not None and tiles.strategy(cell, limits) == "hybrid":
        product = out if unscaled is None else unscaled
        inner = bias if output_scale is None else None
        gemm_with_tail(cell, left, None, tail_left, tail_right, product, bias=inner, drop=drop)
        product.addmm_(left, right)
        if output_scale is not None:
            _scale_columns(product, output_scale, bias, out)
        return
    lefts = [tail_left, out] if right is None else [left, tail_left, out]
    rights = [tail_right] if right is None else [right, tail_right]
    axes = list(map(outer_axis, lefts + rights))
    tile = tiles.gemm_tile(
        cell,
        out.shape[1],
        limits,
        aligned=None not in axes,
        # TMA transposes right operands, not left ones.
        row_major=axes[: len(lefts)] == [0] * len(lefts),
        has_main=right is not None,
        two_results=unscaled is not None,
    )
    launch = _launch_tma if tile.tma else _launch_pointers
    launch(tile, left, right, tail_left, tail_right, out, unscaled, bias, output_scale, drop)


def _scale_columns(
    product: Tensor,  # [M, C]
    output_scale: Tensor,  # [C]
    bias: Tensor | None,  # [C]
    out: Tensor,  # [M, C], written; it may be ``product``
) -> None:
    """``out = output_scale * product + bias`` in one launch: the scale as wide as it came, and the
    result rounded once. A rounded scale would be off by the same in every row."""
    scale = output_scale.float()  # one operand in fp32 has torch compute in it
    if bias is None:
        torch.mul(product, scale, out=out)
    else:
        torch.addcmul(bias, product, scale, out=out)


def _launch_pointers(
    tile, left, right, tail_left, tail_right, out, unscaled, bias, output_scale, drop
) -> None:
    (tokens, columns), rank = out.shape, tail_left.shape[1]
    grid = (cdiv(tokens, tile.BLOCK_M) * cdiv(columns, tile.BLOCK_C),)
    gemm_tail_kernel[grid](
        left,
        left if right is None else right,
        tail_left,
        tail_right,
        out,
        out if unscaled is None else unscaled,
        *_epilogue_arguments(out, bias, output_scale, drop),
        tokens,
        columns,
        left.shape[1],
        rank,
        *left.stride(),
        *((0, 0) if right is None else right.stride()),
        *tail_left.stride(),
        *tail_right.stride(),
        HAS_MAIN=right is not None,
        PRECISION=precision(left.dtype),
        **_epilogue_constants(unscaled, bias, output_scale, drop),
        **tile.options,
    )


def _launch_tma(
    tile, left, right, tail_left, tail_right, out, unscaled, bias, output_scale, drop
) -> None:
    (tokens, columns), rank = out.shape, tail_left.shape[1]
    right_transposed, tail_transposed = outer_axis(right) == 1, outer_axis(tail_right) == 1
    num_tiles = cdiv(tokens, tile.BLOCK_M) * cdiv(columns, tile.BLOCK_C)
    half = [tile.BLOCK_M, tile.BLOCK_C // 2]
    out_desc = _descriptor(out, half)
    gemm_tail_tma_kernel[(min(num_tiles, limits_of(left.device).multiprocessors),)](
        _descriptor(left, [tile.BLOCK_M, tile.BLOCK_D]),
        _descriptor(right, [tile.BLOCK_D, tile.BLOCK_C], right_transposed),
        _descriptor(tail_left, [tile.BLOCK_M, tile.BLOCK_R]),
        _descriptor(tail_right, [tile.BLOCK_R, tile.BLOCK_C], tail_transposed),
        out_desc,
        out_desc if unscaled is None else _descriptor(unscaled, half),
        *_epilogue_arguments(out, bias, output_scale, drop),
        tokens,
        columns,
        left.shape[1],
        rank,
        RIGHT_TRANSPOSED=right_transposed,
        TAIL_TRANSPOSED=tail_transposed,
        HAS_TAIL=True,
        PRECISION=precision(left.dtype),
        **_epilogue_constants(unscaled, bias, output_scale, drop),
        **tile.options,
    )


def _epilogue_arguments(out, bias, output_scale, drop: Dropout) -> tuple:
    """``out`` stands for a pointer that is not read."""
    return (
        out if bias is None else bias.contiguous(),
        out if output_scale is None else output_scale.contiguous(),
        out if drop.seed is None else drop.seed,
        *drop.numbers,
    )


def _epilogue_constants(unscaled, bias, output_scale, drop: Dropout) -> dict[str, bool]:
    return {
        "HAS_BIAS": bias is not None,
        "HAS_OUTPUT_SCALE": output_scale is not None,
        "HAS_UNSCALED": unscaled is not None,
        "DROPOUT": drop.on,
        "LONG_COUNTER": drop.long_counter,
    }


def _descriptor(matrix: Tensor, block: list[int], transposed: bool = False) -> TensorDescriptor:
    if transposed:
        matrix, block = matrix.t(), block[::-1]
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block)
