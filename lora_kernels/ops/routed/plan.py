"""The plan of a call of ``routed_lora``: what serves it, from metadata and a bank's version."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from torch import Tensor

from lora_kernels.ops.routed import composed, cpu
from lora_kernels.ops.routed.tensors import check_groups_can_be_read
from lora_kernels.runtime.dispatch import Choice


@dataclass(frozen=True, slots=True)
class RoutedPlan:
    """What follows from the metadata of a call."""

    choice: Choice  # the backend and why, as ``explain`` prints it
    # Whether the host has to know a routing's groups. On a GPU their sizes would have to be waited
    # for, and the kernels there do without.
    reads_groups: bool


def make_plan(choice: Choice, like: Tensor) -> RoutedPlan:
    return RoutedPlan(choice, reads_groups(choice.backend, like))


def reads_groups(backend: str, like: Tensor) -> bool:
    """Whether a backend loops over a routing's groups on the host."""
    return backend == "composed" or (backend == "native" and like.device.type == "cpu")


def module_of(backend: str, like: Tensor) -> ModuleType:
    """The module of a backend; those that import Triton when they are first asked for.

    Raises:
        RuntimeError: it loops over a routing's groups on the host, and a CUDA graph is captured.
            Whatever has read them: a backward or a compiled graph has those of an earlier call.
    """
    if backend == "native" and like.device.type == "cpu":
        return cpu
    if backend in ("native", "triton"):
        name = "cuda" if backend == "native" else "triton"
        return import_module(f"lora_kernels.ops.routed.{name}")
    check_groups_can_be_read(like.device)
    return composed
