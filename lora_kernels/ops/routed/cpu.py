"""``routed_lora`` on the compiled extension's CPU kernels: backend ``native``.

Dimensions: M tokens, P pairs, K in_features, N out_features of all slices, H the widest rank.

One call goes over all groups; its threads share their tasks. A row of the result depends on its own
token and its adapters only, and a token's adapters add in the order of their slots. h and t are
fp32.
"""

import torch
from torch import Tensor

from lora_kernels.base_weights import product_or_bias
from lora_kernels.ops.routed import composed
from lora_kernels.ops.routed.call import (
    ExpandBackward,
    ExpandCall,
    ForwardCall,
    Gradients,
    LoRABackward,
    Result,
    RoutedCall,
    ShrinkBackward,
)
from lora_kernels.ops.routed.tensors import in_one_piece
from lora_kernels.runtime import cpu_extension


def forward(call: ForwardCall) -> Result:
    if call.out is not None:
        with cpu_extension.unit_stride(call.out) as rows:
            _add(rows, call)
        return Result(call.out)
    y, begun = product_or_bias(call.base, call.x, call.bias, call.bank.slice_columns[-1])
    h, mask = _add(y if begun else y.zero_(), call)
    return Result(y, h if call.save else None, mask)


def backward(call: LoRABackward) -> Gradients:
    needs, (needs_a, needs_b) = call.needs, call.layout.needs_gradient(call.bank)
    groups, mask = _groups(call, call.in_features), call.mask
    call.dy = dy = cpu_extension.rows_of(call.dy)
    dx, t, grad_weights = call.base_gradient() if needs.x else None, None, None
    if dx is not None or needs_a or needs.weights:
        t, grad_weights = groups.expand_backward(dy, call.h, needs.weights)
        if call.seed is not None and mask is None:
            mask = groups.draw_mask()
        if dx is not None:
            groups.shrink_backward_(dx, t, mask)
    x = call.x if needs_a else None
    grad = groups.gradients(dy if needs_b else None, call.h, x, t, mask, call.layout)
    grad_bias = dy.sum(0) if needs.bias else None
    return Gradients(dx, grad.to(call.bank.storage.dtype), grad_weights, grad_bias)


def shrink(call: ForwardCall) -> tuple[Tensor, Tensor | None]:
    """h and mask as :func:`forward` saves them."""
    groups = _groups(call, call.x.shape[1])
    mask = None if call.seed is None else groups.draw_mask()
    return groups.shrink(call.x, mask, zeros=True), mask


def shrink_backward(call: ShrinkBackward) -> Gradients:
    x, mask = call.x, call.mask
    needs_a, _ = call.layout.needs_gradient(call.bank)
    groups = _groups(call, x.shape[1])
    if call.seed is not None and mask is None:
        mask = groups.draw_mask()
    dx = None
    if call.needs.x:
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
        groups.shrink_backward_(dx, call.dy, mask)
    grad = groups.gradients(None, None, x if needs_a else None, call.dy, mask, call.layout)
    return Gradients(dx, grad.to(call.bank.storage.dtype))


def expand_(call: ExpandCall, out: Tensor) -> None:
    """``out += w s h B^T`` for every pair."""
    if out.dtype not in cpu_extension.DTYPES:  # chosen by h's dtype, and out has another
        return composed.expand_(call, out)
    with cpu_extension.unit_stride(out) as rows:
        _groups(call, 0).expand_(rows, call.h)


def expand_backward(call: ExpandBackward) -> Gradients:
    if call.dy.dtype not in cpu_extension.DTYPES:
        return composed.expand_backward(call)
    needs, (_, needs_b) = call.needs, call.layout.needs_gradient(call.bank)
    groups = _groups(call, 0)
    dy = cpu_extension.rows_of(call.dy)
    t = grad_weights = None
    if needs.x or needs.weights:
        t, grad_weights = groups.expand_backward(dy, call.h, needs.weights, zeros=True)
    grad = groups.gradients(dy if needs_b else None, call.h, None, None, None, call.layout)
    return Gradients(t if needs.x else None, grad.to(call.bank.storage.dtype), grad_weights)


def _groups(call: RoutedCall, in_features: int) -> cpu_extension.RoutedGroups:
    bank = call.bank
    if bank.storage.dtype not in cpu_extension.DTYPES:
        bank = in_one_piece(bank, torch.float32)
    return cpu_extension.RoutedGroups(bank, call.routing, in_features, call.seed, call.place)


def _add(y: Tensor, call: ForwardCall) -> tuple[Tensor, Tensor | None]:
    """Add the contribution to y; returns h and the mask."""
    groups = _groups(call, call.x.shape[1])
    mask = None if call.seed is None else groups.draw_mask()
    h = groups.shrink(call.x, mask, zeros=call.save)
    groups.expand_(y, h)
    return h, mask
