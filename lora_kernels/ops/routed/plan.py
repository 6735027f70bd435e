"""The plan of a call of ``routed_lora``: what serves it, from metadata and a bank's version."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from lora_kernels.ops.routed import composed, cpu
from lora_kernels.ops.routed.call import (
    ExpandBackward,
    ExpandCall,
    ForwardCall,
    Gradients,
    LoRABackward,
    Result,
    RoutedCall,
    ShrinkBackward,
)
from lora_kernels.ops.routed.choice import UNASKED, named
from lora_kernels.ops.routed.tensors import check_groups_can_be_read, groups_of
from lora_kernels.runtime.dispatch import Choice
from lora_kernels.runtime.fallback import Guarded


@dataclass(frozen=True, slots=True)
class RoutedPlan:
    """What follows from the metadata of a call."""

    choice: Choice  # the backend and why, as ``explain`` prints it
    backend: str  # of the call: the choice's, marked where nobody has named it
    # Whether the host has to know a routing's groups. On a GPU their sizes would have to be waited
    # for, and the kernels there do without.
    reads_groups: bool


def make_plan(choice: Choice, like: Tensor, *, unasked: bool) -> RoutedPlan:
    backend = choice.backend
    if unasked and backend in ("triton", "native") and like.device.type == "cuda":
        backend += UNASKED
    return RoutedPlan(choice, backend, reads_groups(backend, like))


def reads_groups(backend: str, like: Tensor) -> bool:
    """Whether a backend loops over a routing's groups on the host."""
    return backend == "composed" or (backend == "native" and like.device.type == "cpu")


class Module(Protocol):
    """A backend's."""

    def forward(self, call: ForwardCall) -> Result: ...
    def backward(self, call: LoRABackward) -> Gradients: ...
    def shrink(self, call: ForwardCall) -> tuple[Tensor, Tensor | None]: ...
    def shrink_backward(self, call: ShrinkBackward) -> Gradients: ...
    def expand_(self, call: ExpandCall, out: Tensor) -> None: ...
    def expand_backward(self, call: ExpandBackward) -> Gradients: ...


def module_of(backend: str, like: Tensor) -> Module:
    """The module of a backend; those that import Triton when they are first asked for.

    Raises:
        RuntimeError: it loops over a routing's groups on the host, and a CUDA graph is captured.
            Whatever has read them: a backward or a compiled graph has those of an earlier call.
    """
    if backend == "native" and like.device.type == "cpu":
        return cpu
    if backend == "composed":
        check_groups_can_be_read(like.device)
        return composed
    name = "cuda" if named(backend) == "native" else "triton"
    module = cast(Module, import_module(f"lora_kernels.ops.routed.{name}"))
    if backend.endswith(UNASKED):
        return _guarded(f"routed/{named(backend)}", like.device, module)
    return module


class GuardedModule(Guarded):
    _composed = composed

    def forward(self, call: ForwardCall) -> Result:
        y, h, mask = self._serve("forward", call)
        return Result(y, None if h is None else h.float(), mask)

    def backward(self, call: LoRABackward) -> Gradients:
        return self._serve("backward", call)

    def shrink(self, call: ForwardCall) -> tuple[Tensor, Tensor | None]:
        h, mask = self._serve("shrink", call)
        return h.float(), mask

    def shrink_backward(self, call: ShrinkBackward) -> Gradients:
        return self._serve("shrink_backward", call)

    def expand_(self, call: ExpandCall, out: Tensor) -> None:
        self._serve("expand_", call, out)

    def expand_backward(self, call: ExpandBackward) -> Gradients:
        return self._serve("expand_backward", call)

    def _for_composed(self, call: RoutedCall) -> RoutedCall:
        check_groups_can_be_read(self._device)
        routing = call.routing
        call.routing = routing._replace(plan=groups_of(routing.offsets, routing.tokens))
        return call


@functools.cache
def _guarded(family: str, device: torch.device, kernels: Module) -> Module:
    return GuardedModule(family, device, kernels)
