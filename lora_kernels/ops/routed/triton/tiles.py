"""Tile sizes of ``routed_lora``'s kernels: functions of shapes, dtypes and the device alone.

They never look at what a routing holds, only at how much it has room for: so a row's bits do not
depend on the other rows, and a captured CUDA graph serves any routing. Nothing here imports Triton.
"""

import functools
from contextlib import contextmanager
from dataclasses import dataclass, replace

from lora_kernels.runtime.device_limits import (
    DRAWING_WARPS,
    DeviceLimits,
    PipelineBytes,
    cdiv,
    clamp,
    narrow_loop,
    next_power_of_two,
    pipeline_stages,
)

# The widest rank tile: most adapters are narrower, and nothing is read for columns they lack.
MAX_BLOCK_R = 64

# What the partial sums of a factor's gradients may take, in bytes.
MAX_PARTIALS = 64 << 20

# "fused" runs the base and the adapters in one GEMM of ours; "hybrid" adds the adapters to the
# result of the vendor's GEMM.
STRATEGIES = ("fused", "hybrid")


# Tiles are remembered: a model has a dozen shapes, times its numbers of tokens.
_remembered = functools.lru_cache(maxsize=4096)


@dataclass(frozen=True)
class RoutedCell:
    """What the tiles of a call depend on, besides the wide dimension of the activation."""

    itemsize: int  # of x
    factor_itemsize: int  # of the adapters
    pairs: int  # P, all the routing has room for
    block: int  # pairs per tile of the routing
    num_tiles: int  # T
    max_total_rank: int  # H
    ieee: bool  # fp32 products without TF32: no matrix units
    rounds_to_fp16: bool  # the factors, by way of registers and shared memory everywhere


@dataclass(frozen=True)
class ShrinkTile:
    BLOCK_D: int
    BLOCK_R: int
    parts: int  # of the depth
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ExpandTile:
    BLOCK_C: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GemmTile:
    BLOCK_C: int
    BLOCK_D: int
    BLOCK_R: int
    GROUP_M: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GradientTile:
    BLOCK_M: int
    BLOCK_D: int
    BLOCK_R: int
    window: int  # tiles of the routing that one program walks
    num_warps: int
    num_stages: int


def is_small(cell: RoutedCell) -> bool:
    """Whether launches, not bytes, decide: then the expand adds the shrink's partial sums."""
    return cell.block <= 16


