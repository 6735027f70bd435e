"""Where a backward puts the gradients of a bank's adapters, for those that a batch may use.

Dimensions: L slots, S slices.
"""

import operator
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.ops.routed.bank.storage import aligned
from lora_kernels.ops.routed.routing_arguments import is_fake
from lora_kernels.ops.routed.tensors import GradientLayout, TrainableFactors
from lora_kernels.runtime.capture import is_captured, kept_per_device, stream_of

# Sets of adapters whose layouts are kept: the micro-batches of a step take turns.
_KEPT = 4


class _Made(NamedTuple):
    needed: list[bool]  # requires_grad of each parameter when it was made
    layout: GradientLayout
    trained: TrainableFactors


class GradientLayouts:
    """The layouts of one :class:`BankVersion`, which hands itself to every call."""

    def __init__(self, version) -> None:
        self._made: dict[tuple, _Made] = {}  # replaced, never changed
        capacity = version.tables.slots
        self._nothing = {capacity: _nothing(version, capacity)}
        # Made now where it will be needed: a call that is being traced only reads.
        self._whole = _make(version, None, capacity) if version.trains else None

    def nothing(self, version, capacity: int) -> tuple[GradientLayout, TrainableFactors]:
        """The layout of no adapter, and no parameters."""
        nothing = self._nothing.get(capacity)
        if nothing is None:
            nothing = _nothing(version, capacity)
            if not is_captured(version.device):
                self._nothing[capacity] = nothing
        return nothing

    def of(
        self, version, slots: tuple[int, ...] | None, capacity: int
    ) -> tuple[GradientLayout, TrainableFactors]:
        """The layout of the adapters in ``slots`` (None: all), and their parameters."""
        if torch.compiler.is_compiling():
            return self._of_a_graph(version, slots)
        key = slots, capacity, stream_of(version.device) if version.has_streams else None
        made, bound = self._made.get(key), version.part(slots, capacity).bound
        if made is None or made.needed != list(map(_needs_gradient, bound)):
            made = _make(version, slots, capacity)
            if not is_captured(version.device):  # its table is filled by a replay
                self._made = dict([*list(self._made.items())[1 - _KEPT :], (key, made)])
        return made.layout, made.trained

    def _of_a_graph(self, version, slots) -> tuple[GradientLayout, TrainableFactors]:
        """What :meth:`of` returns, for a call that is being traced: it changes nothing, as a graph
        guards what it changes. The layout is that of all adapters, whose table is there already."""
        made = self._whole
        if made is None or made.needed != _needed_of(version.entries):
            made = _make(version, None, version.tables.slots)
        if slots is None:
            return made.layout, made.trained
        parameters, offsets, theirs = made.trained
        named = [index for index, slot in enumerate(theirs) if slot in slots]
        return made.layout, TrainableFactors(
            [parameters[index] for index in named],
            [offsets[index] for index in named],
            [theirs[index] for index in named],
        )


_needs_gradient = operator.attrgetter("parameter.requires_grad")


def _make(version, slots: tuple[int, ...] | None, capacity: int) -> _Made:
    entries = version.entries_in(slots)
    offsets, rows, trained, end = [], [], TrainableFactors([], [], []), 0
    for entry in entries:
        pairs = entry.adapter.factors()
        needs = [any(pair[0].requires_grad for pair in pairs if pair is not None)]
        needs += [pair is not None and pair[1].requires_grad for pair in pairs]
        row = []
        for need, factor in zip(needs, entry.factors, strict=True):
            row.append(end if need else -1)
            end += aligned(factor.numel()) if need else 0
        rows.append(row)
        offsets += row
        a_offset, *b_offsets = row
        for pair, b_offset in zip(pairs, b_offsets, strict=True):
            if pair is None:
                continue
            trained.parameters.extend(pair)
            trained.offsets.extend([a_offset if pair[0].requires_grad else -1, b_offset])
            trained.slots.extend([entry.slot] * 2)
            if a_offset >= 0:
                a_offset += pair[0].numel()
    named = [entry.slot for entry in entries]
    shape = capacity + 1, len(version.slice_columns)
    table = _table(shape, version.device, named, rows)
    return _Made(_needed_of(entries), GradientLayout(named, offsets, end, table), trained)


def _nothing(version, capacity: int) -> tuple[GradientLayout, TrainableFactors]:
    shape = capacity + 1, len(version.slice_columns)
    table = _nowhere(shape, version.device)
    return GradientLayout([], [], 0, table), TrainableFactors([], [], [])


@kept_per_device  # one for all versions of all banks of a model
def _nowhere(shape: tuple[int, int], device: torch.device) -> Tensor:
    return torch.full(shape, -1, device=device)


def _needed_of(entries) -> list[bool]:
    return [bound.parameter.requires_grad for entry in entries for bound in entry.bound]


def _table(
    shape: tuple[int, int], device: torch.device, slots: list[int], rows: list[list[int]]
) -> Tensor:
    if is_captured(device):
        # A copy from the host would be replayed, from memory that is another's by then.
        table = torch.full(shape, -1, device=device)
        for slot, row in zip(slots, rows, strict=True):
            for factor, offset in enumerate(row):
                table[slot, factor].fill_(offset)
        return table
    table = torch.full(shape, -1, device="cpu")
    if slots:
        table[torch.tensor(slots, device="cpu")] = torch.tensor(rows, device="cpu")
    if device.type == "cuda" and not is_fake(table):
        table = table.pin_memory()  # or the copy would be waited for
    return table.to(device, non_blocking=True)
