"""``routed_lora`` on the vendor's GEMMs: for the groups of a batch, or for few tokens batched.

Dimensions: M tokens, P pairs, K in_features, N out_features of all slices, R an adapter's rank over
its slices, H the widest R of the bank, G groups, T pairs of the longest group, n the pairs of one.

On a device every operation is a launch. So only products are made group by group, into and out of
buffers of all pairs; rows that are not neighbours are gathered once for all groups, and the factors
are cast at once. Results of pairs are gathered by their tokens and added in the order of the pairs:
a token with several adapters, or with one twice, gets the same bits every time.
"""

import torch
from torch import Tensor

from lora_kernels.base_weights import product_or_bias
from lora_kernels.ops.narrow.grouped import (
    add_product_,
    copy_,
    factor_dtype,
    in_half_range,
    narrow_buffer,
    product_,
    transposed_product_,
)
from lora_kernels.ops.narrow.products import product_dtype, widens_first
from lora_kernels.ops.routed.batch import OF_A, OF_B, Batch, Block, FlatGradient, Rows
from lora_kernels.ops.routed.call import (
    ExpandBackward,
    ExpandCall,
    ForwardCall,
    Gradients,
    LoRABackward,
    Result,
    ShrinkBackward,
)
from lora_kernels.ops.routed.pair_masks import draw_masks, gather_masked, mask_rows_
from lora_kernels.ops.routed.pairs import Layout
from lora_kernels.runtime.dtypes import accumulator_dtype

# Bytes that memory moves while an operation is started.
_CPU_BYTES, _DEVICE_BYTES = 1 << 14, 1 << 22


def forward(call: ForwardCall) -> Result:
    """h is in :func:`product_dtype`, zero beyond an adapter's rank."""
    x, y, h, mask = call.x, call.out, None, None
    if y is None:
        y, begun = product_or_bias(call.base, x, call.bias, call.bank.slice_columns[-1])
        y = y if begun else y.zero_()
    batch = Batch(call, x)
    if not call.save and call.seed is None and _is_better_padded(batch):
        _add_padded(batch, x, y)
    else:
        h, mask = _shrink(batch, x)
        _add_expanded(batch, h, y)
    return Result(y, h, mask) if call.save else Result(y)


def backward(call: LoRABackward) -> Gradients:
    dy, needs = call.dy, call.needs
    grad_weights = call.new_weights(torch.zeros_like)
    grad_bias = dy.sum(0) if needs.bias else None
    dx = call.base_gradient() if needs.x else None
    batch = Batch(call, dy)
    grad = FlatGradient(batch, call.layout)
    t = _expand_backward(batch, dy, call.h, grad, grad_weights, needs.x or grad.needs_a)
    if t is not None:
        _shrink_backward(batch, call.x, t, call.mask, grad, dx)
    return Gradients(dx, grad.result(), grad_weights, grad_bias)


def shrink(call: ForwardCall) -> tuple[Tensor, Tensor | None]:
    """h and mask as :func:`forward` saves them."""
    return _shrink(Batch(call, call.x), call.x)


def shrink_backward(call: ShrinkBackward) -> Gradients:
    x = call.x
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if call.needs.x else None
    batch = Batch(call, x)
    grad = FlatGradient(batch, call.layout)
    _shrink_backward(batch, x, call.dy[: batch.pairs.count], call.mask, grad, dx)
    return Gradients(dx, grad.result())


def expand_(call: ExpandCall, out: Tensor) -> None:
    """``out += w s h B^T`` for every pair."""
    _add_expanded(Batch(call, out), call.h, out)


def expand_backward(call: ExpandBackward) -> Gradients:
    grad_weights = call.new_weights(torch.zeros_like)
    batch = Batch(call, call.dy)
    grad = FlatGradient(batch, call.layout)
    t = _expand_backward(batch, call.dy, call.h, grad, grad_weights, call.needs.x)
    if t is not None:
        shape = (call.routing.tokens.shape[0], call.bank.max_total_rank)
        dh = call.dy.new_zeros(shape, dtype=accumulator_dtype(call.dy.dtype))
        dh[: batch.pairs.count] = t
        t = dh
    return Gradients(t, grad.result(), grad_weights)


