"""Sums of partial results in a fixed order: what a split reduction leaves, without atomics."""
# pyright: reportGeneralTypeIssues=false
# Triton's ranges have no __iter__.

import triton
import triton.language as tl


@triton.jit
def load_scaling(scaling, IS_POINTER: tl.constexpr):
    """``scaling`` as an fp32 scalar; it comes as a number or as a pointer to a 0-d tensor."""
    if IS_POINTER:
        return tl.load(scaling).to(tl.float32)
    else:
        return tl.cast(scaling, tl.float32)


@triton.jit(do_not_specialize=("num_partials",))
def reduce_partials_kernel(
    partials_ptr,  # [P, rows * columns] fp32
    out_ptr,  # [rows, columns]
    rounded_ptr,  # [rows, columns], rows stride_rounded apart; unused without HAS_ROUNDED
    scaling,
    factor,
    num_partials,
    numel,
    columns,
    stride_rounded,
    SCALING_IS_POINTER: tl.constexpr,
    HAS_ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out = scaling * factor * sum over P``, first partial first, and a copy in another dtype."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < numel
    total = tl.zeros((BLOCK,), tl.float32)
    # Four loads are under way while the sums wait for each other.
    for _ in tl.range(num_partials, loop_unroll_factor=4):
        total += tl.load(partials_ptr + index, mask=inside, other=0.0)
        partials_ptr += numel
    total *= load_scaling(scaling, SCALING_IS_POINTER) * tl.cast(factor, tl.float32)
    tl.store(out_ptr + index, total.to(out_ptr.dtype.element_ty), mask=inside)
    if HAS_ROUNDED:
        row = index // columns
        rounded = total.to(rounded_ptr.dtype.element_ty)
        tl.store(rounded_ptr + row * stride_rounded + index % columns, rounded, mask=inside)


@triton.jit
def scale_cast_kernel(
    factor_ptr,  # [rows, columns], any strides
    out_ptr,  # [rows, columns], rows stride_out apart
    scaling,
    numel,
    columns,
    stride_row,
    stride_column,
    stride_out,
    SCALING_IS_POINTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out = scaling * factor``, rounded once to the dtype of ``out``."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < numel
    row, column = index // columns, index % columns
    factor = tl.load(factor_ptr + row * stride_row + column * stride_column, mask=inside)
    scaled = factor.to(tl.float32) * load_scaling(scaling, SCALING_IS_POINTER)
    tl.store(out_ptr + row * stride_out + column, scaled.to(out_ptr.dtype.element_ty), mask=inside)
