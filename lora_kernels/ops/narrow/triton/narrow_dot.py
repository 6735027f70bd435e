"""The product with a factor that has the rank as one side, in the wide side's dtype."""
# pyright: reportAttributeAccessIssue=false
# Only where indices are asked for does tl.max return two results.

import triton
import triton.language as tl

# The exponent field of an fp32 number, and the largest one whose reciprocal is a normal number.
_EXPONENT = tl.constexpr(0x7F800000)
_LARGEST = tl.constexpr(253 << 23)
_RECIPROCAL = tl.constexpr(254 << 23)


@triton.jit
def narrow_dot(
    wide,  # [P, Q]
    narrow,  # [Q, BLOCK_R], any floating dtype
    accumulator,  # [P, BLOCK_R] fp32
    PRECISION: tl.constexpr,
):  # [P, BLOCK_R] fp32
    """``accumulator + wide @ narrow`` with ``narrow`` rounded to the dtype of ``wide``.

    fp16 has no room for the gradients of a fresh adapter (B, h and t near 1e-5 and below), so there
    each column is scaled by a power of two that brings its largest element to [1, 2).
    """
    if wide.dtype == tl.float16 and narrow.dtype != tl.float16:
        narrow = narrow.to(tl.float32)
        largest = tl.max(tl.abs(narrow), axis=0)  # [BLOCK_R]
        exponent = largest.to(tl.int32, bitcast=True) & _EXPONENT
        # Zeros and subnormals of fp32 keep 1; infinities get a factor that leaves them infinite.
        exponent = tl.where(exponent == 0, 127 << 23, tl.minimum(exponent, _LARGEST))
        scale = exponent.to(tl.float32, bitcast=True)
        inverse = (-exponent + _RECIPROCAL).to(tl.float32, bitcast=True)
        product = tl.dot(wide, (narrow * inverse[None, :]).to(tl.float16))
        return accumulator + product * scale[None, :]
    return tl.dot(wide, narrow.to(wide.dtype), accumulator, input_precision=PRECISION)
