"""``lora_linear``: a frozen linear layer and its low-rank adapter in one operation."""

from typing import overload

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from lora_kernels.adapters.factors import LoRAFactors
from lora_kernels.base_weights import BaseWeight, DenseWeight, base_of
from lora_kernels.ops.linear import op
from lora_kernels.ops.linear.call import LinearCall
from lora_kernels.ops.linear.checks import check_call
from lora_kernels.ops.linear.plan import PLANS, explain_plan, key_of, make_plan
from lora_kernels.ops.linear.reference import reference
from lora_kernels.runtime import dispatch
from lora_kernels.runtime.dropout import ActiveDropout, MaskPlace, draw_seed, drop_threshold
from lora_kernels.runtime.dtypes import autocast_dtype
from lora_kernels.runtime.eager import PLAIN, is_plain_eager

__all__ = ["adapted_linear", "explain", "lora_linear"]

_autocasts = torch._C._is_any_autocast_enabled
_WHOLE = MaskPlace()
_NO_TENSORS = frozenset((type(None), int, float))


def lora_linear(
    x: Tensor,
    weight: Tensor | BaseWeight | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    bias: Tensor | None = None,
    *,
    output_scale: Tensor | None = None,
    rank_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    row_offset: int = 0,
    column_offset: int = 0,
    pitch: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """The output of a frozen linear layer with a LoRA adapter.

    .. math::
        y = c \\odot (x W^T + s \\cdot D(x) A^T \\mathrm{diag}(r) B^T) + b

    with ``W = weight``, ``A = lora_a``, ``B = lora_b``, ``s = scaling``, ``b = bias``,
    ``c = output_scale``, ``r = rank_scale`` (ones if None) and D the dropout of
    :mod:`lora_kernels.runtime.dropout`.
    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; c is the
    m / ||W + s B A|| of Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024.

    Args:
        x: ``[..., K]``, bf16, fp16, fp32 or fp64, any strides. ``[K]`` alone is one token.
        weight: ``[N, K]`` in x's dtype, frozen, a tensor or a :class:`BaseWeight`; or None for the
            adapter's contribution alone.
        lora_a: ``[R, K]``, any floating dtype; rounded to x's dtype where it meets x.
        lora_b: ``[N, R]``, any floating dtype. R >= 1, no other rule.
        scaling: s, a number, or a 0-d tensor on the CPU or on x's device. No gradient.
        bias: ``[N]`` in x's dtype.
        output_scale: c ``[N]``, any floating dtype.
        rank_scale: r ``[R]``, any floating dtype; multiplied into lora_b before anything else.
        dropout_p: probability in [0, 1) with which an element of x is dropped, quantised to
            1/65536. Pass 0 outside training: the operation has no mode.
        seed: 0-d int64 on x's device; the mask is a function of it. None draws one from torch's
            default generator of that device.
        row_offset, column_offset, pitch: where x stands in a whole activation of ``pitch``
            columns (None: x is as wide), which says what mask it draws: that part of the whole
            one's. column_offset is a multiple of 8.
        backend: ``auto``, ``reference``, ``composed``, ``triton`` or ``native``; see
            :func:`explain`.

    Returns:
        y ``[..., N]`` in x's dtype. Sums are accumulated in fp32 (fp64 for fp64).

    Gradients reach x, lora_a, lora_b, bias, output_scale and rank_scale, each computed only if
    needed, each in the dtype of its tensor. For the backward x itself, ``D(x) A^T`` ``[M, R]`` in
    fp32 (``composed`` keeps bf16 where the device multiplies bf16 itself) and, under
    dropout, a mask of one bit per element (on a CUDA device with ``composed`` alone) are kept; x
    only where lora_a requires grad. Under autocast x, weight and bias are cast to autocast's dtype.

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
    place = _WHOLE
    if row_offset != 0 or column_offset != 0 or pitch is not None:
        place = MaskPlace(row_offset, column_offset, pitch)
    base = DenseWeight(weight) if isinstance(weight, Tensor) else weight
    factors = LoRAFactors(lora_a, lora_b, scaling, output_scale, rank_scale)
    return adapted_linear(x, base, factors, bias, dropout_p, seed, place, backend)


@overload
def adapted_linear(
    x: Tensor,
    base: BaseWeight | None,
    factors: LoRAFactors,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    place: MaskPlace = _WHOLE,
    backend: str = "auto",
) -> Tensor: ...
@overload
def adapted_linear(
    x: Tensor,
    base: BaseWeight | None,
    factors: LoRAFactors,
    bias: Tensor | None,
    dropout_p: float,
    *,
    known_as: tuple | None,
    backend: str = "auto",
) -> Tensor | None: ...
def adapted_linear(
    x: Tensor,
    base: BaseWeight | None,
    factors: LoRAFactors,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    place: MaskPlace = _WHOLE,
    backend: str = "auto",
    known_as: tuple | None = None,
) -> Tensor | None:
    """:func:`lora_linear` of the frozen weight and the adapter as values.

    ``known_as`` is what conditions of the caller depend on. With it the function serves only calls
    that :func:`remember` has been told of, and none under autocast: it returns None for others.
    """
    if _autocasts():
        if known_as is not None:
            return None
        x, base, bias = _as_under_autocast(x, base, bias)
    plan = key = None
    if is_plain_eager(x) and place is _WHOLE:
        key = key_of(x, base, factors, bias, dropout_p, seed, backend, known_as)
        plan = PLANS.get(key)
    if plan is None:
        if known_as is not None:
            return None
        return _first_call(key, x, base, factors, bias, dropout_p, seed, place, backend)
    dropout = None
    if plan.drops:
        dropout = ActiveDropout(dropout_p, draw_seed(x.device) if seed is None else seed)
    return op.run(LinearCall(x, base, factors, bias, dropout), plan)


def remember(x, base, factors, bias, dropout_p, known_as: tuple, backend: str = "auto") -> None:
    """Let :func:`adapted_linear`, which has served this call, serve its like with ``known_as``."""
    plan = PLANS.get(key_of(x, base, factors, bias, dropout_p, None, backend, None))
    if plan is not None:
        PLANS.keep(key_of(x, base, factors, bias, dropout_p, None, backend, known_as), plan)


def _first_call(key, x, base, factors, bias, dropout_p, seed, place, backend) -> Tensor:
    """A call that no plan is known for: checked, and planned or handed to the op."""
    x, base, bias = _as_under_autocast(x, base, bias)  # where torch's question left it out
    check_call(x, base, factors, bias, dropout_p, seed, place)
    backend = dispatch.requested(backend)
    if forward_ad._current_level >= 0 and backend != "reference":
        raise NotImplementedError(
            "lora_linear: forward-mode differentiation (torch.func.jvp, dual tensors) is defined "
            "for backend='reference' only"
        )
    dropout = None
    if drop_threshold(dropout_p) > 0:
        dropout = ActiveDropout(dropout_p, draw_seed(x.device) if seed is None else seed, place)
    call = LinearCall(x, base, factors, bias, dropout)
    if backend == "reference":
        return reference(call)
    if _is_for_us_alone(call):
        return op.run(call, PLANS.keep(key, make_plan(backend, x, base, factors, dropout_p)))
    if reason := dispatch.unserved(x.device):
        raise ValueError(f"x: {reason}; backend='reference' runs anywhere")
    return op.through_the_op(call, backend)


def _as_under_autocast(
    x: Tensor, base: BaseWeight | None, bias: Tensor | None
) -> tuple[Tensor, BaseWeight | None, Tensor | None]:
    dtype = autocast_dtype(x)
    if dtype is None:
        return x, base, bias
    base = base.to(dtype) if isinstance(base, BaseWeight) else base
    return x.to(dtype), base, bias.to(dtype) if isinstance(bias, Tensor) else bias


def _is_for_us_alone(call: LinearCall) -> bool:
    """Whether nothing else has to see the call."""
    dropout, base = call.dropout, call.base
    tensors = [call.x, call.bias, *call.factors]
    tensors += () if base is None else base.tensors()
    tensors += () if dropout is None else (dropout.seed,)
    return is_plain_eager(call.x) and all(map(_is_plain, tensors))


def _is_plain(argument: Tensor | float | None) -> bool:
    """False for DTensor and its like, which the dispatcher knows, or says that nobody does, and for
    a tensor that has outlived its transform."""
    if isinstance(argument, Tensor):
        return type(argument) in PLAIN and not is_functorch_wrapped_tensor(argument)
    return type(argument) in _NO_TENSORS


def explain(
    x: Tensor,
    weight: Tensor | BaseWeight | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor = 1.0,
    bias: Tensor | None = None,
    *,
    output_scale: Tensor | None = None,
    rank_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    row_offset: int = 0,
    column_offset: int = 0,
    pitch: int | None = None,
    backend: str = "auto",
) -> dispatch.Choice:
    """The backend that :func:`lora_linear` would take for this call, and why.

    Takes the same arguments (meta tensors serve too, for their shapes), launches nothing, and
    raises what the call would raise.

    Args:
        x, weight, lora_a, lora_b, scaling, bias, output_scale, rank_scale, dropout_p, seed,
            row_offset, column_offset, pitch, backend: as for :func:`lora_linear`.

    Returns:
        A named tuple ``(backend, reason)``.

    Raises:
        TypeError, ValueError: as :func:`lora_linear`.
    """
    x, base, bias = _as_under_autocast(x, base_of(weight), bias)
    factors = LoRAFactors(lora_a, lora_b, scaling, output_scale, rank_scale)
    place = MaskPlace(row_offset, column_offset, pitch)
    check_call(x, base, factors, bias, dropout_p, seed, place)
    plan = make_plan(backend, x, base, factors, dropout_p)
    return explain_plan(plan, x, base, factors)
