"""routed_lora: whose parameters have gradients. Adapters that a batch does not use have none."""

import pytest
import torch
import torch._dynamo.testing
from routed_results import BACKENDS, AsOnADevice
from torch.utils.checkpoint import checkpoint

from lora_kernels.ops.routed import (
    AdapterBank,
    AdapterSlots,
    Routing,
    routed_expand,
    routed_lora,
    routed_lora_linear,
    routed_shrink,
)
from lora_kernels.ops.routed import routing as routing_module
from lora_kernels.ops.routed.bank import layouts

K, N = 13, 9
NAMES = ["a", "b", "c"]
# Batches of six tokens that use "a" and none.
BATCHES = {
    "names": lambda bank, **o: Routing.from_sequences(["a", "__base__"], [4, 2], bank, **o),
    "a name without tokens": lambda bank, **o: Routing.from_sequences(NAMES, [6, 0, 0], bank, **o),
    "list": lambda bank, **o: Routing.from_tokens([0, 0, -1, 0, -1, 0], bank, **o),
    "tensor": lambda bank, **o: Routing.from_tokens(torch.tensor([0] * 5 + [-1]), bank, **o),
    "segments": lambda bank, **o: Routing.from_segments([0, 1, 0], [0, 2, 2, 5], bank,
                                                        num_tokens=6, **o),
    "weighted": lambda bank, **o: Routing.from_weighted([[0, -1], [0, 0]] * 3, torch.randn(6, 2),
                                                        bank, **o),
}  # fmt: skip


def bank_with(names=NAMES, *, sliced: bool = False, slots: AdapterSlots | None = None, rank=2):
    bank = AdapterBank(K, [4, 5] if sliced else N, slots=slots)
    for i, name in enumerate(names):
        ranks = [(rank, 0), (1, 3), (0, 2)][i % 3] if sliced else (rank + i % 3,)
        pairs = [
            (torch.randn(r, K), torch.randn(width, r)) if r else (None, None)
            for r, width in zip(ranks, bank.slice_widths, strict=True)
        ]
        a, b = zip(*pairs, strict=True)
        bank.add(name, *((a, b) if sliced else (a[0], b[0])), (-1) ** i * 0.5, dropout_p=0.2)
    return bank


def step(bank, routing, backend: str = "composed", x=None) -> None:
    x = torch.randn(routing.max_tokens, K) if x is None else x
    routed_lora(x, bank, routing, backend=backend).square().sum().backward()


def gradients(bank) -> dict[str, bool]:
    """The adapters that have gradients, and whether any element is not zero."""
    found = {}
    for name in bank:
        grads = [parameter.grad for parameter in bank[name].parameters()]
        assert len({grad is None for grad in grads}) == 1, name
        if grads[0] is not None:
            found[name] = any(grad.any() for grad in grads)
    return found


# --- known on the host ------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sliced", [False, True], ids=["", "sliced"])
@pytest.mark.parametrize("batch", BATCHES)
def test_an_optimizer_leaves_adapters_alone_that_a_batch_does_not_use(backend, sliced, batch):
    """Momentum and decay would move them where their gradients were zeros."""
    bank = bank_with(sliced=sliced)
    optimizer = torch.optim.AdamW(bank.parameters(), lr=0.1, weight_decay=0.1)
    step(bank, Routing.from_sequences(NAMES, 2, bank), backend)
    optimizer.step()
    optimizer.zero_grad()
    before = {name: [p.clone() for p in bank[name].parameters()] for name in bank}
    step(bank, BATCHES[batch](bank), backend)
    assert gradients(bank) == {"a": True}
    optimizer.step()
    for name in bank:
        pairs = zip(bank[name].parameters(), before[name], strict=True)
        same = [torch.equal(*pair) for pair in pairs]
        assert same == [name != "a"] * len(same), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", ["shrink", "expand", "linear", "out", "out that trains"])
def test_every_function(backend, function):
    bank = bank_with()
    routing, x = BATCHES["list"](bank), torch.randn(6, K)
    if function == "shrink":
        y = routed_shrink(x, bank, routing, backend=backend)
    elif function == "expand":
        y = routed_expand(torch.randn(6, 4), bank, routing, backend=backend)
    elif function == "linear":
        y = routed_lora_linear(x, torch.randn(N, K), bank, routing, backend=backend)
    else:
        out = torch.randn(6, N, requires_grad=function != "out").clone()
        y = routed_lora(x, bank, routing, out, backend=backend)
    wanted = [*bank["a"].parameters(), *bank["b"].parameters(), *bank["c"].parameters()]
    found = torch.autograd.grad(y.square().sum(), wanted, allow_unused=True)
    has_a, has_b = function != "expand", function != "shrink"
    for index, gradient in enumerate(found):
        role_is_there = has_b if index % 2 else has_a
        assert gradient is None or (index < 2 and role_is_there == bool(gradient.any())), index
    assert any(gradient is not None for gradient in found[:2])


