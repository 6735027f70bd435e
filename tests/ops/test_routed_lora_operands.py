"""Operands as they come: any strides, torch's lazy tensors, parameters whose data was swapped."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from padded_weight import PaddedWeight
from routed_results import BACKENDS
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels.base_weights import DenseWeight
from lora_kernels.ops.linear import lora_linear
from lora_kernels.ops.routed import AdapterBank, Routing, routed_lora, routed_lora_linear

K, N = 45, 32


def filled() -> AdapterBank:
    bank = AdapterBank(K, N)
    for index, rank in enumerate((4, 17, 1)):
        bank.add(f"a{index}", torch.randn(rank, K), torch.randn(N, rank), 0.5 + index)
    return bank


def layouts() -> dict[str, torch.Tensor]:
    wide = torch.full((50, 2 * K), float("nan"))
    wide[:, ::2] = torch.randn(50, K)
    return {
        "transposed": torch.randn(K, 50).t(),
        "every other column": wide[:, ::2],
        "one column for all": torch.randn(50, 1).expand(50, K),
        "one row for all": torch.randn(1, K).expand(50, K),
        "odd start": torch.randn(50 * K + 1)[1:].view(50, K),
        "negated": torch._neg_view(torch.randn(50, K)),
        "zero": torch._efficientzerotensor(50, K),
    }


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", [True, False])
def test_x_and_dy_of_any_layout(layout, backend, base):
    torch.manual_seed(0)
    bank, weight = filled(), torch.randn(N, K)
    routing = Routing.from_tokens(torch.arange(50) % 4 - 1, bank)

    def run(x, dy):
        leaf = x.detach().requires_grad_()
        if base:
            y = routed_lora_linear(leaf, weight, bank, routing, backend=backend)
        else:
            y = routed_lora(leaf, bank, routing, backend=backend)
        return [y, *torch.autograd.grad(y, [leaf, *bank.parameters()], dy)]

    x = layouts()[layout]
    dy = x[:, :N] if layout != "zero" else torch._efficientzerotensor(50, N)
    plain_x, plain_dy = (torch.zeros(t.shape).copy_(t) for t in (x, dy))
    for got, expected in zip(run(x, dy), run(plain_x, plain_dy), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("again", [False, True], ids=["first", "known"])
def test_a_dense_weight_is_its_tensor(backend, dtype, autocast, again):
    """Bit for bit, whichever of them has been called before; gradients and second ones too."""
    bank, weight = filled(), torch.randn(N, K, dtype=dtype)
    bias = torch.randn(N, dtype=dtype, requires_grad=True)
    x = torch.randn(50, K, dtype=dtype, requires_grad=True)
    routing = Routing.from_tokens(torch.arange(50) % 4 - 1, bank)
    leaves = [x, bias, *bank.parameters()]

    def run(base):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = routed_lora_linear(x, base, bank, routing, bias, backend=backend)
        dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
        first = torch.autograd.grad(y, leaves, dy, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), [*bank.parameters()])
        return [y, *first, *second]

    if again:
        run(weight), run(DenseWeight(weight))
    for ours, expected in zip(run(DenseWeight(weight)), run(weight), strict=True):
        assert ours.dtype == expected.dtype and torch.equal(ours, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("through_the_op", [False, True], ids=["eager", "op"])
def test_a_weight_of_another_format(backend, through_the_op):
    """Rebuilt from its tensors and integers on the other side of the op, and of autograd."""
    bank, weight = filled(), torch.randn(N, K)
    x = torch.randn(50, K, requires_grad=True)
    routing = Routing.from_tokens(torch.arange(50) % 4 - 1, bank)
    leaves = [x, *bank.parameters()]

    def run(base):
        y = routed_lora_linear(x, base, bank, routing, backend=backend)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    expected = run(weight)
    with FlopCounterMode(display=False) if through_the_op else nullcontext():
        found = run(PaddedWeight.of(weight))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["composed", "native"])
def test_lora_linear_sees_the_values_of_negated_tensors(backend):
    lora_a, lora_b, weight = torch.randn(4, K), torch.randn(N, 4), torch.randn(N, K)
    x = torch.randn(7, K)
    got = lora_linear(torch._neg_view(x), weight, lora_a, lora_b, 2.0, backend=backend)
    expected = lora_linear(-x, weight, lora_a, lora_b, 2.0, backend=backend)
    torch.testing.assert_close(got, expected)


def test_weights_that_were_swapped_away_come_back():
    """What averaging and evaluation do: other values in place for a while."""
    bank, x = filled(), torch.randn(9, K)
    routing = Routing.from_tokens(torch.arange(9) % 4 - 1, bank)
    with torch.no_grad():
        trained = routed_lora(x, bank, routing)
        backup = {name: parameter.data for name, parameter in bank.named_parameters()}
        for parameter in bank.parameters():
            parameter.data = 0.5 * parameter.data
        torch.testing.assert_close(routed_lora(x, bank, routing), 0.25 * trained)
        for name, parameter in bank.named_parameters():
            parameter.data = backup[name]
        assert torch.equal(routed_lora(x, bank, routing), trained)


def test_data_swapped_while_serving_still_trains():
    bank, x = filled(), torch.randn(4, K)
    routing = Routing.from_tokens([0, 1, 2, -1], bank)
    with torch.inference_mode():
        for parameter in bank.parameters():
            parameter.data = 2.0 * parameter.data
        routed_lora(x, bank, routing)
    routed_lora(x.requires_grad_(), bank, routing).sum().backward()
    assert all(parameter.grad.any() for parameter in bank.parameters())


def test_what_scalings_and_lengths_may_be():
    bank = filled()
    with pytest.raises(ValueError, match="scaling: expected a finite number"):
        bank.add("b", torch.randn(2, K), torch.randn(N, 2), float("nan"))
    names = ["a0", "a2"]
    for lengths in (np.array([2, 3]), torch.tensor([2, 3]), [np.int64(2), 3]):
        routing = Routing.from_sequences(names, lengths, bank)
        assert routing.plan().tolist() == [[0, 0, 2, 0], [2, 2, 5, 2]]
    with pytest.raises(TypeError, match="ids: expected a list of integers"):
        Routing.from_tokens([[0], [0, 1]], bank)
    segments = Routing.from_segments(torch.tensor([1], dtype=torch.uint8), [1, 3], bank)
    assert segments.plan().tolist() == [[1, 0, 2, 1]]


def test_a_routing_made_while_serving_trains():
    bank, x = filled(), torch.randn(4, K)
    with torch.inference_mode():
        routing = Routing.from_weighted([[0], [1], [2], [-1]], torch.ones(4, 1), bank)
    routed_lora(x, bank, routing).sum().backward()
    assert all(parameter.grad.any() for parameter in bank.parameters())
