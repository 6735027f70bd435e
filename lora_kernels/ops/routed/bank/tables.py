"""What kernels look up by slot. Row L stands for tokens without an adapter and stays zero."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.runtime.dtypes import computes_in_64_bits


def scaling_dtype(device: torch.device) -> torch.dtype:
    """fp64, which the compiled and the CUDA kernels read; fp32 where it may be missing."""
    return torch.float64 if computes_in_64_bits(device) else torch.float32


class SlotTables(NamedTuple):
    """Tables of L + 1 rows. They are never written again: a change makes others."""

    # [L + 1, 1 + S, 3] int64: rank, first column of it in h, offset in the storage; of A of all
    # slices, then of B of each. Rank 0 where a slot has no adapter here.
    factors: Tensor
    scaling: Tensor  # [L + 1] in scaling_dtype
    thresholds: Tensor  # [L + 1] int32: q of the dropout

    @staticmethod
    def empty(slots: int, slices: int, device: torch.device) -> SlotTables:
        return SlotTables(
            torch.zeros((slots + 1, 1 + slices, 3), dtype=torch.int64, device=device),
            torch.zeros(slots + 1, dtype=scaling_dtype(device), device=device),
            torch.zeros(slots + 1, dtype=torch.int32, device=device),
        )

    @property
    def slots(self) -> int:
        return self.scaling.shape[0] - 1

    @torch.no_grad()
    def with_adapters(
        self, rows: dict[int, list[list[int]]], scalings: dict[int, Tensor]
    ) -> SlotTables:
        """These with adapters entered, by slot: the rows of their factors, and scalings ``[]``."""
        if not rows:
            return self
        device, slots = self.factors.device, list(rows)
        index = torch.tensor(slots, device=device)
        entered = torch.tensor(list(rows.values()), device=device)
        numbers = [scalings[slot] for slot in slots]
        numbers = numbers[0].view(1) if len(numbers) == 1 else torch.stack(numbers)
        return self._replace(
            factors=self.factors.index_copy(0, index, entered),
            scaling=self.scaling.index_copy(0, index, numbers.to(self.scaling)),
        )

    @torch.no_grad()
    def with_scaling(self, slot: int, scaling: Tensor) -> SlotTables:
        scalings = self.scaling.clone()
        scalings[slot].copy_(scaling)
        return self._replace(scaling=scalings)

    @torch.no_grad()
    def with_thresholds(self, by_slot: dict[int, int]) -> SlotTables:
        """These with the thresholds of all slots: 0 where none is given."""
        numbers = [0] * (self.slots + 1)
        for slot, threshold in by_slot.items():
            numbers[slot] = threshold
        thresholds = torch.tensor(numbers, dtype=torch.int32, device="cpu")
        return self._replace(thresholds=thresholds.to(self.thresholds.device))

    @torch.no_grad()
    def without(self, slot: int) -> SlotTables:
        """These with zeros for an adapter that does not drop."""
        index = torch.tensor([slot], device=self.factors.device)
        return self._replace(
            factors=self.factors.index_fill(0, index, 0),
            scaling=self.scaling.index_fill(0, index, 0),
        )

    @torch.no_grad()
    def resized(self, slots: int) -> SlotTables:
        """The first rows of these, or all and zeros behind them."""
        tables = SlotTables.empty(slots, self.factors.shape[1] - 1, self.factors.device)
        count = min(slots, self.slots)
        for table, own in zip(tables, self, strict=True):
            table[:count].copy_(own[:count])
        return tables

    @torch.no_grad()
    def copy_(self, others: SlotTables) -> None:
        """Take the values of others of the same size: for the tables that a captured graph reads,
        which alone are written again."""
        for table, other in zip(self, others, strict=True):
            table.copy_(other)
