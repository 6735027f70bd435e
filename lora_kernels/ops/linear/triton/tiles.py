"""Tile sizes of ``lora_linear``'s kernels, and which strategy runs: functions of shapes alone.

Nothing here touches a GPU or imports Triton. ``tuned/<gpu>/lora_linear.json`` overrides single
fields for the cells that were measured::

    {"cells": {"forward/bfloat16/M8192/K4096/N4096/R16/p0":
        {"strategy": "fused", "gemm": {"num_stages": 4}, "shrink": {"BLOCK_M": 128}}}}

with ``backward`` likewise (``gemm``, ``shrink``, ``rank_gradient``; ``native`` for the CUDA GEMM's
``tile_columns`` and ``cluster``), M and R rounded up to powers of two, and p 0 or 1 for without and
with dropout. What ``tune`` has measured of a cell stands beside them (``choice.py``).
"""

import functools
import json
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.runtime import tables
from lora_kernels.runtime.device_limits import (
    DRAWING_WARPS,
    DeviceLimits,
    PipelineBytes,
    Tile,
    blocks_at_once,
    cdiv,
    clamp,
    narrow_loop,
    next_power_of_two,
    pipeline_stages,
    precision,
)
from lora_kernels.runtime.dtypes import short_name
from lora_kernels.runtime.plan import forget_plans, until_forgotten

TUNED = Path(__file__).parents[3] / "tuned"

# "fused" runs base and adapter in one GEMM; "hybrid" lets our kernel write the adapter's part and
# the vendor's GEMM accumulate the base on top of it (beta = 1).
STRATEGIES = ("fused", "hybrid")

# Fewer rows are less than one tile of the fused GEMM high: it has no split of the reduction to make
# work of them, the vendor's has (reasoned, not measured).
FUSED_ROWS = 128

# The widest rank tile. Higher ranks read the activation once more per 128.
MAX_BLOCK_R = 128


@dataclass(frozen=True)
class ShrinkTile(Tile):
    BLOCK_M: int
    BLOCK_D: int
    BLOCK_R: int
    parts: int  # of the reduction
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class RankGradientTile(Tile):
    BLOCK_M: int
    BLOCK_D: int
    BLOCK_R: int
    parts: int  # of the rows
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GemmTile(Tile):
    BLOCK_M: int
    BLOCK_C: int
    BLOCK_D: int
    BLOCK_R: int
    GROUP_M: int
    tma: bool
    num_warps: int
    num_stages: int


class LinearCell(NamedTuple):
    """One direction of one call: what a tuned table is looked up by."""

    direction: str  # "forward" or "backward"
    dtype: str
    itemsize: int
    tokens: int  # M
    in_features: int  # K
    out_features: int  # N
    rank: int  # R
    dropout: bool
    ieee: bool  # fp32 products without TF32: no matrix units
    reads_tables: bool = True  # of this machine: not where algorithms are to be deterministic

    @property
    def key(self) -> str:
        tokens, rank = next_power_of_two(self.tokens), next_power_of_two(self.rank)
        return (
            f"{self.direction}/{self.dtype}/M{tokens}/K{self.in_features}/N{self.out_features}"
            f"/R{rank}/p{int(self.dropout)}"
        )


