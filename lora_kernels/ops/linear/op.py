"""torch.library registration of ``lora_linear`` and its autograd.Function.

Three ops: ``lora_linear`` is what a graph sees without gradients; with gradients its Autograd
kernel runs ``lora_linear_forward``, which also returns what the backward needs, and later
``lora_linear_backward``. The registration by ``define`` and ``impl`` with the Function as the
Autograd kernel costs a fraction of ``torch.library.custom_op`` per call.

The base weight crosses an op as its tensors, the name of its format and integers; no tensors are no
weight. Optional results of the ops are empty tensors of shape ``[0]`` where they do not exist. A
call that nothing else has to see goes past the ops to the backends that its plan names.
"""

import functools
import math

import torch
from torch import Tensor
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch._C._functorch import is_legacy_batchedtensor
from torch.compiler import is_compiling
from torch.utils import checkpoint

from lora_kernels.adapters.factors import LoRAFactors
from lora_kernels.base_weights import rebuild
from lora_kernels.ops.linear import choice as choices
from lora_kernels.ops.linear import cpu
from lora_kernels.ops.linear.call import Gradients, LinearBackward, LinearCall, Needs, Result
from lora_kernels.ops.linear.plan import LinearPlan, module_of
from lora_kernels.ops.linear.second_order import (
    X_WAS_NOT_SAVED,
    check_factors_have_values,
    differentiable_backward,
)
from lora_kernels.ops.narrow.masks import draw_mask
from lora_kernels.ops.narrow.products import product_dtype
from lora_kernels.ops.narrow.second_order import missing_edge
from lora_kernels.runtime import dispatch
from lora_kernels.runtime.dropout import GROUP, ActiveDropout, MaskPlace, drop_threshold
from lora_kernels.runtime.eager import (
    autocast_off,
    eager_apply,
    is_plain_eager,
    requires_grad,
    without_autocast,
)
from lora_kernels.runtime.scaling import as_tensor, constant
from lora_kernels.runtime.tensor_state import name_unsaved

_library = torch.library.Library("lora_kernels", "FRAGMENT")

_BASE = "Tensor[] base, str base_format, SymInt[] base_meta"
_PLACE = "SymInt row_offset, SymInt column_offset, SymInt pitch"
_OPERANDS = (
    f"Tensor x, {_BASE}, Tensor lora_a, Tensor lora_b, Tensor scaling, Tensor? bias, "
    f"Tensor? output_scale, float dropout_p, Tensor? seed, {_PLACE}"
)
_library.define(f"lora_linear({_OPERANDS}, str backend) -> Tensor")
_library.define(
    f"lora_linear_forward({_OPERANDS}, bool save_unscaled, str backend)"
    " -> (Tensor y, Tensor h, Tensor mask, Tensor unscaled)"
)
_library.define(
    f"lora_linear_backward(Tensor dy, Tensor? x, {_BASE}, Tensor lora_a, Tensor lora_b, "
    "Tensor scaling, Tensor? h, Tensor? output_scale, Tensor? unscaled, Tensor mask, "
    f"float dropout_p, Tensor? seed, {_PLACE}, bool[5] needs, str backend)"
    " -> (Tensor dx, Tensor grad_a, Tensor grad_b, Tensor grad_bias, Tensor grad_output_scale)"
)

_OP = torch.ops.lora_kernels.lora_linear.default
_FORWARD = torch.ops.lora_kernels.lora_linear_forward.default
_BACKWARD = torch.ops.lora_kernels.lora_linear_backward.default

_autocasts = torch._C._is_any_autocast_enabled


def stores_mask(device: torch.device, drops: bool, backend: str) -> bool:
    """Whether the forward hands its packed keep-mask to the backward; else it is drawn again.

    Known from the arguments alone, so that fake tensors agree.
    """
    return drops and backend != "triton" and (device.type != "cuda" or backend != "native")


def _dtype_of_h(x: Tensor, backend: str) -> torch.dtype:
    """The dtype of the op's h. It follows from x's device and dtype, as the choice between native
    and composed does; on a GPU it is composed's, whatever serves the call."""
    if backend not in ("triton", "native") and x.device.type == "cpu":
        backend = dispatch.choose(backend, x.device, x.dtype).backend
    return torch.float32 if backend in ("triton", "native") else product_dtype(x)


# --- kernels ---------------------------------------------------------------------------------


