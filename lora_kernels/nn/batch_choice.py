"""What was said of a batch's adapters, and the routings made for it.

A :class:`Choice` is as somebody said it, and holds for any number of batches. A :class:`Batch` is
one of them: it reads one version of the model's adapters from its start to the end of its backward.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.nn.batch_rows import Forward, NamedRows, Row, Runs, runs_of
from lora_kernels.ops.routed import AdapterSlots, Routing
from lora_kernels.ops.routed.bank.slots import BASE, ModelVersion, Pinned
from lora_kernels.runtime.capture import is_captured, stream_of
from lora_kernels.runtime.checks import check_count

_KEPT = 64  # shapes of inputs that routings are kept for
_MANY = 1024  # those that one batch keeps


@dataclass(frozen=True)
class Place:
    """Where a layer is in its model, and what is known of its inputs from that."""

    name: str = ""
    axis: int | None = None  # the batch's, where the architecture is known; None: the user's word
    apart: str | None = None  # the part around it whose rows are not the text's (images, sounds)


class Part:
    """What was said of some of a model's layers: one of ``every_row``, ``rows`` and ``routing``."""

    def __init__(self, what: str, said: object, slots: AdapterSlots) -> None:
        self.every_row: Row | None = None  # the adapters of all tokens, whatever their rows
        self.rows: tuple[Row, ...] = ()  # those of each sequence
        self.routing = said if isinstance(said, Routing) else None
        self.what, self.names = what, frozenset()  # all that are named, but for the base
        if isinstance(said, Routing):
            if said.slots is not slots:
                raise ValueError(f"{what}: expected a routing of this model's slots, got another")
            if said.device.type == "cpu":
                said.plan()  # now, for a compiled model could not
            return
        if isinstance(said, (str, Mapping)):
            self.every_row = _row(what, said)
            rows = (self.every_row,)
        elif isinstance(said, Tensor) or not isinstance(said, Sequence):
            raise TypeError(
                f"{what}: expected a name, a list of names or a Routing, got {type(said).__name__}"
            )
        elif not said:
            raise ValueError(f"{what}: expected at least one name, got none")
        else:
            self.rows = rows = tuple(_row(what, each) for each in said)
        self.names = frozenset(name for row in rows for name, _ in _pairs(row))

    def check_names(self, version: ModelVersion, gone: str) -> None:
        for name in self.names:
            if name not in version.names:
                known = sorted(version.names, key=version.names.__getitem__)
                raise ValueError(
                    f"{self.what}: expected {BASE!r} or one of {known}, got {name!r}{gone}"
                )
            if not version.has_layers(name):
                raise ValueError(f"{self.what}: no layer of the model has an adapter {name!r}")


def _row(what: str, said: object) -> Row:
    """A row as it was said, one name or weights by name, checked."""
    if isinstance(said, str):
        return said
    if not isinstance(said, Mapping):
        raise TypeError(f"{what}: expected names, got a {type(said).__name__}")
    for name, weight in said.items():
        if not isinstance(name, str):
            raise TypeError(f"{what}: expected names, got a {type(name).__name__}")
        if name == BASE:
            raise ValueError(f"{what}: {BASE!r} has no weight; leave it out")
        if isinstance(weight, bool) or not isinstance(weight, Real):
            raise TypeError(
                f"{what}: expected a number for {name!r}, got a {type(weight).__name__}"
            )
        largest = torch.finfo(torch.float32).max  # which they are kept in
        if not abs(weight) <= largest:  # pyright: ignore[reportOperatorIssue] (a Real has an order)
            raise ValueError(f"{what}: expected a finite number for {name!r}, got {weight}")
    return tuple((name, float(weight)) for name, weight in said.items())


def _pairs(row: Row) -> tuple[tuple[str, float], ...]:
    """Adapters and weights of a row."""
    if isinstance(row, str):
        return () if row == BASE else ((row, 1.0),)
    return row


