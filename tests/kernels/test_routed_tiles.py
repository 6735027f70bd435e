"""Tile choice of routed_lora: functions of shapes and the device, never of a routing's content."""

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_kernels.ops.routed.triton import tiles
from lora_kernels.ops.routed.triton.tiles import RoutedCell
from lora_kernels.runtime.device_limits import DeviceLimits, cdiv

A100 = DeviceLimits("A100", 80, 108, 166_912)
A10 = DeviceLimits("A10", 86, 72, 101_376)
RTX_4090 = DeviceLimits("RTX 4090", 89, 128, 101_376)
RTX_5090 = DeviceLimits("RTX 5090", 120, 170, 101_376)
H200 = DeviceLimits("NVIDIA H200", 90, 132, 232_448)
B200 = DeviceLimits("B200", 100, 148, 232_448)


def cell_of(
    pairs=8192, width=16, itemsize=2, factor_itemsize=2, slots=64, ieee=False, fp16=False
) -> RoutedCell:
    block = 16 if pairs <= 256 else 64  # as Routing has it
    return RoutedCell(
        itemsize=4 if ieee else itemsize,
        factor_itemsize=factor_itemsize,
        pairs=pairs,
        block=block,
        num_tiles=pairs // block + min(slots + 1, pairs),
        max_total_rank=width,
        ieee=ieee,
        rounds_to_fp16=fp16 and itemsize == 2 and not ieee and factor_itemsize > 2,
    )


cells = st.builds(
    cell_of,
    pairs=st.one_of(st.integers(1, 300), st.integers(1, 2**24)),
    width=st.integers(1, 2048),
    itemsize=st.sampled_from([2, 4]),
    factor_itemsize=st.sampled_from([2, 4, 8]),
    slots=st.integers(1, 4096),
    ieee=st.booleans(),
    fp16=st.booleans(),
)
devices = st.sampled_from([A100, A10, RTX_4090, RTX_5090, H200, B200, DeviceLimits()])
depths = st.integers(1, 200_000)
slices = st.integers(1, 4)


def check_common(tile, sizes: tuple[str, ...]) -> None:
    for name in sizes:
        size = getattr(tile, name)
        assert size & (size - 1) == 0 and size >= 16, name
    assert tile.num_warps in (4, 8) and 1 <= tile.num_stages <= 4


flags = st.fixed_dictionaries({"aligned": st.booleans(), "masked": st.booleans()})


@given(cell=cells, depth=depths, count=slices, limits=devices, flags=flags, of_a=st.booleans())
def test_shrink(cell, depth, count, limits, flags, of_a):
    tile = tiles.shrink_tile(cell, depth, count, limits, **flags, of_a=of_a)
    check_common(tile, ("BLOCK_D", "BLOCK_R"))
    stage = tile.BLOCK_D * (cell.block * cell.itemsize + tile.BLOCK_R * cell.factor_itemsize)
    loops = 1 if of_a or cell.factor_itemsize == 2 else 2
    assert loops * (tile.num_stages - 1) * stage <= limits.shared_memory
    if flags["masked"] and not tiles.is_small(cell):
        cast = cell.factor_itemsize != cell.itemsize
        assert tile.num_warps == 8
        stays_in_registers = limits.capability == 90 and not cast and not cell.ieee
        assert not stays_in_registers or tile.num_stages == 1
    blocks = cdiv(depth, tile.BLOCK_D)
    assert 1 <= tile.parts <= min(16, blocks)
    assert (tile.parts - 1) * cdiv(blocks, tile.parts) < blocks, "a part without columns"


@given(cell=cells, count=slices, limits=devices, aligned=st.booleans())
def test_expand(cell, count, limits, aligned):
    tile = tiles.expand_tile(cell, count, limits, aligned=aligned)
    check_common(tile, ("BLOCK_C", "BLOCK_R"))
    assert not tiles.is_small(cell) or tile.num_stages == 1, "a cast feeds its product"
    itemsize = max(cell.itemsize, cell.factor_itemsize)
    stage = (cell.block + tile.BLOCK_C) * tile.BLOCK_R * itemsize
    assert (tile.num_stages - 1) * stage <= limits.shared_memory


@given(cell=cells, depth=depths, count=slices, limits=devices, flags=flags)
def test_gradient(cell, depth, count, limits, flags):
    tile = tiles.gradient_tile(cell, depth, count, limits, **flags)
    if flags["masked"] and not tiles.is_small(cell):
        assert tile.num_warps == 8
        stays_in_registers = limits.capability == 90 and cell.itemsize == 4 and not cell.ieee
        assert not stays_in_registers or tile.num_stages == 1
    check_common(tile, ("BLOCK_M", "BLOCK_D", "BLOCK_R"))
    stage = tile.BLOCK_M * (tile.BLOCK_D * cell.itemsize + tile.BLOCK_R * 4)
    assert (tile.num_stages - 1) * stage <= limits.shared_memory
    windows = cdiv(cell.num_tiles, tile.window)
    partials = 2 * 4 * windows * depth * cell.max_total_rank
    assert windows == 1 or partials <= tiles.MAX_PARTIALS


