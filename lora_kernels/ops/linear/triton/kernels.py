"""Triton kernels of ``lora_linear`` that have the rank as one side; the wide GEMM is in
:mod:`lora_kernels.ops.narrow.triton.gemm_tail`.

Dimensions: M tokens, D the wide dimension of an activation (K of x or N of dy), R rank, S parts of
a split reduction. *Wide* is the activation ``[M, D]``, read once in its own dtype; *narrow* is a
factor or a result with R as one side.
"""
# pyright: reportInvalidTypeForm=false
# Triton's dtypes annotate arguments of kernels.

import triton
import triton.language as tl

from lora_kernels.ops.narrow.triton.narrow_dot import narrow_dot
from lora_kernels.ops.narrow.triton.philox import PLACE, keep_tile
from lora_kernels.ops.narrow.triton.reduce import load_scaling


@triton.jit(do_not_specialize=(*PLACE, "M", "blocks_per_part"))
def shrink_kernel(
    wide_ptr,  # [M, D]
    narrow_ptr,  # [R, D], any floating dtype
    out_ptr,  # [M, R] contiguous, fp32; [S, M, R] if SPLIT
    rounded_ptr,  # [M, R], rows stride_rounded apart; unused without HAS_ROUNDED
    seed_ptr,  # []
    threshold,
    first_group: tl.int64,  # where the mask stands: see MaskPlace
    groups_per_row: tl.int64,
    scaling,  # [], on the device, or a number
    factor,  # the dropout's scale
    M,
    D,
    R,
    stride_wm,
    stride_wd,
    stride_nr,
    stride_nd,
    stride_rounded,
    blocks_per_part,  # of D, for each part of the split
    DROPOUT: tl.constexpr,
    LONG_COUNTER: tl.constexpr,
    SPLIT: tl.constexpr,
    SCALING_IS_POINTER: tl.constexpr,
    HAS_ROUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``scaling * factor * D(wide) @ narrow^T`` and a copy in the dtype of the next GEMM.

    With SPLIT the parts write unscaled partial sums, which ``reduce_partials_kernel`` adds.
    """
    block_m, block_r, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
    first = part * blocks_per_part * BLOCK_D
    last = tl.minimum(D, first + blocks_per_part * BLOCK_D)
    depth = (first + tl.arange(0, BLOCK_D)).to(tl.int64)
    wide_ptrs = wide_ptr + rows[:, None] * stride_wm + depth[None, :] * stride_wd
    narrow_ptrs = narrow_ptr + depth[:, None] * stride_nd + ranks.to(tl.int64)[None, :] * stride_nr
    step = tl.full((), BLOCK_D, tl.int64)
    step_wide, step_narrow = step * stride_wd, step * stride_nd
    inside_m, inside_r = (rows < M)[:, None], (ranks < R)[None, :]
    if DROPOUT:
        seed = tl.load(seed_ptr)
    accumulator = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(first, last, BLOCK_D):
        inside = start + tl.arange(0, BLOCK_D) < D
        wide = tl.load(wide_ptrs, mask=inside_m & inside[None, :], other=0.0)
        narrow = tl.load(narrow_ptrs, mask=inside[:, None] & inside_r, other=0.0)
        if DROPOUT:
            keep = keep_tile(
                seed, rows, start, first_group, groups_per_row, threshold, 0, BLOCK_D, LONG_COUNTER
            )
            wide = tl.where(keep, wide, 0.0)
        accumulator = narrow_dot(wide, narrow, accumulator, PRECISION)
        wide_ptrs += step_wide
        narrow_ptrs += step_narrow

    inside = inside_m & inside_r
    offsets = rows[:, None] * R + ranks[None, :]
    if SPLIT:
        out_ptr += part.to(tl.int64) * M * R
        tl.store(out_ptr + offsets, accumulator, mask=inside)
    else:
        accumulator *= load_scaling(scaling, SCALING_IS_POINTER) * tl.cast(factor, tl.float32)
        tl.store(out_ptr + offsets, accumulator, mask=inside)
        if HAS_ROUNDED:
            rounded = accumulator.to(rounded_ptr.dtype.element_ty)
            rounded_ptrs = rounded_ptr + rows[:, None] * stride_rounded + ranks[None, :]
            tl.store(rounded_ptrs, rounded, mask=inside)


@triton.jit(do_not_specialize=(*PLACE, "M", "blocks_per_part"))
def rank_gradient_kernel(
    wide_ptr,  # [M, D]: dy, or x
    narrow_ptr,  # [M, R] contiguous, fp32: h, or t
    factor_ptr,  # [D, R], any floating dtype: B; unused without HAS_PROJECTION
    gradient_ptr,  # [S, D, R] fp32, strides below; one part per chunk of rows
    projection_ptr,  # [ceil(D / BLOCK_D), M, R] fp32; unused without HAS_PROJECTION
    seed_ptr,  # []
    threshold,
    first_group: tl.int64,  # where the mask stands: see MaskPlace
    groups_per_row: tl.int64,
    M,
    D,
    R,
    stride_wm,
    stride_wd,
    stride_fd,
    stride_fr,
    stride_gd,
    stride_gr,
    blocks_per_part,  # of M, for each chunk of rows
    HAS_PROJECTION: tl.constexpr,
    DROPOUT: tl.constexpr,
    LONG_COUNTER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``D(wide)^T @ narrow`` and, from the same read of wide, ``wide @ factor``.

    A program owns BLOCK_D columns and a chunk of rows. The gradient's accumulator stays in
    registers over the chunk; of the projection every program writes its columns' share.
    """
    block_d, part, block_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    columns = block_d.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    ranks = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
    first = part.to(tl.int64) * blocks_per_part * BLOCK_M
    last = tl.minimum(M, first + blocks_per_part * BLOCK_M)
    inside_d, inside_r = columns < D, (ranks < R)[None, :]
    if HAS_PROJECTION:
        factor_ptrs = factor_ptr + columns[:, None] * stride_fd
        factor_ptrs += ranks.to(tl.int64)[None, :] * stride_fr
        factor = tl.load(factor_ptrs, mask=inside_d[:, None] & inside_r, other=0.0)
        projection_ptr += block_d.to(tl.int64) * M * R
    if DROPOUT:
        seed = tl.load(seed_ptr)
    accumulator = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    for start in range(first, last, BLOCK_M):
        rows = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_M)
        inside_m = (rows < M)[:, None]
        wide_ptrs = wide_ptr + rows[:, None] * stride_wm + columns[None, :] * stride_wd
        wide = tl.load(wide_ptrs, mask=inside_m & inside_d[None, :], other=0.0)
        offsets = rows[:, None] * R + ranks[None, :]
        narrow = tl.load(narrow_ptr + offsets, mask=inside_m & inside_r, other=0.0)
        if DROPOUT:
            keep = keep_tile(
                seed, rows, block_d * BLOCK_D, first_group, groups_per_row, threshold, 0, BLOCK_D,
                LONG_COUNTER,
            )  # fmt: skip
            wide = tl.where(keep, wide, 0.0)
        accumulator = narrow_dot(tl.trans(wide), narrow, accumulator, PRECISION)
        if HAS_PROJECTION:
            projection = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            projection = narrow_dot(wide, factor, projection, PRECISION)
            tl.store(projection_ptr + offsets, projection, mask=inside_m & inside_r)

    gradient_ptrs = gradient_ptr + part.to(tl.int64) * D * R + columns[:, None] * stride_gd
    gradient_ptrs += ranks.to(tl.int64)[None, :] * stride_gr
    tl.store(gradient_ptrs, accumulator, mask=inside_d[:, None] & inside_r)