class Choice:
    """What was said, as :meth:`ActiveAdapters.use` takes it."""

    def __init__(
        self,
        adapters: object,
        slots: AdapterSlots,
        beams: int = 1,
        stacked: int = 1,
        rows: Mapping[str, object] | None = None,
    ) -> None:
        check_count("beams", beams)
        check_count("stacked", stacked)
        rows = {} if rows is None else rows
        if not isinstance(rows, Mapping):
            raise TypeError(f"rows: expected names by module, got {type(rows).__name__}")
        self.slots, self.beams, self.stacked = slots, int(beams), int(stacked)
        self._said = adapters
        self.main = Part("adapters", adapters, slots)  # for all layers that no other part names
        self._parts = {
            prefix: Part(f"rows[{prefix!r}]", said, slots) for prefix, said in rows.items()
        }
        # Whether it takes the rows of a forward to tell whose they are.
        self.asks_for_rows = any(part.rows for part in self.parts())
        self.base_alone = all(part.routing is None and not part.names for part in self.parts())
        self._checked: Callable[[], ModelVersion | None] = lambda: None
        self.check(slots.latest, gone="")
        # Filled once, whatever version reads them; and what a recomputation finds again.
        self._routings: dict[tuple[Runs, torch.device, int], Routing] = {}
        self._computed: dict[tuple, list[tuple[Runs, weakref.ref[ModelVersion]]]] = {}

    def __repr__(self) -> str:
        return repr(self._said)

    def check(self, version: ModelVersion, gone: str = " (it was removed)") -> None:
        """Raise where a name is no adapter's in a version, or no layer has it."""
        if self._checked() is not version:
            for part in self.parts():
                part.check_names(version, gone)
            self._checked = weakref.ref(version)

    def parts(self) -> Iterator[Part]:
        yield self.main
        yield from self._parts.values()

    def part_for(self, place: Place) -> Part:
        """What was said of a layer: the longest name in front of its own decides."""
        if not self._parts:
            return self.main
        prefix = place.name
        while prefix:
            if prefix in self._parts:
                return self._parts[prefix]
            prefix = prefix.rpartition(".")[0]
        return self.main

    def routing_of(self, runs: Runs, device: torch.device, version: ModelVersion) -> Routing:
        """The routing of tokens by names, for batches that read that version."""
        key = runs, device, stream_of(device)
        routing = self._routings.get(key)
        if routing is not None:
            try:
                return routing.at(version)
            except ValueError:  # its slots are other adapters'
                pass
        with torch.inference_mode(False):  # a training step may follow
            routing = _routing(runs, Pinned(self.slots, version), device)
        kept = list(self._routings.items())[1 - _KEPT :]
        unpinned = copy.copy(routing)
        unpinned.pinned = None  # or what is kept would keep removed adapters alive
        self._routings = dict([*kept, (key, unpinned)])
        return routing

    def remember(self, given: tuple, runs: Runs, version: ModelVersion) -> None:
        """What a forward computed from such an input."""
        found = self._computed.get(given, [])
        if not any(old == runs and ref() is version for old, ref in found):
            found = [*((old, ref) for old, ref in found if ref() is not None)]
            kept = list(self._computed.items())[1 - _KEPT :]
            entry = given, [*found, (runs, weakref.ref(version))]
            self._computed = dict([*(each for each in kept if each[0] != given), entry])

    def computed(self, given: tuple) -> list[tuple[Runs, ModelVersion]]:
        """What forwards computed from such an input, as far as it is known."""
        found = ((runs, ref()) for runs, ref in self._computed.get(given, ()))
        return [(runs, version) for runs, version in found if version is not None]

    def means(self, version: ModelVersion) -> tuple:
        """What it stands for in a version: equal where two compute the same."""
        names = sorted({name for part in self.parts() for name in part.names})
        slots = [version.names.get(name, -1) for name in names]
        times = [(version.serials.get(slot, 0), version.edits.get(slot, 0)) for slot in slots]
        return (
            tuple(zip(names, slots, times, strict=True)),
            tuple((part.what, part.every_row, part.rows) for part in self.parts()),
            tuple(id(part.routing) for part in self.parts()),
        )


def _routing(runs: Runs, slots: Pinned, device: torch.device) -> Routing:
    names = [row for row in runs.names if isinstance(row, str)]
    if len(names) == len(runs.names):
        return Routing.from_sequences(names, runs.length, slots, device=device)
    rows = [_pairs(row) for row in runs.names]
    count = max(1, *map(len, rows))
    ids = torch.full((len(rows), count), -1, device="cpu")
    weights = torch.zeros(len(rows), count, device="cpu")
    for index, row in enumerate(rows):
        for place, (name, weight) in enumerate(row):
            ids[index, place], weights[index, place] = slots.version.slot_of(name), weight
    tokens = torch.arange(len(rows), device="cpu").repeat_interleave(runs.length)
    return Routing.from_weighted(ids[tokens], weights[tokens], slots, device=device)


class Generation(NamedTuple):
    """What a running ``generate`` has made of its batch so far."""

    rows: int | None = None
    times: int = 1
    expanded: bool = False


