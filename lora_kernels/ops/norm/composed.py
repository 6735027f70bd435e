"""``lora_weight_norm`` on vendor GEMMs, block by block.

Dimensions: K in_features, N out_features, R rank.

One buffer holds a block of ``W + s B A`` in the accumulator's dtype; it is filled by one GEMM with
the rank as its reduction, reduced, and filled again while it is still in the cache.
"""

import torch
from torch import Tensor

from lora_kernels.adapters.factors import LoRAFactors
from lora_kernels.base_weights import BaseWeight
from lora_kernels.runtime.dtypes import accumulator_dtype


def weight_norm(base: BaseWeight, factors: LoRAFactors) -> Tensor:  # [N]
    accumulator = accumulator_dtype(base.dtype)
    left = factors.b.to(accumulator) * factors.scaling
    norms, by_columns = left.new_zeros(base.shape[0]), False
    for (rows, columns), block in base.adapted_blocks(left, factors.a.to(accumulator)):
        by_columns = columns != slice(None)
        if by_columns:
            norms += block.square_().sum(1)
        else:
            torch.linalg.vector_norm(block, dim=1, out=norms[rows])
    return norms.sqrt_() if by_columns else norms
