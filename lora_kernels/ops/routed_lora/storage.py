"""The flat storage of a bank: where the factors of each adapter lie.

Dimensions: K in_features, N_s out_features of slice s, R_s an adapter's rank there, R their sum.

Each adapter has one region: its A of all slices, one below the other ``[R, K]``, and then its B of
each slice ``[N_s, R_s]``, each of these factors starting at a multiple of ``ALIGNMENT`` elements.
"""

import torch
from torch import Tensor

ALIGNMENT = 64  # elements: whole cache lines, and what vector loads need


class FactorStorage:
    """A flat tensor and which parts of it are free. What it holds is the bank's to know.

    Attributes:
        tensor: ``[size]``. Zero between the factors: a vendor's GEMM may read on behind one, and
            count on numbers there (oneDNN on AMX does).
    """

    def __init__(
        self,
        in_features: int,
        slice_widths: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        self.in_features, self.slice_widths = in_features, slice_widths
        self.tensor = torch.empty(0, dtype=dtype, device=device)
        self._free: list[tuple[int, int]] = []  # (start, size), ascending, never adjacent

    @property
    def size(self) -> int:
        return self.tensor.shape[0]

    def factor_sizes(self, ranks: tuple[int, ...]) -> list[int]:
        """Elements of A of all slices, and of B of each."""
        sizes = [sum(ranks) * self.in_features]
        return sizes + [rank * width for rank, width in zip(ranks, self.slice_widths, strict=True)]

    def region_size(self, ranks: tuple[int, ...]) -> int:
        return sum(map(aligned, self.factor_sizes(ranks)))

    def size_for(self, rank_capacity: int) -> int:
        """Enough for any adapters whose ranks sum to ``rank_capacity``."""
        # At most 1 + S factors to each rank, and a gap behind each.
        gaps = ALIGNMENT * (1 + len(self.slice_widths))
        return rank_capacity * (self.in_features + max(self.slice_widths) + gaps)

    def offsets(self, start: int, ranks: tuple[int, ...]) -> list[int]:
        """Where A of all slices, and B of each, of the region at ``start`` begin."""
        offsets = [start]
        for size in self.factor_sizes(ranks)[:-1]:
            offsets.append(offsets[-1] + aligned(size))
        return offsets

    def factors(self, start: int, ranks: tuple[int, ...]) -> list[Tensor]:
        """Views: A of all slices ``[R, K]``, then B of each slice ``[N_s, R_s]``."""
        shapes = [(sum(ranks), self.in_features), *zip(self.slice_widths, ranks, strict=True)]
        return [
            self.tensor[offset : offset + rows * columns].view(rows, columns)
            for offset, (rows, columns) in zip(self.offsets(start, ranks), shapes, strict=True)
        ]

    def slabs(self, start: int, ranks: tuple[int, ...]) -> list[tuple[Tensor, Tensor] | None]:
        """Views of each slice's A and B; None where the rank is 0."""
        whole_a, *b = self.factors(start, ranks)
        pairs = zip(whole_a.split(ranks), b, strict=True)
        return [pair if pair[0].shape[0] else None for pair in pairs]

    @torch.no_grad()
    def clear_gaps(self, start: int, ranks: tuple[int, ...]) -> None:
        """Zeros behind the factors of a region, which may have been another adapter's."""
        sizes = self.factor_sizes(ranks)
        for offset, size in zip(self.offsets(start, ranks), sizes, strict=True):
            self.tensor[offset + size : offset + aligned(size)] = 0

    def take(self, size: int) -> int | None:
        """The start of a region that is no longer free; None where none is large enough."""
        for index, (start, free) in enumerate(self._free):
            if free >= size:
                self._free[index : index + 1] = [(start + size, free - size)] if free > size else []
                return start
        return None

    def give_back(self, start: int, size: int) -> None:
        """Make a region free; it joins free neighbours."""
        regions = sorted([*self._free, (start, size)])
        self._free = [regions[0]]
        for start, size in regions[1:]:
            last_start, last_size = self._free[-1]
            if last_start + last_size == start:
                self._free[-1] = (last_start, last_size + size)
            else:
                self._free.append((start, size))

    def largest_free(self) -> int:
        return max((size for _, size in self._free), default=0)

    def grow(self, size: int) -> None:
        """Another, larger tensor; the values are not copied."""
        size = aligned(size)
        self.give_back(self.size, size - self.size)
        self.tensor = torch.zeros(size, dtype=self.tensor.dtype, device=self.tensor.device)

    def become(self, dtype: torch.dtype, device: torch.device) -> None:
        """Another tensor of that kind; the values are not copied."""
        self.tensor = torch.zeros(self.size, dtype=dtype, device=device)

    def __getstate__(self) -> dict:
        """Without the values: the parameters carry them."""
        kind = (self.size, self.tensor.dtype, self.tensor.device)
        return {**self.__dict__, "tensor": kind}

    def __setstate__(self, state: dict) -> None:
        size, dtype, device = state["tensor"]
        self.__dict__.update(state)
        self.tensor = torch.zeros(size, dtype=dtype, device=device)


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