# --- few tokens ------------------------------------------------------------------------------


def _is_better_padded(batch: Batch) -> bool:
    """Whether batched products over groups of equal size cost less than the loop.

    Padded products move the factors and more rows than there are, in fewer operations.
    """
    bank, like, groups = batch.call.bank, batch.like, len(batch.pairs.groups)
    slices, members = bank.num_slices, batch.members
    if len(members) < 2 or any(len(member.parts) < slices for member in members):
        return False
    rows, saved = groups * batch.pairs.longest, (1 + slices) * (len(members) - 1)
    width = like.shape[1] + bank.slice_columns[-1]
    moved = 2 * (groups * bank.max_total_rank + rows) * width * like.element_size()
    return moved < saved * (_CPU_BYTES if like.device.type == "cpu" else _DEVICE_BYTES)


def _add_padded(batch: Batch, x: Tensor, y: Tensor) -> None:
    """Add ``w s D(x) A^T B^T`` by batched products over groups that all have T rows.

    The rows that fill up a group repeat one of its own: nothing of theirs is read.
    """
    bank, members = batch.call.bank, batch.members
    layout, length = batch.pairs.padded(batch.call.routing), batch.pairs.longest
    groups, columns = len(batch.pairs.groups), bank.slice_columns
    widths = [max(m.factors[1 + s].shape[1] for m in members) for s in range(bank.num_slices)]
    starts = [sum(widths[:s]) for s in range(len(widths) + 1)]
    a, b, exponent = _stacked(batch, x, widths, starts)

    rows = x.index_select(0, layout.tokens).to(a.dtype).view(groups, length, x.shape[1])
    wide = accumulator_dtype(x.dtype)
    if rows.dtype.itemsize == 2 and x.device.type == "cuda":
        h = torch.bmm(rows, a.transpose(1, 2), out_dtype=wide)
    else:
        h = torch.bmm(rows, a.transpose(1, 2))
    h = h.view(layout.count, starts[-1])
    if exponent is not None:
        h.mul_(exponent)
    scaled = narrow_buffer(x, layout.count, starts[-1], b[0].dtype)
    torch.mul(h, batch.scale(layout), out=scaled)
    scaled = scaled.unflatten(0, (groups, length))
    z = y.new_empty((layout.count + batch.pairs.some_without, columns[-1]))
    by_group = z[: layout.count].view(groups, length, columns[-1])
    for s, factor in enumerate(b):
        part = by_group[:, :, columns[s] : columns[s + 1]]
        left = scaled[:, :, starts[s] : starts[s] + widths[s]]
        if factor.dtype == z.dtype:
            torch.bmm(left, factor.transpose(1, 2), out=part)
        else:
            part.copy_(torch.bmm(left, factor.transpose(1, 2)))
    for number, group in enumerate(batch.pairs.groups):
        if group in batch.absent:
            _leave(by_group[number])
    _add_by_token(batch, y, z, layout)


