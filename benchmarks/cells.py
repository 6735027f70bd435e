"""What is measured on a GPU, in order of worth: sections of cases, and who competes in them."""

import importlib.util
from dataclasses import dataclass

import torch

from benchmarks import kernel, layer
from benchmarks.kernel import KernelCase
from benchmarks.layer import LayerCase
from benchmarks.routed_providers import RoutedCase
from lora_kernels.measuring import cells
from lora_kernels.runtime import dispatch

OURS = ("composed", "triton-hybrid", "triton-fused", "native", "ours")
OP = ("frozen", "naive", "naive-fp32", "peft", *OURS)
ROUTED = (
    "frozen", "single", "naive", "peft", "gather-bmm", "grouped-mm", "composed", "triton",
    "triton-fused", "native", "ours",
)  # fmt: skip

# Llama-3 8B's q+k+v, gate+up and down: K, and N of what reads the same x.
SLICED = ((4096, (4096, 1024, 1024)), (4096, (14336, 14336)), (14336, (4096,)))
# M, K, N, r of GEMMs with a tail.
GEMM = (
    (8192, 4096, 4096, 16), (8192, 4096, 14336, 16), (8192, 14336, 4096, 16),
    (8192, 4096, 4096, 64), (2048, 4096, 4096, 16), (512, 4096, 4096, 16),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A case of a benchmark, and its providers."""

    kind: str
    case: object
    names: tuple[str, ...]


def sections(device: str = "cuda", shrink: int = 1) -> dict[str, list[Cell]]:
    """The cells of each section. shrink: divides sizes, for trying things out on a CPU."""
    small = layer.SMALL if shrink > 1 else {}
    layers = [LayerCase(dropout=p, device=device, **small) for p in (0.0, 0.1)]
    found = {
        "core": [Cell("op", case, OP) for case in cells.core(device, shrink)],
        "decode": [Cell("kernel", case, tuple(kernel.DECODE)) for case in decode(device, shrink)],
        "routed": [Cell("routed", case, ROUTED) for case in routed(device, shrink)],
        "gemm": [Cell("kernel", case, tuple(kernel.GEMM)) for case in gemm(device, shrink)],
        "layer": [Cell("layer", case, OP) for case in layers],
        "grid": [Cell("op", case, OP) for case in cells.grid(device, shrink)[len(cells.CORE) :]],
    }
    return {
        section: [Cell(each.kind, each.case, _here(each.names, device)) for each in listed]
        for section, listed in found.items()
    }


def decode(device: str, shrink: int) -> list[KernelCase]:
    return [
        KernelCase("decode", m, k // shrink, n // shrink, r, device=device)
        for m, k, n, r in cells.DECODE
    ]


def gemm(device: str, shrink: int) -> list[KernelCase]:
    """Both GEMMs of a training step, that of dx with and without dropout."""
    return [
        KernelCase(what, m // shrink, k // shrink, n // shrink, r, p, device=device)
        for m, k, n, r in GEMM
        for what, p in (("y", 0.0), ("dx", 0.0), ("dx", 0.1))
    ]


def routed(device: str, shrink: int) -> list[RoutedCase]:
    """Decoding with 8 adapters of rank 32 as serving systems publish it, and a training batch."""
    rank, sequences = 32 // min(shrink, 8), 32 // min(shrink, 4)
    decoding = [
        RoutedCase(
            sequences, 1, k // shrink, tuple(n // shrink for n in slices), 8, (rank,),
            base=False, device=device,
        )
        for k, slices in SLICED
    ]  # fmt: skip
    width = 4096 // shrink
    training = RoutedCase(
        16, 512 // shrink, width, (width,), 16, (8, 16, 32, 64), train=True, device=device
    )
    return [*decoding, training]


def _here(names: tuple[str, ...], device: str) -> tuple[str, ...]:
    """The providers that exist here: what was not built is no row of every case."""
    left_out = set()
    if importlib.util.find_spec("peft") is None:
        left_out.add("peft")
    for backend in ("triton", "native"):
        if device == "cpu" or dispatch.unavailable(backend, torch.device(device), torch.bfloat16):
            left_out.add(backend)
    return tuple(name for name in names if name.split("-")[0].split(" ")[0] not in left_out)
