"""What the operations' differentiable backwards share.

With ``create_graph=True`` a backward is computed by torch's own operations from the inputs that
the forward saved, so that autograd differentiates it to any order. The forward saves no more for
it than the ordinary backward reads. Where that leaves an input out, the results carry an edge to it
that raises when it is differentiated: no derivative is ever incomplete without a word.
"""

import torch
from torch import Tensor

from lora_kernels.runtime.dropout import keep_scale
from lora_kernels.runtime.eager import eager_apply


class _MissingEdge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, message):
        ctx.message = message
        return tensor.new_empty(0)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(ctx.message)


_apply = eager_apply(_MissingEdge)


def missing_edge(tensor: Tensor, message: str) -> Tensor:
    """An empty tensor that stands for ``tensor`` in the graph without holding its memory.

    Whoever differentiates what :func:`with_missing_edge` ties to it gets ``message``. To be called
    in a Function's forward, where ``tensor`` still has its place in the graph.
    """
    with torch.enable_grad():
        return _apply(tensor, message)


def with_missing_edge(value: Tensor, edge: Tensor | None) -> Tensor:
    """``value`` that also depends on what ``edge`` stands for; None stands for nothing."""
    return value if edge is None else value + edge.sum()


def drop(x: Tensor, keep: Tensor | None, dropout_p: float) -> Tensor:
    """``D(x)`` for the boolean ``keep`` of x's shape, differentiable in x; None keeps everything.

    It is its own transpose: the same function takes a gradient of ``D(x)`` to one of x.
    """
    return x if keep is None else torch.where(keep, x * keep_scale(dropout_p), 0)
