"""Names of adapters, the numbers by which tokens refer to them, and who may change what when.

Everything that batches read of a model's adapters is in one :class:`ModelVersion`, which is never
changed: whoever changes adapters prepares the next one, under a lock that readers do not take, and
publishes it with one assignment.
"""

from __future__ import annotations

import threading
import weakref
from bisect import insort
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_kernels.runtime.checks import check_count

if TYPE_CHECKING:
    from lora_kernels.ops.routed.bank.adapter import Adapter
    from lora_kernels.ops.routed.bank.bank import AdapterBank
    from lora_kernels.ops.routed.bank.versions import BankVersion

BASE = "__base__"


@dataclass(eq=False, repr=False)
class ModelVersion:
    """The adapters of the banks that share an :class:`AdapterSlots`, at one time."""

    names: dict[str, int]  # slots by name
    serials: dict[int, int]  # how often a slot has lost its meaning
    changes: int  # the sum of all serials
    edits: dict[int, int]  # how often the scaling or dropout in a slot was changed
    capacity: int  # how many slots there are
    holes: list[int]  # free slots below one that is taken, ascending
    settings: dict[str, Any]  # what was kept with a name, such as its configuration
    _banks: dict[int, BankVersion]
    number: int = 0  # of the version

    def slot_of(self, name: str) -> int:
        """The slot of ``name``; -1 for ``"__base__"``."""
        if name == BASE:
            return -1
        try:
            return self.names[name]
        except KeyError:
            raise KeyError(f"no adapter {name!r}; there are {sorted(self.names)}") from None

    def of(self, bank: AdapterBank) -> BankVersion | None:
        """What a bank holds; None if it was not there yet."""
        version = self._banks.get(id(bank))
        return version if version is not None and version.bank() is bank else None

    def adapter_of(self, bank: AdapterBank, name: str) -> Adapter | None:
        """A bank's adapter of that name; None where it has none."""
        slot, version = self.names.get(name), self.of(bank)
        entry = None if slot is None or version is None else version.entry(slot)
        return None if entry is None else entry.adapter

    def banks(self) -> list[BankVersion]:
        """Of all banks that are still there."""
        return [version for version in list(self._banks.values()) if version.bank() is not None]

    def has_layers(self, name: str) -> bool:
        """Whether any bank that is still there has an adapter of that name."""
        slot = self.names[name]
        return any(
            version.entry(slot) is not None and version.bank() is not None
            for version in tuple(self._banks.values())
        )

    def replace_in_place(self, bank: AdapterBank, version: BankVersion) -> None:
        """Let a bank's parameters lie elsewhere; nothing else of it is another."""
        self._banks[id(bank)] = version

    def drop(self, key: int) -> None:
        self._banks.pop(key, None)


class Pinned(NamedTuple):
    """Slots as a batch reads them from its start to its end."""

    slots: AdapterSlots
    version: ModelVersion


class Change:
    """What becomes of a version; published as a whole, or not at all."""

    def __init__(self, before: ModelVersion) -> None:
        self.before = before  # the version that it started from
        self.thread = threading.get_ident()  # no other one sees the change
        self._draft: ModelVersion | None = None
        self._banks: dict[int, BankVersion] = {}
        self._undo: list[Callable[[], object]] = []
        self._later: dict[AdapterBank, None] = {}
        self._changed: dict[AdapterBank, BankVersion] = {}

    @property
    def version(self) -> ModelVersion:
        """As it stands: the draft, if anything has changed."""
        return self._draft or self.before

    def draft(self) -> ModelVersion:
        """The next version, to be written to."""
        if self._draft is None:
            v = self.before
            alive = ((each.bank(), each) for each in v.banks())
            self._banks = {id(bank): each for bank, each in alive if bank is not None}
            self._draft = replace(
                v,
                names=dict(v.names),
                serials=dict(v.serials),
                edits=dict(v.edits),
                holes=list(v.holes),
                settings=dict(v.settings),
                _banks=self._banks,
                number=v.number + 1,
            )
        return self._draft

    def set_bank(self, bank: AdapterBank, version: BankVersion) -> None:
        """What a bank holds from now on."""
        if self.version.of(bank) is not version:
            self.draft()
            self._banks[id(bank)] = self._changed[bank] = version

    def on_undo(self, function: Callable[[], object]) -> None:
        """Call it if the change fails: what was done outside of the version."""
        self._undo.append(function)

    def refresh(self, bank: AdapterBank) -> None:
        """Look at the bank's dropout when the change ends."""
        self._later[bank] = None

    def finish(self) -> ModelVersion:
        for bank in self._later:
            if (version := self.version.of(bank)) is not None:
                self.set_bank(bank, version.with_thresholds())
        for version in self._changed.values():
            version.published()
        return self.version

    def revert(self) -> None:
        while self._undo:
            self._undo.pop()()
        self.tell_banks(self.before)

    def tell_banks(self, version: ModelVersion) -> None:
        """For graphs of ``torch.compile``: they cannot look a bank up."""
        for bank in self._changed:
            if (held := version.of(bank)) is not None:
                bank.traced_version = held


