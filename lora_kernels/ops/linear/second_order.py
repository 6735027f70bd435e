"""The backward of ``lora_linear`` in differentiable torch, for ``create_graph=True``.

Dimensions: M tokens, K in_features, N out_features, R rank.

Whatever backend ran the forward: h is computed again from x, the mask and the scaling are
constants. The base's products stay in x's dtype as the frozen layer's; the adapter's are computed
in fp32 (fp64 for fp64), so that nothing narrow is rounded between one derivative and the next.
"""

from torch import Tensor

from lora_kernels.ops.narrow.second_order import drop, with_missing_edge
from lora_kernels.runtime.dropout import drop_threshold, keep_mask, unpacked_keep_mask
from lora_kernels.runtime.dtypes import accumulator_dtype
from lora_kernels.runtime.tensor_state import check_has_values

X_WAS_NOT_SAVED = (
    "lora_linear: a gradient of lora_b or output_scale is differentiated with respect to x, which "
    "was not saved because lora_a is frozen; let lora_a require grad in the forward"
)


def differentiable_backward(
    dy: Tensor,  # [..., N]
    x: Tensor | None,  # [..., K], saved where lora_a needed a gradient in the forward
    weight: Tensor | None,  # [N, K]
    lora_a: Tensor,  # [R, K]
    lora_b: Tensor,  # [N, R]
    scaling: Tensor,  # []
    h: Tensor | None,  # [M, R], of the forward: read where there is no x
    output_scale: Tensor | None,  # [N]
    unscaled: Tensor | None,  # [M, N], of the forward: read where there is no x
    mask: Tensor | None,  # [M, ceil(K/8)]; regenerated from the seed where it was not stored
    dropout_p: float,
    seed: Tensor | None,  # []
    needs: tuple[bool, bool, bool, bool, bool],  # x, lora_a, lora_b, bias, output_scale
    edge_to_x: Tensor | None,  # [0], the missing edge where x needs a gradient and was not saved
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, lora_a, lora_b, bias and output_scale; None where not needed."""
    needs_x, needs_a, needs_b, needs_bias, needs_output_scale = needs
    for name, factor in (("lora_a", lora_a), ("lora_b", lora_b)):
        check_has_values(name, factor)  # it may have been freed since the forward
    dtype, wide = dy.dtype, accumulator_dtype(dy.dtype)
    scaling = scaling.to(wide)  # not every device takes a number of 64 bits
    dy_rows = dy.reshape(-1, dy.shape[-1])  # [M, N]
    columns = lora_a.shape[1]
    # A tensor that became trainable since the forward was a constant to it.
    a = (lora_a if needs_a else lora_a.detach()).to(wide)
    b = (lora_b if needs_b else lora_b.detach()).to(wide)
    base = None if weight is None else weight.detach()
    keep = None
    if drop_threshold(dropout_p) > 0 and (needs_x or x is not None):
        if mask is None:
            keep = keep_mask(seed, dropout_p, dy_rows.shape[0], columns)
        else:
            keep = unpacked_keep_mask(mask, columns)

    dx = grad_a = grad_b = grad_bias = grad_output_scale = None
    if x is not None:
        rows = (x if needs_x else x.detach()).reshape(-1, columns)  # [M, K]
        dropped = drop(rows.to(wide), keep, dropout_p)
        h = dropped @ a.t()
    elif needs_b:
        h = with_missing_edge(h.to(wide), edge_to_x)

    if needs_bias:
        grad_bias = dy_rows.sum(0)
    wide_dy = dy_rows.to(wide)
    if needs_output_scale:
        if x is not None:
            unscaled = (h @ b.t()) * scaling
            if base is not None:
                unscaled = rows @ base.t() + unscaled
        else:
            unscaled = with_missing_edge(unscaled.to(wide), edge_to_x)
            if needs_b:
                # Zero, with the derivative to B that the forward's result has lost.
                unscaled = unscaled + (h @ (b - b.detach()).t()) * scaling
        grad_output_scale = (wide_dy * unscaled).sum(0).to(output_scale.dtype)
    if output_scale is not None:
        wide_dy = wide_dy * (output_scale if needs_output_scale else output_scale.detach()).to(wide)

    if needs_b:
        grad_b = ((wide_dy.t() @ h) * scaling).to(lora_b.dtype)
    if needs_x or needs_a:
        t = (wide_dy @ b) * scaling  # [M, R]
    if needs_a:
        grad_a = (t.t() @ dropped).to(lora_a.dtype)
    if needs_x:
        dx = drop(t @ a, keep, dropout_p)
        if base is not None:
            dx = wide_dy.to(dtype) @ base + dx
        dx = dx.to(dtype).reshape(*dy.shape[:-1], columns)
    return dx, grad_a, grad_b, grad_bias, grad_output_scale
