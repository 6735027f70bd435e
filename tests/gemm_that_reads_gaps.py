"""A fault to test under: half-precision GEMMs let what lies behind the left rows into the results.

oneDNN's do so on AMX (found with torch 2.13): of a left operand that lies by rows they read a
multiple of 32 elements, or of two where a row is shorter, and count on zeros with which the copy of
the right operand was filled up. But zero times NaN is NaN.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from gaps import vendor_reads_gaps
from torch import Tensor


@contextmanager
def gemm_that_reads_gaps(where: Callable[[Tensor], bool] = lambda left: True) -> Iterator[None]:
    """torch's products on the CPU have the fault, whoever calls them: on the lefts ``where`` says.

    What was found out about this torch before is forgotten, here and afterwards.
    """

    def spoil(out: Tensor, left: Tensor) -> Tensor:
        return _spoil(out, left) if where(left) else out

    def mm(left: Tensor, right: Tensor) -> Tensor:
        out = left.new_empty(0)
        return spoil(torch.mm(left, right, out=out), left)

    def addmm(added: Tensor, left: Tensor, right: Tensor, *, beta=1, alpha=1) -> Tensor:
        out = left.new_empty(0)
        return spoil(torch.addmm(added, left, right, beta=beta, alpha=alpha, out=out), left)

    def addmm_(out: Tensor, left: Tensor, right: Tensor, *, beta=1, alpha=1) -> Tensor:
        return spoil(torch.addmm(out, left, right, beta=beta, alpha=alpha, out=out), left)

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that kernels are overridden
        for name, kernel in (("mm", mm), ("addmm", addmm), ("addmm_", addmm_)):
            library.impl(name, kernel, "CPU", allow_override=True)
    vendor_reads_gaps.cache_clear()
    try:
        yield
    finally:
        library._destroy()
        vendor_reads_gaps.cache_clear()


def _spoil(out: Tensor, rows: Tensor) -> Tensor:
    """``out`` with NaN where a number that is not finite lies behind the row ``[M, K]``."""
    count, columns = rows.shape
    more = -columns % (32 if columns > 32 else 2)
    if out.dtype.itemsize != 2 or rows.stride(1) != 1 or not more or not count:
        return out
    memory = rows.new_empty(0).set_(rows.untyped_storage())
    starts = rows.storage_offset() + rows.stride(0) * torch.arange(count) + columns
    behind = starts[:, None] + torch.arange(more)
    inside = behind < memory.shape[0]
    out[(inside & ~memory[behind.where(inside, 0)].isfinite()).any(1)] = torch.nan
    return out
