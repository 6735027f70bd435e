"""``routed_lora`` on our Triton kernels: from shapes to grids.

Dimensions: M tokens, P pairs of a token and an adapter, K in_features, N out_features of all
slices, H the widest rank of the bank, S slices, T tiles.

Takes and returns what :mod:`composed` does, except that h and t are fp32 and no mask is stored:
every kernel regenerates it. All sizes are known on the host and do not depend on what a routing
holds; nothing is read back, workspaces come from torch's allocator. So a CUDA graph captured once
serves every routing.
"""

from itertools import pairwise

import torch
from torch import Tensor

from lora_kernels.launching import cdiv, limits_of, on_device, padded_rows, precision
from lora_kernels.ops.routed_lora import tiles
from lora_kernels.ops.routed_lora.gradient_kernels import (
    routed_gradient_kernel,
    routed_gradient_reduce_kernel,
)
from lora_kernels.ops.routed_lora.kernels import (
    routed_combine_kernel,
    routed_expand_kernel,
    routed_finish_kernel,
    routed_shrink_kernel,
)
from lora_kernels.ops.routed_lora.operands import BankTensors, GradientLayout, RoutingTensors

_BLOCK = 1024  # elements per program of the elementwise kernels


def forward(
    x: Tensor,  # [M, K]
    weight: Tensor | None,  # [N, K]
    bias: Tensor | None,  # [N]
    bank: BankTensors,
    routing: RoutingTensors,
    seed: Tensor | None,  # []
    save: bool,
) -> tuple[Tensor, Tensor | None, None]:
    """``(y, h, None)``; h ``[P, H]`` fp32 if ``save``."""
    fresh = weight is None and bias is None and routing.pairs_per_token == 1
    if weight is not None:
        y = torch.nn.functional.linear(x, weight, bias)
    else:
        shape = (x.shape[0], bank.slice_columns[-1])
        fresh = fresh and not _nothing(x, bank, routing)
        y = x.new_empty(shape) if fresh else x.new_zeros(shape)
        if bias is not None:
            y += bias
    h = _narrow(x, bank, routing) if save else None
    if not _nothing(x, bank, routing):
        call = _Call(x, bank, routing, seed)
        with on_device(x):
            call.expand(y, call.shrink(x, h), overwrite=fresh)
    elif save:
        h.zero_()
    return y, h, None


