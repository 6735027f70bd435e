"""torch.library registration of ``lora_linear`` and its autograd.Function.

Three ops: ``lora_linear`` is what a graph sees without gradients; with gradients its Autograd
kernel runs ``lora_linear_forward``, which also returns what the backward needs, and later
``lora_linear_backward``. The registration by ``define`` and ``impl`` with the Function as the
Autograd kernel costs a fraction of ``torch.library.custom_op`` per call.

Optional results of the ops are empty tensors of shape ``[0]`` where they do not exist. A call that
nothing else has to see goes past the ops to the same kernels, with None in their place.
"""

import math
from types import ModuleType

import torch
from torch import Tensor

from lora_kernels.ops.linear import composed, cpu, tuned
from lora_kernels.ops.linear.second_order import X_WAS_NOT_SAVED, differentiable_backward
from lora_kernels.ops.narrow.products import product_dtype
from lora_kernels.ops.narrow.second_order import missing_edge
from lora_kernels.runtime import dispatch
from lora_kernels.runtime.dropout import GROUP, drop_threshold
from lora_kernels.runtime.eager import PLAIN, requires_grad, runs_at_once
from lora_kernels.runtime.tensor_state import check_has_values, name_unsaved

_library = torch.library.Library("lora_kernels", "FRAGMENT")

_OPERANDS = (
    "Tensor x, Tensor? weight, Tensor lora_a, Tensor lora_b, Tensor scaling, Tensor? bias, "
    "Tensor? output_scale, float dropout_p, Tensor? seed"
)
_library.define(f"lora_linear({_OPERANDS}, str backend) -> Tensor")
_library.define(
    f"lora_linear_forward({_OPERANDS}, bool save_unscaled, str backend)"
    " -> (Tensor y, Tensor h, Tensor mask, Tensor unscaled)"
)
_library.define(
    "lora_linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor lora_a, Tensor lora_b, "
    "Tensor scaling, Tensor? h, Tensor? output_scale, Tensor? unscaled, Tensor mask, "
    "float dropout_p, Tensor? seed, bool[5] needs, str backend)"
    " -> (Tensor dx, Tensor grad_a, Tensor grad_b, Tensor grad_bias, Tensor grad_output_scale)"
)

_OP = torch.ops.lora_kernels.lora_linear.default
_FORWARD = torch.ops.lora_kernels.lora_linear_forward.default
_BACKWARD = torch.ops.lora_kernels.lora_linear_backward.default

_autocasts = torch._C._is_any_autocast_enabled
_is_functorch_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor


def stores_mask(device: torch.device, dropout_p: float, backend: str) -> bool:
    """Whether the forward hands its packed keep-mask to the backward.

    On a CPU regenerating the mask costs more than K/8 bytes a row. Elsewhere it is regenerated.
    Known from the arguments alone, so that fake tensors agree.
    """
    return drop_threshold(dropout_p) > 0 and device.type in ("cpu", "meta") and backend != "triton"


def _dtype_of_h(x: Tensor, backend: str) -> torch.dtype:
    """Known from x's device and dtype, as the choice between native and composed is.

    On a GPU it is the same whatever serves the call.
    """
    native = x.device.type == "cpu" and dispatch.choose(backend, x.device, x.dtype)[0] == "native"
    return torch.float32 if native or backend == "triton" else product_dtype(x)


def _implementation(backend: str, direction: str, *call) -> ModuleType:
    """The module that serves one direction of the call; raises if a named backend cannot.

    Chosen when the op runs, not when a graph is traced, so that it adds no guards.
    """
    chosen = tuned.choose(backend, direction, *call).backend
    if chosen not in ("triton", "native"):
        return composed
    if chosen == "native" and call[0].is_cpu:
        return cpu
    # Not at the top: importing the package does not import Triton.
    from lora_kernels.ops.linear import cuda
    from lora_kernels.ops.linear.triton import launch

    return cuda if chosen == "native" else launch


# --- kernels ---------------------------------------------------------------------------------


def _without_autocast(function):
    """The ops do their own casts; autocast must not add any below them."""

    def kernel(*args):
        if not _autocasts() and not args[0].is_mps:  # torch leaves MPS out
            return function(*args)
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*args)

    return kernel


# Gradients are off here, or nobody needs them: this only saves every operation the time to see so.
# The few operations of the compiled kernels do not repay it.
_below_autograd = torch._C._AutoDispatchBelowAutograd


@_without_autocast
def _forward(x, weight, a, b, scaling, bias, output_scale, dropout_p, seed, save_unscaled, backend):
    """``(y, h, mask or None, unscaled or None)``."""
    implementation = _implementation(backend, "forward", x, weight, a, b, dropout_p)
    call = x, weight, a, b, scaling, bias, output_scale, dropout_p, seed, save_unscaled
    if implementation is cpu:
        y, h, mask, unscaled = cpu.forward(*call)
    else:
        with _below_autograd():
            y, h, mask, unscaled = implementation.forward(*call)
    # What is left of stores_mask where there is a mask.
    return y, h, mask if x.is_cpu else None, unscaled