def cell_of(
    direction: str,
    activation: Tensor,  # [M, K] of x, or [M, N] of dy
    in_features: int,
    out_features: int,
    rank: int,
    dropout: bool,
) -> LinearCell:
    dtype = activation.dtype
    ieee = dtype == torch.float32 and precision(dtype) == "ieee"
    return LinearCell(
        direction, short_name(dtype), dtype.itemsize, activation.shape[0], in_features,
        out_features, rank, dropout, ieee, not torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


@until_forgotten
def strategy(cell: LinearCell, limits: DeviceLimits) -> str:
    """``fused`` or ``hybrid``, as measured; ``hybrid`` where nobody measured.

    The rule for unmeasured cells: the base GEMM is nearly all of the time, the vendor's is close to
    the device's ceiling everywhere, and what ours reaches on an unknown device is not known. With
    ``hybrid`` the loss is bounded by one more write and read of the result. A shipped ``fused`` is
    not taken below FUSED_ROWS, which the cell of 128 rows would have it for.
    """
    named = tuned(cell, limits).get("strategy", "hybrid")
    if named == "fused" and cell.tokens < FUSED_ROWS and _replacement is None:
        return "hybrid"
    return named


@until_forgotten
def shrink_tile(
    cell: LinearCell, depth: int, narrow_itemsize: int, limits: DeviceLimits, *, aligned: bool
) -> ShrinkTile:
    """The tile of ``[M, depth] @ [depth, R]``; small M splits the reduction for every SM."""
    block_m = clamp(next_power_of_two(cell.tokens), 16, 64)
    block_r = clamp(next_power_of_two(cell.rank), 16, MAX_BLOCK_R)
    block_d = 128 if block_r <= 32 and cell.itemsize == 2 else 64
    if cell.ieee:
        block_d, block_m = 32, min(block_m, 32 if block_r <= 64 else 16)
    elif not aligned:
        # Every element has its own pointer and predicate in registers.
        block_d, block_m = 64, min(block_m, 32 if block_r == MAX_BLOCK_R else 64)
    programs = cdiv(cell.tokens, block_m) * cdiv(cell.rank, block_r)
    blocks = cdiv(depth, block_d)
    parts = 1
    if 4 * programs < 3 * limits.multiprocessors:
        # Below four blocks per part the pipeline does not fill.
        parts = max(1, min(2 * limits.multiprocessors // max(programs, 1), blocks // 4))
    masked = cell.dropout and cell.direction == "forward"
    cast = narrow_itemsize != cell.itemsize
    num_warps = 8 if block_r >= 64 and block_m >= 32 else 4
    if masked and block_m >= 32:
        num_warps = DRAWING_WARPS
    loop = narrow_loop(
        block_m * block_d * cell.itemsize,
        block_d * block_r * narrow_itemsize,
        block_d * block_r * cell.itemsize if cast else 0,
        limits,
        masked=masked,
        ieee=cell.ieee,
    )
    num_stages = pipeline_stages(4, loop, limits)
    tile = ShrinkTile(block_m, block_d, block_r, parts, num_warps, num_stages)
    return replace(tile, **tuned(cell, limits).get("shrink", {}))


@until_forgotten
def rank_gradient_tile(
    cell: LinearCell, depth: int, limits: DeviceLimits, *, aligned: bool
) -> RankGradientTile:
    """The tile of ``[depth, M] @ [M, R]``; the rows are split into as many parts as run at once."""
    block_r = clamp(next_power_of_two(cell.rank), 16, MAX_BLOCK_R)
    block_d = 128 if block_r > 32 or cell.dropout else 256
    if cell.itemsize == 4 or not aligned:
        # Wide elements, or a pointer and a predicate in registers for each.
        block_d = 64
    block_d = clamp(next_power_of_two(depth), 64, block_d)
    block_m = 64
    if cell.ieee:
        block_d, block_m = 64, 32
    cast = cell.itemsize != 4
    num_warps = 8 if block_d * block_r >= 4096 else 4
    if cell.dropout:
        num_warps = DRAWING_WARPS
    loop = narrow_loop(
        block_m * block_d * cell.itemsize,
        block_m * block_r * 4,
        block_m * block_r * cell.itemsize if cast else 0,
        limits,
        masked=cell.dropout,
        ieee=cell.ieee,
    )
    if not cell.dropout and projects_in_same_pass(cell, depth, block_d):
        factor = block_d * block_r * cell.itemsize
        loop = replace(loop, besides=loop.besides + factor)
    num_stages = pipeline_stages(3, loop, limits)
    programs = cdiv(depth, block_d) * cdiv(cell.rank, block_r)
    blocks = cdiv(cell.tokens, block_m)
    registers = rank_gradient_registers(block_r, num_warps, limits)
    shared = loop.of(num_stages, limits)
    at_once = limits.multiprocessors * blocks_at_once(num_warps, registers, shared, limits)
    # Rounded down: a few programs more than run at once take as long as twice as many.
    parts = clamp(at_once // programs, 1, max(blocks, 1))
    # Whole blocks per part: no part may be left without rows.
    parts = cdiv(blocks, cdiv(blocks, parts)) if blocks else 1
    tile = RankGradientTile(block_m, block_d, block_r, parts, num_warps, num_stages)
    return replace(tile, **tuned(cell, limits).get("rank_gradient", {}))


def rank_gradient_registers(block_r: int, num_warps: int, limits: DeviceLimits) -> int:
    """What a thread of ``rank_gradient_kernel`` takes at most, as every Triton that is tested
    compiles it for every architecture. Of one token alone it may take more; there is one part."""
    if block_r > 32:
        return 255
    if num_warps == 4:
        return 208
    return 168 if limits.capability >= 120 else 128


def projects_in_same_pass(cell: LinearCell, depth: int, block_d: int) -> bool:
    """Whether t comes from the pass over dy that gives dB, or from a shrink of its own.

    In the same pass every ``block_d`` columns write a partial t. That is worth it while writing and
    reading these costs at most half of another read of dy: at small ranks.
    """
    partials = 2 * 4 * cell.rank * cdiv(depth, block_d)
    return 2 * partials <= depth * cell.itemsize


@until_forgotten
def gemm_tile(
    cell: LinearCell,
    columns: int,
    limits: DeviceLimits,
    *,
    aligned: bool,
    row_major: bool,
    has_main: bool,
    two_results: bool,
) -> GemmTile:
    """The tile of the ``[M, columns]`` result of the GEMM with a tail.

    ``aligned``: TMA can address every operand; ``row_major``: the left ones by rows;
    ``has_main``: not the tail alone; ``two_results``: the unscaled result is written too.
    """
    tma = aligned and row_major and limits.capability >= 90 and cell.itemsize == 2 and has_main
    block_m = clamp(next_power_of_two(cell.tokens), 16, 128)
    block_r = 16 if cell.rank <= 16 else 32 if cell.rank <= 64 else 64
    block_c, block_d, num_warps, num_stages = 128, 32, 8, 4
    if cell.ieee:
        block_m, block_c, block_d, block_r = min(block_m, 64), 64, 16, 16
        num_warps, num_stages = 4, 2
    elif tma:
        wide = wide_tile_pays(cell, columns, limits, two_results=two_results)
        block_m, block_d = max(block_m, 64), 64
        block_c, num_stages = (256, 3) if wide and block_m == 128 else (128, 4)
        num_warps = 8 if block_m == 128 else 4
    elif not aligned:
        # Every element has its own pointer and predicate in registers.
        block_m, num_warps = min(block_m, 64), 4 if block_m <= 32 else 8
    elif cell.itemsize == 4:
        block_r = min(block_r, 32)
    loop = gemm_loop(block_m, block_c, block_d if has_main else block_r, cell.itemsize, tma=tma)
    num_stages = pipeline_stages(num_stages, loop, limits)
    tile = GemmTile(block_m, block_c, block_d, block_r, 8, tma, num_warps, num_stages)
    if not has_main:
        return tile
    return replace(tile, **tuned(cell, limits).get("gemm", {}))


def gemm_loop(
    block_m: int, block_c: int, block_d: int, itemsize: int, *, tma: bool
) -> PipelineBytes:
    """The main loop, and half a tile on its way out: as it is stored by TMA, else in fp32."""
    stage = (block_m + block_c) * block_d * itemsize
    return PipelineBytes(stage, 0, block_m * block_c * (itemsize if tma else 4) // 2)


def wide_tile_pays(
    cell: LinearCell, columns: int, limits: DeviceLimits, *, two_results: bool
) -> bool:
    """Whether 128 x 256 tiles are taken by TMA: with work for every SM and three stages.

    On sm_100 the accumulator comes from tensor memory all at once; two results would spill.
    """
    tiles = cdiv(cell.tokens, 128) * cdiv(columns, 256)
    stages = pipeline_stages(3, gemm_loop(128, 256, 64, cell.itemsize, tma=True), limits)
    spills = two_results and limits.capability >= 100
    return tiles >= limits.multiprocessors and stages == 3 and not spills


# --- tuned tables ----------------------------------------------------------------------------

_replacement: dict | None = None


@contextmanager
def use_cells(cells: dict | None):
    """Take ``cells`` instead of the shipped table, in the whole process (backward threads too).

    The key ``"*"`` stands for every cell that is not named. For tuning and tests.
    """
    global _replacement
    before, _replacement = _replacement, cells
    forget_plans()
    try:
        yield
    finally:
        _replacement = before
        forget_plans()


class Measured(NamedTuple):
    """What is recorded for a cell: its entry, None where there is nothing, under which key and
    where. shipped: it was not measured on this machine."""

    cell: dict | None
    key: str
    source: str = ""
    shipped: bool = False


@until_forgotten
def measured(cell: LinearCell, limits: DeviceLimits) -> Measured:
    """The entry of the cell in this machine's table or the shipped one, or its neighbour's."""
    if _replacement is not None:
        return Measured(_replacement.get(cell.key) or _replacement.get("*"), cell.key, "given")
    own = {}
    if cell.reads_tables and limits.name != DeviceLimits.name:
        own = tables.cells_of_gpu("lora_linear", limits)
    found = (own, "tune on this machine"), (shipped_cells(limits.name), "shipped with the package")
    for cells, source in found:
        if cell.key in cells:
            return Measured(cells[cell.key], cell.key, source, cells is not own)
    for cells, source in found:
        if (key := _neighbour(cell, cells)) is not None:
            # Its tiles are of its own sizes.
            entry = {
                name: cells[key][name]
                for name in ("backend", "strategy", "seconds")
                if name in cells[key]
            }
            return Measured(entry, key, f"{source}, of a neighbour", cells is not own)
    return Measured(None, cell.key)


def tuned(cell: LinearCell, limits: DeviceLimits) -> dict:
    """What a table says about the cell; empty where it says nothing."""
    return measured(cell, limits).cell or {}


_KEY = re.compile(r"(.*)/M(\d+)/K(\d+)/N(\d+)/(R\d+/p\d)")


def _parts(key: str) -> tuple[str, int, int, int, str] | None:
    found = _KEY.fullmatch(key)
    return found and (found[1], int(found[2]), int(found[3]), int(found[4]), found[5])


def _neighbour(cell: LinearCell, cells: dict) -> str | None:
    """The key with the nearest M, K and N, each within a factor of two, and all else the same."""
    prefix, m, k, n, suffix = _parts(cell.key) or (cell.key, 1, 1, 1, "")
    best = None
    for key, entry in cells.items():
        found = _parts(key)
        if found is None or (found[0], found[4]) != (prefix, suffix) or "backend" not in entry:
            continue
        sizes = zip((m, k, n), found[1:4], strict=True)
        distances = [abs(math.log2(a / b)) for a, b in sizes]
        if max(distances) <= 1 and (best is None or (sum(distances), key) < best):
            best = sum(distances), key
    return best and best[1]


@functools.cache
def shipped_cells(device_name: str) -> dict:
    """The cells of ``tuned/<gpu>/lora_linear.json``; empty for a device nobody tuned for."""
    path = TUNED / device_name.replace(" ", "_") / "lora_linear.json"
    return json.loads(path.read_text())["cells"] if path.is_file() else {}
