"""What ``auto`` takes for a call of ``lora_linear``: the fastest of its measured cell.

A cell of ``tuned/<gpu>/lora_linear.json`` (see :mod:`triton.tiles`) that was measured carries,
beside tile options, the fastest backend and the times it was chosen by::

    {"backend": "triton", "strategy": "fused",
     "seconds": {"composed": 4.1e-4, "hybrid": 4.0e-4, "fused": 3.7e-4}}

The backend may be ``native``; where its CUDA kernels were not built, the fastest of the others
serves. Forward and backward are cells of their own and may differ: what one saves, every other
reads. It reads sizes and strides, never the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.base_weights import BaseWeight
from lora_kernels.ops.linear.triton import tiles
from lora_kernels.runtime import dispatch
from lora_kernels.runtime.device_limits import DeviceLimits, limits_of
from lora_kernels.runtime.dispatch import Choice
from lora_kernels.runtime.dtypes import short_name


class Sizes(NamedTuple):
    """What a choice depends on beside the activation."""

    base_format: str | None
    in_features: int
    out_features: int
    rank: int
    drops: bool

    @staticmethod
    def of(base: BaseWeight | None, lora_a: Tensor, lora_b: Tensor, drops: bool) -> Sizes:
        rank, in_features = lora_a.shape
        format = None if base is None else base.format
        return Sizes(format, in_features, lora_b.shape[0], rank, drops)


def choose(
    backend: str,
    direction: str,
    activation: Tensor,  # [..., K] of x, or [..., N] of dy
    sizes: Sizes,
) -> Choice:
    """The backend of one direction of one call, and why; a named one that cannot serve raises."""
    if activation.device.type != "cuda" or dispatch.requested(backend) != "auto":
        return dispatch.choose(backend, activation.device, activation.dtype)
    if sizes.base_format is None:
        return Choice("composed", "only calls with a base weight have been measured")
    if sizes.base_format != "dense":
        return Choice("composed", "only calls with a plain base weight have been measured")
    if not activation.is_contiguous():
        return Choice("composed", "only contiguous activations have been measured")
    return of_sizes(direction, activation, sizes)


def of_sizes(direction: str, activation: Tensor, sizes: Sizes) -> Choice:
    """What the table says of a contiguous activation."""
    tokens = math.prod(activation.shape[:-1])
    return _lookup(direction, activation.device, activation.dtype, tokens, sizes)


@tiles.tile_of_cell
def _lookup(
    direction: str, device: torch.device, dtype: torch.dtype, tokens: int, sizes: Sizes
) -> Choice:
    if dtype.itemsize != 2:
        return Choice("composed", "only half precision has been measured")
    limits = limits_of(device)
    _, in_features, out_features, rank, drops = sizes
    cell = tiles.LinearCell(
        direction, short_name(dtype), dtype.itemsize, tokens, in_features, out_features, rank,
        drops, ieee=False,
    )  # fmt: skip
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


def _named(backend: str, cell: tiles.LinearCell, limits: DeviceLimits) -> str:
    return f"triton ({tiles.strategy(cell, limits)})" if backend == "triton" else backend
