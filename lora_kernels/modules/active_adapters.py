"""``ActiveAdapters``: which adapters a batch's sequences use, told once for all layers of a model.

Dimensions: S names, M tokens of a layer's input (its leading dimensions flattened).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor

from lora_kernels.ops.routed_lora import AdapterSlots, Routing
from lora_kernels.ops.routed_lora.slots import BASE

# What this thread or task has entered, of any model.
_entered: ContextVar[tuple[_Batch, ...]] = ContextVar("entered", default=())


class ActiveAdapters:
    """Hands the layers of one model the :class:`Routing` of the batch at hand.

    Inside ``with active.use(names):`` every layer that shares this object sees the same choice. A
    routing is built for each number of tokens that comes by, and serves all layers; outside, a
    layer raises as soon as there are adapters, instead of computing the base model in silence.

    It belongs to one thread or asyncio task at a time. The threads in which autograd runs a
    backward see its choice too, so that activation checkpointing recomputes inside of ``with`` what
    it computed there before.

    Args:
        slots: those of the layers' banks.
    """

    def __init__(self, slots: AdapterSlots) -> None:
        if not isinstance(slots, AdapterSlots):
            raise TypeError(f"slots: expected AdapterSlots, got {type(slots).__name__}")
        self.slots = slots
        self._forget()

    @contextmanager
    def use(self, adapters: str | Sequence[str] | Routing) -> Iterator[None]:
        """Set the adapters of the batches that are computed inside.

        Args:
            adapters: one name for all tokens, or a list with one name per sequence
                (``"__base__"`` for none), or a routing of the tokens. Where an input has more rows
                than there are names, each name holds for equally many neighbouring rows: those of
                its beams or returned sequences.

        Raises:
            ValueError: a name is not an adapter's, or there is none.
            TypeError: adapters is none of the three.
            RuntimeError: another thread or task is inside.
        """
        batch = _Batch(adapters, self.slots)
        with self._lock:
            self._check_caller()
            self._batches.append(batch)
        _entered.set((*_entered.get(), batch))
        try:
            yield
        finally:
            _entered.set(tuple(other for other in _entered.get() if other is not batch))
            with self._lock:
                self._batches = [other for other in self._batches if other is not batch]

    def routing_for(self, x: Tensor) -> Routing | None:
        """The routing for a layer's input ``[..., K]``; None where there are no adapters at all.

        Raises:
            RuntimeError: there are adapters, and nobody has said which ones to use.
            ValueError: x's rows cannot be divided among the names.
        """
        if not self._batches:
            if not len(self.slots):
                return None
            raise RuntimeError(
                f"the model has adapters {list(self.slots)} and nothing says which of them to use; "
                "call it inside of `with routed.adapters(names):`, with one name per sequence "
                f"({BASE!r} for none), and call backward() in there too if activations are "
                "checkpointed"
            )
        in_backward = False
        if not torch.compiler.is_compiling():
            in_backward = torch._C._current_graph_task_id() != -1
            if not in_backward:
                self._check_caller()
        return self._batches[-1].routing_for(x, in_backward)

    def _check_caller(self) -> None:
        if self._batches and self._batches[-1] not in _entered.get():
            raise RuntimeError(
                "another thread or task is inside of this model's `with ...adapters(...)`; its "
                "choice of adapters is not the caller's, and one batch is computed at a time"
            )

    def _forget(self) -> None:
        self._batches: list[_Batch] = []
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {"slots": self.slots}

    def __setstate__(self, state: dict) -> None:
        self.slots = state["slots"]
        self._forget()


class _Batch:
    """The choice of one ``with``, and the routings made for it."""

    def __init__(self, adapters: str | Sequence[str] | Routing, slots: AdapterSlots) -> None:
        self.slots = slots
        self.routing = adapters if isinstance(adapters, Routing) else None
        self._made: dict[tuple[int, torch.device], Routing] = {}
        self._batch_sizes: set[int] = set()
        if self.routing is not None:
            if adapters.slots is not slots:
                raise ValueError("adapters: expected a routing of this model's slots, got another")
            if adapters.device.type == "cpu":
                adapters.plan()  # now, for a compiled model could not
            return
        if isinstance(adapters, str):
            adapters = [adapters]
        if isinstance(adapters, Tensor) or not isinstance(adapters, Sequence):
            raise TypeError(
                "adapters: expected a name, a list of names or a Routing, got "
                f"{type(adapters).__name__}"
            )
        self.names = list(adapters)
        if not self.names:
            raise ValueError("adapters: expected at least one name, got none")
        for name in self.names:
            if not isinstance(name, str):
                raise TypeError(f"adapters: expected names, got a {type(name).__name__}")
            if name != BASE and name not in slots:
                raise ValueError(
                    f"adapters: expected {BASE!r} or one of {list(slots)}, got {name!r}"
                )

    def routing_for(self, x: Tensor, in_backward: bool) -> Routing:
        if self.routing is not None:
            return self.routing
        tokens = x.shape[:-1].numel()
        routing = self._made.get((tokens, x.device))
        if routing is not None and routing.version == self.slots.version:
            self._check_rows(x, tokens)
            return routing
        if in_backward and routing is None:
            raise RuntimeError(
                f"checkpointed activations of {tokens} tokens are computed again for a backward, "
                "and were not computed inside of this `with ...adapters(...)`; call backward() "
                "inside of the one that the forward ran in"
            )
        self._check_rows(x, tokens)
        length = tokens // len(self.names)
        with _plain_tensors():
            routing = Routing.from_sequences(self.names, length, self.slots, device=x.device)
        self._made[tokens, x.device] = routing
        return routing

    def _check_rows(self, x: Tensor, tokens: int) -> None:
        """Raise unless x is ``[rows, ..., K]``, or ``[M, K]`` with all tokens, or one, of each row.

        Tokens alone do not tell: padding may have been cut out, and by chance leave a multiple.
        """
        names = len(self.names)
        if x.ndim > 2:
            if x.shape[0] % names:
                raise ValueError(
                    f"x: expected a multiple of {names} sequences, one or more per adapter named, "
                    f"got {list(x.shape)}"
                )
            self._batch_sizes |= {tokens, x.shape[0]}
        elif names > 1 and tokens != names and tokens not in self._batch_sizes:
            raise ValueError(
                f"x: {tokens} tokens do not tell which of the {names} sequences they are of, got "
                f"{list(x.shape)}; pass a Routing over the tokens instead of names"
            )


def _plain_tensors() -> AbstractContextManager:
    """Also under inference mode: a training step may follow in the same choice."""
    if torch.compiler.is_compiling():
        return nullcontext()
    return torch.inference_mode(False)
