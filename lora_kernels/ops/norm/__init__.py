"""``lora_weight_norm``: the row norms of an adapted weight, which DoRA divides by."""

import torch
from torch import Tensor
from torch.compiler import is_compiling

from lora_kernels.ops.norm import composed  # noqa: F401  (registers the op)
from lora_kernels.runtime.dtypes import FLOATING
from lora_kernels.runtime.scaling import check_scaling, traced
from lora_kernels.runtime.tensor_state import check_has_values
from lora_kernels.runtime.wrappers import check_no_wrapper

__all__ = ["lora_weight_norm"]


def lora_weight_norm(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
) -> Tensor:
    """Row-wise Euclidean norm of a weight with its adapter added: ``n_i = ||(W + s B A)_i||``.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, eq. 5, where n is
    treated as a constant in the backward pass (section 4.3).

    B A is never stored, nor is W copied to another dtype: blocks of ``W + s B A`` that fit a cache
    are formed, reduced and overwritten. This takes as long as the expansion
    ``||W||^2 + 2 s sum(W A^T * B) + s^2 sum(B A A^T * B)``, which reads W and multiplies N*K*R as
    often, and it stays accurate where the three terms of the expansion cancel.

    Args:
        weight: W ``[N, K]``, bf16, fp16, fp32 or fp64, any strides (pass a transposed view for a
            weight stored ``[K, N]``).
        lora_a: A ``[R, K]``, any floating dtype.
        lora_b: B ``[N, R]``, any floating dtype.
        scaling: s, a number, or a 0-d tensor on the CPU or on weight's device.

    Returns:
        n ``[N]`` in fp32 (fp64 for an fp64 weight), without gradient. Sums are accumulated in that
        dtype, also under autocast.

    Raises:
        TypeError: an argument is no tensor, or has a dtype that is not supported, or is of a class
            that stands for other tensors (DTensor, a quantised weight).
        ValueError: a shape or a device does not fit.
    """
    _check(weight, lora_a, lora_b, scaling)
    if not isinstance(scaling, Tensor):
        scaling = traced(scaling)
    with torch.no_grad():
        return torch.ops.lora_kernels.lora_weight_norm(
            weight.detach(), lora_a.detach(), lora_b.detach(), scaling.detach()
        )


def _check(weight, lora_a, lora_b, scaling) -> None:
    for name, tensor in (("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        check_no_wrapper(name, tensor)
        if tensor.dtype not in FLOATING:
            raise TypeError(
                f"{name}: expected dtype bfloat16, float16, float32 or float64, got {tensor.dtype}"
            )
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise TypeError(f"{name}: expected a dense tensor, got a sparse or nested one")
    if weight.ndim != 2:
        raise ValueError(f"weight: expected [out_features, in_features], got {list(weight.shape)}")
    out_features, in_features = weight.shape
    if lora_a.ndim != 2 or lora_a.shape[0] < 1 or lora_a.shape[1] != in_features:
        raise ValueError(
            f"lora_a: expected [rank, {in_features}] with rank >= 1 to match weight "
            f"{list(weight.shape)}, got {list(lora_a.shape)}"
        )
    rank = lora_a.shape[0]
    if tuple(lora_b.shape) != (out_features, rank):
        raise ValueError(
            f"lora_b: expected [{out_features}, {rank}] to match weight {list(weight.shape)} and "
            f"lora_a {list(lora_a.shape)}, got {list(lora_b.shape)}"
        )
    for name, tensor in (("lora_a", lora_a), ("lora_b", lora_b)):
        if tensor.device != weight.device:
            raise ValueError(
                f"{name}: expected weight's device {weight.device}, got {tensor.device}"
            )
    if not is_compiling():
        for name, tensor in (("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b)):
            check_has_values(name, tensor)
    check_scaling(scaling, "weight", weight)
