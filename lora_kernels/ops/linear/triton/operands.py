"""How tensors become arguments of ``lora_linear``'s kernels."""

from torch import Tensor

from lora_kernels.runtime.dropout import GROUP, ActiveDropout
from lora_kernels.runtime.scaling import host_number


class Dropout:
    """The mask of an ``[M, K]`` activation as the kernels take it; off where nothing is dropped."""

    def __init__(self, dropout: ActiveDropout | None, rows: int, columns: int) -> None:
        self.on = dropout is not None
        self.threshold, self.scale, self.seed = 0, 1.0, None
        self.first_group, self.groups_per_row, self.long_counter = 0, -(-columns // GROUP), False
        if dropout is None:
            return
        self.threshold, self.scale, self.seed = dropout.threshold, dropout.scale, dropout.seed
        place = dropout.place
        self.first_group = place.first_group(columns)
        self.groups_per_row = place.groups_per_row(columns)
        self.long_counter = place.needs_long_counter(rows, columns)


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
    scaling = host_number(scaling)
    return scaling if isinstance(scaling, Tensor) else float(scaling)  # it may have been an integer
