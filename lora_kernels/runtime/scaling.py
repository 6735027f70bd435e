"""The scaling of an adapter as the operations take it: a number, or a 0-d tensor."""

import functools
from numbers import Real

import torch
from torch import Tensor

from lora_kernels.runtime.checks import check_no_wrapper


def check_scaling(scaling: float | Tensor, like_name: str, like: Tensor) -> None:
    """Raise unless it is a number, or a real 0-d tensor on the CPU or on ``like``'s device."""
    if not isinstance(scaling, Tensor):
        if isinstance(scaling, (int, float, torch.SymFloat, Real)):
            return
        raise TypeError(f"scaling: expected a number or a 0-d tensor, got {type(scaling).__name__}")
    check_no_wrapper("scaling", scaling)
    if scaling.ndim != 0:
        raise ValueError(f"scaling: expected a 0-d tensor, got shape {list(scaling.shape)}")
    if scaling.is_complex():
        raise TypeError(f"scaling: expected a real number, got dtype {scaling.dtype}")
    if scaling.device.type != "cpu" and scaling.device != like.device:
        raise ValueError(
            f"scaling: expected the CPU or {like_name}'s device {like.device}, got {scaling.device}"
        )


def host_number(scaling: float | Tensor) -> float | Tensor:
    """A scaling that lies on the host as a number; one on a device as it is."""
    if isinstance(scaling, Tensor):
        return scaling.item() if scaling.is_cpu else scaling
    return float(scaling)


@functools.lru_cache(maxsize=256)
def constant(scaling: float) -> Tensor:
    """A number as a 0-d fp64 tensor on the CPU, for calls that nothing records or replaces."""
    # Autograd saves no tensors that were made in inference mode.
    with torch.inference_mode(False):
        return torch.tensor(float(scaling), dtype=torch.float64, device="cpu")


def as_tensor(scaling: float | Tensor) -> Tensor:
    """A scaling as an op takes it: a 0-d tensor, of fp64 on the CPU for a number.

    The number enters as a product, because torch.compile keeps one that does symbolic: no
    recompilation for a new scaling.
    """
    if isinstance(scaling, Tensor):
        return scaling
    number = scaling if isinstance(scaling, (int, float, torch.SymFloat)) else float(scaling)
    return torch.ones((), dtype=torch.float64, device="cpu") * number