def _call_of(x, base, base_format, base_meta, a, b, scaling, bias, output_scale, *others):
    return LinearCall(
        x=x,
        base=rebuild(base, base_format, base_meta),
        factors=LoRAFactors(a, b, scaling, output_scale),
        bias=bias,
        dropout=_active_dropout(*others),
    )


def _active_dropout(p, seed, *place) -> ActiveDropout | None:
    return ActiveDropout(p, seed, MaskPlace(*place)) if drop_threshold(p) > 0 else None


def _module(direction: str, activation: Tensor, call: LinearCall | LinearBackward, backend: str):
    """Chosen when the op runs, not when a graph is traced, so that it adds no guards."""
    factors = call.factors
    sizes = choices.Sizes.of(call.base, factors.a, factors.b, call.dropout is not None)
    choice = choices.choose(backend, direction, activation, sizes)
    family = None
    if dispatch.requested(backend) == "auto":
        family = choices.family_of(choice, direction, activation, sizes)
    return module_of(choice.backend, call.base, activation, family)


def _forward(call: LinearCall, backend: str) -> Result:
    return _module("forward", call.x, call, backend).forward(call)


@without_autocast
def _inference_kernel(*arguments):
    *operands, backend = arguments
    return _forward(_call_of(*operands), backend).y


