"""Linear layers over a base that does more than its weight says: it is called, at every call."""

import copy
import re

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from attached import (
    ATTACHMENTS,
    RANK,
    Doubled,
    K,
    N,
    backward_hook,
    class_of_its_own,
    forward_hook,
    make,
    offloaded,
    parametrized,
    pefts,
    quantisation_aware,
)
from torch import nn
from torch.nn import functional as F
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from lora_kernels import LoRALinear, RoutedLoRALinear, Routing, route
from lora_kernels.testing import assert_draws_within_policy, assert_within_policy, redrawn

NAMES = ["two", "__base__", "one", "two"]

VARIANTS = {
    "plain": {},
    "no_base_bias": {"bias": False},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "dora_no_base_bias": {"use_dora": True, "bias": False},
}
PRECISIONS = {
    "fp64": (torch.float64, None, None),
    "fp32": (torch.float32, None, None),
    "bf16": (torch.bfloat16, torch.bfloat16, None),
    "fp32_autocast": (torch.float32, None, torch.bfloat16),
    "bf16_fp32_adapters": (torch.bfloat16, torch.float32, torch.bfloat16),
}


def outcome(layer, x, dy, forward, autocast=None) -> dict:
    layer.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = forward(layer, x)
    y.backward(dy.to(y.dtype))
    found = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **found}


def assert_parity(layer, wide, x, dy, ours, eager, autocast=None):
    def draw(number):
        inputs = redrawn(x, number, "x"), redrawn(dy, number, "dy")
        results = outcome(layer, *inputs, ours, autocast)
        plain = outcome(layer, *inputs, eager, autocast)
        exact = outcome(wide, *(tensor.double() for tensor in inputs), eager)
        assert results.keys() == plain.keys() == exact.keys()
        return results, plain, exact

    return assert_draws_within_policy(draw, autocast)


CASES = {
    f"{attach}-{variant}-{precision}": (ATTACHMENTS[attach], VARIANTS[variant], *kinds)
    for attach in ATTACHMENTS
    for variant in VARIANTS
    for precision, kinds in PRECISIONS.items()
    if (attach, precision) != ("quantisation_aware", "fp64")  # torchao has none
    and not (attach == "offloaded" and "dora" in variant)
}


@pytest.mark.parametrize(
    ("attach", "variant", "dtype", "adapter_dtype", "autocast"), CASES.values(), ids=CASES
)
def test_forward_and_backward_are_pefts(attach, variant, dtype, adapter_dtype, autocast):
    layer = make(dtype, adapter_dtype, **variant)
    wide = copy.deepcopy(layer).double()
    probe = torch.ones(5, K, dtype=dtype)
    plain = layer(probe)
    attach(layer)
    if attach is quantisation_aware:
        quantised = layer.base_layer.weight_fake_quantizer(layer.base_layer.weight).double()
        wide.base_layer.forward = lambda x: F.linear(x, quantised, wide.base_layer.bias)
    else:
        attach(wide)
    x, dy = torch.randn(3, 5, K, dtype=dtype), torch.randn(3, 5, N, dtype=dtype)
    results = assert_parity(layer, wide, x, dy, LoRALinear.forward, pefts, autocast)
    if attach is parametrized:
        assert results["base_layer.parametrizations.weight.0.gain"].abs().sum() > 0
    if attach not in (offloaded, backward_hook):  # those leave the result as it was
        assert not torch.allclose(layer(probe), plain)


def test_doras_norm_needs_the_weight():
    layer = make(use_dora=True)
    offloaded(layer)
    with pytest.raises(RuntimeError, match=r"base_layer: its weight is offloaded .* its norm"):
        layer(torch.randn(5, K))
    layer = make(use_dora=True)
    quantize_(layer.base_layer, Int8WeightOnlyConfig())
    came = type(layer.base_layer.weight).__name__  # Int8Tensor; an older torchao has another
    with pytest.raises(TypeError, match=f"weight: expected a plain tensor, got a {came}"):
        layer(torch.randn(5, K))


@pytest.mark.parametrize("attach", ATTACHMENTS.values(), ids=ATTACHMENTS)
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_dropout_meets_the_adapters_input_alone(attach, use_dora):
    if use_dora and attach is offloaded:
        return
    layer = make(use_dora=use_dora, dropout_p=0.4)
    x = torch.randn(300, K)
    torch.manual_seed(3)
    delta = layer(x) - layer.base_layer(x)
    c = layer._output_scale().detach() if use_dora else None
    attach(layer)
    torch.manual_seed(3)
    y, base = layer(x), layer.base_layer
    torch.manual_seed(3)
    if use_dora:
        dropped = F.dropout(x, 0.4)
        c = layer._output_scale()
        adapter = F.linear(F.linear(dropped, layer.lora_A.weight), layer.lora_B.weight)
        part = base(dropped) - base.bias
        expected = base(x) + (c - 1) * part + c * layer.scaling * adapter
    else:
        expected = base(x) + delta
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


