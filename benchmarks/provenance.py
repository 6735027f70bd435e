"""What a row carries about where it comes from."""

import datetime
import os
import platform

import torch

from lora_kernels.measuring import machine
from lora_kernels.runtime import cpu_extension, cuda_extension


def load() -> float | None:
    """Processes that wanted a CPU during the last minute, on average; None where not known."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def meta(device: torch.device, command: str) -> dict:
    """No host name, no path, no user."""
    found = {
        "time": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "versions": machine.versions(),
        "device": machine.device_name(device),
        "device_type": device.type,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": machine.cpu_name(),
        "cpu_features": machine.cpu_features(),
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