@pytest.mark.parametrize("batch", ["all base", "empty", "a frozen adapter", "no adapters at all"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_no_trained_adapter_has_nothing_to_differentiate(batch, backend):
    bank = bank_with([] if batch == "no adapters at all" else NAMES)
    if batch == "a frozen adapter":
        bank["a"].requires_grad_(False)
    ids = {"a frozen adapter": [0] * 6, "empty": []}.get(batch, [-1] * 6)
    routing, weight = Routing.from_tokens(ids, bank), torch.randn(N, K)
    x = torch.randn(len(ids), K)
    for function in (
        lambda x: routed_lora(x, bank, routing, backend=backend),
        lambda x: routed_lora_linear(x, weight, bank, routing, backend=backend),
        lambda x: routed_shrink(x, bank, routing, backend=backend),
    ):
        assert not function(x).requires_grad
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf).sum(), leaf)
        assert gradient.shape == x.shape
    assert gradients(bank) == {}


def test_autograd_sees_the_parameters_of_the_batch_alone():
    """512 adapters held, two named: neither arguments nor memory count the others."""
    names = [f"a{i}" for i in range(512)]
    bank = bank_with(names, slots=AdapterSlots(512))
    routing = Routing.from_sequences(["a400", "a7"], 3, bank)
    y = routed_lora(torch.randn(6, K), bank, routing)
    inputs = [edge for edge, _ in y.grad_fn.next_functions if edge is not None]
    mine = [p for name in ("a7", "a400") for p in bank[name].parameters()]
    assert [edge.variable for edge in inputs] == mine
    y.sum().backward()
    flat = {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage().nbytes() for p in mine}
    assert len(flat) == 1
    assert sum(flat.values()) <= 4 * sum(p.numel() + 64 for p in mine)
    layout, trained = bank.gradients(routing.trained_slots())
    assert (layout.slots, len(layout.offsets), len(trained.parameters)) == ([7, 400], 4, 4)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant):
    bank = bank_with()
    routing, x = BATCHES["names"](bank), torch.randn(6, K, requires_grad=True)
    checkpoint(
        lambda x: routed_lora(x, bank, routing).tanh(), x, use_reentrant=use_reentrant
    ).sum().backward()
    assert gradients(bank) == {"a": True}


def test_filling_again_tells_other_names():
    bank = bank_with()
    routing = Routing.empty(6, bank)
    fillings = [
        (lambda: routing, set()),
        (lambda: routing.set_tokens_([1, 1, -1]), {"b"}),
        (lambda: routing.set_sequences_(["c", "a"], 3), {"a", "c"}),
        (lambda: routing.set_segments_([2, -1], [0, 4, 6]), {"c"}),
        (lambda: routing.set_segments_([1, 0], [3, 3, 6]), {"a"}),
        (lambda: routing.set_tokens_([-1] * 6), set()),
    ]
    for fill, expected in fillings:
        bank.zero_grad()
        fill()
        if expected:
            step(bank, routing)
        else:
            assert not routed_lora(torch.randn(6, K), bank, routing).requires_grad
        assert gradients(bank) == dict.fromkeys(expected, True)
    weighted = Routing.empty(6, bank, 2).set_weighted_([[1, 2]] * 6, torch.randn(6, 2))
    bank.zero_grad()
    step(bank, weighted)
    assert gradients(bank) == {"b": True, "c": True}


def test_layouts_follow_what_is_trained_and_what_the_bank_holds():
    """The same names again, after freezing, thawing, removing, adding and moving."""
    bank = bank_with()

    def trained(names, expected: set[str]) -> None:
        bank.zero_grad()
        step(bank, Routing.from_sequences(names, 2, bank))
        assert gradients(bank) == dict.fromkeys(expected, True)
        for name in expected:
            for parameter in bank[name].parameters():
                assert parameter.grad.dtype == parameter.dtype and parameter.grad.is_contiguous()

    for _ in range(2):
        trained(["a", "b"], {"a", "b"})
        bank["a"].requires_grad_(False)
        trained(["a", "b"], {"b"})
        bank["a"].requires_grad_(True)
        trained(["a", "c"], {"a", "c"})
        trained(["c"], {"c"})
        trained(["b", "__base__"], {"b"})
        trained(["a", "b", "c"], {"a", "b", "c"})
    bank.remove("a")
    bank.add("d", torch.randn(5, K), torch.randn(N, 5), 1.0)
    trained(["d", "b"], {"d", "b"})
    bank.to(torch.float64)
    bank.zero_grad()
    step(bank, Routing.from_sequences(["d", "c"], 2, bank), x=torch.randn(4, K).double())
    assert gradients(bank) == {"d": True, "c": True}


