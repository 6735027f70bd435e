"""What a measurement is made on."""

import importlib.metadata
import os
import platform

import torch

from lora_kernels.runtime.cpu_extension import cpu_name


def versions() -> dict[str, str | None]:
    """Installed versions; None for what is not installed."""
    # Triton has been published under several names; all of them are imported as triton.
    spellings = {"triton": ("triton", "pytorch-triton", "triton-windows")}
    # What torch says of itself names its build (+cpu, +cu128), its package's metadata may not.
    found: dict = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("triton", "transformers", "peft"):
        known = (_version(spelling) for spelling in spellings.get(name, (name,)))
        found[name] = next(filter(None, known), None)
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_features() -> list[str]:
    """The instruction sets that decide how fast half-precision GEMMs are."""
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            flags = next((set(line.split()) for line in cpuinfo if line.startswith("flags")), set())
    except OSError:
        flags = set()
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")
    return [flag for flag in wanted if flag in flags]


def load() -> float:
    """Processes that ran or waited in the last minute, for each core; 0 where nobody says."""
    return os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


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
