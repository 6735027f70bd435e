"""routed_lora's backward from what hooks on saved tensors, and batched gradients, hand to it."""

import pytest
import torch
from routed_calls import OPS, call_of, op, operands
from routed_results import BACKENDS

from lora_kernels import routed_expand, routed_lora_linear, routed_shrink
from lora_kernels.testing.routed_inputs import RoutedProblem

IDS = [[2, 0], [0, -1], [1, 1], [-1, -1], [0, 2], [2, 2], [-1, 1]]
SAVING = [backend for backend in BACKENDS if backend != "reference"]


def forward(p: RoutedProblem, bank, backend: str):
    """The operation, then its halves, and what gradients are asked for."""
    routing = p.routing(bank)
    x = p.x.detach().requires_grad_()
    y = routed_lora_linear(x, p.weight, bank, routing, p.bias, seed=p.seed, backend=backend)
    h = routed_shrink(x, bank, routing, seed=p.seed, backend=backend)
    return y, routed_expand(h, bank, routing, backend=backend), [x, *bank.parameters()]


@pytest.mark.parametrize("backend", SAVING)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", OPS[:3])
def test_the_op_saves_what_the_function_saves(name, dropout, backend):
    """Checkpointing counts the tensors, whichever way a call and its second run take."""
    p = RoutedProblem.random(IDS, [3, 5, 1], 21, 13, dropout=dropout, weighted=True)
    bank, counts = p.bank(), []
    p.x.requires_grad_()
    call = call_of(p, bank, backend, rows=7, dtype=torch.float32)
    call.h = torch.randn(14, call.bank.max_total_rank, requires_grad=True)
    routing = p.routing(bank)
    ways = {
        "routed_lora": lambda: routed_lora_linear(
            p.x, p.weight, bank, routing, p.bias, seed=p.seed, backend=backend
        ),
        "routed_shrink": lambda: routed_shrink(p.x, bank, routing, seed=p.seed, backend=backend),
        "routed_expand": lambda: routed_expand(call.h, bank, routing, backend=backend),
    }
    for way in (ways[name], lambda: op(name)(*operands(name, call))):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved=saved: saved.append(tensor.shape) or tensor, lambda tensor: tensor
        ):
            way().sum().backward()
        counts.append(saved)
    assert counts[0] == counts[1] and len(counts[0]) > 3


def gapped(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with another element between any two, as a hook on saved tensors may give it back."""
    shape = [2 * size for size in tensor.shape]
    between = torch.full(shape, 77, dtype=tensor.dtype)[tuple(slice(None, None, 2) for _ in shape)]
    return between.copy_(tensor.detach())


@pytest.mark.parametrize("backend", SAVING)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_saved_tensors_that_a_hook_has_copied_with_gaps(backend, dropout):
    p = RoutedProblem.random(IDS, [3, 5, 1], 21, 13, dropout=dropout, weighted=True)
    bank, grads = p.bank(), []
    for unpack in (lambda tensor: tensor, gapped):
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
            *results, wanted = forward(p, bank, backend)
        grads.append(torch.autograd.grad(results, wanted, [p.dy, p.dy.flip(0)]))
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected)
