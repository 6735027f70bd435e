"""AdapterBank in training: optimizers per adapter, graphs that are alive, foreign parameters."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from lora_kernels.ops.routed import (
    AdapterBank,
    AdapterSlots,
    Routing,
    routed_expand,
    routed_lora,
    routed_shrink,
)

BACKENDS = ["reference", "composed"]
K, N = 21, 17
NAMES = ["a", "b", "__base__", "a", "c", "b"]


def filled(**options) -> AdapterBank:
    bank = AdapterBank(K, N, **options)
    for index, (name, rank) in enumerate({"a": 3, "b": 1, "c": 8}.items()):
        bank.add(name, torch.randn(rank, K), torch.randn(N, rank), 0.5 + index)
    return bank


def call(bank: AdapterBank, x: torch.Tensor, backend: str = "composed", names=NAMES):
    return routed_lora(x, bank, Routing.from_sequences(names, 1, bank), backend=backend)


OPTIMIZERS = {
    "fused_adamw": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "foreach_adamw": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "foreach_sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "loop_adamw": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=False),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("separate", [True, False], ids=["one_each", "one_for_all"])
def test_training_is_that_of_plain_parameters(backend, kind, separate):
    """Steps, growth, a removal and a cast in between; a twin of plain tensors takes the same."""
    bank = filled(dtype=torch.float64)
    twin = {n: p.detach().clone().requires_grad_() for n, p in bank.named_parameters()}
    scalings = {name: bank[name].scaling.item() for name in bank}

    def optimizers(groups):
        groups = groups if separate else [[p for group in groups for p in group]]
        return [OPTIMIZERS[kind](group) for group in groups]

    ours = optimizers([list(bank[name].parameters()) for name in bank])
    theirs = optimizers([[twin[f"adapters.{n}.lora_{f}"] for f in "ab"] for n in bank])
    x, target = torch.randn(6, K).double(), torch.randn(6, N).double()
    for step in range(6):
        if step == 2:
            bank.add("grown", torch.randn(70, K), torch.randn(N, 70), 1.0)
        if step == 3:
            bank.remove("grown")
        if step == 4:
            bank.add("other", torch.randn(3, K), torch.randn(N, 3), 1.0)
        loss = (call(bank, x, backend) - target).square().mean()
        rows = []
        for row, name in zip(x, NAMES, strict=True):
            if name == "__base__":
                rows.append(torch.zeros(N, dtype=torch.float64))
                continue
            a, b = (twin[f"adapters.{name}.lora_{f}"] for f in "ab")
            rows.append(scalings[name] * (b @ (a @ row)))
        expected = (torch.stack(rows) - target).square().mean()
        assert abs(loss.item() - expected.item()) <= 1e-9 * expected.item(), step
        for optimizer, value in ((ours, loss), (theirs, expected)):
            for one in optimizer:
                one.zero_grad()
            value.backward()
            for one in optimizer:
                one.step()
    for name, expected in twin.items():
        actual = bank.get_parameter(name)
        torch.testing.assert_close(actual.detach(), expected.detach(), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_adapters_step_between_forward_and_backward(backend):
    bank, x = filled(), torch.randn(6, K, requires_grad=True)
    names = ["a", "b", "a", "b", "a", "b"]
    parameters = [*bank["a"].parameters(), *bank["b"].parameters(), x]
    expected = torch.autograd.grad(call(bank, x, backend, names).sum(), parameters)
    y = call(bank, x, backend, names)
    for parameter in bank["c"].parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(bank["c"].parameters(), lr=1.0, fused=True).step()
    actual = torch.autograd.grad(y.sum(), parameters)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("factor", ["lora_a", "lora_b"])
@pytest.mark.parametrize("how", ["loop", "foreach", "add_"])  # torch's fused ones count no versions
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_its_own_step_between_forward_and_backward_raises(factor, how, frozen):
    bank, x = filled(), torch.randn(6, K, requires_grad=True)
    parameter = getattr(bank["a"], factor).requires_grad_(not frozen)
    y = call(bank, x)
    if how == "add_":
        with torch.no_grad():
            parameter.add_(1)
    else:
        parameter.requires_grad_(True).grad = torch.ones_like(parameter)
        torch.optim.AdamW([parameter], foreach=how == "foreach").step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("half", ["whole", "shrink", "expand"])
@pytest.mark.parametrize("reserved", [False, True], ids=["", "reserved"])
def test_a_backward_has_what_its_forward_had(half, reserved):
    """Whatever is written where a removed adapter was must not become a gradient."""
    bank, x = filled(), torch.randn(6, K, requires_grad=True)
    if reserved:
        bank.reserve(12, 8)  # no room for another
    routing = Routing.from_sequences(NAMES, 1, bank)

    def result():
        if half == "whole":
            return routed_lora(x, bank, routing)
        if half == "shrink":
            return routed_shrink(x, bank, routing)
        return routed_expand(routed_shrink(x, bank, routing), bank, routing)

    parameters = [x, *bank.parameters()]
    expected = torch.autograd.grad(result().sum(), parameters)
    y = result()
    bank.remove("a")
    try:
        bank.add("d", torch.full((3, K), 1e6), torch.full((N, 3), 1e6), 1.0)
    except RuntimeError as error:
        assert reserved and "do not fit" in str(error)
    actual = torch.autograd.grad(y.sum(), parameters)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    with pytest.raises(ValueError, match="routing: adapters were removed"):
        result()
    del y
    gc.collect()
    assert "d" in bank or bank.add("d", torch.randn(3, K), torch.randn(N, 3), 1.0)


def test_removal_of_an_adapter_that_the_batch_does_not_use():
    bank, x = filled(), torch.randn(3, K, requires_grad=True)
    parameters = [x, *bank["a"].parameters(), *bank["c"].parameters()]
    expected = torch.autograd.grad(call(bank, x, names=["a", "c", "a"]).sum(), parameters)
    y = call(bank, x, names=["a", "c", "a"])
    bank.remove("b")
    bank.add("d", torch.full((1, K), 1e6), torch.full((N, 1), 1e6), 1.0)
    actual = torch.autograd.grad(y.sum(), parameters)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", ["growth", "slots", "deepcopied"])
def test_the_storage_may_move_while_a_graph_is_alive(backend, change):
    bank = filled(slots=AdapterSlots(capacity=3))
    x = torch.randn(6, K, requires_grad=True)
    parameters = [x, *bank.parameters()]
    expected = torch.autograd.grad(call(bank, x, backend).sum(), parameters)
    y = call(bank, x, backend)
    if change == "growth":
        bank.reserve(1000)
    elif change == "slots":
        bank.add("d", torch.randn(50, K), torch.randn(N, 50), 7.0)
    else:
        copy.deepcopy(bank)
    actual = torch.autograd.grad(y.sum(), parameters)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scaling_that_changes_between_forward_and_backward(backend):
    """The gradients of the forward that was, or an error: not those of another function."""
    bank, x = filled(), torch.randn(6, K, requires_grad=True)
    expected = torch.autograd.grad(call(bank, x, backend).sum(), [x, *bank.parameters()])
    y = call(bank, x, backend)
    bank["a"].scaling = 100.0
    try:
        actual = torch.autograd.grad(y.sum(), [x, *bank.parameters()])
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_add_up_over_calls_and_layers(backend):
    slots = AdapterSlots()
    one, other = filled(slots=slots), AdapterBank(N, K, slots=slots)
    for name in "abc":
        other.add(name, torch.randn(2, N), torch.randn(K, 2), 1.0)
    x = torch.randn(6, K)
    parameters = [*one.parameters(), *other.parameters()]

    def model(x):
        return call(other, call(one, x, backend), backend)

    for _ in range(2):
        model(x).square().sum().backward()
    twice = [p.grad.clone() for p in parameters]
    once = torch.autograd.grad(model(x).square().sum(), parameters)
    assert all(torch.equal(a, 2 * b) for a, b in zip(twice, once, strict=True))
    for p in parameters:
        assert p.grad.shape == p.shape and p.grad.is_contiguous()
    norm = nn.utils.clip_grad_norm_(one["a"].parameters(), 1e-3)
    assert norm > 1e-3
    for p, before in zip(parameters, twice, strict=True):
        clipped = any(p is q for q in one["a"].parameters())
        assert torch.equal(p.grad, before) != clipped


def test_the_graph_frees_what_it_saved():
    bank, x = filled(), torch.randn(6, K, requires_grad=True)
    y = call(bank, x)
    function = weakref.ref(y.grad_fn)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    del y
    gc.collect()
    assert function() is None


# --- foreign parameters -----------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, bank: AdapterBank) -> None:
        super().__init__()
        self.bank = bank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return call(self.bank, x)


@pytest.mark.parametrize("as_parameter", [False, True], ids=["tensors", "parameters"])
@pytest.mark.parametrize("all_of_them", [False, True], ids=["one", "all"])
def test_functional_call_is_refused_and_does_no_harm(as_parameter, all_of_them):
    bank, x = filled(), torch.randn(6, K)
    model, before = Model(bank), {n: p.detach().clone() for n, p in bank.named_parameters()}
    expected = model(x)
    names = list(before) if all_of_them else ["adapters.b.lora_b"]
    values = {f"bank.{n}": torch.randn_like(before[n]) for n in names}
    if as_parameter:
        values = {n: nn.Parameter(value) for n, value in values.items()}
    with pytest.raises(RuntimeError, match="functional_call"):
        torch.func.functional_call(model, values, (x,))
    for name, parameter in bank.named_parameters():
        assert torch.equal(parameter, before[name]), f"{name} has been overwritten"
    assert torch.equal(model(x), expected)


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("kind", ["tensor", "subclass", "zero3", "shape", "dtype", "parametrized"])
def test_foreign_parameters_are_refused(kind):
    bank, x = filled(), torch.randn(6, K)
    adapter = bank["b"]
    value = adapter.lora_a.detach().clone()
    message = "FSDP and ZeRO-3"
    if kind == "tensor":
        adapter._parameters["lora_a"] = value
    elif kind == "subclass":
        adapter._parameters["lora_a"] = nn.Parameter(value.as_subclass(Subclass))
    elif kind == "zero3":
        adapter.lora_a.ds_id, adapter.lora_a.data = 3, torch.empty(0)
    elif kind == "shape":
        adapter.lora_a.data = torch.empty(0)
    elif kind == "dtype":
        adapter.lora_a.data = value.double()
        message = "different dtypes or devices"
    else:
        nn.utils.parametrize.register_parametrization(adapter, "lora_a", nn.Identity())
        message = "parametrizations"
    with pytest.raises(RuntimeError, match=message):
        call(bank, x)


def test_a_new_parameter_set_by_the_user_is_bound():
    bank, x = filled(), torch.randn(6, K)
    new = nn.Parameter(torch.randn(1, K))
    bank["b"].lora_a = new
    with pytest.raises(RuntimeError, match=r"replaced by a Parameter.*call rebind\(\)"):
        call(bank, x)
    bank.rebind()
    y = call(bank, x)
    assert bank["b"].lora_a is new
    row = 1.5 * bank["b"].lora_b @ (new @ x[1])
    torch.testing.assert_close(y[1], row.detach().squeeze(), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(y.sum(), new)
    assert gradient.any()


def test_inference_mode_around_add_and_growth():
    """A server adds adapters where it serves; training them afterwards must work or never have."""
    bank = filled()
    with torch.inference_mode():
        bank.add("d", torch.randn(90, K), torch.randn(N, 90), 1.0)
        call(bank, torch.randn(6, K))
    y = call(bank, torch.randn(6, K), names=["a", "d", "b", "c", "d", "d"])
    gradients = torch.autograd.grad(y.sum(), list(bank.parameters()))
    assert all(g.any() for g in gradients)
