"""Which calls of ``lora_linear`` are measured on a GPU: a named core, and the grid around it.

M tokens, K in_features, N out_features, r rank, p dropout; bf16, alpha = 2 r. ``shrink`` divides K
and N (and M but of few tokens), for trying things out where nothing could be measured.
"""

import itertools
from collections.abc import Iterable

from lora_kernels.measuring.linear_call import LinearCase

# K x N of the linears (q and o, k and v, gate and up, down) of Llama-3 8B and 70B, and a square.
LINEARS = (
    (4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096),
    (8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192), (5120, 5120),
)  # fmt: skip
TOKENS, RANKS, DROPOUTS = (8192, 512, 2048, 16384), (8, 16, 64, 128), (0.0, 0.1)

# M, K, N, r, p. In order of worth: a run that is cut short keeps the first ones.
CORE = (
    (8192, 4096, 4096, 16, 0.0), (8192, 4096, 4096, 16, 0.1), (8192, 4096, 14336, 16, 0.0),
    (8192, 14336, 4096, 16, 0.0), (8192, 4096, 4096, 64, 0.0), (2048, 4096, 4096, 16, 0.0),
    (8192, 4096, 14336, 16, 0.1), (8192, 14336, 4096, 16, 0.1), (8192, 4096, 4096, 64, 0.1),
    (2048, 4096, 4096, 16, 0.1), (8192, 4096, 1024, 16, 0.0), (512, 4096, 4096, 16, 0.0),
    (16384, 4096, 4096, 16, 0.0), (8192, 8192, 8192, 16, 0.0), (8192, 4096, 1024, 16, 0.1),
    (512, 4096, 4096, 16, 0.1), (16384, 4096, 4096, 16, 0.1), (8192, 8192, 8192, 16, 0.1),
    (8192, 4096, 4096, 8, 0.0), (8192, 4096, 4096, 128, 0.0), (8192, 5120, 5120, 16, 0.0),
    (2048, 8192, 28672, 16, 0.0), (2048, 28672, 8192, 64, 0.1), (16384, 4096, 14336, 64, 0.1),
)  # fmt: skip
# M, K, N, r of a decoder's step with one adapter.
DECODE = tuple((m, 4096, n, r) for r in (16, 64) for n in (4096, 11008) for m in (1, 8, 16, 64))


def core(device: str = "cuda", shrink: int = 1) -> list[LinearCase]:
    return _cases(CORE, device, shrink)


def decode(device: str = "cuda", shrink: int = 1) -> list[LinearCase]:
    return _cases([(m * shrink, k, n, r, 0.0) for m, k, n, r in DECODE], device, shrink)


def grid(device: str = "cuda", shrink: int = 1) -> list[LinearCase]:
    """Every combination, the core first."""
    rest = itertools.product(TOKENS, RANKS, DROPOUTS, LINEARS)
    sizes = [*CORE, *((m, k, n, r, p) for m, r, p, (k, n) in rest)]
    return list(dict.fromkeys(_cases(sizes, device, shrink)))


def _cases(sizes: Iterable[tuple], device: str, shrink: int) -> list[LinearCase]:
    tried = [([each // shrink for each in mkn], r, p) for *mkn, r, p in sizes]
    return [LinearCase(*mkn, dropout=p, rank=r, alpha=2 * r, device=device) for mkn, r, p in tried]
