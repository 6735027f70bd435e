"""``RoutedLoRALinear``: the op behind a layer, and everything that happens to modules."""

import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_kernels import AdapterSlots, LoRALinear, RoutedLoRALinear, Routing
from lora_kernels.nn import ActiveAdapters
from lora_kernels.testing import assert_within_policy

K, N = 13, 11
RANKS = {"one": 3, "two": 5, "last": 1}
SCALINGS = {"one": 0.5, "two": -1.25, "last": 2.0}


def fill(layer, names=RANKS) -> None:
    generator = torch.Generator().manual_seed(4)
    for name in names:
        a = torch.randn(RANKS[name], K, generator=generator)
        b = torch.randn(N, RANKS[name], generator=generator)
        layer.bank.add(name, a, b, SCALINGS[name])


def make(**options) -> RoutedLoRALinear:
    layer = RoutedLoRALinear(K, N, **options)
    fill(layer)
    return layer


NAMES = ["two", "__base__", "last", "one", "two"]


def routing_for(layer, names=NAMES, length=3) -> Routing:
    return Routing.from_sequences(names, length, layer.bank)


def eager(layer, x, names=NAMES, dtype=None):
    """PEFT's formula, a sequence at a time; x ``[S, T, K]``."""
    dtype = dtype or x.dtype
    rows = []
    for name, row in zip(names, x.to(dtype), strict=True):
        bias = None if layer.bias is None else layer.bias.to(dtype)
        y = F.linear(row, layer.weight.to(dtype), bias)
        if name != "__base__":
            adapter = layer.bank[name]
            a, b = (p.to(dtype) for p in (adapter.lora_a, adapter.lora_b))
            y = y + F.linear(F.linear(row, a), b) * SCALINGS[name]
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        (torch.float32, None),
        (torch.float64, None),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, None),
    ],
    ids=str,
)
def test_forward_and_backward(dtype, adapter_dtype, bias):
    layer = make(bias=bias, dtype=dtype, adapter_dtype=adapter_dtype)
    expected = adapter_dtype or (dtype if dtype.itemsize >= 4 else torch.float32)
    assert layer.bank.dtype == expected
    x = torch.randn(5, 3, K, dtype=dtype)
    cotangent = torch.randn(5, 3, N, dtype=dtype)

    def run(layer, x, forward):
        x = x.detach().requires_grad_()
        layer.zero_grad()
        y = forward(layer, x)
        y.backward(cotangent.to(y.dtype))
        gradients = {name: p.grad for name, p in layer.bank.named_parameters()}
        return {"y": y.detach(), "x": x.grad, **gradients}

    ours = run(layer, x, lambda layer, x: layer(x, routing_for(layer)))
    plain = run(layer, x, eager)
    exact = run(copy.deepcopy(layer).double(), x.double(), eager)
    for name, value in ours.items():
        assert_within_policy(name, value, plain[name], exact[name], dtype)
    assert layer.weight.grad is None and not layer.weight.requires_grad


def test_the_base_is_shared_and_frozen():
    linear = nn.Linear(K, N)
    layer = RoutedLoRALinear.from_linear(linear)
    assert layer.base_layer is linear and layer.weight is linear.weight
    assert not linear.weight.requires_grad and not linear.bias.requires_grad
    x = torch.randn(4, K)
    assert torch.equal(layer(x), linear(x))  # no adapters, no routing
    fill(layer)
    assert torch.equal(layer(x, Routing.from_tokens([-1] * 4, layer.bank)), linear(x))
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == [
        f"bank.adapters.{name}.{side}" for name in RANKS for side in ("lora_a", "lora_b")
    ]


def test_layers_share_slots_and_a_routing():
    slots = AdapterSlots()
    first, second = make(slots=slots), RoutedLoRALinear(K, N, slots=slots)
    fill(second, names=["last"])
    routing = routing_for(first)
    x = torch.randn(5, 3, K)
    torch.testing.assert_close(first(x, routing), eager(first, x))
    only_last = [name if name == "last" else "__base__" for name in NAMES]
    torch.testing.assert_close(second(x, routing), eager(second, x, only_last))


def test_modes_and_dropout():
    layer = RoutedLoRALinear(K, N)
    layer.bank.add("one", torch.randn(3, K), torch.randn(N, 3), 1.0, dropout_p=0.5)
    routing = Routing.from_tokens([layer.bank.slots["one"]] * 4, layer.bank)
    x = torch.randn(4, K)
    torch.manual_seed(0)
    dropped = layer(x, routing)
    torch.manual_seed(0)
    assert torch.equal(layer(x, routing), dropped)
    kept = layer.eval()(x, routing)
    assert torch.equal(layer(x, routing), kept)
    assert not torch.allclose(kept, dropped)


def test_autocast():
    layer = make()
    x = torch.randn(5, 3, K)
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = layer(x, routing_for(layer)), eager(layer, x)
    assert_within_policy("y", y, plain, eager(layer, x, dtype=torch.float64).detach())


# --- who says which adapters -----------------------------------------------------------------


def test_never_the_base_in_silence():
    layer = make()
    x = torch.randn(5, 3, K)
    with pytest.raises(RuntimeError, match=r"adapters \['one', 'two', 'last'\] and nothing says"):
        layer(x)
    layer.active_adapters = ActiveAdapters(layer.bank.slots)
    with pytest.raises(RuntimeError, match="nothing says which of them to use"):
        layer(x)
    with layer.active_adapters.use(NAMES):
        torch.testing.assert_close(layer(x), eager(layer, x))
    with pytest.raises(RuntimeError, match="nothing says"):
        layer(x)
    for name in RANKS:
        layer.bank.remove(name)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_a_routing_of_the_call_goes_first():
    layer = make()
    layer.active_adapters = ActiveAdapters(layer.bank.slots)
    x = torch.randn(5, 3, K)
    with layer.active_adapters.use("one"):
        torch.testing.assert_close(layer(x, routing_for(layer)), eager(layer, x))
        torch.testing.assert_close(layer(x), eager(layer, x, ["one"] * 5))


