"""A part of an activation draws its part of the whole one's masks: so parts make up the whole.

Results of parts of the tokens are rows of the whole one's, those of parts of the columns sum up to
it, and so do gradients.
"""

import pytest
import torch
from routed_results import BACKENDS

from lora_kernels import routed_expand, routed_lora, routed_lora_linear, routed_shrink
from lora_kernels.ops.routed import AdapterBank, Routing
from lora_kernels.runtime.dropout import MaskPlace, keep_mask

M, K, N = 41, 56, 20
SEED = torch.tensor(-0x1234_5678_9ABC_DEF1)
IDS = torch.arange(M) % 4 - 1
DROPOUT = {"a": 0.4, "b": 0.0, "c": 0.25}
# Where the whole activation begins itself: from 2^32 groups on the counter has two words.
FIRST = [0, 3, 2**32 // 7 - 20, 2**40 + 3]


def bank_of(columns: slice = slice(None), *, training: bool = True) -> AdapterBank:
    """Adapters whose A is its part of the whole one's; their ranks are 3, 5 and 2."""
    generator = torch.Generator().manual_seed(4)
    whole = [
        (torch.randn(r, K, generator=generator), torch.randn(N, r, generator=generator))
        for r in (3, 5, 2)
    ]
    bank = AdapterBank(len(range(K)[columns]), N)
    for (name, p), (a, b) in zip(DROPOUT.items(), whole, strict=True):
        bank.add(name, a[:, columns], b, 0.7, p)
    return bank.train(training)


def x_of() -> torch.Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(5))


def gradients(y, x, bank, dy) -> dict[str, torch.Tensor]:
    leaves = {"x": x, **dict(bank.named_parameters())}
    found = torch.autograd.grad(y, leaves.values(), dy, allow_unused=True)
    return {"y": y.detach()} | dict(zip(leaves, found, strict=True))


def run(backend, rows, columns, first, *, function=routed_lora, create_graph=False):
    """Results and gradients of that part of the activation."""
    bank, x = bank_of(columns), x_of()[rows, columns].requires_grad_()
    routing = Routing.from_tokens(IDS[rows], bank)
    place = {
        "row_offset": first + (rows.start or 0), "column_offset": columns.start or 0, "pitch": K,
    }  # fmt: skip
    if function is routed_lora_linear:
        weight = torch.randn(N, K, generator=torch.Generator().manual_seed(6))[:, columns]
        y = function(x, weight, bank, routing, seed=SEED, backend=backend, **place)
    else:
        y = function(x, bank, routing, seed=SEED, backend=backend, **place)
    dy = torch.randn(M, N, generator=torch.Generator().manual_seed(7))[rows]
    if function is routed_shrink:
        dy = torch.ones_like(y)
    if not create_graph:
        return gradients(y, x, bank, dy)
    (dx,) = torch.autograd.grad(y, x, dy.requires_grad_(), create_graph=True)
    parameters = dict(bank.named_parameters())
    second = torch.autograd.grad(dx.square().sum(), [dy, *parameters.values()], allow_unused=True)
    return {"x": dx.detach(), **dict(zip(["dy", *parameters], second, strict=True))}


