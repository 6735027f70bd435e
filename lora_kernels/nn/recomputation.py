"""What a backward computes again where activations are checkpointed, and whose batch that is.

It is found by the outputs that the backward began from, as no context reaches the threads that it
runs in.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree

from lora_kernels.nn.batch_choice import Batch

if TYPE_CHECKING:
    from lora_kernels.nn.active_adapters import ActiveAdapters

# What a backward has come by, by the backward. Weakly: one that fails does not say when it ends.
_recalled: dict[int, list[ref[_Recall]]] = {}

# What a thread has computed again last: the backward, whose model, and the batches.
_recomputing: dict[int, tuple[int, ActiveAdapters, list[Batch]]] = {}


def in_a_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def mark(outputs: Any, active: ActiveAdapters, batch: Batch) -> None:
    """Let a backward from these outputs find the batch."""
    if not torch.is_grad_enabled() or outputs is None:
        return
    leaves = pytree.tree_leaves(outputs)
    for leaf in [leaf for leaf in leaves if not isinstance(leaf, (Tensor, type, Module))]:
        leaves += pytree.tree_leaves(getattr(leaf, "__dict__", None))  # a dataclass, say
    for output in leaves:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            output.grad_fn.register_prehook(_Recall(active, batch))


def recomputed(active: ActiveAdapters) -> list[Batch]:
    """The batches of a model that the backward around this comes by; none where that is unknown."""
    task, thread = torch._C._current_graph_task_id(), threading.get_ident()
    alive = [recall for each in _recalled.get(task, ()) if (recall := each()) is not None]
    if found := [recall.batch for recall in alive if recall.active is active]:
        _recomputing[thread] = task, active, found
        return found
    # A checkpoint inside of a reentrant one has a backward of its own.
    task, other, batches = _recomputing.get(thread, (None, None, []))
    return batches if other is active and task in _recalled else []


class _Recall:
    """Stands before a node of autograd's graph, and tells its backward of the batch."""

    def __init__(self, active: ActiveAdapters, batch: Batch) -> None:
        self.active, self.batch = active, batch

    def __call__(self, gradients: tuple) -> None:
        task = torch._C._current_graph_task_id()
        if task not in _recalled:
            for other, recalls in list(_recalled.items()):
                if not any(each() for each in recalls):  # it failed, and its graph is gone
                    _recalled.pop(other, None)
            _recalled[task] = []
            torch.autograd.Variable._execution_engine.queue_callback(lambda: _forget_backward(task))
        known = (recall.batch for each in _recalled[task] if (recall := each()) is not None)
        if not any(batch is self.batch for batch in known):
            _recalled[task].append(ref(self))


def _forget_backward(task: int) -> None:
    _recalled.pop(task, None)
    for thread, (other, _, _) in list(_recomputing.items()):
        if other == task:
            _recomputing.pop(thread, None)
