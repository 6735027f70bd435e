"""The backward of ``lora_linear`` in differentiable torch, for ``create_graph=True``.

Dimensions: M tokens, K in_features, N out_features, R rank.

Whatever backend ran the forward: h is computed again from x, the mask and the scaling are
constants. The base's products stay in x's dtype as the frozen layer's; the adapter's are computed
in fp32 (fp64 for fp64), so that nothing narrow is rounded between one derivative and the next.
"""

from torch import Tensor

from lora_kernels.adapters.factors import LoRAFactors
from lora_kernels.ops.linear.call import Gradients, LinearBackward
from lora_kernels.ops.narrow.second_order import drop, with_missing_edge
from lora_kernels.runtime.dropout import keep_mask, unpacked_keep_mask
from lora_kernels.runtime.dtypes import accumulator_dtype
from lora_kernels.runtime.scaling import host_number
from lora_kernels.runtime.tensor_state import check_has_values

X_WAS_NOT_SAVED = (
    "lora_linear: a gradient of lora_b or output_scale is differentiated with respect to x, which "
    "was not saved because lora_a is frozen; let lora_a require grad in the forward"
)


def check_factors_have_values(factors: LoRAFactors) -> None:
    """Raise for a factor that was freed since the forward."""
    for name, factor in (("lora_a", factors.a), ("lora_b", factors.b)):
        check_has_values(name, factor)


def differentiable_backward(call: LinearBackward, edge_to_x: Tensor | None) -> Gradients:
    """The backward of a call in which x, h and unscaled are what the forward has saved.

    ``edge_to_x`` ``[0]`` is the missing edge where x needs a gradient and was not saved.
    """
    dy, x, factors, needs = call.dy, call.x, call.factors, call.needs
    h, unscaled, output_scale = call.h, call.unscaled, factors.output_scale
    check_factors_have_values(factors)
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
            seed, place = call.dropout.seed, call.dropout.place
            keep = keep_mask(seed, p, dy_rows.shape[0], columns, place=place)
        else:
            keep = unpacked_keep_mask(call.mask, columns)

    dx = grad_a = grad_b = grad_bias = grad_output_scale = dropped = None
    if x is not None:
        rows = (x if needs.x else x.detach()).reshape(-1, columns)  # [M, K]
        dropped = drop(rows.to(wide), keep, p)
        h = dropped @ a.t()
        if needs.output_scale:
            unscaled = (h @ b.t()) * scaling
            if base is not None:
                unscaled = base.matmul(rows) + unscaled
    else:
        if h is not None and needs.lora_b:
            h = with_missing_edge(h.to(wide), edge_to_x)
        if unscaled is not None and needs.output_scale:
            unscaled = with_missing_edge(unscaled.to(wide), edge_to_x)
            if h is not None and needs.lora_b:
                # Zero, with the derivative to B that the forward's result has lost.
                unscaled = unscaled + (h @ (b - b.detach()).t()) * scaling

    if needs.bias:
        grad_bias = dy_rows.sum(0)
    wide_dy = dy_rows.to(wide)
    if output_scale is not None:
        if unscaled is not None and needs.output_scale:
            grad_output_scale = (wide_dy * unscaled).sum(0).to(output_scale.dtype)
        wide_dy = wide_dy * (output_scale if needs.output_scale else output_scale.detach()).to(wide)

    if h is not None and needs.lora_b:
        grad_b = ((wide_dy.t() @ h) * scaling).to(factors.b.dtype)
    t = (wide_dy @ b) * scaling if needs.x or needs.lora_a else None  # [M, R]
    if t is not None and dropped is not None and needs.lora_a:
        grad_a = (t.t() @ dropped).to(factors.a.dtype)
    if t is not None and needs.x:
        dx = drop(t @ a, keep, p)
        if base is not None:
            dx = base.matmul_t(wide_dy.to(dtype)) + dx
        dx = dx.to(dtype).reshape(*dy.shape[:-1], columns)
    return Gradients(dx, grad_a, grad_b, grad_bias, grad_output_scale)