# --- routed ----------------------------------------------------------------------------------


def make_routed(dtype=torch.float32, adapter_dtype=None, linear=None) -> RoutedLoRALinear:
    layer = RoutedLoRALinear.from_linear(
        linear or nn.Linear(K, N, dtype=dtype), adapter_dtype=adapter_dtype
    )
    layer.bank.add("one", torch.randn(RANK, K), torch.randn(N, RANK), 0.5)
    layer.bank.add("two", torch.randn(5, K), torch.randn(N, 5), -1.25)
    return layer


def routed_forward(layer, x):
    return layer(x, Routing.from_sequences(NAMES, x.shape[1], layer.bank))


def row_by_row(layer, x):
    """PEFT's formula, a sequence at a time."""
    y = layer.base_layer(x)
    rows = []
    for name, row, base in zip(NAMES, x, y, strict=True):
        if name != "__base__":
            adapter = layer.bank[name]
            hidden = F.linear(row.to(adapter.lora_a.dtype), adapter.lora_a)
            base = base + F.linear(hidden, adapter.lora_b) * float(adapter.scaling)
        rows.append(base.to(y.dtype))
    return torch.stack(rows)


ROUTED = {name: case for name, case in CASES.items() if name.split("-")[1] == "plain"}


@pytest.mark.parametrize(
    ("attach", "variant", "dtype", "adapter_dtype", "autocast"), ROUTED.values(), ids=ROUTED
)
def test_routed_forward_and_backward(attach, variant, dtype, adapter_dtype, autocast):
    layer = make_routed(dtype, adapter_dtype)
    wide = copy.deepcopy(layer).double()
    attach(layer)
    if attach is quantisation_aware:
        quantised = layer.base_layer.weight_fake_quantizer(layer.base_layer.weight).double()
        wide.base_layer.forward = lambda x: F.linear(x, quantised, wide.base_layer.bias)
    else:
        attach(wide)
    x, dy = torch.randn(4, 5, K, dtype=dtype), torch.randn(4, 5, N, dtype=dtype)
    assert_parity(layer, wide, x, dy, routed_forward, row_by_row, autocast)
    y = routed_forward(layer, x)
    assert torch.equal(y[1], layer.base_layer(x)[1])


def test_what_a_hook_has_kept_is_not_written_to():
    layer, kept = make_routed(), []
    layer.base_layer.register_forward_hook(lambda module, args, y: kept.append(y))
    x = torch.randn(4, 5, K)
    with torch.no_grad():
        routed_forward(layer, x)
    assert torch.equal(kept[0], F.linear(x, layer.base_layer.weight, layer.base_layer.bias))


# --- every call ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora", "routed"])
def test_every_call_looks_again(kind):
    layer = make_routed() if kind == "routed" else make(use_dora=kind == "dora")
    forward = routed_forward if kind == "routed" else LoRALinear.forward
    x, seen = torch.randn(4, 5, K), []
    plain = forward(layer, x)
    handle = layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(forward(layer, x), plain, rtol=1e-5, atol=1e-5)
    handle.remove()
    assert torch.equal(forward(layer, x), plain) and seen == [1]
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(module)
    )
    forward(layer, x)
    handle.remove()
    assert layer.base_layer in seen
    assert torch.equal(forward(layer, x), plain)


@pytest.mark.parametrize("routed", [False, True])
def test_a_base_that_was_quantised(routed):
    layer = make_routed() if routed else make()
    forward = routed_forward if routed else LoRALinear.forward
    wide = copy.deepcopy(layer).double()
    quantize_(layer.base_layer, Int8WeightOnlyConfig())
    weight = layer.base_layer.weight.dequantize()
    with torch.no_grad():
        wide.base_layer.weight.copy_(weight)
    eager = copy.deepcopy(layer)
    eager.base_layer.weight = nn.Parameter(weight, requires_grad=False)
    x, dy = torch.randn(4, 5, K), torch.randn(4, 5, N)
    ours, exact = outcome(layer, x, dy, forward), outcome(wide, x.double(), dy.double(), forward)
    plain = outcome(eager, x, dy, row_by_row if routed else pefts)
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        assert_within_policy(name, value, plain[name], exact[name])


