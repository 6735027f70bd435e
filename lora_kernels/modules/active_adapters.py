"""``ActiveAdapters``: which adapters a batch uses, told once for all layers of a model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from lora_kernels.modules.choice import Choice, Generation, Part, Place
from lora_kernels.ops.routed_lora import AdapterSlots, Routing
from lora_kernels.ops.routed_lora.slots import BASE

# What this thread or task has entered, of any model.
_entered: ContextVar[tuple[Choice, ...]] = ContextVar("entered", default=())


_ANYWHERE = Place()


class ActiveAdapters:
    """Hands the layers of one model the :class:`Routing` of the batch at hand.

    Inside ``with active.use(names):`` every layer that shares this object sees the same choice. A
    routing is built for each shape of input that comes by, and serves all layers; outside, a layer
    raises as soon as there are adapters, instead of computing the base model in silence.

    It belongs to one thread or asyncio task at a time. The threads in which autograd runs a
    backward see its choice too, so that activation checkpointing recomputes inside of ``with`` what
    it computed there before.

    Args:
        slots: those of the layers' banks.
        batch_dim: the axis of the layers' inputs that is the batch's, 0 or 1.
    """

    def __init__(self, slots: AdapterSlots, batch_dim: int = 0) -> None:
        if not isinstance(slots, AdapterSlots):
            raise TypeError(f"slots: expected AdapterSlots, got {type(slots).__name__}")
        if type(batch_dim) is not int or batch_dim not in (0, 1):
            raise ValueError(f"batch_dim: expected 0 or 1, got {batch_dim!r}")
        self.slots, self.batch_dim = slots, batch_dim
        self._forget()

    @contextmanager
    def use(
        self,
        adapters: str | Sequence[str] | Routing,
        *,
        beams: int = 1,
        stacked: int = 1,
        rows: Mapping[str, str | Sequence[str] | Routing] | None = None,
    ) -> Iterator[None]:
        """Set the adapters of the batches that are computed inside.

        Args:
            adapters: one name for all tokens, or a list with one name per sequence
                (``"__base__"`` for none), or a routing of the tokens.
            beams: how many neighbouring rows each name may have: a batch has n rows for n names,
                or n * beams.
            stacked: how often the whole batch may be repeated: n * stacked rows, or with beams
                n * beams * stacked.
            rows: instead of ``adapters`` for the layers of some modules, by their name.

        Raises:
            ValueError: a name is not an adapter's, or there is none; beams or stacked is below 1.
            TypeError: adapters or a value in rows is none of the three.
            RuntimeError: another thread or task is inside.
        """
        choice = Choice(adapters, self.slots, beams, stacked, rows or {})
        with self._lock:
            self._check_caller()
            self._choices.append(choice)
        _entered.set((*_entered.get(), choice))
        try:
            yield
        finally:
            _entered.set(tuple(other for other in _entered.get() if other is not choice))
            with self._lock:
                self._choices = [other for other in self._choices if other is not choice]

    def routing_for(self, x: Tensor, place: Place = _ANYWHERE) -> Routing | None:
        """The routing for a layer's input ``[..., K]``; None where there are no adapters at all.

        Args:
            x: the input.
            place: where the layer is.

        Raises:
            RuntimeError: there are adapters, and nobody has said which ones to use.
            ValueError: x's rows are not those of the names, or nothing is said of the layer's.
        """
        if not self._choices:
            if not len(self.slots):
                return None
            raise RuntimeError(
                f"the model has adapters {list(self.slots)} and nothing says which of them to use; "
                "call it inside of `with routed.adapters(names):`, with one name per sequence "
                f"({BASE!r} for none), and call backward() in there too if activations are "
                "checkpointed"
            )
        choice = self._choices[-1]
        part = choice.part_for(place)
        if part is choice.main and place.apart is not None and part.every_row is None:
            raise ValueError(
                f"{place.name}: its rows are not those of the text; say whose they are with "
                f"adapters(..., rows={{{place.apart!r}: ...}}): one name, a list of them, or a "
                "Routing over its tokens"
            )
        if part.routing is not None:
            if not torch.compiler.is_compiling() and not _in_backward():
                self._check_caller()
            return part.routing
        return _outside_of_graphs(self._routing_by_names, choice, part, x, place)

    def _routing_by_names(self, choice: Choice, part: Part, x: Tensor, place: Place) -> Routing:
        in_backward = _in_backward()
        if not in_backward:
            self._check_caller()
        if place.axis == 1 and self.batch_dim == 0 and part.names is not None:
            raise ValueError(
                f"{place.name}: this architecture computes [tokens, batch, features] there; pass "
                "batch_dim=1 to route, or one name or a Routing to adapters"
            )
        axis = self.batch_dim if place.axis is None else place.axis
        return choice.routing_for(part, x, axis, in_backward)

    def _check_caller(self) -> None:
        if self._choices and self._choices[-1] not in _entered.get():
            raise RuntimeError(
                "another thread or task is inside of this model's `with ...adapters(...)`; its "
                "choice of adapters is not the caller's, and one batch is computed at a time"
            )

    # --- what the model's own calls tell ------------------------------------------------------

    def begin_forward(self, args: Sequence[Any], kwargs: Mapping[str, Any], axis: int) -> None:
        """A forward of the whole model begins, the batch on that axis of its inputs."""
        if self._choices and self._choices[-1].asks_for_rows:
            _outside_of_graphs(self._begin_forward, args, kwargs, axis)

    def _begin_forward(self, args: Sequence[Any], kwargs: Mapping[str, Any], axis: int) -> None:
        if (choice := self._callers_choice()) is not None:
            choice.begin_forward(args, kwargs, axis)

    def end_forward(self) -> None:
        """What was known of the forward that ends holds no longer."""
        if self._choices and self._choices[-1].asks_for_rows:
            _outside_of_graphs(self._end_forward)

    def _end_forward(self) -> None:
        if (choice := self._callers_choice()) is not None:
            choice.end_forward()

    @contextmanager
    def generation(self) -> Iterator[None]:
        """A ``generate`` of the model, which says by :meth:`expand` how many beams there are."""
        choice = self._callers_choice()
        if choice is None:
            yield
            return
        before, choice.generation = choice.generation, Generation()
        try:
            yield
        finally:
            choice.generation = before

    def expand(self, rows: int | None, times: int) -> None:
        """The running ``generate`` repeats each of so many rows, so many times.

        Raises:
            ValueError: it did before, when there were other rows.
        """
        if (choice := self._callers_choice()) is not None:
            choice.expand(rows, times)

    def _callers_choice(self) -> Choice | None:
        """The innermost choice, if it is this thread's."""
        choices = self._choices
        if choices and (choices[-1] in _entered.get() or _in_backward()):
            return choices[-1]
        return None

    def _forget(self) -> None:
        self._choices: list[Choice] = []
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {"slots": self.slots, "batch_dim": self.batch_dim}

    def __setstate__(self, state: dict) -> None:
        self.slots, self.batch_dim = state["slots"], state.get("batch_dim", 0)
        self._forget()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _outside_of_graphs(function: Callable, *args: Any) -> Any:
    """Names are looked up by every call: they break a compiled graph."""
    if torch.compiler.is_compiling():
        return _undisturbed(function, *args)
    return function(*args)


@torch._disable_dynamo
def _undisturbed(function: Callable, *args: Any) -> Any:
    return function(*args)
