"""What tests put between the rows of an operand, where nothing may be read.

NaN, so that a read shows. But a vendor's GEMM may read there: oneDNN on AMX rounds the inner size
of a half-precision product up and counts on zeros in the other operand, and zero times NaN is NaN.
Where torch does that, an operand that it is given gets the largest finite number instead: times
zero it is zero, and a kernel that adds it up still shows. Operands that only our kernels read have
NaN around them everywhere.
"""

import functools
import itertools

import torch
from torch import Tensor


def vendor_gap(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """What to put where nothing may be read of an operand that a vendor's GEMM gets as well."""
    if torch.device(device).type == "cpu" and vendor_reads_gaps(dtype):
        return torch.finfo(dtype).max
    return float("nan")


@functools.cache
def vendor_reads_gaps(dtype: torch.dtype) -> bool:
    """Whether what lies behind a row of an operand reaches the results of torch's GEMM on this CPU.

    Behind a row lies a gap, or the next row: then a NaN in one row makes NaN of another. Found out
    once in a process: over sizes that are multiples of nothing, both operands, either one
    transposed, which are the layouts of a forward and of both gradients.
    """
    return any(
        not (left @ right.t())[good_rows][:, good_columns].isfinite().all()
        for around in (_padded, _among_others)
        for (rows, columns), depth in itertools.product(((17, 25), (150, 264)), (25, 33, 136))
        for left, good_rows in _either_way(around, rows, depth, dtype)
        for right, good_columns in _either_way(around, columns, depth, dtype)
    )


def _either_way(around, rows: int, depth: int, dtype: torch.dtype) -> list[tuple[Tensor, slice]]:
    """Ones ``[rows, depth]`` that lie by rows and by columns, and which of the rows to look at."""
    by_columns, _ = around(depth, rows, dtype)
    return [around(rows, depth, dtype), (by_columns.nan_to_num_(1.0).t(), slice(None))]


def _padded(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, slice]:
    """Rows amid NaN."""
    memory = torch.full((rows + 1, columns + 8), torch.nan, dtype=dtype)
    return memory[:rows, 3 : 3 + columns].fill_(1), slice(None)


def _among_others(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, slice]:
    """Rows without gaps, every second of which holds NaN, and off a boundary."""
    memory = torch.full((rows * columns + 41,), torch.nan, dtype=dtype)
    operand = memory[1 : 1 + rows * columns].view(rows, columns)
    operand[::2] = 1
    return operand, slice(None, None, 2)
