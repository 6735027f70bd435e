"""``lora_linear`` on the vendor's GEMMs (oneDNN, cuBLAS), forward and backward written by hand.

Dimensions: M tokens, K in_features, N out_features, R rank.

The base GEMM runs in x's dtype exactly as the frozen layer would. What the adapter adds are narrow
GEMMs with the rank as one side and one accumulating GEMM into the base's result. Nothing of size
M*K or M*N is allocated on behalf of the adapter, except one row chunk at a time under dropout.
"""

import torch
from torch import Tensor

from lora_kernels.ops.narrow.products import (
    narrow_product,
    product_dtype,
    row_chunks,
    scaled,
    transposed_product,
)
from lora_kernels.runtime.dropout import drop_threshold, keep_scale, packed_keep_mask, zero_dropped
from lora_kernels.runtime.dtypes import accumulator_dtype
from lora_kernels.runtime.eager import like_rows_of


def forward(
    x: Tensor,  # [..., K]
    weight: Tensor | None,  # [N, K]
    lora_a: Tensor,  # [R, K]
    lora_b: Tensor,  # [N, R]
    scaling: Tensor,  # []
    bias: Tensor | None,  # [N]
    output_scale: Tensor | None,  # [N]
    dropout_p: float,
    seed: Tensor | None,  # []
    save_unscaled: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """``(y, h, mask, unscaled)``: the result and what a backward may need.

    h is ``D(x) A^T`` ``[M, R]`` in :func:`product_dtype`, mask the packed keep-mask or None,
    unscaled the result before ``output_scale`` and ``bias`` where ``save_unscaled`` asks for it.
    """
    rows = x.reshape(-1, x.shape[-1])  # [M, K]
    mask = None
    if drop_threshold(dropout_p) > 0:
        mask = packed_keep_mask(seed, dropout_p, *rows.shape)
    h = _shrink(rows, lora_a, mask, dropout_p)
    scaling = _host_number(scaling)
    tail = h.to(x.dtype)  # [M, R]
    scaled_b = scaled(lora_b, scaling, x.dtype)  # [N, R]
    # The tail first: the wide GEMM then adds to a result that is still in the cache.
    if bias is None or output_scale is not None:
        y = tail @ scaled_b.t()
    else:
        y = torch.addmm(bias, tail, scaled_b.t())
    if weight is not None:
        y.addmm_(rows, weight.t())
    unscaled = None
    if output_scale is not None:
        unscaled = y if save_unscaled else None
        y = _scale_columns(y, output_scale, bias)
    y = like_rows_of(x, y)
    return y, h, mask, unscaled


def backward(
    dy: Tensor,  # [..., N]
    x: Tensor | None,  # [..., K], needed for the gradient of A
    weight: Tensor | None,  # [N, K]
    lora_a: Tensor,  # [R, K]
    lora_b: Tensor,  # [N, R]
    scaling: Tensor,  # []
    h: Tensor | None,  # [M, R], needed for the gradient of B
    output_scale: Tensor | None,  # [N]
    unscaled: Tensor | None,  # [M, N], needed for the gradient of output_scale
    mask: Tensor | None,  # [M, ceil(K/8)]; regenerated from the seed where it was not stored
    dropout_p: float,
    seed: Tensor | None,
    needs: tuple[bool, bool, bool, bool, bool],  # x, lora_a, lora_b, bias, output_scale
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, lora_a, lora_b, bias and output_scale; None where not needed."""
    needs_x, needs_a, needs_b, needs_bias, needs_output_scale = needs
    scaling = _host_number(scaling)
    rows_dy = dy.reshape(-1, dy.shape[-1])  # [M, N]
    num_rows, columns = rows_dy.shape[0], lora_a.shape[1]
    dx = grad_a = grad_b = grad_bias = grad_output_scale = None
    if needs_bias:
        grad_bias = rows_dy.sum(0)
    if needs_output_scale:
        grad_output_scale = _column_dot(rows_dy, unscaled).to(output_scale.dtype)
    if output_scale is not None and (needs_x or needs_a or needs_b):
        rows_dy = _scale_columns(rows_dy, output_scale, None)
    if needs_b:
        # The scaling goes to h: the product may come out rounded, and is not to be rounded twice.
        grad_b = transposed_product(rows_dy, h * scaling).to(lora_b.dtype)  # [N, R]
    if not (needs_x or needs_a):
        return dx, grad_a, grad_b, grad_bias, grad_output_scale

    # The dropout scale rides on B, so that t already carries it to both of its products.
    t = narrow_product(rows_dy, lora_b, scaling * keep_scale(dropout_p))  # [M, R]
    a = lora_a.to(dy.dtype) if needs_x else None
    if drop_threshold(dropout_p) == 0:
        if needs_x:
            dx = t.to(dy.dtype) @ a
        if needs_a:
            grad_a = transposed_product(t, x.reshape(-1, columns))
    else:
        if mask is None:
            mask = packed_keep_mask(seed, dropout_p, num_rows, columns)
        rows_x = x.reshape(-1, columns) if needs_a else None
        dx = rows_dy.new_empty((num_rows, columns)) if needs_x else None
        grad_a = t.new_zeros(lora_a.shape, dtype=accumulator_dtype(t.dtype)) if needs_a else None
        for chunk in row_chunks(num_rows, columns, dy.device):
            if needs_x:
                dx[chunk] = zero_dropped(t[chunk].to(dy.dtype) @ a, mask[chunk])
            if needs_a:
                grad_a += transposed_product(t[chunk], zero_dropped(rows_x[chunk], mask[chunk]))
    if needs_x and weight is not None:
        dx.addmm_(rows_dy, weight)
    if needs_x:
        dx = dx.view(*dy.shape[:-1], columns)
    if needs_a:
        grad_a = grad_a.to(lora_a.dtype)
    return dx, grad_a, grad_b, grad_bias, grad_output_scale


def _shrink(x: Tensor, lora_a: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    """``h = D(x) A^T`` ``[M, R]``."""
    if mask is None:
        return narrow_product(x, lora_a.t())
    h = x.new_empty((x.shape[0], lora_a.shape[0]), dtype=product_dtype(x))
    for chunk in row_chunks(*x.shape, x.device):
        kept = zero_dropped(x[chunk], mask[chunk])
        h[chunk] = narrow_product(kept, lora_a.t(), keep_scale(dropout_p))
    return h


def _host_number(scaling: Tensor) -> Tensor | float:
    """A scaling that lies on the host, as a number: one operation to multiply by, not two."""
    return scaling.item() if scaling.device.type == "cpu" else scaling


def _scale_columns(y: Tensor, output_scale: Tensor, bias: Tensor | None) -> Tensor:
    """``output_scale * y + bias`` in y's dtype, rounded once.

    The scale itself is not rounded to a half-precision dtype: its error would be the same in every
    row, and the sums over the rows in the gradients would not average it out.
    """
    accumulator = accumulator_dtype(y.dtype)
    scale = output_scale.to(accumulator)
    offset = None if bias is None else bias.to(accumulator)
    out = torch.empty_like(y)
    for chunk in row_chunks(*y.shape, y.device):
        product = y[chunk].to(accumulator) * scale
        out[chunk] = product if offset is None else product.add_(offset)
    return out


def _column_dot(left: Tensor, right: Tensor) -> Tensor:
    """The sum over rows of ``left * right``: two ``[M, N]`` to ``[N]``, in fp32 by chunks."""
    accumulator = accumulator_dtype(left.dtype)
    out = left.new_zeros(left.shape[1], dtype=accumulator)
    for chunk in row_chunks(*left.shape, left.device):
        out += (left[chunk].to(accumulator) * right[chunk]).sum(0)
    return out
