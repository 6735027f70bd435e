"""What a call of ``lora_linear`` should take on a GPU: a pure function of sizes and limits.

Only what tells the ways apart is modelled: passes over the wide tensors, the generator's
instructions, and the host's time for launches. Both ways leave the base's product to the vendor's
GEMM and let it add to the tail, so that it counts once for both. The efficiencies are assumptions,
not measurements: of vendors' GEMMs with one narrow side, and of streaming kernels such as ours.

Dimensions: M tokens, K in_features, N out_features, R rank.
"""

from __future__ import annotations

from typing import NamedTuple

from lora_kernels.ops.linear.triton.tiles import LinearCell
from lora_kernels.runtime.device_limits import DeviceLimits

STRATEGIES = ("composed", "hybrid")

# Of the memory's bandwidth.
_NARROW_GEMM, _STREAM = 0.55, 0.8
# Instructions that an element's share of a mask takes, and the lanes that run them.
_DRAW, _LANES, _CLOCK = 12.5, 128, 1.6e9
# Of the host, for an operation of torch and for a launch of Triton's.
_CALL, _LAUNCH = 5e-6, 20e-6
# Multiplications and additions of half precision per SM and clock cycle, dense; and what a GEMM
# reaches of them.
_FLOPS = {80: 2048, 86: 512, 87: 512, 89: 1024, 90: 4096, 100: 8192, 103: 8192, 120: 1024}
_GEMM = 0.75


class Work(NamedTuple):
    """Beside the base's product: bytes that GEMMs with a narrow side and streaming kernels move,
    elements whose mask is drawn, and launches."""

    narrow_bytes: float = 0.0
    stream_bytes: float = 0.0
    drawn: float = 0.0
    calls: int = 0  # of torch
    launches: int = 0  # of Triton's kernels


def work_of(strategy: str, cell: LinearCell) -> Work:
    """Passes over x ``[M, K]`` and y ``[M, N]``, or dy and dx."""
    m, k, n, size = cell.tokens, cell.in_features, cell.out_features, cell.itemsize
    x, y, bits = m * k * size, m * n * size, m * k / 8
    drops = cell.dropout
    copy = 2 * x + bits if drops else 0  # x read, its masked copy written
    drawn = m * k if drops else 0
    if cell.direction == "forward":
        if strategy == "composed":  # h from x or its copy; the tail written
            return Work(x + y, copy, drawn, calls=5, launches=int(drops))
        return Work(0, x + y, drawn, calls=1, launches=3)
    if strategy == "composed":
        # t and the gradient of B from dy; that of A from x or its copy; the tail written.
        if drops:
            return Work(2 * y + x, copy + x + bits, 0, calls=7, launches=2)
        return Work(2 * y + 2 * x, 0, 0, calls=8)
    # Partial sums of both factors' gradients and of t are reduced once more.
    parts = 16 * cell.rank * (k + n) + 8 * m * cell.rank
    return Work(0, y + 2 * x + parts, 2 * drawn, calls=1, launches=6)


def seconds(strategy: str, cell: LinearCell, limits: DeviceLimits) -> float:
    """Of one direction of a call, the base's product included; the host runs ahead of the GPU."""
    work = work_of(strategy, cell)
    flops = 2.0 * cell.tokens * cell.in_features * cell.out_features
    peak = _FLOPS.get(limits.capability, 1024) * limits.multiprocessors * _CLOCK
    weight = cell.in_features * cell.out_features * cell.itemsize
    base = max(flops / (peak * _GEMM), weight / (limits.bandwidth * _STREAM))
    moved = work.narrow_bytes / _NARROW_GEMM + work.stream_bytes / _STREAM
    drawn = _DRAW * work.drawn / (limits.multiprocessors * _LANES * _CLOCK)
    on_gpu = base + moved / limits.bandwidth + drawn
    on_host = work.calls * _CALL + work.launches * _LAUNCH
    return max(on_gpu, on_host)


def gain(cell: LinearCell, limits: DeviceLimits) -> float:
    """How many times longer composed should take than hybrid."""
    composed, hybrid = (seconds(strategy, cell, limits) for strategy in STRATEGIES)
    return composed / hybrid
