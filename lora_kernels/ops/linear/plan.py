"""The plan of a call of ``lora_linear``: its backends and its dropout, from metadata alone."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from lora_kernels.adapters.factors import LoRAFactors
from lora_kernels.base_weights import BaseWeight, matrix_of
from lora_kernels.ops.linear import choice as choices
from lora_kernels.ops.linear import composed, cpu
from lora_kernels.ops.linear.call import Gradients, LinearBackward, LinearCall, Result
from lora_kernels.ops.linear.triton import tiles
from lora_kernels.runtime import cuda_extension, dispatch, tables
from lora_kernels.runtime.device_limits import next_power_of_two, precision
from lora_kernels.runtime.dispatch import Choice
from lora_kernels.runtime.dropout import drop_threshold
from lora_kernels.runtime.fallback import Guarded
from lora_kernels.runtime.plan import Plans, metadata_of, state_of_process

PLANS = Plans()

_NUMBERS = frozenset((int, float))


@dataclass(frozen=True, slots=True)
class LinearPlan:
    """What follows from the metadata of a call.

    Attributes:
        backend: as it was asked for, the process's default in place of ``auto``.
        choice: the forward's backend and why, as ``explain`` prints it.
        backward_choice: the backward's, where a table decides.
        forward, backward: the modules that serve.
        strided_backward: the module for a dy that is not contiguous.
        drops: whether anything is dropped.
    """

    backend: str
    choice: Choice
    backward_choice: Choice | None
    forward: Module
    backward: Module
    strided_backward: Module
    drops: bool


def key_of(
    x: Tensor,
    base: BaseWeight | None,
    factors: LoRAFactors,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
    known_as: tuple | None,
) -> tuple | None:
    """All that the full check and the choice look at, and ``known_as``, what conditions of a caller
    depend on; None where only the check can tell."""
    a, b, scaling, output_scale, rank_scale = factors
    tensors = weights = ()
    kind, number = None, type(scaling)
    if type(dropout_p) not in _NUMBERS or type(backend) is not str:
        return None
    if base is not None:
        if not isinstance(base, BaseWeight):
            return None
        kind, weights = base.format, base.tensors()
        tensors = weights
    if number not in _NUMBERS:
        if not isinstance(scaling, Tensor):
            return None
        tensors, number = (*tensors, scaling), scaling.requires_grad
    found = metadata_of(x, a, b, bias, output_scale, rank_scale, seed, *tensors)
    if found is None:
        return None
    for weight in weights:
        if weight.requires_grad and torch.is_grad_enabled():
            return None
    measured = None
    if tables.FOR_CPU or not x.is_cpu:
        rows = x.numel() // x.shape[-1]
        measured = (
            x.is_contiguous(), next_power_of_two(rows), rows < tiles.FUSED_ROWS,
            precision(x.dtype), state_of_process(),
        )  # fmt: skip
    return (
        found, number, dropout_p, kind, None if base is None else base.meta, measured, backend,
        dispatch.PROCESS_DEFAULT, known_as,
    )  # fmt: skip


def make_plan(
    backend: str, x: Tensor, base: BaseWeight | None, factors: LoRAFactors, dropout_p: float
) -> LinearPlan:
    """The plan of checked arguments; a named backend that cannot serve raises."""
    backend = dispatch.requested(backend)
    drops = drop_threshold(dropout_p) > 0
    sizes = choices.Sizes.of(base, factors.a, factors.b, drops)
    choice = choices.choose(backend, "forward", x, sizes)
    backward_choice = None
    family = choices.family_of(choice, "forward", x, sizes) if backend == "auto" else None
    forward = backward = strided = module_of(choice.backend, base, x, family)
    measurable = x.is_cuda or (x.is_cpu and tables.FOR_CPU)
    if backend == "auto" and measurable and sizes.base_format == "dense":
        # dy is not known yet: taken as contiguous, which it is in a model.
        backward_choice = choices.of_sizes("backward", x, sizes)
        family = choices.family_of(backward_choice, "backward", x, sizes)
        backward = module_of(backward_choice.backend, base, x, family)
        strided = composed if x.is_cuda else backward
    return LinearPlan(backend, choice, backward_choice, forward, backward, strided, drops)


class Module(Protocol):
    """A backend's."""

    def why_not(self, base: BaseWeight | None) -> str | None: ...
    def forward(self, call: LinearCall) -> Result: ...
    def backward(self, call: LinearBackward) -> Gradients: ...


def module_of(
    backend: str, base: BaseWeight | None, activation: Tensor, unasked: str | None = None
) -> Module:
    """The module of a backend; those that import Triton when they are first asked for.

    unasked: the family of its kernels where nobody has named the backend: composed serves once they
    cannot be started.

    Raises:
        ValueError: it cannot serve the call.
    """
    module: Module = composed
    if backend == "native" and activation.is_cpu:
        module = cpu
    elif backend in ("native", "triton"):
        name = "cuda" if backend == "native" else "triton"
        module = cast(Module, import_module(f"lora_kernels.ops.linear.{name}"))
    if reason := module.why_not(base):
        raise ValueError(f"backend={backend!r} cannot serve this call: {reason}")
    if unasked is not None and module is not composed and module is not cpu:
        return _guarded(unasked, activation.device, module)
    return module


class GuardedModule(Guarded):
    _composed = composed

    def why_not(self, base: BaseWeight | None) -> str | None:
        return self._kernels.why_not(base)

    def forward(self, call: LinearCall) -> Result:
        return self._serve("forward", call)

    def backward(self, call: LinearBackward) -> Gradients:
        return self._serve("backward", call)


@functools.cache
def _guarded(family: str, device: torch.device, kernels: Module) -> Module:
    return GuardedModule(family, device, kernels)


def explain_plan(
    plan: LinearPlan, x: Tensor, base: BaseWeight | None, factors: LoRAFactors
) -> Choice:
    """The plan's choice; the reason names the kernels, and the backward's backend where a table
    decides."""
    backend, reason = plan.choice
    if backend == "native" and x.device.type == "cuda":
        reason = f"{reason}; {_native_kernels(x, base, factors, plan.drops)}"
    if (backward := plan.backward_choice) is not None:
        reason = f"{reason}; backward {backward.backend}: {backward.reason}"
    return Choice(backend, reason)


def _native_kernels(x: Tensor, base: BaseWeight | None, factors: LoRAFactors, drops: bool) -> str:
    """Which kernels run when native serves a forward on a GPU."""
    rank, output_scale = factors.a.shape[0], factors.output_scale
    reason = cuda_extension.why_not_decode_linear(x, matrix_of(base), rank, drops, output_scale)
    if reason is None:
        return "one CUDA kernel for base and adapter"
    gemm = cuda_extension.missing_gemm_tail(x.device)
    wide = f"all kernels are Triton's ({gemm})" if gemm else "Triton's kernels around a CUDA GEMM"
    return f"not the CUDA kernel for few tokens ({reason}): {wide}"
