"""Triton kernels of ``routed_lora`` with wide results: y, dx. Dimensions as in :mod:`kernels`."""

# pyright: reportArgumentType=false, reportInvalidTypeForm=false
# The kernels are Triton, not Python: annotations are its types, constexpr stands for its value.

import triton
import triton.language as tl

from lora_kernels.ops.narrow.triton.philox import PLACE, zero_dropped_tile
from lora_kernels.ops.routed.triton.kernels import (
    VECTOR,
    factor_of_slot,
    keep_scale_of,
    rows_of_tile,
    scale_of_pairs,
    slice_of_block,
)


@triton.jit
def tail_sum(
    accumulator,  # [BLOCK_M, BLOCK_C] fp32
    tail_ptr,  # [P, H] of the factor's columns; [parts, P, H] if PARTIALS
    factor_ptr,  # [R, C], any strides
    pairs,  # [BLOCK_M] int64
    inside_m,  # [BLOCK_M]
    columns,  # [BLOCK_C] of the factor
    num_columns,
    rank,
    keep_scale,
    scale,  # [BLOCK_M, 1], or a scalar
    parts,
    stride_tm,
    stride_part,
    stride_fr,
    stride_fc,
    PARTIALS: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``accumulator + tail @ factor`` with both in DTYPE."""
    ranks = tl.arange(0, BLOCK_R)
    inside_c = (columns < num_columns)[None, :]
    factor_ptrs = factor_ptr + ranks.to(tl.int64)[:, None] * stride_fr
    factor_ptrs += columns.to(tl.int64)[None, :] * stride_fc
    tail_ptrs = tail_ptr + pairs[:, None] * stride_tm + ranks[None, :]
    step = tl.full((), BLOCK_R, tl.int64) * stride_fr
    for start in range(0, rank, BLOCK_R):
        inside_r = ranks < rank - start
        inside = inside_m[:, None] & inside_r[None, :]
        if PARTIALS:
            tail = tl.zeros((accumulator.shape[0], BLOCK_R), tl.float32)
            part_ptrs = tail_ptrs
            for _part in range(parts):
                tail += tl.load(part_ptrs, mask=inside, other=0.0).to(tl.float32)
                part_ptrs += stride_part
            tail = (tail * keep_scale * scale).to(DTYPE)
        else:
            tail = tl.load(tail_ptrs, mask=inside, other=0.0)
        factor = tl.load(factor_ptrs, mask=inside_r[:, None] & inside_c, other=0.0).to(DTYPE)
        accumulator = tl.dot(tail, factor, accumulator, input_precision=PRECISION)
        tail_ptrs += BLOCK_R
        factor_ptrs += step
    return accumulator


@triton.jit
def tail_of_slot(
    accumulator,  # [BLOCK_M, BLOCK_C] fp32
    tail_ptr,  # [P, H], rows stride_tm apart; [parts, P, H] if PARTIALS
    factor_ptr,  # B of a slice [C, R] if TO_B, A [R, C] otherwise; contiguous
    pairs,  # [BLOCK_M] int64
    inside_m,  # [BLOCK_M]
    columns,  # [BLOCK_C] of the factor
    num_columns,
    rank,
    column,  # of the tail: where the slice begins
    keep_scale,
    scale,
    parts,
    stride_tm,
    stride_part,
    TO_B: tl.constexpr,
    PARTIALS: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``accumulator + tail @ B^T`` of one slice, or ``+ tail @ A``."""
    if not TO_B:
        accumulator = tail_sum(
            accumulator, tail_ptr, factor_ptr, pairs, inside_m, columns, num_columns, rank,
            keep_scale, scale, parts, stride_tm, stride_part, num_columns, 1,
            PARTIALS, PRECISION, DTYPE, BLOCK_R,
        )  # fmt: skip
    elif (rank % VECTOR == 0) & (column % VECTOR == 0):
        # The same numbers, known to the compiler as multiples.
        pitch = rank // VECTOR * VECTOR
        accumulator = tail_sum(
            accumulator, tail_ptr + column // VECTOR * VECTOR, factor_ptr, pairs, inside_m,
            columns, num_columns, pitch, keep_scale, scale, parts, stride_tm, stride_part, 1,
            pitch, PARTIALS, PRECISION, DTYPE, BLOCK_R,
        )  # fmt: skip
    else:
        accumulator = tail_sum(
            accumulator, tail_ptr + column, factor_ptr, pairs, inside_m, columns, num_columns,
            rank, keep_scale, scale, parts, stride_tm, stride_part, 1, rank,
            PARTIALS, PRECISION, DTYPE, BLOCK_R,
        )  # fmt: skip
    return accumulator


@triton.jit(do_not_specialize=(*PLACE, "M", "P", "parts"))
def routed_expand_kernel(
    tail_ptr,  # [P, H] in out's dtype, rows stride_tm apart; [parts, P, H] if PARTIALS
    storage_ptr,
    table_ptr,
    scaling_ptr,
    threshold_ptr,
    tiles_ptr,
    offsets_ptr,
    tokens_ptr,
    weights_ptr,
    out_ptr,  # [M, C], any strides; [P, C] if BY_PAIR
    has_delta_ptr,  # [S, P] int8; unused without BY_PAIR
    seed_ptr,
    first_group: tl.int64,  # where the mask stands: see MaskPlace
    groups_per_row: tl.int64,
    M,
    P,
    C,  # columns: N of all slices, or K
    H,
    parts,
    stride_tm,
    stride_om,
    stride_oc,
    TO_B: tl.constexpr,  # y += h B^T slice by slice; otherwise dx += t A
    BOUNDARIES: tl.constexpr,
    NUM_FACTORS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    PARTIALS: tl.constexpr,  # the tail is a split shrink's parts, neither scaled nor rounded
    PARTIALS_DROPPED: tl.constexpr,  # nor multiplied by the dropout's scale
    OVERWRITE: tl.constexpr,  # out is new: rows without an adapter become zero
    BY_PAIR: tl.constexpr,  # out has a row for each pair, to be added to their tokens later
    DROPOUT: tl.constexpr,  # of the result, as of the [M, C] activation that it is added to
    LONG_COUNTER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Add ``tail @ B^T`` (or ``D(tail @ A)``) to the rows of each pair's token."""
    tile, block_c = tl.program_id(0), tl.program_id(1)
    slot = tl.load(tiles_ptr + 2 * tile)
    if slot < 0:
        return
    index, begin, end, start = slice_of_block(block_c, C, BOUNDARIES, BLOCK_C)
    factor = 1 + index if TO_B else 0
    rank, column, offset = factor_of_slot(table_ptr, slot, factor, H, not TO_B, NUM_FACTORS)
    pairs, inside, rows, inside_m = rows_of_tile(
        tiles_ptr, offsets_ptr, tokens_ptr, tile, slot, M, BLOCK_M
    )
    if BY_PAIR and start == begin:
        has_delta = tl.where(rank > 0, 1, 0) + tl.zeros((BLOCK_M,), tl.int8)
        tl.store(has_delta_ptr + index.to(tl.int64) * P + pairs, has_delta.to(tl.int8), mask=inside)
    if not OVERWRITE and rank <= 0:
        return

    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    keep_scale, scale = 1.0, 1.0
    if PARTIALS:
        scale = scale_of_pairs(scaling_ptr, weights_ptr, slot, pairs, inside, HAS_WEIGHTS)
    if PARTIALS_DROPPED:
        keep_scale = keep_scale_of(threshold_ptr, slot)
    accumulator = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    local = start - begin + tl.arange(0, BLOCK_C)
    stride_part = tl.cast(P, tl.int64) * stride_tm
    accumulator = tail_of_slot(
        accumulator, tail_ptr, storage_ptr + offset, pairs, inside, local, end - begin, rank,
        column, keep_scale, scale, parts, stride_tm, stride_part, TO_B, PARTIALS, PRECISION, DTYPE,
        BLOCK_R,
    )  # fmt: skip
    if DROPOUT:
        accumulator = zero_dropped_tile(
            accumulator, tl.load(seed_ptr), rows, start, first_group, groups_per_row,
            tl.load(threshold_ptr + slot), slot, LONG_COUNTER,
        )  # fmt: skip
        accumulator *= keep_scale_of(threshold_ptr, slot)

    columns = start.to(tl.int64) + tl.arange(0, BLOCK_C)
    inside_c = (columns < end)[None, :]
    if BY_PAIR:
        out_ptrs = out_ptr + pairs[:, None] * stride_om + columns[None, :] * stride_oc
    else:
        out_ptrs = out_ptr + rows[:, None] * stride_om + columns[None, :] * stride_oc
    write = inside_m[:, None] & inside_c
    if not OVERWRITE and not BY_PAIR:
        accumulator += tl.load(out_ptrs, mask=write, other=0.0).to(tl.float32)
    tl.store(out_ptrs, accumulator.to(DTYPE), mask=write)


@triton.jit(do_not_specialize=("M", "P"))
def routed_combine_kernel(
    deltas_ptr,  # [P, C] contiguous
    has_delta_ptr,  # [S, P] int8
    inverse_ptr,  # [P]
    out_ptr,  # [M, C], any strides
    M,
    P,
    C,
    stride_om,
    stride_oc,
    PAIRS_PER_TOKEN: tl.constexpr,
    BOUNDARIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add the deltas of each token's pairs to its row, in the order of its pairs.

    A pair without one is passed over: its row of deltas was never written.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    index, _, end, start = slice_of_block(tl.program_id(1), C, BOUNDARIES, BLOCK_C)
    columns = start.to(tl.int64) + tl.arange(0, BLOCK_C)
    inside_c = (columns < end)[None, :]
    has_delta_ptr += index.to(tl.int64) * P
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    changed = rows < 0
    for j in range(PAIRS_PER_TOKEN):
        pairs = tl.load(inverse_ptr + rows * PAIRS_PER_TOKEN + j, mask=rows < M, other=0)
        used = tl.load(has_delta_ptr + pairs, mask=rows < M, other=0) != 0
        delta_ptrs = deltas_ptr + pairs.to(tl.int64)[:, None] * C + columns[None, :]
        total += tl.load(delta_ptrs, mask=used[:, None] & inside_c, other=0.0).to(tl.float32)
        changed = changed | used
    write = changed[:, None] & inside_c
    out_ptrs = out_ptr + rows[:, None] * stride_om + columns[None, :] * stride_oc
    total += tl.load(out_ptrs, mask=write, other=0.0).to(tl.float32)
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=write)
