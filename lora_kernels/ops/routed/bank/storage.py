"""The memory of adapters: one region for each, in which its factors lie one behind the other.

Dimensions: K in_features, N_s out_features of slice s, R_s an adapter's rank there, R their sum.

A region holds A of all slices, one below the other ``[R, K]``, and then B of each slice
``[N_s, R_s]``; each of these factors starts at a multiple of ``ALIGNMENT`` elements, and zeros fill
up to there: a vendor's GEMM may read on behind a factor, and count on numbers (oneDNN on AMX does).
"""

import weakref
from collections import deque
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

_ANCHORS: set[int] = set()  # their addresses

ALIGNMENT = 64  # elements: whole cache lines, and what vector loads need


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class FactorShapes(NamedTuple):
    """Sizes and places of the factors of one layer's adapters, by their ranks in each slice."""

    in_features: int
    slice_widths: tuple[int, ...]

    @property
    def slice_columns(self) -> list[int]:
        """Where each slice begins in the result, and its width."""
        return list(accumulate(self.slice_widths, initial=0))

    def shapes(self, ranks: tuple[int, ...]) -> list[tuple[int, int]]:
        """Of A of all slices ``[R, K]``, and of B of each ``[N_s, R_s]``."""
        return [(sum(ranks), self.in_features), *zip(self.slice_widths, ranks, strict=True)]

    def region_size(self, ranks: tuple[int, ...]) -> int:
        return sum(aligned(rows * columns) for rows, columns in self.shapes(ranks))

    def region_size_for(self, rank_capacity: int) -> int:
        """Enough for any adapters whose ranks sum to ``rank_capacity``."""
        # At most 1 + S factors to each rank, and a gap behind each.
        gaps = ALIGNMENT * (1 + len(self.slice_widths))
        return aligned(rank_capacity * (self.in_features + max(self.slice_widths) + gaps))

    def factors(self, region: Tensor, ranks: tuple[int, ...]) -> list[Tensor]:
        """Views: A of all slices ``[R, K]``, then B of each slice ``[N_s, R_s]``."""
        factors, start, lease = [], 0, getattr(region, "lease", None)
        for rows, columns in self.shapes(ranks):
            factor = region.as_strided(
                (rows, columns), (columns, 1), region.storage_offset() + start
            )
            if lease is not None:
                factor.lease = lease  # pyright: ignore[reportAttributeAccessIssue]
            factors.append(factor)
            start += aligned(rows * columns)
        return factors

    def slabs(
        self, factors: list[Tensor], ranks: tuple[int, ...]
    ) -> list[tuple[Tensor, Tensor] | None]:
        """Views of each slice's A and B; None where the rank is 0."""
        whole_a, *b = factors
        if len(b) == 1:
            return [(whole_a, b[0])]
        pairs = zip(whole_a.split(ranks), b, strict=True)
        return [pair if pair[0].shape[0] else None for pair in pairs]


class Arena:
    """Memory that stays where it is, for captured CUDA graphs: regions are parts of it.

    A region is free again when the last that refers to one of its factors is gone. Sizes are in
    elements.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device | str | None) -> None:
        self.tensor = torch.zeros(size, dtype=dtype, device=device)
        self._free: list[tuple[int, int]] = [(0, size)]  # (start, size), ascending, apart
        # Given back by whichever thread lets go of a region, and sorted in by the next that takes.
        self._returned: deque[tuple[int, int]] = deque()
        self._readers: dict[int, torch.cuda.Stream] = {}

    @property
    def size(self) -> int:
        return self.tensor.shape[0]

    def take(self, size: int) -> Tensor | None:
        """A region ``[size]`` of zeros; None where no free piece is large enough."""
        self._collect()
        for index, (start, free) in enumerate(self._free):
            if free >= size:
                self._free[index : index + 1] = [(start + size, free - size)] if free > size else []
                # What was enqueued before may still read it.
                for stream in list(self._readers.values()):
                    torch.cuda.current_stream(self.tensor.device).wait_stream(stream)
                region = self.tensor[start : start + size].zero_()
                lease = Lease()
                region.lease = lease  # pyright: ignore[reportAttributeAccessIssue]
                weakref.finalize(lease, self._returned.append, (start, size)).atexit = False
                return region
        return None

    def largest_free(self) -> int:
        self._collect()
        return max((size for _, size in self._free), default=0)

    def note_reader(self) -> None:
        """Kernels of the current stream read the arena, or graphs that are replayed on it."""
        if self.tensor.is_cuda:
            stream = torch.cuda.current_stream(self.tensor.device)
            self._readers.setdefault(stream.stream_id, stream)

    def _collect(self) -> None:
        while self._returned:
            self._free = _joined(sorted([*self._free, self._returned.popleft()]))


class Lease:
    """Alive while its region is taken: an attribute of the region's tensor and of its factors."""

    __slots__ = ("__weakref__",)


def _joined(pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pieces, those that touch made one."""
    joined = [pieces[0]]
    for start, size in pieces[1:]:
        last_start, last_size = joined[-1]
        if last_start + last_size == start:
            joined[-1] = (last_start, last_size + size)
        else:
            joined.append((start, size))
    return joined


def anchor(dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """What the offsets of regions with memory of their own count from: ``[1, ALIGNMENT]``.

    A device has one address space, so that a pointer into one tensor reaches the others. That it is
    a matrix tells it from an arena, which holds all that its offsets point to.
    """
    memory = torch.zeros(2 * ALIGNMENT, dtype=dtype, device=device)
    if memory.is_meta:
        return memory[:ALIGNMENT].view(1, ALIGNMENT)
    # At a multiple, as allocations are on a device: so offsets are multiples too.
    start = -(memory.data_ptr() // memory.element_size()) % ALIGNMENT
    tensor = memory[start : start + ALIGNMENT].view(1, ALIGNMENT)
    address = tensor.data_ptr()
    _ANCHORS.add(address)
    weakref.finalize(tensor, _ANCHORS.discard, address).atexit = False
    return tensor


def is_moved_anchor(storage: Tensor) -> bool:
    """Whether this is the copy of an anchor, from which offsets lead nowhere."""
    return storage.ndim == 2 and not storage.is_meta and storage.data_ptr() not in _ANCHORS
