"""The mask in registers has the bits of ``lora_kernels.runtime.dropout.keep_mask``."""

import pytest
import torch
import triton
import triton.language as tl

from lora_kernels.ops.narrow.triton.philox import keep_tile, zero_dropped_tile
from lora_kernels.runtime.dropout import MaskPlace, drop_threshold, keep_mask

BLOCK_ROWS, BLOCK_COLUMNS = 16, 32


@triton.jit
def mask_kernel(
    out_ptr,  # [BLOCK_ROWS, BLOCK_COLUMNS] int32
    seed_ptr,
    first_row,
    first_column,
    first_group,
    groups_per_row,
    threshold,
    stream,
    LONG_COUNTER: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    rows = tl.cast(first_row, tl.int64) + tl.arange(0, BLOCK_ROWS)
    seed = tl.load(seed_ptr)
    if HALVES:
        ones = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), 1.0, tl.float32)
        kept = zero_dropped_tile(
            ones, seed, rows, first_column, first_group, groups_per_row, threshold, stream,
            LONG_COUNTER,
        )  # fmt: skip
    else:
        kept = keep_tile(
            seed, rows, first_column, first_group, groups_per_row, threshold, stream,
            BLOCK_COLUMNS, LONG_COUNTER,
        )  # fmt: skip
    offsets = tl.arange(0, BLOCK_ROWS)[:, None] * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    tl.store(out_ptr + offsets, kept.to(tl.int32))


def tile_of(
    seed, p, columns, first_row=0, first_column=0, stream=0, long=False, halves=False,
    place=MaskPlace(),
):  # fmt: skip
    out = torch.full((BLOCK_ROWS, BLOCK_COLUMNS), -1, dtype=torch.int32)
    mask_kernel[(1,)](
        out, seed, first_row, first_column, place.first_group(columns),
        place.groups_per_row(columns), drop_threshold(p), stream,
        LONG_COUNTER=long, HALVES=halves, BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS,
    )  # fmt: skip
    return out.bool()


@pytest.mark.parametrize("halves", [False, True], ids=["whole", "halves"])
@pytest.mark.parametrize("long", [False, True], ids=["32_bits", "64_bits"])
@pytest.mark.parametrize("columns", [32, 53, 64, 67])
@pytest.mark.parametrize("seed", [0, -1, 0x1234_5678_9ABC_DEF1, -(2**63)])
def test_bits_of_the_definition(seed, columns, long, halves):
    seed = torch.tensor(seed)
    expected = keep_mask(seed, 0.3, 40, columns)
    for first_row, first_column in ((0, 0), (24, 0), (24, 32)):
        actual = tile_of(seed, 0.3, columns, first_row, first_column, long=long, halves=halves)
        part = expected[first_row : first_row + 16, first_column : first_column + 32]
        assert torch.equal(actual[:, : part.shape[1]], part)
        assert part.any() or part.numel() == 0


@pytest.mark.parametrize("p", [1 / 65536, 0.05, 0.5, 0.999, 0.99999])
@pytest.mark.parametrize("stream", [0, 1, 77])
def test_probabilities_and_streams(p, stream):
    seed = torch.tensor(5)
    expected = keep_mask(seed, p, BLOCK_ROWS, BLOCK_COLUMNS, stream)
    assert torch.equal(tile_of(seed, p, BLOCK_COLUMNS, stream=stream), expected)


@pytest.mark.parametrize("halves", [False, True], ids=["whole", "halves"])
@pytest.mark.parametrize(
    "place",
    [
        pytest.param(MaskPlace(7, 24, 90), id="short"),
        pytest.param(MaskPlace(2**31 // 12 - 60, 24, 90), id="last of 31 bits"),
        pytest.param(MaskPlace(2**31 // 12 - 8, 24, 90), id="across 2^31"),
        pytest.param(MaskPlace(2**32 // 12 - 8, 24, 90), id="across 2^32"),
        pytest.param(MaskPlace(2**45 + 1, 24, 90), id="far"),
    ],
)
def test_bits_of_a_slice(place, halves):
    seed = torch.tensor(-5)
    long = place.needs_long_counter(40, 53)
    assert long == (place.row_offset > 2**31 // 12 - 60)
    expected = keep_mask(seed, 0.3, 40, 53, 2, place)
    for first_row, first_column in ((0, 0), (24, 0), (24, 32)):
        actual = tile_of(
            seed, 0.3, 53, first_row, first_column, 2, long=long, halves=halves, place=place
        )
        part = expected[first_row : first_row + 16, first_column : first_column + 32]
        assert torch.equal(actual[:, : part.shape[1]], part)


def test_groups_past_32_bits():
    """Row 2^30 of 40 columns starts at group 5 * 2^30, which needs the second counter word."""
    first_row, columns, seed = 2**30 - 3, 40, torch.tensor(11)
    actual = tile_of(seed, 0.5, columns, first_row, long=True)
    from lora_kernels.runtime.dropout import _pack_lanes, _philox_words

    for row in range(BLOCK_ROWS):
        first_group = (first_row + row) * 5
        words = _philox_words(first_group, 4, (11, 0), 0, seed.device)
        packed = _pack_lanes(words, drop_threshold(0.5))
        bits = (packed[:, None] >> torch.arange(8)) & 1
        assert torch.equal(actual[row], bits.flatten().bool())
