"""``lora_linear``: a frozen linear layer and its low-rank adapter in one operation."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lora_kernels.ops.linear import op, tuned
from lora_kernels.ops.linear.reference import lora_linear_reference
from lora_kernels.runtime import cpu_extension, dispatch
from lora_kernels.runtime.dropout import draw_seed, drop_threshold
from lora_kernels.runtime.dtypes import FLOATING, cast_for_autocast
from lora_kernels.runtime.eager import PLAIN
from lora_kernels.runtime.scaling import check_scaling, constant, traced
from lora_kernels.runtime.tensor_state import check_has_values, has_memory
from lora_kernels.runtime.wrappers import check_no_wrapper

__all__ = ["explain", "lora_linear"]

_autocasts = torch._C._is_any_autocast_enabled


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    bias: Tensor | None = None,
    *,
    output_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The output of a frozen linear layer with a LoRA adapter.

    .. math::
        y = c \\odot (x W^T + s \\cdot D(x) A^T B^T) + b

    with ``W = weight``, ``A = lora_a``, ``B = lora_b``, ``s = scaling``, ``b = bias``,
    ``c = output_scale`` (ones if None) and D the dropout of :mod:`lora_kernels.runtime.dropout`.
    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; c is the
    m / ||W + s B A|| of Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024.

    Args:
        x: ``[..., K]``, bf16, fp16, fp32 or fp64, any strides. ``[K]`` alone is one token.
        weight: ``[N, K]`` in x's dtype, frozen; or None for the adapter's contribution alone.
        lora_a: ``[R, K]``, any floating dtype; rounded to x's dtype where it meets x.
        lora_b: ``[N, R]``, any floating dtype. R >= 1, no other rule.
        scaling: s, a number, or a 0-d tensor on the CPU or on x's device. No gradient.
        bias: ``[N]`` in x's dtype.
        output_scale: c ``[N]``, any floating dtype.
        dropout_p: probability in [0, 1) with which an element of x is dropped, quantised to
            1/65536. Pass 0 outside training: the operation has no mode.
        seed: 0-d int64 on x's device; the mask is a function of it. None draws one from torch's
            default generator of that device.
        backend: ``auto``, ``reference``, ``composed``, ``triton`` or ``native``; see
            :func:`explain`.

    Returns:
        y ``[..., N]`` in x's dtype. Sums are accumulated in fp32 (fp64 for fp64).

    Gradients reach x, lora_a, lora_b, bias and output_scale, each computed only if needed, each in
    the dtype of its tensor. For the backward x itself, ``D(x) A^T`` ``[M, R]`` in fp32 (bf16 for
    bf16 on a CPU with ``composed``, where a product has no wider result) and, on a CPU under
    dropout, a mask of one bit per element are kept; x only where lora_a requires grad. Under
    autocast x, weight and bias are cast to autocast's dtype.

    They can be differentiated again, any number of times: with ``create_graph=True`` the backward
    is computed by torch's own differentiable operations from what was kept, whatever backend ran
    the forward (the adapter's part in fp32 for half precision). The mask and the scaling are
    constants. Where lora_a is frozen, a gradient of lora_b or output_scale that is differentiated
    with respect to x raises a RuntimeError; that of x can be differentiated all the same.
    ``torch.func`` transforms and second derivatives of compiled functions are not supported.

    Raises:
        TypeError: an argument is no tensor, or has a dtype that is not supported, or is of a class
            that stands for other tensors (DTensor, a quantised weight).
        ValueError: a shape, device or value does not fit, the named backend cannot serve, or none
            but ``reference`` can (the device is no CPU, CUDA, MPS or XPU).
        NotImplementedError: forward-mode differentiation is active.
        RuntimeError: in a second backward, if that reads an input which was not kept.
    """
    x, weight, bias = cast_for_autocast(x, weight, bias)
    at_once = op.all_run_at_once(x, weight, lora_a, lora_b, scaling, bias, output_scale)
    fitting = fits_at_once if at_once else fits
    ordinary = fitting(x, weight, lora_a, lora_b, scaling, bias, output_scale, dropout_p, seed)
    if not ordinary:
        _check(x, weight, lora_a, lora_b, scaling, bias, output_scale, dropout_p, seed)
    backend = dispatch.requested(backend)
    if forward_ad._current_level >= 0 and backend != "reference":
        raise NotImplementedError(
            "lora_linear: forward-mode differentiation (torch.func.jvp, dual tensors) is defined "
            "for backend='reference' only"
        )
    if ordinary and at_once:
        return lora_linear_unchecked(
            x, weight, lora_a, lora_b, scaling, bias, dropout_p, backend=backend
        )
    return _call(
        at_once, x, weight, lora_a, lora_b, scaling, bias, output_scale, dropout_p, seed, backend
    )


