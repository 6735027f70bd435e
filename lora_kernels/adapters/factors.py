"""The low-rank adapter of one layer as a value.

A variant (VeRA, AdaLoRA, ...) is a differentiable function from its parameters to such factors, on
tensors of the rank's size: it needs no kernel of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LoRAFactors(NamedTuple):
    """``c * (s * D(x) A^T diag(r) B^T)``, what an adapter adds to ``c * x W^T``.

    Dimensions: K in_features, N out_features, R rank.
    """

    a: Tensor  # [R, K]
    b: Tensor  # [N, R]
    scaling: float | Tensor  # s, a number or []
    output_scale: Tensor | None = None  # c [N]
    rank_scale: Tensor | None = None  # r [R]

    def without_rank_scale(self) -> LoRAFactors:
        """The same function, r multiplied into B: gradients reach both of them.

        In fp32 at least, so that r costs a half-precision B no rounding of its own.
        """
        if self.rank_scale is None:
            return self
        b, r = self.b, self.rank_scale
        wide = torch.promote_types(torch.promote_types(b.dtype, r.dtype), torch.float32)
        return self._replace(b=b.to(wide) * r.to(wide), rank_scale=None)
