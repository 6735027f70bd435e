"""``routed_lora`` with the compiled extension's CUDA kernels: backend ``native`` on a GPU.

Dimensions: M tokens, P pairs, K in_features, N out_features of all slices, H the widest rank.

For few tokens (:func:`cuda_extension.why_not_decode_routed` has the conditions) shrink and
expand of all slices are one launch, which adds to what the frozen layer's own GEMM has written.
Everything else, training's backward among it, is Triton's kernels. Nothing is read back here
either: a captured graph replays with any routing.
"""

import torch
from torch import Tensor

from lora_kernels.ops.routed import triton as launch
from lora_kernels.ops.routed.tensors import BankTensors, RoutingTensors
from lora_kernels.ops.routed.triton import (  # noqa: F401
    backward,
    expand_,
    expand_backward,
    shrink,
    shrink_backward,
)
from lora_kernels.runtime import cuda_extension


def forward(
    x: Tensor,  # [M, K]
    weight: Tensor | None,  # [N, K]
    bias: Tensor | None,  # [N]
    bank: BankTensors,
    routing: RoutingTensors,
    seed: Tensor | None,  # []
    save: bool,
) -> tuple[Tensor, Tensor | None, None]:
    """``(y, h, None)``; h ``[P, H]`` fp32 if ``save``."""
    if cuda_extension.why_not_decode_routed(x, bank, routing, seed is not None) is not None:
        return launch.forward(x, weight, bias, bank, routing, seed, save)
    fresh = weight is None and bias is None
    if weight is not None:
        y = torch.nn.functional.linear(x, weight, bias)
    elif bias is not None:
        y = bias.expand(x.shape[0], -1).clone()
    else:
        y = x.new_empty((x.shape[0], bank.slice_columns[-1]))
    h = None
    if save:
        h = x.new_empty((routing.tokens.shape[0], bank.width), dtype=torch.float32)
    cuda_extension.decode_routed_(y, x, bank, routing, h, overwrite=fresh)
    return y, h, None


def add_(
    out: Tensor,  # [M, N], added to
    x: Tensor,  # [M, K]
    bank: BankTensors,
    routing: RoutingTensors,
    seed: Tensor | None,
) -> None:
    """``out += `` the adapters' contribution."""
    reason = cuda_extension.why_not_decode_routed(x, bank, routing, seed is not None)
    if reason is not None or (out.stride(1) != 1 and out.shape[1] > 1):
        launch.add_(out, x, bank, routing, seed)
        return
    cuda_extension.decode_routed_(out, x, bank, routing)
