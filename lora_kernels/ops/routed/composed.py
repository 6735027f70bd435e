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

from lora_kernels.base_weights import product_or_bias
from lora_kernels.ops.narrow.products import (
    narrow_product,
    product_dtype,
    rounded,
    row_chunks,
    transposed_product,
)
from lora_kernels.ops.routed.call import Gradients, Result, RoutedCall, stores_mask
from lora_kernels.runtime.dropout import packed_keep_mask_of_rows, zero_dropped
from lora_kernels.runtime.dtypes import accumulator_dtype


def forward(call: RoutedCall) -> Result:
    """h is in :func:`product_dtype`, zero beyond an adapter's rank."""
    x, y, h, mask = call.x, call.out, None, None
    if y is None:
        y, begun = product_or_bias(call.base, x, call.bias, call.bank.slice_columns[-1])
        y = y if begun else y.zero_()
    if call.save:
        h, mask = _saved(call)
    for group in _groups(call, x.dtype):
        narrow = _shrink(group, call, mask)
        if h is not None:
            h[group.pairs, : group.rank] = narrow
        _expand(group, narrow, y)
    return Result(y, h, mask)


def backward(call: RoutedCall) -> Gradients:
    dy, needs = call.dy, call.needs
    grad = call.bank.storage.new_zeros(call.layout.numel)
    grad_weights = _weight_gradient(call)
    grad_bias = dy.sum(0) if needs.bias else None
    dx = None
    if needs.x and call.base is not None:
        dx = call.base.matmul_t(dy)
    elif needs.x:
        dx = dy.new_zeros((dy.shape[0], call.in_features))
    for group in _groups(call, dy.dtype):
        if not (needs.x or needs.weights or group.needs_a or group.needs_b):
            continue
        t = _expand_backward(group, call, grad, grad_weights, needs.x or group.needs_a)
        if t is not None:
            _shrink_backward(group, t, call, grad, dx)
    return Gradients(dx, grad, grad_weights, grad_bias)


def shrink(call: RoutedCall) -> tuple[Tensor, Tensor | None]:
    """h and mask as :func:`forward` saves them."""
    h, mask = _saved(call)
    for group in _groups(call, call.x.dtype):
        h[group.pairs, : group.rank] = _shrink(group, call, mask)
    return h, mask


def shrink_backward(call: RoutedCall) -> Gradients:
    x, needs_x = call.x, call.needs.x
    grad = call.bank.storage.new_zeros(call.layout.numel)
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs_x else None
    for group in _groups(call, x.dtype):
        if needs_x or group.needs_a:
            narrow = call.dy[group.pairs, : group.rank]
            _shrink_backward(group, narrow, call, grad, dx)
    return Gradients(dx, grad)


def expand_(call: RoutedCall) -> None:
    """``out += w s h B^T`` for every pair."""
    for group in _groups(call, call.out.dtype):
        _expand(group, call.h[group.pairs, : group.rank], call.out)


def expand_backward(call: RoutedCall) -> Gradients:
    dy, needs = call.dy, call.needs
    grad = call.bank.storage.new_zeros(call.layout.numel)
    grad_weights = _weight_gradient(call)
    t = None
    if needs.x:
        shape = (call.routing.tokens.shape[0], call.bank.max_total_rank)
        t = dy.new_zeros(shape, dtype=accumulator_dtype(dy.dtype))
    for group in _groups(call, dy.dtype):
        narrow = _expand_backward(group, call, grad, grad_weights, needs.x)
        if narrow is not None:
            t[group.pairs, : group.rank] = narrow
    return Gradients(t, grad, grad_weights)


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
    def needs_a(self) -> bool:
        return self.offsets[0] >= 0

    @property
    def needs_b(self) -> bool:
        return any(offset >= 0 for offset in self.offsets[1:])

    def row_numbers(self) -> Tensor:
        if self.tokens is not None:
            return self.tokens
        return torch.arange(
            self.first, self.first + self.pairs.stop - self.pairs.start, device=self.a.device
        )


def _groups(call: RoutedCall, dtype: torch.dtype) -> Iterator[_Group]:
    """The groups whose adapter is in this bank, for activations of that dtype."""
    bank, routing, layout = call.bank, call.routing, call.layout
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


