"""Tile choice: pure functions of shape, dtype and device, for every shape somebody may bring."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_kernels.ops.linear.triton import tiles
from lora_kernels.ops.linear.triton.tiles import DeviceLimits, LinearCell

A100 = DeviceLimits("A100", 80, 108, 166_912)
RTX_4090 = DeviceLimits("RTX 4090", 89, 128, 101_376)
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
devices = st.sampled_from([A100, RTX_4090, H200, B200, DeviceLimits()])


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
    assert tile.num_stages * stage <= limits.shared_memory
    assert 1 <= tile.parts <= max(1, tiles.cdiv(cell.in_features, tile.BLOCK_D))
    assert min(cell.rank, tiles.MAX_BLOCK_R) <= tile.BLOCK_R, "x is read once"


@given(cell=cells, limits=devices, aligned=st.booleans())
def test_rank_gradient(cell, limits, aligned):
    tile = tiles.rank_gradient_tile(cell, cell.out_features, limits, aligned=aligned)
    check_common(tile, ("BLOCK_M", "BLOCK_D", "BLOCK_R"))
    stage = tile.BLOCK_M * (tile.BLOCK_D * cell.itemsize + tile.BLOCK_R * 4)
    assert tile.num_stages * stage <= limits.shared_memory
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
    table = {"cells": {cell.key: {"strategy": "fused", "gemm": {"num_stages": 4}}}}
    path = tmp_path / "NVIDIA_H200" / "lora_linear.json"
    path.parent.mkdir()
    path.write_text(json.dumps(table))
    monkeypatch.setattr(tiles, "TUNED", tmp_path)
    tiles.shipped_cells.cache_clear()
    try:
        options = {"aligned": True, "row_major": True, "has_main": True, "two_results": False}
        assert tiles.strategy(cell, H200) == "fused" and tiles.strategy(cell, A100) == "hybrid"
        tuned = tiles.gemm_tile(cell, 4096, H200, **options)
        plain = tiles.gemm_tile(cell_of(tokens=20_000), 4096, H200, **options)
        assert (tuned.num_stages, plain.num_stages) == (4, 3)
        assert tuned.BLOCK_C == plain.BLOCK_C
        with tiles.use_cells({"*": {"strategy": "hybrid"}}):
            assert tiles.strategy(cell, H200) == "hybrid"
        assert tiles.strategy(cell, H200) == "fused"
    finally:
        tiles.shipped_cells.cache_clear()
