"""Dropout in one pass, around the vendor's GEMMs: kernels, and the functions that launch them.

Dimensions: M tokens, K in_features, R rank. A mask is ``[M, ceil(K / 8)]`` uint8, the bits of
``lora_kernels.runtime.dropout.packed_keep_mask``. All of it is bound by memory; nothing that
follows M, and no number that a call brings along, is compiled for.
"""
# pyright: reportInvalidTypeForm=false, reportCallIssue=false, reportArgumentType=false
# Triton's dtypes and constexpr annotate arguments, and a launch takes the compiler's options too.

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.narrow.triton.keep_bits import draw_bits, load_bits, store_bits, unpack_bits
from lora_kernels.ops.narrow.triton.philox import PLACE
from lora_kernels.runtime.device_limits import Tile, cdiv, clamp, next_power_of_two, on_device
from lora_kernels.runtime.dropout import GROUP, ActiveDropout


@triton.jit(do_not_specialize=("threshold", "scale", *PLACE, "M"))
def masked_copy_kernel(
    x_ptr,  # [M, K], rows stride_xm apart
    mask_ptr,  # [M, ceil(K / 8)]: read, or written if DRAW
    out_ptr,  # [M, K] contiguous
    seed_ptr,  # []; unused without DRAW
    threshold: tl.int32,
    scale: tl.float32,
    first_group: tl.int64,  # where the mask stands: see MaskPlace
    groups_per_row: tl.int64,
    M: tl.int32,
    K,
    stride_xm,
    DRAW: tl.constexpr,
    LONG_COUNTER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``D(x)``, rounded once, and the mask's bits if they are drawn here."""
    blocks_k = tl.cdiv(K, BLOCK_K)
    rows = (tl.program_id(0) // blocks_k).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = tl.program_id(0) % blocks_k * BLOCK_K
    columns = first_column + tl.arange(0, BLOCK_K)
    inside_m = rows < M
    inside = inside_m[:, None] & (columns < K)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + columns[None, :], mask=inside, other=0.0)
    if DRAW:
        packed = draw_bits(
            tl.load(seed_ptr), rows, first_column, first_group, groups_per_row, threshold, 0,
            BLOCK_K, LONG_COUNTER,
        )  # fmt: skip
        store_bits(mask_ptr, packed, rows, inside_m, first_column, K)
    else:
        packed = load_bits(mask_ptr, rows, inside_m, first_column, K, BLOCK_K)
    # Selected, not multiplied by zero: a dropped NaN is zero, too.
    kept = tl.where(unpack_bits(packed), x.to(tl.float32) * scale, 0.0)
    out_ptrs = out_ptr + rows[:, None] * K + columns[None, :]
    tl.store(out_ptrs, kept.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("threshold", *PLACE, "M"))
def draw_mask_kernel(
    mask_ptr,  # [M, ceil(K / 8)], written
    seed_ptr,  # []
    threshold: tl.int32,
    first_group: tl.int64,  # where the mask stands: see MaskPlace
    groups_per_row: tl.int64,
    M: tl.int32,
    K,
    LONG_COUNTER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The mask's bits alone."""
    blocks_k = tl.cdiv(K, BLOCK_K)
    rows = (tl.program_id(0) // blocks_k).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = tl.program_id(0) % blocks_k * BLOCK_K
    packed = draw_bits(
        tl.load(seed_ptr), rows, first_column, first_group, groups_per_row, threshold, 0, BLOCK_K,
        LONG_COUNTER,
    )  # fmt: skip
    store_bits(mask_ptr, packed, rows, rows < M, first_column, K)


@triton.jit(do_not_specialize=("factor", "M"))
def masked_product_kernel(
    t_ptr,  # [M, R], rows stride_tm apart
    a_ptr,  # [R, K], rows stride_ar apart, in the dtype of t
    mask_ptr,  # [M, ceil(K / 8)]
    out_ptr,  # [M, K] contiguous
    scale_ptr,  # [] fp32; unused without HAS_SCALE
    factor: tl.float32,
    M: tl.int32,
    K,
    R,
    stride_tm,
    stride_ar,
    HAS_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``keep * factor * scale * (t A)``, accumulated in fp32 and rounded once.

    The mask goes on the accumulator: both operands of the product come from memory as they are,
    so none of them is a register that a pipelined wgmma could see overwritten.
    """
    blocks_k = tl.cdiv(K, BLOCK_K)
    rows = (tl.program_id(0) // blocks_k).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = tl.program_id(0) % blocks_k * BLOCK_K
    columns = first_column + tl.arange(0, BLOCK_K)
    inside_m, inside_k = rows < M, columns < K
    packed = load_bits(mask_ptr, rows, inside_m, first_column, K, BLOCK_K)  # while the product runs
    accumulator = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, R, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        inside_r = ranks < R
        t_ptrs = t_ptr + rows[:, None] * stride_tm + ranks[None, :]
        t = tl.load(t_ptrs, mask=inside_m[:, None] & inside_r[None, :], other=0.0)
        a_ptrs = a_ptr + ranks.to(tl.int64)[:, None] * stride_ar + columns[None, :]
        a = tl.load(a_ptrs, mask=inside_r[:, None] & inside_k[None, :], other=0.0)
        accumulator = tl.dot(t, a, accumulator, input_precision="ieee")
    if HAS_SCALE:
        factor *= tl.load(scale_ptr)
    kept = tl.where(unpack_bits(packed), accumulator * factor, 0.0)
    out_ptrs = out_ptr + rows[:, None] * K + columns[None, :]
    inside = inside_m[:, None] & inside_k[None, :]
    tl.store(out_ptrs, kept.to(out_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class CopyTile(Tile):
    BLOCK_M: int
    BLOCK_K: int
    num_warps: int


@dataclass(frozen=True)
class ProductTile(Tile):
    BLOCK_M: int
    BLOCK_K: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


@lru_cache(maxsize=256)
def copy_tile(columns: int) -> CopyTile:
    """4096 elements for eight warps: a thread has two Philox calls, and its registers leave room
    for so many other blocks that the memory never waits for them."""
    block_k = clamp(next_power_of_two(columns), 16, 256)
    return CopyTile(4096 // block_k, block_k, 8)


@lru_cache(maxsize=256)
def product_tile(columns: int, rank: int, itemsize: int) -> ProductTile:
    """Small tiles: what is written decides, and the rank is mostly over in one step. Two stages are
    24 KiB, which every GPU has."""
    # Where rows begin anywhere each element has a pointer and a predicate of its own.
    block_k = 64 if columns % 16 else 128
    # fp32 products are not on the matrix units: each thread holds what it multiplies.
    block_r = 16 if itemsize == 4 else clamp(next_power_of_two(rank), 16, 32)
    return ProductTile(64, block_k, block_r, num_warps=8, num_stages=1 if rank <= block_r else 2)


def masked_copy(
    x: Tensor,  # [M, K]
    dropout: ActiveDropout,
    mask: Tensor | None = None,  # [M, ceil(K / 8)] uint8, contiguous
) -> tuple[Tensor, Tensor]:
    """``D(x) = keep * scale * x`` ``[M, K]`` contiguous, rounded once to x's dtype, and the mask.

    x is read once. Without a mask its bits are drawn in the same pass; a given one is read, and
    the seed is not used. What is dropped is zero, whatever x holds there.
    """
    row_stride = stride_of_rows(x)
    rows, columns = x.shape
    kept = x.new_empty((rows, columns))
    draw = mask is None
    if mask is None:
        mask = empty_mask(x, rows, columns)
    assert mask.is_contiguous(), "a mask has no gaps"
    if rows == 0 or columns == 0:
        return kept, mask
    tile, place = copy_tile(columns), dropout.place
    first_group, groups_per_row = place.groups(columns)
    with on_device(x):
        masked_copy_kernel[(cdiv(rows, tile.BLOCK_M) * cdiv(columns, tile.BLOCK_K),)](
            x,
            mask,
            kept,
            dropout.seed if draw else mask,
            dropout.threshold,
            dropout.scale,
            first_group,
            groups_per_row,
            rows,
            columns,
            row_stride,
            DRAW=draw,
            LONG_COUNTER=draw and place.needs_long_counter(rows, columns),
            **tile.options,
        )
    return kept, mask


def draw_mask(rows: int, columns: int, dropout: ActiveDropout) -> Tensor:
    """The mask of an activation ``[rows, columns]`` alone: ``[rows, ceil(columns / 8)]`` uint8."""
    seed, place = dropout.seed, dropout.place
    mask = empty_mask(seed, rows, columns)
    if rows == 0 or columns == 0:
        return mask
    tile = copy_tile(columns)
    first_group, groups_per_row = place.groups(columns)
    with on_device(mask):
        draw_mask_kernel[(cdiv(rows, tile.BLOCK_M) * cdiv(columns, tile.BLOCK_K),)](
            mask,
            seed,
            dropout.threshold,
            first_group,
            groups_per_row,
            rows,
            columns,
            LONG_COUNTER=place.needs_long_counter(rows, columns),
            **tile.options,
        )
    return mask


def masked_product(
    t: Tensor,  # [M, R]
    a: Tensor,  # [R, K], in t's dtype
    mask: Tensor,  # [M, ceil(K / 8)] uint8, contiguous
    dropout: ActiveDropout,
    alpha: float = 1.0,
    scale: Tensor | None = None,  # [] fp32
) -> Tensor:  # [M, K]
    """``keep * alpha * scale * (t A)``, summed in fp32 and rounded once, in one pass over it.

    keep is 0 or the dropout's own scale.
    """
    assert t.dtype == a.dtype, "the product has operands of one dtype"
    assert mask.is_contiguous(), "a mask has no gaps"
    (rows, rank), columns = t.shape, a.shape[1]
    out = a.new_empty((rows, columns))
    strides = stride_of_rows(t), stride_of_rows(a)
    if rows == 0 or columns == 0:
        return out
    tile = product_tile(columns, rank, a.element_size())
    with on_device(t):
        masked_product_kernel[(cdiv(rows, tile.BLOCK_M) * cdiv(columns, tile.BLOCK_K),)](
            t,
            a,
            mask,
            out,
            out if scale is None else scale,
            alpha * dropout.scale,
            rows,
            columns,
            rank,
            *strides,
            HAS_SCALE=scale is not None,
            **tile.options,
        )
    return out


def empty_mask(like: Tensor, rows: int, columns: int) -> Tensor:
    """Room for the bits of ``[rows, columns]`` elements."""
    return like.new_empty((rows, cdiv(columns, GROUP)), dtype=torch.uint8)


def stride_of_rows(matrix: Tensor) -> int:
    """By how much a kernel steps from row to row, whose elements have to be neighbours.

    A single row has no step of its own: it is given the one that more rows would have, for which
    the kernel is compiled anyway.
    """
    rows, columns = matrix.shape
    assert columns <= 1 or matrix.stride(1) == 1, (
        f"expected rows of neighbouring elements, got strides {matrix.stride()}: make it contiguous"
    )
    return matrix.stride(0) if rows > 1 else columns
