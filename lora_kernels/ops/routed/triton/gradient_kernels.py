"""Triton kernels of ``routed_lora`` for the gradients of the factors.

Dimensions as in :mod:`kernels`. A *window* is ``window_tiles`` neighbouring tiles; a *run* is what
a window holds of one slot's pairs, which are neighbours in the routing. A program walks the runs of
its window, so that the work is spread evenly however large the groups are. A group that lies within
one window is written at once. Of any other, each window writes a partial sum: one that begins
before the window, and one that goes on after it, so there are at most two.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false
# The kernels are Triton, not Python: constexpr stands for its value, and static_range iterates.

import triton
import triton.language as tl

from lora_kernels.ops.narrow.triton.narrow_dot import narrow_dot
from lora_kernels.ops.narrow.triton.philox import PLACE, keep_tile
from lora_kernels.ops.routed.triton.kernels import factor_of_slot, keep_scale_of, slice_of_block


@triton.jit(do_not_specialize=(*PLACE, "M", "num_tiles", "window_tiles"))
def routed_gradient_kernel(
    wide_ptr,  # [M, D]: x, or dy of all slices
    narrow_ptr,  # [P, H], rows stride_nm apart: t, or h
    table_ptr,  # [L + 1, F, 3] int64
    layout_ptr,  # [L + 1, F] int64: offset in grad, -1 where none is needed
    scaling_ptr,  # [L + 1]
    threshold_ptr,  # [L + 1]
    tiles_ptr,  # [T, 2]
    offsets_ptr,  # [L + 2]
    tokens_ptr,  # [P]
    weights_ptr,  # [P]; unused without HAS_WEIGHTS
    grad_ptr,  # flat
    partials_ptr,  # [2 * windows, H, D] fp32 (OF_A), or [2 * windows, D, H]
    seed_ptr,  # []
    first_group: tl.int64,  # where the mask stands: see MaskPlace
    groups_per_row: tl.int64,
    M,
    D,
    H,
    num_slots,
    num_tiles,
    window_tiles,
    stride_wm,
    stride_wd,
    stride_nm,
    OF_A: tl.constexpr,  # t^T D(x); otherwise s dy^T (w h), slice by slice
    BOUNDARIES: tl.constexpr,
    NUM_FACTORS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    LONG_COUNTER: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,  # pairs per tile of the routing
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    window, block_d = tl.program_id(0), tl.program_id(1)
    first_rank = tl.program_id(2) * BLOCK_R
    ranks = first_rank + tl.arange(0, BLOCK_R)
    index, begin, end, start_d = slice_of_block(block_d, D, BOUNDARIES, BLOCK_D)
    factor = 0 if OF_A else 1 + index
    columns = start_d.to(tl.int64) + tl.arange(0, BLOCK_D)
    inside_d = columns < end
    local = columns - begin
    if DROPOUT:
        seed = tl.load(seed_ptr)

    tile = window * window_tiles
    last_tile = tl.minimum(tile + window_tiles, num_tiles)
    while tile < last_tile:
        slot = tl.load(tiles_ptr + 2 * tile)
        first = tl.load(tiles_ptr + 2 * tile + 1)
        # After the slots come the pairs without an adapter and what the tile table has to spare.
        is_slot = (slot >= 0) & (slot < num_slots)
        slot = tl.where(is_slot, slot, num_slots)
        group_first = tl.load(offsets_ptr + slot)
        group_last = tl.load(offsets_ptr + slot + 1)
        run_tiles = tl.minimum(tl.cdiv(group_last - first, TILE), last_tile - tile)
        run_tiles = tl.where(is_slot, run_tiles, last_tile - tile)
        last = tl.minimum(group_last, first + run_tiles * TILE)
        rank, column, _ = factor_of_slot(table_ptr, slot, factor, H, OF_A, NUM_FACTORS)
        place = tl.load(layout_ptr + slot.to(tl.int64) * NUM_FACTORS + factor)
        needed = is_slot & (place >= 0) & (first_rank < rank)
        inside_r = (ranks < rank)[None, :]
        threshold = 0
        if DROPOUT:
            threshold = tl.load(threshold_ptr + slot)

        accumulator = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
        for start in range(first, tl.where(needed, last, first), BLOCK_M):
            pairs = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
            inside = pairs < last
            rows = tl.load(tokens_ptr + pairs, mask=inside, other=0).to(tl.int64)
            inside_m = inside & (rows < M)
            wide_ptrs = wide_ptr + rows[:, None] * stride_wm + columns[None, :] * stride_wd
            wide = tl.load(wide_ptrs, mask=inside_m[:, None] & inside_d[None, :], other=0.0)
            narrow_ptrs = narrow_ptr + pairs[:, None] * stride_nm + (column + ranks)[None, :]
            narrow = tl.load(narrow_ptrs, mask=inside_m[:, None] & inside_r, other=0.0)
            narrow = narrow.to(tl.float32)
            if HAS_WEIGHTS:
                weights = tl.load(weights_ptr + pairs, mask=inside, other=0.0)
                narrow *= weights.to(tl.float32)[:, None]
            if DROPOUT:
                keep = keep_tile(
                    seed, rows, start_d, first_group, groups_per_row, threshold, slot, BLOCK_D,
                    LONG_COUNTER,
                )  # fmt: skip
                wide = tl.where(keep, wide, 0.0)
            accumulator = narrow_dot(tl.trans(wide), narrow, accumulator, PRECISION)

        if needed:
            if OF_A:
                if DROPOUT:
                    accumulator *= keep_scale_of(threshold_ptr, slot)
            else:
                accumulator *= tl.load(scaling_ptr + slot).to(tl.float32)
            mask = inside_d[:, None] & inside_r
            begins_here = first == group_first
            if begins_here & (last == group_last):
                if OF_A:
                    grads = grad_ptr + place + local[:, None] + ranks.to(tl.int64)[None, :] * D
                else:
                    grads = grad_ptr + place + local[:, None] * rank + ranks[None, :]
                tl.store(grads, accumulator.to(grad_ptr.dtype.element_ty), mask=mask)
            else:
                partial = (2 * window + begins_here.to(tl.int32)).to(tl.int64)
                if OF_A:
                    partials = partials_ptr + columns[:, None] + ranks.to(tl.int64)[None, :] * D
                else:
                    partials = partials_ptr + columns[:, None] * H + ranks[None, :]
                tl.store(partials + partial * D * H, accumulator, mask=mask)
        tile += run_tiles


@triton.jit(do_not_specialize=("num_tiles", "window_tiles"))
def routed_gradient_reduce_kernel(
    partials_ptr,  # as routed_gradient_kernel leaves them
    table_ptr,
    layout_ptr,
    tiles_ptr,
    offsets_ptr,
    grad_ptr,
    D,
    H,
    num_slots,
    num_tiles,
    window_tiles,
    OF_A: tl.constexpr,
    BOUNDARIES: tl.constexpr,
    NUM_FACTORS: tl.constexpr,
    BLOCK_T: tl.constexpr,  # at least window_tiles
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the partial sums of the group that begins in a window and goes on after it, if any."""
    window, index = tl.program_id(1), tl.program_id(2)
    tile = window * window_tiles + tl.arange(0, BLOCK_T)
    next_window = (window + 1) * window_tiles
    inside = (tile < num_tiles) & (tile < next_window)
    slots = tl.load(tiles_ptr + 2 * tile, mask=inside, other=-1)
    first = tl.load(tiles_ptr + 2 * tile + 1, mask=inside, other=0)
    is_slot = (slots >= 0) & (slots < num_slots)
    group_first = tl.load(offsets_ptr + slots, mask=is_slot, other=-1)
    group_last = tl.load(offsets_ptr + slots + 1, mask=is_slot, other=0)
    tile_after = tile + tl.cdiv(group_last - first, TILE)
    # A window holds at most one such group, or the first of two would have to end in it.
    goes_on = is_slot & (first == group_first) & (tile_after > next_window)
    slot = tl.max(tl.where(goes_on, slots, -1), axis=0)
    if slot < 0:
        return
    windows = tl.cdiv(tl.max(tl.where(goes_on, tile_after, 0), axis=0), window_tiles) - window
    factor = 0 if OF_A else 1 + index
    rank, _, _ = factor_of_slot(table_ptr, slot, factor, H, OF_A, NUM_FACTORS)
    place = tl.load(layout_ptr + slot.to(tl.int64) * NUM_FACTORS + factor)
    if (place < 0) | (rank <= 0):
        return
    begin, columns = 0, D
    for s in tl.static_range(len(BOUNDARIES) - 1):
        begin = tl.where(index == s, BOUNDARIES[s], begin)
        columns = tl.where(index == s, BOUNDARIES[s + 1] - BOUNDARIES[s], columns)

    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < tl.cast(rank, tl.int64) * columns
    if OF_A:
        source = partials_ptr + element
    else:
        source = partials_ptr + (begin + element // rank) * H + element % rank
    size = tl.cast(D, tl.int64) * H
    total = tl.load(source + (2 * window + 1) * size, mask=inside, other=0.0)
    for i in tl.range(1, windows, loop_unroll_factor=4):
        total += tl.load(source + 2 * (window + i) * size, mask=inside, other=0.0)
    tl.store(grad_ptr + place + element, total.to(grad_ptr.dtype.element_ty), mask=inside)
