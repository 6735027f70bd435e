"""What the launchers of every operation need: the device's limits and sizes of blocks."""

import functools
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

# Whether a product and a sum become one instruction, of every launch: said aloud, as Triton 3.10
# changes what it takes unasked, and with it the results' bits.
FP_FUSION = True


@dataclass(frozen=True)
class DeviceLimits:
    """What tile sizes depend on. The defaults stand for the interpreter."""

    name: str = "interpreter"
    capability: int = 90
    multiprocessors: int = 4
    shared_memory: int = 232_448  # bytes per block


@functools.cache
def limits_of(device: torch.device) -> DeviceLimits:
    if device.type == "cpu":
        return DeviceLimits()
    properties = torch.cuda.get_device_properties(device)
    return DeviceLimits(
        name=properties.name,
        capability=10 * properties.major + properties.minor,
        multiprocessors=properties.multi_processor_count,
        shared_memory=properties.shared_memory_per_block_optin,
    )


def on_device(tensor: Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def precision(dtype: torch.dtype) -> str:
    """How fp32 products are made: torch's switch for TF32 decides, as for its own GEMMs."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def padded_rows(like: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """An empty ``[P, Q]`` whose rows begin at multiples of 16 bytes. The padding is never read."""
    rows, columns = shape
    unit = 16 // dtype.itemsize
    return like.new_empty((rows, cdiv(columns, unit) * unit), dtype=dtype)[:, :columns]


def pipeline_stages(wanted: int, stage: int, besides: int, limits: DeviceLimits) -> int:
    """As many pipeline stages as fit beside the rest (all in bytes), at most ``wanted``."""
    return clamp((limits.shared_memory - besides - 2048) // stage, 1, wanted)


def cdiv(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def next_power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def clamp(number: int, low: int, high: int) -> int:
    return max(low, min(number, high))
