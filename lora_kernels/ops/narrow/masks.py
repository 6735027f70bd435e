"""Dropout on whole activations: one pass each where Triton runs, else torch's operations.

Dimensions: M tokens, K in_features, R rank.

The keep-mask is kept as bits, so that a backward reads them and draws nothing. Of x there is one
copy, for as long as it is multiplied.
"""

import functools
import warnings

import torch
from torch import Tensor
from torch.compiler import is_compiling

from lora_kernels.ops.narrow.products import rounded, row_chunks, scaled_product
from lora_kernels.ops.narrow.triton.driver import missing
from lora_kernels.runtime.dropout import ActiveDropout, packed_keep_mask, zero_dropped


def masked_copy(
    x: Tensor,  # [M, K]
    dropout: ActiveDropout,
    mask: Tensor | None = None,  # [M, ceil(K/8)]; None draws it
) -> tuple[Tensor, Tensor]:
    """``D(x)`` ``[M, K]`` rounded to x's dtype, and the packed mask."""
    if has_kernels(x):
        from lora_kernels.ops.narrow.triton import masked

        mask = None if mask is None else mask.contiguous()
        return masked.masked_copy(with_neighbours(x), dropout, mask)
    rows, columns = x.shape
    if mask is None:
        mask = draw_mask(rows, columns, dropout)
    kept = torch.empty_like(x, memory_format=torch.contiguous_format)
    for chunk in row_chunks(rows, columns, x.device):
        torch.mul(zero_dropped(x[chunk], mask[chunk]), dropout.scale, out=kept[chunk])
    return kept, mask


def draw_mask(rows: int, columns: int, dropout: ActiveDropout) -> Tensor:
    """The packed mask ``[rows, ceil(columns / 8)]``."""
    if has_kernels(dropout.seed):
        from lora_kernels.ops.narrow.triton import masked

        return masked.draw_mask(rows, columns, dropout)
    return packed_keep_mask(dropout.seed, dropout.p, rows, columns, place=dropout.place)


def masked_product(
    t: Tensor,  # [M, R]
    a: Tensor,  # [R, K], in t's dtype
    mask: Tensor,  # [M, ceil(K/8)]
    dropout: ActiveDropout,
    alpha: float = 1.0,
    scale: Tensor | None = None,  # [] fp32
) -> Tensor:  # [M, K]
    """``alpha * scale * keep * (t A)``, where keep is 0 or the dropout's scale."""
    if has_kernels(t):
        from lora_kernels.ops.narrow.triton import masked

        t, a = with_neighbours(t), with_neighbours(a)
        return masked.masked_product(t, a, mask.contiguous(), dropout, alpha, scale)
    alpha = alpha * dropout.scale
    if scale is not None:
        t = rounded(t, t.dtype, scale)
    rows, columns = t.shape[0], a.shape[1]
    out = t.new_empty((rows, columns))
    for chunk in row_chunks(rows, columns, out.device):
        out[chunk] = zero_dropped(scaled_product(t[chunk], a, alpha), mask[chunk])
    return out


def with_neighbours(matrix: Tensor) -> Tensor:
    """The matrix, or its copy, with rows of neighbouring elements: as the kernels step."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def slow_on(device: torch.device) -> str | None:
    """Why dropout on ``device`` is some hundred of torch's operations, which is slower than torch's
    own; None where kernels of ours draw and apply the masks, or it is a CPU, where an operation is
    no launch."""
    return None if device.type in ("cpu", "meta") else missing(device)


def has_kernels(x: Tensor) -> bool:
    """Whether kernels draw and apply the masks of x: where not, a warning has said so once."""
    # A tracer follows torch's operations, and not the question whether a driver starts.
    return not is_compiling() and _has_kernels(x.device) and x.dtype != torch.float64


@functools.cache
def _has_kernels(device: torch.device) -> bool:
    if reason := slow_on(device):
        warnings.warn(
            f"lora_kernels: dropout on {device} takes some hundred torch operations a call, which "
            f"is slower than torch.nn.Dropout: {reason}",
            stacklevel=2,
        )
        return False
    return device.type == "cuda"