@without_autocast
def _forward_kernel(x, *arguments):
    *operands, save_unscaled, backend = arguments
    call = _call_of(x, *operands)
    call.save_unscaled = save_unscaled
    y, h, mask, unscaled, _ = _forward(call, backend)
    assert h is not None, "a call of the op saves"
    if call.dropout is None or not stores_mask(x.device, True, backend):
        mask = None
    elif mask is None:  # a kernel served that keeps none
        mask = draw_mask(x.numel() // x.shape[-1], x.shape[-1], call.dropout)
    return (
        y,
        h.to(_dtype_of_h(x, backend)),
        x.new_empty(0, dtype=torch.uint8) if mask is None else mask,
        x.new_empty(0) if unscaled is None else unscaled,
    )


@without_autocast
def _backward_kernel(dy, x, base, base_format, base_meta, a, b, scaling, h, output_scale, *rest):
    unscaled, mask, *dropout, needs, backend = rest
    needs = Needs(*needs)
    call = LinearBackward(
        dy,
        rebuild(base, base_format, base_meta),
        LoRAFactors(a, b, scaling, output_scale),
        _active_dropout(*dropout),
        needs,
        x if needs.lora_a else None,
        h if needs.lora_b else None,
        unscaled if needs.output_scale else None,
        mask if mask.numel() else None,
    )
    check_factors_have_values(call.factors)
    grads = _module("backward", dy, call, backend).backward(call)
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


_KERNELS = {
    "lora_linear": _inference_kernel,
    "lora_linear_forward": _forward_kernel,
    "lora_linear_backward": _backward_kernel,
}
for _name, _kernel in _KERNELS.items():
    for _key in dispatch.DISPATCH_KEYS.values():
        _library.impl(_name, _kernel, _key)


# --- shapes ----------------------------------------------------------------------------------


@torch.library.register_fake("lora_kernels::lora_linear", lib=_library)
def _(x, _base, _format, _meta, _a, b, *_):
    return x.new_empty((*x.shape[:-1], b.shape[0]))


@torch.library.register_fake("lora_kernels::lora_linear_forward", lib=_library)
def _(x, _base, _format, _meta, a, b, _scaling, _bias, _output_scale, dropout_p, *rest):
    *_, save_unscaled, backend = rest
    rows, (rank, columns) = math.prod(x.shape[:-1]), a.shape
    stored = stores_mask(x.device, drop_threshold(dropout_p) > 0, backend)
    return (
        x.new_empty((*x.shape[:-1], b.shape[0])),
        x.new_empty((rows, rank), dtype=_dtype_of_h(x, backend)),
        x.new_empty((rows, -(-columns // GROUP)) if stored else 0, dtype=torch.uint8),
        x.new_empty((rows, b.shape[0]) if save_unscaled else 0),
    )


@torch.library.register_fake("lora_kernels::lora_linear_backward", lib=_library)
def _(dy, _x, _base, _format, _meta, a, b, _scaling, _h, output_scale, *rest):
    *_, needs, _backend = rest
    needs = Needs(*needs)
    return (
        dy.new_empty((*dy.shape[:-1], a.shape[1]) if needs.x else 0),
        a.new_empty(a.shape) if needs.lora_a else dy.new_empty(0),
        b.new_empty(b.shape) if needs.lora_b else dy.new_empty(0),
        dy.new_empty(dy.shape[-1] if needs.bias else 0),
        output_scale.new_empty(output_scale.shape) if needs.output_scale else dy.new_empty(0),
    )


# --- vmap ------------------------------------------------------------------------------------


def _one_by_one(info, in_dims, *arguments):
    """As torch's own fallback does, which takes no list of tensors."""

    def of(argument, dim, index: int):
        if isinstance(dim, (list, tuple)):
            return [of(*each, index) for each in zip(argument, dim, strict=True)]
        return argument if dim is None else argument.select(dim, index)

    pairs = list(zip(arguments, in_dims, strict=True))
    found = [_OP(*(of(*each, index) for each in pairs)) for index in range(info.batch_size)]
    return torch.stack(found), 0


torch.library.register_vmap("lora_kernels::lora_linear", _one_by_one, lib=_library)


# --- autograd --------------------------------------------------------------------------------


class LoRALinearFunction(torch.autograd.Function):
    """Saves the caller's x and h, each only if the gradient that reads it is needed.

    The tensors beside ``call`` are those of it that may need a gradient. Without a plan the forward
    goes through the op.
    """

    @staticmethod
    def forward(ctx, x, a, b, bias, output_scale, call):
        needs_x, needs_a, needs_b, _, needs_output_scale, _ = ctx.needs_input_grad
        plan = call.plan
        call.save_unscaled = needs_output_scale
        rounded_a = rounded_b = None
        if plan is None:
            y, h, mask, unscaled = _FORWARD(*_operands(call), needs_output_scale, call.backend)
            unscaled = unscaled if needs_output_scale else None
        else:
            y, h, mask, unscaled, (rounded_a, rounded_b) = plan.forward.forward(call)
            hooks = _top_saved_tensors_default_hooks(False)
            if hooks and getattr(hooks[0], "__module__", "") == checkpoint.__name__:
                # What the op would save: checkpointing compares the two, and may take each once.
                h, rounded_a, rounded_b = h.to(_dtype_of_h(x, call.backend)), None, None
        base, dropout = call.base, call.dropout
        scaling, kind, meta, weights = call.factors.scaling, None, (), ()
        if base is not None:
            kind, meta, weights = type(base), base.meta, base.tensors()
        number = None if isinstance(scaling, Tensor) else scaling
        # As many tensors whichever way the call took: checkpointing counts them. All that the
        # backward reads is among them: hooks may put other tensors in their place.
        ctx.save_for_backward(
            x if needs_a else None,
            h if needs_b else None,
            unscaled,
            mask if mask is not None and mask.numel() else None,
            None if dropout is None else dropout.seed,
            a,
            b,
            scaling if number is None else constant(number),
            output_scale,
            rounded_a if needs_x else None,
            rounded_b if needs_x or needs_a else None,
            *weights,
        )
        drawn = None if dropout is None else (dropout.p, dropout.place)
        ctx.kept = number, kind, meta, drawn, plan, call.backend
        if needs_x and not needs_a and (needs_b or needs_output_scale):
            # Their gradients read x by way of h and of the result, which are constants once saved.
            ctx.edge_to_x = missing_edge(x, X_WAS_NOT_SAVED)
        return y

    @staticmethod
    def backward(ctx, dy):
        return *_gradients(ctx, dy), None


@functools.cache
def _needs_of(needs_input_grad: tuple[bool, ...]) -> Needs:
    return Needs(*needs_input_grad[:5])


def _gradients(ctx, dy: Tensor) -> Gradients:
    x, h, unscaled, mask, seed, a, b, scaling, output_scale, *others = ctx.saved_tensors
    rounded_a, rounded_b, *weights = others
    number, kind, meta, drawn, plan, backend = ctx.kept
    factors = LoRAFactors(a, b, scaling if number is None else number, output_scale)
    dropout = None if drawn is None else ActiveDropout(drawn[0], seed, drawn[1])
    needs = _needs_of(ctx.needs_input_grad)
    # By torch's operations with create_graph, and for many at once (is_grads_batched): no rule of
    # vmap takes an op with a list of tensors.
    differentiated = torch.is_grad_enabled() or (not is_compiling() and is_legacy_batchedtensor(dy))
    if differentiated:
        weights = [weight.detach() for weight in weights]
    base = None if kind is None else kind(*weights, *meta)
    rounded = rounded_a, rounded_b
    call = LinearBackward(dy, base, factors, dropout, needs, x, h, unscaled, mask, rounded)
    if differentiated:
        with autocast_off(dy):
            return differentiable_backward(call, getattr(ctx, "edge_to_x", None))
    if plan is None or not is_plain_eager(dy):
        return _gradients_of_op(call, backend)
    # The forward may have saved more than this backward is asked for.
    call.x = x if needs.lora_a else None
    call.h = h if needs.lora_b else None
    call.unscaled = unscaled if needs.output_scale else None
    module = plan.backward if dy.is_cpu or dy.is_contiguous() else plan.strided_backward
    if module is not cpu:  # whose kernels look themselves
        check_factors_have_values(factors)
    if not _autocasts():
        return module.backward(call)
    with autocast_off(dy):
        return module.backward(call)


def _gradients_of_op(call: LinearBackward, backend: str) -> Gradients:
    factors, dy = call.factors, call.dy
    grads = _BACKWARD(
        dy, call.x, *_base_of(call), factors.a, factors.b, as_tensor(factors.scaling), call.h,
        factors.output_scale, call.unscaled,
        dy.new_empty(0, dtype=torch.uint8) if call.mask is None else call.mask,
        *_dropout_of(call), call.needs, backend,
    )  # fmt: skip
    return Gradients(
        *(grad if needed else None for grad, needed in zip(grads, call.needs, strict=True))
    )


def _base_of(call: LinearCall | LinearBackward) -> tuple[list[Tensor], str, list[int]]:
    base = call.base
    return ([], "", []) if base is None else (list(base.tensors()), base.format, list(base.meta))


def _dropout_of(call: LinearCall | LinearBackward) -> tuple:
    if call.dropout is None:
        return 0.0, None, 0, 0, call.factors.a.shape[1]
    dropout, (row_offset, column_offset, pitch) = call.dropout, call.dropout.place
    pitch = call.factors.a.shape[1] if pitch is None else pitch
    return dropout.p, dropout.seed, row_offset, column_offset, pitch


def _operands(call: LinearCall) -> tuple:
    factors = call.factors
    return (
        call.x, *_base_of(call), factors.a, factors.b, as_tensor(factors.scaling), call.bias,
        factors.output_scale, *_dropout_of(call),
    )  # fmt: skip


_apply_eagerly = eager_apply(LoRALinearFunction)


def _autograd(*arguments):
    *operands, backend = arguments
    call = _call_of(*operands)
    if requires_grad(operands):
        call.backend = backend
        factors = call.factors
        return LoRALinearFunction.apply(
            call.x, factors.a, factors.b, call.bias, factors.output_scale, call
        )
    with torch._C._AutoDispatchBelowAutograd():
        return _OP(*arguments)


def through_the_op(call: LinearCall, backend: str) -> Tensor:
    """A call that something else has to see: a subclass, a transform, a tracer."""
    call.factors = call.factors.without_rank_scale()
    return _OP(*_operands(call), backend)


def run(call: LinearCall, plan: LinearPlan) -> Tensor:
    """A call that nothing else has to see."""
    if _autocasts() and torch.is_autocast_enabled(call.x.device.type):
        with autocast_off(call.x):
            return run(call, plan)
    call.plan, call.backend = plan, plan.backend
    if call.factors.rank_scale is not None:
        call.factors = call.factors.without_rank_scale()
    x, bias, (a, b, _, output_scale, _) = call.x, call.bias, call.factors
    if torch.is_grad_enabled() and (
        a.requires_grad
        or b.requires_grad
        or x.requires_grad
        or (bias is not None and bias.requires_grad)
        or (output_scale is not None and output_scale.requires_grad)
    ):
        try:
            return _apply_eagerly(x, a, b, bias, output_scale, call)
        except RuntimeError as error:
            weight = None if call.base is None else call.base.tensors()[0]
            seed = None if call.dropout is None else call.dropout.seed
            others = {"output_scale": output_scale, "seed": seed}
            name_unsaved(error, x=x, weight=weight, lora_a=a, lora_b=b, **others)
            raise
    call.save = False
    return plan.forward.forward(call).y


def _refuse_gradients(op, name: str):
    def kernel(*args):
        if requires_grad(args):
            raise RuntimeError(f"{name} is not differentiable; lora_linear is, any number of times")
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return kernel


_library.impl("lora_linear", _autograd, "Autograd")
_library.impl("lora_linear_forward", _refuse_gradients(_FORWARD, "lora_linear_forward"), "Autograd")
_library.impl(
    "lora_linear_backward", _refuse_gradients(_BACKWARD, "lora_linear_backward"), "Autograd"
)