def test_a_routing_serves_banks_that_hold_some_of_its_adapters():
    slots = AdapterSlots()
    whole, part = bank_with(slots=slots), bank_with(["a", "c"], slots=slots)
    step(part, Routing.from_sequences(["a", "b"], 2, whole))
    assert gradients(part) == {"a": True}
    routing = Routing.from_sequences(["b"], 2, whole)
    assert not routed_lora(torch.randn(2, K), part, routing).requires_grad


def test_gradients_of_weights_and_of_half_frozen_adapters():
    bank = bank_with()
    bank["a"].lora_a.requires_grad_(False)
    weights = torch.randn(6, 2, requires_grad=True)
    routing = Routing.from_weighted([[0, 1]] * 6, weights, bank)
    y = routed_lora(torch.randn(6, K), bank, routing)
    y.square().sum().backward(retain_graph=True)
    once = [p.grad.clone() for p in (weights, bank["a"].lora_b, *bank["b"].parameters())]
    assert bank["a"].lora_a.grad is None and gradients_of(bank["c"]) == [None, None]
    y.square().sum().backward()
    twice = [p.grad for p in (weights, bank["a"].lora_b, *bank["b"].parameters())]
    for first, both in zip(once, twice, strict=True):
        assert first.any() and torch.equal(2 * first, both)


def gradients_of(adapter) -> list:
    return [parameter.grad for parameter in adapter.parameters()]


def test_another_adapter_may_step_between_forward_and_backward_and_a_used_one_may_not():
    bank, x = bank_with(), torch.randn(6, K)
    for changed, raises in (("b", False), ("a", True)):
        y = routed_lora(x, bank, BATCHES["names"](bank))
        with torch.no_grad():
            bank[changed].lora_b.add_(1)
        if raises:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()
        else:
            y.sum().backward()


