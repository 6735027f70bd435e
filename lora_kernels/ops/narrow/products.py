"""Products with the rank as one side on the vendor's GEMMs (oneDNN, cuBLAS), for every operation.

Dimensions: M tokens, D and P, Q wide dimensions or the rank, R rank.
"""

import torch
from torch import Tensor

from lora_kernels.runtime.dtypes import accumulator_dtype

# Elements of x that a row chunk may hold: small enough for the last-level cache of a small CPU; on
# a device every operation of a chunk is a launch, and its work must outlast that.
_CHUNK_ELEMENTS, _DEVICE_CHUNK_ELEMENTS = 1 << 20, 1 << 23


def narrow_product(wide: Tensor, narrow: Tensor, scaling: Tensor | float | None = None) -> Tensor:
    """``wide @ (scaling * narrow)``: ``[M, D] x [D, R] -> [M, R]`` in :func:`product_dtype`.

    fp16 never rounds the result to fp16: h and t may lie below its smallest number. Where torch has
    no product with a wider result, a row chunk at a time is widened before it.
    """
    if widens_first(wide.dtype, wide.device):
        factor = narrow.float() if scaling is None else narrow.float() * scaling
        out = wide.new_empty((wide.shape[0], narrow.shape[1]), dtype=torch.float32)
        for chunk in row_chunks(*wide.shape, wide.device):
            torch.mm(wide[chunk].float(), factor, out=out[chunk])
        return out
    if wide.dtype == torch.float16:
        # B may be tiny (it starts at zero): keep its own exponent range, scale the result.
        factor, exponent = _to_half_range(narrow.float())
        out = torch.mm(wide, factor, out_dtype=torch.float32) * exponent
        return out if scaling is None else out.mul_(scaling)
    factor = narrow.to(wide.dtype) if scaling is None else scaled(narrow, scaling, wide.dtype)
    if wide.dtype == torch.bfloat16 and wide.device.type == "cuda":
        return torch.mm(wide, factor, out_dtype=torch.float32)
    return wide @ factor


def transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """``left^T @ right``: ``[M, P], [M, Q] -> [P, Q]`` in :func:`product_dtype`.

    One side is an activation in x's dtype, the other h or t. That one is rounded to the
    activation's dtype for the product; in fp16 it is first scaled into range.
    """
    wide = left if right.dtype == torch.float32 else right
    dtype = wide.dtype
    if widens_first(dtype, wide.device):
        out = left.new_zeros((left.shape[1], right.shape[1]), dtype=torch.float32)
        for chunk in row_chunks(*wide.shape, wide.device):
            out.addmm_(left[chunk].float().t(), right[chunk].float())
        return out
    if dtype == torch.float16:
        if wide is left:
            right, exponent = _to_half_range(right)
        else:
            left, exponent = _to_half_range(left)
        return torch.mm(left.t(), right, out_dtype=torch.float32).mul_(exponent)
    left, right = left.to(dtype), right.to(dtype)
    if dtype == torch.bfloat16 and wide.device.type == "cuda":
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    return left.t() @ right


def scaled(factor: Tensor, scaling: Tensor | float, dtype: torch.dtype) -> Tensor:
    """``scaling * factor`` in ``dtype``, rounded once."""
    if factor.dtype == torch.float32 and dtype != torch.float64:
        return (factor * scaling).to(dtype)
    wide = torch.promote_types(accumulator_dtype(factor.dtype), accumulator_dtype(dtype))
    return (factor.to(wide) * scaling).to(dtype)


def widens_first(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a half-precision operand is to become fp32 for a product in :func:`product_dtype`.

    MPS has neither ``torch.mm(out_dtype=)`` nor the ``frexp`` of :func:`_to_half_range`; XPU has
    both in newer versions of torch only.
    """
    if device.type == "cuda":
        return False
    return dtype == torch.float16 or (dtype == torch.bfloat16 and device.type != "cpu")


def _to_half_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(x / e)`` in fp16 and the power of two ``e`` (0-d, fp32) that brings max|x| near 1.

    All on the device: nothing is read back. Zeros and non-finite values keep e = 1.
    """
    _, exponent = torch.frexp(x.abs().amax()) if x.numel() else torch.frexp(x.new_zeros(()))
    exponent = torch.ldexp(x.new_ones(()), exponent)
    exponent = torch.where(torch.isfinite(exponent) & (exponent > 0), exponent, 1.0)
    return (x / exponent).half(), exponent


def row_chunks(rows: int, columns: int, device: torch.device) -> list[slice]:
    """Slices of rows that hold at most ``_CHUNK_ELEMENTS`` elements (at least one row) each."""
    elements = _CHUNK_ELEMENTS if device.type == "cpu" else _DEVICE_CHUNK_ELEMENTS
    step = max(1, elements // max(columns, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def product_dtype(x: Tensor) -> torch.dtype:
    """h, t and the gradients of A and B come from products with ``x`` in fp32 (fp64 for fp64).

    Except bf16 on a CPU, where torch has no product with a wider result: it is rounded once, and
    keeping it wider would only cost copies. (bf16 has fp32's range, so nothing underflows.)
    """
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        return torch.bfloat16
    return accumulator_dtype(x.dtype)