@_remembered
def shrink_tile(
    cell: RoutedCell,
    depth: int,
    slices: int,
    limits: DeviceLimits,
    *,
    aligned: bool,
    masked: bool,
    of_a: bool,
) -> ShrinkTile:
    """For rows of ``[M, depth]`` times ``[depth, R]``; small batches split the depth.

    ``slices``: of the factor, 1 for A; ``aligned``: rows are read 16 bytes at a time; ``masked``:
    by a dropout; ``of_a``: otherwise B, whose pitch is the rank.
    """
    block_r = rank_block(cell, slices)
    block_d = 128 if block_r <= 32 and cell.itemsize == 2 else 64
    cast = cell.factor_itemsize != cell.itemsize
    num_warps = 8 if block_r == 64 and cell.block > 16 else 4
    if masked and cell.block > 16:
        num_warps = DRAWING_WARPS
    if cell.ieee:
        block_d = 32
        num_warps = 8 if cell.block > 16 else 4
    elif cell.block > 16 and (not aligned or cell.itemsize == 4):
        # Every element has its own pointer and predicate in registers.
        block_d, num_warps = 64, 8
    programs = cdiv(cell.pairs, cell.block) * cdiv(cell.max_total_rank, block_r) * slices
    blocks = cdiv(depth, block_d)
    parts = 1
    if 4 * programs < 3 * limits.multiprocessors:
        # Below four blocks per part the pipeline does not fill; each part is read again, too.
        parts = clamp(min(2 * limits.multiprocessors // max(programs, 1), blocks // 4), 1, 16)
    # Whole blocks per part: no part may be left without any.
    parts = cdiv(blocks, cdiv(blocks, parts))
    loop = narrow_loop(
        cell.block * block_d * cell.itemsize,
        block_d * block_r * cell.factor_itemsize,
        block_d * block_r * cell.itemsize if cast else 0,
        limits,
        masked=masked,
        ieee=cell.ieee,
    )
    if cell.rounds_to_fp16 and not limits.multiplies_shared_memory:
        loop = replace(loop, besides=loop.besides + block_d * block_r * cell.itemsize)
    if not of_a and cell.factor_itemsize >= 4:
        # Ranks that are multiples of eight and those that are not have a loop each, with buffers
        # side by side. (Elements of two bytes are not copied one by one, so that in halves only
        # the first has any.)
        loop = replace(
            loop,
            read_in_place=2 * loop.read_in_place,
            through_registers=2 * loop.through_registers,
        )
    num_stages = pipeline_stages(4, loop, limits)
    return ShrinkTile(block_d, block_r, parts, num_warps, num_stages)


@_remembered
def expand_tile(
    cell: RoutedCell, slices: int, limits: DeviceLimits, *, aligned: bool
) -> ExpandTile:
    """For ``[P, R] @ [R, columns]`` added to rows of the result."""
    block_r = rank_block(cell, slices)
    block_c, num_warps = 128 if block_r < 64 else 64, 4
    if cell.block > 16:
        block_c, num_warps = (128, 8) if aligned and not cell.ieee else (64, 8)
    if cell.ieee:
        block_r = min(block_r, 32)
    stage = (cell.block + block_c) * block_r * max(cell.itemsize, cell.factor_itemsize)
    # One stage where the left operand comes from registers, and so must not be overwritten while a
    # product reads it (triton#9433; a test looks for it), and where the rank is over in one step.
    wanted = 1 if is_small(cell) or cdiv(cell.max_total_rank, slices) <= block_r else 2
    loop = PipelineBytes(0, stage, cell.block * block_c * 4)
    return ExpandTile(block_c, block_r, num_warps, pipeline_stages(wanted, loop, limits))


@_remembered
def gradient_tile(
    cell: RoutedCell,
    depth: int,
    slices: int,
    limits: DeviceLimits,
    *,
    aligned: bool,
    masked: bool,
) -> GradientTile:
    """For ``[depth, n] @ [n, R]`` of each slot; windows are as many as give every SM work."""
    block_r = rank_block(cell, slices)
    block_m = cell.block
    # For mma.sync every operand passes through registers: 128 x 32 spill in four warps. So they do
    # on sm_100 where fp32 is rounded to fp16.
    in_registers = block_r >= 32 and (
        not limits.multiplies_shared_memory or (cell.rounds_to_fp16 and limits.capability >= 100)
    )
    narrow = cell.itemsize == 4 or not aligned or (in_registers and block_r == 64)
    block_d = 64 if narrow else 128
    if cell.ieee:
        # Sums of 64 x 64 in the cores' own registers spill on sm_80.
        block_d, block_m = 32 if block_r == 64 else 64, min(block_m, 32)
    cast = cell.itemsize != 4
    num_warps = 8 if block_r == 64 or in_registers or (cell.ieee and block_r > 16) else 4
    if masked and not is_small(cell):
        num_warps = DRAWING_WARPS
    programs = cdiv(depth, block_d) * cdiv(cdiv(cell.max_total_rank, slices), block_r)
    windows = max(1, cdiv(2 * limits.multiprocessors, programs))
    # The tiles that hold pairs are fewer than T, which allows for a cut tile in every group.
    window = previous_power_of_two(cdiv(cdiv(cell.pairs, cell.block), windows))
    most = max(1, MAX_PARTIALS // (2 * 4 * depth * cell.max_total_rank))
    while cdiv(cell.num_tiles, window) > most:
        window *= 2
    loop = narrow_loop(
        block_m * block_d * cell.itemsize,
        block_m * block_r * 4,
        block_m * block_r * cell.itemsize if cast else 0,
        limits,
        masked=masked,
        ieee=cell.ieee,
    )
    num_stages = pipeline_stages(3, loop, limits)
    return GradientTile(block_m, block_d, block_r, window, num_warps, num_stages)


@_remembered
def gemm_tile(cell: RoutedCell, slices: int, limits: DeviceLimits, *, aligned: bool) -> GemmTile:
    """For the base's GEMM with the adapters as its tail, on tiles of 64 rows."""
    block_r = min(rank_block(cell, slices), 32)
    block_c, block_d, num_warps = 128, 64, 4
    if cell.ieee:
        block_c, block_d, block_r, num_warps = 64, 16, 16, 8
    elif not aligned or cell.itemsize == 4:
        block_d, num_warps = 32, 8
    elif block_r == 32 and not limits.multiplies_shared_memory:
        num_warps = 8  # as for the gradient
    stage = (cell.block + block_c) * block_d * cell.itemsize
    loop = PipelineBytes(stage, 0, cell.block * block_c * 4)
    num_stages, group_m = pipeline_stages(4, loop, limits), 8
    return GemmTile(block_c, block_d, block_r, group_m, num_warps, num_stages)


_strategy = "hybrid"


def strategy(cell: RoutedCell) -> str:
    """``fused`` or ``hybrid``: the vendor's GEMM until a measurement says otherwise.

    Tiles of 16 pairs are no GEMM tiles: few tokens always take the vendor's.
    """
    return "hybrid" if is_small(cell) else _strategy


@contextmanager
def use_strategy(name: str):
    """Take that strategy in the whole process (backward threads too). For tuning and tests."""
    global _strategy
    if name not in STRATEGIES:
        raise ValueError(f"name: expected one of {STRATEGIES}, got {name!r}")
    before, _strategy = _strategy, name
    try:
        yield
    finally:
        _strategy = before


def rank_block(cell: RoutedCell, slices: int) -> int:
    """The rank tile; an adapter's ranks are taken to be about the same in every slice."""
    return clamp(next_power_of_two(cdiv(cell.max_total_rank, slices)), 16, MAX_BLOCK_R)


def previous_power_of_two(number: int) -> int:
    return 1 << (max(number, 1).bit_length() - 1)
