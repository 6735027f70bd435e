"""The frozen layer's GEMM with each row's adapter as its tail. Dimensions as in :mod:`kernels`."""

# pyright: reportArgumentType=false, reportInvalidTypeForm=false
# The kernels are Triton, not Python: annotations are its types, constexpr stands for its value.

import triton
import triton.language as tl

from lora_kernels.ops.narrow.triton.gemm_tail import accumulate, finish, tile_coordinates
from lora_kernels.ops.narrow.triton.philox import PLACE, zero_dropped_tile
from lora_kernels.ops.routed.triton.expand_kernels import tail_of_slot
from lora_kernels.ops.routed.triton.kernels import (
    factor_of_slot,
    keep_scale_of,
    rows_of_tile,
    slice_of_block,
)


@triton.jit(do_not_specialize=(*PLACE, "M", "num_tiles"))
def routed_gemm_kernel(
    left_ptr,  # [M, D]: x, or dy
    right_ptr,  # [D, C]: W^T, or W
    tail_ptr,  # [P, H] in left's dtype, rows stride_tm apart: w s h, or t
    storage_ptr,
    table_ptr,  # [L + 1, F, 3] int64
    threshold_ptr,  # [L + 1]
    tiles_ptr,  # [T, 2]
    offsets_ptr,  # [L + 2]
    tokens_ptr,  # [P]
    bias_ptr,  # [C] contiguous
    out_ptr,  # [M, C] contiguous
    seed_ptr,  # []
    first_group: tl.int64,  # where the mask stands: see MaskPlace
    groups_per_row: tl.int64,
    M,
    C,
    D,
    H,
    num_tiles,
    blocks_c,
    stride_lm,
    stride_ld,
    stride_rd,
    stride_rc,
    stride_tm,
    TO_B: tl.constexpr,  # y = x W^T + h B^T; otherwise dx = dy W + t A
    BOUNDARIES: tl.constexpr,
    NUM_FACTORS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,  # of the tail, which then goes first
    LONG_COUNTER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """The rows of each tile's tokens; those without an adapter are a group of rank 0."""
    tile, block_c = tile_coordinates(
        tl.program_id(0), num_tiles * BLOCK_M, blocks_c * BLOCK_C, BLOCK_M, BLOCK_C, GROUP_M
    )
    slot = tl.load(tiles_ptr + 2 * tile)
    if slot < 0:
        return
    index, begin, end, start = slice_of_block(block_c, C, BOUNDARIES, BLOCK_C)
    factor = 1 + index if TO_B else 0
    rank, column, offset = factor_of_slot(table_ptr, slot, factor, H, not TO_B, NUM_FACTORS)
    pairs, _, tokens, inside = rows_of_tile(
        tiles_ptr, offsets_ptr, tokens_ptr, tile, slot, M, BLOCK_M
    )
    rows = tl.where(inside, tokens, M)
    columns = start.to(tl.int64) + tl.arange(0, BLOCK_C)
    local = start - begin + tl.arange(0, BLOCK_C)
    accumulator = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    DTYPE: tl.constexpr = left_ptr.dtype.element_ty
    if DROPOUT:
        accumulator = tail_of_slot(
            accumulator, tail_ptr, storage_ptr + offset, pairs, inside, local, end - begin, rank,
            column, 1.0, 1.0, 0, stride_tm, 0, TO_B, False, PRECISION, DTYPE, BLOCK_R,
        )  # fmt: skip
        accumulator = zero_dropped_tile(
            accumulator, tl.load(seed_ptr), rows, start, first_group, groups_per_row,
            tl.load(threshold_ptr + slot), slot, LONG_COUNTER,
        )  # fmt: skip
        accumulator *= keep_scale_of(threshold_ptr, slot)
    accumulator = accumulate(
        accumulator, left_ptr, right_ptr, rows, columns, M, end, D,
        stride_lm, stride_ld, stride_rd, stride_rc, BLOCK_D, PRECISION,
    )  # fmt: skip
    if not DROPOUT:
        accumulator = tail_of_slot(
            accumulator, tail_ptr, storage_ptr + offset, pairs, inside, local, end - begin, rank,
            column, 1.0, 1.0, 0, stride_tm, 0, TO_B, False, PRECISION, DTYPE, BLOCK_R,
        )  # fmt: skip
    result = finish(accumulator, columns, end, bias_ptr, bias_ptr, HAS_BIAS, False)
    out_ptrs = out_ptr + rows[:, None] * C + columns[None, :]
    tl.store(out_ptrs, result.to(DTYPE), mask=inside[:, None] & (columns < end)[None, :])