# --- not known --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sliced", [False, True], ids=["", "sliced"])
@pytest.mark.parametrize("batch", ["tensor", "segments", "weighted"])
def test_exact_zeros_where_ids_are_on_a_device(backend, sliced, batch):
    bank, x = bank_with(sliced=sliced).eval(), torch.randn(6, K)
    torch.manual_seed(1)
    known = BATCHES[batch](bank)
    step(bank, known, backend, x)
    expected = [p.grad for p in bank["a"].parameters()]
    for adapters, zeros in ((None, {"b", "c"}), (["c", "a"], {"c"}), (["a"], set())):
        bank.zero_grad()
        torch.manual_seed(1)
        with AsOnADevice():
            routing = BATCHES[batch](bank, adapters=adapters)
        step(bank, routing, backend, x)
        assert gradients(bank) == {"a": True, **dict.fromkeys(zeros, False)}
        assert all(
            torch.equal(p.grad, q) for p, q in zip(bank["a"].parameters(), expected, strict=True)
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_id_outside_of_adapters_acts_as_none_on_a_device(backend):
    bank, x = bank_with().eval(), torch.randn(6, K)
    with AsOnADevice():
        ids = torch.tensor([0, 1, 2, 1, -1, 0])
        routing = Routing.from_tokens(ids, bank, adapters=["c", "a", "__base__"])
        weighted = Routing.from_weighted(
            ids.view(3, 2), torch.ones(3, 2), bank, adapters=["c", "a"]
        )
    expected = routed_lora(x, bank, Routing.from_tokens([0, -1, 2, -1, -1, 0], bank))
    assert torch.equal(routed_lora(x, bank, routing), expected)
    step(bank, routing, backend)
    step(bank, weighted, backend)
    assert gradients(bank) == {"a": True, "c": True}


def test_adapters_on_every_constructor_and_in_later_fillings():
    slots = bank_with().slots
    for name, make in BATCHES.items():
        assert make(slots, adapters=["a", "b", "c"]).adapters == ("a", "b", "c"), name
        assert make(slots, adapters=["a", "b", "c"]).trained_slots() == (0,), name
    routing = Routing.empty(6, slots, adapters=["b"])
    assert routing.set_tokens_([1, -1]).trained_slots() == (1,)
    with AsOnADevice():
        assert routing.set_tokens_(torch.tensor([1, -1])).trained_slots() == (1,)
        assert Routing.empty(6, slots).set_tokens_(torch.tensor([1])).trained_slots() is None
    with pytest.raises(ValueError, match=r"ids: .* slots of adapters=\['b'\], .* got 0"):
        routing.set_tokens_([1, 0])
    with pytest.raises(ValueError, match=r"names: .*one of adapters=\['b'\], .* got 'c'"):
        routing.set_sequences_(["b", "__base__", "c"], 2)
    with pytest.raises(ValueError, match=r"ids: .* got 2"):
        routing.set_segments_([2], [0, 3])
    with pytest.raises(ValueError, match=r"ids: .* got 2"):
        Routing.from_weighted([[1, 2]], [[1.0, 1.0]], slots, adapters=["b"])


@pytest.mark.parametrize(
    "given, error, message",
    [
        ("ab", TypeError, "adapters: expected a list of names, got 'ab'"),
        (3, TypeError, "adapters: expected a list of names, got 3"),
        ([0], TypeError, "adapters: expected names, got a int"),
        (["a", "z"], ValueError, "adapters: expected names among ['a', 'b', 'c'], got 'z'"),
    ],
)
def test_adapters_that_are_none(given, error, message):
    bank = bank_with()
    with pytest.raises(error) as raised:
        Routing.from_tokens([0], bank, adapters=given)
    assert message in str(raised.value)


def test_adapters_follow_their_slots():
    """A name outside of them is removed, and later one of them: its slot is another's by then."""
    bank = bank_with()
    routing = Routing.empty(2, bank, adapters=["b", "c"])
    bank.remove("a")
    bank.add("d", torch.randn(2, K), torch.randn(N, 2), 1.0)  # in a's slot
    routing.set_sequences_(["b", "c"], 1)
    assert routing.trained_slots() == (1, 2)
    bank.remove("c")
    bank.add("e", torch.randn(2, K), torch.randn(N, 2), 1.0)  # in c's slot
    with pytest.raises(ValueError, match="adapters: 'c', which this routing was made with, was"):
        routing.set_sequences_(["b"], 2)
    bank.add("c", torch.randn(2, K), torch.randn(N, 2), 1.0)
    assert routing.set_sequences_(["c"], 2).trained_slots() == (bank["c"].slot,)
    with AsOnADevice():
        routing.set_tokens_(torch.tensor([2, bank["c"].slot]))
    assert routed_lora(torch.randn(2, K), bank, routing).any(1).tolist() == [False, True]


def test_a_captured_graph_serves_every_filling(monkeypatch):
    """It is replayed with other names than it was captured with: all of them have gradients."""
    bank, x = bank_with().eval(), torch.randn(6, K)
    whole = Routing.from_sequences(["a"], 6, bank)
    bound = Routing.from_sequences(["a"], 6, bank, adapters=["c", "a"])
    for module in (routing_module, layouts):
        monkeypatch.setattr(module, "is_captured", lambda device: True)
    step(bank, whole, x=x)
    assert gradients(bank) == {"a": True, "b": False, "c": False}
    bank.zero_grad()
    step(bank, bound, x=x)
    assert gradients(bank) == {"a": True, "c": False}
    captured, _ = bank.gradients(bound.trained_slots())
    monkeypatch.undo()
    plain, _ = bank.gradients((0, 2))
    assert captured[:3] == plain[:3] and torch.equal(captured.table, plain.table)
    assert captured.table is not bank.gradients((0, 2))[0].table, (
        "a replay fills it: it is not kept"
    )


def test_meta_tensors():
    bank = bank_with().to("meta")
    ids = torch.empty(6, dtype=torch.int64, device="meta")
    for adapters, expected in ((None, {"a", "b", "c"}), (["b"], {"b"})):
        bank.zero_grad()
        routing = Routing.from_tokens(ids, bank, adapters=adapters)
        routed_lora(torch.randn(6, K, device="meta"), bank, routing).sum().backward()
        named = bank.named_parameters()
        assert {name.split(".")[1] for name, p in named if p.grad is not None} == expected
    bank.zero_grad()
    routing = Routing.from_sequences(["b"], 6, bank)
    routed_lora(torch.randn(6, K, device="meta"), bank, routing).sum().backward()
    assert [p.grad is None for p in bank.parameters()] == [True, True, False, False, True, True]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_graphs_have_zeros_for_the_adapters_that_are_named(backend):
    """One graph for every batch with the same adapters=, whatever names the batch has."""
    torch._dynamo.reset()
    bank, x = bank_with().eval(), torch.randn(6, K)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, backend=counter)
    def layer(x, routing):
        return routed_lora(x, bank, routing).sin()

    for names in (["a"], ["c"], ["a", "c"], ["__base__"]):
        routing = Routing.from_sequences(names, 6 // len(names), bank, adapters=["a", "c"])
        bank.zero_grad()
        layer(x, routing).sum().backward()
        assert gradients(bank) == {"a": "a" in names, "c": "c" in names}
        compiled = {n: p.grad for n, p in bank.named_parameters()}
        bank.zero_grad()
        if names != ["__base__"]:
            routed_lora(x, bank, routing).sin().sum().backward()
        for n, p in bank.named_parameters():
            assert p.grad is None or torch.allclose(p.grad, compiled[n], rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1
    layer(x, Routing.from_sequences(["a"], 6, bank)).sum().backward()
    assert gradients(bank)["b"] is False