@_without_autocast
def _backward(
    dy, x, weight, a, b, scaling, h, output_scale, unscaled, mask, dropout_p, seed, needs, backend
):
    """The five gradients, None where not needed; a mask that is None or empty was not stored."""
    implementation = _implementation(backend, "backward", dy, weight, a, b, dropout_p)
    if mask is not None and mask.numel() == 0:
        mask = None
    call = dy, x, weight, a, b, scaling, h, output_scale, unscaled, mask, dropout_p, seed, needs
    if implementation is cpu:
        return cpu.backward(*call)
    for name, factor in (("lora_a", a), ("lora_b", b)):
        check_has_values(name, factor)  # it may have been freed since the forward
    with _below_autograd():
        return implementation.backward(*call)


_differentiable_backward = _without_autocast(differentiable_backward)


def _inference_kernel(x, weight, a, b, scaling, bias, output_scale, dropout_p, seed, backend):
    y, _, _, _ = _forward(
        x, weight, a, b, scaling, bias, output_scale, dropout_p, seed, False, backend
    )
    return y


def _forward_kernel(x, *args):
    y, h, mask, unscaled = _forward(x, *args)
    return (
        y,
        h,
        x.new_empty(0, dtype=torch.uint8) if mask is None else mask,
        x.new_empty(0) if unscaled is None else unscaled,
    )


def _backward_kernel(dy, *args):
    *operands, needs, backend = args
    grads = _backward(dy, *operands, tuple(needs), backend)
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
def _(x, weight, a, b, scaling, bias, output_scale, dropout_p, seed, backend):
    return x.new_empty((*x.shape[:-1], b.shape[0]))


