"""``lora_linear`` on our Triton kernels: from shapes to grids.

Dimensions: M tokens, K in_features, N out_features, R rank.

Takes and returns what :mod:`composed` does; the keep-mask is never stored, every kernel regenerates
it from the seed, which it reads through a pointer. Nothing is read back from the device and nothing
tuned inside a call, so that all of it can be captured in a CUDA graph; workspaces come from torch's
allocator.
"""
# pyright: reportCallIssue=false
# A launch takes the compiler's options too, and strides by the tuple.

from collections.abc import Callable

import torch
from torch import Tensor

from lora_kernels.base_weights import matrix_of
from lora_kernels.ops.linear.call import Gradients, LinearBackward, LinearCall, Result
from lora_kernels.ops.linear.triton import tiles
from lora_kernels.ops.linear.triton.gemm import gemm_with_tail
from lora_kernels.ops.linear.triton.kernels import (
    output_gradient_kernel,
    rank_gradient_kernel,
    shrink_kernel,
)
from lora_kernels.ops.linear.triton.operands import (
    NO_DROPOUT,
    Dropout,
    is_aligned,
    scaling_argument,
)
from lora_kernels.ops.linear.triton.tiles import LinearCell, cell_of
from lora_kernels.ops.narrow.triton.reduce import reduce_partials_kernel, scale_cast_kernel
from lora_kernels.runtime.device_limits import (
    FP_FUSION,
    cdiv,
    limits_of,
    on_device,
    padded_rows,
    precision,
)
from lora_kernels.runtime.eager import restore_leading_dims

# Elements per program of the elementwise kernels: 16 bytes of fp32 for each thread of two warps, so
# that a small result makes work for every multiprocessor (reasoned, not measured).
_BLOCK = 256


def forward(call: LinearCall, gemm: Callable[..., None] = gemm_with_tail) -> Result:
    """h is fp32; ``gemm`` makes y from x and h."""
    x, weight, factors = call.x, matrix_of(call.base), call.factors
    rows = x.reshape(-1, x.shape[-1])  # [M, K]
    (tokens, columns), (out_features, rank) = rows.shape, factors.b.shape
    y = rows.new_empty((tokens, out_features))
    unscaled = torch.empty_like(y) if call.save_unscaled else None
    h = rows.new_empty((tokens, rank), dtype=torch.float32)
    if tokens == 0:
        return Result(restore_leading_dims(y, x), h, None, unscaled)
    cell = cell_of("forward", rows, columns, out_features, rank, call.dropout is not None)
    drop = Dropout(call.dropout, tokens, columns)
    with on_device(rows):
        tail = _shrink(cell, rows, factors.a, h, drop, drop.scale)
        scaled_b = _scale_cast(factors.b, scaling_argument(factors.scaling), x.dtype)  # [N, R]
        gemm(
            cell,
            rows,
            None if weight is None else weight.t(),
            tail,
            scaled_b.t(),
            y,
            unscaled=unscaled,
            bias=call.bias,
            output_scale=factors.output_scale,
        )
    return Result(restore_leading_dims(y, x), h, None, unscaled)


def backward(call: LinearBackward, gemm: Callable[..., None] = gemm_with_tail) -> Gradients:
    """``gemm`` makes dx from dy and t; the mask is always drawn again."""
    dy, x, h, factors, needs = call.dy, call.x, call.h, call.factors, call.needs
    unscaled, output_scale = call.unscaled, factors.output_scale
    rows_dy = dy.reshape(-1, dy.shape[-1])  # [M, N]
    (tokens, out_features), (rank, columns) = rows_dy.shape, factors.a.shape
    dx = rows_dy.new_empty((tokens, columns)) if needs.x else None
    grads = Gradients(
        None if dx is None else dx.view(*dy.shape[:-1], columns),
        None if x is None else factors.a.new_empty(factors.a.shape),
        None if h is None else factors.b.new_empty(factors.b.shape),
        rows_dy.new_empty(out_features) if needs.bias else None,
        torch.empty_like(output_scale)
        if output_scale is not None and unscaled is not None
        else None,
    )
    if tokens == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return grads

    cell = cell_of("backward", rows_dy, columns, out_features, rank, call.dropout is not None)
    drop, scaling = Dropout(call.dropout, tokens, columns), scaling_argument(factors.scaling)
    needs_t = dx is not None or x is not None
    rescale = output_scale if needs_t or h is not None else None
    with on_device(rows_dy):
        if rescale is not None or grads.bias is not None or grads.output_scale is not None:
            rows_dy = _output_gradients(rows_dy, unscaled, rescale, grads.bias, grads.output_scale)
        t = rows_dy.new_empty((tokens, rank), dtype=torch.float32) if needs_t else None
        tail = None
        if h is not None and grads.lora_b is not None:
            # The dropout's scale rides on t, so that it reaches both of its products.
            factor, h = drop.scale, h.float()
            tail = _b_gradient(
                cell, rows_dy, h, factors.b, scaling, factor, grads.lora_b, t, rounded=needs.x
            )
        if t is None:
            return grads
        if tail is None:
            b, factor = factors.b.t(), drop.scale
            tail = _shrink(cell, rows_dy, b, t, NO_DROPOUT, factor, scaling, rounded=needs.x)
        if dx is not None:
            a = factors.a if factors.a.dtype == dy.dtype else _scale_cast(factors.a, 1.0, dy.dtype)
            gemm(cell, rows_dy, matrix_of(call.base), tail, a, dx, drop=drop)
        if x is not None and grads.lora_a is not None:
            _a_gradient(cell, x.reshape(-1, columns), t, grads.lora_a, drop)
    return grads


