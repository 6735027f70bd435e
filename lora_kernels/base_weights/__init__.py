"""The frozen weight of a layer as a value: what it is stored as, and what can be done with it."""

from lora_kernels.base_weights.base import BaseWeight, product_or_bias, rebuild, rebuild_weight
from lora_kernels.base_weights.dense import DenseWeight, base_of, matrix_of

__all__ = [
    "BaseWeight",
    "DenseWeight",
    "base_of",
    "matrix_of",
    "product_or_bias",
    "rebuild",
    "rebuild_weight",
]