def lora_linear_unchecked(
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    *,
    backend: str = "auto",
) -> Tensor:
    """:func:`lora_linear` of arguments that :func:`fits_at_once` accepts and that all run at once,
    outside forward-mode differentiation."""
    backend = dispatch.requested(backend)
    if _autocasts():
        x, weight, bias = cast_for_autocast(x, weight, bias)
    elif x.is_cpu and dispatch.choose_on_cpu(backend, x.dtype).backend == "native":
        seed = draw_seed(x.device) if drop_threshold(dropout_p) > 0 else None
        return op.call_compiled(
            x, weight, lora_a, lora_b, constant(scaling), bias, None, dropout_p, seed, backend
        )
    return _call(True, x, weight, lora_a, lora_b, scaling, bias, None, dropout_p, None, backend)


def _call(
    at_once, x, weight, lora_a, lora_b, scaling, bias, output_scale, dropout_p, seed, backend
) -> Tensor:
    if not isinstance(scaling, Tensor):
        scaling = constant(scaling) if at_once else traced(scaling)
    if drop_threshold(dropout_p) == 0:
        seed = None
    elif seed is None:
        seed = draw_seed(x.device)
    if backend == "reference":
        return lora_linear_reference(
            x, weight, lora_a, lora_b, scaling, bias, output_scale, dropout_p, seed
        )
    if not at_once and (reason := dispatch.unserved(x.device)):
        raise ValueError(f"x: {reason}; backend='reference' runs anywhere")
    return op.call(
        at_once, x, weight, lora_a, lora_b, scaling, bias, output_scale, dropout_p, seed, backend
    )