@pytest.mark.parametrize("limits, block_d", [(A100, 64), (RTX_5090, 64), (H200, 128), (B200, 128)])
def test_gradients_of_wide_ranks_leave_registers_for_the_operands(limits, block_d):
    cell = cell_of(width=64)
    found = tiles.gradient_tile(cell, 4096, 1, limits, aligned=True, masked=False).BLOCK_D
    assert found == block_d


@pytest.mark.parametrize("limits, stages", [(RTX_4090, 3), (A100, 4), (H200, 4)])
def test_both_loops_over_b_have_buffers(limits, stages):
    """fp32 adapters over bf16, few pairs: 20,480 bytes a stage, in two loops."""
    cell = cell_of(pairs=32, width=32, factor_itemsize=4)
    options = {"aligned": True, "masked": False}
    assert tiles.shrink_tile(cell, 4096, 1, limits, **options, of_a=False).num_stages == stages
    assert tiles.shrink_tile(cell, 4096, 1, limits, **options, of_a=True).num_stages == 4


@pytest.mark.parametrize("width, count, block_r", [(16, 1, 16), (48, 3, 16), (64, 1, 64)])
def test_rank_tile_fits_one_slice(width, count, block_r):
    assert tiles.rank_block(cell_of(width=width), count) == block_r


def test_few_tokens_split_the_depth_and_many_do_not():
    options = {"aligned": True, "masked": False, "of_a": True}
    few = tiles.shrink_tile(cell_of(pairs=4), 14_336, 1, H200, **options)
    many = tiles.shrink_tile(cell_of(pairs=8192), 14_336, 1, H200, **options)
    assert few.parts == 16 and many.parts == 1


@pytest.mark.parametrize("pairs", [512, 8192, 2**20])
def test_windows_give_every_multiprocessor_work(pairs):
    tile = tiles.gradient_tile(cell_of(pairs=pairs), 4096, 1, H200, aligned=True, masked=False)
    programs = cdiv(pairs, 64 * tile.window) * cdiv(4096, tile.BLOCK_D)
    assert programs >= H200.multiprocessors


SMALL = pytest.mark.parametrize("limits", [A10, RTX_4090, RTX_5090], ids=lambda each: each.name)


@SMALL
@pytest.mark.parametrize("fp16, stages", [(False, 4), (True, 3)])
def test_factors_that_are_rounded_to_fp16_take_memory_of_their_own(fp16, stages, limits):
    """As the full compile sweep found: 106,496 bytes with four stages, and cards have 101,376."""
    cell = cell_of(width=32, factor_itemsize=4, fp16=fp16)
    tile = tiles.shrink_tile(cell, 4096, 1, limits, aligned=True, masked=False, of_a=True)
    assert (tile.BLOCK_D, tile.BLOCK_R, tile.num_stages) == (128, 32, stages)


@pytest.mark.parametrize(
    "limits, fp16, warps",
    [(A100, False, 8), (RTX_4090, False, 8), (RTX_5090, False, 8),
     (H200, False, 4), (H200, True, 4), (B200, False, 4), (B200, True, 8)],
)  # fmt: skip
def test_sums_of_rank_32_have_the_registers_that_they_need(limits, fp16, warps):
    """Four warps spilled, in the full compile sweep, where operands pass through registers."""
    cell = cell_of(width=32, factor_itemsize=4, fp16=fp16)
    tile = tiles.gradient_tile(cell, 4096, 1, limits, aligned=True, masked=False)
    assert (tile.BLOCK_D, tile.BLOCK_R, tile.num_warps) == (128, 32, warps)
    gemm = tiles.gemm_tile(cell, 1, limits, aligned=True)
    assert gemm.num_warps == (4 if limits.multiplies_shared_memory else 8)


def test_nothing_here_sees_a_routing():
    for function in (tiles.shrink_tile, tiles.expand_tile, tiles.gradient_tile):
        assert not {"routing", "offsets", "tokens"} & set(inspect.signature(function).parameters)
    assert set(RoutedCell.__dataclass_fields__) == {
        "itemsize", "factor_itemsize", "pairs", "block", "num_tiles", "max_total_rank", "ieee",
        "rounds_to_fp16",
    }  # fmt: skip