# --- what happens to modules -----------------------------------------------------------------


def through_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def through_torch_save(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies_are_equal_and_apart(duplicate):
    layer = make()
    layer.active_adapters = ActiveAdapters(layer.bank.slots)
    twins = duplicate(nn.ModuleList([layer, layer]))
    copied = twins[0]
    assert copied.bank.slots is copied.active_adapters.slots is not layer.bank.slots
    x = torch.randn(5, 3, K)
    expected = eager(layer, x)
    with copied.active_adapters.use(NAMES):
        torch.testing.assert_close(copied(x), expected)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
        assert (copied(x) == 0).all()
    torch.testing.assert_close(layer(x, routing_for(layer)), expected)
    copied.bank.remove("two")
    assert "two" in layer.bank and "two" in layer.bank.slots


def test_a_copy_made_inside_of_a_choice_is_outside():
    layer = make()
    layer.active_adapters = ActiveAdapters(layer.bank.slots)
    with layer.active_adapters.use("one"):
        copied = copy.deepcopy(layer)
        with pytest.raises(RuntimeError, match="nothing says"):
            copied(torch.randn(2, K))


def test_state_dicts():
    layer, other = make(), make()
    names = ["base_layer.weight", "base_layer.bias"]
    names += [f"bank.adapters.{name}.{side}" for name in RANKS for side in ("lora_a", "lora_b")]
    assert sorted(layer.state_dict()) == sorted(names)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    for assign in (False, True):
        target = copy.deepcopy(layer)
        target.load_state_dict(other.state_dict(), assign=assign)
        x = torch.randn(5, 3, K)
        y = target(x, routing_for(target))
        assert torch.equal(y, other(x, routing_for(other)))
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict(RoutedLoRALinear(K, N).state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_to_another_dtype(dtype):
    layer = make().to(dtype)
    assert layer.bank.dtype == layer.weight.dtype == dtype
    x = torch.randn(5, 3, K, dtype=dtype)
    exact = eager(layer, x, dtype=torch.float64).detach()
    assert_within_policy(
        "y", layer(x, routing_for(layer)).detach(), eager(layer, x).detach(), exact
    )


def test_made_on_the_meta_device():
    layer = RoutedLoRALinear(K, N, device="meta")
    assert layer.weight.is_meta and layer.bank.device.type == "meta"


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant):
    layer = RoutedLoRALinear(K, N)
    layer.bank.add("one", torch.randn(3, K), torch.randn(N, 3), 1.0, dropout_p=0.5)
    routing = Routing.from_tokens([layer.bank.slots["one"], -1, 0, 0], layer.bank)
    x = torch.randn(4, K, requires_grad=True)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        layer.zero_grad()
        x.grad = None
        if checkpointed:
            y = torch.utils.checkpoint.checkpoint(layer, x, routing, use_reentrant=use_reentrant)
        else:
            y = layer(x, routing)
        y.square().sum().backward()
        gradients.append([x.grad] + [p.grad for p in layer.bank.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# --- what is refused -------------------------------------------------------------------------


REFUSED = {
    "embedding": (lambda: nn.Embedding(K, N), TypeError, "expected a torch.nn.Linear, got Embed"),
    "lazy": (lambda: nn.LazyLinear(N), TypeError, "expected a weight, got one that its first"),
    "lora": (lambda: LoRALinear(K, N, 2, 4), TypeError, "expected a torch.nn.Linear"),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(K, N)),
        TypeError,
        "linear: ",
    ),
}


@pytest.mark.parametrize(("linear", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_linears(linear, error, message):
    linear = linear()
    frozen = [p.requires_grad for p in linear.parameters()]
    with pytest.raises(error, match=re.escape(message)):
        RoutedLoRALinear.from_linear(linear)
    assert [p.requires_grad for p in linear.parameters()] == frozen


def test_refused_sizes_and_dtypes():
    with pytest.raises(ValueError, match="in_features: expected at least 1, got 0"):
        RoutedLoRALinear(0, 3)
    with pytest.raises(TypeError, match="out_features: expected an integer"):
        RoutedLoRALinear(3, 2.0)
    with pytest.raises(TypeError, match="adapter_dtype: expected dtype bfloat16"):
        RoutedLoRALinear(3, 2, adapter_dtype=torch.int8)
    with pytest.raises(TypeError, match="slots: expected AdapterSlots, got int"):
        RoutedLoRALinear(3, 2, slots=3)


def test_hooks_on_the_bank():
    layer = make()
    handle = layer.bank.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="bank: it has hooks"):
        layer(torch.randn(5, 3, K), routing_for(layer))
    handle.remove()
    called = []
    layer.register_forward_hook(lambda *_: called.append(1))
    layer(torch.randn(5, 3, K), routing_for(layer))
    assert called == [1]


def test_refused_input():
    layer = make()
    with pytest.raises(ValueError, match=r"x: expected \[..., 13\], got \[15, 12\]"):
        layer(torch.randn(15, 12), routing_for(layer))
    with pytest.raises(ValueError, match="x: expected 15 tokens"):
        layer(torch.randn(14, K), routing_for(layer))
    with pytest.raises(ValueError, match="expected one made for the bank's slots"):
        layer(torch.randn(15, K), routing_for(make()))
