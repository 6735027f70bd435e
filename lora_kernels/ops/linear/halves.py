"""The two halves of ``lora_linear``'s adapter, for layers whose base is no product with x.

Dimensions: M tokens, K in_features, N out_features, R rank.

An embedding gathers rows of A and expands them, a convolution shrinks with A as its kernel: what
lies between the halves, ``[M, R]``, is tiny. Both are differentiable, any number of times.
"""

import torch
from torch import Tensor

from lora_kernels.ops.linear.checks import check_dropout
from lora_kernels.ops.narrow.masks import masked_copy
from lora_kernels.ops.narrow.products import narrow_product, row_chunks
from lora_kernels.ops.narrow.second_order import drop
from lora_kernels.runtime.checks import check_dtype, check_floating
from lora_kernels.runtime.dropout import (
    ActiveDropout,
    MaskPlace,
    check_place,
    draw_seed,
    drop_threshold,
    unpacked_keep_mask,
)
from lora_kernels.runtime.dtypes import accumulator_dtype
from lora_kernels.runtime.eager import autocast_off


def lora_shrink(
    x: Tensor,
    lora_a: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    place: MaskPlace = MaskPlace(),
) -> Tensor:
    """``h = D(x) A^T``, the first half of an adapter.

    Args:
        x: ``[..., K]``, bf16, fp16, fp32 or fp64.
        lora_a: A ``[R, K]``, any floating dtype; rounded to x's dtype where it meets x.
        dropout_p, seed, place: of D, as for :func:`lora_linear`.

    Returns:
        h ``[..., R]`` in fp32 (fp64 for fp64). Saved for the backward are x itself, where A needs a
        gradient, and one bit an element under dropout.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    check_floating("x", x)
    check_floating("lora_a", lora_a)
    if x.ndim == 0 or lora_a.ndim != 2 or x.shape[-1] != lora_a.shape[1]:
        raise ValueError(
            f"x: expected [..., in_features] to match lora_a [rank, in_features] "
            f"{list(lora_a.shape)}, got {list(x.shape)}"
        )
    check_dropout(dropout_p, seed, x)
    check_place(*place, x.shape[-1])
    dropout = None
    if drop_threshold(dropout_p) > 0:
        dropout = ActiveDropout(dropout_p, draw_seed(x.device) if seed is None else seed, place)
    return _Shrink.apply(x, lora_a, dropout)


def lora_expand(
    h: Tensor, lora_b: Tensor, scaling: float | Tensor = 1.0, out: Tensor | None = None
) -> Tensor:
    """``out + s h B^T``, the second half of an adapter.

    Args:
        h: ``[..., R]``, any floating dtype.
        lora_b: B ``[N, R]``, any floating dtype.
        scaling: s, a number or a 0-d tensor.
        out: ``[..., N]``, what it is added to; it is not written. None is nothing.

    Returns:
        ``[..., N]`` in the widest dtype of h, B and ``out``.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    check_dtype("h", h)  # a DTensor too: the operations are torch's own
    check_dtype("lora_b", lora_b)
    if h.ndim == 0 or lora_b.ndim != 2 or h.shape[-1] != lora_b.shape[1]:
        raise ValueError(
            f"h: expected [..., rank] to match lora_b [out_features, rank] {list(lora_b.shape)}, "
            f"got {list(h.shape)}"
        )
    if isinstance(scaling, Tensor) or scaling != 1:
        h = h * scaling
    dtype = torch.promote_types(h.dtype, lora_b.dtype)
    y = h.to(dtype) @ lora_b.to(dtype).t()
    return y if out is None else out + y


class _Shrink(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, lora_a, dropout):
        rows, mask = x.reshape(-1, x.shape[-1]), None
        with autocast_off(x):
            if dropout is not None:
                rows, mask = masked_copy(rows, dropout)
            h = narrow_product(rows, lora_a.to(x.dtype).t()).to(accumulator_dtype(x.dtype))
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, lora_a, mask)
        ctx.p, ctx.dtype = 0.0 if dropout is None else dropout.p, x.dtype
        return h.view(*x.shape[:-1], lora_a.shape[0])

    @staticmethod
    def backward(ctx, t):
        x, lora_a, mask = ctx.saved_tensors
        needs_x, needs_a, _ = ctx.needs_input_grad
        rows, columns = t.reshape(-1, t.shape[-1]), lora_a.shape[1]  # [M, R]
        dx = grad_a = None
        with autocast_off(t):
            if needs_x:
                keep = None if mask is None else unpacked_keep_mask(mask, columns)
                dx = drop(rows @ lora_a.to(t.dtype), keep, ctx.p).to(ctx.dtype)
                dx = dx.view(*t.shape[:-1], columns)
            if needs_a:
                grad_a = rows.new_zeros(lora_a.shape)
                rows_x = x.reshape(-1, columns)
                for chunk in row_chunks(rows_x.shape[0], columns, x.device):
                    some = None if mask is None else unpacked_keep_mask(mask[chunk], columns)
                    dropped = drop(rows_x[chunk].to(t.dtype), some, ctx.p)
                    grad_a = grad_a + rows[chunk].t() @ dropped
                grad_a = grad_a.to(lora_a.dtype)
        return dx, grad_a, None
