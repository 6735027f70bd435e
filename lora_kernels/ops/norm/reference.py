"""The definition of ``lora_weight_norm`` in plain torch: the oracle of every test."""

import torch
from torch import Tensor


def lora_weight_norm_reference(
    weight: Tensor,  # [N, K]
    lora_a: Tensor,  # [R, K]
    lora_b: Tensor,  # [N, R]
    scaling: float | Tensor,  # []
) -> Tensor:  # [N]
    """``||W + scaling * B A||`` by rows, every step rounded to weight's dtype like eager torch."""
    product = lora_b.to(weight.dtype) @ lora_a.to(weight.dtype)
    return torch.linalg.vector_norm(weight + scaling * product, dim=1)
