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

from lora_kernels.base_weights import DenseWeight, product_or_bias
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
from lora_kernels.ops.routed.triton.launch import RoutedLaunch, Tail
from lora_kernels.runtime.device_limits import on_device


def forward(call: ForwardCall) -> Result:
    x, base, y = call.x, call.base, call.out
    launch = None if _is_nothing(x, call) else RoutedLaunch(x, call)
    h = narrow(x, call) if call.save else None
    if launch is not None and y is None and isinstance(base, DenseWeight) and launch.fuses:
        with on_device(x):
            tail = launch.shrink(x, h).tensor
            return Result(launch.gemm(x, base.weight.t(), call.bias, tail, to_b=True), h)
    begun = True
    if y is None:
        y, begun = product_or_bias(base, x, call.bias, call.bank.slice_columns[-1])
    fresh = not begun and launch is not None and call.routing.pairs_per_token == 1
    if not begun and not fresh:
        y.zero_()
    if launch is not None:
        with on_device(x):
            launch.expand(y, launch.shrink(x, h), to_b=True, overwrite=fresh)
    elif h is not None:
        h.zero_()
    return Result(y, h)


def backward(call: LoRABackward) -> Gradients:
    dy, base, needs, layout = call.dy, call.base, call.needs, call.layout
    needs_a, needs_b = layout.needs_gradient(call.bank)
    grad = call.bank.storage.new_zeros(layout.numel)
    grad_bias = dy.sum(0) if needs.bias else None
    nothing = _is_nothing(dy, call)
    grad_weights = call.new_weights(torch.zeros_like if nothing else torch.empty_like)
    if nothing:
        return Gradients(call.base_gradient() if needs.x else None, grad, grad_weights, grad_bias)
    launch = RoutedLaunch(dy, call)
    dx = t = rounded = None
    with on_device(dy):
        if needs_b and call.h is not None:
            launch.gradient(dy, call.h.contiguous(), layout, grad, of_a=False)
        if needs.x or needs_a or needs.weights:
            t = narrow(dy, call) if needs_a else None
            rounded = launch.project(dy, t, call.h, grad_weights, rounded=needs.x)
        if rounded is not None and isinstance(base, DenseWeight) and launch.fuses:
            dx = launch.gemm(dy, base.weight, None, rounded, to_b=False)
        elif rounded is not None:
            fresh = base is None and call.routing.pairs_per_token == 1
            shape = (dy.shape[0], call.in_features)
            dx = dy.new_empty(shape) if fresh else call.base_gradient()
            launch.expand(dx, Tail(rounded), to_b=False, overwrite=fresh)
        if t is not None and call.x is not None:
            launch.gradient(call.x, t, layout, grad, of_a=True)
    return Gradients(dx, grad, grad_weights, grad_bias)


def shrink(call: ForwardCall) -> tuple[Tensor, None]:
    """h as :func:`forward` saves it, and no mask."""
    x = call.x
    h = narrow(x, call)
    if _is_nothing(x, call):
        return h.zero_(), None
    with on_device(x):
        RoutedLaunch(x, call).shrink_into(h, x)
    return h, None


def shrink_backward(call: ShrinkBackward) -> Gradients:
    x, needs_x = call.x, call.needs.x
    grad = call.bank.storage.new_zeros(call.layout.numel)
    nothing = _is_nothing(x, call)
    fresh = call.routing.pairs_per_token == 1 and not nothing
    dx = (x.new_empty if fresh else x.new_zeros)(x.shape) if needs_x else None
    if nothing:
        return Gradients(dx, grad)
    t = call.dy.contiguous()
    launch = RoutedLaunch(x, call)
    with on_device(x):
        if dx is not None:
            launch.expand(dx, Tail(t.to(x.dtype)), to_b=False, overwrite=fresh)
        if call.layout.needs_gradient(call.bank)[0]:
            launch.gradient(x, t, call.layout, grad, of_a=True)
    return Gradients(dx, grad)


def expand_(call: ExpandCall, out: Tensor) -> None:
    """``out += w s h B^T`` for every pair."""
    if not _is_nothing(out, call):
        launch = RoutedLaunch(out, call)
        with on_device(out):
            launch.expand(out, launch.scale(call.h.contiguous()), to_b=True)


def expand_backward(call: ExpandBackward) -> Gradients:
    dy, needs = call.dy, call.needs
    grad, nothing = call.bank.storage.new_zeros(call.layout.numel), _is_nothing(dy, call)
    grad_weights = call.new_weights(torch.zeros_like if nothing else torch.empty_like)
    t = narrow(dy, call) if needs.x else None
    if nothing:
        return Gradients(None if t is None else t.zero_(), grad, grad_weights)
    launch = RoutedLaunch(dy, call)
    with on_device(dy):
        if call.layout.needs_gradient(call.bank)[1]:
            launch.gradient(dy, call.h.contiguous(), call.layout, grad, of_a=False)
        if needs.x or needs.weights:
            launch.project(dy, t, call.h, grad_weights, rounded=False)
    return Gradients(t, grad, grad_weights)


def narrow(like: Tensor, call: RoutedCall) -> Tensor:
    """An empty h or t, ``[P, H]`` fp32."""
    shape = call.routing.tokens.shape[0], call.bank.max_total_rank
    return like.new_empty(shape, dtype=torch.float32)


def _is_nothing(rows: Tensor, call: RoutedCall) -> bool:
    """Whether there is nothing to launch a kernel for."""
    return rows.shape[0] == 0 or call.bank.max_total_rank == 0 or call.routing.tokens.shape[0] == 0
