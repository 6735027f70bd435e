"""``routed_lora`` on the vendor's GEMMs, one group of tokens after the other.

Dimensions: M tokens, P pairs, K in_features, N out_features of all slices, R an adapter's rank over
its slices, H the widest R of the bank, n the pairs of one group.

A group's rows of x are a view where its tokens are neighbours and are gathered otherwise; no
weights are gathered and no rank is padded. Groups come in a fixed order, so that a token with
several adapters gets the same bits every time.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from lora_kernels.ops.narrow.products import (
    narrow_product,
    product_dtype,
    row_chunks,
    transposed_product,
)
from lora_kernels.ops.routed.tensors import BankTensors, GradientLayout, RoutingTensors
from lora_kernels.runtime.dropout import packed_keep_mask_of_rows, zero_dropped
from lora_kernels.runtime.dtypes import accumulator_dtype


def forward(
    x: Tensor,  # [M, K]
    weight: Tensor | None,  # [N, K]
    bias: Tensor | None,  # [N]
    bank: BankTensors,
    routing: RoutingTensors,
    seed: Tensor | None,  # []
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(y, h, mask)``: the result and, if ``save``, what a backward may need.

    h is ``D(x) A^T`` ``[P, H]`` in :func:`product_dtype`, zero beyond an adapter's rank; mask the
    packed keep-mask ``[P, ceil(K/8)]`` of the pairs whose adapter drops, or None.
    """
    if weight is not None:
        y = torch.nn.functional.linear(x, weight, bias)
    elif bias is not None:
        y = bias.expand(x.shape[0], -1).clone()
    else:
        y = x.new_zeros((x.shape[0], bank.slice_columns[-1]))
    h, mask = _saved(x, bank, routing, seed) if save else (None, None)
    for group in _groups(bank, routing, x.dtype):
        narrow = _shrink(group, x, seed, mask)
        if h is not None:
            h[group.pairs, : group.rank] = narrow
        _expand(group, narrow, y)
    return y, h, mask