class AdapterSlots:
    """Gives each adapter's name a slot number; the banks of one model share one instance.

    A name keeps its slot until the last bank that holds it has removed it; then the slot is free
    for another name. :class:`Routing` works with slots, so that one routing serves every bank.

    It may be used from any thread. Changes of adapters wait for each other; calls that read them
    wait for nothing, and see all of a change or nothing of it.

    Args:
        capacity: how many slots there are to begin with. One name more doubles it.

    Attributes:
        current: what the next batch reads.

    Raises:
        TypeError, ValueError: capacity is no integer of at least 1.
    """

    def __init__(self, capacity: int = 64) -> None:
        check_count("capacity", capacity)
        self.current = ModelVersion({}, {}, 0, {}, capacity, [], {}, {})
        self.number_copied = 0  # of the version that this is a copy of
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.RLock()
        self._change: Change | None = None
        self._alive: dict[int, weakref.ref] = {}
        self._reserved: weakref.WeakSet = weakref.WeakSet()

    @property
    def capacity(self) -> int:
        """How many slots there are."""
        return self.latest.capacity

    @property
    def version(self) -> int:
        """A number that changes when slots get another meaning: a name was removed. Adding a name
        to a free slot changes nothing for others."""
        return self.latest.changes

    @property
    def latest(self) -> ModelVersion:
        """The current version; inside of a change of this thread's, what that has made of it."""
        change = self._change
        if change is not None and change.thread == threading.get_ident():
            return change.version
        return self.current

    def __getitem__(self, name: str) -> int:
        """The slot of ``name``; -1 for ``"__base__"``."""
        return self.latest.slot_of(name)

    def __contains__(self, name: object) -> bool:
        return name in self.latest.names

    def __len__(self) -> int:
        return len(self.latest.names)

    def __iter__(self) -> Iterator[str]:
        """The names in the order of their slots."""
        names = self.latest.names
        return iter(sorted(names, key=names.__getitem__))

    def is_live(self, slot: int) -> bool:
        """Whether the slot belongs to a name."""
        return slot in self.latest.names.values()

    def __repr__(self) -> str:
        names = self.latest.names
        return f"AdapterSlots({dict(sorted(names.items(), key=lambda item: item[1]))})"

    def __getstate__(self) -> dict:
        version = self.latest
        names = "names", "serials", "changes", "edits", "capacity", "holes", "settings", "number"
        return {name: getattr(version, name) for name in names}

    def __setstate__(self, state: dict) -> None:
        self.current = ModelVersion(**state, _banks={})
        self.number_copied = self.current.number
        self._begin()

    # --- changing -----------------------------------------------------------------------------

    @contextmanager
    def change(self) -> Iterator[Change]:
        """Change adapters: what is done inside is published together when the outermost such block
        ends, and undone if it raises, whatever and wherever."""
        around = self._change
        if around is not None and around.thread == threading.get_ident():
            yield around
            return
        change = published = None
        try:
            with self._lock:
                try:
                    change = self._change = Change(self.current)
                    yield change
                    published = change.finish()
                    self.current = published
                    change.tell_banks(published)
                    self._change = None
                except BaseException:  # before another thread has its turn
                    self._revert(change)
                    change = None
                    raise
        except BaseException:
            # Interrupted behind its end: whoever had a turn since has built on it, and it stays.
            with self._lock:
                if change is not None and self.current is published:
                    self._revert(change)
            raise

    def _revert(self, change: Change | None) -> None:
        self._change = None
        if change is not None:
            self.current = change.before
            change.revert()

    def alone(self) -> AbstractContextManager:
        """No other thread changes adapters inside."""
        return self._lock

    def join(self, bank: AdapterBank, version: BankVersion) -> None:
        """Count ``bank`` among those whose adapters keep their slots."""
        with self.change() as change:
            key, slots = id(bank), weakref.ref(self)

            def forget(_) -> None:
                own = slots()
                if own is not None:
                    own.current.drop(key)
                    own._alive.pop(key, None)

            self._alive[key] = weakref.ref(bank, forget)
            change.set_bank(bank, version)

    def acquire(self, name: str) -> int:
        """The slot of ``name``, a free one if it has none yet."""
        with self.change() as change:
            version = change.version
            if name in version.names:
                return version.names[name]
            version = change.draft()
            slot = version.holes.pop(0) if version.holes else len(version.names)
            if slot == version.capacity:
                self._double(change)
            version.names[name] = slot
            return slot

    def _double(self, change: Change) -> None:
        version = change.draft()
        version.capacity *= 2
        for each in version.banks():
            bank = each.bank()
            if bank is None:
                continue
            if each.reserved is not None:
                raise RuntimeError(
                    f"there are {version.capacity // 2} slots, all of them taken, and a bank that "
                    "captured CUDA graphs read has tables of that size; make AdapterSlots with a "
                    "larger capacity, or remove an adapter"
                )
            change.set_bank(bank, each.with_capacity(version.capacity))

    def release(self, name: str) -> None:
        """Free the slot of ``name`` unless a bank still holds an adapter of that name."""
        with self.change() as change:
            if name in change.version.names and not change.version.has_layers(name):
                self.forget(name)

    def forget(self, name: str) -> None:
        """Free the slot of a name whose banks are gone: routings that use it are out of date."""
        with self.change() as change:
            version = change.draft()
            slot = version.names.pop(name)
            version.settings.pop(name, None)
            insort(version.holes, slot)
            version.serials[slot] = version.serials.get(slot, 0) + 1
            version.changes += 1

    # --- captured graphs ----------------------------------------------------------------------

    def reserve_for(self, bank: AdapterBank) -> None:
        """A bank has tables for captured graphs: they are filled where routings are."""
        self._reserved.add(bank)

    def enter_reserved(self) -> None:
        """Let the tables that captured graphs read hold the current version, in the order of this
        thread's current stream."""
        if not self._reserved:
            return
        with self._lock:
            for bank in list(self._reserved):
                version = self.current.of(bank)
                if version is not None and version.reserved is not None:
                    version.reserved.enter(version)
