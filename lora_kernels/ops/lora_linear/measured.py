"""What ``auto`` takes for a call of ``lora_linear``: the fastest of its measured cell.

A cell of ``tuned/<gpu>/lora_linear.json`` (see :mod:`tiles`) that was measured carries, beside tile
options, the fastest backend and the times it was chosen by::

    {"backend": "triton", "strategy": "fused",
     "seconds": {"composed": 4.1e-4, "hybrid": 4.0e-4, "fused": 3.7e-4}}

Forward and backward are cells of their own and may differ: what one saves, every other reads. The
lookup happens when the op runs, never while a graph is traced, so it adds no guards; it reads sizes
and strides, never the device.
"""

import functools
import math

import torch
from torch import Tensor

from lora_kernels import dispatch
from lora_kernels.dispatch import Choice
from lora_kernels.dropout import drop_threshold
from lora_kernels.launching import limits_of
from lora_kernels.ops.lora_linear import tiles


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
    device, dtype = activation.device, activation.dtype
    if dispatch.requested(backend) != "auto" or device.type != "cuda":
        return dispatch.choose(backend, device, dtype)
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
) -> Choice:
    """The forward's choice; where a table decides, the reason names the backward's too."""
    forward = choose(backend, "forward", x, weight, lora_a, lora_b, dropout_p)
    if dispatch.requested(backend) != "auto" or x.device.type != "cuda" or weight is None:
        return forward
    # dy is not known yet: taken as contiguous, which it is in a model.
    backward = _of_sizes("backward", x, lora_a, lora_b, dropout_p)
    return Choice(
        forward.backend, f"{forward.reason}; backward {backward.backend}: {backward.reason}"
    )


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
    if reason := dispatch.unavailable(found["backend"], device, dtype):
        return Choice("composed", reason)
    times = ", ".join(
        f"{name} {seconds * 1e3:.3f} ms" for name, seconds in found.get("seconds", {}).items()
    )
    named = found["backend"]
    if named == "triton":
        named = f"triton ({tiles.strategy(cell, limits)})"
    return Choice(
        found["backend"],
        f"{named} was the fastest measured on {limits.name} in {cell.key}: {times or 'no times'}",
    )
