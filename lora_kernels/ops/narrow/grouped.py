"""Products of many adapters into parts of shared buffers, and their factors cast at once.

Few launches: no result of a product is copied where the vendor's GEMM can write it in place, and
the factors of all adapters are cast together.

Dimensions: n rows of a group, D and Q wide dimensions or the rank.
"""
# pyright: reportPrivateImportUsage=false
# torch's loops over lists have names with an underscore only.

import torch
from torch import Tensor

from lora_kernels.ops.narrow.products import (
    is_better_widened,
    row_chunks,
    transposed_product,
    widens_first,
)

# Half-precision rows with the rank as their width begin at multiples of so many elements: vendors'
# kernels for aligned operands serve, and those that read on to such a multiple meet zeros.
_PITCH = 32

Tensors = list[Tensor] | tuple[Tensor, ...]  # as those loops take them


def product_(
    out: Tensor,  # [n, Q], written; any strides
    left: Tensor,  # [n, D]
    right: Tensor,  # [D, Q], in left's dtype or a wider one
) -> None:
    """``out = left @ right``; rows that are to be widened are so by chunks."""
    if left.dtype != right.dtype:
        for chunk in row_chunks(left.shape[0], left.shape[1], left.device):
            product_(out[chunk], left[chunk].to(right.dtype), right)
    elif out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    elif out.dtype == torch.float32 and left.device.type == "cuda" and left.dtype.itemsize == 2:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:
        out.copy_(left @ right)


def transposed_product_(
    out: Tensor,  # [D, Q], written
    left: Tensor,  # [n, D]
    right: Tensor,  # [n, Q], in left's dtype, or one of them in fp32
) -> None:
    """``out = left^T @ right``."""
    if left.dtype == right.dtype:
        product_(out, left.t(), right)
    else:
        out.copy_(transposed_product(left, right, out.dtype))


def add_product_(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out += left @ right`` for operands of one dtype, out's or a wider one."""
    if right.dtype == out.dtype:
        out.addmm_(left, right)
    else:
        out.add_((left @ right).to(out.dtype))


def narrow_buffer(like: Tensor, rows: int, rank: int, dtype: torch.dtype) -> Tensor:
    """``[rows, rank]`` for the left operand of a product, uninitialised."""
    pitch = -(-rank // _PITCH) * _PITCH if dtype.itemsize == 2 else rank
    new = like.new_empty if pitch == rank else like.new_zeros
    return new((rows, pitch), dtype=dtype)[:, :rank]


def factor_dtype(
    rows: Tensor,  # [n, D], of all groups together
    factor: torch.dtype,
    ranks: int,  # of all groups together
    narrow: bool,  # whether the rank is the width of the result
) -> torch.dtype:
    """In which dtype the factors meet activations, or rows of h or t that become such.

    On a device, where they are cast in one launch, the factors take the activations'.
    """
    if narrow and widens_first(rows):
        return torch.float32
    if factor == rows.dtype or rows.device.type != "cpu":
        return rows.dtype
    return factor if is_better_widened(rows, factor, ranks) else rows.dtype


def cast(
    factors: Tensors, dtype: torch.dtype, *, in_range: bool = False
) -> tuple[Tensors, Tensor | None]:
    """The factors in ``dtype``, with one launch for all; see :func:`copy_` for the rest."""
    if all(factor.dtype == dtype for factor in factors):
        return factors, None
    if factors[0].device.type == "cpu":  # no launches to save
        return [factor.to(dtype) for factor in factors], None
    flat = factors[0].new_empty(sum(factor.numel() for factor in factors), dtype=dtype)
    pieces = flat.split([factor.numel() for factor in factors])
    made = [piece.view(factor.shape) for piece, factor in zip(pieces, factors, strict=True)]
    return made, copy_(made, factors, in_range=in_range)


def copy_(targets: Tensors, factors: Tensors, *, in_range: bool = False) -> Tensor | None:
    """Copy all, with one launch where the targets have no gaps.

    Args:
        in_range: divide by a power of two where fp16 could not hold them. B may be tiny, it starts
            at zero.

    Returns:
        What the results are to be multiplied by: ``[]`` fp32, or None.
    """
    exponent = None
    if in_range and targets[0].dtype == torch.float16 != factors[0].dtype:
        exponent = half_range(torch.stack(torch._foreach_norm(factors, float("inf"))))
        factors = torch._foreach_div(factors, exponent)
    torch._foreach_copy_(targets, factors)
    return exponent


def in_half_range(narrow: Tensor) -> tuple[Tensor, Tensor]:
    """h or t of all groups in fp16, and what products with it are to be multiplied by."""
    exponent = half_range(narrow.abs())
    out = narrow_buffer(narrow, narrow.shape[0], narrow.shape[1], torch.float16)
    return torch.div(narrow, exponent, out=out), exponent


def half_range(sizes: Tensor) -> Tensor:
    """The power of two ``[]`` that brings the largest of some sizes near 2^14 when divided by it.

    All on the device: nothing is read back. What is not finite is passed over, so that it does not
    take the others' digits; 2^39 lie between 2^14 and what rounds to zero.
    """
    largest = sizes.float().nan_to_num(0.0, 0.0, 0.0).amax().clamp_min(2.0**-100)
    power = largest.view(torch.int32).bitwise_and_(0x7F800000).view(torch.float32)  # its exponent
    return power.mul_(2.0**-14)