def _shrink(
    cell: LinearCell,
    wide: Tensor,  # [M, D]
    narrow: Tensor,  # [R, D]
    out: Tensor,  # [M, R] fp32, written
    drop: Dropout,
    factor: float,
    scaling: Tensor | float = 1.0,
    rounded: bool = True,
) -> Tensor:  # [M, R], in wide's dtype if rounded
    """``out = scaling * factor * D(wide) @ narrow^T``, and its rounded copy if asked for."""
    (tokens, depth), rank = wide.shape, narrow.shape[0]
    tile = tiles.shrink_tile(
        cell,
        depth,
        narrow.element_size(),
        limits_of(wide.device),
        aligned=is_aligned(wide) and is_aligned(narrow),
    )
    copy = _copy_for_gemm(out, wide.dtype) if rounded else out
    blocks = cdiv(cdiv(depth, tile.BLOCK_D), tile.parts)
    parts = cdiv(cdiv(depth, tile.BLOCK_D), blocks)
    partials = out.new_empty((parts, tokens, rank)) if parts > 1 else out
    shrink_kernel[(cdiv(tokens, tile.BLOCK_M), cdiv(rank, tile.BLOCK_R), parts)](
        wide,
        narrow,
        partials,
        copy,
        out if drop.seed is None else drop.seed,
        *drop.numbers,
        scaling,
        factor,
        tokens,
        depth,
        rank,
        *wide.stride(),
        *narrow.stride(),
        copy.stride(0),
        blocks,
        DROPOUT=drop.on,
        LONG_COUNTER=drop.long_counter,
        SPLIT=parts > 1,
        SCALING_IS_POINTER=isinstance(scaling, Tensor),
        HAS_ROUNDED=copy is not out,
        PRECISION=precision(wide.dtype),
        **tile.options,
    )
    if parts > 1:
        _reduce(partials, out, scaling, factor, copy)
    return copy


def _b_gradient(
    cell: LinearCell,
    dy: Tensor,  # [M, N]
    h: Tensor,  # [M, R] fp32
    lora_b: Tensor,  # [N, R]
    scaling: Tensor | float,
    factor: float,
    grad_b: Tensor,  # [N, R], written: scaling * dy^T h
    t: Tensor | None,  # [M, R] fp32, written: scaling * factor * dy B
    *,
    rounded: bool,
) -> Tensor | None:  # [M, R], t in dy's dtype if rounded
    """The gradient of B and, where its partial sums are cheaper than reading dy again, t."""
    tile = tiles.rank_gradient_tile(
        cell._replace(dropout=False), dy.shape[1], limits_of(dy.device), aligned=is_aligned(dy)
    )
    project = t is not None and tiles.projects_in_same_pass(cell, dy.shape[1], tile.BLOCK_D)
    gradient, projection = _rank_gradient(
        tile, dy, h, lora_b if project else None, NO_DROPOUT, rank_first=False
    )
    _reduce(gradient, grad_b, scaling)
    if t is None or projection is None:
        return None
    copy = _copy_for_gemm(t, dy.dtype) if rounded else t
    _reduce(projection, t, scaling, factor, copy)
    return copy


def _a_gradient(
    cell: LinearCell,
    x: Tensor,  # [M, K]
    t: Tensor,  # [M, R] fp32
    grad_a: Tensor,  # [R, K], written: t^T D(x), the dropout's scale being in t
    drop: Dropout,
) -> None:
    tile = tiles.rank_gradient_tile(cell, x.shape[1], limits_of(x.device), aligned=is_aligned(x))
    gradient, _ = _rank_gradient(tile, x, t, None, drop, rank_first=True)
    _reduce(gradient, grad_a)