def backward(
    dy: Tensor,  # [M, N]
    x: Tensor | None,  # [M, K], needed for the gradients of A
    weight: Tensor | None,  # [N, K]
    bank: BankTensors,
    routing: RoutingTensors,
    layout: GradientLayout,
    h: Tensor | None,  # [P, H], needed for the gradients of B and of the weights
    mask: Tensor | None,  # [P, ceil(K/8)]; regenerated from the seed where it was not stored
    seed: Tensor | None,
    in_features: int,
    needs: tuple[bool, bool, bool],  # x, the pairs' weights, bias
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, the factors (flat, see :class:`GradientLayout`), the weights and bias."""
    needs_x, needs_weights, needs_bias = needs
    grad = bank.storage.new_zeros(layout.numel)
    grad_weights = _weight_gradient(routing) if needs_weights else None
    grad_bias = dy.sum(0) if needs_bias else None
    dx = None
    if needs_x:
        dx = dy.new_zeros((dy.shape[0], in_features)) if weight is None else dy @ weight
    for group in _groups(bank, routing, dy.dtype, layout):
        if not (needs_x or needs_weights or group.trains_a or group.trains_b):
            continue
        t = _expand_backward(group, dy, h, grad, grad_weights, needs_x or group.trains_a)
        if t is not None:
            _shrink_backward(group, t, x, seed, mask, grad, dx)
    return dx, grad, grad_weights, grad_bias


def shrink(
    x: Tensor,  # [M, K]
    bank: BankTensors,
    routing: RoutingTensors,
    seed: Tensor | None,  # []
) -> tuple[Tensor, Tensor | None]:
    """``(h, mask)`` as :func:`forward` saves them."""
    h, mask = _saved(x, bank, routing, seed)
    for group in _groups(bank, routing, x.dtype):
        h[group.pairs, : group.rank] = _shrink(group, x, seed, mask)
    return h, mask


def shrink_backward(
    t: Tensor,  # [P, H], the gradient of h
    x: Tensor,  # [M, K]
    bank: BankTensors,
    routing: RoutingTensors,
    layout: GradientLayout,
    mask: Tensor | None,
    seed: Tensor | None,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor]:
    """Gradients of x and of the factors (those of A)."""
    grad = bank.storage.new_zeros(layout.numel)
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs_x else None
    for group in _groups(bank, routing, x.dtype, layout):
        if needs_x or group.trains_a:
            narrow = t[group.pairs, : group.rank]
            _shrink_backward(group, narrow, x, seed, mask, grad, dx)
    return dx, grad


def expand_(
    out: Tensor,  # [M, N], added to
    h: Tensor,  # [P, H]
    bank: BankTensors,
    routing: RoutingTensors,
) -> None:
    """``out += w s h B^T`` for every pair."""
    for group in _groups(bank, routing, out.dtype):
        _expand(group, h[group.pairs, : group.rank], out)


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
    grad_weights = _weight_gradient(routing) if needs_weights else None
    t = None
    if needs_h:
        shape = (routing.tokens.shape[0], bank.width)
        t = dy.new_zeros(shape, dtype=accumulator_dtype(dy.dtype))
    for group in _groups(bank, routing, dy.dtype, layout):
        narrow = _expand_backward(group, dy, h, grad, grad_weights, needs_h)
        if narrow is not None:
            t[group.pairs, : group.rank] = narrow
    return t, grad, grad_weights


def add_(
    out: Tensor,  # [M, N], added to
    x: Tensor,  # [M, K]
    bank: BankTensors,
    routing: RoutingTensors,
    seed: Tensor | None,
) -> None:
    """``out += `` the adapters' contribution."""
    for group in _groups(bank, routing, x.dtype):
        _expand(group, _shrink(group, x, seed, None), out)


# --- one group -------------------------------------------------------------------------------


class _Group:
    """The pairs of one adapter, its factors, its scale and where their gradients go."""

    __slots__ = (
        "a", "b", "columns", "first", "offsets", "pairs", "rank", "scale", "scaling", "slot",
        "threshold", "tokens",
    )  # fmt: skip

    def rows_of(self, x: Tensor, chunk: slice | None = None) -> Tensor:
        """The group's rows of ``x`` (or a chunk of them): a view if they are neighbours."""
        if self.first >= 0:
            start, stop = self.first, self.first + self.pairs.stop - self.pairs.start
            return x[start:stop] if chunk is None else x[start:stop][chunk]
        return x.index_select(0, self.tokens if chunk is None else self.tokens[chunk])

    def add_product(self, out: Tensor, left: Tensor, right: Tensor) -> None:
        """Add ``left @ right`` ``[n, R] x [R, D]`` to the group's rows of ``out`` ``[M, D]``."""
        if self.first < 0:
            out.index_add_(0, self.tokens, _wide_product(left, right, out.dtype))
        elif right.dtype == out.dtype:
            self.rows_of(out).addmm_(left.to(out.dtype), right)
        else:
            self.rows_of(out).add_(_wide_product(left, right, out.dtype))

    @property
    def trains_a(self) -> bool:
        return self.offsets[0] >= 0

    @property
    def trains_b(self) -> bool:
        return any(offset >= 0 for offset in self.offsets[1:])

    def row_numbers(self) -> Tensor:
        if self.tokens is not None:
            return self.tokens
        return torch.arange(
            self.first, self.first + self.pairs.stop - self.pairs.start, device=self.a.device
        )


def _groups(
    bank: BankTensors,
    routing: RoutingTensors,
    dtype: torch.dtype,  # of the activations
    layout: GradientLayout | None = None,
) -> Iterator[_Group]:
    """The groups whose adapter is in this bank."""
    adapter_of = {slot: index for index, slot in enumerate(bank.slots)}
    places = {} if layout is None else layout.by_slot(bank)
    nowhere = [-1] * (1 + bank.num_slices)
    on_cpu = bank.scaling.device.type == "cpu"
    scaling = bank.scaling.tolist() if on_cpu else bank.scaling
    columns = [slice(*ends) for ends in pairwise(bank.slice_columns)]
    for slot, start, end, first in routing.plan.tolist():
        adapter = adapter_of.get(slot)
        if adapter is None:
            continue
        group = _Group()
        group.slot, group.first, group.pairs = slot, first, slice(start, end)
        group.tokens = routing.tokens[start:end] if first < 0 else None
        group.a, *group.b = bank.factors_of(adapter)
        group.offsets = places.get(slot, nowhere)
        group.rank = group.a.shape[0]
        group.threshold = bank.thresholds[adapter]
        group.columns = columns
        group.scale = group.scaling = scaling[slot]
        if routing.pair_weights is not None:
            weights = routing.pair_weights[start:end].to(accumulator_dtype(dtype))
            group.scale = (weights * group.scale).unsqueeze(1)  # [n, 1]
        yield group


def _shrink(group: _Group, x: Tensor, seed: Tensor | None, mask: Tensor | None) -> Tensor:
    """``D(x) A^T`` of the group's pairs ``[n, R]``; writes its rows of the mask, if any."""
    if group.threshold == 0:
        return _narrow(group.rows_of(x), group.a.t())
    packed = _packed_mask(group, x.shape[1], seed)
    if mask is not None:
        mask[group.pairs] = packed
    h = x.new_empty((packed.shape[0], group.rank), dtype=product_dtype(x))
    for chunk in row_chunks(packed.shape[0], x.shape[1], x.device):
        kept = zero_dropped(group.rows_of(x, chunk), packed[chunk])
        h[chunk] = narrow_product(kept, group.a.t(), _keep_scale(group.threshold))
    return h


def _expand(group: _Group, h: Tensor, out: Tensor) -> None:
    """Add ``w s h B^T`` to the group's rows of out."""
    scaled, start = h * group.scale, 0
    if len(group.b) == 1:
        group.add_product(out, scaled, group.b[0].t())
        return
    for b, columns in zip(group.b, group.columns, strict=True):
        if rank := b.shape[1]:
            group.add_product(out[:, columns], scaled[:, start : start + rank], b.t())
        start += rank


def _expand_backward(
    group: _Group,
    dy: Tensor,  # [M, N]
    h: Tensor | None,  # [P, H]
    grad: Tensor,  # flat, written
    grad_weights: Tensor | None,  # [P], written
    needs_t: bool,
) -> Tensor | None:  # [n, R]
    """t, the gradient of the group's h; writes the gradients of its B and of its weights."""
    rows = group.rows_of(dy)
    narrow = None if h is None else h[group.pairs, : group.rank]
    t = None
    if needs_t or grad_weights is not None:
        dtype = product_dtype(dy)
        t = rows.new_empty((rows.shape[0], group.rank), dtype=dtype)
    start = 0
    for s, (b, columns) in enumerate(zip(group.b, group.columns, strict=True)):
        rank, offset = b.shape[1], group.offsets[1 + s]
        if rank == 0:
            continue
        part = slice(start, start + rank)
        if t is not None:
            t[:, part] = _narrow(rows[:, columns], b)
        if offset >= 0:
            product = transposed_product(rows[:, columns], narrow[:, part] * group.scale)
            grad[offset : offset + b.numel()].view(b.shape).copy_(product)
        start += rank
    if t is None:
        return None
    if grad_weights is not None:
        dtype = grad_weights.dtype
        grad_weights[group.pairs] = (t.to(dtype) * narrow.to(dtype)).sum(1) * group.scaling
    return t * group.scale if needs_t else None


def _shrink_backward(
    group: _Group,
    t: Tensor,  # [n, R]
    x: Tensor | None,  # [M, K]
    seed: Tensor | None,
    mask: Tensor | None,
    grad: Tensor,  # flat, written
    dx: Tensor | None,  # [M, K], added to
) -> None:
    """Add ``keep * (t A)`` to the group's rows of dx; write the gradient of its A."""
    offset, a = group.offsets[0], group.a
    columns = a.shape[1]
    if group.threshold == 0:
        if dx is not None:
            group.add_product(dx, t, a)
        if offset >= 0:
            product = transposed_product(t, group.rows_of(x))
            grad[offset : offset + a.numel()].view(a.shape).copy_(product)
        return
    packed = _packed_mask(group, columns, seed) if mask is None else mask[group.pairs]
    t = t * _keep_scale(group.threshold)
    total = t.new_zeros(a.shape, dtype=accumulator_dtype(t.dtype)) if offset >= 0 else None
    tokens = None if dx is None else group.row_numbers()
    for chunk in row_chunks(t.shape[0], columns, t.device):
        if dx is not None:
            kept = zero_dropped(_wide_product(t[chunk], a, dx.dtype), packed[chunk])
            dx.index_add_(0, tokens[chunk], kept)
        if offset >= 0:
            kept = zero_dropped(group.rows_of(x, chunk), packed[chunk])
            total += transposed_product(t[chunk], kept)
    if offset >= 0:
        grad[offset : offset + a.numel()].view(a.shape).copy_(total)


# --- pieces ----------------------------------------------------------------------------------


def _saved(x, bank, routing, seed) -> tuple[Tensor, Tensor | None]:
    """Empty h and mask for :func:`_shrink` to fill."""
    pairs = routing.tokens.shape[0]
    # Zero where nothing is written: pairs without an adapter, columns beyond an adapter's rank.
    h = x.new_zeros((pairs, bank.width), dtype=product_dtype(x))
    mask = None
    if seed is not None and x.device.type == "cpu":
        mask = x.new_zeros((pairs, -(-x.shape[1] // 8)), dtype=torch.uint8)
    return h, mask


def _packed_mask(group: _Group, columns: int, seed: Tensor) -> Tensor:
    p = group.threshold / 65536
    return packed_keep_mask_of_rows(seed, p, group.row_numbers(), columns, group.slot)


def _keep_scale(threshold: int) -> float:
    return 65536 / (65536 - threshold)


def _weight_gradient(routing: RoutingTensors) -> Tensor:
    return torch.zeros_like(routing.pair_weights)


def _narrow(wide: Tensor, factor: Tensor) -> Tensor:
    """``wide @ factor``: ``[n, D] x [D, R] -> [n, R]`` in :func:`product_dtype`.

    The smaller one is cast where their dtypes differ: with few tokens that is not the factor.
    """
    if factor.dtype == wide.dtype == product_dtype(wide):
        return wide @ factor
    if _is_better_widened(wide, factor, wide.dtype, factor.shape[1]):
        return (wide.to(factor.dtype) @ factor).to(product_dtype(wide))
    return narrow_product(wide, factor)


def _wide_product(narrow: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``narrow @ factor``: ``[n, R] x [R, D] -> [n, D]`` in ``dtype``."""
    if factor.dtype == dtype:
        return (narrow if narrow.dtype == dtype else narrow.to(dtype)) @ factor
    if _is_better_widened(narrow, factor, dtype, factor.shape[0]):
        return (narrow.to(factor.dtype) @ factor).to(dtype)
    return narrow.to(dtype) @ factor.to(dtype)


def _is_better_widened(rows: Tensor, factor: Tensor, dtype: torch.dtype, rank: int) -> bool:
    """Whether the rows are to take the factor's wider dtype, and not the factor ``dtype``."""
    wider = factor.dtype.itemsize > dtype.itemsize
    return wider and rows.device.type == "cpu" and rows.shape[0] < rank
