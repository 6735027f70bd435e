"""How tensors become arguments of ``lora_linear``'s kernels."""

from torch import Tensor

from lora_kernels.runtime.dropout import ActiveDropout


class Dropout:
    """The mask of an ``[M, K]`` activation as the kernels take it; off where nothing is dropped."""

    def __init__(self, dropout: ActiveDropout | None, rows: int, columns: int) -> None:
        self.on, self.scale, self.seed = dropout is not None, 1.0, None
        # The threshold, the mask's first group, and its groups per row.
        self.numbers, self.long_counter = (0, 0, 0), False
        if dropout is not None:
            self.scale, self.seed, place = dropout.scale, dropout.seed, dropout.place
            self.numbers = dropout.threshold, *place.groups(columns)
            self.long_counter = place.needs_long_counter(rows, columns)


NO_DROPOUT = Dropout(None, 0, 0)


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
    return scaling if isinstance(scaling, Tensor) and not scaling.is_cpu else float(scaling)
