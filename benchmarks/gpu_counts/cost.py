"""What an operation costs on a GPU, and what the table is given of one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

from torch import Tensor


@dataclass
class Cost:
    """Of one operation, or of many.

    Attributes:
        launches: kernels, and fills that are one (memset).
        read, written: bytes that have to come from memory and go there, each once per launch.
        splits: launches more where a product splits its long reduction: not among ``launches``.
        syncs: how often the host waits.
        atomics: launches that add floating point numbers by atomics, in no fixed order.
        copies: between host and device.
    """

    launches: int = 0
    read: int = 0
    written: int = 0
    splits: int = 0
    syncs: int = 0
    atomics: int = 0
    copies: int = 0

    @property
    def bytes(self) -> int:
        return self.read + self.written

    def __add__(self, other: Cost) -> Cost:
        names = [field.name for field in fields(self)]
        return Cost(*(getattr(self, name) + getattr(other, name) for name in names))


def total(launched: list[tuple[str, Cost]]) -> Cost:
    return sum((cost for _, cost in launched), Cost())


class Operation(NamedTuple):
    """A call of an operation of torch, and its results."""

    name: str  # without namespace and overload
    overload: str
    arguments: dict[str, object]  # by the schema's names, defaults included
    operands: list[Tensor]  # on the device
    results: list[Tensor]
    from_host: list[Tensor]  # operands on the host that are more than a number


def nbytes(*tensors: Tensor) -> int:
    """Of the elements that there are in memory: an expanded dimension is one."""
    found = 0
    for tensor in tensors:
        count = 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            count *= size if stride or size == 0 else 1
        found += count * tensor.element_size()
    return found