def _rank_gradient(
    tile: tiles.RankGradientTile,
    wide: Tensor,  # [M, D]
    narrow: Tensor,  # [M, R] fp32
    factor: Tensor | None,  # [D, R]
    drop: Dropout,
    *,
    rank_first: bool,
) -> tuple[Tensor, Tensor | None]:
    """Partial sums of ``D(wide)^T narrow`` ``[S, D, R]`` (``[S, R, D]``) and ``wide @ factor``."""
    (tokens, depth), rank = wide.shape, narrow.shape[1]
    blocks_d = cdiv(depth, tile.BLOCK_D)
    blocks = cdiv(cdiv(tokens, tile.BLOCK_M), tile.parts)
    parts = cdiv(cdiv(tokens, tile.BLOCK_M), blocks)
    gradient = narrow.new_empty((parts, rank, depth) if rank_first else (parts, depth, rank))
    projection = None if factor is None else narrow.new_empty((blocks_d, tokens, rank))
    rank_gradient_kernel[(blocks_d, parts, cdiv(rank, tile.BLOCK_R))](
        wide,
        narrow,
        narrow if factor is None else factor,
        gradient,
        gradient if projection is None else projection,
        narrow if drop.seed is None else drop.seed,
        *drop.numbers,
        tokens,
        depth,
        rank,
        *wide.stride(),
        *((0, 0) if factor is None else factor.stride()),
        *((1, depth) if rank_first else (rank, 1)),
        blocks,
        HAS_PROJECTION=factor is not None,
        DROPOUT=drop.on,
        LONG_COUNTER=drop.long_counter,
        PRECISION=precision(wide.dtype),
        **tile.options,
    )
    return gradient, projection


def _output_gradients(
    dy: Tensor,  # [M, N]
    unscaled: Tensor | None,  # [M, N]
    output_scale: Tensor | None,  # [N]
    grad_bias: Tensor | None,  # [N], written
    grad_output_scale: Tensor | None,  # [N], written
) -> Tensor:  # [M, N]: dy, scaled if output_scale is given
    tokens, columns = dy.shape
    block_m, block_n = 16, 128
    blocks = cdiv(tokens, block_m)
    parts = min(blocks, cdiv(2 * limits_of(dy.device).multiprocessors, cdiv(columns, block_n)))
    rows_per_part = cdiv(blocks, parts) * block_m
    parts = cdiv(tokens, rows_per_part)
    scaled = dy if output_scale is None else dy.new_empty(dy.shape)
    bias_partials, scale_partials = (
        None if grad is None else grad.new_empty((parts, columns), dtype=torch.float32)
        for grad in (grad_bias, grad_output_scale)
    )
    output_gradient_kernel[(cdiv(columns, block_n), parts)](
        dy,
        dy if unscaled is None else unscaled,
        dy if output_scale is None else output_scale.contiguous(),
        scaled,
        dy if bias_partials is None else bias_partials,
        dy if scale_partials is None else scale_partials,
        tokens,
        columns,
        *dy.stride(),
        rows_per_part,
        HAS_SCALED=output_scale is not None,
        HAS_BIAS_GRADIENT=grad_bias is not None,
        HAS_SCALE_GRADIENT=grad_output_scale is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=4,
        enable_fp_fusion=FP_FUSION,
    )
    for partials, grad in ((bias_partials, grad_bias), (scale_partials, grad_output_scale)):
        if partials is not None and grad is not None:
            _reduce(partials, grad)
    return scaled


def _reduce(
    partials: Tensor,  # [S, ...] contiguous, fp32
    out: Tensor,  # [...] contiguous, written
    scaling: Tensor | float = 1.0,
    factor: float = 1.0,
    copy: Tensor | None = None,  # [..., columns], written; out itself is none
) -> None:
    """``out = scaling * factor * partials.sum(0)``, in the order of the parts."""
    rounded = out if copy is None else copy
    reduce_partials_kernel[(cdiv(out.numel(), _BLOCK),)](
        partials,
        out,
        rounded,
        scaling,
        factor,
        partials.shape[0],
        out.numel(),
        out.shape[-1],
        out.shape[-1] if rounded is out else rounded.stride(0),
        SCALING_IS_POINTER=isinstance(scaling, Tensor),
        HAS_ROUNDED=rounded is not out,
        BLOCK=_BLOCK,
        num_warps=2,
        enable_fp_fusion=FP_FUSION,
    )


def _scale_cast(factor: Tensor, scaling: Tensor | float, dtype: torch.dtype) -> Tensor:
    """``scaling * factor`` in ``dtype``, rounded once, with rows that TMA can address."""
    out = padded_rows(factor, factor.shape, dtype)
    scale_cast_kernel[(cdiv(factor.numel(), _BLOCK),)](
        factor,
        out,
        scaling,
        factor.numel(),
        factor.shape[1],
        *factor.stride(),
        out.stride(0),
        SCALING_IS_POINTER=isinstance(scaling, Tensor),
        BLOCK=_BLOCK,
        num_warps=2,
        enable_fp_fusion=FP_FUSION,
    )
    return out


def _copy_for_gemm(narrow: Tensor, dtype: torch.dtype) -> Tensor:
    """Where the rounded copy of h or t goes: itself if it is in that dtype already."""
    return narrow if narrow.dtype == dtype else padded_rows(narrow, narrow.shape, dtype)
