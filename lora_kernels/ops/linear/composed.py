"""``lora_linear`` on the vendor's GEMMs (oneDNN, cuBLAS), forward and backward written by hand.

Dimensions: M tokens, K in_features, N out_features, R rank.

What costs is passes over x, dy, y and dx, and on a GPU launches: every wide tensor is read once for
each product that needs it, the tail comes before the wide GEMM, which adds to it, and each factor
is rounded to x's dtype once, the scaling with it. Nothing of size M*K or M*N is kept on behalf of
the adapter; under dropout one copy of x lives while it is multiplied.
"""

import torch
from torch import Tensor

from lora_kernels.adapters.factors import LoRAFactors
from lora_kernels.base_weights import BaseWeight, product_or_bias
from lora_kernels.ops.linear.call import Gradients, LinearBackward, LinearCall, Result
from lora_kernels.ops.narrow.columns import column_dot, scale_columns
from lora_kernels.ops.narrow.masks import draw_mask, masked_copy, masked_product
from lora_kernels.ops.narrow.products import (
    in_fp16_range,
    is_better_widened,
    narrow_product,
    rounded,
    scaled_product,
    transposed_product,
    widens_first,
)
from lora_kernels.runtime.eager import below_autograd, restore_leading_dims
from lora_kernels.runtime.scaling import host_number


def why_not(base: BaseWeight | None) -> str | None:
    """Why calls with this base weight cannot be served: all can."""
    return None


@below_autograd
def forward(call: LinearCall) -> Result:
    """h is in :func:`product_dtype`, or for few tokens in the factors' dtype."""
    x, factors = call.x, call.factors
    output_scale = factors.output_scale
    rows = x.reshape(-1, x.shape[-1])  # [M, K]
    widens = widens_first(x)
    bias = call.bias if output_scale is None else None
    dropped, mask = rows, None
    if call.dropout is not None:
        dropped, mask = masked_copy(rows, call.dropout)
    kept_a = kept_b = unscaled = None
    kind, rank = factors.a.dtype, factors.a.shape[0]
    if kind == factors.b.dtype and is_better_widened(rows, kind, rank):
        h = dropped.to(factors.a.dtype) @ factors.a.t()
        y, begun = product_or_bias(call.base, rows, bias, factors.b.shape[0])
        scaling = host_number(factors.scaling)
        if isinstance(scaling, Tensor):
            tail = (h * scaling) @ factors.b.t()
        else:
            tail = scaled_product(h, factors.b.t(), scaling)
        y = y.add_(tail) if begun else tail.to(x.dtype)
    else:
        a = factors.a if widens else factors.a.to(x.dtype)
        b, alpha = _scaled_b(factors, x.dtype)
        h = narrow_product(dropped, a.t())
        # The tail first: the wide GEMM then adds to a result that is still in the cache.
        y = scaled_product(h.to(x.dtype), b.t(), alpha, bias)
        if call.base is not None:
            call.base.add_matmul_(y, rows)
        kept_a = None if a is factors.a else a
        kept_b = b if alpha == 1 and b is not factors.b and not widens else None
    if output_scale is not None:
        unscaled = y if call.save_unscaled else None
        y = scale_columns(y, output_scale, call.bias)
    return Result(restore_leading_dims(y, x), h, mask, unscaled, (kept_a, kept_b))


@below_autograd
def backward(call: LinearBackward) -> Gradients:
    dy, x, h, factors, dropout = call.dy, call.x, call.h, call.factors, call.dropout
    needs_x, output_scale = call.needs.x, factors.output_scale
    rows_dy = dy.reshape(-1, dy.shape[-1])  # [M, N]
    num_rows, columns = rows_dy.shape[0], factors.a.shape[1]
    dx = grad_a = grad_b = grad_bias = grad_output_scale = None
    if call.needs.bias:
        grad_bias = rows_dy.sum(0)
    if output_scale is not None:
        if call.unscaled is not None:
            grad_output_scale = column_dot(rows_dy, call.unscaled).to(output_scale.dtype)
        if needs_x or x is not None or h is not None:
            rows_dy = scale_columns(rows_dy, output_scale, None)
    if h is not None:
        grad_b = _gradient_of_b(h, factors, rows_dy)
    if not needs_x and x is None:
        return Gradients(dx, grad_a, grad_b, grad_bias, grad_output_scale)

    a, b = call.rounded
    alpha = 1.0
    if b is None:
        b, alpha = _scaled_b(factors, torch.float32 if widens_first(dy) else dy.dtype)
    t, scale = narrow_product(rows_dy, b), None  # [M, R]
    if dy.dtype == torch.float16 and not widens_first(dy):
        t, scale = in_fp16_range(t)
    mask = call.mask
    if x is not None:
        rows_x = x.reshape(-1, columns)
        if dropout is not None:
            rows_x, mask = masked_copy(rows_x, dropout, mask)
        grad_a = transposed_product(t, rows_x, factors.a.dtype, alpha, scale)
        del rows_x  # the copy goes before dx comes
    if needs_x:
        a = factors.a.to(dy.dtype) if a is None else a
        t = t.to(dy.dtype)
        if dropout is None:
            dx = scaled_product(t if scale is None else rounded(t, dy.dtype, scale), a, alpha)
        else:
            if mask is None:
                mask = draw_mask(num_rows, columns, dropout)
            dx = masked_product(t, a, mask, dropout, alpha, scale)
        if call.base is not None:
            call.base.add_matmul_t_(dx, rows_dy)
        dx = dx.view(*dy.shape[:-1], columns)
    return Gradients(dx, grad_a, grad_b, grad_bias, grad_output_scale)


def _gradient_of_b(h: Tensor, factors: LoRAFactors, rows_dy: Tensor) -> Tensor:  # [N, R]
    dtype, scaling = factors.b.dtype, host_number(factors.scaling)
    # h is in fp16's range, as it was in the forward; much scaled it may not be.
    in_range = not isinstance(scaling, Tensor) and 0.25 <= abs(scaling) <= 4
    if rows_dy.dtype != torch.float16 or in_range:
        # The scaling goes to h: the product may come out rounded, and is not to be rounded twice.
        return transposed_product(rows_dy, rounded(h, rows_dy.dtype, scaling), dtype)
    h = h if widens_first(rows_dy) else h.to(torch.float16)
    if isinstance(scaling, Tensor):
        return transposed_product(rows_dy, h, dtype, scale=scaling)
    return transposed_product(rows_dy, h, dtype, scaling)


def _scaled_b(factors: LoRAFactors, dtype: torch.dtype) -> tuple[Tensor, float]:
    """B ``[N, R]`` in ``dtype``, and what products with it are still to be scaled by: 1 where B is
    rounded or the scaling is on the device, as the scaling is in it already."""
    scaling = host_number(factors.scaling)
    if factors.b.dtype.itemsize > dtype.itemsize or isinstance(scaling, Tensor):
        return rounded(factors.b, dtype, scaling), 1.0
    return factors.b.to(dtype), scaling