def backward(
    dy: Tensor,  # [M, N]
    x: Tensor | None,  # [M, K], needed for the gradients of A
    weight: Tensor | None,  # [N, K]
    bank: BankTensors,
    routing: RoutingTensors,
    layout: GradientLayout,
    h: Tensor | None,  # [P, H], needed for the gradients of B and of the weights
    mask: None,
    seed: Tensor | None,
    in_features: int,
    needs: tuple[bool, bool, bool],  # x, the pairs' weights, bias
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, the factors (flat, see :class:`GradientLayout`), the weights and bias."""
    needs_x, needs_weights, needs_bias = needs
    needs_a, needs_b = _needed(layout, bank)
    grad = bank.storage.new_zeros(layout.numel)
    grad_bias = dy.sum(0) if needs_bias else None
    nothing = _nothing(dy, bank, routing)
    fresh = weight is None and routing.pairs_per_token == 1 and not nothing
    dx = None
    if needs_x:
        shape = (dy.shape[0], in_features)
        dx = dy @ weight if weight is not None else (dy.new_empty if fresh else dy.new_zeros)(shape)
    if nothing:
        return (
            dx,
            grad,
            torch.zeros_like(routing.pair_weights) if needs_weights else None,
            grad_bias,
        )
    call = _Call(dy, bank, routing, seed)
    grad_weights = torch.empty_like(routing.pair_weights) if needs_weights else None
    with on_device(dy):
        if needs_b:
            call.b_gradient(dy, h, layout, grad)
        if needs_x or needs_a or needs_weights:
            t = _narrow(dy, bank, routing) if needs_a else None
            rounded = call.project(dy, t, h, grad_weights, rounded=needs_x)
            if needs_x:
                call.expand_a(dx, rounded, overwrite=fresh)
            if needs_a:
                call.a_gradient(x, t, layout, grad)
    return dx, grad, grad_weights, grad_bias


def shrink(
    x: Tensor,  # [M, K]
    bank: BankTensors,
    routing: RoutingTensors,
    seed: Tensor | None,  # []
) -> tuple[Tensor, None]:
    """``(h, None)`` as :func:`forward` saves them."""
    h = _narrow(x, bank, routing)
    if _nothing(x, bank, routing):
        return h.zero_(), None
    with on_device(x):
        _Call(x, bank, routing, seed).shrink(x, h, rounded=False)
    return h, None


def shrink_backward(
    t: Tensor,  # [P, H], the gradient of h
    x: Tensor,  # [M, K]
    bank: BankTensors,
    routing: RoutingTensors,
    layout: GradientLayout,
    mask: None,
    seed: Tensor | None,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor]:
    """Gradients of x and of the factors (those of A)."""
    grad = bank.storage.new_zeros(layout.numel)
    nothing = _nothing(x, bank, routing)
    fresh = routing.pairs_per_token == 1 and not nothing
    dx = (x.new_empty if fresh else x.new_zeros)(x.shape) if needs_x else None
    if nothing:
        return dx, grad
    t = t.contiguous()
    call = _Call(x, bank, routing, seed)
    with on_device(x):
        if needs_x:
            call.expand_a(dx, t.to(x.dtype), overwrite=fresh)
        if _needed(layout, bank)[0]:
            call.a_gradient(x, t, layout, grad)
    return dx, grad


def expand_(
    out: Tensor,  # [M, N], added to
    h: Tensor,  # [P, H]
    bank: BankTensors,
    routing: RoutingTensors,
) -> None:
    """``out += w s h B^T`` for every pair."""
    if not _nothing(out, bank, routing):
        call = _Call(out, bank, routing, None)
        with on_device(out):
            call.expand(out, call.scale(h.contiguous()))


def expand_backward(
    dy: Tensor,  # [M, N]
    h: Tensor | None,  # [P, H], needed for the gradients of B and of the weights
    bank: BankTensors,
    routing: RoutingTensors,
    layout: GradientLayout,
    needs: tuple[bool, bool],  # h, the pairs' weights
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Gradients of h, of the factors (those of B) and of the weights."""
    needs_h, needs_weights = needs
    grad = bank.storage.new_zeros(layout.numel)
    t = _narrow(dy, bank, routing) if needs_h else None
    if _nothing(dy, bank, routing):
        grad_weights = torch.zeros_like(routing.pair_weights) if needs_weights else None
        return t if t is None else t.zero_(), grad, grad_weights
    grad_weights = torch.empty_like(routing.pair_weights) if needs_weights else None
    call = _Call(dy, bank, routing, None)
    with on_device(dy):
        if _needed(layout, bank)[1]:
            call.b_gradient(dy, h, layout, grad)
        if needs_h or needs_weights:
            call.project(dy, t, h, grad_weights, rounded=False)
    return t, grad, grad_weights


def add_(
    out: Tensor,  # [M, N], added to
    x: Tensor,  # [M, K]
    bank: BankTensors,
    routing: RoutingTensors,
    seed: Tensor | None,
) -> None:
    """``out += `` the adapters' contribution."""
    if not _nothing(x, bank, routing):
        call = _Call(x, bank, routing, seed)
        with on_device(x):
            call.expand(out, call.shrink(x, None))


def _nothing(rows: Tensor, bank: BankTensors, routing: RoutingTensors) -> bool:
    """Whether there is nothing to launch a kernel for."""
    return rows.shape[0] == 0 or bank.width == 0 or routing.tokens.shape[0] == 0


def _narrow(like: Tensor, bank: BankTensors, routing: RoutingTensors) -> Tensor:
    """An empty h or t, ``[P, H]`` fp32."""
    return like.new_empty((routing.tokens.shape[0], bank.width), dtype=torch.float32)


def _needed(layout: GradientLayout, bank: BankTensors) -> tuple[bool, bool]:
    """Whether the gradient of some A, of some B is needed."""
    count = 1 + bank.num_slices
    needed = [offset >= 0 for offset in layout.offsets]
    return any(needed[::count]), any(n for i, n in enumerate(needed) if i % count)


class _Tail:
    """What an expand takes on its left: h rounded and scaled, or partial sums that are neither."""

    def __init__(self, tensor: Tensor, parts: int = 0, dropped: bool = False) -> None:
        self.tensor = tensor  # [P, H], or [parts, P, H]
        self.parts = parts  # 0: rounded and scaled
        self.dropped = dropped  # whether the dropout's scale is missing too


class _Call:
    """A bank and a routing as the kernels take them, and the launches of each kernel."""

    def __init__(
        self, like: Tensor, bank: BankTensors, routing: RoutingTensors, seed: Tensor | None
    ) -> None:
        self.bank, self.routing, self.seed = bank, routing, seed
        self.dtype, self.limits = like.dtype, limits_of(like.device)
        self.pairs, self.num_tiles = routing.tokens.shape[0], routing.tiles.shape[0]
        self.widest = max(b - a for a, b in pairwise(bank.slice_columns))  # of the slices
        self.num_factors = 1 + bank.num_slices
        self.boundaries = tuple(bank.slice_columns) if bank.num_slices > 1 else ()
        self.weights = routing.tokens if routing.pair_weights is None else routing.pair_weights
        self.has_weights = routing.pair_weights is not None
        self.cell = tiles.Cell(
            itemsize=like.dtype.itemsize,
            factor_itemsize=bank.storage.dtype.itemsize,
            pairs=self.pairs,
            block=routing.block,
            num_tiles=self.num_tiles,
            width=bank.width,
            ieee=like.dtype == torch.float32 and precision(like.dtype) == "ieee",
        )

    # --- narrow results -----------------------------------------------------------------------

    def shrink(self, x: Tensor, h: Tensor | None, rounded: bool = True) -> _Tail | None:
        """``h = D(x) A^T`` into ``h`` if given; what an expand takes if ``rounded``."""
        depth = x.shape[1]
        tile = tiles.shrink_tile(self.cell, depth, 1, self.limits, aligned=_rows_are_aligned(x))
        in_parts = tiles.is_small(self.cell) and h is None
        if tile.parts == 1 and not in_parts:
            copy = self._copy() if rounded else None
            self._shrink(x, tile, h, copy, of_a=True)
            return None if copy is None else _Tail(copy)
        partials = x.new_empty((tile.parts, self.pairs, self.bank.width), dtype=torch.float32)
        self._shrink(x, tile, partials, None, of_a=True, split=True)
        if in_parts:
            return _Tail(partials, tile.parts, dropped=self.seed is not None)
        copy = self._copy() if rounded else None
        self._finish(partials, h, copy, dropout=self.seed is not None)
        return None if copy is None else _Tail(copy)

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
        aligned, slices = _rows_are_aligned(dy), self.bank.num_slices
        tile = tiles.shrink_tile(self.cell, self.widest, slices, self.limits, aligned=aligned)
        copy = self._copy() if rounded else None
        if tile.parts == 1 and grad_weights is None:
            self._shrink(dy, tile, t, copy, of_a=False)
            return copy
        partials = dy.new_empty((tile.parts, self.pairs, self.bank.width), dtype=torch.float32)
        self._shrink(dy, tile, partials, None, of_a=False, split=True)
        self._finish(partials, t, copy, h=h, grad_weights=grad_weights, out_is_scaled=True)
        return copy

    def scale(self, h: Tensor) -> _Tail:
        """h as the user has it, as an expand takes it."""
        if tiles.is_small(self.cell):
            return _Tail(h, 1)
        copy = self._copy()
        self._finish(h.unsqueeze(0), None, copy)
        return _Tail(copy)

    def _copy(self) -> Tensor:
        return padded_rows(self.bank.storage, torch.Size((self.pairs, self.bank.width)), self.dtype)

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
        blocks_r = cdiv(bank.width, tile.BLOCK_R)
        grid = (self.num_tiles * blocks_r, tile.parts, 1 if of_a else bank.num_slices)
        routed_shrink_kernel[grid](
            wide,
            bank.storage,
            bank.table,
            bank.scaling,
            bank.threshold_table,
            routing.tiles,
            routing.offsets,
            routing.tokens,
            self.weights,
            wide if out is None else out,
            wide if rounded is None else rounded,
            self.seed if dropout else wide,
            wide.shape[0],
            self.pairs,
            wide.shape[1],
            bank.width,
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
            LONG_COUNTER=dropout and _counts_long(wide.shape[0], wide.shape[1]),
            PRECISION=precision(wide.dtype),
            BLOCK_M=routing.block,
            BLOCK_D=tile.BLOCK_D,
            BLOCK_R=tile.BLOCK_R,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    def _finish(
        self,
        partials: Tensor,  # [parts, P, H] contiguous
        out: Tensor | None,  # [P, H] fp32, written
        rounded: Tensor | None,  # [P, H], written
        *,
        h: Tensor | None = None,  # [P, H]
        grad_weights: Tensor | None = None,  # [P], written
        out_is_scaled: bool = False,
        dropout: bool = False,
    ) -> None:
        bank, routing = self.bank, self.routing
        routed_finish_kernel[(self.num_tiles,)](
            partials,
            partials if grad_weights is None else h,
            bank.table,
            bank.scaling,
            bank.threshold_table,
            routing.tiles,
            routing.offsets,
            self.weights,
            partials if out is None else out,
            partials if rounded is None else rounded,
            partials if grad_weights is None else grad_weights,
            self.pairs,
            bank.width,
            partials.shape[0],
            partials.stride(1),
            0 if grad_weights is None else h.stride(0),
            0 if rounded is None else rounded.stride(0),
            NUM_FACTORS=self.num_factors,
            HAS_WEIGHTS=self.has_weights,
            HAS_OUT=out is not None,
            HAS_ROUNDED=rounded is not None,
            HAS_WEIGHT_GRADIENT=grad_weights is not None,
            OUT_IS_SCALED=out_is_scaled,
            FILL=out is not None,
            DROPOUT=dropout,
            BLOCK_M=routing.block,
            BLOCK_R=32,
            num_warps=4,
        )

    # --- wide results -------------------------------------------------------------------------

    def expand(self, out: Tensor, tail: _Tail, *, overwrite: bool = False) -> None:
        """``out += w s h B^T`` ``[M, N]``; with ``overwrite`` out is new."""
        self._expand(out, tail, to_b=True, overwrite=overwrite)

    def expand_a(self, dx: Tensor, t: Tensor, *, overwrite: bool = False) -> None:
        """``dx += keep * (t A)`` ``[M, K]``; with ``overwrite`` dx is new."""
        self._expand(dx, _Tail(t), to_b=False, overwrite=overwrite)

    def _expand(self, out: Tensor, tail: _Tail, *, to_b: bool, overwrite: bool) -> None:
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
            bank.table,
            bank.scaling,
            bank.threshold_table,
            routing.tiles,
            routing.offsets,
            routing.tokens,
            self.weights,
            target,
            has_delta,
            self.seed if dropout else out,
            out.shape[0],
            self.pairs,
            columns,
            bank.width,
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
            LONG_COUNTER=dropout and _counts_long(*out.shape),
            PRECISION=precision(out.dtype),
            BLOCK_M=routing.block,
            BLOCK_C=tile.BLOCK_C,
            BLOCK_R=tile.BLOCK_R,
            num_warps=tile.num_warps,
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
        )

    # --- gradients of the factors -------------------------------------------------------------

    def a_gradient(self, x: Tensor, t: Tensor, layout: GradientLayout, grad: Tensor) -> None:
        """``t^T D(x)`` of every adapter into its place of the flat ``grad``."""
        self._gradient(x, t, layout, grad, of_a=True)

    def b_gradient(self, dy: Tensor, h: Tensor, layout: GradientLayout, grad: Tensor) -> None:
        """``s dy^T (w h)`` of every adapter and slice into its place of the flat ``grad``."""
        self._gradient(dy, h.contiguous(), layout, grad, of_a=False)

    def _gradient(
        self,
        wide: Tensor,  # [M, D]
        narrow: Tensor,  # [P, H]
        layout: GradientLayout,
        grad: Tensor,  # flat, written
        *,
        of_a: bool,
    ) -> None:
        bank, routing = self.bank, self.routing
        columns, width = wide.shape[1], bank.width
        dropout = of_a and self.seed is not None
        boundaries = () if of_a else self.boundaries
        widest, slices = (columns, 1) if of_a else (self.widest, bank.num_slices)
        aligned = _rows_are_aligned(wide)
        tile = tiles.gradient_tile(self.cell, columns, slices, self.limits, aligned=aligned)
        windows = cdiv(self.num_tiles, tile.window)
        partials = grad
        if windows > 1:
            partials = narrow.new_empty((2 * windows, columns, width), dtype=torch.float32)
        blocks = _blocks(columns, boundaries, tile.BLOCK_D)
        routed_gradient_kernel[(windows, blocks, cdiv(width, tile.BLOCK_R))](
            wide,
            narrow,
            bank.table,
            layout.table,
            bank.scaling,
            bank.threshold_table,
            routing.tiles,
            routing.offsets,
            routing.tokens,
            self.weights,
            grad,
            partials,
            self.seed if dropout else wide,
            wide.shape[0],
            columns,
            width,
            bank.scaling.shape[0] - 1,
            self.num_tiles,
            *wide.stride(),
            narrow.stride(0),
            OF_A=of_a,
            BOUNDARIES=boundaries,
            NUM_FACTORS=self.num_factors,
            HAS_WEIGHTS=self.has_weights and not of_a,
            DROPOUT=dropout,
            LONG_COUNTER=dropout and _counts_long(*wide.shape),
            PRECISION=precision(wide.dtype),
            WINDOW=tile.window,
            TILE=routing.block,
            BLOCK_M=tile.BLOCK_M,
            BLOCK_D=tile.BLOCK_D,
            BLOCK_R=tile.BLOCK_R,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        if windows == 1:
            return
        routed_gradient_reduce_kernel[(cdiv(widest * width, _BLOCK), windows, slices)](
            partials,
            bank.table,
            layout.table,
            routing.tiles,
            routing.offsets,
            grad,
            columns,
            width,
            bank.scaling.shape[0] - 1,
            self.num_tiles,
            OF_A=of_a,
            BOUNDARIES=boundaries,
            NUM_FACTORS=self.num_factors,
            WINDOW=tile.window,
            BLOCK_T=tiles.next_power_of_two(tile.window),
            TILE=routing.block,
            BLOCK=_BLOCK,
            num_warps=4,
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


def _counts_long(rows: int, columns: int) -> bool:
    """32 bits count the mask's groups until there are 2^31 of them."""
    return rows * cdiv(columns, 8) >= 2**31
