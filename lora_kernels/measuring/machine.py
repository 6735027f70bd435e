"""What a measurement was made on, and how fast that is at a plain GEMM and a plain copy."""

import datetime
import functools
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable

import torch

from lora_kernels.runtime import cpu_extension, cuda_extension


def versions() -> dict[str, str | None]:
    """Installed versions; None for what is not installed."""
    # Triton has been published under several names; all of them are imported as triton.
    spellings = {"triton": ("triton", "pytorch-triton", "triton-windows")}
    # What torch says of itself names its build (+cpu, +cu128), its package's metadata may not.
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("triton", "transformers", "peft"):
        known = (_version(spelling) for spelling in spellings.get(name, (name,)))
        found[name] = next(filter(None, known), None)
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            fields = dict(line.rstrip("\n").split("\t: ", 1) for line in cpuinfo if "\t: " in line)
    except (OSError, ValueError):
        fields = {}
    return fields.get("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The instruction sets that decide how fast half-precision GEMMs are."""
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            flags = next((set(line.split()) for line in cpuinfo if line.startswith("flags")), set())
    except OSError:
        flags = set()
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")
    return [flag for flag in wanted if flag in flags]


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()


def last_level_cache_bytes(device: torch.device) -> int:
    """L2 of a GPU, L3 of a CPU; 32 MiB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    try:
        with open("/sys/devices/system/cpu/cpu0/cache/index3/size") as size:
            text = size.read().strip()
        return int(text[:-1]) * units[text[-1]]
    except (OSError, ValueError, KeyError, IndexError):
        return 32 << 20


def load() -> float | None:
    """Processes that wanted a CPU during the last minute, on average; None where not known."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def meta(device: torch.device, command: str) -> dict:
    """What a row carries about where it comes from. No host name, no path, no user."""
    found = {
        "time": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "versions": versions(),
        "device": device_name(device),
        "device_type": device.type,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_features": cpu_features(),
        "extension": cpu_extension.status(),
        "cuda_kernels": cuda_extension.status().splitlines()[0],
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": load(),
        # It decides how many page faults a step has, whoever's the layers are.
        "malloc": {name: os.environ[name] for name in sorted(os.environ) if "MALLOC_" in name},
    }
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda or torch.version.hip
    return found


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