@pytest.mark.parametrize("attach", [class_of_its_own, parametrized, forward_hook])
@pytest.mark.parametrize("kind", ["lora", "dora", "routed"])
def test_second_derivatives(kind, attach):
    options = {"use_dora": kind == "dora"}
    layer = make_routed(torch.float64) if kind == "routed" else make(torch.float64, **options)
    attach(layer)
    ours, theirs = (routed_forward, row_by_row) if kind == "routed" else (LoRALinear.forward, pefts)
    x = torch.randn(4, 5, K, dtype=torch.float64)
    found = []
    for forward in (ours, theirs):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        (force,) = torch.autograd.grad(forward(layer, leaf).sin().sum(), leaf, create_graph=True)
        force.square().sum().backward()
        found.append([leaf.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 2
    for value, other in zip(*found, strict=True):
        torch.testing.assert_close(value, other)


@pytest.mark.parametrize("wrap", [LoRALinear.from_linear, RoutedLoRALinear.from_linear])
@pytest.mark.parametrize("kind", ["class", "hook", "quantisation_aware"])
def test_a_linear_that_does_more_can_be_wrapped(wrap, kind):
    linear = (Doubled if kind == "class" else nn.Linear)(K, N)
    if kind == "hook":
        linear.register_forward_hook(lambda module, args, y: y * 3)
    elif kind == "quantisation_aware":
        model = nn.ModuleDict({"base_layer": linear})
        quantisation_aware(model)
        linear = model["base_layer"]
    x = torch.randn(4, 5, K)
    expected = linear(x)
    assert not torch.equal(expected, F.linear(x, linear.weight, linear.bias))
    if wrap == LoRALinear.from_linear:
        layer = wrap(linear, RANK, 7)
        assert torch.equal(layer(x), expected)  # a new adapter changes nothing
        torch.nn.init.normal_(layer.lora_B.weight)
        torch.testing.assert_close(layer(x), pefts(layer, x))
    else:
        layer = make_routed(linear=linear)
        torch.testing.assert_close(routed_forward(layer, x), row_by_row(layer, x))
    assert layer.base_layer(x).equal(expected)


def test_a_model_whose_layers_have_hooks_or_forwards_of_their_own_is_routed():
    model = nn.Sequential(nn.Linear(K, K), nn.Linear(K, N))
    model[0].register_forward_hook(lambda module, args, y: y * 3)
    model[1].forward = lambda x: F.linear(x, model[1].weight * 2)
    x = torch.randn(2, 3, K)
    expected = model(x)
    routed = route(model)
    routed.add("a", rank=2, alpha=4, target_modules="all-linear")
    with routed.adapters(["a", "__base__"]):
        assert torch.equal(model(x), expected)  # a new adapter changes nothing
        for layer in model:
            nn.init.normal_(layer.bank["a"].lora_b)
        y = model(x)
    assert torch.equal(y[1], expected[1]) and not torch.allclose(y[0], expected[0])


@pytest.mark.parametrize("what", ["tuple", "shape"])
@pytest.mark.parametrize("routed", [False, True])
def test_a_base_that_gives_something_else(what, routed):
    layer = make_routed() if routed else make()
    forward = routed_forward if routed else LoRALinear.forward
    results = {"tuple": lambda y: (y, None), "shape": lambda y: y[..., :1]}
    layer.base_layer.register_forward_hook(lambda module, args, y: results[what](y))
    came = "a tuple" if what == "tuple" else re.escape("[4, 5, 1]")
    with pytest.raises(ValueError, match=rf"base_layer: expected a tensor \[..., {N}\] .* {came}"):
        forward(layer, torch.randn(4, 5, K))


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("attach", [forward_hook, class_of_its_own, parametrized])
def test_compiles_whole(attach, use_dora):
    torch._dynamo.reset()
    layer = make(use_dora=use_dora)
    wide = copy.deepcopy(layer).double()
    attach(layer)
    attach(wide)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(6, K), torch.randn(6, N)
    ours = outcome(layer, x, dy, lambda _, x: compiled(x))
    eager, exact = outcome(layer, x, dy, pefts), outcome(wide, x.double(), dy.double(), pefts)
    assert ours.keys() == eager.keys()
    for name, value in ours.items():
        assert_within_policy(name, value, eager[name], exact[name])


def test_accelerates_offloading_of_the_whole_layer():
    model = nn.Sequential(make(), nn.Linear(N, 3))
    x = torch.randn(5, K)
    expected = model(x)
    cpu_offload(model, "cpu", preload_module_classes=["LoRALinear"])
    assert model[0].base_layer.weight.is_meta and model[0].lora_A.weight.is_meta
    assert torch.equal(model(x), expected)
    for call in (model[0].merge, model[0].reset_lora_parameters):
        with pytest.raises(RuntimeError, match=f"{call.__name__}: .* offloaded"):
            call()
    with pytest.raises(RuntimeError, match=r"load_adapter: lora_A.weight is offloaded"):
        model[0].load_adapter(make().adapter_state_dict())


def test_accelerates_offloading_of_its_parts():
    model = nn.Sequential(make())
    cpu_offload(model, "cpu")
    with pytest.raises(
        ValueError, match=r"lora_A: it has .*offload.* \(accelerate: preload_module"
    ):
        model(torch.randn(5, K))
    linear = nn.Linear(K, N)
    add_hook_to_module(
        linear, AlignDevicesHook("cpu", offload=True, weights_map=dict(linear.state_dict()))
    )
    with pytest.raises(ValueError, match=r"linear: its weight is offloaded \(accelerate\)"):
        RoutedLoRALinear.from_linear(linear)
