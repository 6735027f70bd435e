"""The dtype that sums are accumulated in, whatever the operation."""

import torch

# What activations and factors may be.
FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
