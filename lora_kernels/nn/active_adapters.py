"""``ActiveAdapters``: which adapters a batch uses, told once for all layers of a model."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import AsyncGeneratorType, CoroutineType, FrameType, GeneratorType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.nn.batch_choice import Batch, Choice, Generation, Part, Place
from lora_kernels.nn.batch_rows import Forward, forward_of
from lora_kernels.nn.recomputation import in_a_backward, mark, recomputed
from lora_kernels.ops.routed import AdapterSlots, Routing
from lora_kernels.ops.routed.bank.slots import BASE

_ANYWHERE = Place()
_LATER = (GeneratorType, CoroutineType, AsyncGeneratorType)  # they compute when asked for more
_SUSPENDS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


class _Use:
    """A choice that has been entered, by a ``with`` or by the call of a handle."""

    def __init__(self, active: ActiveAdapters, choice: Choice) -> None:
        self.active, self.choice = active, choice
        self.is_open = False
        self.frame: FrameType | None = None  # of the generator that entered it
        self._batch_outside: Batch | None = None

    def batch_outside_forwards(self) -> Batch:
        """The batch of layers that are called outside of a forward of their model."""
        version = self.active.slots.current
        batch = self._batch_outside
        if batch is None or batch.version is not version:
            batch = self._batch_outside = Batch(self.choice, version)
        return batch

    def __enter__(self) -> None:
        # A generator may stop in the midst, and others run: then it is theirs no more.
        self.frame = _generator_around(sys._getframe(1))
        if self.frame is None:
            # Others may have been closed by another thread or task, which does not reach these.
            _uses.set((*(use for use in _uses.get() if use.is_open), self))
        self.is_open = True
        self.active.note(self)

    def __exit__(self, *error: object) -> None:
        self.is_open, self.frame, self._batch_outside = False, None, None
        _uses.set(tuple(use for use in _uses.get() if use is not self))
        # A forward that was interrupted (KeyboardInterrupt) calls no hook at its end.
        _runs.set(tuple(run for run in _runs.get() if run.use is not self))
        self.active.note()


class _Run(NamedTuple):
    """A call that a batch is computed in; None where nothing was said of it."""

    active: ActiveAdapters
    use: _Use | None
    batch: Batch | None
    is_forward: bool = False  # of the whole model; else it is a handle's or ``generate``
    forward: Forward | None = None  # what is known of it


# What this thread or task has entered, and what it is computing, of any model; innermost last.
_uses: ContextVar[tuple[_Use, ...]] = ContextVar("uses", default=())
_runs: ContextVar[tuple[_Run, ...]] = ContextVar("runs", default=())


class ActiveAdapters:
    """Hands the layers of one model the :class:`Routing` of the batch at hand.

    Inside ``with active.use(names):`` every layer that shares this object sees the same choice, in
    this thread or task. A routing is built for each shape of input that comes by, and serves all
    layers; outside, a layer raises as soon as there are adapters, instead of computing the base
    model in silence.

    Args:
        slots: those of the layers' banks.
        batch_dim: the axis of the layers' inputs that is the batch's, 0 or 1.
    """

    backend = "auto"  # of the layers' calls

    def __init__(self, slots: AdapterSlots, batch_dim: int = 0) -> None:
        if not isinstance(slots, AdapterSlots):
            raise TypeError(f"slots: expected AdapterSlots, got {type(slots).__name__}")
        if type(batch_dim) is not int or batch_dim not in (0, 1):
            raise ValueError(f"batch_dim: expected 0 or 1, got {batch_dim!r}")
        self.slots, self.batch_dim = slots, batch_dim
        self._forget()

    def use(
        self,
        adapters: str | Mapping[str, float] | Sequence[str | Mapping[str, float]] | Routing,
        *,
        beams: int = 1,
        stacked: int = 1,
        rows: Mapping[str, Any] | None = None,
    ) -> _Use:
        """A context: the adapters of the batches that are computed inside.

        In the frame of a generator it holds while that frame runs, and not while it is suspended.

        Args:
            adapters, beams, stacked, rows: as names and the others for
                :meth:`lora_kernels.integrations.routed.RoutedModel.adapters`.

        Raises:
            ValueError: a name is not an adapter's, or there is none; beams or stacked is below 1.
            TypeError: adapters or a value in rows is none of these.
        """
        return self.using(Choice(adapters, self.slots, beams, stacked, rows))

    def using(self, choice: Choice) -> _Use:
        """:meth:`use` of a choice that was made before."""
        return _Use(self, choice)

    def call(self, choice: Choice, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Call a function as one batch."""
        use = _Use(self, choice)
        with use:
            batch = Batch(choice, self.slots.current)
            with _running(_Run(self, use, batch)):
                result = function(*args, **kwargs)
            if (
                inspect.isgenerator(result)
                or inspect.iscoroutine(result)
                or inspect.isasyncgen(result)
            ):
                raise TypeError(
                    f"call: expected a function that has computed when it returns, got a "
                    f"{type(result).__name__}; call the handle inside of it"
                )
            mark(result, self, batch)
        return result

    # --- what layers ask ----------------------------------------------------------------------

    def routing_for(self, x: Tensor, place: Place = _ANYWHERE) -> Routing | None:
        """The routing for a layer's input ``[..., K]``; None where there are no adapters at all.

        Args:
            x: the input.
            place: where the layer is.

        Raises:
            RuntimeError: there are adapters, and nobody has said which ones to use.
            ValueError: x's rows are not those of the names, or nothing is said of the layer's.
        """
        # A generator's may be one that does not run now: a graph cannot see that.
        if torch.compiler.is_compiling() and len(self._open) == 1 and not self._suspending:
            part = self._part(self._open[0].choice, place)
            if part.routing is not None:
                return part.routing
        return _outside_of_graphs(self._routing_for, x, place)

    def _routing_for(self, x: Tensor, place: Place) -> Routing | None:
        in_backward = in_a_backward()
        runs, uses = _runs.get(), _uses.get()
        if runs and uses and runs[-1].use is uses[-1] and not in_backward and not self._suspending:
            run = runs[-1]  # nearly always: a layer in a forward of its model
            if run.active is self and run.batch is not None and uses[-1].is_open:
                return self._routing_in(run.batch, x, place, run.forward, False)
        batches = self._recomputed_batches() if in_backward else _listed(self._batch())
        if not batches:
            if not len(self.slots):
                return None
            raise RuntimeError(self._nothing_said())
        axis = self.batch_dim if place.axis is None else place.axis
        batch = batches[0]
        if len(batches) > 1:  # of equal adapters: whose input it was
            known = (b for b in batches if b.has_computed(b.choice.part_for(place), x, axis))
            batch = next(known, batch)
        forward = next((run.forward for run in reversed(_runs.get()) if run.batch is batch), None)
        return self._routing_in(batch, x, place, forward, in_backward)

    def _routing_in(
        self, batch: Batch, x: Tensor, place: Place, forward: Forward | None, in_backward: bool
    ) -> Routing:
        part = self._part(batch.choice, place)
        if part.routing is not None:
            return batch.routing_given(part.routing)
        if place.axis == 1 and self.batch_dim == 0 and part.rows:
            raise ValueError(
                f"{place.name}: this architecture computes [tokens, batch, features] there; pass "
                "batch_dim=1 to route, or one name or a Routing to adapters"
            )
        axis = self.batch_dim if place.axis is None else place.axis
        return batch.routing_for(part, x, axis, forward, in_backward)

    def _part(self, choice: Choice, place: Place) -> Part:
        part = choice.part_for(place)
        if part is choice.main and place.apart is not None and part.every_row is None:
            raise ValueError(
                f"{place.name}: its rows are not those of the text; say whose they are with "
                f"adapters(..., rows={{{place.apart!r}: ...}}): one name, a list of them, or a "
                "Routing over its tokens"
            )
        return part

    def uses_the_base_alone(self) -> bool:
        """Whether the choice at hand names no adapter."""
        use = self._use()
        return use is not None and use.choice.base_alone

    # --- whose choice it is -------------------------------------------------------------------

    def _use(self) -> _Use | None:
        """The innermost use that the caller is inside of."""
        own = [use for use in _uses.get() if use.active is self and use.is_open]
        if self._suspending:  # by frames: a generator's holds while it runs, in whatever thread
            frames = {id(use.frame): use for use in self._suspending}  # of each the innermost
            frame = sys._getframe(1)
            while frame is not None:
                if id(frame) in frames:
                    return frames[id(frame)]
                frame = frame.f_back
        return own[-1] if own else None

    def _batch(self) -> Batch | None:
        """The batch that the caller is computing."""
        use = self._use()
        if use is None:
            return None
        for run in reversed(_runs.get()):
            if run.use is use:
                return run.batch
        return use.batch_outside_forwards()

    def _recomputed_batches(self) -> list[Batch]:
        """The batches of which a backward may be computing something again."""
        found = recomputed(self)
        if len({batch.choice.means(batch.version) for batch in found}) > 1:
            raise RuntimeError(
                "checkpointed activations are computed again for a backward of batches with "
                "different adapters; call backward() for each of them"
            )
        if found:
            return found
        batch = self._batch()
        if batch is None and len(self._open) == 1:
            batch = self._open[0].batch_outside_forwards()
        return _listed(batch)

    def _nothing_said(self) -> str:
        names = list(self.slots)
        if self._suspending:
            return (
                f"the model has adapters {names}; the `with routed.adapters(...)` that is open was "
                "entered by a generator that does not run now, and holds inside of it alone: use "
                "`routed.batch(names)`, whose calls take their adapters along"
            )
        return (
            f"the model has adapters {names} and nothing says which of them to use; call it inside "
            f"of `with routed.adapters(names):`, with one name per sequence ({BASE!r} for none), "
            "or as `routed.batch(names)(...)`; if activations are checkpointed, call backward() "
            "in there too"
        )

    @contextmanager
    def nobody_inside(self) -> Iterator[None]:
        """Raise if somebody is inside of a use; who comes now has to wait."""
        with self._lock:
            if self._open:
                raise RuntimeError(
                    "undo: a batch is being computed, or a `with ...adapters(...)` is open; call "
                    "it when there is none"
                )
            yield

    def note(self, *opened: _Use) -> None:
        """Sort the uses after one was opened, or closed."""
        with self._lock:
            self._times_sorted += 1
            times = None
            while times != self._times_sorted:  # the garbage collector has closed a generator's
                times = self._times_sorted
                others = (use for use in self._open if use not in opened)
                self._open = tuple(use for use in (*others, *opened) if use.is_open)
                self._suspending = tuple(use for use in self._open if use.frame is not None)

    # --- what the model's own calls tell ------------------------------------------------------

    def begin_forward(self, args: Sequence[Any], kwargs: Mapping[str, Any], axis: int) -> None:
        """A forward of the whole model begins, the batch on that axis of its inputs."""
        if not self._is_traced():
            _outside_of_graphs(self._begin_forward, args, kwargs, axis)

    def _begin_forward(self, args: Sequence[Any], kwargs: Mapping[str, Any], axis: int) -> None:
        run, forward = _Run(self, None, None), forward_of(args, kwargs, axis)
        try:
            run = self._run()
        finally:  # a forward that cannot begin ends all the same
            _runs.set((*_runs.get(), run._replace(is_forward=True, forward=forward)))

    def _run(self) -> _Run:
        """The run of a call that begins now: of the batch around it, or of a new one."""
        if in_a_backward():
            return _Run(self, self._use(), next(iter(self._recomputed_batches()), None))
        use = self._use()
        if use is None:
            return _Run(self, None, None)
        for run in reversed(_runs.get()):
            if run.use is use:
                return run
        return _Run(self, use, Batch(use.choice, self.slots.current))

    def end_forward(self, outputs: Any = None) -> None:
        """What was known of the forward that ends holds no longer."""
        if not self._is_traced():
            _outside_of_graphs(self._end_forward, outputs)

    def _end_forward(self, outputs: Any) -> None:
        runs = _runs.get()
        at = next((i for i in reversed(range(len(runs))) if runs[i].active is self), None)
        if at is None or not runs[at].is_forward:  # another hook raised before it began
            return
        run = runs[at]
        _runs.set(runs[:at] + runs[at + 1 :])
        if run.batch is not None and not in_a_backward():
            mark(outputs, self, run.batch)

    def _is_traced(self) -> bool:
        """Whether the forward is in a graph, which has no use for its rows."""
        return (
            torch.compiler.is_compiling()
            and len(self._open) == 1
            and not self._open[0].choice.asks_for_rows
        )

    @contextmanager
    def generation(self) -> Iterator[None]:
        """A ``generate`` of the model, which says by :meth:`expand` how many beams there are."""
        run = self._run()
        if run.batch is None:
            yield
            return
        run, batch = run._replace(is_forward=False), run.batch
        before, batch.generation = batch.generation, Generation()
        try:
            with _running(run):
                yield
        finally:
            batch.generation = before

    def expand(self, rows: int | None, times: int) -> None:
        """The running ``generate`` repeats each of so many rows, so many times.

        Raises:
            ValueError: it did before, when there were other rows.
        """
        if (batch := self._batch()) is not None:
            batch.expand(rows, times)

    def _forget(self) -> None:
        self._open: tuple[_Use, ...] = ()  # in any thread
        self._suspending: tuple[_Use, ...] = ()  # those in frames of generators
        # The garbage collector may run in its midst, and close the generator that has a use.
        self._lock = threading.RLock()
        self._times_sorted = 0

    def __getstate__(self) -> dict:
        return {"slots": self.slots, "batch_dim": self.batch_dim, "backend": self.backend}

    def __setstate__(self, state: dict) -> None:
        self.slots, self.batch_dim = state["slots"], state.get("batch_dim", 0)
        self.backend = state.get("backend", "auto")
        self._forget()


@contextmanager
def _running(run: _Run) -> Iterator[None]:
    _runs.set((*_runs.get(), run))
    try:
        yield
    finally:
        runs = list(_runs.get())
        at = max((i for i, other in enumerate(runs) if other is run), default=None)
        if at is not None:
            del runs[at]
        _runs.set(tuple(runs))


def _listed(batch: Batch | None) -> list[Batch]:
    return [] if batch is None else [batch]


def _generator_around(frame: FrameType | None) -> FrameType | None:
    """The generator that enters a ``with``, by itself or by what it calls: a function that enters
    and returns, a class with ``__enter__``, or another generator that contextlib drives."""
    while frame is not None:
        around = frame.f_back
        by_contextlib = around is not None and around.f_globals.get("__name__") == "contextlib"
        if frame.f_code.co_flags & _SUSPENDS and not by_contextlib:
            return frame
        frame = around
    return None


def _outside_of_graphs(function: Callable, *args: Any) -> Any:
    """Call what looks names up anew each time, and so breaks a compiled graph."""
    if torch.compiler.is_compiling():
        return _undisturbed(function, *args)
    return function(*args)


@torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]
def _undisturbed(function: Callable, *args: Any) -> Any:
    return function(*args)
