"""The GEMM with a tail, every tile of it, against fp64."""

import functools

import torch
from linear_target import poisoned_memory
from torch import Tensor

from lora_kernels.ops.linear.triton.operands import Dropout
from lora_kernels.runtime import cuda_extension
from lora_kernels.runtime.device_limits import padded_rows
from lora_kernels.runtime.dropout import ActiveDropout, keep_mask
from lora_kernels.testing import assert_draws_within_policy
from lora_kernels.testing.policy import Draw

# M, D, C, R
GEMM = {
    "small": (64, 64, 128, 16),
    "edges": (200, 136, 264, 24),
    "deep": (300, 4096, 520, 64),
    "many tiles": (2176, 1032, 4104, 160),
}


def check_gemm_tail(
    label: str, dtype: torch.dtype, transposed: bool, p: float, device: str
) -> None:
    """Every tile, with bias and output scale and without, against fp64; the same bits twice."""
    for with_vectors in (False, True):
        draw = functools.partial(_gemm_tail, label, dtype, transposed, p, with_vectors, device)
        assert_draws_within_policy(draw, dtype)


def _gemm_tail(
    label: str, dtype: torch.dtype, transposed: bool, p: float, with_vectors: bool,
    device: str, number: int,
) -> Draw:  # fmt: skip
    """The results of every tile, eager's and fp64's, of one draw."""
    m, d, c, r = GEMM[label]
    generator = torch.Generator(device).manual_seed(m + r + 1000 * number)

    def draw(rows: int, columns: int, spread: float = 1.0) -> Tensor:
        values = torch.randn(rows, columns, generator=generator, device=device) * spread
        out = padded_rows(values, values.shape, dtype)
        return out.copy_(values)

    left, tail_left = draw(m, d), draw(m, r)
    right, tail_right = draw(d, c, d**-0.5), draw(r, c)
    if transposed:
        right, tail_right = draw(c, d, d**-0.5).t(), draw(c, r).t()
    bias, scale = draw(1, c)[0], draw(1, c)[0]
    seed = torch.tensor(0x1234_5678_9ABC_DEF1, device=device)
    drop = Dropout(ActiveDropout(p, seed) if p else None, m, c)
    keep = keep_mask(seed, p, m, c) if p else torch.ones(m, c, dtype=torch.bool, device=seed.device)

    def formula(precision: torch.dtype) -> Tensor:
        matrices = (left, right, tail_left, tail_right)
        a, b, e, f = (matrix.to(precision) for matrix in matrices)
        y = a @ b + torch.where(keep, e @ f, 0)
        return y * scale.to(precision) + bias.to(precision) if with_vectors else y

    vectors = {"bias": bias, "output_scale": scale} if with_vectors else {}
    ours = {}
    for tile_columns, cluster in (*cuda_extension.TILES, (0, 0)):
        found = []
        for _ in range(2):
            with poisoned_memory():
                out = left.new_empty((m, c))
            cuda_extension.gemm_tail(
                left, right, tail_left, tail_right, out, drop=drop, tile_columns=tile_columns,
                cluster=cluster, **vectors,
            )  # fmt: skip
            found.append(out)
        name = f"{tile_columns}x{cluster}"
        assert torch.equal(*found), f"{name}: other bits in the second run"
        ours[name] = found[0]
    eager, oracle = formula(dtype), formula(torch.float64)
    return ours, dict.fromkeys(ours, eager), dict.fromkeys(ours, oracle)
