"""routed_lora under torch.compile: one graph for all routings of a capacity, for all tokens."""

import itertools

import pytest
import torch
import torch._dynamo.testing

from lora_kernels.ops.routed import (
    Routing,
    routed_expand,
    routed_lora,
    routed_lora_linear,
    routed_shrink,
)
from lora_kernels.testing.routed_inputs import RoutedProblem

IDS = [[2], [0], [1], [-1], [0], [2], [-1]]


def problem_of(dropout: float = 0.0, sliced: bool = False) -> RoutedProblem:
    ranks = [(3, 0), (0, 5), (1, 2)] if sliced else [3, 5, 1]
    return RoutedProblem.random(IDS, ranks, 21, (6, 7) if sliced else 13, dropout=dropout)


def compiled_case(backend: str, dropout: float = 0.0, **options):
    torch._dynamo.reset()
    p = problem_of(dropout, **options)
    bank = p.bank()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, backend=counter)
    def layer(x, routing):
        return routed_lora_linear(x, p.weight, bank, routing, p.bias, seed=p.seed).relu()

    def eager(x, routing):
        return routed_lora_linear(x, p.weight, bank, routing, p.bias, seed=p.seed).relu()

    return p, bank, counter, layer, eager


def compare(layer, eager, x, routing, parameters) -> None:
    """A compiled graph has gradients for all adapters: exact zeros for those without tokens."""
    dy = torch.randn(x.shape[0], 13)
    y = layer(x, routing)
    ours = (y.detach(), *torch.autograd.grad(y, [x, *parameters], dy))
    y = eager(x, routing)
    expected = torch.autograd.grad(y, [x, *parameters], dy, allow_unused=True)
    for one, other in zip(ours, (y.detach(), *expected), strict=True):
        assert other is not None or not one.any()
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "backend, dropout, sliced", [("eager", 0.3, False), ("aot_eager", 0.3, True)]
)
def test_compiled_equals_eager_for_routings_of_one_capacity(backend, dropout, sliced):
    """Another routing object, and the same one filled again, compile nothing anew."""
    p, bank, counter, layer, eager = compiled_case(backend, dropout, sliced=sliced)
    x, parameters = p.x.requires_grad_(), list(bank.parameters())
    routing = Routing.from_tokens([0, 1, 2, -1, 2, 0, 1], bank)
    compare(layer, eager, x, routing, parameters)
    frames = counter.frame_count
    compare(layer, eager, x, Routing.from_tokens([2, 2, 2, 2, -1, 0, 1], bank), parameters)
    compare(layer, eager, x, routing.set_tokens_([1, 1, -1, 1, 0, 2, 2]), parameters)
    compare(layer, eager, x, Routing.from_tokens([1] * 7, bank), parameters)
    assert counter.frame_count == frames == 1


@pytest.mark.parametrize("half", [False, True], ids=["whole", "shrink"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_for_other_places(backend, half):
    """The offset of a micro-batch is no constant of the graph: none is compiled for it."""
    torch._dynamo.reset()
    p = problem_of(0.4)
    bank, x = p.bank(), p.x.requires_grad_()
    parameters = [x, *([bank[n].lora_a for n in bank] if half else bank.parameters())]
    routing = Routing.from_tokens([0, 1, 2, -1, 2, 0, 1], bank)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)

    def layer(x, routing, row_offset):
        place = {"seed": p.seed, "row_offset": row_offset, "pitch": 77}
        if half:
            return routed_shrink(x, bank, routing, **place)
        return routed_lora_linear(x, p.weight, bank, routing, p.bias, **place)

    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    results = []
    for row_offset in (5, 7, 12, 3000, 2**33, 2**40 + 1):
        results.append(compiled(x, routing, row_offset))
        expected = layer(x, routing, row_offset)
        dy = torch.randn_like(expected)
        ours, theirs = (torch.autograd.grad(y, parameters, dy) for y in (results[-1], expected))
        for one, other in zip((results[-1], *ours), (expected, *theirs), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(results, 2))


def test_compiled_for_other_numbers_of_tokens():
    _, bank, counter, layer, eager = compiled_case("aot_eager")
    parameters = list(bank.parameters())
    for rows in (7, 12, 31, 64, 100, 129):
        x = torch.randn(rows, 21, requires_grad=True)
        routing = Routing.from_tokens(torch.randint(-1, 3, (rows,)), bank)
        compare(layer, eager, x, routing, parameters)
    assert counter.frame_count <= 3


def test_compiled_without_gradients():
    p, bank, _, layer, eager = compiled_case("aot_eager")
    routing = Routing.from_tokens([0, 1, 2, -1, 2, 0, 1], bank)
    with torch.no_grad():
        torch.testing.assert_close(layer(p.x, routing), eager(p.x, routing))


def test_inductor():
    p, bank, _, layer, eager = compiled_case("inductor")
    routing = Routing.from_tokens([0, 1, 2, -1, 2, 0, 1], bank)
    compare(layer, eager, p.x.requires_grad_(), routing, list(bank.parameters()))


def test_compiled_follows_the_adapters():
    """Steps, another scaling, a removal and an addition after it was compiled."""
    p, bank, counter, layer, eager = compiled_case("aot_eager")
    x = p.x.requires_grad_()
    routing = Routing.from_tokens([0, 1, 2, -1, 2, 0, 1], bank)
    compare(layer, eager, x, routing, list(bank.parameters()))
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.mul_(-0.5)
    bank["a0"].scaling = 3.0
    compare(layer, eager, x, routing, list(bank.parameters()))
    assert counter.frame_count == 1
    bank.remove("a1")
    bank.add("new", torch.randn(40, 21), torch.randn(13, 40), -2.0)
    routing.set_tokens_([0, 1, 2, -1, 2, 0, 1])
    compare(layer, eager, x, routing, list(bank.parameters()))


def test_compiled_with_a_routing_that_is_out_of_date_raises():
    p, bank, _, layer, _ = compiled_case("eager")
    routing = Routing.from_tokens([0, 1, 2, -1, 2, 0, 1], bank)
    layer(p.x, routing)
    bank.remove("a1")
    with pytest.raises(Exception, match="routing: adapters were removed"):
        layer(p.x, routing)


@pytest.mark.parametrize("training", [True, False])
def test_compiled_dropout_without_a_seed(training):
    torch._dynamo.reset()
    p = problem_of(0.5)
    bank = p.bank().train(training)
    routing = Routing.from_tokens([0, 1, 2, 1, 2, 0, 1], bank)
    layer = torch.compile(
        lambda x: routed_lora_linear(x, p.weight, bank, routing),
        fullgraph=True,
        backend="aot_eager",
    )
    with torch.no_grad():
        assert torch.equal(layer(p.x), layer(p.x)) != training


@pytest.mark.parametrize("function", ["routed_lora", "routed_shrink", "routed_expand", "out"])
def test_the_other_functions_compile(function):
    torch._dynamo.reset()
    p = problem_of()
    bank = p.bank()
    routing = Routing.from_tokens([0, 1, 2, -1, 2, 0, 1], bank)
    h = routed_shrink(p.x, bank, routing).detach()
    calls = {
        "routed_lora": lambda: routed_lora(p.x, bank, routing),
        "routed_shrink": lambda: routed_shrink(p.x, bank, routing),
        "routed_expand": lambda: routed_expand(h, bank, routing),
        "out": lambda: routed_lora(p.x, bank, routing, torch.ones(7, 13)),
    }
    call = calls[function]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), call())
    with torch.no_grad():
        torch.testing.assert_close(compiled(), call())