def explain(
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor = 1.0,
    bias: Tensor | None = None,
    *,
    output_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> dispatch.Choice:
    """The backend that :func:`lora_linear` would take for this call, and why.

    Takes the same arguments (meta tensors serve too, for their shapes), launches nothing, and
    raises what the call would raise.

    Returns:
        A named tuple ``(backend, reason)``.
    """
    x, weight, bias = cast_for_autocast(x, weight, bias)
    _check(x, weight, lora_a, lora_b, scaling, bias, output_scale, dropout_p, seed)
    return tuned.explain(backend, x, weight, lora_a, lora_b, dropout_p, output_scale)


def fits_at_once(x, weight, lora_a, lora_b, scaling, bias, output_scale, dropout_p, seed) -> bool:
    """:func:`fits` for a call that nothing else has to see."""
    extension = cpu_extension.extension()
    if extension is None or not x.is_cpu:
        return (
            fits(x, weight, lora_a, lora_b, scaling, bias, output_scale, dropout_p, seed)
            and has_memory(lora_a)
            and has_memory(lora_b)
            and has_memory(x)
        )
    return (
        type(scaling) in _NUMBERS
        and type(dropout_p) in _NUMBERS
        and 0 <= dropout_p < 1
        and seed is None
        and output_scale is None
        and extension.fits(x, weight, lora_a, lora_b, bias)
        and not (weight is not None and weight.requires_grad)
    )


def fits(x, weight, lora_a, lora_b, scaling, bias, output_scale, dropout_p, seed) -> bool:
    """Whether this is the ordinary call, which :func:`_check` accepts, at half its cost.

    False says nothing: the full check decides.
    """
    if type(scaling) not in _NUMBERS or type(dropout_p) not in _NUMBERS or not 0 <= dropout_p < 1:
        return False
    if seed is not None or output_scale is not None:
        return False
    if not (_is_dense(x) and _is_dense(lora_a) and _is_dense(lora_b)):
        return False
    dtype, device, sizes = x.dtype, x.device, x.shape
    if lora_a.device != device or lora_b.device != device:
        return False
    if lora_a.ndim != 2 or lora_b.ndim != 2 or not sizes:
        return False
    (rank, in_features), (out_features, rank_of_b) = lora_a.shape, lora_b.shape
    if rank != rank_of_b or sizes[-1] != in_features or not (rank and in_features and out_features):
        return False
    if weight is not None and not (
        _is_dense(weight)
        and weight.shape == (out_features, in_features)
        and weight.dtype is dtype
        and weight.device == device
        and not weight.requires_grad
    ):
        return False
    return bias is None or (
        _is_dense(bias)
        and bias.shape == (out_features,)
        and bias.dtype is dtype
        and bias.device == device
    )


_NUMBERS = frozenset((int, float))


def _is_dense(tensor: Tensor) -> bool:
    return (
        type(tensor) in PLAIN
        and tensor.dtype in FLOATING
        and tensor.layout is torch.strided
        and not tensor.is_nested
    )


def _check(x, weight, lora_a, lora_b, scaling, bias, output_scale, dropout_p, seed) -> None:
    """Raise for the first argument that does not fit, in the words of the caller."""
    for name, tensor in (("x", x), ("lora_a", lora_a), ("lora_b", lora_b)):
        _check_floating(name, tensor)
    for name, tensor in (("weight", weight), ("bias", bias), ("output_scale", output_scale)):
        if tensor is not None:
            _check_floating(name, tensor)
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
    if weight is not None:
        _check_weight(weight, x, out_features, in_features)
    for name, vector in (("bias", bias), ("output_scale", output_scale)):
        if vector is not None and tuple(vector.shape) != (out_features,):
            raise ValueError(f"{name}: expected [{out_features}], got {list(vector.shape)}")
    if bias is not None and bias.dtype != x.dtype:
        raise TypeError(f"bias: expected x's dtype {x.dtype}, got {bias.dtype}")
    for name, tensor in (
        ("weight", weight),
        ("lora_a", lora_a),
        ("lora_b", lora_b),
        ("bias", bias),
        ("output_scale", output_scale),
    ):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected x's device {x.device}, got {tensor.device}")
    if not torch.compiler.is_compiling():
        check_has_values("lora_a", lora_a)
        check_has_values("lora_b", lora_b)
        check_has_values("x", x)
        if output_scale is not None:
            check_has_values("output_scale", output_scale)
            if bias is not None:
                check_has_values("bias", bias)
    check_scaling(scaling, "x", x)
    if isinstance(scaling, Tensor) and scaling.requires_grad:
        raise ValueError("scaling: expected a tensor without gradient, got one that requires grad")
    _check_dropout(dropout_p, seed, x)


def _check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    check_no_wrapper(name, tensor)
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{name}: expected dtype bfloat16, float16, float32 or float64, got {tensor.dtype}"
        )
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got {_kind(tensor)}")


def _kind(tensor: Tensor) -> str:
    return "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"


def _check_weight(weight: Tensor, x: Tensor, out_features: int, in_features: int) -> None:
    if tuple(weight.shape) != (out_features, in_features):
        raise ValueError(
            f"weight: expected [{out_features}, {in_features}] to match lora_b and lora_a, "
            f"got {list(weight.shape)}"
        )
    if weight.dtype != x.dtype:
        raise TypeError(f"weight: expected x's dtype {x.dtype}, got {weight.dtype}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "weight: expected a frozen tensor (requires_grad=False), got one that requires grad; "
            "lora_linear computes no gradient for the base weight"
        )


def _check_dropout(dropout_p: float, seed: Tensor | None, x: Tensor) -> None:
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
