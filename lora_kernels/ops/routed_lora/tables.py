"""What kernels look up by slot. Row L stands for tokens without an adapter and stays zero."""

import torch
from torch import Tensor

from lora_kernels.dtypes import computes_in_64_bits


def scaling_dtype(device: torch.device) -> torch.dtype:
    """fp64, which the compiled and the CUDA kernels read; fp32 where it may be missing."""
    return torch.float64 if computes_in_64_bits(device) else torch.float32


@torch.no_grad()
def enter_scaling(entry: Tensor, scaling: float | Tensor) -> None:
    """Write a number, or a 0-d tensor of any device, into an entry of the table."""
    if not isinstance(scaling, Tensor):
        scaling = torch.tensor(float(scaling), dtype=torch.float64, device="cpu")
    if scaling.device != entry.device:
        scaling = scaling.cpu()  # in its own dtype: MPS does not copy to fp64
    entry.copy_(scaling)


class SlotTables:
    """Tables of L + 1 rows on the bank's device; written in place while they have room.

    Attributes:
        factors: ``[L + 1, 1 + S, 3]`` int64: rank, first column of it in h, offset in the storage;
            of A of all slices, then of B of each. Rank 0 where a slot has no adapter here.
        scaling: ``[L + 1]`` in :func:`scaling_dtype`.
        thresholds: ``[L + 1]`` int32: q of the dropout.
    """

    def __init__(self, slots: int, slices: int, device: torch.device) -> None:
        self.factors = torch.zeros((slots + 1, 1 + slices, 3), dtype=torch.int64, device=device)
        self.scaling = torch.zeros(slots + 1, dtype=scaling_dtype(device), device=device)
        self.thresholds = torch.zeros(slots + 1, dtype=torch.int32, device=device)

    @property
    def slots(self) -> int:
        return self.scaling.shape[0] - 1

    @torch.no_grad()
    def write(self, slot: int, ranks: tuple[int, ...], offsets: list[int], scaling) -> Tensor:
        """Enter an adapter; returns its entry in ``scaling``, a 0-d view."""
        rows, column = [[sum(ranks), 0, offsets[0]]], 0
        for rank, offset in zip(ranks, offsets[1:], strict=True):
            rows.append([rank, column, offset])
            column += rank
        self.factors[slot].copy_(torch.tensor(rows))
        entry = self.scaling[slot]
        enter_scaling(entry, scaling)
        return entry

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        self.factors[slot] = 0
        self.scaling[slot] = 0
