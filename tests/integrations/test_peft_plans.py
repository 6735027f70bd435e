"""A layer whose call is known is not read again: it computes, and leaves to PEFT, what it would."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from peft_models import accelerated, build, gradients, inputs, lora_config
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lora_kernels
from lora_kernels.integrations.peft import layers as peft_layers
from lora_kernels.integrations.peft.layers import delegated_calls
from lora_kernels.integrations.peft.state import LayerState, read_call
from lora_kernels.ops.linear import adapted_linear
from lora_kernels.ops.linear.plan import PLANS

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore::UserWarning"),
    pytest.mark.usefixtures("plans_forgotten"),
]


@pytest.fixture
def known(monkeypatch):
    """The calls that were served as known ones; each is held against the full reading."""
    calls = []

    def watched(x, *operands, known_as=None, backend="auto"):
        y = adapted_linear(x, *operands, known_as=known_as, backend=backend)
        if known_as is not None and y is not None:
            calls.append((x, *operands))
        return y

    monkeypatch.setattr(peft_layers, "adapted_linear", watched)
    return calls


def read_as(layer: nn.Module, x: Tensor, base, factors, bias, dropout_p) -> None:
    """Whether :func:`read_call` has the operands that the known call was made with."""
    state = read_call(layer, x, (), {})
    assert type(state) is LayerState, state
    (adapter,) = state.adapters
    assert state.base.weight is base.weight and state.bias is bias
    assert all(a is b for a, b in zip(adapter.factors, factors, strict=True))
    assert (adapter.lora_bias, adapter.magnitude, adapter.dropout_p) == (None, None, dropout_p)


def same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return ours.keys() == expected.keys() and all(
        ours[name].dtype == expected[name].dtype and torch.equal(ours[name], expected[name])
        for name in expected
    )


def frozen(*names: str):
    def freeze(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                parameter.requires_grad_(False)

    return freeze


def with_tensor_scaling(model: nn.Module) -> None:
    for layer in (model.base_model.model.up, model.base_model.model.down):
        layer.scaling["one"] = torch.tensor(layer.scaling["one"])


# What is made of a model, and how many of the layers up and down are ordinary by then.
STATES = {
    "as it is": (lambda m: None, {}, 2),
    "dropout": (lambda m: None, {"lora_dropout": 0.4}, 2),
    "dropout, evaluated": (lambda m: m.eval(), {"lora_dropout": 0.4}, 2),
    "frozen A": (frozen("lora_A"), {"lora_dropout": 0.4}, 2),
    "frozen B": (frozen("lora_B"), {}, 2),
    "all frozen": (frozen("lora"), {}, 2),
    "bf16": (lambda m: m.bfloat16(), {"lora_dropout": 0.4}, 2),
    "fp32 adapters over bf16": (
        lambda m: [layer.base_layer.bfloat16() for layer in (m.up, m.down)], {}, 2,
    ),
    "fp64": (lambda m: m.double(), {}, 2),
    "a scaling on the host": (with_tensor_scaling, {}, 2),
    "trained bias": (lambda m: m.up.base_layer.bias.requires_grad_(), {}, 2),
    "no cast": (lambda m: setattr(m.up, "cast_input_dtype_enabled", False), {}, 2),
    "lora_bias": (lambda m: None, {"lora_bias": True}, 0),
    "DoRA": (lambda m: None, {"use_dora": True}, 0),
    "disabled": (lambda m: m.base_model.disable_adapter_layers(), {}, 0),
    "merged": (lambda m: m.merge_adapter(), {}, 0),
    "a hook": (lambda m: m.up.lora_A["one"].register_forward_hook(lambda *a: None), {}, 1),
    "trained weight": (lambda m: m.up.base_layer.weight.requires_grad_(), {}, 1),
}  # fmt: skip
MODES = {"": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode,
         "autocast": lambda: torch.autocast("cpu", torch.bfloat16)}  # fmt: skip


@pytest.mark.parametrize("shape", [(9,), (2, 3), (), (0,)], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("state", STATES)
def test_a_known_call_has_the_bits_of_the_first(state, mode, shape, known):
    prepare, config, ordinary = STATES[state]
    model = accelerated(build(lora_config(**config)))
    prepare(model)
    dtype = model.base_model.model.up.base_layer.weight.dtype
    layers = model.base_model.model.up, model.base_model.model.down

    def run() -> list[dict[str, Tensor]]:
        torch.manual_seed(5)
        with MODES[mode]():
            found = []
            for layer, columns in zip(layers, (23, 29), strict=True):
                x = torch.randn(*shape, columns, generator=torch.Generator().manual_seed(3))
                x = x.to(torch.float32 if mode == "autocast" else dtype)
                found.append(gradients(layer, x.requires_grad_(mode in ("", "autocast"))))
            return found

    if mode == "autocast" and state == "fp64":
        return
    expected = run()
    assert not known
    again = run()
    assert all(same(*each) for each in zip(again, expected, strict=True))
    # Empty tensors have no address, and under autocast the operands are others.
    assert len(known) == (0 if shape == (0,) or mode == "autocast" else ordinary)
    if ordinary == 2:
        with MODES[mode]():
            for layer, call in zip(layers, known, strict=False):
                read_as(layer, *call)
    PLANS.clear()
    assert all(same(*each) for each in zip(run(), expected, strict=True))


# --- what changes between two calls ----------------------------------------------------------


class Tagged(torch.Tensor):
    pass


def replaced_weight(module: nn.Module, value: Tensor) -> None:
    module._parameters["weight"] = value


def tagged(tensor: Tensor) -> Tensor:
    return tensor.detach().as_subclass(Tagged)


def drawn(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(6)))


def parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def free(tensor: Tensor) -> None:
    tensor.data.untyped_storage().resize_(0)


def half_an_adapter(layer: nn.Module) -> None:
    layer.lora_A["one"].bfloat16()


CHILDREN = {
    "base_layer": lambda layer: layer.base_layer,
    "lora_A": lambda layer: layer.lora_A["one"],
    "lora_B": lambda layer: layer.lora_B["one"],
    "lora_dropout": lambda layer: layer.lora_dropout["one"],
}
# Why PEFT's forward has to serve, or None where ours does or an error is raised.
CHANGES = {
    "fp64 A": (lambda la: la.lora_A["one"].double(), "float64"),
    "fp64 B": (lambda la: la.lora_B["one"].double(), "float64"),
    "bf16 A": (half_an_adapter, None),
    "bf16 A without casts": (
        lambda la: (half_an_adapter(la), setattr(la, "cast_input_dtype_enabled", False)),
        "cast_input_dtype is disabled",
    ),
    "fp64 base": (lambda la: la.base_layer.double(), "float64"),
    "bf16 base": (lambda la: la.base_layer.bfloat16(), "outside autocast"),
    "bf16 bias": (
        lambda la: setattr(la.base_layer, "bias", parameter(la.base_layer.bias.bfloat16())),
        "base bias is bfloat16",
    ),
    "trained weight": (lambda la: la.base_layer.weight.requires_grad_(), "requires grad"),
    "trained bias": (lambda la: la.base_layer.bias.requires_grad_(), None),
    "all dropped": (lambda la: setattr(la.lora_dropout["one"], "p", 1.0), "drops everything"),
    "another p": (lambda la: setattr(la.lora_dropout["one"], "p", 0.7), None),
    "in place dropout": (lambda la: setattr(la.lora_dropout["one"], "inplace", True), "in place"),
    "another dropout": (
        lambda la: la.lora_dropout.__setitem__("one", nn.AlphaDropout(0.5)), "AlphaDropout",
    ),
    "evaluated": (lambda la: la.eval(), None),
    "partitioned by ZeRO-3": (
        lambda la: setattr(la.base_layer.weight, "ds_id", 3), "partitioned (DeepSpeed ZeRO-3)",
    ),
    "an empty weight": (
        lambda la: replaced_weight(la.base_layer, parameter(torch.empty(0))), "empty",
    ),
    "a part of the weight": (
        lambda la: replaced_weight(la.base_layer, parameter(la.base_layer.weight[:5])), "not (37,",
    ),
    "other out_features": (lambda la: setattr(la, "out_features", 36), "not (36, 23)"),
    "other in_features": (lambda la: setattr(la, "in_features", 22), "not (37, 22)"),
    "a sparse weight": (
        lambda la: replaced_weight(la.base_layer, parameter(la.base_layer.weight.to_sparse())),
        "layout torch.sparse_coo",
    ),
    "a subclass": (
        lambda la: replaced_weight(la.base_layer, tagged(la.base_layer.weight)),
        "Tagged",
    ),
    "a tagged A": (
        lambda la: replaced_weight(la.lora_A["one"], tagged(la.lora_A["one"].weight)),
        "Tagged",
    ),
    "another rank": (
        lambda la: (
            replaced_weight(la.lora_A["one"], drawn(5, 23)),
            replaced_weight(la.lora_B["one"], drawn(37, 5)),
        ),
        None,
    ),
    "A and B that do not fit": (
        lambda la: replaced_weight(la.lora_A["one"], drawn(5, 23)), None,
    ),
    "A on meta": (
        lambda la: replaced_weight(la.lora_A["one"], parameter(torch.empty(3, 23, device="meta"))),
        "on meta",
    ),
    "a freed A": (lambda la: free(la.lora_A["one"].weight), None),
    "a freed B": (lambda la: free(la.lora_B["one"].weight), None),
    "a bias of A": (
        lambda la: setattr(la.lora_A["one"], "bias", nn.Parameter(torch.ones(3))), "has a bias",
    ),
    "a bias of B": (
        lambda la: setattr(la.lora_B["one"], "bias", nn.Parameter(torch.ones(37))), None,
    ),
    "frozen A": (lambda la: la.lora_A["one"].requires_grad_(False), None),
    "no weight": (lambda la: replaced_weight(la.base_layer, None), "subclass (NoneType)"),
    "another scaling": (lambda la: la.set_scale("one", 3), None),
    "a scaling in a tensor": (
        lambda la: la.scaling.__setitem__("one", torch.tensor(0.3)), None,
    ),
    "a trained scaling": (
        lambda la: la.scaling.__setitem__("one", torch.tensor(0.3, requires_grad=True)),
        "not a plain 0-d tensor",
    ),
    "a scaling for each output": (
        lambda la: la.scaling.__setitem__("one", torch.ones(37)), "not a plain 0-d tensor",
    ),
    "NumPy's scaling": (lambda la: la.scaling.__setitem__("one", np.float32(0.3)), "is a float32"),
    "disabled": (lambda la: la.enable_adapters(False), None),
    "merged": (lambda la: la.merge(), None),
    "another adapter": (lambda la: la.set_adapter("two"), None),
    "both adapters": (lambda la: la.set_adapter(["one", "two"]), None),
    "fan_in_fan_out": (lambda la: setattr(la, "fan_in_fan_out", True), "fan_in_fan_out"),
    "a forward of its own": (
        lambda la: setattr(la.base_layer, "forward", lambda x: torch.zeros(*x.shape[:-1], 37)),
        "a forward or a hook of its own",
    ),
    "accelerate's hook": (lambda la: setattr(la.lora_A["one"], "_hf_hook", 1), "hook of its own"),
    **{
        f"a {kind} hook of {child}": (
            lambda la, child=child, register=register: getattr(CHILDREN[child](la), register)(
                lambda *args: None
            ),
            f"{kind} hooks",
        )
        for child in CHILDREN
        for kind, register in (
            ("forward", "register_forward_hook"), ("forward", "register_forward_pre_hook"),
            ("backward", "register_full_backward_hook"),
        )
    },
}  # fmt: skip
INPUTS = {
    "fp64": (lambda x: x.double(), "outside autocast"),
    "sparse": (lambda x: x.detach().to_sparse(), "not a dense tensor"),
    "a subclass": (lambda x: x.detach().as_subclass(Tagged), "not a plain tensor"),
    "other columns": (lambda x: x[:, :22], None),
    "0-d": (lambda x: x.sum(), None),
    "whole numbers": (lambda x: x.long(), "x is int64"),
    "on meta": (lambda x: x.to("meta"), "x is on meta"),
    "a list": (lambda x: x.tolist(), "not a plain tensor"),
    "strided": (lambda x: x.t().contiguous().t(), None),
}


def layer_to_change() -> nn.Module:
    model = build(lora_config(lora_dropout=0.4), lora_config(r=4))
    layer = copy.deepcopy(model.base_model.model.up)
    layer.set_adapter("one")
    lora_kernels.accelerate(layer)
    return layer


def outcome(layer: nn.Module, x, kwargs=None):
    """Bits of the result and the gradients, or the error; and who has served."""
    before = delegated_calls(layer)
    torch.manual_seed(4)
    layer.zero_grad()
    try:
        y = layer(x, **(kwargs or {}))
        found = [y]
        if y.requires_grad:
            leaves = [p for p in layer.parameters() if p.requires_grad]
            found += torch.autograd.grad(y.sum(), leaves, allow_unused=True)
        found = [None if t is None else (type(t), t.dtype, t.shape, t.tolist()) for t in found]
    except Exception as error:
        found = type(error), str(error)
    after = delegated_calls(layer)
    return found, {reason: n - before.get(reason, 0) for reason, n in after.items()}


def known_layer(known: list, x: Tensor) -> nn.Module:
    """A layer whose call is known with and without gradients."""
    layer = layer_to_change()
    for mode in (nullcontext, torch.no_grad):
        for _ in range(2):
            with mode():
                outcome(layer, x)
    assert len(known) == 3
    known.clear()
    return layer


@pytest.mark.parametrize("mode", ["", "no_grad", "inference"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_after_a_known_call_is_seen(change, mode, known):
    make, reason = CHANGES[change]
    alone = layer_to_change()
    make(alone)
    with MODES[mode]():
        expected = outcome(alone, inputs(9))
    PLANS.clear()
    layer = known_layer(known, inputs(9))
    make(layer)
    with MODES[mode]():
        found, served = outcome(layer, inputs(9))
    assert served == expected[1]
    # Without gradients torch multiplies a tensor on the CPU with one on meta, and gives anything.
    assert found == expected[0] or change == "A on meta"
    if reason is None:
        assert not served
    else:
        (why,) = served
        assert reason in why and served[why] == 1 and not known


@pytest.mark.parametrize("mode", ["", "no_grad"])
@pytest.mark.parametrize("kind", INPUTS)
def test_another_input_after_a_known_call_is_seen(kind, mode, known):
    make, reason = INPUTS[kind]
    x = inputs(9)
    with MODES[mode]():
        expected = outcome(layer_to_change(), make(x))
    PLANS.clear()
    layer = known_layer(known, x)
    with MODES[mode]():
        assert outcome(layer, make(x)) == expected
    assert (reason is None and not expected[1]) or reason in "".join(expected[1])


@pytest.mark.parametrize("context", ["mode", "vmap", "jvp", "trace", "compile", "arguments"])
def test_another_context_after_a_known_call_is_seen(context, known):
    """Where something else has to see the operations."""
    x = inputs(9)
    layer = known_layer(known, x)
    layer.eval()
    plain = layer(x).detach()
    known.clear()
    if context == "mode":
        with FlopCounterMode(display=False) as counter:
            y = layer(x)
        assert counter.get_total_flops() > 0
    elif context == "vmap":
        y = torch.func.vmap(layer)(x)
    elif context == "jvp":
        y, _ = torch.func.jvp(layer, (x.detach(),), (torch.ones_like(x),))
    elif context == "trace":
        y = torch.jit.trace(layer, x.detach(), check_trace=False)(x)
    elif context == "compile":
        torch._dynamo.reset()
        y = torch.compile(layer, backend="eager", fullgraph=True)(x)
    else:
        with torch.no_grad():
            y = layer(x, adapter_names=["one"] * 9)
    assert not known
    torch.testing.assert_close(y.detach(), plain)
    layer(x)
    assert len(known) == 1


def test_copies_and_layers_of_one_shape_share_what_is_known(known):
    """A key has no layer in it; what a layer adds to it beside its tensors is compared."""
    x = inputs(9)
    layer = known_layer(known, x)
    other, resized = copy.deepcopy(layer), copy.deepcopy(layer)
    resized.out_features = 36
    outcome(other, x)
    assert len(known) == 1
    _, served = outcome(resized, x)
    assert len(known) == 1 and "not (36, 23)" in "".join(served)
