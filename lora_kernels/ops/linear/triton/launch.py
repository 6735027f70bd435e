"""``lora_linear`` on our Triton kernels: from shapes to grids.

Dimensions: M tokens, K in_features, N out_features, R rank.

Takes and returns what :mod:`composed` does; the keep-mask is never stored, every kernel regenerates
it from the seed, which it reads through a pointer. Nothing is read back from the device and nothing
tuned inside a call, so that all of it can be captured in a CUDA graph; workspaces come from torch's
allocator.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lora_kernels.ops.linear.call import Gradients, LinearCall, Result
from lora_kernels.ops.linear.triton import tiles
from lora_kernels.ops.linear.triton.gemm import gemm_with_tail
from lora_kernels.ops.linear.triton.kernels import (
    output_gradient_kernel,
    rank_gradient_kernel,
    shrink_kernel,
)
from lora_kernels.ops.linear.triton.operands import Dropout, is_aligned, scaling_argument
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
    x, base, factors = call.x, call.base, call.factors
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
            None if base is None else base.weight.t(),
            tail,
            scaled_b.t(),
            y,
            unscaled=unscaled,
            bias=call.bias,
            output_scale=factors.output_scale,
        )
    return Result(restore_leading_dims(y, x), h, None, unscaled)


def backward(call: LinearCall, gemm: Callable[..., None] = gemm_with_tail) -> Gradients:
    """``gemm`` makes dx from dy and t; the mask is always drawn again."""
    dy, factors, needs, output_scale = call.dy, call.factors, call.needs, call.factors.output_scale
    rows_dy = dy.reshape(-1, dy.shape[-1])  # [M, N]
    (tokens, out_features), (rank, columns) = rows_dy.shape, factors.a.shape
    contiguous = torch.contiguous_format
    grads = Gradients(
        rows_dy.new_empty((tokens, columns)) if needs.x else None,
        torch.empty_like(factors.a, memory_format=contiguous) if needs.lora_a else None,
        torch.empty_like(factors.b, memory_format=contiguous) if needs.lora_b else None,
        rows_dy.new_empty(out_features) if needs.bias else None,
        torch.empty_like(output_scale) if needs.output_scale else None,
    )
    if tokens == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return _with_leading_dims(grads, dy)

    cell = cell_of("backward", rows_dy, columns, out_features, rank, call.dropout is not None)
    drop = Dropout(call.dropout, tokens, columns)
    scaling = scaling_argument(factors.scaling)
    needs_t = needs.x or needs.lora_a
    with on_device(rows_dy):
        rescale = output_scale is not None and (needs_t or needs.lora_b)
        if rescale or needs.bias or needs.output_scale:
            rows_dy = _output_gradients(
                rows_dy, call.unscaled, output_scale if rescale else None, grads.bias,
                grads.output_scale,
            )  # fmt: skip
        t = rows_dy.new_empty((tokens, rank), dtype=torch.float32) if needs_t else None
        tail = None
        if needs.lora_b:
            # The dropout's scale rides on t, so that it reaches both of its products.
            tail = _b_gradient(
                cell,
                rows_dy,
                call.h.float(),
                factors.b,
                scaling,
                drop.scale,
                grads.lora_b,
                t,
                needs.x,
            )
        if t is not None and tail is None:
            narrow = factors.b.t()
            tail = _shrink(cell, rows_dy, narrow, t, None, drop.scale, scaling, rounded=needs.x)
        if needs.x:
            a = factors.a if factors.a.dtype == dy.dtype else _scale_cast(factors.a, 1.0, dy.dtype)
            weight = None if call.base is None else call.base.weight
            gemm(cell, rows_dy, weight, tail, a, grads.x, drop=drop)
        if needs.lora_a:
            _a_gradient(cell, call.x.reshape(-1, columns), t, grads.lora_a, drop)
    return _with_leading_dims(grads, dy)


def _with_leading_dims(grads: Gradients, dy: Tensor) -> Gradients:
    dx = grads.x
    return grads if dx is None else grads._replace(x=dx.view(*dy.shape[:-1], dx.shape[-1]))


def _shrink(
    cell: LinearCell,
    wide: Tensor,  # [M, D]
    narrow: Tensor,  # [R, D]
    out: Tensor,  # [M, R] fp32, written
    drop: Dropout | None,
    factor: float,
    scaling: Tensor | float = 1.0,
    rounded: bool = True,
) -> Tensor | None:  # [M, R] in wide's dtype
    """``out = scaling * factor * D(wide) @ narrow^T``, and its rounded copy if asked for."""
    (tokens, depth), rank = wide.shape, narrow.shape[0]
    tile = tiles.shrink_tile(
        cell,
        depth,
        narrow.element_size(),
        limits_of(wide.device),
        aligned=is_aligned(wide) and is_aligned(narrow),
    )
    copy = _copy_for_gemm(out, wide.dtype) if rounded else None
    blocks = cdiv(cdiv(depth, tile.BLOCK_D), tile.parts)
    parts = cdiv(cdiv(depth, tile.BLOCK_D), blocks)
    partials = out.new_empty((parts, tokens, rank)) if parts > 1 else out
    has_copy = copy is not None and copy is not out
    shrink_kernel[(cdiv(tokens, tile.BLOCK_M), cdiv(rank, tile.BLOCK_R), parts)](
        wide,
        narrow,
        partials,
        copy if has_copy else out,
        drop.seed if drop is not None and drop.on else out,
        drop.threshold if drop is not None else 0,
        drop.first_group if drop is not None else 0,
        drop.groups_per_row if drop is not None else 0,
        scaling,
        factor,
        tokens,
        depth,
        rank,
        *wide.stride(),
        *narrow.stride(),
        copy.stride(0) if has_copy else rank,
        blocks,
        DROPOUT=drop is not None and drop.on,
        LONG_COUNTER=drop is not None and drop.long_counter,
        SPLIT=parts > 1,
        SCALING_IS_POINTER=isinstance(scaling, Tensor),
        HAS_ROUNDED=has_copy,
        PRECISION=precision(wide.dtype),
        BLOCK_M=tile.BLOCK_M,
        BLOCK_D=tile.BLOCK_D,
        BLOCK_R=tile.BLOCK_R,
        num_warps=tile.num_warps,
        enable_fp_fusion=FP_FUSION,
        num_stages=tile.num_stages,
    )
    if parts > 1:
        _reduce(partials, out, scaling, factor, copy if has_copy else None)
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
    rounded: bool,
) -> Tensor | None:  # [M, R], t in dy's dtype
    """The gradient of B and, where its partial sums are cheaper than reading dy again, t."""
    tile = tiles.rank_gradient_tile(
        replace(cell, dropout=False), dy.shape[1], limits_of(dy.device), aligned=is_aligned(dy)
    )
    project = t is not None and tiles.projects_in_same_pass(cell, dy.shape[1], tile.BLOCK_D)
    gradient, projection = _rank_gradient(tile, dy, h, lora_b if project else None, None, False)
    _reduce(gradient, grad_b, scaling, 1.0, None)
    if not project:
        return None
    copy = _copy_for_gemm(t, dy.dtype) if rounded else None
    _reduce(projection, t, scaling, factor, copy if copy is not t else None)
    return copy if rounded else t


def _a_gradient(
    cell: LinearCell,
    x: Tensor,  # [M, K]
    t: Tensor,  # [M, R] fp32
    grad_a: Tensor,  # [R, K], written: t^T D(x), the dropout's scale being in t
    drop: Dropout,
) -> None:
    tile = tiles.rank_gradient_tile(cell, x.shape[1], limits_of(x.device), aligned=is_aligned(x))
    gradient, _ = _rank_gradient(tile, x, t, None, drop, True)
    _reduce(gradient, grad_a, 1.0, 1.0, None)


def _rank_gradient(
    tile: tiles.RankGradientTile,
    wide: Tensor,  # [M, D]
    narrow: Tensor,  # [M, R] fp32
    factor: Tensor | None,  # [D, R]
    drop: Dropout | None,
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
        drop.seed if drop is not None and drop.on else narrow,
        drop.threshold if drop is not None else 0,
        drop.first_group if drop is not None else 0,
        drop.groups_per_row if drop is not None else 0,
        tokens,
        depth,
        rank,
        *wide.stride(),
        *((0, 0) if factor is None else factor.stride()),
        *((1, depth) if rank_first else (rank, 1)),
        blocks,
        HAS_PROJECTION=factor is not None,
        DROPOUT=drop is not None and drop.on,
        LONG_COUNTER=drop is not None and drop.long_counter,
        PRECISION=precision(wide.dtype),
        BLOCK_M=tile.BLOCK_M,
        BLOCK_D=tile.BLOCK_D,
        BLOCK_R=tile.BLOCK_R,
        num_warps=tile.num_warps,
        enable_fp_fusion=FP_FUSION,
        num_stages=tile.num_stages,
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
    if grad_bias is not None:
        _reduce(bias_partials, grad_bias, 1.0, 1.0, None)
    if grad_output_scale is not None:
        _reduce(scale_partials, grad_output_scale, 1.0, 1.0, None)
    return scaled


def _reduce(
    partials: Tensor,  # [S, ...] contiguous, fp32
    out: Tensor,  # [...] contiguous, written
    scaling: Tensor | float,
    factor: float,
    rounded: Tensor | None,  # [..., columns], written
) -> None:
    """``out = scaling * factor * partials.sum(0)``, in the order of the parts."""
    reduce_partials_kernel[(cdiv(out.numel(), _BLOCK),)](
        partials,
        out,
        out if rounded is None else rounded,
        scaling,
        factor,
        partials.shape[0],
        out.numel(),
        out.shape[-1],
        out.shape[-1] if rounded is None else rounded.stride(0),
        SCALING_IS_POINTER=isinstance(scaling, Tensor),
        HAS_ROUNDED=rounded is not None,
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