def _shrink(group: _Group, call: RoutedCall, mask: Tensor | None) -> Tensor:
    """``D(x) A^T`` of the group's pairs ``[n, R]``; writes its rows of the mask, if any."""
    x = call.x
    if group.threshold == 0:
        return _narrow(group.rows_of(x), group.a.t())
    packed = _packed_mask(group, x.shape[1], call)
    if mask is not None:
        mask[group.pairs] = packed
    h = x.new_empty((packed.shape[0], group.rank), dtype=product_dtype(x))
    for chunk in row_chunks(packed.shape[0], x.shape[1], x.device):
        kept = zero_dropped(group.rows_of(x, chunk), packed[chunk])
        factor = rounded(group.a, kept.dtype, _keep_scale(group.threshold))
        h[chunk] = narrow_product(kept, factor.t())
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
    call: RoutedCall,
    grad: Tensor,  # flat, written
    grad_weights: Tensor | None,  # [P], written
    needs_t: bool,
) -> Tensor | None:  # [n, R]
    """t, the gradient of the group's h; writes the gradients of its B and of its weights."""
    dy, h = call.dy, call.h
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
            scaled_h = narrow[:, part] * group.scale
            product = transposed_product(rows[:, columns], scaled_h, grad.dtype)
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
    call: RoutedCall,
    grad: Tensor,  # flat, written
    dx: Tensor | None,  # [M, K], added to
) -> None:
    """Add ``keep * (t A)`` to the group's rows of dx; write the gradient of its A."""
    offset, a, x, mask = group.offsets[0], group.a, call.x, call.mask
    columns = a.shape[1]
    if group.threshold == 0:
        if dx is not None:
            group.add_product(dx, t, a)
        if offset >= 0:
            product = transposed_product(t, group.rows_of(x), grad.dtype)
            grad[offset : offset + a.numel()].view(a.shape).copy_(product)
        return
    packed = _packed_mask(group, columns, call) if mask is None else mask[group.pairs]
    t = t * _keep_scale(group.threshold)
    total = t.new_zeros(a.shape, dtype=accumulator_dtype(t.dtype)) if offset >= 0 else None
    tokens = None if dx is None else group.row_numbers()
    for chunk in row_chunks(t.shape[0], columns, t.device):
        if dx is not None:
            kept = zero_dropped(_wide_product(t[chunk], a, dx.dtype), packed[chunk])
            dx.index_add_(0, tokens[chunk], kept)
        if offset >= 0:
            kept = zero_dropped(group.rows_of(x, chunk), packed[chunk])
            total += transposed_product(t[chunk], kept, total.dtype)
    if offset >= 0:
        grad[offset : offset + a.numel()].view(a.shape).copy_(total)


# --- pieces ----------------------------------------------------------------------------------


def _saved(call: RoutedCall) -> tuple[Tensor, Tensor | None]:
    """Empty h and mask for :func:`_shrink` to fill."""
    x, pairs = call.x, call.routing.tokens.shape[0]
    # Zero where nothing is written: pairs without an adapter, columns beyond an adapter's rank.
    h = x.new_zeros((pairs, call.bank.max_total_rank), dtype=product_dtype(x))
    mask = None
    if stores_mask(x.device, call.seed, call.backend):
        mask = x.new_zeros((pairs, -(-x.shape[1] // 8)), dtype=torch.uint8)
    return h, mask


def _packed_mask(group: _Group, columns: int, call: RoutedCall) -> Tensor:
    p = group.threshold / 65536
    return packed_keep_mask_of_rows(
        call.seed, p, group.row_numbers(), columns, group.slot, call.place
    )


def _keep_scale(threshold: int) -> float:
    return 65536 / (65536 - threshold)


def _weight_gradient(call: RoutedCall) -> Tensor | None:
    return torch.zeros_like(call.routing.pair_weights) if call.needs.weights else None


def _narrow(wide: Tensor, factor: Tensor) -> Tensor:
    """``wide @ factor``: ``[n, D] x [D, R] -> [n, R]`` in :func:`product_dtype`.

    The smaller one is cast where their dtypes differ: with few tokens that is not the factor.
    """
    if factor.dtype == wide.dtype == product_dtype(wide):
        return wide @ factor
    if _is_better_widened(wide, factor, wide.dtype, factor.shape[1]):
        return (wide.to(factor.dtype) @ factor).to(product_dtype(wide))
    return narrow_product(wide, factor.to(wide.dtype))


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
