"""What a kernel engineer writes first: LoRA as one autograd.Function on torch's own operations.

Dimensions: M tokens, K in_features, N out_features, R rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class HandwrittenLoRA(torch.autograd.Function):
    """``x W^T + s D(x) A^T B^T`` in x's dtype, the mask kept as bytes."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,  # [M, K]
        weight: Tensor,  # [N, K]
        lora_a: Tensor,  # [R, K]
        lora_b: Tensor,  # [N, R]
        scaling: float,
        dropout_p: float,
    ) -> Tensor:  # [M, N]
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        dropped, mask = torch.native_dropout(x, dropout_p, True) if dropout_p else (x, None)
        h = dropped @ a.t()
        y = F.linear(x, weight)
        y.addmm_(h, b.t(), alpha=scaling)
        ctx.save_for_backward(x, weight, lora_a, lora_b, h, mask)
        ctx.scaling, ctx.keep_scale = scaling, 1 / (1 - dropout_p)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):  # [M, N]
        x, weight, lora_a, lora_b, h, mask = ctx.saved_tensors
        scaling, keep_scale = ctx.scaling, ctx.keep_scale
        a, b = lora_a.to(dy.dtype), lora_b.to(dy.dtype)
        t = dy @ b
        dx = dy @ weight
        if mask is None:
            dx.addmm_(t, a, alpha=scaling)
        else:
            masked = torch.ops.aten.native_dropout_backward
            dx += masked(t @ a, mask, scaling * keep_scale)
            x = masked(x, mask, keep_scale)
        grad_a, grad_b = (t.t() @ x) * scaling, (dy.t() @ h) * scaling
        return dx, None, grad_a.to(lora_a.dtype), grad_b.to(lora_b.dtype), None, None
