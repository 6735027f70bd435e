"""The keep-mask of ``lora_kernels.runtime.dropout``, regenerated in registers."""

import triton
import triton.language as tl

GROUP = tl.constexpr(8)  # columns served by one Philox call
ROUNDS = tl.constexpr(7)

# Arguments of every kernel that draws. Their values are each call's own: none is compiled for.
PLACE = ("first_group", "groups_per_row")


@triton.jit
def random_words(
    seed,  # scalar int64
    rows,  # [BLOCK_ROWS]
    first_column,  # scalar, a multiple of 8
    first_group,  # of the activation, where it stands in the whole one
    groups_per_row,  # of the whole one
    stream,  # 0, or the adapter's slot
    BLOCK_COLUMNS: tl.constexpr,
    LONG_COUNTER: tl.constexpr,  # whether a group's number may be 2**31 or more
):  # four times [BLOCK_ROWS, BLOCK_COLUMNS / 8] uint32
    """The words of a tile's groups. Lane 2 i + j of a group is half j of word i, low half first."""
    group = first_column // GROUP + tl.arange(0, BLOCK_COLUMNS // GROUP)
    if LONG_COUNTER:
        first_of_row = first_group + rows.to(tl.int64) * groups_per_row
        counter = first_of_row[:, None] + group[None, :]
        low = counter.to(tl.uint32)
        high = (counter >> 32).to(tl.uint32)
    else:
        first_of_row = tl.cast(first_group, tl.int32)
        first_of_row += rows.to(tl.int32) * tl.cast(groups_per_row, tl.int32)
        low = (first_of_row[:, None] + group[None, :]).to(tl.uint32)
        high = low * 0
    return tl.philox(seed, low, high, low * 0 + stream, low * 0, n_rounds=ROUNDS)


@triton.jit
def keep_tile(
    seed,  # scalar int64
    rows,  # [BLOCK_ROWS]
    first_column,  # scalar, a multiple of 8
    first_group,  # of the activation, where it stands in the whole one
    groups_per_row,  # of the whole one
    threshold,  # q: a lane below it is dropped
    stream,  # 0, or the adapter's slot
    BLOCK_COLUMNS: tl.constexpr,
    LONG_COUNTER: tl.constexpr,  # whether a group's number may be 2**31 or more
):  # [BLOCK_ROWS, BLOCK_COLUMNS] booleans
    """Whether each element of a tile is kept. Rows and columns past the activation mean nothing."""
    word_0, word_1, word_2, word_3 = random_words(
        seed, rows, first_column, first_group, groups_per_row, stream, BLOCK_COLUMNS, LONG_COUNTER
    )
    # The last join is the fastest index: lane = 2 * word + half.
    words = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3))  # [rows, groups, 2, 2]
    keep = tl.join((words & 0xFFFF) >= threshold, (words >> 16) >= threshold)
    return tl.reshape(keep, (rows.shape[0], BLOCK_COLUMNS))


@triton.jit
def zero_dropped_tile(
    tile,  # [BLOCK_ROWS, BLOCK_COLUMNS]
    seed,  # scalar int64
    rows,  # [BLOCK_ROWS]
    first_column,
    first_group,
    groups_per_row,
    threshold,
    stream,
    LONG_COUNTER: tl.constexpr,
):  # [BLOCK_ROWS, BLOCK_COLUMNS]
    """``tile`` with zeros where the mask drops, unscaled; one half after the other.

    By halves the generator's words of both halves need not live at once, which on sm_90 decides
    whether a 128 x 256 accumulator spills (255 registers and 8 bytes, or 222 and none).
    """
    BLOCK_ROWS: tl.constexpr = tile.shape[0]
    HALF: tl.constexpr = tile.shape[1] // 2
    halves = tl.permute(tl.reshape(tile, (BLOCK_ROWS, 2, HALF)), (0, 2, 1))
    left, right = tl.split(halves)
    keep = keep_tile(
        seed, rows, first_column, first_group, groups_per_row, threshold, stream, HALF, LONG_COUNTER
    )
    left = tl.where(keep, left, 0.0)
    keep = keep_tile(
        seed, rows, first_column + HALF, first_group, groups_per_row, threshold, stream, HALF,
        LONG_COUNTER,
    )  # fmt: skip
    right = tl.where(keep, right, 0.0)
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (BLOCK_ROWS, 2 * HALF))
