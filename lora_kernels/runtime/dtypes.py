"""Which dtypes there are, whatever the operation."""

import functools

import torch
from torch import Tensor

# What activations and factors may be.
FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@functools.cache
def short_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def computes_in_64_bits(device: torch.device) -> bool:
    """Whether torch's 64-bit numbers can be relied on: on a CPU and on CUDA devices.

    MPS has no fp64, nor have some XPUs, and it draws and divides int64 in 32 bits.
    """
    return device.type in ("cpu", "cuda", "meta")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast has ``torch.nn.functional.linear`` cast x to; None where it does not."""
    # torch's question about all devices leaves MPS out.
    if not torch._C._is_any_autocast_enabled() and not getattr(x, "is_mps", False):
        return None
    if not isinstance(x, Tensor) or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return None
    if not x.is_floating_point() or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(x.device.type)


def cast_for_autocast(x: Tensor, *others: Tensor | None) -> tuple:
    """The tensors as ``torch.nn.functional.linear`` would see them under autocast."""
    dtype = autocast_dtype(x)
    if dtype is None:
        return (x, *others)
    return tuple(t.to(dtype) if isinstance(t, Tensor) else t for t in (x, *others))
