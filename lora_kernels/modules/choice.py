"""One choice of adapters, as it was said, and the routings made for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.modules.batch_rows import Forward, NamedRows, Runs, forward_of, runs_of
from lora_kernels.ops.routed_lora import AdapterSlots, Routing
from lora_kernels.ops.routed_lora.slots import BASE


@dataclass(frozen=True)
class Place:
    """Where a layer is in its model, and what is known of its inputs from that.

    Attributes:
        name: the layer's.
        axis: that of the batch, where the architecture is known; None is as the user says.
        apart: the part of the model around it whose rows are not the text's (images, sounds).
    """

    name: str = ""
    axis: int | None = None
    apart: str | None = None


class Part:
    """What was said of some of a model's layers: one of the three is not None.

    Attributes:
        every_row: the one name of all tokens, whatever their rows.
        names: one per sequence.
        routing: that of the tokens.
    """

    def __init__(self, what: str, said: object, slots: AdapterSlots) -> None:
        self.every_row = said if isinstance(said, str) else None
        self.routing = said if isinstance(said, Routing) else None
        self.names: tuple[str, ...] | None = None
        if self.routing is not None:
            if said.slots is not slots:
                raise ValueError(f"{what}: expected a routing of this model's slots, got another")
            if said.device.type == "cpu":
                said.plan()  # now, for a compiled model could not
            return
        names = [said] if isinstance(said, str) else said
        if isinstance(names, Tensor) or not isinstance(names, Sequence):
            raise TypeError(
                f"{what}: expected a name, a list of names or a Routing, got {type(said).__name__}"
            )
        if not names:
            raise ValueError(f"{what}: expected at least one name, got none")
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"{what}: expected names, got a {type(name).__name__}")
            if name != BASE and name not in slots:
                raise ValueError(f"{what}: expected {BASE!r} or one of {list(slots)}, got {name!r}")
        if self.every_row is None:
            self.names = tuple(names)


class Generation(NamedTuple):
    """What a running ``generate`` has made of its batch so far."""

    rows: int | None = None
    times: int = 1
    expanded: bool = False


class Choice:
    """What was said for one batch, and what is known of the calls that it is used in.

    Attributes:
        main: what holds for all layers that no other part names.
        generation: the running ``generate``, the innermost; None outside.
    """

    def __init__(
        self,
        adapters: object,
        slots: AdapterSlots,
        beams: int = 1,
        stacked: int = 1,
        rows: Mapping[str, object] = {},
    ) -> None:
        for what, count in (("beams", beams), ("stacked", stacked)):
            if isinstance(count, bool) or not isinstance(count, Integral):
                raise TypeError(f"{what}: expected an integer, got {type(count).__name__}")
            if count < 1:
                raise ValueError(f"{what}: expected at least 1, got {count}")
        if not isinstance(rows, Mapping):
            raise TypeError(f"rows: expected names by module, got {type(rows).__name__}")
        self.slots, self.beams, self.stacked = slots, int(beams), int(stacked)
        self.main = Part("adapters", adapters, slots)
        self._parts = {
            prefix: Part(f"rows[{prefix!r}]", said, slots) for prefix, said in rows.items()
        }
        parts = (self.main, *self._parts.values())
        self.asks_for_rows = any(part.names is not None for part in parts)
        self._forwards: list[Forward | None] = []  # of the whole model, the innermost last
        self.generation: Generation | None = None
        # Runs by all that decides them, and by the input alone (a recomputation has no forward).
        self._found: dict[tuple, Runs] = {}
        self._computed: dict[tuple, set[Runs]] = {}
        self._made: dict[tuple[Runs, torch.device], Routing] = {}

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

    def begin_forward(self, args: Sequence[Any], kwargs: Mapping[str, Any], axis: int) -> None:
        self._forwards.append(forward_of(args, kwargs, axis))

    def end_forward(self) -> None:
        if self._forwards:
            self._forwards.pop()

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

    def routing_for(self, part: Part, x: Tensor, axis: int, in_backward: bool) -> Routing:
        """The routing of a layer's input for the names of a part, one object for all layers."""
        forward = self._forwards[-1] if self._forwards and part is self.main else None
        given = (x.shape[:-1], x.device, part, axis)
        if in_backward and forward is None:
            runs = self._recomputed(given)
        else:
            key = (*given, forward, self.generation)
            runs = self._found.get(key)
            if runs is None:
                runs = self._found[key] = self._runs(part, x, axis, forward)
                self._computed.setdefault(given, set()).add(runs)
        routing = self._made.get((runs, x.device))
        if routing is None or routing.version != self.slots.version:
            with torch.inference_mode(False):  # a training step may follow in the same choice
                routing = Routing.from_sequences(
                    runs.names, runs.length, self.slots, device=x.device
                )
            self._made[runs, x.device] = routing
        return routing

    def _runs(self, part: Part, x: Tensor, axis: int, forward: Forward | None) -> Runs:
        if part.every_row is not None:
            return Runs((part.every_row,), x.shape[:-1].numel())
        if part is not self.main and x.ndim == 2:  # patches may be packed: no more than rows each
            return runs_of(x.shape, NamedRows(part.names), axis)
        times = 1 if self.generation is None else self.generation.times
        beams = frozenset({1, self.beams, times, self.beams * times})
        return runs_of(x.shape, NamedRows(part.names, beams, self.stacked), axis, forward)

    def _recomputed(self, given: tuple) -> Runs:
        """What the forward found for the same input, of which checkpointing kept nothing else."""
        found = self._computed.get(given, ())
        if len(found) == 1:
            return next(iter(found))
        shape = list(given[0])
        if found:
            raise RuntimeError(
                f"checkpointed activations {[*shape, 'K']} are computed again for a backward, and "
                "inside of this `with ...adapters(...)` such inputs had different adapters; use a "
                "`with` for each forward and its backward"
            )
        raise RuntimeError(
            f"checkpointed activations {[*shape, 'K']} are computed again for a backward, and were "
            "not computed inside of this `with ...adapters(...)`; call backward() inside of the "
            "one that the forward ran in"
        )