def close(ours, expected) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def check_rows(backend, first, function, **options) -> None:
    """Parts of the tokens: rows are rows, and gradients of the factors sum up."""
    whole = run(backend, slice(0, M), slice(0, K), first, function=function, **options)
    parts = [
        run(backend, slice(*ends), slice(0, K), first, function=function, **options)
        for ends in ((0, 13), (13, 14), (14, M))
    ]
    for name, expected in whole.items():
        found = [part[name] for part in parts]
        if name in ("x", "y", "dy"):
            close(torch.cat(found), expected)
        else:
            close(sum(gradient for gradient in found if gradient is not None), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("function", [routed_lora, routed_lora_linear])
def test_parts_of_the_tokens(backend, first, function):
    check_rows(backend, first, function)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", FIRST)
def test_parts_of_the_columns(backend, first):
    """As tensor parallelism has them: the halves' h is summed, and dx and dA are side by side."""
    whole = run(backend, slice(0, M), slice(0, K), first)
    parts = [
        run(backend, slice(0, M), slice(*ends), first) for ends in ((0, 24), (24, 40), (40, K))
    ]
    close(sum(part["y"] for part in parts), whole["y"])
    for name, expected in whole.items():
        if name == "x" or name.endswith("lora_a"):
            close(torch.cat([part[name] for part in parts], dim=1), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", FIRST)
def test_shrink_of_a_part(backend, first):
    rows, parts = slice(9, 30), [slice(0, 24), slice(24, K)]
    whole = run(backend, rows, slice(0, K), first, function=routed_shrink)
    of_parts = [run(backend, rows, part, first, function=routed_shrink) for part in parts]
    close(sum(part["y"] for part in of_parts), whole["y"])
    close(torch.cat([part["x"] for part in of_parts], dim=1), whole["x"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", FIRST)
def test_second_derivatives_of_a_part(backend, first):
    check_rows(backend, first, routed_lora, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_into_out(backend):
    """Without gradients, where the pairs are added in place."""
    bank, x, rows = bank_of(), x_of(), slice(11, 29)
    with torch.no_grad():
        whole = routed_lora(x, bank, Routing.from_tokens(IDS, bank), torch.ones(M, N), seed=SEED)
        routing, out = Routing.from_tokens(IDS[rows], bank), torch.ones(18, N)
        part = routed_lora(
            x[rows], bank, routing, out, seed=SEED, row_offset=11, pitch=K, backend=backend
        )
    assert part is out
    close(part, whole[rows])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", [slice(0, K), slice(16, 45)], ids=["whole rows", "part"])
@pytest.mark.parametrize("first", FIRST)
def test_the_mask_is_the_definitions(backend, columns, first):
    """With ones for x and an A of unit rows, h is the mask, scaled."""
    rows, p = slice(7, 40), 0.4
    width = columns.stop - columns.start
    bank = AdapterBank(width, 2)
    bank.add("a", torch.eye(width), torch.ones(2, width), 1.0)
    bank.add("b", torch.eye(width), torch.ones(2, width), 1.0, p)
    routing = Routing.from_tokens([1] * 33, bank)
    h = routed_shrink(
        torch.ones(33, width), bank, routing, seed=SEED, row_offset=first + 7,
        column_offset=columns.start, pitch=K, backend=backend,
    )  # fmt: skip
    whole = keep_mask(SEED, p, M, K, bank["b"].slot, MaskPlace(first))
    assert torch.equal(h != 0, whole[rows, columns]) and 0.5 < (h != 0).float().mean() < 0.7


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_place_is_another_mask(backend):
    results = [run(backend, slice(0, M), slice(0, K), first)["y"] for first in (0, 1, 2**32, 2**33)]
    for i, one in enumerate(results):
        assert all(not torch.equal(one, other) for other in results[i + 1 :])


def test_defaults_are_the_whole():
    bank, x = bank_of(), x_of()
    routing = Routing.from_tokens(IDS, bank)
    plain = routed_lora(x, bank, routing, seed=SEED)
    for place in (
        {"pitch": K},
        {"row_offset": 0, "column_offset": 0},
        {"row_offset": 0, "pitch": K},
    ):
        assert torch.equal(routed_lora(x, bank, routing, seed=SEED, **place), plain)


def test_a_place_says_nothing_where_nothing_drops():
    bank, x = bank_of(training=False), x_of()
    routing = Routing.from_tokens(IDS, bank)
    there = routed_lora(x, bank, routing, row_offset=5, column_offset=16, pitch=99)
    assert torch.equal(there, routed_lora(x, bank, routing))


@pytest.mark.parametrize("function", [routed_lora, routed_lora_linear, routed_shrink])
@pytest.mark.parametrize(
    "place, error, message",
    [
        ({"row_offset": -1}, ValueError, "row_offset: expected 0 or more, got -1"),
        ({"row_offset": 1.0}, TypeError, "row_offset: expected an integer, got 1.0"),
        ({"row_offset": True}, TypeError, "row_offset: expected an integer, got True"),
        ({"row_offset": None}, TypeError, "row_offset: expected an integer, got None"),
        ({"column_offset": 4, "pitch": 99}, ValueError, "column_offset: expected a multiple of 8"),
        ({"column_offset": 8}, ValueError, "pitch: expected the columns of the whole activation"),
        ({"pitch": K - 1}, ValueError, "at least 0 + 56, got 55"),
        ({"row_offset": 2**62}, ValueError, "row_offset: expected fewer than 2**62 groups"),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_places_that_are_none(function, place, error, message, backend):
    bank = bank_of()
    given = [x_of(), bank, Routing.from_tokens(IDS, bank)]
    if function is routed_lora_linear:
        given.insert(1, torch.randn(N, K))
    with pytest.raises(error) as raised:
        function(*given, seed=SEED, backend=backend, **place)
    assert message in str(raised.value)


def test_expand_has_no_place():
    bank = bank_of()
    with pytest.raises(TypeError, match="row_offset"):
        routed_expand(torch.randn(M, 5), bank, Routing.from_tokens(IDS, bank), row_offset=3)
