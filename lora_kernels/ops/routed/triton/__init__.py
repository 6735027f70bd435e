"""``routed_lora`` on our Triton kernels.

Dimensions: M tokens, P pairs of a token and an adapter, K in_features, N out_features of all
slices, H the widest rank of the bank, S slices, T tiles.

Takes and returns what :mod:`composed` does, except that h and t are fp32 and no mask is stored:
every kernel regenerates it. All sizes are known on the host and do not depend on what a routing
holds; nothing is read back, workspaces come from torch's allocator. So a CUDA graph captured once
serves every routing.
"""

import torch
from torch import Tensor

from lora_kernels.ops.routed.tensors import BankTensors, GradientLayout, RoutingTensors
from lora_kernels.ops.routed.triton.launch import Launches
from lora_kernels.runtime.device_limits import on_device


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
    nothing = _nothing(x, bank, routing)
    call = None if nothing else Launches(x, bank, routing, seed)
    h = _narrow(x, bank, routing) if save else None
    if call is not None and weight is not None and call.fuses:
        with on_device(x):
            return call.gemm(x, weight, bias, call.shrink(x, h)), h, None
    fresh = weight is None and bias is None and routing.pairs_per_token == 1
    if weight is not None:
        y = torch.nn.functional.linear(x, weight, bias)
    elif bias is not None:
        y = bias.expand(x.shape[0], -1).clone()
    else:
        shape = (x.shape[0], bank.slice_columns[-1])
        fresh = fresh and not nothing
        y = x.new_empty(shape) if fresh else x.new_zeros(shape)
    if call is not None:
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
    needs_a, needs_b = layout.trains(bank)
    grad = bank.storage.new_zeros(layout.numel)
    grad_bias = dy.sum(0) if needs_bias else None
    grad_weights = None
    if _nothing(dy, bank, routing):
        grad_weights = torch.zeros_like(routing.pair_weights) if needs_weights else None
        dx = _base_gradient(dy, weight, in_features) if needs_x else None
        return dx, grad, grad_weights, grad_bias
    call = Launches(dy, bank, routing, seed)
    if needs_weights:
        grad_weights = torch.empty_like(routing.pair_weights)
    dx = t = None
    with on_device(dy):
        if needs_b:
            call.b_gradient(dy, h, layout, grad)
        if needs_x or needs_a or needs_weights:
            t = _narrow(dy, bank, routing) if needs_a else None
            rounded = call.project(dy, t, h, grad_weights, rounded=needs_x)
        if needs_x and weight is not None and call.fuses:
            dx = call.gemm_a(dy, weight, rounded)
        elif needs_x:
            fresh = weight is None and routing.pairs_per_token == 1
            shape = (dy.shape[0], in_features)
            dx = dy.new_empty(shape) if fresh else _base_gradient(dy, weight, in_features)
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
        Launches(x, bank, routing, seed).shrink(x, h, rounded=False)
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
    call = Launches(x, bank, routing, seed)
    with on_device(x):
        if needs_x:
            call.expand_a(dx, t.to(x.dtype), overwrite=fresh)
        if layout.trains(bank)[0]:
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
        call = Launches(out, bank, routing, None)
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
    call = Launches(dy, bank, routing, None)
    with on_device(dy):
        if layout.trains(bank)[1]:
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
        call = Launches(x, bank, routing, seed)
        with on_device(x):
            call.expand(out, call.shrink(x, None))


def _base_gradient(dy: Tensor, weight: Tensor | None, in_features: int) -> Tensor:
    """The frozen layer's ``dx`` ``[M, K]``; zeros without one."""
    return dy.new_zeros((dy.shape[0], in_features)) if weight is None else dy @ weight


def _nothing(rows: Tensor, bank: BankTensors, routing: RoutingTensors) -> bool:
    """Whether there is nothing to launch a kernel for."""
    return rows.shape[0] == 0 or bank.width == 0 or routing.tokens.shape[0] == 0


def _narrow(like: Tensor, bank: BankTensors, routing: RoutingTensors) -> Tensor:
    """An empty h or t, ``[P, H]`` fp32."""
    return like.new_empty((routing.tokens.shape[0], bank.width), dtype=torch.float32)
