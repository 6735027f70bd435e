"""Dropout of many adapters in one pass, around the vendor's GEMMs.

Dimensions: M tokens, P pairs of a token and an adapter, L slots, T tiles, K in_features. A mask is
``[P, ceil(K / 8)]`` uint8, of each pair the row of its slot's mask that belongs to its token. Pairs
without an adapter (slot L), or whose token is no row of x, have no bit set: their rows are zero.
Pairs of a slot that does not drop have every bit set.
"""

# pyright: reportCallIssue=false, reportInvalidTypeForm=false
# The kernels are Triton, not Python, and launches take options beside their arguments.

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.narrow.triton.keep_bits import draw_bits, load_bits, store_bits, unpack_bits
from lora_kernels.ops.narrow.triton.masked import empty_mask, stride_of_rows
from lora_kernels.ops.narrow.triton.philox import GROUP, PLACE
from lora_kernels.ops.routed.tensors import RoutingTensors
from lora_kernels.ops.routed.triton.kernels import keep_scale_of, rows_of_tile
from lora_kernels.runtime.device_limits import FP_FUSION, cdiv, on_device
from lora_kernels.runtime.dropout import MaskPlace


@triton.jit(do_not_specialize=(*PLACE, "M", "no_adapter"))
def gather_masked_kernel(
    x_ptr,  # [M, K], rows stride_xm apart
    threshold_ptr,  # [L + 1]
    tiles_ptr,  # [T, 2]
    offsets_ptr,  # [L + 2]
    tokens_ptr,  # [P]
    mask_ptr,  # [P, ceil(K / 8)]: written if DRAW, read if only DROPOUT, else unused
    out_ptr,  # [P, K] contiguous
    seed_ptr,  # []; unused without DRAW
    first_group: tl.int64,  # where the mask stands: see MaskPlace
    groups_per_row: tl.int64,
    M: tl.int32,
    no_adapter: tl.int32,  # L
    K,
    stride_xm,
    DROPOUT: tl.constexpr,
    DRAW: tl.constexpr,
    LONG_COUNTER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``D(x)`` of every pair's token with its slot's mask, and the mask's bits if drawn here."""
    blocks_k = tl.cdiv(K, BLOCK_K)
    tile = tl.program_id(0) // blocks_k
    slot = tl.load(tiles_ptr + 2 * tile)
    if slot < 0:
        return
    first_column = tl.program_id(0) % blocks_k * BLOCK_K
    columns = first_column + tl.arange(0, BLOCK_K)
    inside_k = (columns < K)[None, :]
    rows = tl.where(slot == no_adapter, 0, M)  # of x that the slot has
    pairs, inside, tokens, present = rows_of_tile(
        tiles_ptr, offsets_ptr, tokens_ptr, tile, slot, rows, BLOCK_M
    )
    x_ptrs = x_ptr + tokens[:, None] * stride_xm + columns[None, :]
    kept = tl.load(x_ptrs, mask=present[:, None] & inside_k, other=0.0).to(tl.float32)
    if DROPOUT:
        if DRAW:
            threshold = tl.load(threshold_ptr + slot)
            packed = tl.full((BLOCK_M, BLOCK_K // GROUP), 255, tl.uint8)
            if threshold > 0:
                packed = draw_bits(
                    tl.load(seed_ptr), tokens, first_column, first_group, groups_per_row,
                    threshold, slot, BLOCK_K, LONG_COUNTER,
                )  # fmt: skip
            packed = tl.where(present[:, None], packed, 0)
            store_bits(mask_ptr, packed, pairs, inside, first_column, K)
        else:
            packed = load_bits(mask_ptr, pairs, inside, first_column, K, BLOCK_K)
        kept = tl.where(unpack_bits(packed), kept * keep_scale_of(threshold_ptr, slot), 0.0)
    out_ptrs = out_ptr + pairs[:, None] * K + columns[None, :]
    tl.store(out_ptrs, kept.to(out_ptr.dtype.element_ty), mask=inside[:, None] & inside_k)


@triton.jit(do_not_specialize=("no_adapter",))
def mask_rows_kernel(
    z_ptr,  # [P, K], rows stride_zp apart
    threshold_ptr,  # [L + 1]
    tiles_ptr,  # [T, 2]
    offsets_ptr,  # [L + 2]
    mask_ptr,  # [P, ceil(K / 8)]
    no_adapter: tl.int32,  # L
    K,
    stride_zp,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``z *= keep * scale``; what a slot without dropout has is neither read nor written."""
    blocks_k = tl.cdiv(K, BLOCK_K)
    tile = tl.program_id(0) // blocks_k
    slot = tl.load(tiles_ptr + 2 * tile)
    if slot < 0:
        return
    if (slot != no_adapter) & (tl.load(threshold_ptr + slot) == 0):
        return
    end = tl.load(offsets_ptr + slot + 1)
    first_column = tl.program_id(0) % blocks_k * BLOCK_K
    columns = first_column + tl.arange(0, BLOCK_K)
    pairs = (tl.load(tiles_ptr + 2 * tile + 1) + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside_p, present = pairs < end, pairs < tl.where(slot == no_adapter, 0, end)
    inside_k = (columns < K)[None, :]
    z_ptrs = z_ptr + pairs[:, None] * stride_zp + columns[None, :]
    z = tl.load(z_ptrs, mask=present[:, None] & inside_k, other=0.0).to(tl.float32)
    keep = unpack_bits(load_bits(mask_ptr, pairs, present, first_column, K, BLOCK_K))
    kept = tl.where(keep, z * keep_scale_of(threshold_ptr, slot), 0.0)
    tl.store(z_ptrs, kept.to(z_ptr.dtype.element_ty), mask=inside_p[:, None] & inside_k)


def block_of_columns(block: int, columns: int) -> int:
    """Columns per program beside so many pairs: 4096 elements for eight warps, as ``copy_tile``;
    half of it where rows begin anywhere, as each element has a pointer of its own there."""
    return max((2048 if columns % 16 else 4096) // block, 16)


def gather_masked(
    x: Tensor,  # [M, K]
    routing: RoutingTensors,
    threshold_table: Tensor,  # [L + 1] int32
    seed: Tensor | None,  # []
    place: MaskPlace,
    mask: Tensor | None = None,  # [P, ceil(K / 8)] uint8, contiguous
    draws: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """``D(x[token])`` of every pair ``[P, K]``, rounded once to x's dtype, and the mask.

    Each slot drops with its own threshold (0: nothing), scale and stream. x is read once per pair.
    A given mask is read, and the seed is not used. Without one its bits are drawn in the same pass,
    unless not ``draws``: then no adapter drops, and there is no mask. Rows of pairs without an
    adapter are zero, and so are their bits.
    """
    row_stride, columns = stride_of_rows(x), x.shape[1]
    pairs = routing.tokens.shape[0]
    kept = x.new_empty((pairs, columns))
    draw = mask is None and draws
    if draw:
        mask = empty_mask(x, pairs, columns)
    assert mask is None or mask.is_contiguous(), "a mask has no gaps"
    if pairs == 0 or columns == 0:
        return kept, mask
    block_k = block_of_columns(routing.block, columns)
    first_group, groups_per_row = place.groups(columns)
    with on_device(x):
        gather_masked_kernel[(routing.tiles.shape[0] * cdiv(columns, block_k),)](
            x,
            threshold_table,
            routing.tiles,
            routing.offsets,
            routing.tokens,
            routing.tokens if mask is None else mask,
            kept,
            seed if draw else routing.tokens,
            first_group,
            groups_per_row,
            x.shape[0],
            threshold_table.shape[0] - 1,
            columns,
            row_stride,
            DROPOUT=mask is not None,
            DRAW=draw,
            LONG_COUNTER=draw and place.needs_long_counter(*x.shape),
            BLOCK_M=routing.block,
            BLOCK_K=block_k,
            num_warps=8,
            enable_fp_fusion=FP_FUSION,
        )
    return kept, mask


def mask_rows_(
    z: Tensor,  # [P, K]
    routing: RoutingTensors,
    threshold_table: Tensor,  # [L + 1] int32
    mask: Tensor,  # [P, ceil(K / 8)] uint8, contiguous
) -> Tensor:  # z
    """``z *= keep * scale`` of each pair's slot, rounded once; see :func:`gather_masked`."""
    assert mask.is_contiguous(), "a mask has no gaps"
    row_stride, (pairs, columns) = stride_of_rows(z), z.shape
    if pairs == 0 or columns == 0:
        return z
    block_k = block_of_columns(routing.block, columns)
    with on_device(z):
        mask_rows_kernel[(routing.tiles.shape[0] * cdiv(columns, block_k),)](
            z,
            threshold_table,
            routing.tiles,
            routing.offsets,
            mask,
            threshold_table.shape[0] - 1,
            columns,
            row_stride,
            BLOCK_M=routing.block,
            BLOCK_K=block_k,
            num_warps=8,
            enable_fp_fusion=FP_FUSION,
        )
    return z
