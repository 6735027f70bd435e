"""Which parts of a flat storage are free."""


class Space:
    """Regions of a storage of ``size`` elements, first fit; all sizes are multiples of a unit."""

    def __init__(self, unit: int) -> None:
        self.unit = unit
        self.size = 0
        self._free: list[tuple[int, int]] = []  # (start, size), ascending, never adjacent

    def take(self, size: int) -> int | None:
        """The start of a region that is no longer free, or None where none is large enough."""
        for index, (start, free) in enumerate(self._free):
            if free >= size:
                rest = [(start + size, free - size)] if free > size else []
                self._free[index : index + 1] = rest
                return start
        return None

    def free(self, start: int, size: int) -> None:
        """Give a region back; it joins free neighbours."""
        regions = sorted([*self._free, (start, size)])
        self._free = [regions[0]]
        for start, size in regions[1:]:
            last_start, last_size = self._free[-1]
            if last_start + last_size == start:
                self._free[-1] = (last_start, last_size + size)
            else:
                self._free.append((start, size))

    def grow(self, size: int) -> None:
        """Let there be at least ``size`` elements."""
        size = -(-size // self.unit) * self.unit
        if size > self.size:
            grown, self.size = self.size, size
            self.free(grown, size - grown)

    def largest(self) -> int:
        """The size of the largest free region."""
        return max((size for _, size in self._free), default=0)
