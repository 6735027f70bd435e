"""``lora_linear`` on the compiled CPU kernels, forward and backward: backend ``native``.

Dimensions: M tokens, K in_features, N out_features, R rank.

The base GEMM stays with the vendor's library, exactly as the frozen layer's. The adapter is one
walk of ours over the rows of x and y, and one over those of dy, x and dx: dropout, casts and the
addition into the base's result happen in registers. h and t are fp32. The base comes first and the
tail is added to it, so that the GEMM is the one the frozen layer runs.
"""

import torch

from lora_kernels.base_weights import BaseWeight, product_or_bias
from lora_kernels.ops.linear.call import Gradients, LinearBackward, LinearCall, Result
from lora_kernels.ops.narrow.columns import column_dot, scale_columns
from lora_kernels.runtime import cpu_extension
from lora_kernels.runtime.eager import restore_leading_dims


def why_not(base: BaseWeight | None) -> str | None:
    """Why calls with this base weight cannot be served: all can."""
    return None


def forward(call: LinearCall) -> Result:
    x, factors, dropout = call.x, call.factors, call.dropout
    scaling = float(factors.scaling)
    rows = x if x.is_contiguous() else cpu_extension.rows_of(x)  # [..., K] or [M, K]
    h = mask = None
    if call.save or dropout is not None:
        # Before the product, which leaves little of Python's code in the caches.
        h, mask = cpu_extension.allocate_saved(rows, factors.a.shape[0], dropout)
    bias = call.bias if factors.output_scale is None else None
    y, add = product_or_bias(call.base, rows, bias, factors.b.shape[0])
    cpu_extension.adapter_forward(y, rows, factors.a, factors.b, h, mask, scaling, dropout, add=add)
    unscaled = None
    if factors.output_scale is not None:
        y = y.view(-1, y.shape[-1])
        unscaled = y if call.save_unscaled else None
        y = scale_columns(y, factors.output_scale, call.bias)
    if y.ndim != x.ndim or y._is_view():
        y = restore_leading_dims(y, x)
    return Result(y, h, mask, unscaled)


def backward(call: LinearBackward) -> Gradients:
    dy, x, h, factors, dropout = call.dy, call.x, call.h, call.factors, call.dropout
    needs_x, output_scale = call.needs.x, factors.output_scale
    rows_dy = dy if dy.is_contiguous() else cpu_extension.rows_of(dy)  # [..., N] or [M, N]
    dx = grad_a = grad_b = grad_bias = grad_output_scale = None
    if call.needs.bias or output_scale is not None:
        rows_dy = rows_dy.view(-1, rows_dy.shape[-1])
    if call.needs.bias:
        grad_bias = rows_dy.sum(0)
    if output_scale is not None and call.unscaled is not None:
        grad_output_scale = column_dot(rows_dy, call.unscaled).to(output_scale.dtype)
    if not needs_x and x is None and h is None:
        return Gradients(bias=grad_bias, output_scale=grad_output_scale)

    if output_scale is not None:
        rows_dy = scale_columns(rows_dy, output_scale, None)
    columns, mask = factors.a.shape[1], None if dropout is None else call.mask
    if dropout is not None and mask is None and (needs_x or x is not None):
        rows = dy.numel() // dy.shape[-1]
        mask = cpu_extension.packed_keep_mask(
            dropout.seed, dropout.p, rows, columns, place=dropout.place
        )
    grad_a = None if x is None else torch.empty_like(factors.a)
    grad_b = None if h is None else torch.empty_like(factors.b)
    if needs_x and call.base is not None:
        dx = call.base.matmul_t(rows_dy)
    elif needs_x:
        dx = rows_dy.new_empty((*rows_dy.shape[:-1], columns))
    cpu_extension.adapter_backward(
        dx, grad_a, grad_b, rows_dy, x, factors.a, factors.b, h, mask, float(factors.scaling),
        dropout, add=call.base is not None,
    )  # fmt: skip
    if dx is not None and dx.ndim != dy.ndim:
        dx = dx.view(*dy.shape[:-1], columns)
    return Gradients(dx, grad_a, grad_b, grad_bias, grad_output_scale)
