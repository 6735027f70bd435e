"""Tile choice: pure functions of shape, dtype and device, for every shape somebody may bring."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_kernels.ops.linear.triton import tiles
from lora_kernels.ops.linear.triton.tiles import DeviceLimits, LinearCell
from lora_kernels.runtime.device_limits import (
    PipelineBytes,
    blocks_at_once,
    narrow_loop,
    pipeline_stages,
)

A100 = DeviceLimits("A100", 80, 108, 166_912)
RTX_3090 = DeviceLimits("RTX 3090", 86, 82, 101_376)
A10 = DeviceLimits("A10", 86, 72, 101_376)
RTX_4090 = DeviceLimits("RTX 4090", 89, 128, 101_376)
L40S = DeviceLimits("L40S", 89, 142, 101_376)
RTX_5090 = DeviceLimits("RTX 5090", 120, 170, 101_376)
H200 = DeviceLimits("NVIDIA H200", 90, 132, 232_448)
B200 = DeviceLimits("B200", 100, 148, 232_448)


def cell_of(tokens=8192, in_features=4096, out_features=4096, rank=16, dtype="bfloat16", **options):
    ieee = options.pop("ieee", dtype == "float32")
    itemsize = 4 if dtype == "float32" else 2
    return LinearCell(
        "forward", dtype, itemsize, tokens, in_features, out_features, rank,
        options.get("dropout", False), ieee,
    )  # fmt: skip


cells = st.builds(
    cell_of,
    tokens=st.one_of(st.integers(1, 300), st.integers(1, 2**24)),
    in_features=st.integers(1, 60_000),
    out_features=st.integers(1, 60_000),
    rank=st.integers(1, 2048),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    dropout=st.booleans(),
    ieee=st.just(False),
)
SMALL = [RTX_3090, A10, RTX_4090, L40S, RTX_5090]
devices = st.sampled_from([A100, H200, B200, DeviceLimits(), *SMALL])


def is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def check_common(tile, sizes: tuple[str, ...]) -> None:
    for name in sizes:
        assert is_power_of_two(getattr(tile, name)) and getattr(tile, name) >= 16, name
    assert tile.num_warps in (4, 8) and 1 <= tile.num_stages <= 4


@given(cell=cells, limits=devices, aligned=st.booleans(), itemsize=st.sampled_from([2, 4, 8]))
def test_shrink(cell, limits, aligned, itemsize):
    tile = tiles.shrink_tile(cell, cell.in_features, itemsize, limits, aligned=aligned)
    check_common(tile, ("BLOCK_M", "BLOCK_D", "BLOCK_R"))
    stage = tile.BLOCK_D * (tile.BLOCK_M * cell.itemsize + tile.BLOCK_R * itemsize)
    assert (tile.num_stages - 1) * stage <= limits.shared_memory
    if cell.dropout and tile.BLOCK_M >= 32:
        assert tile.num_warps == 8
    stays_in_registers = cell.dropout and limits.capability == 90 and itemsize == cell.itemsize
    assert not stays_in_registers or cell.ieee or tile.num_stages == 1
    assert 1 <= tile.parts <= max(1, tiles.cdiv(cell.in_features, tile.BLOCK_D))
    assert min(cell.rank, tiles.MAX_BLOCK_R) <= tile.BLOCK_R, "x is read once"


@given(cell=cells, limits=devices, aligned=st.booleans())
def test_rank_gradient(cell, limits, aligned):
    tile = tiles.rank_gradient_tile(cell, cell.out_features, limits, aligned=aligned)
    check_common(tile, ("BLOCK_M", "BLOCK_D", "BLOCK_R"))
    stage = tile.BLOCK_M * (tile.BLOCK_D * cell.itemsize + tile.BLOCK_R * 4)
    assert (tile.num_stages - 1) * stage <= limits.shared_memory
    assert not cell.dropout or tile.num_warps == 8
    stays_in_registers = cell.dropout and limits.capability == 90 and cell.itemsize == 4
    assert not stays_in_registers or cell.ieee or tile.num_stages == 1
    blocks = tiles.cdiv(cell.tokens, tile.BLOCK_M)
    assert 1 <= tile.parts <= blocks
    assert (tile.parts - 1) * tiles.cdiv(blocks, tile.parts) < blocks, "a part without rows"


@given(cell=cells, limits=devices, flags=st.tuples(*[st.booleans()] * 4))
def test_gemm(cell, limits, flags):
    aligned, row_major, has_main, two_results = flags
    tile = tiles.gemm_tile(
        cell, cell.out_features, limits,
        aligned=aligned, row_major=row_major, has_main=has_main, two_results=two_results,
    )  # fmt: skip
    check_common(tile, ("BLOCK_M", "BLOCK_C", "BLOCK_D", "BLOCK_R"))
    assert not tile.tma or (aligned and row_major and limits.capability >= 90)
    depth = max(tile.BLOCK_D if has_main else 0, tile.BLOCK_R)
    stage = (tile.BLOCK_M + tile.BLOCK_C) * depth * cell.itemsize
    assert min(tile.num_stages, 2) * stage <= limits.shared_memory


@pytest.mark.parametrize("limits", [H200, B200])
def test_wide_tiles_where_three_stages_fit(limits):
    assert tiles.wide_tile_pays(cell_of(), 4096, limits, two_results=False)
    assert not tiles.wide_tile_pays(cell_of(tokens=512), 4096, limits, two_results=False)


def test_no_wide_tile_with_one_stage_on_a_small_card():
    assert not tiles.wide_tile_pays(cell_of(), 4096, RTX_5090, two_results=False)
    options = {"aligned": True, "row_major": True, "has_main": True, "two_results": False}
    tile = tiles.gemm_tile(cell_of(), 4096, RTX_5090, **options)
    assert tile.tma and (tile.BLOCK_C, tile.num_stages) == (128, 3)


@pytest.mark.parametrize("limits", [A100, H200, B200, *SMALL], ids=lambda limits: limits.name)
@pytest.mark.parametrize("columns", [2048, 4096, 11_008, 14_336])
@pytest.mark.parametrize("dropout", [False, True])
def test_no_second_wave_for_a_few_parts(columns, dropout, limits):
    """As many programs as run at once, or each block of columns in one part."""
    cell = cell_of(dropout=dropout)
    tile = tiles.rank_gradient_tile(cell, columns, limits, aligned=True)
    registers = tiles.rank_gradient_registers(tile.BLOCK_R, tile.num_warps, limits)
    most = limits.multiprocessors * min(
        65_536 // (32 * tile.num_warps * registers), limits.threads // (32 * tile.num_warps)
    )
    programs = tiles.cdiv(columns, tile.BLOCK_D) * tile.parts
    assert programs <= most or tile.parts == 1


def test_a_small_card_pipelines_what_goes_through_registers():
    """Three stages: two tiles of dy and of h. Triton takes 53,248 bytes for them."""
    tile = tiles.rank_gradient_tile(cell_of(), 4096, RTX_4090, aligned=True)
    assert (tile.BLOCK_M, tile.BLOCK_D, tile.num_stages) == (64, 256, 3)


def test_blocks_at_once():
    """By each of the three: shared memory, registers, threads."""
    assert blocks_at_once(8, 64, 118_784, H200) == 1
    assert blocks_at_once(8, 64, 110_592, H200) == 2
    assert blocks_at_once(8, 128, 1_000, H200) == 2
    assert blocks_at_once(8, 129, 1_000, H200) == 1
    assert blocks_at_once(4, 32, 0, H200) == 16 and blocks_at_once(4, 32, 0, RTX_4090) == 12
    assert blocks_at_once(8, 255, 200_000, RTX_4090) == 1, "it runs, or it would not start at all"


def test_pipelines():
    """A buffer for every stage that is read in place, one less where it passes registers."""
    in_place, registers = PipelineBytes(10_000, 0, 500), PipelineBytes(0, 10_000, 500)
    assert (in_place.of(3, H200), in_place.of(3, A100)) == (30_500, 20_500)
    assert registers.of(3, H200) == registers.of(3, A100) == 20_500
    assert pipeline_stages(4, PipelineBytes(0, 49_000), RTX_4090) == 3
    assert pipeline_stages(4, PipelineBytes(0, 49_000, 2_000), RTX_4090) == 2
    assert pipeline_stages(4, PipelineBytes(0, 200_000), RTX_4090) == 1


@given(wanted=st.integers(1, 4), sizes=st.tuples(*[st.integers(1, 60_000)] * 3), limits=devices)
def test_as_many_stages_as_fit(wanted, sizes, limits):
    loop = PipelineBytes(*sizes)
    stages = pipeline_stages(wanted, loop, limits)
    assert stages == 1 or loop.of(stages, limits) <= limits.shared_memory - 2048
    assert stages == wanted or loop.of(stages + 1, limits) > limits.shared_memory - 2048


def test_a_product_that_stays_in_flight_has_no_pipeline():
    """Of sm_90, where its masked operand is in registers and the other is read as it lies."""
    for limits in (A100, H200, B200, *SMALL):
        for cast, masked, ieee in itertools.product((0, 5), (True, False), (True, False)):
            loop = narrow_loop(100, 10, cast, limits, masked=masked, ieee=ieee)
            alone = limits is H200 and masked and not cast and not ieee
            assert pipeline_stages(4, loop, limits) == (1 if alone else 4)


def test_what_is_cast_or_masked_passes_registers():
    plain, masked = ({"masked": masked, "ieee": False} for masked in (False, True))
    assert narrow_loop(100, 10, 0, H200, **plain) == PipelineBytes(110, 0, 0)
    assert narrow_loop(100, 10, 5, H200, **plain) == PipelineBytes(100, 10, 5)
    assert narrow_loop(100, 10, 5, H200, **masked) == PipelineBytes(0, 110, 105)
    assert narrow_loop(100, 10, 5, RTX_4090, **plain) == PipelineBytes(0, 110, 0)
    assert narrow_loop(100, 10, 5, RTX_4090, **masked) == PipelineBytes(0, 110, 100)


def test_split_fills_the_device_when_tokens_are_few():
    few = tiles.shrink_tile(cell_of(tokens=4), 14_336, 2, H200, aligned=True)
    many = tiles.shrink_tile(cell_of(tokens=8192), 14_336, 2, H200, aligned=True)
    assert few.parts > 16 and many.parts == 1


@pytest.mark.parametrize("rank, same_pass", [(8, True), (16, True), (64, False), (128, False)])
def test_t_comes_from_the_same_pass_at_small_ranks(rank, same_pass):
    cell = cell_of(rank=rank)
    tile = tiles.rank_gradient_tile(cell, 4096, H200, aligned=True)
    assert tiles.projects_in_same_pass(cell, 4096, tile.BLOCK_D) == same_pass


def test_unmeasured_devices_take_the_vendors_gemm():
    for limits in (A100, H200, B200, DeviceLimits("a GPU of tomorrow", 130, 300, 500_000)):
        with tiles.use_cells({}):
            assert tiles.strategy(cell_of(), limits) == "hybrid"


def test_tuned_table_overrides_single_fields(tmp_path, monkeypatch):
    cell = cell_of(tokens=5000, rank=12)
    assert cell.key == "forward/bfloat16/M8192/K4096/N4096/R16/p0"
    few = cell_of(tokens=127, rank=12)
    fused = {"strategy": "fused", "gemm": {"num_stages": 4}}
    table = {"cells": {cell.key: fused, few.key: fused}}
    path = tmp_path / "NVIDIA_H200" / "lora_linear.json"
    path.parent.mkdir()
    path.write_text(json.dumps(table))
    monkeypatch.setattr(tiles, "TUNED", tmp_path)
    tiles.shipped_cells.cache_clear()
    try:
        options = {"aligned": True, "row_major": True, "has_main": True, "two_results": False}
        assert tiles.strategy(cell, H200) == "fused" and tiles.strategy(cell, A100) == "hybrid"
        for tokens, taken in ((127, "hybrid"), (128, "fused")):
            assert tiles.strategy(cell_of(tokens=tokens, rank=12), H200) == taken
        tuned = tiles.gemm_tile(cell, 4096, H200, **options)
        plain = tiles.gemm_tile(cell_of(tokens=20_000), 4096, H200, **options)
        assert (tuned.num_stages, plain.num_stages) == (4, 3)
        assert tuned.BLOCK_C == plain.BLOCK_C
        with tiles.use_cells({"*": {"strategy": "hybrid"}}):
            assert tiles.strategy(cell, H200) == "hybrid"
        with tiles.use_cells({few.key: fused}):
            assert tiles.strategy(few, H200) == "fused", "what is named is taken"
        assert tiles.strategy(cell, H200) == "fused"
    finally:
        tiles.shipped_cells.cache_clear()
