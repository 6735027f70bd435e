"""What ``auto`` takes for a call of ``lora_linear``: the fastest of its measured cell.

A cell of ``tuned/<gpu>/lora_linear.json`` (see :mod:`tiles`) that was measured carries, beside tile
options, the fastest backend and the times it was chosen by::

    {"backend": "triton", "strategy": "fused",
     "seconds": {"composed": 4.1e-4, "hybrid": 4.0e-4, "fused": 3.7e-4}}

The backend may be ``native``; where its CUDA kernels were not built, the fastest of the others
serves. Forward and backward are cells of their own and may differ: what one saves, every other
reads. The lookup happens when the op runs, never while a graph is traced, so it adds no guards; it
reads sizes and strides, never the device.
"""

import functools
import math

import torch
from torch import Tensor

from lora_kernels.ops.linear.triton import tiles
from lora_kernels.runtime import cuda_extension, dispatch
from lora_kernels.runtime.device_limits import limits_of
from lora_kernels.runtime.dispatch import Choice
from lora_kernels.runtime.dropout import drop_threshold


def choose(
    backend: str,
    direction: str,
    activation: Tensor,  # [..., K] of x, or [..., N] of dy
    weight: Tensor | None,  # [N, K]
    lora_a: Tensor,  # [R, K]
    lora_b: Tensor,  # [N, R]
    dropout_p: float,
) -> Choice:
    """The backend of one direction of one call, and why; a named one that cannot serve raises."""
    if not activation.is_cuda or dispatch.requested(backend) != "auto":
        return dispatch.choose(backend, activation.device, activation.dtype)
    if weight is None:
        return Choice("composed", "only calls with a base weight have been measured")
    if not activation.is_contiguous():
        return Choice("composed", "only contiguous activations have been measured")
    return _of_sizes(direction, activation, lora_a, lora_b, dropout_p)


def explain(
    backend: str,
    x: Tensor,  # [..., K]
    weight: Tensor | None,  # [N, K]
    lora_a: Tensor,  # [R, K]
    lora_b: Tensor,  # [N, R]
    dropout_p: float,
    output_scale: Tensor | None,  # [N]
) -> Choice:
    """The forward's choice; where a table decides, the reason names the backward's too."""
    forward = choose(backend, "forward", x, weight, lora_a, lora_b, dropout_p)
    if forward.backend == "native" and x.device.type == "cuda":
        kernels = _native_kernels(x, weight, lora_a.shape[0], dropout_p, output_scale)
        forward = Choice("native", f"{forward.reason}; {kernels}")
    if dispatch.requested(backend) != "auto" or x.device.type != "cuda" or weight is None:
        return forward
    # dy is not known yet: taken as contiguous, which it is in a model.
    backward = _of_sizes("backward", x, lora_a, lora_b, dropout_p)
    return Choice(
        forward.backend, f"{forward.reason}; backward {backward.backend}: {backward.reason}"
    )


def _native_kernels(
    x: Tensor, weight: Tensor | None, rank: int, dropout_p: float, output_scale: Tensor | None
) -> str:
    """Which kernels run when native serves a forward on a GPU."""
    drops = drop_threshold(dropout_p) > 0
    reason = cuda_extension.unfit_for_decode_linear(x, weight, rank, drops, output_scale)
    if reason is None:
        return "one CUDA kernel for base and adapter"
    gemm = cuda_extension.missing_gemm_tail(x.device)
    wide = f"all kernels are Triton's ({gemm})" if gemm else "Triton's kernels around a CUDA GEMM"
    return f"not the CUDA kernel for few tokens ({reason}): {wide}"


def _of_sizes(
    direction: str, activation: Tensor, lora_a: Tensor, lora_b: Tensor, dropout_p: float
) -> Choice:
    lookup = _lookup.__wrapped__ if tiles.cells_are_replaced() else _lookup
    return lookup(
        direction,
        activation.device,
        activation.dtype,
        math.prod(activation.shape[:-1]),
        lora_a.shape[1],
        lora_b.shape[0],
        lora_a.shape[0],
        drop_threshold(dropout_p) > 0,
    )


@functools.lru_cache(maxsize=4096)
def _lookup(
    direction: str,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    in_features: int,
    out_features: int,
    rank: int,
    dropout: bool,
) -> Choice:
    if dtype.itemsize != 2:
        return Choice("composed", "only half precision has been measured")
    limits = limits_of(device)
    cell = tiles.Cell(
        direction=direction,
        dtype=str(dtype).removeprefix("torch."),
        itemsize=dtype.itemsize,
        tokens=tokens,
        in_features=in_features,
        out_features=out_features,
        rank=rank,
        dropout=dropout,
        ieee=False,
    )
    found = tiles.tuned(cell, limits)
    if "backend" not in found:
        return Choice(
            "composed",
            f"nothing is recorded for {cell.key} on {limits.name}, and a kernel that nobody "
            "measured there is not taken unasked (`python -m lora_kernels tune` measures it)",
        )
    seconds = found.get("seconds", {})
    times = ", ".join(f"{name} {took * 1e3:.3f} ms" for name, took in seconds.items())
    where = f"measured on {limits.name} in {cell.key}: {times or 'no times'}"
    fastest = found["backend"]
    reason = dispatch.unavailable(fastest, device, dtype)
    if reason is None:
        return Choice(fastest, f"{_named(fastest, cell, limits)} was the fastest {where}")
    for name in sorted(seconds, key=seconds.get):
        backend = "triton" if name in tiles.STRATEGIES else name
        if dispatch.unavailable(backend, device, dtype) is None:
            named = _named(backend, cell, limits)
            return Choice(backend, f"{named} was the fastest {where}, but for {fastest}: {reason}")
    return Choice("composed", reason)


def _named(backend: str, cell: tiles.Cell, limits: tiles.DeviceLimits) -> str:
    return f"triton ({tiles.strategy(cell, limits)})" if backend == "triton" else backend
