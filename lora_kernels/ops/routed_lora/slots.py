"""Names of adapters and the stable numbers by which tokens refer to them."""

import heapq
import weakref
from collections.abc import Iterator

BASE = "__base__"


class AdapterSlots:
    """Gives each adapter's name a slot number; the banks of one model share one instance.

    A name keeps its slot until the last bank that holds it has removed it; then the slot is free
    for another name. :class:`Routing` works with slots, so that one routing serves every bank.

    Args:
        capacity: how many slots there are to begin with. One name more doubles it: routings made
            before then refuse to be used and captured CUDA graphs have to be captured again.

    Attributes:
        version: a number that changes when slots get another meaning: a name was removed, or there
            are more slots than before. Adding a name to a free slot changes nothing for others.

    Raises:
        TypeError, ValueError: capacity is no integer of at least 1.
    """

    def __init__(self, capacity: int = 64) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int):
            raise TypeError(f"capacity: expected an integer, got {type(capacity).__name__}")
        if capacity < 1:
            raise ValueError(f"capacity: expected at least 1, got {capacity}")
        self.capacity = capacity
        self.version = 0
        self._slots: dict[str, int] = {}
        self._free = list(range(capacity))
        self._banks: weakref.WeakSet = weakref.WeakSet()

    def __getitem__(self, name: str) -> int:
        """The slot of ``name``; -1 for ``"__base__"``."""
        if name == BASE:
            return -1
        try:
            return self._slots[name]
        except KeyError:
            raise KeyError(f"no adapter {name!r}; there are {sorted(self._slots)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[str]:
        """The names in the order of their slots."""
        return iter(sorted(self._slots, key=self._slots.__getitem__))

    def is_live(self, slot: int) -> bool:
        """Whether the slot belongs to a name."""
        return slot in self._slots.values()

    def __repr__(self) -> str:
        return f"AdapterSlots({dict(sorted(self._slots.items(), key=lambda item: item[1]))})"

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_banks"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._banks = weakref.WeakSet()

    # --- for banks ----------------------------------------------------------------------------

    def join(self, bank) -> None:
        """Count ``bank`` among those whose adapters keep their slots."""
        self._banks.add(bank)

    def acquire(self, name: str) -> int:
        """The slot of ``name``, a free one if it has none yet."""
        if name not in self._slots:
            if not self._free:
                self._free = list(range(self.capacity, 2 * self.capacity))
                self.capacity *= 2
                self.version += 1
                for bank in self._banks:
                    bank.fit_tables()
            self._slots[name] = heapq.heappop(self._free)
        return self._slots[name]

    def release(self, name: str) -> None:
        """Free the slot of ``name`` unless a bank still holds an adapter of that name."""
        if name in self._slots and not any(name in bank for bank in self._banks):
            heapq.heappush(self._free, self._slots.pop(name))
            self.version += 1