@torch.library.register_fake("lora_kernels::lora_linear_forward", lib=_library)
def _(x, weight, a, b, scaling, bias, output_scale, dropout_p, seed, save_unscaled, backend):
    rows, (rank, columns) = math.prod(x.shape[:-1]), a.shape
    return (
        x.new_empty((*x.shape[:-1], b.shape[0])),
        x.new_empty((rows, rank), dtype=_dtype_of_h(x, backend)),
        x.new_empty(
            (rows, -(-columns // GROUP)) if stores_mask(x.device, dropout_p, backend) else 0,
            dtype=torch.uint8,
        ),
        x.new_empty((rows, b.shape[0]) if save_unscaled else 0),
    )


@torch.library.register_fake("lora_kernels::lora_linear_backward", lib=_library)
def _(
    dy, x, weight, a, b, scaling, h, output_scale, unscaled, mask, dropout_p, seed, needs, backend
):
    needs_x, needs_a, needs_b, needs_bias, needs_output_scale = needs
    return (
        dy.new_empty((*dy.shape[:-1], a.shape[1]) if needs_x else 0),
        a.new_empty(a.shape) if needs_a else dy.new_empty(0),
        b.new_empty(b.shape) if needs_b else dy.new_empty(0),
        dy.new_empty(dy.shape[-1] if needs_bias else 0),
        output_scale.new_empty(output_scale.shape) if needs_output_scale else dy.new_empty(0),
    )


# --- autograd --------------------------------------------------------------------------------


def _keep(
    ctx, x, weight, a, b, scaling, h, output_scale, unscaled, mask, dropout_p, seed, backend
) -> None:
    """What :func:`_gradients` reads, x and h each only if the gradient that reads it is needed."""
    needs = ctx.needs_input_grad
    ctx.save_for_backward(
        x if needs[2] else None,
        weight,
        a,
        b,
        scaling,
        h if needs[3] else None,
        output_scale,
        unscaled,
        # As many tensors whichever way the call took: checkpointing counts them.
        mask if mask is not None and mask.numel() else None,
        seed,
    )
    ctx.dropout_p, ctx.backend = dropout_p, backend
    if needs[0] and not needs[2] and (needs[3] or needs[6]):
        # Their gradients read x by way of h and of the result, which are constants once saved.
        ctx.edge_to_x = missing_edge(x, X_WAS_NOT_SAVED)


class LoRALinearFunction(torch.autograd.Function):
    """Saves the caller's x and h, each only if the gradient that reads it is needed."""

    @staticmethod
    def forward(
        ctx, x, weight, a, b, scaling, bias, output_scale, dropout_p, seed, backend, at_once
    ):
        needs_output_scale = ctx.needs_input_grad[6]
        forward = _forward if at_once else _FORWARD
        y, h, mask, unscaled = forward(
            x, weight, a, b, scaling, bias, output_scale, dropout_p, seed, needs_output_scale,
            backend,
        )  # fmt: skip
        unscaled = unscaled if needs_output_scale else None
        _keep(
            ctx, x, weight, a, b, scaling, h, output_scale, unscaled, mask, dropout_p, seed, backend
        )
        return y

    @staticmethod
    def backward(ctx, dy):
        return _gradients(ctx, dy)


def _gradients(ctx, dy):
    x, weight, a, b, scaling, h, output_scale, unscaled, mask, seed = ctx.saved_tensors
    needs_x, _, needs_a, needs_b, _, needs_bias, needs_output_scale = ctx.needs_input_grad[:7]
    needs = needs_x, needs_a, needs_b, needs_bias, needs_output_scale
    if torch.is_grad_enabled():  # create_graph
        grads = _differentiable_backward(
            dy, x, weight, a, b, scaling, h, output_scale, unscaled, mask, ctx.dropout_p, seed,
            needs, getattr(ctx, "edge_to_x", None),
        )  # fmt: skip
    elif runs_at_once(dy) and not _is_legacy_batched(dy):  # is_grads_batched
        grads = _backward(
            dy, x, weight, a, b, scaling, h, output_scale, unscaled, mask, ctx.dropout_p, seed,
            needs, ctx.backend,
        )  # fmt: skip
    else:
        grads = _BACKWARD(
            dy, x, weight, a, b, scaling, h, output_scale, unscaled,
            dy.new_empty(0, dtype=torch.uint8) if mask is None else mask, ctx.dropout_p, seed,
            needs, ctx.backend,
        )  # fmt: skip
        grads = [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]
    dx, grad_a, grad_b, grad_bias, grad_output_scale = grads
    return dx, None, grad_a, grad_b, None, grad_bias, grad_output_scale, None, None, None, None


class _CompiledFunction(LoRALinearFunction):
    """The same for a call on a CPU without output_scale that the compiled kernels serve, outside
    autocast: nothing is left to choose."""

    @staticmethod
    def forward(ctx, x, weight, a, b, scaling, bias, output_scale, dropout_p, seed, backend):
        y, h, mask, _ = cpu.forward(x, weight, a, b, scaling, bias, None, dropout_p, seed, False)
        _keep(ctx, x, weight, a, b, scaling, h, None, None, mask, dropout_p, seed, backend)
        return y

    @staticmethod
    def backward(ctx, dy):
        if (
            torch.is_grad_enabled()
            or _autocasts()
            or not runs_at_once(dy)
            or _is_legacy_batched(dy)
        ):
            # Not the other's backward: torch.compile would take a call of that for one of its own.
            return _gradients(ctx, dy)[:-1]
        x, weight, a, b, scaling, h, _, _, mask, seed = ctx.saved_tensors
        needs_x, _, needs_a, needs_b, _, needs_bias, *_ = ctx.needs_input_grad
        dx, grad_a, grad_b, grad_bias, _ = cpu.backward(
            dy, x, weight, a, b, scaling, h, None, None, mask, ctx.dropout_p, seed,
            (needs_x, needs_a, needs_b, needs_bias, False),
        )  # fmt: skip
        return dx, None, grad_a, grad_b, None, grad_bias, None, None, None, None


# LoRALinearFunction.apply without what it does for torch.func, which takes half of its time.
_apply_at_once = super(torch.autograd.Function, LoRALinearFunction).apply
_apply_compiled = super(torch.autograd.Function, _CompiledFunction).apply


def _autograd(*args):
    if requires_grad(args):
        return LoRALinearFunction.apply(*args, False)
    with torch._C._AutoDispatchBelowAutograd():
        return _OP(*args)


def all_run_at_once(x, weight, a, b, scaling, bias, output_scale) -> bool:
    """Whether nothing else has to see a call with these arguments."""
    return (
        runs_at_once(x)
        and not torch._C._are_functorch_transforms_active()
        # DTensor and its like: the dispatcher knows, or says that nobody does.
        and type(weight) in _PLAIN
        and type(a) in _PLAIN
        and type(b) in _PLAIN
        and type(scaling) in _PLAIN
        and type(bias) in _PLAIN
        and type(output_scale) in _PLAIN
    )


_PLAIN = PLAIN | {type(None), int, float}


def call(at_once: bool, *args) -> Tensor:
    """The op, or past it what its kernels do, where :func:`all_run_at_once`."""
    if not at_once or _outlived_a_transform(args):
        return _OP(*args)
    if not requires_grad(args):
        return _inference_kernel(*args)
    try:
        return _apply_at_once(*args, True)
    except RuntimeError as error:
        _name_unsaved(error, *args)
        raise


def call_compiled(x, weight, a, b, scaling, bias, *others) -> Tensor:
    """:func:`call` where nothing else has to see it and the compiled kernels serve it on a CPU,
    without output_scale and outside autocast."""
    if torch.is_grad_enabled() and (
        a.requires_grad
        or b.requires_grad
        or x.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        try:
            return _apply_compiled(x, weight, a, b, scaling, bias, *others)
        except RuntimeError as error:
            _name_unsaved(error, x, weight, a, b, scaling, bias, *others)
            raise
    _, dropout_p, seed, _ = others
    return cpu.forward(x, weight, a, b, scaling, bias, None, dropout_p, seed, False)[0]


def _name_unsaved(error, x, weight, a, b, scaling, bias, output_scale, dropout_p, seed, backend):
    name_unsaved(
        error, x=x, weight=weight, lora_a=a, lora_b=b, output_scale=output_scale, seed=seed
    )


def _outlived_a_transform(args) -> bool:
    """Whether a tensor is still wrapped for a torch.func transform that has returned."""
    for arg in args:  # noqa: SIM110, a generator would take twice as long
        if type(arg) is Tensor and _is_functorch_wrapped(arg):
            return True
    return False


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
