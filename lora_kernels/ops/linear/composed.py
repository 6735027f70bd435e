"""``lora_linear`` on the vendor's GEMMs (oneDNN, cuBLAS), forward and backward written by hand.

Dimensions: M tokens, K in_features, N out_features, R rank.

The base GEMM runs in x's dtype exactly as the frozen layer would. What the adapter adds are narrow
GEMMs with the rank as one side and one accumulating GEMM into the base's result. Nothing of size
M*K or M*N is allocated on behalf of the adapter, except one row chunk at a time under dropout.
"""

import torch
from torch import Tensor

from lora_kernels.ops.linear.call import Gradients, LinearCall, Result
from lora_kernels.ops.narrow.columns import column_dot, scale_columns
from lora_kernels.ops.narrow.products import (
    narrow_product,
    product_dtype,
    row_chunks,
    scaled,
    transposed_product,
)
from lora_kernels.runtime.dropout import ActiveDropout, packed_keep_mask, zero_dropped
from lora_kernels.runtime.dtypes import accumulator_dtype
from lora_kernels.runtime.eager import below_autograd, restore_leading_dims
from lora_kernels.runtime.scaling import host_number


def why_not(call: LinearCall) -> str | None:
    """Why a call on this device, in this dtype, cannot be served: any can, over any base weight."""
    return None


@below_autograd
def forward(call: LinearCall) -> Result:
    """h is in :func:`product_dtype`."""
    x, factors, dropout = call.x, call.factors, call.dropout
    output_scale = factors.output_scale
    rows = x.reshape(-1, x.shape[-1])  # [M, K]
    mask = None
    if dropout is not None:
        mask = packed_keep_mask(dropout.seed, dropout.p, *rows.shape, place=dropout.place)
    h = shrink_rows(rows, factors.a, mask, dropout)
    tail = h.to(x.dtype)  # [M, R]
    scaled_b = scaled(factors.b, host_number(factors.scaling), x.dtype)  # [N, R]
    # The tail first: the wide GEMM then adds to a result that is still in the cache.
    if call.bias is None or output_scale is not None:
        y = tail @ scaled_b.t()
    else:
        y = torch.addmm(call.bias, tail, scaled_b.t())
    if call.base is not None:
        call.base.add_matmul_(y, rows)
    unscaled = None
    if output_scale is not None:
        unscaled = y if call.save_unscaled else None
        y = scale_columns(y, output_scale, call.bias)
    return Result(restore_leading_dims(y, x), h, mask, unscaled)


@below_autograd
def backward(call: LinearCall) -> Gradients:
    dy, factors, dropout, needs = call.dy, call.factors, call.dropout, call.needs
    scaling = host_number(factors.scaling)
    rows_dy = dy.reshape(-1, dy.shape[-1])  # [M, N]
    num_rows, columns = rows_dy.shape[0], factors.a.shape[1]
    dx = grad_a = grad_b = grad_bias = grad_output_scale = None
    if needs.bias:
        grad_bias = rows_dy.sum(0)
    if needs.output_scale:
        grad_output_scale = column_dot(rows_dy, call.unscaled).to(factors.output_scale.dtype)
    if factors.output_scale is not None and (needs.x or needs.lora_a or needs.lora_b):
        rows_dy = scale_columns(rows_dy, factors.output_scale, None)
    if needs.lora_b:
        # The scaling goes to h: the product may come out rounded, and is not to be rounded twice.
        grad_b = transposed_product(rows_dy, call.h * scaling).to(factors.b.dtype)  # [N, R]
    if not (needs.x or needs.lora_a):
        return Gradients(dx, grad_a, grad_b, grad_bias, grad_output_scale)

    # The dropout scale rides on B, so that t already carries it to both of its products.
    keep_scale = 1.0 if dropout is None else dropout.scale
    t = narrow_product(rows_dy, factors.b, scaling * keep_scale)  # [M, R]
    a = factors.a.to(dy.dtype) if needs.x else None
    if dropout is None:
        if needs.x:
            dx = t.to(dy.dtype) @ a
        if needs.lora_a:
            grad_a = transposed_product(t, call.x.reshape(-1, columns))
    else:
        mask = call.mask
        if mask is None:
            mask = packed_keep_mask(dropout.seed, dropout.p, num_rows, columns, place=dropout.place)
        rows_x = call.x.reshape(-1, columns) if needs.lora_a else None
        dx = rows_dy.new_empty((num_rows, columns)) if needs.x else None
        if needs.lora_a:
            grad_a = t.new_zeros(factors.a.shape, dtype=accumulator_dtype(t.dtype))
        for chunk in row_chunks(num_rows, columns, dy.device):
            if needs.x:
                dx[chunk] = zero_dropped(t[chunk].to(dy.dtype) @ a, mask[chunk])
            if needs.lora_a:
                grad_a += transposed_product(t[chunk], zero_dropped(rows_x[chunk], mask[chunk]))
    if needs.x and call.base is not None:
        call.base.add_matmul_t_(dx, rows_dy)
    if needs.x:
        dx = dx.view(*dy.shape[:-1], columns)
    if needs.lora_a:
        grad_a = grad_a.to(factors.a.dtype)
    return Gradients(dx, grad_a, grad_b, grad_bias, grad_output_scale)


def shrink_rows(
    x: Tensor, lora_a: Tensor, mask: Tensor | None, dropout: ActiveDropout | None
) -> Tensor:
    """``h = D(x) A^T`` ``[M, R]``."""
    if mask is None:
        return narrow_product(x, lora_a.t())
    h = x.new_empty((x.shape[0], lora_a.shape[0]), dtype=product_dtype(x))
    for chunk in row_chunks(*x.shape, x.device):
        kept = zero_dropped(x[chunk], mask[chunk])
        h[chunk] = narrow_product(kept, lora_a.t(), dropout.scale)
    return h
