"""The adapters of one bank at one time: made once, never changed, read without a lock.

Dimensions: L slots, S slices, H the widest rank.

A version fixes structure: which adapters there are, in which slots, their ranks, places, scalings
and dropout. Values of factors are the Parameters', in the regions that the version refers to: these
live until the last version, batch or backward that reads them is gone.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.ops.routed.bank.adapter import Adapter
from lora_kernels.ops.routed.bank.layouts import GradientLayouts
from lora_kernels.ops.routed.bank.storage import Arena, FactorShapes
from lora_kernels.ops.routed.bank.tables import SlotTables
from lora_kernels.ops.routed.routing_arguments import is_fake
from lora_kernels.ops.routed.tensors import BankTensors, GradientLayout, TrainableFactors
from lora_kernels.runtime.capture import is_captured, stream_of
from lora_kernels.runtime.plan import Plans

if TYPE_CHECKING:
    from lora_kernels.ops.routed.bank.bank import AdapterBank


class Bound(NamedTuple):
    """A parameter, where its adapter keeps it, and where its memory was."""

    kept_in: dict[str, nn.Parameter | None]
    name: str
    parameter: nn.Parameter
    address: int

    def is_in_place(self) -> bool:
        return (
            self.kept_in.get(self.name) is self.parameter
            and self.parameter.data_ptr() == self.address
        )


class Entry(NamedTuple):
    """An adapter as versions hold it."""

    slot: int
    adapter: Adapter
    factors: list[Tensor]  # A of all slices, B of each: views of its region
    rows: list[list[int]]  # of the table of factors
    bound: list[Bound]  # its parameters
    rank: int  # over all slices

    def is_in_place(self) -> bool:
        """Whether nobody has replaced a parameter or its data."""
        return all(bound.is_in_place() for bound in self.bound)


def table_rows(ranks: tuple[int, ...], factors: list[Tensor], storage: Tensor) -> list[list[int]]:
    """``(rank, first column in h, offset)`` of A of all slices and of B of each.

    Offsets are in elements from where ``storage`` begins.
    """
    if storage.is_meta:
        offsets = [0] * len(factors)
    else:
        start, size = storage.data_ptr(), storage.element_size()
        offsets = [(factor.data_ptr() - start) // size for factor in factors]
    rows, column = [[sum(ranks), 0, offsets[0]]], 0
    for rank, offset in zip(ranks, offsets[1:], strict=True):
        rows.append([rank, column, offset])
        column += rank
    return rows


class Part(NamedTuple):
    """Some adapters of a version."""

    bound: list[Bound]  # their parameters
    tensors: BankTensors


# Sets of adapters whose parts are kept: the micro-batches of a step take turns.
_KEPT = 4


class Reserved:
    """What a captured graph reads of a bank: an arena, and tables that stay where they are.

    The tables take the values of a version in the order of a stream, between replays: where a
    routing is filled. That version's regions live until they have taken the next one's.
    """

    def __init__(self, arena: Arena, tables: SlotTables, max_rank: int) -> None:
        self.arena, self.tables = arena, tables
        self.max_rank = max_rank  # no adapter's is above it; h has so many columns
        self._holds: BankVersion | None = None

    @property
    def room(self) -> tuple[int, int]:
        """Elements in the arena, and the highest rank of an adapter."""
        return self.arena.size, self.max_rank

    def enter(self, version: BankVersion) -> None:
        """Let the tables hold a version, from here on in the current stream."""
        if self._holds is version or version.reserved is not self:
            return
        version.wait()
        self.tables.copy_(version.tables)
        self.arena.note_reader()
        self._holds = version


@dataclass(eq=False, repr=False)
class BankVersion:
    """What the module's docstring describes; made by :class:`AdapterBank`."""

    bank: weakref.ref[AdapterBank]
    shapes: FactorShapes
    storage: Tensor  # what offsets count from
    tables: SlotTables
    by_slot: dict[int, Entry]
    thresholds: dict[int, int]  # q of the adapters that drop, by slot
    reserved: Reserved | None  # what captured graphs read; None where they cannot be
    trains: bool = False  # whether any parameter required grad when it came
    widest: int = 0  # the highest rank of an adapter

    def __post_init__(self) -> None:
        self.dtype, self.device = self.storage.dtype, self.storage.device
        self.slice_columns = self.shapes.slice_columns
        # H
        self.max_total_rank = self.widest if self.reserved is None else self.reserved.max_rank
        self._entries: list[Entry] | None = None
        self._parts: dict[tuple, Part] = {}  # replaced, never changed
        self._noted: set[tuple[int, int | None]] = set()  # streams, and slots that they read
        self._made: torch.Event | None = None
        self.has_streams = self.device.type == "cuda"
        self._whole = 0, self.tables.slots  # capacities that its own tables have
        self._resized: dict[tuple[int, int], SlotTables] = {}  # by slots and stream
        self._layouts = GradientLayouts(self)
        self.plans = Plans()  # of the calls that read this version

    # --- reading ------------------------------------------------------------------------------

    @property
    def entries(self) -> list[Entry]:
        """All adapters, in the order of their slots."""
        entries = self._entries
        if entries is None:
            entries = sorted(self.by_slot.values(), key=attrgetter("slot"))
            if not torch.compiler.is_compiling():  # a call that is being traced only reads
                self._entries = entries
        return entries

    def __len__(self) -> int:
        return len(self.by_slot)

    def __bool__(self) -> bool:
        return True  # one without adapters is one

    def entry(self, slot: int) -> Entry | None:
        """The adapter in a slot; None where this bank has none there."""
        return self.by_slot.get(slot)

    def entries_in(self, slots: tuple[int, ...] | None) -> list[Entry]:
        """The adapters in ``slots`` (None: all), in the order of their slots."""
        if slots is None:
            return self.entries
        by_slot = self.by_slot
        return [by_slot[slot] for slot in slots if slot in by_slot]

    def tensors(self, slots: tuple[int, ...] | None = None, capacity: int = 0) -> BankTensors:
        """The bank as the backends take it.

        Args:
            slots: those that the batch may use; None for all.
            capacity: L of the batch's routing, where there are more slots by now; 0 for all.

        Raises:
            RuntimeError: a CUDA graph is captured, and the bank has no memory reserved for it, or
                the routing knows fewer slots.
        """
        if torch.compiler.is_compiling():
            return self._tensors(self.entries, self.tables)
        if is_captured(self.device):
            if self.reserved is None:
                raise RuntimeError(
                    "a captured CUDA graph holds addresses: call reserve() on the bank before, so "
                    "that what it reads stays where it is"
                )
            if capacity not in (0, self.tables.slots):  # the graph's tables have all slots
                raise RuntimeError(
                    f"routing: there are {self.tables.slots} slots now and were {capacity} when it "
                    "was made; make a new one to capture a CUDA graph with"
                )
            return self._tensors(self.entries, self.reserved.tables)
        return self.part(slots, capacity).tensors

    def part(self, slots: tuple[int, ...] | None, capacity: int = 0) -> Part:
        """The adapters in ``slots`` (None: all), for a routing of so many slots."""
        is_whole = capacity in self._whole
        key = slots, capacity, None if is_whole else stream_of(self.device)
        part = self._parts.get(key)
        if part is None:
            entries = self.entries_in(slots)
            bound = [bound for entry in entries for bound in entry.bound]
            part = Part(bound, self._tensors(entries, self._tables_of(capacity)))
            if is_captured(self.device):  # its tables may be the graph's
                return part
            self._parts = dict([*list(self._parts.items())[1 - _KEPT :], (key, part)])
        return part

    def _tables_of(self, capacity: int) -> SlotTables:
        if capacity in self._whole:
            return self.tables
        key = capacity, stream_of(self.device)
        resized = self._resized.get(key)
        if resized is None:
            with torch.inference_mode(False):
                resized = self._tables_there().resized(capacity)
            if not is_captured(self.device):
                self._resized[key] = resized
        return resized

    def _tensors(self, entries: list[Entry], tables: SlotTables) -> BankTensors:
        return BankTensors(
            factors=[factor for entry in entries for factor in entry.factors],
            slots=[entry.slot for entry in entries],
            thresholds=[self.thresholds.get(entry.slot, 0) for entry in entries],
            slice_columns=self.slice_columns,
            max_total_rank=self.max_total_rank,
            storage=self.storage,
            slot_table=tables.factors,
            scaling=tables.scaling,
            threshold_table=tables.thresholds,
        )

    def gradients(
        self, slots: tuple[int, ...] | None, capacity: int = 0
    ) -> tuple[GradientLayout, TrainableFactors]:
        """Where a backward puts the gradients of the adapters in ``slots`` (None: all), and the
        parameters that autograd has to see; of nothing without grad mode."""
        capacity = capacity or self.tables.slots
        if not torch.is_grad_enabled():
            return self._layouts.nothing(self, capacity)
        return self._layouts.of(self, slots, capacity)

    def published(self) -> None:
        """Others may read it from now on: behind what this stream has enqueued by then."""
        if self.device.type == "cuda" and not is_fake(self.storage):
            self._made = torch.cuda.current_stream(self.device).record_event()

    def wait(self) -> None:
        """Let the current stream go on when what another has copied is there."""
        # A graph reads what the filling of a routing has waited for.
        if self._made is not None and not is_captured(self.device):
            torch.cuda.current_stream(self.device).wait_event(self._made)

    def note_stream(self, slots: tuple[int, ...] | None) -> None:
        """The current CUDA stream reads the adapters in ``slots``: they must be there before, and
        their memory must not be another's until it has."""
        stream = torch.cuda.current_stream(self.device)
        if (stream.stream_id, None) not in self._noted:
            self.wait()
        if self.reserved is not None:
            self.reserved.arena.note_reader()
            if not is_captured(self.device):
                self._noted.add((stream.stream_id, None))
            return
        for entry in (None, *self.entries_in(slots)):
            key = stream.stream_id, None if entry is None else entry.slot
            if key not in self._noted:
                self._noted.add(key)
                for tensor in self.tables if entry is None else entry.factors[:1]:
                    tensor.record_stream(stream)

    # --- the next one -------------------------------------------------------------------------

    def _tables_there(self) -> SlotTables:
        """The tables, which the current stream may read from now on."""
        self.wait()
        return self.tables

    def with_entries(self, *entries: Entry) -> BankVersion:
        """This and adapters, each in a free slot or in the place of the one that has it."""
        by_slot = {entry.slot: entry for entry in entries}
        thresholds = {s: q for s, q in self.thresholds.items() if s not in by_slot}
        thresholds |= {s: q for s, entry in by_slot.items() if (q := entry.adapter.threshold)}
        rows = {slot: entry.rows for slot, entry in by_slot.items()}
        scalings = {slot: entry.adapter.scaling for slot, entry in by_slot.items()}
        tables = self._tables_there().with_adapters(rows, scalings)
        if thresholds != self.thresholds:
            tables = tables.with_thresholds(thresholds)
        bound = (each for entry in entries for each in entry.bound)
        return replace(
            self,
            tables=tables,
            thresholds=thresholds,
            by_slot=self.by_slot | by_slot,
            trains=self.trains or any(each.parameter.requires_grad for each in bound),
            widest=max([self.widest, *(entry.rank for entry in entries)]),
        )

    def without(self, slot: int) -> BankVersion:
        """This less an adapter."""
        tables, thresholds = self._tables_there().without(slot), self.thresholds
        if slot in thresholds:
            thresholds = {s: q for s, q in thresholds.items() if s != slot}
            tables = tables.with_thresholds(thresholds)
        entries, widest = dict(self.by_slot), self.widest
        if entries.pop(slot).rank == widest:
            widest = max((entry.rank for entry in entries.values()), default=0)
        return replace(self, tables=tables, by_slot=entries, thresholds=thresholds, widest=widest)

    def with_scaling(self, slot: int) -> BankVersion:
        """This with the scaling that an adapter has now."""
        scaling = self.by_slot[slot].adapter.scaling
        return replace(self, tables=self._tables_there().with_scaling(slot, scaling))

    def with_thresholds(self) -> BankVersion:
        """This with the dropout that its adapters have now."""
        now = {slot: q for slot, entry in self.by_slot.items() if (q := entry.adapter.threshold)}
        if now == self.thresholds:
            return self
        return replace(self, tables=self._tables_there().with_thresholds(now), thresholds=now)

    def with_capacity(self, slots: int) -> BankVersion:
        """This with tables of so many slots."""
        return replace(self, tables=self._tables_there().resized(slots))
