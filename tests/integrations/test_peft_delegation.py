"""Where a fused forward would leave something out, PEFT's own serves, and the report says so."""

import copy
from collections.abc import Callable

import accelerate
import peft
import pytest
import torch
from peft.tuners.lora import config as lora_configs
from peft.tuners.lora import dora
from peft_models import (
    Net,
    accelerated,
    assert_parity,
    build,
    gradients,
    inputs,
    lora_config,
    lora_layers,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lora_kernels
from lora_kernels.integrations.peft.layers import delegated_calls

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*weight_norm")

UP = "base_model.model.up"


def assert_delegates(plain: nn.Module, reason: str, prepare: Callable[[nn.Module], None]) -> None:
    """After `prepare`, `up` alone is PEFT's for that reason: the same bits, forward and backward.

    What `prepare` returns, a list that hooks may append to, must be the same for both models.
    """
    fast = accelerated(plain)
    logs = [prepare(model) for model in (plain, fast)]
    report = lora_kernels.accelerate(fast)
    assert list(report.delegated) == [UP]
    assert reason in report.delegated[UP]

    expected = gradients(up(plain), inputs(9))
    ours = gradients(up(fast), inputs(9))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert logs[0] == logs[1]
    assert report.refresh().delegated_calls == {UP: {report.delegated[UP]: 1}}
    assert reason in str(report)


def up(model: nn.Module) -> nn.Module:
    return model.base_model.model.up


def accelerated_layer(layer: nn.Module) -> nn.Module:
    layer = copy.deepcopy(layer)
    lora_kernels.accelerate(layer)
    return layer


# --- hooks and replaced forwards -------------------------------------------------------------

CHILDREN = {
    "base_layer": lambda layer: layer.base_layer,
    "lora_A": lambda layer: layer.lora_A["one"],
    "lora_B": lambda layer: layer.lora_B["one"],
    "lora_dropout": lambda layer: layer.lora_dropout["one"],
}

HOOKS = {
    "forward hook": lambda module, log: module.register_forward_hook(
        lambda m, args, output: (log.append("forward"), output * 1.5)[1]
    ),
    "forward pre-hook": lambda module, log: module.register_forward_pre_hook(
        lambda m, args: (log.append("pre"), (args[0] * 0.5,))[1]
    ),
    "backward hook": lambda module, log: module.register_full_backward_hook(
        lambda m, grad_input, grad_output: log.append("backward")
    ),
    "backward pre-hook": lambda module, log: module.register_full_backward_pre_hook(
        lambda m, grad_output: (log.append("backward pre"), (grad_output[0] * 2,))[1]
    ),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("child", CHILDREN)
def test_hooks_on_a_submodule(child, hook):
    def prepare(model: nn.Module) -> list[str]:
        log = []
        HOOKS[hook](CHILDREN[child](up(model)), log)
        return log

    reason = "backward hooks" if "backward" in hook else "forward hooks"
    assert_delegates(build(lora_config()), reason, prepare)


def test_hooks_on_the_layer_itself_leave_it_fast():
    plain = build(lora_config())
    fast = accelerated(plain)
    for model in (plain, fast):
        up(model).register_forward_hook(lambda m, args, output: output * 1.5)
        up(model).register_forward_pre_hook(lambda m, args: (args[0] * 0.5,))
    assert_parity(fast, plain, inputs(9))
    assert lora_kernels.accelerate(fast).delegated == {}


def test_hooks_can_come_and_go():
    plain = build(lora_config())
    fast = accelerated(plain)
    handles = [
        up(m).lora_A["one"].register_forward_hook(lambda m, a, y: y * 3) for m in (plain, fast)
    ]
    assert torch.equal(up(fast)(inputs(9)), up(plain)(inputs(9)))
    for handle in handles:
        handle.remove()
    assert lora_kernels.accelerate(fast).delegated == {}
    assert_parity(fast, plain, inputs(9))


@pytest.mark.parametrize("child", CHILDREN)
def test_a_forward_set_on_a_submodule(child):
    def prepare(model: nn.Module) -> None:
        module = CHILDREN[child](up(model))
        original = module.forward
        module.forward = lambda x: original(x) * 1.5

    assert_delegates(build(lora_config()), "a forward or a hook of its own", prepare)


def test_a_forward_set_on_the_layer():
    plain = build(lora_config())
    fast = accelerated(plain)
    original = up(fast).forward
    up(fast).forward = lambda x: original(x) * 1.5
    report = lora_kernels.accelerate(fast)
    assert list(report.delegated) == [UP]
    assert torch.equal(up(fast)(inputs(9)), up(plain)(inputs(9)) * 1.5)


@pytest.mark.parametrize(
    "register",
    [
        torch.nn.modules.module.register_module_forward_hook,
        torch.nn.modules.module.register_module_forward_pre_hook,
        torch.nn.modules.module.register_module_full_backward_hook,
    ],
)
def test_global_hooks(register):
    plain = build(lora_config())
    fast = accelerated(plain)
    called = []
    handle = register(lambda module, *args: called.append(type(module).__name__))
    try:
        runs = []
        for model in (plain, fast):
            called.clear()
            gradients(model, inputs(9))
            runs.append(list(called))
        assert set(lora_kernels.accelerate(fast).delegated.values()) == {
            "global module hooks are registered"
        }
    finally:
        handle.remove()
    assert runs[0] == runs[1]
    assert len(runs[0]) > 10


# --- offloading ------------------------------------------------------------------------------


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(inputs(9).detach())


def test_cpu_offload():
    plain = build(lora_config())
    expected = outputs(plain)
    fast = accelerated(plain)
    accelerate.cpu_offload(fast, execution_device=torch.device("cpu"))
    assert up(fast).base_layer.weight.is_meta
    report = lora_kernels.accelerate(fast)
    assert list(report.delegated) == list(lora_layers(fast))
    assert torch.equal(outputs(fast), expected)
    assert up(fast).base_layer.weight.is_meta
    accelerate.hooks.remove_hook_from_submodules(fast)


def test_device_map(tmp_path, monkeypatch):
    """Some layers on the device, one on disk; on several devices the hooks also move the inputs."""
    plain = build(lora_config())
    expected = outputs(plain)
    fast = accelerated(plain)
    device_map = {UP: "cpu", "base_model.model.gate": "disk", "base_model.model.down": "cpu"}
    device_map |= {"base_model.model.head": "cpu"}
    monkeypatch.chdir(tmp_path)
    accelerate.dispatch_model(
        fast, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    report = lora_kernels.accelerate(fast)
    assert list(report.delegated) == list(lora_layers(fast))
    assert all("accelerate's offload" in reason for reason in report.delegated.values())
    assert torch.equal(outputs(fast), expected)


class GatheredParameters:
    """As DeepSpeed's ZeRO-3: weights are empty outside their own module's forward."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.whole = {}
        for module in modules:
            for parameter in module.parameters(recurse=False):
                self.whole[parameter] = parameter.data
                parameter.data = torch.empty(0)
            module.register_forward_pre_hook(self.gather)
            module.register_forward_hook(self.release)

    def gather(self, module: nn.Module, args) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = self.whole[parameter]

    def release(self, module: nn.Module, args, output) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0)


@pytest.mark.parametrize("kind", [nn.Linear, nn.Module], ids=["linears", "every module"])
def test_partitioned_weights_gathered_by_hooks(kind):
    plain = build(lora_config(use_dora=False))
    fast = accelerated(plain)
    for model in (plain, fast):
        for layer in lora_layers(model).values():
            GatheredParameters([m for m in layer.modules() if isinstance(m, kind)])
    assert torch.equal(outputs(fast), outputs(plain))
    assert len(lora_kernels.accelerate(fast).delegated) == 3


def test_weights_gathered_for_the_whole_layer_are_used():
    """Gathered around the layer's own forward, they are there when it looks."""
    plain = build(lora_config())
    fast = accelerated(plain)
    weight = up(fast).base_layer.weight
    whole = weight.data
    weight.data = torch.empty(0)
    report = lora_kernels.accelerate(fast)
    assert report.delegated == {UP: "base weight: empty (partitioned or offloaded)"}
    up(fast).register_forward_pre_hook(lambda m, args: setattr(weight, "data", whole))
    up(fast).register_forward_hook(lambda m, args, y: setattr(weight, "data", torch.empty(0)))
    torch.testing.assert_close(outputs(fast), outputs(plain))
    assert report.refresh().delegated_calls == {}
    assert weight.numel() == 0


UNUSABLE = {
    "empty": lambda layer: setattr(layer.base_layer.weight, "data", torch.empty(0)),
    "flat": lambda layer: setattr(layer.base_layer.weight, "data", torch.ones(37 * 23)),
    "half bias": lambda layer: setattr(
        layer.base_layer, "bias", nn.Parameter(torch.ones(37, dtype=torch.float16), False)
    ),
    "empty adapter": lambda layer: setattr(layer.lora_A["one"].weight, "data", torch.empty(0)),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_fails_in_peft_fails_in_the_same_words(case):
    plain = build(lora_config())
    fast = accelerated(plain)
    for model in (plain, fast):
        UNUSABLE[case](up(model))
    with pytest.raises(RuntimeError) as theirs:
        plain(inputs(9))
    with pytest.raises(RuntimeError) as ours:
        fast(inputs(9))
    assert str(ours.value) == str(theirs.value)


def test_an_adapter_on_another_device():
    plain = build(lora_config())
    fast = accelerated(plain)
    for model in (plain, fast):
        up(model).lora_A.to("meta")
    assert up(fast)(inputs(9)).device == up(plain)(inputs(9)).device
    assert delegated_calls(up(fast)) == {"adapter 'one' is on meta, the base weight on cpu": 1}


def test_partitioned_parameters_are_known_by_their_mark():
    def prepare(model: nn.Module) -> None:
        up(model).base_layer.weight.ds_id = 7

    assert_delegates(build(lora_config()), "ZeRO-3", prepare)


# --- weights, dtypes and modules that are not plain ------------------------------------------


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 1.5


def double_linear(model: nn.Module, child: str) -> None:
    class DoubleLinear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    CHILDREN[child](up(model)).__class__ = DoubleLinear


class Tagged(nn.Parameter):
    """A tensor subclass whose results are plain tensors."""


def tag(module: nn.Module) -> None:
    weight = module.weight
    del module.weight
    module.weight = Tagged(weight.data, weight.requires_grad)


def set_dropout(model: nn.Module, dropout: nn.Module) -> None:
    up(model).lora_dropout["one"] = dropout


NOT_PLAIN = {
    "fan_in_fan_out of a linear": (
        "fan_in_fan_out = True over a Linear",
        lambda m: setattr(up(m), "fan_in_fan_out", True),
    ),
    "base weight trainable": (
        "base weight requires grad",
        lambda m: up(m).base_layer.weight.requires_grad_(True),
    ),
    "base parametrized": (
        "base weight: computed when it is read",
        lambda m: nn.utils.parametrize.register_parametrization(
            up(m).base_layer, "weight", Scaled()
        ),
    ),
    "lora_A parametrized": (
        "weights of 'one': computed when it is read",
        lambda m: nn.utils.parametrize.register_parametrization(
            up(m).lora_A["one"], "weight", Scaled()
        ),
    ),
    "lora_B weight_norm": (
        "weights of 'one': computed when it is read",
        lambda m: parametrizations.weight_norm(up(m).lora_B["one"]),
    ),
    "lora_B old weight_norm": (
        "lora_B of 'one' has forward hooks",
        lambda m: nn.utils.weight_norm(up(m).lora_B["one"]),
    ),
    "base of another class": (
        "base layer DoubleLinear has a forward of its own",
        lambda m: double_linear(m, "base_layer"),
    ),
    "lora_A of another class": (
        "lora_A of 'one' is DoubleLinear",
        lambda m: double_linear(m, "lora_A"),
    ),
    "base tensor subclass": (
        "base weight: a tensor subclass (Tagged)",
        lambda m: tag(up(m).base_layer),
    ),
    "adapter tensor subclass": (
        "weights of 'one': a tensor subclass (Tagged)",
        lambda m: tag(up(m).lora_A["one"]),
    ),
    "fp64 adapters": (
        "adapter 'one' is float64 over a float32 base",
        lambda m: (up(m).lora_A.double(), up(m).lora_B.double()),
    ),
    "alpha dropout": (
        "lora_dropout of 'one' is AlphaDropout",
        lambda m: set_dropout(m, nn.AlphaDropout(0.5).eval()),
    ),
    "dropout of everything": (
        "lora_dropout of 'one' drops everything",
        lambda m: set_dropout(m, nn.Dropout(1.0)),
    ),
    "scaling with a gradient": (
        "scaling of 'one' is not a plain 0-d tensor",
        lambda m: up(m).scaling.update(one=torch.tensor(0.5, requires_grad=True)),
    ),
    "scaling per output": (
        "scaling of 'one' is not a plain 0-d tensor",
        lambda m: up(m).scaling.update(one=torch.linspace(-1, 1, 37)),
    ),
    "lora_A with a bias": (
        "lora_A of 'one' has a bias",
        lambda m: setattr(up(m).lora_A["one"], "bias", nn.Parameter(torch.ones(3))),
    ),
}


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_not_plain(case):
    reason, prepare = NOT_PLAIN[case]

    def silently(model: nn.Module) -> None:
        prepare(model)

    assert_delegates(build(lora_config()), reason, silently)


@pytest.mark.parametrize("case", ["base weight trainable", "fp64 adapters", "lora_B weight_norm"])
def test_delegation_compiles_without_a_graph_break(case):
    _, prepare = NOT_PLAIN[case]
    fast = accelerated(build(lora_config()))
    prepare(fast)
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(inputs(9)), fast(inputs(9)))


def test_in_place_dropout():
    plain = build(lora_config(lora_dropout=0.5)).eval()
    fast = accelerated(plain)
    for model in (plain, fast):
        up(model).lora_dropout["one"].inplace = True
    assert list(lora_kernels.accelerate(fast).delegated.values()) == [
        "lora_dropout of 'one' works in place"
    ]
    torch.testing.assert_close(outputs(fast), outputs(plain))


def test_dora_cache_and_its_hooks():
    plain = build(lora_config(use_dora=True)).eval()
    fast = accelerated(plain)
    with peft.helpers.DoraCaching():
        report = lora_kernels.accelerate(fast)
        assert set(report.delegated.values()) == {"PEFT's DoRA cache is enabled"}
        assert torch.equal(outputs(fast), outputs(plain))
    assert report.refresh().delegated == {}
    up(fast).lora_magnitude_vector["one"].register_forward_hook(lambda m, args, y: y * 2)
    assert report.refresh().delegated == {UP: "lora_magnitude_vector of 'one' has forward hooks"}


def test_doras_own_forward():
    class Doubled(dora.DoraLinearLayer):
        def forward(self, x: Tensor, **kwargs) -> Tensor:
            return super().forward(x, **kwargs) * 2

    def prepare(model: nn.Module) -> None:
        up(model).lora_magnitude_vector["one"].__class__ = Doubled

    assert_delegates(build(lora_config(use_dora=True)), "DoRA of 'one' is Doubled", prepare)


def test_complex_layers():
    plain = up(build(lora_config())).to(torch.complex64)
    fast = accelerated_layer(plain)
    x = torch.randn(9, 23, dtype=torch.complex64)
    assert torch.equal(fast(x), plain(x))
    assert delegated_calls(fast) == {"base weight: dtype complex64": 1}


def test_sparse_weights():
    def sparse_layer() -> nn.Module:
        layer = up(build(lora_config())).requires_grad_(False)
        layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.to_sparse_csr(), False)
        layer.base_layer.bias = None
        return layer

    plain, fast = sparse_layer(), sparse_layer()
    lora_kernels.accelerate(fast)
    x = inputs(9).detach()
    assert torch.equal(fast(x), plain(x))
    assert delegated_calls(fast) == {"base weight: layout torch.sparse_csr": 1}


def test_x_of_another_dtype_fails_as_in_peft():
    plain = build(lora_config(), dtype=torch.bfloat16)
    fast = accelerated(plain)
    with pytest.raises(RuntimeError) as theirs:
        up(plain)(inputs(9))
    with pytest.raises(RuntimeError) as ours:
        up(fast)(inputs(9))
    assert str(ours.value) == str(theirs.value)
    reason = "x is float32 and the base weight bfloat16, outside autocast"
    assert delegated_calls(up(fast)) == {reason: 1}


def test_disabled_input_casting():
    plain = build(lora_config(), dtype=torch.bfloat16)
    fast = accelerated(plain)
    x = inputs(9, dtype=torch.bfloat16)
    with peft.helpers.disable_input_dtype_casting(fast), pytest.raises(RuntimeError, match="dtype"):
        fast(x)
    fast(x)


def test_fp64_under_autocast():
    plain = build(lora_config(), base=Net).double()
    fast = accelerated(plain)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = up(fast)(inputs(9).double()), up(plain)(inputs(9).double())
    assert torch.equal(ours, theirs)
    assert delegated_calls(up(fast)) == {"float64 under autocast": 1}


@pytest.mark.parametrize("kind", [Tagged, "sparse"], ids=["subclass", "sparse"])
def test_x_that_is_not_plain(kind):
    plain = build(lora_config())
    fast = accelerated(plain)
    x = inputs(9).detach()
    x = x.to_sparse() if kind == "sparse" else x.as_subclass(kind)
    with torch.no_grad():
        ours, theirs = up(fast)(x), up(plain)(x)
    assert type(ours) is type(theirs)
    assert torch.equal(ours, theirs)
    assert sum(delegated_calls(up(fast)).values()) == 1


# --- arguments and derivatives ---------------------------------------------------------------


def test_extra_arguments_reach_the_base_layer():
    class Offset(nn.Linear):
        def forward(self, x: Tensor, offset: float = 0.0) -> Tensor:
            return super().forward(x) + offset

    torch.manual_seed(0)
    plain = peft.get_peft_model(nn.Sequential(Offset(7, 5)), lora_config(target_modules=["0"]))
    layer = plain.base_model.model[0]
    expected = layer(torch.ones(2, 7), offset=2.5)
    lora_kernels.accelerate(plain)
    assert torch.equal(layer(torch.ones(2, 7), offset=2.5), expected)
    assert torch.equal(layer(torch.ones(2, 7), 2.5), expected)
    assert delegated_calls(layer) == {
        "extra argument 'offset'": 1,
        "extra positional arguments for the base layer": 1,
    }


def test_arguments_that_are_none_leave_it_fast():
    fast = accelerated(build(lora_config()))
    up(fast)(inputs(9), adapter_names=None, alora_offsets=None)
    assert delegated_calls(up(fast)) == {}
    with pytest.raises(TypeError):
        up(fast)(inputs(9), unknown=None)


def test_functorch_transforms():
    plain = build(lora_config()).requires_grad_(False)
    fast = accelerated(plain)
    x = inputs(4).detach()
    ours, theirs = (torch.func.jacrev(up(model))(x[0]) for model in (fast, plain))
    assert torch.equal(ours, theirs)
    ours, theirs = (torch.func.vmap(up(model))(x[:, None]) for model in (fast, plain))
    assert torch.equal(ours, theirs)
    ours, theirs = (torch.func.jvp(up(model), (x,), (x,))[1] for model in (fast, plain))
    assert torch.equal(ours, theirs)
    assert delegated_calls(up(fast)) == {"inside a torch.func transform": 3}


def test_forward_mode_differentiation():
    plain = build(lora_config())
    fast = accelerated(plain)
    tangents = []
    for model in (fast, plain):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(inputs(4).detach(), torch.ones(4, 23))
            tangents.append(torch.autograd.forward_ad.unpack_dual(up(model)(dual)).tangent)
    assert torch.equal(*tangents)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_tracing_keeps_to_torchs_operations():
    fast = accelerated(build(lora_config()).eval())
    traced = torch.jit.trace(up(fast), inputs(4).detach())
    assert "lora_kernels::" not in str(traced.inlined_graph)


# --- classes and variants that stay PEFT's ---------------------------------------------------


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.up = nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        return self.up(self.attention(x, x, x)[0])


def test_other_classes_are_listed():
    torch.manual_seed(0)
    targets = ["embed", "conv", "attention", "up"]
    plain = peft.get_peft_model(
        Mixed(), lora_config(target_modules=targets, r=2, init_lora_weights=False)
    )
    fast = copy.deepcopy(plain)
    report = lora_kernels.accelerate(fast)
    assert report.fast == [UP]
    prefix = "base_model.model."
    assert report.delegated == {
        prefix + "embed": "peft.tuners.lora.layer.Embedding is not PEFT's lora.Linear",
        prefix + "conv": "peft.tuners.lora.layer.Conv1d is not PEFT's lora.Linear",
        prefix + "attention": "peft.tuners.lora.layer.MultiheadAttention is not PEFT's lora.Linear",
        prefix + "attention.base_layer.out_proj": (
            "lora.MultiheadAttention reads its weights and never calls it"
        ),
    }
    ids = torch.arange(10).view(2, 5)
    torch.testing.assert_close(fast(ids), plain(ids))


VARIANTS = {
    "ALoraLinearVariant": lora_config(alora_invocation_tokens=[1]),
    "BdLoraLinearVariant": lora_config(
        r=4,
        use_bdlora=lora_configs.BdLoraConfig(target_modules_bd_a=["0"], nblocks=2),
    ),
    "VeloraLinearVariant": lora_config(velora_config=lora_configs.VeloraConfig(num_groups=23)),
    "KasaLinearVariant": lora_config(kasa_config=lora_configs.KasaConfig()),
    "MiCALinearVariant": lora_config(init_lora_weights="mica"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore")
def test_variants_stay_pefts(variant):
    torch.manual_seed(0)
    config = copy.deepcopy(VARIANTS[variant])
    config.target_modules = {"0"}
    base = nn.Sequential(nn.Linear(24, 36))
    plain = peft.get_peft_model(base, config, autocast_adapter_dtype=False).base_model.model
    fast = copy.deepcopy(plain)
    report = lora_kernels.accelerate(fast)
    assert report.delegated == {"0": f"adapter 'default' is of the variant {variant}"}
    x = torch.randn(9, 24)
    assert torch.equal(fast(x), plain(x))


def test_custom_layers_are_left_alone():
    class MyLinear(peft.tuners.lora.layer.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    config = lora_config(target_modules=["0"])
    config._register_custom_module({nn.Linear: MyLinear})
    model = peft.get_peft_model(nn.Sequential(nn.Linear(7, 5)), config)
    report = lora_kernels.accelerate(model)
    assert report.fast == []
    assert type(model.base_model.model[0]) is MyLinear