class Batch:
    """One batch: what was said of it, the version that it reads, and the calls it is in.

    Making one raises ValueError where a name is no adapter's any more, or no layer has it.
    """

    def __init__(self, choice: Choice, version: ModelVersion) -> None:
        choice.check(version)
        self.choice, self.version = choice, version
        self.generation: Generation | None = None  # the innermost ``generate`` that runs
        self._found: dict[tuple, Routing] = {}  # by all that decides them
        self._computed: dict[tuple, set[Runs]] = {}  # by the input: a recomputation has no forward
        self._made: dict[tuple[Runs, torch.device, int], Routing] = {}
        self._given: dict[Routing, tuple[int, Routing]] = {}  # which filling, and for this version

    def expand(self, rows: int | None, times: int) -> None:
        """The running ``generate`` repeats each of so many rows, so many times."""
        before = self.generation
        if before is None:
            return
        if before.expanded and before.rows != rows:
            raise ValueError(
                f"generate: its batch had {before.rows} rows and now has {rows}; names hold for "
                "the rows that were there first, so generate with batches of one name each"
            )
        self.generation = Generation(rows, times, expanded=True)

    def routing_given(self, given: Routing) -> Routing:
        """A routing that was said, as it is filled now, for this version."""
        filling, (known, routing) = given.filling, self._given.get(given, (None, given))
        if filling != known:
            routing = given.at(self.version)
            self._given[given] = filling, routing
        return routing

    def routing_for(
        self, part: Part, x: Tensor, axis: int, forward: Forward | None, in_backward: bool
    ) -> Routing:
        """The routing of a layer's input for the names of a part, one object for all layers.

        forward: the one of the whole model that the layer is called in.

        Raises:
            RuntimeError: a CUDA graph is captured, which would outlive the routing.
        """
        if is_captured(x.device):
            raise RuntimeError(
                "adapters that are named are looked up on the host, and cannot be captured in a "
                "CUDA graph; use `with routed.adapters(routing):`, with a Routing that is filled "
                "before each replay"
            )
        forward = forward if part is self.choice.main else None
        given, key = (x.shape[:-1], x.device, part, axis), None
        if in_backward and forward is None:
            runs, version = self._recomputed(given)
            if version is not self.version:
                return self.choice.routing_of(runs, x.device, version)
        else:
            key = (*given, forward, self.generation, stream_of(x.device))
            if (routing := self._found.get(key)) is not None:
                return routing
            # In a `with` that stays open, layers called by themselves.
            if len(self._found) >= _MANY:
                self._found, self._computed, self._made = {}, {}, {}
            runs = self._runs(part, x, axis, forward)
            self._computed.setdefault(given, set()).add(runs)
            self.choice.remember(given, runs, self.version)
        made = runs, x.device, stream_of(x.device)
        routing = self._made.get(made)
        if routing is None:
            routing = self.choice.routing_of(runs, x.device, self.version)
            self._made[made] = routing
        if key is not None:
            self._found[key] = routing
        return routing

    def _runs(self, part: Part, x: Tensor, axis: int, forward: Forward | None) -> Runs:
        if part.every_row is not None:
            return Runs((part.every_row,), x.shape[:-1].numel())
        if part is not self.choice.main and x.ndim == 2:  # patches may be packed: a row each
            return runs_of(x.shape, NamedRows(part.rows), axis)
        times = 1 if self.generation is None else self.generation.times
        beams = frozenset({1, self.choice.beams, times, self.choice.beams * times})
        return runs_of(x.shape, NamedRows(part.rows, beams, self.choice.stacked), axis, forward)

    def has_computed(self, part: Part, x: Tensor, axis: int) -> bool:
        """Whether a forward of this batch had such an input."""
        return (x.shape[:-1], x.device, part, axis) in self._computed

    def _recomputed(self, given: tuple) -> tuple[Runs, ModelVersion]:
        """What the forward found for the same input, of which checkpointing kept nothing else."""
        found = [(runs, self.version) for runs in self._computed.get(given, ())]
        found = found or self.choice.computed(given)
        shape = list(given[0])
        if len({(runs, self.choice.means(version)) for runs, version in found}) == 1:
            return found[-1]
        if found:
            raise RuntimeError(
                f"checkpointed activations {[*shape, 'K']} are computed again for a backward, and "
                "such inputs had different adapters; use `routed.batch(names)` for the forward, or "
                "a `with` for each forward and its backward"
            )
        raise RuntimeError(
            f"checkpointed activations {[*shape, 'K']} are computed again for a backward, and were "
            "not computed inside of this `with ...adapters(...)`; call backward() inside of the "
            "one that the forward ran in, or use `routed.batch(names)` for the forward"
        )
