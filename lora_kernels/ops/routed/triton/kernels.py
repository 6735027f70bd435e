"""Triton kernels of ``routed_lora`` with narrow results, and what all its kernels share.

Dimensions: M tokens, P pairs of a token and an adapter, L slots, S slices, K in_features, N_s
out_features of slice s, R_s an adapter's rank there, R their sum, H the widest R of the bank, T
tiles, F factors (1 + S: A of all slices ``[R, K]``, then B of each ``[N_s, R_s]``).

A tile is at most BLOCK_M neighbouring pairs of one slot. Its rows of x or dy are gathered by token,
its factors are found through the bank's table; what the adapter does not have costs an early exit.
Slot L stands for no adapter: its rank in the table is 0, so that nothing of x is read for it.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false
# The kernels are Triton, not Python: constexpr stands for its value, and static_range iterates.

import triton
import triton.language as tl

from lora_kernels.ops.narrow.triton.narrow_dot import narrow_dot
from lora_kernels.ops.narrow.triton.philox import PLACE, keep_tile

# Every factor begins at a multiple of this many elements of the storage.
ALIGNMENT = tl.constexpr(64)
# Ranks that are multiples of this take loads of 16 bytes (of halves).
VECTOR = tl.constexpr(8)


@triton.jit
def slice_of_block(
    block,
    columns,  # of all slices
    BOUNDARIES: tl.constexpr,  # where slices begin, and the end; () for a single one
    BLOCK: tl.constexpr,
):
    """``(slice, its first column, its end, the block's first column)``; no block spans slices."""
    index, begin, end, start = block * 0, block * 0, columns, block * BLOCK
    before = 0
    for s in tl.static_range(len(BOUNDARIES) - 1):
        here = block >= before
        index = tl.where(here, s, index)
        begin = tl.where(here, BOUNDARIES[s], begin)
        end = tl.where(here, BOUNDARIES[s + 1], end)
        start = tl.where(here, BOUNDARIES[s] + (block - before) * BLOCK, start)
        before += (BOUNDARIES[s + 1] - BOUNDARIES[s] + BLOCK - 1) // BLOCK
    return index, begin, end, start


@triton.jit
def factor_of_slot(table_ptr, slot, factor, width, OF_A: tl.constexpr, NUM_FACTORS: tl.constexpr):
    """``(rank, first column in h, offset in storage)`` of one factor of a slot."""
    row = table_ptr + (slot.to(tl.int64) * NUM_FACTORS + factor) * 3
    # A constant, where it is one, lets rows of h be read 16 bytes at a time.
    column = 0 if OF_A or NUM_FACTORS == 2 else tl.load(row + 1).to(tl.int32)
    # h has no room for more, should a wider adapter have come after a graph was captured.
    rank = tl.minimum(tl.load(row).to(tl.int32), width - column)
    return rank, column, tl.multiple_of(tl.load(row + 2), ALIGNMENT)


@triton.jit
def rows_of_tile(tiles_ptr, offsets_ptr, tokens_ptr, tile, slot, M, BLOCK_M: tl.constexpr):
    """``(pairs, whether they are the slot's, tokens, whether these are rows of x)`` of a tile."""
    pairs = tl.load(tiles_ptr + 2 * tile + 1) + tl.arange(0, BLOCK_M)
    inside = pairs < tl.load(offsets_ptr + slot + 1)
    tokens = tl.load(tokens_ptr + pairs, mask=inside, other=0)
    return pairs.to(tl.int64), inside, tokens.to(tl.int64), inside & (tokens < M)


@triton.jit
def keep_scale_of(threshold_ptr, slot):
    """What the elements that a slot's dropout keeps are multiplied by."""
    return tl.div_rn(65536.0, (65536 - tl.load(threshold_ptr + slot)).to(tl.float32))


@triton.jit
def scale_of_pairs(
    scaling_ptr, weights_ptr, slot, pairs, inside, HAS_WEIGHTS: tl.constexpr
):  # [BLOCK_M] fp32, or a scalar
    """``w s`` of each pair."""
    scale = tl.load(scaling_ptr + slot).to(tl.float32)
    if HAS_WEIGHTS:
        weights = tl.load(weights_ptr + pairs, mask=inside, other=0.0)
        scale = scale * weights.to(tl.float32)[:, None]
    return scale


@triton.jit
def narrow_sum(
    accumulator,  # [BLOCK_M, BLOCK_R] fp32
    wide_ptr,  # [M, D]
    narrow_ptr,  # [D, R], any strides
    rows,  # [BLOCK_M] int64
    inside_m,  # [BLOCK_M]
    ranks,  # [BLOCK_R]
    rank,
    first,
    last,
    depth,
    stride_wm,
    stride_wd,
    stride_nd,
    stride_nr,
    seed_ptr,
    first_group,
    groups_per_row,
    threshold,
    stream,
    DROPOUT: tl.constexpr,
    LONG_COUNTER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``accumulator + D(wide) @ narrow`` over the columns ``first .. last - 1`` of wide."""
    depths = (first + tl.arange(0, BLOCK_D)).to(tl.int64)
    wide_ptrs = wide_ptr + rows[:, None] * stride_wm + depths[None, :] * stride_wd
    narrow_ptrs = narrow_ptr + depths[:, None] * stride_nd
    narrow_ptrs += ranks.to(tl.int64)[None, :] * stride_nr
    step = tl.full((), BLOCK_D, tl.int64)
    step_wide, step_narrow = step * stride_wd, step * stride_nd
    inside_r = (ranks < rank)[None, :]
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for start in range(first, last, BLOCK_D):
        inside = start + tl.arange(0, BLOCK_D) < depth
        wide = tl.load(wide_ptrs, mask=inside_m[:, None] & inside[None, :], other=0.0)
        narrow = tl.load(narrow_ptrs, mask=inside[:, None] & inside_r, other=0.0)
        if DROPOUT:
            keep = keep_tile(
                seed, rows, start, first_group, groups_per_row, threshold, stream, BLOCK_D,
                LONG_COUNTER,
            )  # fmt: skip
            wide = tl.where(keep, wide, 0.0)
        accumulator = narrow_dot(wide, narrow, accumulator, PRECISION)
        wide_ptrs += step_wide
        narrow_ptrs += step_narrow
    return accumulator


@triton.jit(do_not_specialize=(*PLACE, "M", "P", "blocks_per_part"))
def routed_shrink_kernel(
    wide_ptr,  # [M, D]: x, or dy of all slices
    storage_ptr,
    table_ptr,  # [L + 1, F, 3] int64
    scaling_ptr,  # [L + 1]
    threshold_ptr,  # [L + 1]
    tiles_ptr,  # [T, 2]
    offsets_ptr,  # [L + 2]
    tokens_ptr,  # [P]
    weights_ptr,  # [P]; unused without HAS_WEIGHTS
    out_ptr,  # [P, H] fp32; [parts, P, H] if SPLIT; unused without HAS_OUT
    rounded_ptr,  # [P, H], rows stride_rounded apart; unused without HAS_ROUNDED
    seed_ptr,  # []
    first_group: tl.int64,  # where the mask stands: see MaskPlace
    groups_per_row: tl.int64,
    M,
    P,
    D,
    H,
    blocks_r,  # of H
    stride_wm,
    stride_wd,
    stride_rounded,
    blocks_per_part,  # of the depth
    OF_A: tl.constexpr,  # x A^T; otherwise dy B, slice by slice
    BOUNDARIES: tl.constexpr,
    NUM_FACTORS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_ROUNDED: tl.constexpr,
    OUT_IS_SCALED: tl.constexpr,  # by w s, as the rounded copy always is
    FILL: tl.constexpr,  # zeros in out where there is no rank
    SPLIT: tl.constexpr,
    DROPOUT: tl.constexpr,
    LONG_COUNTER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``h = D(x) A^T`` or ``t = w s dy B`` of every pair, and a rounded copy that carries ``w s``.

    With SPLIT the parts of the depth write plain partial sums.
    """
    tile, part, index = tl.program_id(0) // blocks_r, tl.program_id(1), tl.program_id(2)
    first_rank = tl.program_id(0) % blocks_r * BLOCK_R
    slot = tl.load(tiles_ptr + 2 * tile)
    if slot < 0:
        return
    begin, depth, last_index = 0, D, 0
    if not OF_A:
        for s in tl.static_range(len(BOUNDARIES) - 1):
            begin = tl.where(index == s, BOUNDARIES[s], begin)
            depth = tl.where(index == s, BOUNDARIES[s + 1] - BOUNDARIES[s], depth)
        last_index = NUM_FACTORS - 2
    factor = 0 if OF_A else 1 + index
    rank, column, offset = factor_of_slot(table_ptr, slot, factor, H, OF_A, NUM_FACTORS)
    # The last slice also fills what lies beyond its columns.
    limit = tl.where(FILL and index == last_index, H - column, rank)
    if first_rank >= limit:
        return

    pairs, inside, rows, inside_m = rows_of_tile(
        tiles_ptr, offsets_ptr, tokens_ptr, tile, slot, M, BLOCK_M
    )
    ranks = first_rank + tl.arange(0, BLOCK_R)
    first = part * blocks_per_part * BLOCK_D
    last = tl.minimum(depth, first + blocks_per_part * BLOCK_D)
    last = tl.where(first_rank < rank, last, first)
    threshold = 0
    if DROPOUT:
        threshold = tl.load(threshold_ptr + slot)
    accumulator = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if OF_A:
        accumulator = narrow_sum(
            accumulator, wide_ptr, storage_ptr + offset, rows, inside_m, ranks, rank, first, last,
            D, stride_wm, stride_wd, 1, D, seed_ptr, first_group, groups_per_row, threshold, slot,
            DROPOUT, LONG_COUNTER, PRECISION, BLOCK_D,
        )  # fmt: skip
    else:
        wide_ptr += tl.cast(begin, tl.int64) * stride_wd
        if rank % VECTOR == 0:
            # The same number, known to the compiler as a multiple.
            pitch = rank // VECTOR * VECTOR
            accumulator = narrow_sum(
                accumulator, wide_ptr, storage_ptr + offset, rows, inside_m, ranks, pitch, first,
                last, depth, stride_wm, stride_wd, pitch, 1, seed_ptr, first_group,
                groups_per_row, threshold, slot, DROPOUT, LONG_COUNTER, PRECISION, BLOCK_D,
            )  # fmt: skip
        else:
            accumulator = narrow_sum(
                accumulator, wide_ptr, storage_ptr + offset, rows, inside_m, ranks, rank, first,
                last, depth, stride_wm, stride_wd, rank, 1, seed_ptr, first_group,
                groups_per_row, threshold, slot, DROPOUT, LONG_COUNTER, PRECISION, BLOCK_D,
            )  # fmt: skip

    has_rank = (ranks < rank)[None, :]
    inside_out = inside[:, None] & (ranks < limit)[None, :]
    columns = column + ranks
    out_ptrs = out_ptr + pairs[:, None] * H + columns[None, :]
    if SPLIT:
        tl.store(out_ptrs + part.to(tl.int64) * P * H, accumulator, mask=inside_out)
    else:
        store_sum(
            accumulator, pairs, inside, has_rank, inside_out, columns, slot, out_ptrs, rounded_ptr,
            scaling_ptr, threshold_ptr, weights_ptr, stride_rounded,
            HAS_WEIGHTS, HAS_OUT, HAS_ROUNDED, OUT_IS_SCALED, DROPOUT,
        )  # fmt: skip


@triton.jit
def store_sum(
    total,  # [BLOCK_M, BLOCK_R] fp32
    pairs,  # [BLOCK_M] int64
    inside,  # [BLOCK_M]
    has_rank,  # [1, BLOCK_R]
    inside_out,  # [BLOCK_M, BLOCK_R]
    columns,  # [BLOCK_R]
    slot,
    out_ptrs,  # [BLOCK_M, BLOCK_R]
    rounded_ptr,
    scaling_ptr,
    threshold_ptr,
    weights_ptr,
    stride_rounded,
    HAS_WEIGHTS: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_ROUNDED: tl.constexpr,
    OUT_IS_SCALED: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Scale a tile of h or t and write it, and its copy for the product that follows.

    That one is read from memory as it was rounded here, so that no product has to take it from
    registers: on sm_90, ptxas before 13.3 may overwrite a left operand there while a pipelined
    product still reads it (triton#9433).
    """
    if DROPOUT:
        total *= keep_scale_of(threshold_ptr, slot)
    scaled = total
    if HAS_ROUNDED or OUT_IS_SCALED:
        scaled *= scale_of_pairs(scaling_ptr, weights_ptr, slot, pairs, inside, HAS_WEIGHTS)
    if HAS_OUT:
        # Not 0 * s: a scaling may be infinite.
        out = tl.where(has_rank, scaled if OUT_IS_SCALED else total, 0.0)
        tl.store(out_ptrs, out, mask=inside_out)
    if HAS_ROUNDED:
        rounded_ptrs = rounded_ptr + pairs[:, None] * stride_rounded + columns[None, :]
        rounded = scaled.to(rounded_ptr.dtype.element_ty)
        tl.store(rounded_ptrs, rounded, mask=inside_out & has_rank)


@triton.jit(do_not_specialize=("P", "parts"))
def routed_finish_kernel(
    partials_ptr,  # [parts, P, H], rows stride_pm apart; h itself where parts is 1
    h_ptr,  # [P, H], rows stride_hm apart; unused without HAS_WEIGHT_GRADIENT
    table_ptr,
    scaling_ptr,
    threshold_ptr,
    tiles_ptr,
    offsets_ptr,
    weights_ptr,
    out_ptr,  # [P, H] fp32
    rounded_ptr,  # [P, H], rows stride_rounded apart
    weight_gradient_ptr,  # [P]
    P,
    H,
    parts,
    stride_pm,
    stride_hm,
    stride_rounded,
    NUM_FACTORS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_ROUNDED: tl.constexpr,
    HAS_WEIGHT_GRADIENT: tl.constexpr,
    OUT_IS_SCALED: tl.constexpr,
    FILL: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Add the parts of a split shrink in their order, and finish as the shrink would have.

    With HAS_WEIGHT_GRADIENT also ``s sum_r (partials * h)`` of each pair, over its adapter's rank.
    """
    tile = tl.program_id(0)
    slot = tl.load(tiles_ptr + 2 * tile)
    if slot < 0:
        return
    rank, _, _ = factor_of_slot(table_ptr, slot, 0, H, True, NUM_FACTORS)
    pairs = (tl.load(tiles_ptr + 2 * tile + 1) + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside = pairs < tl.load(offsets_ptr + slot + 1)
    weight_gradient = tl.zeros((BLOCK_M,), tl.float32)
    limit = tl.where(FILL, H, rank)
    for first_rank in range(0, limit, BLOCK_R):
        ranks = first_rank + tl.arange(0, BLOCK_R)
        has_rank = (ranks < rank)[None, :]
        read = inside[:, None] & has_rank
        total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        partial_ptrs = partials_ptr + pairs[:, None] * stride_pm + ranks[None, :]
        for _part in range(parts):
            total += tl.load(partial_ptrs, mask=read, other=0.0).to(tl.float32)
            partial_ptrs += tl.cast(P, tl.int64) * stride_pm
        if HAS_WEIGHT_GRADIENT:
            h = tl.load(h_ptr + pairs[:, None] * stride_hm + ranks[None, :], mask=read, other=0.0)
            weight_gradient += tl.sum(total * h.to(tl.float32), axis=1)
        store_sum(
            total, pairs, inside, has_rank, inside[:, None] & (ranks < limit)[None, :], ranks,
            slot, out_ptr + pairs[:, None] * H + ranks[None, :], rounded_ptr,
            scaling_ptr, threshold_ptr, weights_ptr, stride_rounded,
            HAS_WEIGHTS, HAS_OUT, HAS_ROUNDED, OUT_IS_SCALED, DROPOUT,
        )  # fmt: skip
    if HAS_WEIGHT_GRADIENT:
        weight_gradient *= tl.load(scaling_ptr + slot).to(tl.float32)
        weight_gradient = tl.where(rank > 0, weight_gradient, 0.0)
        result = weight_gradient.to(weight_gradient_ptr.dtype.element_ty)
        tl.store(weight_gradient_ptr + pairs, result, mask=inside)
