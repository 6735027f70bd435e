"""How tensors become arguments of ``lora_linear``'s kernels."""

import functools
from contextlib import nullcontext

import torch
from torch import Tensor

from lora_kernels.dropout import drop_threshold
from lora_kernels.ops.lora_linear.tiles import DeviceLimits, cdiv


class Dropout:
    """The mask of an ``[M, K]`` activation as the kernels take it; off where nothing is dropped."""

    def __init__(self, seed: Tensor | None, dropout_p: float, rows: int, columns: int):
        self.threshold = drop_threshold(dropout_p)
        self.on = self.threshold > 0
        self.seed = seed
        # 32 bits count the groups until there are 2^31 of them; then it takes two counter words.
        self.long_counter = rows * cdiv(columns, 8) >= 2**31


def padded_rows(like: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """An empty ``[P, Q]`` whose rows begin at multiples of 16 bytes. The padding is never read."""
    rows, columns = shape
    unit = 16 // dtype.itemsize
    return like.new_empty((rows, cdiv(columns, unit) * unit), dtype=dtype)[:, :columns]


def outer_axis(matrix: Tensor) -> int | None:
    """The axis whose pitch and base are 16-byte aligned, the other one being contiguous.

    That is what TMA can address, by rows (0) or by columns (1).
    """
    size = matrix.element_size()
    for outer, inner in ((0, 1), (1, 0)):
        pitch = matrix.stride(outer)
        if matrix.stride(inner) == 1 and pitch >= matrix.shape[inner] and pitch * size % 16 == 0:
            return outer if matrix.data_ptr() % 16 == 0 else None
    return None


def is_aligned(matrix: Tensor) -> bool:
    return outer_axis(matrix) is not None


def scaling_argument(scaling: Tensor | float) -> Tensor | float:
    """A pointer for a tensor on the device; a tensor on the CPU is a number already known."""
    if isinstance(scaling, Tensor):
        return float(scaling) if scaling.device.type == "cpu" else scaling
    return scaling


def precision(dtype: torch.dtype) -> str:
    """How fp32 products are made: torch's switch for TF32 decides, as for its own GEMMs."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


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
