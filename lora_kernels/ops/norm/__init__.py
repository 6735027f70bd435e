"""``lora_weight_norm``: the row norms of an adapted weight, which DoRA divides by."""

import torch
from torch import Tensor
from torch.compiler import is_compiling

from lora_kernels.base_weights import BaseWeight, DenseWeight
from lora_kernels.ops.norm import op  # noqa: F401  (registers the op)
from lora_kernels.runtime.checks import check_floating
from lora_kernels.runtime.scaling import as_tensor, check_scaling
from lora_kernels.runtime.tensor_state import check_has_values

__all__ = ["lora_weight_norm"]


def lora_weight_norm(
    weight: Tensor | BaseWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
) -> Tensor:
    """Row-wise Euclidean norm of a weight with its adapter added: ``n_i = ||(W + s B A)_i||``.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, eq. 5, where n is
    treated as a constant in the backward pass (section 4.3).

    B A is never stored, nor is W copied to another dtype: blocks of ``W + s B A`` that fit a cache
    are formed, reduced and overwritten. This takes as long as the expansion
    ``||W||^2 + 2 s sum(W A^T * B) + s^2 sum(B A A^T * B)``, which reads W and makes ``N K R``
    multiplications too, and it stays accurate where the three terms of the expansion cancel.

    Args:
        weight: W ``[N, K]``, bf16, fp16, fp32 or fp64, any strides (pass a transposed view for a
            weight stored ``[K, N]``), or a :class:`BaseWeight`.
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
    base = weight if isinstance(weight, BaseWeight) else DenseWeight(weight)
    _check(base, lora_a, lora_b, scaling)
    with torch.no_grad():
        return torch.ops.lora_kernels.lora_weight_norm(
            [tensor.detach() for tensor in base.tensors()], base.format, list(base.meta),
            lora_a.detach(), lora_b.detach(), as_tensor(scaling).detach(),
        )  # fmt: skip


def _check(base: BaseWeight, lora_a: Tensor, lora_b: Tensor, scaling: float | Tensor) -> None:
    weights = [("weight", tensor) for tensor in base.tensors()]
    dense = weights if base.format == "dense" else []
    for name, tensor in (*dense, ("lora_a", lora_a), ("lora_b", lora_b)):
        check_floating(name, tensor)
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise TypeError(f"{name}: expected a dense tensor, got a sparse or nested one")
    if len(base.shape) != 2:
        raise ValueError(f"weight: expected [out_features, in_features], got {list(base.shape)}")
    out_features, in_features = base.shape
    if lora_a.ndim != 2 or lora_a.shape[0] < 1 or lora_a.shape[1] != in_features:
        raise ValueError(
            f"lora_a: expected [rank, {in_features}] with rank >= 1 to match weight "
            f"{list(base.shape)}, got {list(lora_a.shape)}"
        )
    rank = lora_a.shape[0]
    if tuple(lora_b.shape) != (out_features, rank):
        raise ValueError(
            f"lora_b: expected [{out_features}, {rank}] to match weight {list(base.shape)} and "
            f"lora_a {list(lora_a.shape)}, got {list(lora_b.shape)}"
        )
    for name, tensor in (("lora_a", lora_a), ("lora_b", lora_b)):
        if tensor.device != base.device:
            raise ValueError(f"{name}: expected weight's device {base.device}, got {tensor.device}")
    if not is_compiling():
        for name, tensor in (*weights, ("lora_a", lora_a), ("lora_b", lora_b)):
            check_has_values(name, tensor)
    check_scaling(scaling, "weight", weights[0][1])
