"""Tiles of a keep-mask that is stored as bits: ``[rows, ceil(columns / 8)]`` bytes, contiguous.

Bit j of byte ``[m, i]`` says whether element ``[m, 8 i + j]`` is kept, as in
``lora_kernels.runtime.dropout.packed_keep_mask``.
"""
# pyright: reportGeneralTypeIssues=false
# Triton's ranges have no __iter__.

import triton
import triton.language as tl

from lora_kernels.ops.narrow.triton.philox import GROUP, random_words


@triton.jit
def draw_bits(
    seed,  # scalar int64
    rows,  # [BLOCK_ROWS]
    first_column,  # scalar, a multiple of 8
    first_group,  # of the activation, where it stands in the whole one
    groups_per_row,  # of the whole one
    threshold,  # q: a lane below it is dropped
    stream,  # 0, or the adapter's slot
    BLOCK_COLUMNS: tl.constexpr,
    LONG_COUNTER: tl.constexpr,  # whether a group's number may be 2**31 or more
):  # [BLOCK_ROWS, BLOCK_COLUMNS / 8] uint8
    """The bytes of a tile, drawn. A thread packs the words it made: no lane leaves its registers,
    as those of ``keep_tile`` would on their way to a sum over them."""
    words = random_words(
        seed, rows, first_column, first_group, groups_per_row, stream, BLOCK_COLUMNS, LONG_COUNTER
    )
    packed = tl.zeros((rows.shape[0], BLOCK_COLUMNS // GROUP), tl.int32)
    for word in tl.static_range(4):
        packed |= ((words[word] & 0xFFFF) >= threshold).to(tl.int32) << (2 * word)
        packed |= ((words[word] >> 16) >= threshold).to(tl.int32) << (2 * word + 1)
    return packed.to(tl.uint8)


@triton.jit
def load_bits(
    mask_ptr,  # [rows, ceil(columns / 8)]
    rows,  # [BLOCK_ROWS] int64
    inside_m,  # [BLOCK_ROWS]: rows that exist
    first_column,  # scalar, a multiple of 8
    columns,
    BLOCK_COLUMNS: tl.constexpr,
):  # [BLOCK_ROWS, BLOCK_COLUMNS / 8] uint8
    """The bytes of a tile; zero, which keeps nothing, where there is none."""
    groups = (columns + GROUP - 1) // GROUP
    group = first_column // GROUP + tl.arange(0, BLOCK_COLUMNS // GROUP)
    inside = inside_m[:, None] & (group < groups)[None, :]
    return tl.load(mask_ptr + rows[:, None] * groups + group[None, :], mask=inside, other=0)


@triton.jit
def store_bits(
    mask_ptr,  # [rows, ceil(columns / 8)]
    packed,  # [BLOCK_ROWS, BLOCK_COLUMNS / 8] uint8
    rows,  # [BLOCK_ROWS] int64
    inside_m,  # [BLOCK_ROWS]: rows that exist
    first_column,  # scalar, a multiple of 8
    columns,
):
    """Write the bytes of a tile, with whatever the last one says of bits past ``columns``."""
    groups = (columns + GROUP - 1) // GROUP
    group = first_column // GROUP + tl.arange(0, packed.shape[1])
    inside = inside_m[:, None] & (group < groups)[None, :]
    tl.store(mask_ptr + rows[:, None] * groups + group[None, :], packed, mask=inside)


@triton.jit
def unpack_bits(packed):  # [BLOCK_ROWS, GROUPS] uint8 -> [BLOCK_ROWS, 8 * GROUPS] booleans
    lanes = packed.to(tl.int32)[:, :, None] >> tl.arange(0, GROUP)[None, None, :]
    return tl.reshape((lanes & 1) != 0, (packed.shape[0], packed.shape[1] * GROUP))
