"""``lora_weight_norm`` on vendor GEMMs, block by block, and its torch.library registration.

Dimensions: K in_features, N out_features, R rank.

One buffer holds a block of ``W + s B A`` in the accumulator's dtype; it is filled by one GEMM with
the rank as its reduction, reduced, and filled again while it is still in the cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_kernels.runtime.dtypes import accumulator_dtype

# Elements of a block. On a CPU it stays near a second-level cache (smaller blocks were slower);
# a GPU wants few launches, and 2**22 fp32 elements are 40 % of the last-level cache of an A100.
_CPU_BLOCK = 1 << 19
_DEVICE_BLOCK = 1 << 22

_library = torch.library.Library("lora_kernels", "FRAGMENT")
_library.define(
    "lora_weight_norm(Tensor weight, Tensor lora_a, Tensor lora_b, Tensor scaling) -> Tensor"
)


def weight_norm(
    weight: Tensor,  # [N, K]
    lora_a: Tensor,  # [R, K]
    lora_b: Tensor,  # [N, R]
    scaling: Tensor,  # []
) -> Tensor:  # [N]
    accumulator = accumulator_dtype(weight.dtype)
    a = lora_a.to(accumulator)
    b = lora_b.to(accumulator) * scaling
    if is_column_major(weight):
        squares = b.new_zeros(weight.shape[0])
        for _, block in adapted_blocks(weight.t(), a.t(), b.t()):
            squares += block.square_().sum(0)
        return squares.sqrt_()
    norms = b.new_empty(weight.shape[0])
    for lines, block in adapted_blocks(weight, b, a):
        torch.linalg.vector_norm(block, dim=1, out=norms[lines])
    return norms


def adapted_blocks(
    weight: Tensor,  # [P, Q]
    left: Tensor,  # [P, R]
    right: Tensor,  # [R, Q]
) -> Iterator[tuple[slice, Tensor]]:
    """Consecutive row slices, and the rows of ``weight + left @ right`` that they name.

    Every block is the same buffer, in left's dtype: it is valid until the next one is asked for.
    """
    rows, columns = weight.shape
    limit = _CPU_BLOCK if weight.device.type == "cpu" else _DEVICE_BLOCK
    step = min(max(limit // max(columns, 1), 1), max(rows, 1))
    buffer = left.new_empty((step, columns))
    for start in range(0, rows, step):
        lines = slice(start, min(start + step, rows))
        block = buffer[: lines.stop - start]
        if weight.dtype == left.dtype:
            torch.addmm(weight[lines], left[lines], right, out=block)
        else:
            block.copy_(weight[lines]).addmm_(left[lines], right)
        yield lines, block


def is_column_major(weight: Tensor) -> bool:
    """Whether blocks should be taken from the transpose, whose rows lie together in memory."""
    return weight.stride(0) < weight.stride(1)


def _kernel(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: Tensor) -> Tensor:
    if not torch.is_autocast_enabled(weight.device.type):
        return weight_norm(weight, lora_a, lora_b, scaling)
    with torch.autocast(weight.device.type, enabled=False):
        return weight_norm(weight, lora_a, lora_b, scaling)


_library.impl("lora_weight_norm", _kernel, "CompositeExplicitAutograd")


@torch.library.register_fake("lora_kernels::lora_weight_norm", lib=_library)
def _(weight, lora_a, lora_b, scaling):
    return weight.new_empty(weight.shape[0], dtype=accumulator_dtype(weight.dtype))
