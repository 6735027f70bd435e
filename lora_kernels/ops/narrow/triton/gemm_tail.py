"""A GEMM whose reduction continues past its end into the rank: ``[left | l] @ [right ; r]``.

Dimensions: M rows, C columns of the result, D the main reduction, R rank.

    out = output_scale * (left [M, D] @ right [D, C] + tail_left [M, R] @ tail_right [R, C]) + bias

The tail is a second short loop on the same accumulator, whatever the rank: it needs no registers
and no shared memory of its own. Under dropout the tail is masked, so it goes first:
``keep * (tail_left @ tail_right)`` is what the main reduction starts from.

Two versions: pointers, one tile per program, any strides and alignment; and persistent with tensor
descriptors (TMA), for 16-byte aligned operands. The descriptors are made on the host: they travel
as kernel arguments, so that a launch needs no workspace and no allocator.
"""
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false
# Triton's dtypes annotate arguments of kernels, and its ranges have no __iter__.

import triton
import triton.language as tl

from lora_kernels.ops.narrow.triton.philox import PLACE, zero_dropped_tile


@triton.jit
def tile_coordinates(
    tile, M, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, GROUP_M: tl.constexpr
):
    """Block row and block column of a tile: GROUP_M block rows at a time, for reuse in L2."""
    blocks_m, blocks_c = tl.cdiv(M, BLOCK_M), tl.cdiv(C, BLOCK_C)
    tiles_per_group = GROUP_M * blocks_c
    first_m = tile // tiles_per_group * GROUP_M
    group_m = tl.minimum(blocks_m - first_m, GROUP_M)
    in_group = tile % tiles_per_group
    return first_m + in_group % group_m, in_group // group_m


@triton.jit
def finish(
    accumulator,  # [BLOCK_M, BLOCK] fp32
    columns,  # [BLOCK]
    C,
    bias_ptr,  # [C]
    output_scale_ptr,  # [C]
    HAS_BIAS: tl.constexpr,
    HAS_OUTPUT_SCALE: tl.constexpr,
):
    """The epilogue in fp32: ``output_scale * accumulator + bias``."""
    if HAS_OUTPUT_SCALE:
        output_scale = tl.load(output_scale_ptr + columns, mask=columns < C, other=0.0)
        accumulator *= output_scale.to(tl.float32)[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < C, other=0.0)
        accumulator += bias.to(tl.float32)[None, :]
    return accumulator


