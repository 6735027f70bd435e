"""Where a backward puts the gradients of a bank's adapters, for those that a batch may use.

Dimensions: L slots, S slices.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.ops.routed_lora.adapter import Adapter
from lora_kernels.ops.routed_lora.operands import GradientLayout, Trained
from lora_kernels.ops.routed_lora.routing_arguments import is_fake
from lora_kernels.ops.routed_lora.storage import FactorStorage, aligned

# Sets of adapters whose layouts are kept: the micro-batches of a step take turns.
_KEPT = 4


class _Made(NamedTuple):
    needed: list[bool]  # requires_grad of each parameter when it was made
    layout: GradientLayout
    trained: Trained


class GradientLayouts:
    """The layouts of a bank as it stands; made anew after every change of its adapters.

    Args:
        adapters: the bank's, in the order of their slots.
        storage: where their factors lie.
        slots: L.
    """

    def __init__(self, adapters: list[Adapter], storage: FactorStorage, slots: int) -> None:
        self._adapters, self._storage = adapters, storage
        self._shape = (slots + 1, 1 + len(storage.slice_widths))
        self._by_slot = {adapter.slot: adapter for adapter in adapters}
        self._parameters = {adapter.slot: _parameters_of(adapter) for adapter in adapters}
        self._whole = self._make(adapters, self._needed_of(adapters))
        self._made: dict[tuple[int, ...], _Made] = {}  # replaced, never changed
        nowhere = torch.full(self._shape, -1, device=storage.tensor.device)
        self.nothing = GradientLayout([], [], 0, nowhere), Trained([], [], [])

    def of(self, slots: tuple[int, ...] | None) -> tuple[GradientLayout, Trained]:
        """The layout of the adapters in ``slots`` (None: all), and their parameters."""
        if torch.compiler.is_compiling():
            return self._of_a_graph(slots)
        if slots is None:
            needed = self._needed_of(self._adapters)
            if needed != self._whole.needed:
                self._whole = self._make(self._adapters, needed)
            return self._whole.layout, self._whole.trained
        made = self._made.get(slots)
        adapters = self.adapters(slots)
        needed = self._needed_of(adapters)
        if made is None or made.needed != needed:
            made = self._make(adapters, needed)
            if not _is_captured(self._storage.tensor.device):  # its table is filled by a replay
                kept = list(self._made.items())[1 - _KEPT :]
                self._made = dict([*kept, (slots, made)])
        return made.layout, made.trained

    def _of_a_graph(self, slots: tuple[int, ...] | None) -> tuple[GradientLayout, Trained]:
        """Without changing anything: a graph guards what it changes, and is compiled once more.

        The layout is that of all adapters, whose table is there already.
        """
        needed, made = self._needed_of(self._adapters), self._whole
        if needed != made.needed:
            made = self._make(self._adapters, needed)
        if slots is None:
            return made.layout, made.trained
        named = [entry for entry in zip(*made.trained, strict=True) if entry[2] in slots]
        return made.layout, Trained(*([entry[i] for entry in named] for i in range(3)))

    def adapters(self, slots: tuple[int, ...] | None) -> list[Adapter]:
        """The adapters in ``slots`` that are in this bank."""
        if slots is None:
            return self._adapters
        return [self._by_slot[slot] for slot in slots if slot in self._by_slot]

    def _needed_of(self, adapters: list[Adapter]) -> list[bool]:
        return [
            parameter.requires_grad
            for adapter in adapters
            for parameter in self._parameters[adapter.slot]
        ]

    def _make(self, adapters: list[Adapter], needed: list[bool]) -> _Made:
        offsets, rows, trained, end = [], [], Trained([], [], []), 0
        for adapter in adapters:
            pairs = adapter.factors()
            needs = [any(pair[0].requires_grad for pair in pairs if pair is not None)]
            needs += [pair is not None and pair[1].requires_grad for pair in pairs]
            row = []
            for need, size in zip(needs, self._storage.factor_sizes(adapter.ranks), strict=True):
                row.append(end if need else -1)
                end += aligned(size) if need else 0
            rows.append(row)
            offsets += row
            a_offset, *b_offsets = row
            for pair, b_offset in zip(pairs, b_offsets, strict=True):
                if pair is None:
                    continue
                trained.parameters.extend(pair)
                trained.offsets.extend([a_offset if pair[0].requires_grad else -1, b_offset])
                trained.slots.extend([adapter.slot] * 2)
                if a_offset >= 0:
                    a_offset += pair[0].numel()
        slots = [adapter.slot for adapter in adapters]
        return _Made(needed, GradientLayout(slots, offsets, end, self._table(slots, rows)), trained)

    def _table(self, slots: list[int], rows: list[list[int]]) -> Tensor:
        device = self._storage.tensor.device
        if _is_captured(device):
            # A copy from the host would be replayed, from memory that is another's by then.
            table = torch.full(self._shape, -1, device=device)
            for slot, row in zip(slots, rows, strict=True):
                for factor, offset in enumerate(row):
                    table[slot, factor].fill_(offset)
            return table
        table = torch.full(self._shape, -1, device="cpu")
        if slots:
            table[torch.tensor(slots, device="cpu")] = torch.tensor(rows, device="cpu")
        if device.type == "cuda" and not is_fake(table):
            table = table.pin_memory()  # or the copy would be waited for
        return table.to(device, non_blocking=True)


def _parameters_of(adapter: Adapter) -> list[nn.Parameter]:
    return [factor for pair in adapter.factors() if pair is not None for factor in pair]


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
