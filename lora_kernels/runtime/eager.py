"""What the operations' registrations share: eager calls without the dispatcher's cost."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

# By their own names: a look-up through torch's modules costs as much as the call.
_is_tracing = torch._C._is_tracing
_transforms = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_autocasts = torch._C._is_any_autocast_enabled
_unsafe_view = torch.ops.aten._unsafe_view.default

# What has no dispatch of its own; DTensor and its like are subclasses.
PLAIN = frozenset((Tensor, torch.nn.Parameter))


def is_plain_eager(x: Tensor) -> bool:
    """Whether nothing records or replaces operations, so that a kernel can be called straight.

    A call through the dispatcher boxes a dozen arguments twice, which costs as much as a narrow
    GEMM of a small layer. Graphs, fake tensors, transforms, forward-mode differentiation and
    dispatch modes need to see the op; and torch's lazily negated or zero tensors the dispatcher,
    which turns them into values.
    """
    return (
        not is_compiling()
        and not _is_tracing()
        and type(x) in PLAIN
        and (x.is_cpu or x.is_cuda)
        and _dispatch_modes() == 0
        and not _transforms()
        and forward_ad._current_level < 0
        and not (x.is_neg() or x._is_zerotensor())
    )


def eager_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without what it does for torch.func, which takes half of its time."""
    # torch's stubs do not have the apply of C++ that Function's own calls.
    return super(torch.autograd.Function, function).apply  # pyright: ignore[reportAttributeAccessIssue]


def requires_grad(arguments) -> bool:
    if torch.is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.requires_grad:
                return True
    return False


def restore_leading_dims(y: Tensor, x: Tensor) -> Tensor:
    """``[M, D]`` as ``[..., D]``, with x's leading dimensions.

    Not a view to autograd: the caller may change it in place.
    """
    if x.ndim == 2 and not y._is_view():
        return y
    return _unsafe_view(y, (*x.shape[:-1], y.shape[-1]))


def below_autograd(function):
    """Let a backend run below autograd, which else looks at each of its operations."""

    @functools.wraps(function)
    def run(call):
        with torch._C._AutoDispatchBelowAutograd():
            return function(call)

    return run


_NOTHING = nullcontext()


def autocast_off(like: Tensor):
    """A context in which autocast adds no casts on like's device."""
    # torch's question about all devices leaves MPS out.
    if not _autocasts() and not like.is_mps:
        return _NOTHING
    return torch.autocast(like.device.type, enabled=False)


def without_autocast(function):
    """Let an op's kernel run without autocast's casts: it does its own."""

    @functools.wraps(function)
    def run(*arguments):
        with autocast_off(arguments[0]):
            return function(*arguments)

    return run
