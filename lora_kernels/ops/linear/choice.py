"""What ``auto`` takes for a call of ``lora_linear``, and why.

On a GPU, of what the first of these names, unless its kernels are broken there:

* *measured*: the fastest of the call's cell in the table that ``tune`` has made on this machine, or
  in a table that ships with the package (``tuned/<gpu>/lora_linear.json``, see
  :mod:`triton.tiles`), which needs the self-test's proof; a call near a measured one, within a
  factor of two in each size, takes its backend and strategy;
* *proven*: kernels that have passed the self-test on this machine, where the model of their cost
  (:mod:`cost`) prefers them to composed;
* composed.

On a CPU what ``tune`` has measured there, else what :mod:`dispatch` names for the dtype. A measured
cell looks like this; forward and backward have one each and may differ, as what one saves every
other reads::

    {"backend": "triton", "strategy": "fused",
     "seconds": {"composed": 4.1e-4, "hybrid": 4.0e-4, "fused": 3.7e-4}}

(with ``spread``, the interquartile ranges, and ``graph_seconds``, by the replay of CUDA graphs). It
reads sizes and strides, never the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.base_weights import BaseWeight
from lora_kernels.ops.linear import cost
from lora_kernels.ops.linear.triton import tiles
from lora_kernels.runtime import dispatch, tables, verdicts
from lora_kernels.runtime.device_limits import DeviceLimits, limits_of, next_power_of_two, precision
from lora_kernels.runtime.dispatch import Choice
from lora_kernels.runtime.dtypes import short_name
from lora_kernels.runtime.plan import remembered


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


# What a kernel that nobody has measured has to gain by the model of its cost.
_PROMISE = 1.05

_COMMAND = "`python -m lora_kernels tune` measures it"


def choose(
    backend: str,
    direction: str,
    activation: Tensor,  # [..., K] of x, or [..., N] of dy
    sizes: Sizes,
) -> Choice:
    """The backend of one direction of one call, and why; a named one that cannot serve raises."""
    device, dtype = activation.device, activation.dtype
    if device.type == "cpu":
        tables.all_of(device)  # keys of plans ask whether there are any
    if dispatch.requested(backend) != "auto" or device.type not in ("cpu", "cuda"):
        return dispatch.choose(backend, device, dtype)
    if sizes.base_format is None:
        return _unmeasured(device, dtype, "only calls with a base weight are measured")
    if sizes.base_format != "dense":
        return _unmeasured(device, dtype, "only calls with a plain base weight are measured")
    if not activation.is_contiguous():
        return _unmeasured(device, dtype, "only contiguous activations are measured")
    return of_sizes(direction, activation, sizes)


def family_of(choice: Choice, direction: str, activation: Tensor, sizes: Sizes) -> str | None:
    """The kernels that serve a choice on a GPU, as the self-test names them."""
    if choice.backend == "composed" or activation.device.type != "cuda":
        return None
    tokens = math.prod(activation.shape[:-1])
    cell = _cell_of(direction, activation.dtype, tokens, sizes)
    return _family(choice.backend, cell, limits_of(activation.device))


def _family(backend: str, cell: tiles.LinearCell, limits: DeviceLimits) -> str:
    """Of Triton's kernels with the strategy, which a table decides too."""
    strategy = f" {tiles.strategy(cell, limits)}" if backend == "triton" else ""
    return f"linear/{backend}{strategy}"


def _unmeasured(device: torch.device, dtype: torch.dtype, reason: str) -> Choice:
    if device.type == "cpu":
        return dispatch.choose("auto", device, dtype)
    return Choice("composed", reason)


def of_sizes(direction: str, activation: Tensor, sizes: Sizes) -> Choice:
    """The choice for a contiguous activation."""
    tokens = math.prod(activation.shape[:-1])
    device, dtype = activation.device, activation.dtype
    if device.type == "cpu":
        return _on_a_cpu(direction, device, dtype, tokens, sizes)
    return _on_a_gpu(direction, device, dtype, tokens, sizes, precision(dtype))


@remembered
def _on_a_cpu(
    direction: str, device: torch.device, dtype: torch.dtype, tokens: int, sizes: Sizes
) -> Choice:
    unmeasured = dispatch.choose("auto", device, dtype)
    cell = _cell_of(direction, dtype, tokens, sizes)
    found = tables.cells_of("lora_linear", device).get(cell.key)
    if found is None or dispatch.unavailable(found["backend"], device, dtype):
        return unmeasured
    return Choice(found["backend"], f"taken by tune on this machine in {cell.key}: {_times(found)}")


@remembered
def _on_a_gpu(
    direction: str,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    sizes: Sizes,
    products: str,  # "tf32" or "ieee"
) -> Choice:
    limits, cell = limits_of(device), _cell_of(direction, dtype, tokens, sizes)
    found = tiles.measured(cell, limits)
    # fp32 is measured as torch computes it unless it is told to use TF32.
    if found.cell is not None and "backend" in found.cell and products == "ieee":
        return _of_table(found, found.cell, cell, device, dtype, limits)
    unmeasured = f"nothing is measured of {limits.name} in {cell.key} ({_COMMAND})"
    if dtype.itemsize != 2:
        return Choice("composed", f"{unmeasured}, and fp32 and wider have no model")
    family = "linear/triton hybrid"
    # As all calls of a plan are, whichever came first.
    promise = cost.gain(cell._replace(tokens=next_power_of_two(tokens)), limits)
    modelled = f"triton (hybrid) is modelled as {promise:.2f} times as fast as composed"
    if promise < _PROMISE:
        return Choice("composed", f"{unmeasured}; {modelled}")
    reason = dispatch.unavailable("triton", device, dtype)
    if reason := reason or verdicts.why_not_proven(family, device, dtype):
        return Choice("composed", f"{unmeasured}; {modelled}, but {reason}")
    return Choice("triton", f"proven by the self-test on this machine; {modelled}; {unmeasured}")


def _cell_of(direction: str, dtype: torch.dtype, tokens: int, sizes: Sizes) -> tiles.LinearCell:
    _, in_features, out_features, rank, drops = sizes
    return tiles.LinearCell(
        direction, short_name(dtype), dtype.itemsize, tokens, in_features, out_features, rank,
        drops, ieee=False, reads_tables=not torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def _of_table(
    found: tiles.Measured,
    entry: dict,
    cell: tiles.LinearCell,
    device: torch.device,
    dtype: torch.dtype,
    limits: DeviceLimits,
) -> Choice:
    """The fastest of a measured cell that can serve; composed always can."""
    where = f"measured on {limits.name} in {found.key}: {_times(entry)} ({found.source})"
    seconds, refused = entry.get("seconds", {}), ""
    others = sorted(seconds, key=seconds.get)
    by_time = ("triton" if name in tiles.STRATEGIES else name for name in others)
    for backend in dict.fromkeys((entry["backend"], *by_time)):
        if backend == "composed":
            break
        family = _family(backend, cell, limits)
        reason = dispatch.unavailable(backend, device, dtype)
        if reason is None:
            proof = verdicts.why_not_proven(family, device, dtype) if found.shipped else None
            reason = proof or verdicts.broken(family, device)
        if reason is None:
            return Choice(backend, f"{family} was the fastest {where}{refused}")
        refused += f", but for {backend}: {reason}"
    return Choice("composed", f"composed serves what was {where}{refused}")


def _times(cell: dict) -> str:
    seconds = cell.get("seconds", {})
    return ", ".join(f"{name} {took * 1e3:.3f} ms" for name, took in seconds.items()) or "no times"
