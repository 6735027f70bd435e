"""Which calls are measured on a GPU: a named core, and the grid around it.

M tokens, K in_features, N out_features, r rank, p dropout; bf16, alpha = 2 r.
"""

import itertools

from lora_kernels.bench.case import KernelCase, OpCase, RoutedCase

# K x N of the linears: q and o, k and v, gate and up, down.
LLAMA_8B = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
LLAMA_70B = ((8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192))
SQUARES = ((4096, 4096), (5120, 5120), (8192, 8192))

TOKENS = (512, 2048, 8192, 16384)
RANKS = (8, 16, 64, 128)
DROPOUTS = (0.0, 0.1)

# M, K, N, r, p. In order of worth: a run that is cut short keeps the first ones.
_CORE = (
    (8192, 4096, 4096, 16, 0.0),
    (8192, 4096, 4096, 16, 0.1),
    (8192, 4096, 14336, 16, 0.0),
    (8192, 14336, 4096, 16, 0.0),
    (8192, 4096, 4096, 64, 0.0),
    (2048, 4096, 4096, 16, 0.0),
    (8192, 4096, 14336, 16, 0.1),
    (8192, 14336, 4096, 16, 0.1),
    (8192, 4096, 4096, 64, 0.1),
    (2048, 4096, 4096, 16, 0.1),
    (8192, 4096, 1024, 16, 0.0),
    (512, 4096, 4096, 16, 0.0),
    (16384, 4096, 4096, 16, 0.0),
    (8192, 8192, 8192, 16, 0.0),
    (8192, 4096, 1024, 16, 0.1),
    (512, 4096, 4096, 16, 0.1),
    (16384, 4096, 4096, 16, 0.1),
    (8192, 8192, 8192, 16, 0.1),
    (8192, 4096, 4096, 8, 0.0),
    (8192, 4096, 4096, 128, 0.0),
    (8192, 5120, 5120, 16, 0.0),
    (2048, 8192, 28672, 16, 0.0),
    (2048, 28672, 8192, 64, 0.1),
    (16384, 4096, 14336, 64, 0.1),
)

PROVIDERS = (
    "frozen",
    "naive",
    "naive-fp32",
    "composed",
    "triton-hybrid",
    "triton-fused",
    "native",
    "ours",
)


ROUTED_PROVIDERS = (
    "frozen",
    "single",
    "loop",
    "gather-bmm",
    "grouped-mm",
    "composed",
    "triton",
    "triton-fused",
    "native",
)

# Llama-3 8B's q+k+v, gate+up and down.
_SLICED = ((4096, (4096, 1024, 1024)), (4096, (14336, 14336)), (14336, (4096,)))


def routed_core(device: str = "cuda", shrink: int = 1) -> list[RoutedCase]:
    """Decoding with 8 adapters of rank 32 as serving systems publish it, and a training batch."""
    sequences = 32 if shrink == 1 else 8
    rank = 32 // min(shrink, 8)
    decode = [
        RoutedCase(
            sequences,
            1,
            k // shrink,
            tuple(n // shrink for n in slices),
            8,
            (rank,),
            base=False,
            device=device,
        )
        for k, slices in _SLICED
    ]
    train = RoutedCase(
        16, 512 // shrink, 4096 // shrink, (4096 // shrink,), 16, (8, 16, 32, 64), train=True,
        device=device,
    )  # fmt: skip
    return [*decode, train]


# M, K, N, r of a decoder step with one adapter, and of GEMMs with a tail.
_DECODE = [
    (m, 4096, n, r) for n, r in ((4096, 16), (11008, 16), (4096, 64), (11008, 64))
    for m in (1, 8, 16, 64)
]  # fmt: skip
_GEMM = (
    (8192, 4096, 4096, 16),
    (8192, 4096, 14336, 16),
    (8192, 14336, 4096, 16),
    (8192, 4096, 4096, 64),
    (2048, 4096, 4096, 16),
    (512, 4096, 4096, 16),
)


def decode(device: str = "cuda", shrink: int = 1) -> list[KernelCase]:
    return [
        KernelCase("decode", m, k // shrink, n // shrink, r, device=device)
        for m, k, n, r in _DECODE
    ]


def decode_steps(device: str = "cuda", shrink: int = 1) -> list[OpCase]:
    """The same sizes as calls with a backward, as `tune` measures them."""
    return [
        OpCase(m, k // shrink, n // shrink, rank=r, alpha=2 * r, device=device)
        for m, k, n, r in _DECODE
    ]


def gemm(device: str = "cuda", shrink: int = 1) -> list[KernelCase]:
    """Both GEMMs of a training step, that of dx with and without dropout."""
    return [
        KernelCase(what, m // shrink, k // shrink, n // shrink, r, p, device=device)
        for m, k, n, r in _GEMM
        for what, p in (("y", 0.0), ("dx", 0.0), ("dx", 0.1))
    ]


def core(device: str = "cuda", shrink: int = 1) -> list[OpCase]:
    """The two dozen calls of `make gpu-check`. shrink: divides M, K and N, for trying it out."""
    return [_case(*sizes, device, shrink) for sizes in _CORE]


def grid(device: str = "cuda", shrink: int = 1) -> list[OpCase]:
    """Every combination, the core first, larger M before smaller."""
    linears = dict.fromkeys(LLAMA_8B + LLAMA_70B + SQUARES)
    rest = itertools.product(sorted(TOKENS, key=lambda m: (m != 8192, m)), RANKS, DROPOUTS, linears)
    cases = core(device, shrink)
    cases += [_case(m, k, n, r, p, device, shrink) for m, r, p, (k, n) in rest]
    return list(dict.fromkeys(cases))


def _case(m: int, k: int, n: int, r: int, p: float, device: str, shrink: int) -> OpCase:
    return OpCase(
        m // shrink, k // shrink, n // shrink, dropout=p, rank=r, alpha=2 * r, device=device
    )
