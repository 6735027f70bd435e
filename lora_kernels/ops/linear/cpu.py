"""``lora_linear`` on the compiled CPU kernels, forward and backward: backend ``native``.

Dimensions: M tokens, K in_features, N out_features, R rank.

The base GEMM stays with the vendor's library, exactly as the frozen layer's. The adapter is one
walk of ours over the rows of x and y, and one over those of dy, x and dx: dropout, casts and the
addition into the base's result happen in registers. h and t are fp32. The base comes first and the
tail is added to it, so that the GEMM is the one the frozen layer runs.
"""

import torch
from torch import Tensor

from lora_kernels.ops.linear.composed import _column_dot, _scale_columns
from lora_kernels.runtime import cpu_extension
from lora_kernels.runtime.dropout import drop_threshold
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
    """``(y, h, mask, unscaled)`` as :func:`composed.forward`, h in fp32."""
    rows = x if x.is_contiguous() else cpu_extension.rows_of(x)  # [..., K] or [M, K]
    # Before the product, which leaves little of Python's code in the caches.
    h, mask = cpu_extension.kept_by_forward(rows, lora_a.shape[0], dropout_p)
    inner_bias = bias if output_scale is None else None
    if weight is not None:
        y = torch.nn.functional.linear(rows, weight, inner_bias)
    else:
        y = rows.new_empty((*rows.shape[:-1], lora_b.shape[0]))
        if inner_bias is not None:
            y.copy_(inner_bias)
    cpu_extension.adapter_forward(
        y, rows, lora_a, lora_b, h, mask, scaling.item(), dropout_p, seed,
        add=weight is not None or inner_bias is not None,
    )  # fmt: skip
    unscaled = None
    if output_scale is not None:
        y = y.view(-1, y.shape[-1])
        unscaled = y if save_unscaled else None
        y = _scale_columns(y, output_scale, bias)
    if y.ndim != x.ndim or y._is_view():
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
    rows_dy = dy if dy.is_contiguous() else cpu_extension.rows_of(dy)  # [..., N] or [M, N]
    dx = grad_a = grad_b = grad_bias = grad_output_scale = None
    if needs_bias or output_scale is not None:
        rows_dy = rows_dy.view(-1, rows_dy.shape[-1])
    if needs_bias:
        grad_bias = rows_dy.sum(0)
    if needs_output_scale:
        grad_output_scale = _column_dot(rows_dy, unscaled).to(output_scale.dtype)
    if not (needs_x or needs_a or needs_b):
        return dx, grad_a, grad_b, grad_bias, grad_output_scale

    if output_scale is not None:
        rows_dy = _scale_columns(rows_dy, output_scale, None)
    columns = lora_a.shape[1]
    if drop_threshold(dropout_p) == 0:
        mask = None
    elif mask is None and (needs_x or needs_a):
        mask = cpu_extension.packed_keep_mask(seed, dropout_p, dy.numel() // dy.shape[-1], columns)
    grad_a = torch.empty_like(lora_a) if needs_a else None
    grad_b = torch.empty_like(lora_b) if needs_b else None
    if needs_x and weight is not None:
        dx = torch.matmul(rows_dy, weight)
    elif needs_x:
        dx = rows_dy.new_empty((*rows_dy.shape[:-1], columns))
    cpu_extension.adapter_backward(
        dx, grad_a, grad_b, rows_dy, x if needs_a else None, lora_a, lora_b, h if needs_b else None,
        mask, scaling.item(), dropout_p, add=weight is not None,
    )  # fmt: skip
    if needs_x and dx.ndim != dy.ndim:
        dx = dx.view(*dy.shape[:-1], columns)
    return dx, grad_a, grad_b, grad_bias, grad_output_scale
