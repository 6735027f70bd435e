"""The launches of ``routed_lora``'s kernels: from shapes to grids.

Dimensions: M tokens, P pairs of a token and an adapter, K in_features, N out_features of all
slices, H the widest rank of the bank, S slices, T tiles.
"""

# pyright: reportCallIssue=false
# Launches take options of Triton beside the arguments of a kernel, and starred ones.

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.ops.routed.call import RoutedCall
from lora_kernels.ops.routed.tensors import GradientLayout
from lora_kernels.ops.routed.triton import tiles
from lora_kernels.ops.routed.triton.expand_kernels import (
    routed_combine_kernel,
    routed_expand_kernel,
)
from lora_kernels.ops.routed.triton.gemm_kernels import routed_gemm_kernel
from lora_kernels.ops.routed.triton.gradient_kernels import (
    routed_gradient_kernel,
    routed_gradient_reduce_kernel,
)
from lora_kernels.ops.routed.triton.kernels import routed_finish_kernel, routed_shrink_kernel
from lora_kernels.runtime.device_limits import (
    FP_FUSION,
    cdiv,
    limits_of,
    padded_rows,
    precision,
)

_BLOCK = 256  # elements per program of the reduction


class Tail(NamedTuple):
    """What an expand takes on its left: h rounded and scaled, or partial sums that are neither."""

    tensor: Tensor  # [P, H], or [parts, P, H]
    parts: int = 0  # 0: rounded and scaled
    dropped: bool = False  # whether the dropout's scale is missing too


