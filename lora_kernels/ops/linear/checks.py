"""What ``lora_linear`` refuses: an error names the argument, what was expected and what came."""

import torch
from torch import Tensor

from lora_kernels.adapters.factors import LoRAFactors
from lora_kernels.base_weights import BaseWeight
from lora_kernels.runtime.checks import check_floating
from lora_kernels.runtime.dropout import MaskPlace, check_place
from lora_kernels.runtime.scaling import check_scaling
from lora_kernels.runtime.tensor_state import check_has_values


def check_call(
    x: Tensor,
    base: BaseWeight | None,
    factors: LoRAFactors,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    place: MaskPlace,
) -> None:
    """Raise for the first argument that does not fit."""
    lora_a, lora_b, scaling, output_scale, rank_scale = factors
    if base is not None and not isinstance(base, BaseWeight):
        raise TypeError(f"weight: expected a tensor, got {type(base).__name__}")
    weights = () if base is None else base.tensors()
    for name, tensor in (("x", x), ("lora_a", lora_a), ("lora_b", lora_b)):
        _check_dense(name, tensor)
    if base is not None and base.format == "dense":
        _check_dense("weight", *weights)
    vectors = (("bias", bias), ("output_scale", output_scale), ("rank_scale", rank_scale))
    for name, tensor in vectors:
        if tensor is not None:
            _check_dense(name, tensor)
    if x.ndim == 0:
        raise ValueError("x: expected at least one dimension [..., in_features], got a 0-d tensor")
    if lora_a.ndim != 2 or lora_a.shape[0] < 1 or lora_a.shape[1] < 1:
        raise ValueError(
            f"lora_a: expected [rank, in_features], both at least 1, got {list(lora_a.shape)}"
        )
    rank, in_features = lora_a.shape
    if x.shape[-1] != in_features:
        raise ValueError(
            f"x: expected [..., {in_features}] to match lora_a {list(lora_a.shape)}, "
            f"got {list(x.shape)}"
        )
    if lora_b.ndim != 2 or lora_b.shape[1] != rank or lora_b.shape[0] < 1:
        raise ValueError(
            f"lora_b: expected [out_features >= 1, {rank}] to match lora_a "
            f"{list(lora_a.shape)}, got {list(lora_b.shape)}"
        )
    out_features = lora_b.shape[0]
    if base is not None:
        _check_weight(base, x, out_features, in_features)
    for (name, vector), size in zip(vectors, (out_features, out_features, rank), strict=True):
        if vector is not None and tuple(vector.shape) != (size,):
            raise ValueError(f"{name}: expected [{size}], got {list(vector.shape)}")
    if bias is not None and bias.dtype != x.dtype:
        raise TypeError(f"bias: expected x's dtype {x.dtype}, got {bias.dtype}")
    for name, tensor in (
        *(("weight", tensor) for tensor in weights),
        ("lora_a", lora_a),
        ("lora_b", lora_b),
        *vectors,
    ):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected x's device {x.device}, got {tensor.device}")
    if not torch.compiler.is_compiling():
        read = {"lora_a": lora_a, "lora_b": lora_b, "x": x, "rank_scale": rank_scale}
        read["output_scale"] = output_scale
        if output_scale is not None or base is None:  # no product reads the bias
            read["bias"] = bias
        for name, tensor in read.items():
            if tensor is not None:
                check_has_values(name, tensor)
    check_scaling(scaling, "x", x)
    if isinstance(scaling, Tensor) and scaling.requires_grad:
        raise ValueError("scaling: expected a tensor without gradient, got one that requires grad")
    check_dropout(dropout_p, seed, x)
    if place != MaskPlace():
        check_place(*place, in_features)


def _check_dense(name: str, tensor: Tensor) -> None:
    check_floating(name, tensor)
    if tensor.layout is not torch.strided or tensor.is_nested:
        came = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {came}")


def _check_weight(base: BaseWeight, x: Tensor, out_features: int, in_features: int) -> None:
    if tuple(base.shape) != (out_features, in_features):
        raise ValueError(
            f"weight: expected [{out_features}, {in_features}] to match lora_b and lora_a, "
            f"got {list(base.shape)}"
        )
    if base.dtype != x.dtype:
        raise TypeError(f"weight: expected x's dtype {x.dtype}, got {base.dtype}")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in base.tensors()):
        raise ValueError(
            "weight: expected a frozen tensor (requires_grad=False), got one that requires grad; "
            "lora_linear computes no gradient for the base weight"
        )


def check_dropout(dropout_p: float, seed: Tensor | None, x: Tensor) -> None:
    if not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p: expected a number, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
    if seed is None:
        return
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        came = seed.dtype if isinstance(seed, Tensor) else type(seed).__name__
        raise TypeError(f"seed: expected a 0-d int64 tensor, got {came}")
    if seed.ndim != 0 or seed.device != x.device:
        raise ValueError(
            f"seed: expected a 0-d tensor on x's device {x.device}, "
            f"got shape {list(seed.shape)} on {seed.device}"
        )
