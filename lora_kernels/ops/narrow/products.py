"""Products with the rank as one side on the vendor's GEMMs (oneDNN, cuBLAS), for every operation.

Dimensions: M tokens, D and P, Q wide dimensions or the rank, R rank.
"""

import torch
from torch import Tensor

from lora_kernels.runtime.dtypes import accumulator_dtype

# Elements of x that a row chunk may hold: small enough for the last-level cache of a small CPU; on
# a device every operation of a chunk is a launch, and its work must outlast that.
_CHUNK_ELEMENTS, _DEVICE_CHUNK_ELEMENTS = 1 << 20, 1 << 23


def narrow_product(wide: Tensor, factor: Tensor) -> Tensor:
    """``wide @ factor``: ``[M, D] x [D, R] -> [M, R]`` in :func:`product_dtype`.

    Both of one dtype; where wide :func:`widens first <widens_first>` the factor may be wider.
    """
    if not widens_first(wide):
        return _product(wide, factor, product_dtype(wide))
    out = wide.new_empty((wide.shape[0], factor.shape[1]), dtype=torch.float32)
    factor = factor.float()
    for chunk in row_chunks(wide.shape[0], wide.shape[1], wide.device):
        torch.mm(wide[chunk].float(), factor, out=out[chunk])
    return out


def transposed_product(
    left: Tensor,  # [M, P]
    right: Tensor,  # [M, Q]
    dtype: torch.dtype,
    alpha: float = 1.0,
    scale: Tensor | None = None,  # []
) -> Tensor:  # [P, Q]
    """``alpha * scale * left^T @ right`` in ``dtype``, summed in fp32.

    One side is an activation, the other h or t in its dtype or in fp32; that one is rounded for the
    product, to fp16 by :func:`in_fp16_range`.
    """
    if scale is None and left.dtype == right.dtype and not widens_first(left):
        return scaled_product(left.t(), right, alpha, dtype=dtype)
    narrow_is_left = left.dtype.itemsize > right.dtype.itemsize
    activation = right if narrow_is_left else left
    if widens_first(activation):
        out = left.new_zeros((left.shape[1], right.shape[1]), dtype=torch.float32)
        for chunk in row_chunks(activation.shape[0], max(out.shape), left.device):
            out.addmm_(left[chunk].float().t(), right[chunk].float(), alpha=alpha)
        return (out if scale is None else out.mul_(scale)).to(dtype)
    if left.dtype != right.dtype and activation.dtype == torch.float16:
        narrow, scale = in_fp16_range(left if narrow_is_left else right)
        left, right = (narrow, right) if narrow_is_left else (left, narrow)
    left, right = left.to(activation.dtype), right.to(activation.dtype)
    if scale is None:
        return scaled_product(left.t(), right, alpha, dtype=dtype)
    scale = scale if alpha == 1 else scale * alpha
    return rounded(_product(left.t(), right, torch.float32), dtype, scale)


def in_fp16_range(narrow: Tensor) -> tuple[Tensor, Tensor]:
    """h or t ``[M, R]`` in fp16 after one division, and by what ([], on its device).

    All of it may lie below fp16's smallest number. Nothing is read back; a NaN or infinity in it
    reaches everything.
    """
    largest = torch.linalg.vector_norm(narrow, torch.inf) if narrow.numel() else narrow.new_ones(())
    largest.clamp_min_(torch.finfo(torch.float32).tiny)
    return rounded(narrow, torch.float16, largest, divide=True), largest


def scaled_product(
    left: Tensor,  # [M, D]
    right: Tensor,  # [D, N]
    alpha: float = 1.0,
    bias: Tensor | None = None,  # [N]
    dtype: torch.dtype | None = None,
) -> Tensor:  # [M, N]
    """``alpha * left @ right + bias`` of two matrices of one dtype, in theirs or in ``dtype``."""
    if bias is not None:
        return torch.addmm(bias, left, right, alpha=alpha)
    dtype = dtype or left.dtype
    if alpha == 1:
        return _product(left, right, dtype)
    if dtype != left.dtype:
        return rounded(_product(left, right, accumulator_dtype(left.dtype)), dtype, alpha)
    out = left.new_empty((left.shape[0], right.shape[1]))
    return out.addmm_(left, right, beta=0, alpha=alpha)


def rounded(
    narrow: Tensor, dtype: torch.dtype, scaling: Tensor | float, divide: bool = False
) -> Tensor:
    """``scaling * narrow`` (or ``narrow / scaling``) in ``dtype``, rounded once, in one launch."""
    if dtype == narrow.dtype:
        return narrow / scaling if divide else narrow * scaling
    narrow = narrow.to(torch.promote_types(narrow.dtype, dtype))
    if narrow.is_cpu:  # where two operations take less time than one into a tensor
        return (narrow / scaling if divide else narrow * scaling).to(dtype)
    out = torch.empty_like(narrow, dtype=dtype)
    return (torch.div if divide else torch.mul)(narrow, scaling, out=out)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left @ right`` of two matrices of one dtype, summed in fp32 and rounded to ``dtype``."""
    if left.dtype == dtype:
        return torch.mm(left, right)
    if not left.is_cuda or left.dtype.itemsize != 2:
        return torch.mm(left, right).to(dtype)
    return torch.mm(left, right, out_dtype=torch.float32).to(dtype)


def widens_first(activation: Tensor) -> bool:
    """Whether a half-precision activation is to become fp32 for a product summed in fp32.

    MPS has no ``torch.mm(out_dtype=)``; XPU has it in newer versions of torch only.
    """
    dtype = activation.dtype
    if dtype.itemsize != 2 or activation.is_cuda:
        return False
    return dtype == torch.float16 or not activation.is_cpu


def is_better_widened(rows: Tensor, factor: torch.dtype, ranks: int) -> bool:
    """Whether rows of an activation are to take the wider dtype of the factors, and not the factors
    theirs: with so few rows the factors are most of what is read."""
    return factor.itemsize > rows.dtype.itemsize and rows.shape[0] < ranks


def row_chunks(rows: int, columns: int, device: torch.device) -> list[slice]:
    """Slices of rows that hold at most ``_CHUNK_ELEMENTS`` elements (at least one row) each."""
    elements = _CHUNK_ELEMENTS if device.type == "cpu" else _DEVICE_CHUNK_ELEMENTS
    step = max(1, elements // max(columns, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def product_dtype(x: Tensor) -> torch.dtype:
    """h and t come from products with ``x`` in fp32 (fp64 for fp64).

    Except bf16, where the products that follow take them rounded to it in any case: it has fp32's
    range, so nothing underflows, and the product that makes them rounds them for nothing.
    """
    if x.dtype == torch.bfloat16 and not widens_first(x):
        return torch.bfloat16
    return accumulator_dtype(x.dtype)