class RoutedLaunch:
    """A bank and a routing as the kernels take them, and the launches of each kernel."""

    def __init__(self, like: Tensor, call: RoutedCall) -> None:
        bank, routing = self.bank, self.routing = call.bank, call.routing
        self.seed, self.place = call.seed, call.place
        self.dtype, self.limits = like.dtype, limits_of(like.device)
        self.pairs, self.num_tiles = routing.tokens.shape[0], routing.tiles.shape[0]
        self.shape_of_h = torch.Size((self.pairs, bank.max_total_rank))
        self.widest = max(b - a for a, b in pairwise(bank.slice_columns))  # of the slices
        self.num_factors = 1 + bank.num_slices
        self.boundaries = tuple(bank.slice_columns) if bank.num_slices > 1 else ()
        self.weights = routing.tokens if routing.pair_weights is None else routing.pair_weights
        self.has_weights = routing.pair_weights is not None
        # As most kernels take them, one behind the other.
        self.lookups = (
            *(bank.scaling, bank.threshold_table),
            *(routing.tiles, routing.offsets, routing.tokens),
            self.weights,
        )
        self.cell = tiles.RoutedCell(
            itemsize=like.dtype.itemsize,
            factor_itemsize=bank.storage.dtype.itemsize,
            pairs=self.pairs,
            block=routing.block,
            num_tiles=self.num_tiles,
            max_total_rank=bank.max_total_rank,
            ieee=like.dtype == torch.float32 and precision(like.dtype) == "ieee",
            rounds_to_fp16=like.dtype == torch.float16 != bank.storage.dtype,
        )

    # --- narrow results -----------------------------------------------------------------------

    def shrink(self, x: Tensor, h: Tensor | None) -> Tail:
        """``D(x) A^T`` as an expand takes it, and into ``h`` if given."""
        if tiles.is_small(self.cell) and h is None:
            tile = self._narrow_tile(x, of_a=True)
            partials = x.new_empty((tile.parts, *self.shape_of_h), dtype=torch.float32)
            self._shrink(x, tile, partials, None, of_a=True, split=True)
            return Tail(partials, tile.parts, dropped=self.seed is not None)
        copy = self._copy()
        self._narrow(x, h, copy, of_a=True)
        return Tail(copy)

    def shrink_into(self, h: Tensor, x: Tensor) -> None:
        """``h = D(x) A^T``."""
        self._narrow(x, h, None, of_a=True)

    def project(
        self,
        dy: Tensor,  # [M, N]
        t: Tensor | None,  # [P, H] fp32, written: w s dy B
        h: Tensor | None,  # [P, H], needed for the gradient of the weights
        grad_weights: Tensor | None,  # [P], written
        *,
        rounded: bool,
    ) -> Tensor | None:  # [P, H]
        """t and its rounded copy, and the gradient of the pairs' weights."""
        copy = self._copy() if rounded else None
        self._narrow(dy, t, copy, h, grad_weights, of_a=False)
        return copy

    def scale(self, h: Tensor) -> Tail:
        """h as the user has it, as an expand takes it."""
        if tiles.is_small(self.cell):
            return Tail(h, 1)
        copy = self._copy()
        self._finish(h.unsqueeze(0), None, copy)
        return Tail(copy)

    def _copy(self) -> Tensor:
        return padded_rows(self.bank.storage, self.shape_of_h, self.dtype)

    def _narrow_tile(self, wide: Tensor, *, of_a: bool) -> tiles.ShrinkTile:
        return tiles.shrink_tile(
            self.cell,
            wide.shape[1] if of_a else self.widest,
            1 if of_a else self.bank.num_slices,
            self.limits,
            aligned=_rows_are_aligned(wide),
            masked=of_a and self.seed is not None,
            of_a=of_a,
        )

    def _narrow(
        self,
        wide: Tensor,  # [M, D]
        out: Tensor | None,  # [P, H] fp32, written
        rounded: Tensor | None,  # [P, H], written
        h: Tensor | None = None,  # [P, H]
        grad_weights: Tensor | None = None,  # [P], written
        *,
        of_a: bool,
    ) -> None:
        """The product with A or B, in parts that are added up where the tile has several."""
        tile = self._narrow_tile(wide, of_a=of_a)
        if tile.parts == 1 and grad_weights is None:
            self._shrink(wide, tile, out, rounded, of_a=of_a)
            return
        partials = wide.new_empty((tile.parts, *self.shape_of_h), dtype=torch.float32)
        self._shrink(wide, tile, partials, None, of_a=of_a, split=True)
        dropout = of_a and self.seed is not None
        self._finish(partials, out, rounded, h, grad_weights, is_t=not of_a, dropout=dropout)

    def _shrink(
        self,
        wide: Tensor,  # [M, D]
        tile: tiles.ShrinkTile,
        out: Tensor | None,  # [P, H], or [parts, P, H], written
        rounded: Tensor | None,  # [P, H], written
        *,
        of_a: bool,
        split: bool = False,
    ) -> None:
        bank, routing = self.bank, self.routing
        dropout = of_a and self.seed is not None
        deepest = wide.shape[1] if of_a else self.widest
        blocks_r = cdiv(bank.max_total_rank, tile.BLOCK_R)
        grid = (self.num_tiles * blocks_r, tile.parts, 1 if of_a else bank.num_slices)
        routed_shrink_kernel[grid](
            wide,
            bank.storage,
            bank.slot_table,
            *self.lookups,
            wide if out is None else out,
            wide if rounded is None else rounded,
            self.seed if dropout else wide,
            *self.place.groups(wide.shape[1]),
            wide.shape[0],
            self.pairs,
            wide.shape[1],
            bank.max_total_rank,
            blocks_r,
            *wide.stride(),
            0 if rounded is None else rounded.stride(0),
            cdiv(cdiv(deepest, tile.BLOCK_D), tile.parts),
            OF_A=of_a,
            BOUNDARIES=() if of_a else self.boundaries,
            NUM_FACTORS=self.num_factors,
            HAS_WEIGHTS=self.has_weights,
            HAS_OUT=out is not None,
            HAS_ROUNDED=rounded is not None,
            OUT_IS_SCALED=not of_a,
            FILL=out is not None and not split,
            SPLIT=split,
            DROPOUT=dropout,
            LONG_COUNTER=dropout and self.place.needs_long_counter(*wide.shape),
            PRECISION=precision(wide.dtype),
            BLOCK_M=routing.block,
            BLOCK_D=tile.BLOCK_D,
            BLOCK_R=tile.BLOCK_R,
            num_warps=tile.num_warps,
            enable_fp_fusion=FP_FUSION,
            num_stages=tile.num_stages,
        )

    def _finish(
        self,
        partials: Tensor,  # [parts, P, H] contiguous
        out: Tensor | None,  # [P, H] fp32, written
        rounded: Tensor | None,  # [P, H], written
        h: Tensor | None = None,  # [P, H], needed for the gradient of the weights
        grad_weights: Tensor | None = None,  # [P], written
        *,
        is_t: bool = False,
        dropout: bool = False,
    ) -> None:
        bank, routing = self.bank, self.routing
        routed_finish_kernel[(self.num_tiles,)](
            partials,
            partials if h is None else h,
            bank.slot_table,
            bank.scaling,
            bank.threshold_table,
            routing.tiles,
            routing.offsets,
            self.weights,
            partials if out is None else out,
            partials if rounded is None else rounded,
            partials if grad_weights is None else grad_weights,
            self.pairs,
            bank.max_total_rank,
            partials.shape[0],
            partials.stride(1),
            0 if h is None else h.stride(0),
            0 if rounded is None else rounded.stride(0),
            NUM_FACTORS=self.num_factors,
            HAS_WEIGHTS=self.has_weights,
            HAS_OUT=out is not None,
            HAS_ROUNDED=rounded is not None,
            HAS_WEIGHT_GRADIENT=grad_weights is not None,
            OUT_IS_SCALED=is_t,
            FILL=out is not None,
            DROPOUT=dropout,
            BLOCK_M=routing.block,
            BLOCK_R=32,
            num_warps=4,
            enable_fp_fusion=FP_FUSION,
        )

    # --- wide results -------------------------------------------------------------------------

    @property
    def fuses(self) -> bool:
        """Whether :meth:`gemm` is to be used: every token is in one tile."""
        return self.routing.pairs_per_token == 1 and tiles.strategy(self.cell) == "fused"

    def gemm(
        self,
        left: Tensor,  # [M, D]
        right: Tensor,  # [D, C]
        bias: Tensor | None,  # [C]
        tail: Tensor,  # [P, H] in left's dtype
        *,
        to_b: bool,
    ) -> Tensor:
        """``x W^T + b + w s h B^T`` ``[M, N]``, or ``dy W + keep * (t A)`` ``[M, K]``, in one."""
        bank, routing = self.bank, self.routing
        out = left.new_empty((left.shape[0], right.shape[1]))
        boundaries = self.boundaries if to_b else ()
        dropout = not to_b and self.seed is not None
        aligned = _rows_are_aligned(left) and any(map(_rows_are_aligned, (right, right.t())))
        slices = bank.num_slices if to_b else 1
        tile = tiles.gemm_tile(self.cell, slices, self.limits, aligned=aligned)
        blocks_c = _blocks(out.shape[1], boundaries, tile.BLOCK_C)
        routed_gemm_kernel[(self.num_tiles * blocks_c,)](
            left,
            right,
            tail,
            bank.storage,
            bank.slot_table,
            bank.threshold_table,
            routing.tiles,
            routing.offsets,
            routing.tokens,
            out if bias is None else bias.contiguous(),
            out,
            self.seed if dropout else out,
            *self.place.groups(out.shape[1]),
            *out.shape,
            left.shape[1],
            bank.max_total_rank,
            self.num_tiles,
            blocks_c,
            *left.stride(),
            *right.stride(),
            tail.stride(0),
            TO_B=to_b,
            BOUNDARIES=boundaries,
            NUM_FACTORS=self.num_factors,
            HAS_BIAS=bias is not None,
            DROPOUT=dropout,
            LONG_COUNTER=dropout and self.place.needs_long_counter(*out.shape),
            PRECISION=precision(out.dtype),
            BLOCK_M=routing.block,
            BLOCK_C=tile.BLOCK_C,
            BLOCK_D=tile.BLOCK_D,
            BLOCK_R=tile.BLOCK_R,
            GROUP_M=tile.GROUP_M,
            num_warps=tile.num_warps,
            enable_fp_fusion=FP_FUSION,
            num_stages=tile.num_stages,
        )
        return out

    def expand(self, out: Tensor, tail: Tail, *, to_b: bool, overwrite: bool = False) -> None:
        """``out += w s h B^T`` ``[M, N]``, or ``keep * (t A)`` ``[M, K]``; or ``out = ...``."""
        bank, routing = self.bank, self.routing
        columns = out.shape[1]
        by_pair = routing.pairs_per_token > 1
        boundaries = self.boundaries if to_b else ()
        target, has_delta = out, out
        if by_pair:
            target = out.new_empty((self.pairs, columns))
            has_delta = out.new_empty(
                (bank.num_slices if to_b else 1, self.pairs), dtype=torch.int8
            )
        dropout = not to_b and self.seed is not None
        slices = bank.num_slices if to_b else 1
        aligned = _rows_are_aligned(target)
        tile = tiles.expand_tile(self.cell, slices, self.limits, aligned=aligned)
        routed_expand_kernel[(self.num_tiles, _blocks(columns, boundaries, tile.BLOCK_C))](
            tail.tensor,
            bank.storage,
            bank.slot_table,
            *self.lookups,
            target,
            has_delta,
            self.seed if dropout else out,
            *self.place.groups(columns),
            out.shape[0],
            self.pairs,
            columns,
            bank.max_total_rank,
            tail.parts,
            tail.tensor.stride(-2),
            *target.stride(),
            TO_B=to_b,
            BOUNDARIES=boundaries,
            NUM_FACTORS=self.num_factors,
            HAS_WEIGHTS=self.has_weights,
            PARTIALS=tail.parts > 0,
            PARTIALS_DROPPED=tail.dropped,
            OVERWRITE=overwrite,
            BY_PAIR=by_pair,
            DROPOUT=dropout,
            LONG_COUNTER=dropout and self.place.needs_long_counter(*out.shape),
            PRECISION=precision(out.dtype),
            BLOCK_M=routing.block,
            BLOCK_C=tile.BLOCK_C,
            BLOCK_R=tile.BLOCK_R,
            num_warps=tile.num_warps,
            enable_fp_fusion=FP_FUSION,
            num_stages=tile.num_stages,
        )
        if by_pair:
            self._combine(target, has_delta, out, boundaries)

    def _combine(self, deltas: Tensor, has_delta: Tensor, out: Tensor, boundaries: tuple) -> None:
        block_m, block_c = 16, 128
        grid = (cdiv(out.shape[0], block_m), _blocks(out.shape[1], boundaries, block_c))
        routed_combine_kernel[grid](
            deltas,
            has_delta,
            self.routing.inverse,
            out,
            out.shape[0],
            self.pairs,
            out.shape[1],
            *out.stride(),
            PAIRS_PER_TOKEN=self.routing.pairs_per_token,
            BOUNDARIES=boundaries,
            BLOCK_M=block_m,
            BLOCK_C=block_c,
            num_warps=4,
            enable_fp_fusion=FP_FUSION,
        )

    # --- gradients of the factors -------------------------------------------------------------

    def gradient(
        self,
        wide: Tensor,  # [M, D]
        narrow: Tensor,  # [P, H]
        layout: GradientLayout,
        grad: Tensor,  # flat, written
        *,
        of_a: bool,
    ) -> None:
        """``t^T D(x)``, or ``s dy^T (w h)`` by slices, of every adapter into its place."""
        bank, routing = self.bank, self.routing
        columns, width = wide.shape[1], bank.max_total_rank
        dropout = of_a and self.seed is not None
        boundaries = () if of_a else self.boundaries
        widest, slices = (columns, 1) if of_a else (self.widest, bank.num_slices)
        aligned = _rows_are_aligned(wide)
        tile = tiles.gradient_tile(
            self.cell, columns, slices, self.limits, aligned=aligned, masked=dropout
        )
        windows = cdiv(self.num_tiles, tile.window)
        partials = grad
        if windows > 1:
            partials = narrow.new_empty((2 * windows, columns, width), dtype=torch.float32)
        blocks = _blocks(columns, boundaries, tile.BLOCK_D)
        routed_gradient_kernel[(windows, blocks, cdiv(width, tile.BLOCK_R))](
            wide,
            narrow,
            bank.slot_table,
            layout.table,
            *self.lookups,
            grad,
            partials,
            self.seed if dropout else wide,
            *self.place.groups(columns),
            wide.shape[0],
            columns,
            width,
            bank.scaling.shape[0] - 1,
            self.num_tiles,
            tile.window,
            *wide.stride(),
            narrow.stride(0),
            OF_A=of_a,
            BOUNDARIES=boundaries,
            NUM_FACTORS=self.num_factors,
            HAS_WEIGHTS=self.has_weights and not of_a,
            DROPOUT=dropout,
            LONG_COUNTER=dropout and self.place.needs_long_counter(*wide.shape),
            PRECISION=precision(wide.dtype),
            TILE=routing.block,
            BLOCK_M=tile.BLOCK_M,
            BLOCK_D=tile.BLOCK_D,
            BLOCK_R=tile.BLOCK_R,
            num_warps=tile.num_warps,
            enable_fp_fusion=FP_FUSION,
            num_stages=tile.num_stages,
        )
        if windows == 1:
            return
        routed_gradient_reduce_kernel[(cdiv(widest * width, _BLOCK), windows, slices)](
            partials,
            bank.slot_table,
            layout.table,
            routing.tiles,
            routing.offsets,
            grad,
            columns,
            width,
            bank.scaling.shape[0] - 1,
            self.num_tiles,
            tile.window,
            OF_A=of_a,
            BOUNDARIES=boundaries,
            NUM_FACTORS=self.num_factors,
            # One variant for all but the longest windows.
            BLOCK_T=max(128, tiles.next_power_of_two(tile.window)),
            TILE=routing.block,
            BLOCK=_BLOCK,
            num_warps=2,
            enable_fp_fusion=FP_FUSION,
        )


def _blocks(columns: int, boundaries: tuple, block: int) -> int:
    """Blocks of columns, none of which spans two slices."""
    boundaries = boundaries or (0, columns)
    return sum(cdiv(b - a, block) for a, b in pairwise(boundaries))


def _rows_are_aligned(matrix: Tensor) -> bool:
    """Whether neighbouring elements of a row can be read 16 bytes at a time."""
    size = matrix.element_size()
    return (
        matrix.stride(1) == 1
        and matrix.stride(0) * size % 16 == 0
        and matrix.storage_offset() * size % 16 == 0
    )