def _stacked(
    batch: Batch, x: Tensor, widths: list[int], starts: list[int]
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """A of all slices ``[G, R, K]``, each B ``[G, N_s, R_s]``, zeros beyond an adapter's ranks.

    The last result is what h is to be multiplied by, or None.
    """
    members = batch.members
    groups, columns = len(batch.pairs.groups), batch.call.bank.slice_columns
    is_full = not batch.absent and all(
        m.factors[1 + s].shape[1] == width for m in members for s, width in enumerate(widths)
    )
    new = x.new_empty if is_full else x.new_zeros
    kind = members[0].factors[0].dtype
    dtype = factor_dtype(x, kind, batch.ranks, narrow=True)
    a = new((groups, starts[-1], x.shape[1]), dtype=dtype)
    dtype = factor_dtype(x, kind, batch.ranks, narrow=False)
    b = [
        new((groups, columns[s + 1] - columns[s], width), dtype=dtype)
        for s, width in enumerate(widths)
    ]
    number_of = {group.slot: number for number, group in enumerate(batch.pairs.groups)}
    places, sources = ([], []), ([], [])
    for group, factors, parts in members:
        number = number_of[group.slot]
        for s, _, ranks in parts:
            width = ranks.stop - ranks.start
            places[0].append(a[number, starts[s] : starts[s] + width])
            sources[0].append(factors[0][ranks])
            places[1].append(b[s][number, :, :width])
            sources[1].append(factors[1 + s])
    exponent = copy_(places[0], sources[0], in_range=True)
    copy_(places[1], sources[1])
    return a, b, exponent


# --- group by group --------------------------------------------------------------------------


def _shrink(batch: Batch, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """``D(x) A^T`` of all pairs ``[P, H]``, and the mask where something drops."""
    call, mask = batch.call, None
    h = batch.narrow(call.routing.tokens.shape[0], product_dtype(x))
    factors, exponent = batch.factors(OF_A, narrow=True)
    for block in batch.blocks():
        rows, mask = _dropped(batch, x, block, mask)
        for group, *_ in block.members:
            (a,) = factors[group.slot]
            product_(h[group.pairs, : a.shape[0]], rows[group], a.t())
    if exponent is not None:
        h.mul_(exponent)
    return h, mask


def _expand_backward(
    batch: Batch,
    dy: Tensor,  # [M, N]
    h: Tensor | None,  # [P, H]
    grad: FlatGradient,
    grad_weights: Tensor | None,  # [P], written
    needs_t: bool,
) -> Tensor | None:
    """t, the gradient of h ``[P, H]`` without the pairs behind the groups; None if not needed.

    Writes the gradients of B too.
    """
    count, layout, t, narrow = batch.pairs.count, batch.layout(), None, None
    scale, factors, exponent, exponent_of_b = batch.scale(layout), {}, None, None
    if needs_t or grad_weights is not None:
        t = batch.narrow(count, product_dtype(dy))
        factors, exponent = batch.factors(OF_B, narrow=True)
    if h is not None:
        h = h[:count]
        if grad.needs_b:
            narrow, exponent_of_b = _as_transposed(h, dy, scale)
    if t is None and narrow is None:
        return None
    for block in batch.blocks():
        rows = batch.rows(dy, block)
        for member in block.members:
            group = member.group
            for s, columns, ranks in member.parts:
                wide = rows[group][:, columns]
                if t is not None:
                    product_(t[group.pairs, ranks], wide, factors[group.slot][s])
                of_b = grad.of(member, 1 + s)
                if narrow is not None and of_b is not None:
                    transposed_product_(of_b, wide, narrow[group.pairs, ranks])
    if exponent_of_b is not None:
        grad.multiply_(OF_B, exponent_of_b)
    if t is None:
        return None
    if exponent is not None:
        t.mul_(exponent)
    if grad_weights is not None and h is not None:
        dtype = grad_weights.dtype
        unweighted = batch.scale(layout, weighted=False).squeeze(1)
        grad_weights[:count] = (t.to(dtype) * h.to(dtype)).sum(1) * unweighted
    return t.mul_(scale) if needs_t else None


def _shrink_backward(
    batch: Batch,
    x: Tensor | None,  # [M, K], read for the gradients of A
    t: Tensor,  # [P, H], without the pairs behind the groups
    mask: Tensor | None,
    grad: FlatGradient,
    dx: Tensor | None,  # [M, K], added to
) -> None:
    """Add ``keep * (t A)`` to the rows of dx; writes the gradients of A."""
    call = batch.call
    if not batch.members:
        return
    if mask is None and call.seed is not None:
        columns = batch.members[0].factors[0].shape[1]
        mask = draw_masks(columns, call.routing, call.bank, call.seed, call.place)
    if dx is not None:
        _add_products(batch, dx, t, None, OF_A, mask)
    if x is None or not grad.needs_a:
        return
    narrow, exponent = _as_transposed(t, x)
    for block in batch.blocks():
        rows = None
        for member in block.members:
            if (of_a := grad.of(member, 0)) is not None:
                if rows is None:
                    rows, _ = _dropped(batch, x, block, mask)
                of_group = narrow[member.group.pairs, : of_a.shape[0]]
                transposed_product_(of_a, of_group, rows[member.group])
    if exponent is not None:
        grad.multiply_(OF_A, exponent)


def _dropped(
    batch: Batch, x: Tensor, block: Block, mask: Tensor | None
) -> tuple[Rows, Tensor | None]:
    """``D(x)`` of a block's pairs, and the mask of all, drawn where it was not given."""
    call = batch.call
    if call.seed is None:
        return batch.rows(x, block), None
    kept, mask = gather_masked(x, call.routing, call.bank, call.seed, call.place, mask, block.pairs)
    return Rows(kept, block.pairs.start), mask


def _add_expanded(batch: Batch, h: Tensor, out: Tensor) -> None:
    """Add ``w s h B^T`` to the rows of out."""
    if batch.members:
        scale = batch.scale(batch.layout())
        _add_products(batch, out, h[: batch.pairs.count], scale, OF_B, None)


def _add_products(
    batch: Batch,
    out: Tensor,  # [M, D], added to
    narrow: Tensor,  # [P, H], without the pairs behind the groups
    scale: Tensor | None,  # of narrow, [P, 1]
    which: slice,  # OF_A: narrow A; OF_B: narrow B^T
    mask: Tensor | None,  # [P, ceil(D/8)], of a pair's result
) -> None:
    factors, _ = batch.factors(which, narrow=False)
    dtype = factor_dtype(out, batch.members[0].factors[which][0].dtype, batch.ranks, narrow=False)
    narrow = _as_operand(narrow, dtype, scale)
    terms = {}  # by slot: columns of the result, ranks, and the factor between them
    for group, _, parts in batch.members:
        made = factors[group.slot]
        if which is OF_B:
            terms[group.slot] = [(each.columns, each.ranks, made[each.index].t()) for each in parts]
        else:
            rank, columns = made[0].shape
            terms[group.slot] = [(slice(0, columns), slice(0, rank), made[0])]
    call, pairs = batch.call, batch.pairs
    if mask is None and (pairs.by_tokens or call.routing.pairs_per_token == 1):
        for block in batch.blocks():
            rows = batch.rows(out, block)
            for group, *_ in block.members:
                for columns, ranks, factor in terms[group.slot]:
                    add_product_(rows[group][:, columns], narrow[group.pairs, ranks], factor)
            if not pairs.by_tokens:
                out.index_copy_(0, batch.tokens(block), rows.rows)
        return
    z = out.new_empty((call.routing.tokens.shape[0], out.shape[1]))
    for group, _, parts in batch.members:
        if mask is None and len(parts) < call.bank.num_slices:
            _leave(z[group.pairs])
        for columns, ranks, factor in terms[group.slot]:
            product_(z[group.pairs, columns], narrow[group.pairs, ranks], factor)
    if mask is not None:
        mask_rows_(z, call.routing, call.bank, mask)
    for group in batch.absent:
        _leave(z[group.pairs])
    _add_by_token(batch, out, z, batch.layout())


def _add_by_token(batch: Batch, out: Tensor, z: Tensor, layout: Layout) -> None:
    """Add rows of pairs ``z`` ``[rows, D]`` to those of their tokens ``out`` ``[M, D]``."""
    first = batch.pairs.offset
    if layout.pairs is None and first is not None:
        out[first : first + layout.count].add_(z[: layout.count])
        return
    if batch.pairs.some_without:
        _leave(z[layout.count])
    for rows in layout.of_tokens:
        out.add_(z.index_select(0, rows[: out.shape[0]]))


# --- operands --------------------------------------------------------------------------------


def _leave(z: Tensor) -> None:
    """Fill with what changes no bit where it is added, not that of a zero's sign either."""
    z.fill_(-0.0)


def _as_operand(narrow: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """``scale * narrow`` ``[rows, H]``, rounded once."""
    out = narrow_buffer(narrow, narrow.shape[0], narrow.shape[1], dtype)
    return out.copy_(narrow) if scale is None else torch.mul(narrow, scale, out=out)


def _as_transposed(
    narrow: Tensor, wide: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """``scale * narrow`` for a product over the rows, whose results the second is to multiply."""
    if widens_first(wide):
        return _as_operand(narrow, torch.float32, scale), None
    if wide.dtype == torch.float16:
        return in_half_range(narrow if scale is None else narrow * scale)
    return _as_operand(narrow, wide.dtype, scale), None
