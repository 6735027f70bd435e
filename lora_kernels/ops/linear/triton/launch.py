"""``lora_linear`` on our Triton kernels: from shapes to grids.

Dimensions: M tokens, K in_features, N out_features, R rank.

Takes and returns what :mod:`composed` does; the keep-mask is never stored, every kernel regenerates
it from the seed, which it reads through a pointer. Nothing is read back from the device and nothing
tuned inside a call, so that all of it can be captured in a CUDA graph; workspaces come from torch's
allocator.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lora_kernels.ops.linear.triton import tiles
from lora_kernels.ops.linear.triton.gemm import gemm_with_tail
from lora_kernels.ops.linear.triton.kernels import (
    output_gradient_kernel,
    rank_gradient_kernel,
    shrink_kernel,
)
from lora_kernels.ops.linear.triton.operands import Dropout, is_aligned, scaling_argument
from lora_kernels.ops.narrow.triton.reduce import reduce_partials_kernel, scale_cast_kernel
from lora_kernels.runtime.device_limits import cdiv, limits_of, on_device, padded_rows, precision
from lora_kernels.runtime.dropout import drop_threshold, keep_scale
from lora_kernels.runtime.eager import like_rows_of

_BLOCK = 1024  # elements per program of the elementwise kernels


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
    gemm: Callable[..., None] = gemm_with_tail,
) -> tuple[Tensor, Tensor, None, Tensor | None]:
    """``(y, h, None, unscaled)``, as :func:`composed.forward`; ``gemm`` makes y from x and h."""
    rows = x.reshape(-1, x.shape[-1])  # [M, K]
    (tokens, columns), (out_features, rank) = rows.shape, lora_b.shape
    y = rows.new_empty((tokens, out_features))
    unscaled = torch.empty_like(y) if save_unscaled else None
    h = rows.new_empty((tokens, rank), dtype=torch.float32)
    if tokens == 0:
        return like_rows_of(x, y), h, None, unscaled
    cell = _cell("forward", rows, columns, out_features, rank, dropout_p)
    drop = Dropout(seed, dropout_p, tokens, columns)
    with on_device(rows):
        tail = _shrink(cell, rows, lora_a, h, drop, keep_scale(dropout_p))
        scaled_b = _scale_cast(lora_b, scaling_argument(scaling), x.dtype)  # [N, R]
        gemm(
            cell,
            rows,
            None if weight is None else weight.t(),
            tail,
            scaled_b.t(),
            y,
            unscaled=unscaled,
            bias=bias,
            output_scale=output_scale,
        )
    return like_rows_of(x, y), h, None, unscaled


def backward(
    dy: Tensor,  # [..., N]
    x: Tensor | None,  # [..., K], needed for the gradient of A
    weight: Tensor | None,  # [N, K]
    lora_a: Tensor,  # [R, K]
    lora_b: Tensor,  # [N, R]
    scaling: Tensor,  # []
    h: Tensor | None,  # [M, R] fp32, needed for the gradient of B
    output_scale: Tensor | None,  # [N]
    unscaled: Tensor | None,  # [M, N], needed for the gradient of output_scale
    mask: None,
    dropout_p: float,
    seed: Tensor | None,
    needs: tuple[bool, bool, bool, bool, bool],  # x, lora_a, lora_b, bias, output_scale
    gemm: Callable[..., None] = gemm_with_tail,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, lora_a, lora_b, bias and output_scale, as :func:`composed.backward`.

    ``gemm`` makes dx from dy and t.
    """
    needs_x, needs_a, needs_b, needs_bias, needs_output_scale = needs
    rows_dy = dy.reshape(-1, dy.shape[-1])  # [M, N]
    (tokens, out_features), (rank, columns) = rows_dy.shape, lora_a.shape
    dx = rows_dy.new_empty((tokens, columns)) if needs_x else None
    grad_a = torch.empty_like(lora_a, memory_format=torch.contiguous_format) if needs_a else None
    grad_b = torch.empty_like(lora_b, memory_format=torch.contiguous_format) if needs_b else None
    grad_bias = rows_dy.new_empty(out_features) if needs_bias else None
    grad_output_scale = torch.empty_like(output_scale) if needs_output_scale else None
    grads = (dx, grad_a, grad_b, grad_bias, grad_output_scale)
    if tokens == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return (dx if dx is None else dx.view(*dy.shape[:-1], columns), *grads[1:])

    cell = _cell("backward", rows_dy, columns, out_features, rank, dropout_p)
    drop = Dropout(seed, dropout_p, tokens, columns)
    scaling = scaling_argument(scaling)
    with on_device(rows_dy):
        rescale = output_scale is not None and (needs_x or needs_a or needs_b)
        if rescale or needs_bias or needs_output_scale:
            rows_dy = _output_gradients(
                rows_dy, unscaled, output_scale if rescale else None, grad_bias, grad_output_scale
            )
        t = tail = None
        if needs_x or needs_a:
            t = rows_dy.new_empty((tokens, rank), dtype=torch.float32)
        if needs_b:
            # The dropout's scale rides on t, so that it reaches both of its products.
            tail = _b_gradient(
                cell, rows_dy, h, lora_b, scaling, keep_scale(dropout_p), grad_b, t, needs_x
            )
        if t is not None and tail is None:
            factor = keep_scale(dropout_p)
            tail = _shrink(cell, rows_dy, lora_b.t(), t, None, factor, scaling, rounded=needs_x)
        if needs_x:
            a = lora_a if lora_a.dtype == dy.dtype else _scale_cast(lora_a, 1.0, dy.dtype)
            gemm(cell, rows_dy, weight, tail, a, dx, drop=drop)
            dx = dx.view(*dy.shape[:-1], columns)
        if needs_a:
            _a_gradient(cell, x.reshape(-1, columns), t, grad_a, drop)
    return dx, *grads[1:]


def _shrink(
    cell: tiles.Cell,
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
        num_stages=tile.num_stages,
    )
    if parts > 1:
        _reduce(partials, out, scaling, factor, copy if has_copy else None)
    return copy


def _b_gradient(
    cell: tiles.Cell,
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
        _without_dropout(cell), dy.shape[1], limits_of(dy.device), aligned=is_aligned(dy)
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
    cell: tiles.Cell,
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
        num_warps=4,
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
        num_warps=4,
    )
    return out


def _copy_for_gemm(narrow: Tensor, dtype: torch.dtype) -> Tensor:
    """Where the rounded copy of h or t goes: itself if it is in that dtype already."""
    return narrow if narrow.dtype == dtype else padded_rows(narrow, narrow.shape, dtype)


def _cell(direction, activation, in_features, out_features, rank, dropout_p) -> tiles.Cell:
    dtype = activation.dtype
    return tiles.Cell(
        direction=direction,
        dtype=str(dtype).removeprefix("torch."),
        itemsize=dtype.itemsize,
        tokens=activation.shape[0],
        in_features=in_features,
        out_features=out_features,
        rank=rank,
        dropout=drop_threshold(dropout_p) > 0,
        ieee=dtype == torch.float32 and precision(dtype) == "ieee",
    )


def _without_dropout(cell: tiles.Cell) -> tiles.Cell:
    return tiles.replace(cell, dropout=False)
