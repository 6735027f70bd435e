"""The backward of ``lora_linear`` in differentiable torch, for ``create_graph=True``.

Dimensions: M tokens, K in_features, N out_features, R rank.

Whatever backend ran the forward: h is computed again from x, the mask and the scaling are
constants. The base's products stay in x's dtype as the frozen layer's; the adapter's are computed
in fp32 (fp64 for fp64), so that nothing narrow is rounded between one derivative and the next.
"""

from torch import Tensor

from lora_kernels.ops.linear.call import Gradients, LinearCall
from lora_kernels.ops.narrow.second_order import drop, with_missing_edge
from lora_kernels.runtime.dropout import keep_mask, unpacked_keep_mask
from lora_kernels.runtime.dtypes import accumulator_dtype
from lora_kernels.runtime.scaling import host_number
from lora_kernels.runtime.tensor_state import check_has_values

X_WAS_NOT_SAVED = (
    "lora_linear: a gradient of lora_b or output_scale is differentiated with respect to x, which "
    "was not saved because lora_a is frozen; let lora_a require grad in the forward"
)


def differentiable_backward(call: LinearCall, edge_to_x: Tensor | None) -> Gradients:
    """The backward of a call in which x is None unless A needed a gradient in the forward.

    ``edge_to_x`` ``[0]`` is the missing edge where x needs a gradient and was not saved.
    """
    dy, x, factors, needs = call.dy, call.x, call.factors, call.needs
    h, unscaled, output_scale = call.h, call.unscaled, factors.output_scale
    for name, factor in (("lora_a", factors.a), ("lora_b", factors.b)):
        check_has_values(name, factor)  # it may have been freed since the forward
    dtype, wide = dy.dtype, accumulator_dtype(dy.dtype)
    scaling = host_number(factors.scaling)
    if isinstance(scaling, Tensor):
        scaling = scaling.to(wide)
    dy_rows = dy.reshape(-1, dy.shape[-1])  # [M, N]
    columns = factors.a.shape[1]
    # A tensor that became trainable since the forward was a constant to it.
    a = (factors.a if needs.lora_a else factors.a.detach()).to(wide)
    b = (factors.b if needs.lora_b else factors.b.detach()).to(wide)
    base = call.base
    keep, p = None, 0.0
    if call.dropout is not None and (needs.x or x is not None):
        p = call.dropout.p
        if call.mask is None:
            keep = keep_mask(
                call.dropout.seed, p, dy_rows.shape[0], columns,
                place=call.dropout.place,
            )  # fmt: skip
        else:
            keep = unpacked_keep_mask(call.mask, columns)

    dx = grad_a = grad_b = grad_bias = grad_output_scale = None
    if x is not None:
        rows = (x if needs.x else x.detach()).reshape(-1, columns)  # [M, K]
        dropped = drop(rows.to(wide), keep, p)
        h = dropped @ a.t()
    elif needs.lora_b:
        h = with_missing_edge(h.to(wide), edge_to_x)

    if needs.bias:
        grad_bias = dy_rows.sum(0)
    wide_dy = dy_rows.to(wide)
    if needs.output_scale:
        if x is not None:
            unscaled = (h @ b.t()) * scaling
            if base is not None:
                unscaled = base.matmul(rows) + unscaled
        else:
            unscaled = with_missing_edge(unscaled.to(wide), edge_to_x)
            if needs.lora_b:
                # Zero, with the derivative to B that the forward's result has lost.
                unscaled = unscaled + (h @ (b - b.detach()).t()) * scaling
        grad_output_scale = (wide_dy * unscaled).sum(0).to(output_scale.dtype)
    if output_scale is not None:
        wide_dy = wide_dy * (output_scale if needs.output_scale else output_scale.detach()).to(wide)

    if needs.lora_b:
        grad_b = ((wide_dy.t() @ h) * scaling).to(factors.b.dtype)
    if needs.x or needs.lora_a:
        t = (wide_dy @ b) * scaling  # [M, R]
    if needs.lora_a:
        grad_a = (t.t() @ dropped).to(factors.a.dtype)
    if needs.x:
        dx = drop(t @ a, keep, p)
        if base is not None:
            dx = base.matmul_t(wide_dy.to(dtype)) + dx
        dx = dx.to(dtype).reshape(*dy.shape[:-1], columns)
    return Gradients(dx, grad_a, grad_b, grad_bias, grad_output_scale)