@triton.jit(do_not_specialize=("M", "rows_per_part"))
def output_gradient_kernel(
    dy_ptr,  # [M, N]
    unscaled_ptr,  # [M, N] contiguous: y before output_scale and bias
    output_scale_ptr,  # [N] contiguous
    scaled_ptr,  # [M, N] contiguous
    bias_partials_ptr,  # [S, N] fp32
    scale_partials_ptr,  # [S, N] fp32
    M,
    N,
    stride_dm,
    stride_dn,
    rows_per_part,
    HAS_SCALED: tl.constexpr,
    HAS_BIAS_GRADIENT: tl.constexpr,
    HAS_SCALE_GRADIENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of one pass over dy: ``output_scale * dy``, ``sum(dy)`` and ``sum(dy * unscaled)`` over rows.

    dy is scaled here, once, and not as the GEMMs load it: there the tile would have to pass
    through registers on its way to the matrix units, once for every block of columns.
    """
    block_n, part = tl.program_id(0), tl.program_id(1)
    columns = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = columns < N
    first = part.to(tl.int64) * rows_per_part
    last = tl.minimum(M, first + rows_per_part)
    if HAS_SCALED:
        output_scale = tl.load(output_scale_ptr + columns, mask=inside_n, other=0.0)
        output_scale = output_scale.to(tl.float32)
    bias_sum = tl.zeros((BLOCK_N,), tl.float32)
    scale_sum = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(first, last, BLOCK_M):
        rows = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_M)
        inside = (rows < last)[:, None] & inside_n[None, :]
        dy_ptrs = dy_ptr + rows[:, None] * stride_dm + columns[None, :] * stride_dn
        dy = tl.load(dy_ptrs, mask=inside, other=0.0).to(tl.float32)
        offsets = rows[:, None] * N + columns[None, :]
        if HAS_SCALED:
            scaled = (dy * output_scale[None, :]).to(scaled_ptr.dtype.element_ty)
            tl.store(scaled_ptr + offsets, scaled, mask=inside)
        if HAS_BIAS_GRADIENT:
            bias_sum += tl.sum(dy, axis=0)
        if HAS_SCALE_GRADIENT:
            unscaled = tl.load(unscaled_ptr + offsets, mask=inside, other=0.0)
            scale_sum += tl.sum(dy * unscaled.to(tl.float32), axis=0)
    offsets = part.to(tl.int64) * N + columns
    if HAS_BIAS_GRADIENT:
        tl.store(bias_partials_ptr + offsets, bias_sum, mask=inside_n)
    if HAS_SCALE_GRADIENT:
        tl.store(scale_partials_ptr + offsets, scale_sum, mask=inside_n)
