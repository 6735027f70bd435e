"""How fast the machine is at a plain GEMM and a plain copy."""

import functools
import time
from collections.abc import Callable

import torch

from lora_kernels.measuring.machine import last_level_cache_bytes


@functools.cache
def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measured FLOP/s of a large square GEMM and bytes/s (read + written) of a large copy.

    The best of many: a ceiling is what the machine can do, not what it does on average, and on a
    shared machine only a short call sometimes runs undisturbed. Measured once per process. A CPU
    without instructions for the dtype may take seconds for a product: there a few must do, and the
    smaller one.
    """
    cuda = device.type == "cuda"
    gemm_flops, seconds = 0.0, 0.0
    for size in (4096, 8192) if cuda else (768, 1536):
        if seconds > _LONG:
            break
        # Signed random data: a GPU multiplies zeros measurably faster.
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = _best_seconds(functools.partial(torch.mm, a, b), device)
        gemm_flops = max(gemm_flops, 2 * size**3 / seconds)
    # Four times the last-level cache, so that it is memory that is copied.
    source = torch.randn(last_level_cache_bytes(device), device=device)
    target = torch.empty_like(source)
    seconds = _best_seconds(functools.partial(target.copy_, source), device)
    copy_bytes = 2 * source.numel() * source.element_size() / seconds
    return {"flops_per_second": gemm_flops, "bytes_per_second": copy_bytes}


_LONG = 0.1  # seconds of one call that is no longer repeated often


def _best_seconds(call: Callable[[], object], device: torch.device, tries: int = 20) -> float:
    best = float("inf")
    for attempt in range(tries + 1):
        if attempt > 2 and best > _LONG:
            break
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            took = start.elapsed_time(end) * 1e-3
        else:
            began = time.perf_counter()
            call()
            took = time.perf_counter() - began
        if attempt:  # the first one warms up
            best = min(best, took)
    return best
