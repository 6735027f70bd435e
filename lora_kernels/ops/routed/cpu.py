"""``routed_lora`` on the compiled extension's CPU kernels: backend ``native``.

Dimensions: M tokens, P pairs, K in_features, N out_features of all slices, H the widest rank.

One call goes over all groups; its threads share their tasks. A row of the result depends on its own
token and its adapters only, and a token's adapters add in the order of their slots. h and t are
fp32. The signatures are those of :mod:`composed`.
"""

import torch
from torch import Tensor

from lora_kernels.ops.routed import composed
from lora_kernels.ops.routed.tensors import (
    BankTensors,
    GradientLayout,
    RoutingTensors,
    in_one_piece,
)
from lora_kernels.runtime import cpu_extension


def forward(
    x: Tensor,  # [M, K]
    weight: Tensor | None,  # [N, K]
    bias: Tensor | None,  # [N]
    bank: BankTensors,
    routing: RoutingTensors,
    seed: Tensor | None,  # []
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(y, h, mask)`` as :func:`composed.forward`, h in fp32."""
    if weight is not None:
        y = torch.nn.functional.linear(x, weight, bias)
    elif bias is not None:
        y = bias.expand(x.shape[0], -1).clone()
    else:
        y = x.new_zeros((x.shape[0], bank.slice_columns[-1]))
    h, mask = _add(y, x, bank, routing, seed, save)
    return y, h if save else None, mask


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
    needs_a, needs_b = layout.trains(bank)
    call = _call(bank, routing, in_features, seed)
    dy = cpu_extension.rows_of(dy)
    dx = t = grad_weights = None
    if needs_x:
        dx = dy.new_zeros((dy.shape[0], in_features)) if weight is None else dy @ weight
    if needs_x or needs_a or needs_weights:
        t, grad_weights = call.expand_backward(dy, h, needs_weights)
        if seed is not None and mask is None:
            mask = call.draw_mask()
    if needs_x:
        call.shrink_backward_(dx, t, mask)
    grad = call.gradients(dy if needs_b else None, h, x if needs_a else None, t, mask, layout)
    grad = grad.to(bank.storage.dtype)
    return dx, grad, grad_weights, dy.sum(0) if needs_bias else None


def shrink(
    x: Tensor,  # [M, K]
    bank: BankTensors,
    routing: RoutingTensors,
    seed: Tensor | None,  # []
) -> tuple[Tensor, Tensor | None]:
    """``(h, mask)`` as :func:`forward` saves them."""
    call = _call(bank, routing, x.shape[1], seed)
    mask = None if seed is None else call.draw_mask()
    return call.shrink(x, mask, zeros=True), mask


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
    needs_a, _ = layout.trains(bank)
    call = _call(bank, routing, x.shape[1], seed)
    if seed is not None and mask is None:
        mask = call.draw_mask()
    dx = None
    if needs_x:
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
        call.shrink_backward_(dx, t, mask)
    grad = call.gradients(None, None, x if needs_a else None, t, mask, layout)
    return dx, grad.to(bank.storage.dtype)


def expand_(
    out: Tensor,  # [M, N], added to
    h: Tensor,  # [P, H]
    bank: BankTensors,
    routing: RoutingTensors,
) -> None:
    """``out += w s h B^T`` for every pair."""
    if out.dtype not in cpu_extension.DTYPES:  # chosen by h's dtype, and out has another
        return composed.expand_(out, h, bank, routing)
    with cpu_extension.unit_stride(out) as rows:
        _call(bank, routing, 0, None).expand_(rows, h)


def expand_backward(
    dy: Tensor,  # [M, N]
    h: Tensor | None,  # [P, H], needed for the gradients of B and of the weights
    bank: BankTensors,
    routing: RoutingTensors,
    layout: GradientLayout,
    needs: tuple[bool, bool],  # h, the pairs' weights
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Gradients of h, of the factors (those of B) and of the weights."""
    if dy.dtype not in cpu_extension.DTYPES:
        return composed.expand_backward(dy, h, bank, routing, layout, needs)
    needs_h, needs_weights = needs
    _, needs_b = layout.trains(bank)
    call = _call(bank, routing, 0, None)
    dy = cpu_extension.rows_of(dy)
    t = grad_weights = None
    if needs_h or needs_weights:
        t, grad_weights = call.expand_backward(dy, h, needs_weights, zeros=True)
    grad = call.gradients(dy if needs_b else None, h, None, None, None, layout)
    grad = grad.to(bank.storage.dtype)
    return t if needs_h else None, grad, grad_weights


def add_(
    out: Tensor,  # [M, N], added to
    x: Tensor,  # [M, K]
    bank: BankTensors,
    routing: RoutingTensors,
    seed: Tensor | None,
) -> None:
    """``out += `` the adapters' contribution."""
    with cpu_extension.unit_stride(out) as rows:
        _add(rows, x, bank, routing, seed, False)


def _call(
    bank: BankTensors, routing: RoutingTensors, in_features: int, seed: Tensor | None
) -> cpu_extension.RoutedCall:
    if bank.storage.dtype not in cpu_extension.DTYPES:
        bank = in_one_piece(bank, torch.float32)
    return cpu_extension.RoutedCall(bank, routing, in_features, seed)


def _add(y, x, bank, routing, seed, save) -> tuple[Tensor, Tensor | None]:
    """Add the contribution to y; returns h and the mask."""
    call = _call(bank, routing, x.shape[1], seed)
    mask = None if seed is None else call.draw_mask()
    h = call.shrink(x, mask, zeros=save)
    call.expand_(y, h)
    return h, mask
