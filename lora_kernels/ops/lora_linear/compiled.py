"""``lora_linear`` on the compiled CPU kernels, forward and backward: backend ``native``.

Dimensions: M tokens, K in_features, N out_features, R rank.

The base GEMM stays with the vendor's library, exactly as the frozen layer's. The adapter is passes
over x, y, dy and dx in our kernels: dropout, casts and the addition into the base's result happen
in registers. h and t are fp32. The base comes first and the tail is added to it, so that the GEMM
is the one the frozen layer runs.
"""

import torch
from torch import Tensor

from lora_kernels import native
from lora_kernels.dropout import drop_threshold, keep_scale
from lora_kernels.ops.eager import like_rows_of
from lora_kernels.ops.lora_linear.composed import _column_dot, _scale_columns


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
    """``(y, h, mask, unscaled)`` as :func:`composed.forward`, h in fp32."""
    rows = native.rows_of(x)  # [M, K]
    mask, scale = None, 1.0
    if drop_threshold(dropout_p) > 0:
        mask = native.packed_keep_mask(seed, dropout_p, *rows.shape)
        scale = keep_scale(dropout_p)
    h = native.shrink(rows, lora_a, scale, mask)
    inner_bias = bias if output_scale is None else None
    if weight is not None:
        y = torch.nn.functional.linear(rows, weight, inner_bias)
    else:
        y = rows.new_empty((rows.shape[0], lora_b.shape[0]))
        if inner_bias is not None:
            y.copy_(inner_bias)
    add = weight is not None or inner_bias is not None
    native.expand_(y, h, lora_b, scaling.item(), transposed=True, add=add)
    unscaled = None
    if output_scale is not None:
        unscaled = y if save_unscaled else None
        y = _scale_columns(y, output_scale, bias)
    if x.ndim != 2:
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
    rows_dy = native.rows_of(dy)  # [M, N]
    columns, scale = lora_a.shape[1], scaling.item()
    dx = grad_a = grad_b = grad_bias = grad_output_scale = None
    if needs_bias:
        grad_bias = rows_dy.sum(0)
    if needs_output_scale:
        grad_output_scale = _column_dot(rows_dy, unscaled).to(output_scale.dtype)
    if output_scale is not None and (needs_x or needs_a or needs_b):
        rows_dy = _scale_columns(rows_dy, output_scale, None)
    # The dropout scale rides on t, to both of its products.
    t_scale = scale * keep_scale(dropout_p)
    if needs_b and (needs_x or needs_a):
        t, grad_b = native.project(rows_dy, lora_b, t_scale, h.float(), scale)
    elif needs_b:
        grad_b = native.rank_gradient(rows_dy, h.float(), lora_b, scale, transposed=True)
    elif needs_x or needs_a:
        t = native.shrink(rows_dy, lora_b, t_scale, transposed=True)  # [M, R]
    if not (needs_x or needs_a):
        return dx, grad_a, grad_b, grad_bias, grad_output_scale

    if drop_threshold(dropout_p) == 0:
        mask = None
    elif mask is None:
        mask = native.packed_keep_mask(seed, dropout_p, rows_dy.shape[0], columns)
    if needs_a:
        grad_a = native.rank_gradient(native.rows_of(x), t, lora_a, 1.0, mask)  # [R, K]
    if needs_x:
        if weight is not None:
            dx = rows_dy @ weight
        else:
            dx = rows_dy.new_empty((rows_dy.shape[0], columns))
        native.expand_(dx, t, lora_a, 1.0, mask, add=weight is not None)
        if dy.ndim != 2:
            dx = dx.view(*dy.shape[:-1], columns)
    return dx, grad_a, grad_b, grad_bias, grad_output_scale