@triton.jit
def accumulate(
    accumulator,  # [BLOCK_M, BLOCK_C] fp32
    left_ptr,  # [M, depth]
    right_ptr,  # [depth, C]
    rows,  # [BLOCK_M] int64
    columns,  # [BLOCK_C] int64
    M,
    C,
    depth,
    stride_lm,
    stride_ld,
    stride_rd,
    stride_rc,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``accumulator + left @ right`` for one tile, by pointers."""
    offsets = tl.arange(0, BLOCK).to(tl.int64)
    left_ptrs = left_ptr + rows[:, None] * stride_lm + offsets[None, :] * stride_ld
    right_ptrs = right_ptr + offsets[:, None] * stride_rd + columns[None, :] * stride_rc
    inside_m, inside_c = (rows < M)[:, None], (columns < C)[None, :]
    step = tl.full((), BLOCK, tl.int64)
    step_left, step_right = step * stride_ld, step * stride_rd
    for start in range(0, depth, BLOCK):
        inside = offsets < depth - start
        left = tl.load(left_ptrs, mask=inside_m & inside[None, :], other=0.0)
        right = tl.load(right_ptrs, mask=inside[:, None] & inside_c, other=0.0)
        accumulator = tl.dot(left, right, accumulator, input_precision=PRECISION)
        left_ptrs += step_left
        right_ptrs += step_right
    return accumulator


@triton.jit(do_not_specialize=(*PLACE, "M"))
def gemm_tail_kernel(
    left_ptr,  # [M, D]
    right_ptr,  # [D, C]
    tail_left_ptr,  # [M, R]
    tail_right_ptr,  # [R, C]
    out_ptr,  # [M, C] contiguous
    unscaled_ptr,  # [M, C] contiguous: the result before output_scale and bias
    bias_ptr,  # [C] contiguous
    output_scale_ptr,  # [C] contiguous
    seed_ptr,  # []
    threshold,
    first_group: tl.int64,  # where the mask stands: see MaskPlace
    groups_per_row: tl.int64,
    M,
    C,
    D,
    R,
    stride_lm,
    stride_ld,
    stride_rd,
    stride_rc,
    stride_tail_lm,
    stride_tail_lr,
    stride_tail_rr,
    stride_tail_rc,
    HAS_MAIN: tl.constexpr,  # False: the tail alone
    HAS_BIAS: tl.constexpr,
    HAS_OUTPUT_SCALE: tl.constexpr,
    HAS_UNSCALED: tl.constexpr,
    DROPOUT: tl.constexpr,  # of the tail, by the mask of an [M, C] activation
    LONG_COUNTER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    block_m, block_c = tile_coordinates(tl.program_id(0), M, C, BLOCK_M, BLOCK_C, GROUP_M)
    rows = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_c.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    accumulator = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if HAS_MAIN and not DROPOUT:
        accumulator = accumulate(
            accumulator, left_ptr, right_ptr, rows, columns, M, C, D,
            stride_lm, stride_ld, stride_rd, stride_rc, BLOCK_D, PRECISION,
        )  # fmt: skip
    accumulator = accumulate(
        accumulator, tail_left_ptr, tail_right_ptr, rows, columns, M, C, R,
        stride_tail_lm, stride_tail_lr, stride_tail_rr, stride_tail_rc, BLOCK_R, PRECISION,
    )  # fmt: skip
    if DROPOUT:
        accumulator = zero_dropped_tile(
            accumulator, tl.load(seed_ptr), rows, block_c * BLOCK_C, first_group, groups_per_row,
            threshold, 0, LONG_COUNTER,
        )  # fmt: skip
        if HAS_MAIN:
            accumulator = accumulate(
                accumulator, left_ptr, right_ptr, rows, columns, M, C, D,
                stride_lm, stride_ld, stride_rd, stride_rc, BLOCK_D, PRECISION,
            )  # fmt: skip

    offsets = rows[:, None] * C + columns[None, :]
    inside = (rows < M)[:, None] & (columns < C)[None, :]
    if HAS_UNSCALED:
        unscaled = accumulator.to(unscaled_ptr.dtype.element_ty)
        tl.store(unscaled_ptr + offsets, unscaled, mask=inside)
    result = finish(accumulator, columns, C, bias_ptr, output_scale_ptr, HAS_BIAS, HAS_OUTPUT_SCALE)
    tl.store(out_ptr + offsets, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def accumulate_tma(
    accumulator,  # [BLOCK_M, BLOCK_C] fp32
    left_desc,  # blocks [BLOCK_M, BLOCK]
    right_desc,  # blocks [BLOCK, BLOCK_C], or [BLOCK_C, BLOCK] of its transpose
    first_row,
    first_column,
    depth,
    TRANSPOSED: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``accumulator + left @ right`` for one tile. What lies past the edges is read as zero."""
    for start in range(0, depth, BLOCK):
        left = left_desc.load([first_row, start])
        if TRANSPOSED:
            right = right_desc.load([first_column, start]).T
        else:
            right = right_desc.load([start, first_column])
        accumulator = tl.dot(left, right, accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit(do_not_specialize=(*PLACE, "M"))
def gemm_tail_tma_kernel(
    left_desc,  # [M, D]
    right_desc,  # [D, C], or [C, D] if RIGHT_TRANSPOSED
    tail_left_desc,  # [M, R]
    tail_right_desc,  # [R, C], or [C, R] if TAIL_TRANSPOSED
    out_desc,  # [M, C], blocks [BLOCK_M, BLOCK_C / 2]
    unscaled_desc,  # like out
    bias_ptr,  # [C] contiguous
    output_scale_ptr,  # [C] contiguous
    seed_ptr,  # []
    threshold,
    first_group: tl.int64,  # where the mask stands: see MaskPlace
    groups_per_row: tl.int64,
    M,
    C,
    D,
    R,
    RIGHT_TRANSPOSED: tl.constexpr,
    TAIL_TRANSPOSED: tl.constexpr,
    HAS_TAIL: tl.constexpr,  # False: the plain GEMM, which the tail is measured against
    HAS_BIAS: tl.constexpr,
    HAS_OUTPUT_SCALE: tl.constexpr,
    HAS_UNSCALED: tl.constexpr,
    DROPOUT: tl.constexpr,
    LONG_COUNTER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    num_tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(C, BLOCK_C)
    # Triton flattens a tile loop with one inner loop only; flatten=True would change nothing here.
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        block_m, block_c = tile_coordinates(tile, M, C, BLOCK_M, BLOCK_C, GROUP_M)
        first_row, first_column = block_m * BLOCK_M, block_c * BLOCK_C
        accumulator = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        if DROPOUT:
            accumulator = accumulate_tma(
                accumulator, tail_left_desc, tail_right_desc, first_row, first_column, R,
                TAIL_TRANSPOSED, BLOCK_R, PRECISION,
            )  # fmt: skip
            rows = first_row + tl.arange(0, BLOCK_M)
            accumulator = zero_dropped_tile(
                accumulator, tl.load(seed_ptr), rows, first_column, first_group, groups_per_row,
                threshold, 0, LONG_COUNTER,
            )  # fmt: skip
        accumulator = accumulate_tma(
            accumulator, left_desc, right_desc, first_row, first_column, D,
            RIGHT_TRANSPOSED, BLOCK_D, PRECISION,
        )  # fmt: skip
        if HAS_TAIL and not DROPOUT:
            accumulator = accumulate_tma(
                accumulator, tail_left_desc, tail_right_desc, first_row, first_column, R,
                TAIL_TRANSPOSED, BLOCK_R, PRECISION,
            )  # fmt: skip

        # In two halves: the staging buffer of the store is half as large, which pays for a stage.
        halves = tl.reshape(accumulator, (BLOCK_M, 2, BLOCK_C // 2))
        left_half, right_half = tl.split(tl.permute(halves, (0, 2, 1)))
        for half in tl.static_range(2):
            part = left_half if half == 0 else right_half
            first = first_column + half * (BLOCK_C // 2)
            if HAS_UNSCALED:
                unscaled_desc.store([first_row, first], part.to(unscaled_desc.dtype))
            columns = first + tl.arange(0, BLOCK_C // 2)
            part = finish(part, columns, C, bias_ptr, output_scale_ptr, HAS_BIAS, HAS_OUTPUT_SCALE)
            out_desc.store([first_row, first], part.to(out_desc.dtype))
