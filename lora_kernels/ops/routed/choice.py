"""What ``auto`` takes for a call of ``routed_lora``, and why.

As for ``lora_linear`` (``ops/linear/choice.py``): what ``tune`` has measured on this machine, then,
on a GPU, kernels that have passed the self-test there, where they should gain most: for two
adapters and more, whose groups composed walks through on the host, and in a CUDA graph, which that
walk cannot be part of. Composed else.
"""

from __future__ import annotations

import torch
from torch.compiler import is_compiling

from lora_kernels.ops.routed.cells import TableCell
from lora_kernels.runtime import dispatch, tables, verdicts
from lora_kernels.runtime.device_limits import limits_of, precision
from lora_kernels.runtime.dispatch import Choice
from lora_kernels.runtime.plan import remembered

# What a backend is called in a call where nobody has named it: composed serves once its kernels
# cannot be started.
UNASKED = "?"


def named(backend: str) -> str:
    """A call's backend, whoever has chosen it."""
    return backend.removesuffix(UNASKED)


def choose(
    backend: str, device: torch.device, cell: TableCell, *, is_captured: bool = False
) -> Choice:
    """The backend of a call, and why; a named one that cannot serve raises."""
    if device.type == "cpu" and not is_compiling():
        tables.all_of(device)  # keys of plans ask whether there are any
    if dispatch.requested(backend) != "auto" or device.type not in ("cpu", "cuda"):
        return dispatch.choose(backend, device, cell.dtype)
    if is_compiling():  # a graph is for more calls than this one: no table is read
        if device.type == "cpu":
            return dispatch.choose("auto", device, cell.dtype)
        return _in_a_graph(device, cell.dtype, cell.adapters)
    if device.type == "cpu":
        return _on_a_cpu(device, cell.key, cell.dtype)
    products = precision(cell.dtype)
    return _on_a_gpu(device, cell.key, cell.dtype, cell.adapters, is_captured, products)


def _in_a_graph(device: torch.device, dtype: torch.dtype, adapters: int) -> Choice:
    return _unmeasured(device, "a compiled graph", dtype, adapters, False, precision(dtype))


# A tracer takes the answer for a constant, and follows no files.
_in_a_graph._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@remembered
def _on_a_cpu(device: torch.device, key: str, dtype: torch.dtype) -> Choice:
    measured = _measured(device, key, dtype)
    return dispatch.choose("auto", device, dtype) if measured is None else measured


@remembered
def _on_a_gpu(
    device: torch.device,
    key: str,
    dtype: torch.dtype,
    adapters: int,
    is_captured: bool,
    products: str,  # "tf32" or "ieee"
) -> Choice:
    # fp32 is measured as torch computes it unless it is told to use TF32.
    measured = _measured(device, key, dtype) if products == "ieee" else None
    if measured is not None and (measured.backend != "composed" or not is_captured):
        return measured
    return _unmeasured(device, key, dtype, adapters, is_captured, products)


def _unmeasured(
    device: torch.device,
    key: str,
    dtype: torch.dtype,
    adapters: int,
    is_captured: bool,
    products: str,
) -> Choice:
    name = limits_of(device).name
    if not is_captured and adapters < 2:
        return Choice("composed", f"for one adapter, as nothing is measured of {name} in {key}")
    where = "in a CUDA graph" if is_captured else f"with {adapters} adapters"
    if dtype == torch.float32 and products == "ieee" and not is_captured:
        return Choice("composed", f"fp32 without TF32 is left to the vendor's GEMMs {where}")
    reason = dispatch.unavailable("triton", device, dtype)
    reason = reason or verdicts.why_not_proven("routed/triton", device, dtype)
    if reason is not None:
        return Choice("composed", f"{where} triton is preferred, but {reason}")
    return Choice("triton", f"preferred {where}; proven by the self-test on {name}, not measured")


def _measured(device: torch.device, key: str, dtype: torch.dtype) -> Choice | None:
    cell = tables.cells_of("routed_lora", device).get(key)
    if cell is None or dispatch.unavailable(cell["backend"], device, dtype):
        return None
    kernels_of_a_gpu = device.type == "cuda" and cell["backend"] != "composed"
    if kernels_of_a_gpu and verdicts.broken(f"routed/{cell['backend']}", device):
        return None
    seconds = cell.get("seconds", {})
    times = ", ".join(f"{name} {took * 1e3:.3f} ms" for name, took in seconds.items())
    return Choice(cell["backend"], f"taken by tune on this machine in {key}: {times or 'no times'}")
