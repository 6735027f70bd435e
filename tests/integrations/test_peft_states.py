"""Whatever PEFT does to a layer works on an accelerated one, and gives what PEFT gives."""

import copy
import io
import pickle
import warnings

import peft
import pytest
import torch
from peft.tuners.lora import layer as peft_layer
from peft.utils import hotswap
from peft_models import (
    accelerated,
    assert_parity,
    build,
    gradients,
    inputs,
    lora_config,
    lora_layers,
    randomise,
)
from torch import nn

import lora_kernels
from lora_kernels.integrations.peft import layers as peft_layers

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*Already unmerged")


def apply_to_both(plain, fast, action) -> None:
    for model in (plain, fast):
        torch.manual_seed(11)
        action(model)


# Each is done to a model with the adapters "one" and "two", after the ones before it.
SWITCHES = {
    "set_adapter one": lambda m: m.set_adapter("one"),
    "set_adapter both, two first": lambda m: m.base_model.set_adapter(["two", "one"]),
    "disable": lambda m: m.base_model.disable_adapter_layers(),
    "enable": lambda m: m.base_model.enable_adapter_layers(),
    "merge": lambda m: m.merge_adapter(),
    "disable while merged": lambda m: m.base_model.disable_adapter_layers(),
    "enable after that": lambda m: m.base_model.enable_adapter_layers(),
    "merge safely": lambda m: m.merge_adapter(safe_merge=True),
    "unmerge": lambda m: m.unmerge_adapter(),
    "merge one of two": lambda m: m.merge_adapter(adapter_names=["two"]),
    "unmerge it": lambda m: m.unmerge_adapter(),
    "scale_layer": lambda m: [layer.scale_layer(1.5) for layer in lora_layers(m).values()],
    "set_scale": lambda m: [layer.set_scale("two", 0.3) for layer in lora_layers(m).values()],
    "unscale_layer": lambda m: [layer.unscale_layer(3.0) for layer in lora_layers(m).values()],
    "unscale all": lambda m: [layer.unscale_layer() for layer in lora_layers(m).values()],
    "add_adapter": lambda m: (m.add_adapter("three", lora_config(r=5)), randomise(m)),
    "set the new one": lambda m: m.set_adapter("three"),
    "add a rank-stabilised one": lambda m: (
        m.add_adapter("four", lora_config(r=2, use_rslora=True)),
        randomise(m),
        m.base_model.set_adapter(["four", "one"]),
    ),
    "delete an active one": lambda m: m.delete_adapter("four"),
    "delete another": lambda m: m.delete_adapter("three"),
    "requires_grad off": lambda m: m.requires_grad_(False),
    "adapters trainable again": lambda m: m.set_adapter("two"),
    "eval": lambda m: m.eval(),
    "train": lambda m: m.train(),
    "to float64 and back": lambda m: m.double().float(),
    "to bfloat16 and back": lambda m: m.bfloat16().float(),
}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_every_switch_of_state(dora):
    plain = build(lora_config(use_dora=dora, use_rslora=True), lora_config(r=4, bias="all"))
    fast = accelerated(plain)
    x = inputs(9)
    for name, action in SWITCHES.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            apply_to_both(plain, fast, action)
        assert lora_kernels.accelerate(fast).delegated == {}, name
        try:
            assert_parity(fast, plain, x)
        except AssertionError as error:
            raise AssertionError(f"after {name!r}: {error}") from error
    for (name, ours), theirs in zip(
        fast.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_scaling_helper_and_disable_context():
    plain = build(lora_config())
    fast = accelerated(plain)
    x = inputs(9)
    with (
        peft.helpers.rescale_adapter_scale(plain, 0.25),
        peft.helpers.rescale_adapter_scale(fast, 0.25),
    ):
        assert_parity(fast, plain, x)
    with plain.disable_adapter(), fast.disable_adapter():
        assert torch.equal(fast(x), plain(x))
    assert_parity(fast, plain, x)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_merge_and_unload_and_unload(dora):
    plain = build(lora_config(use_dora=dora))
    x = inputs(9)
    merged = accelerated(plain).merge_and_unload()
    expected = copy.deepcopy(plain).merge_and_unload()
    assert [type(m) for m in merged.modules()] == [type(m) for m in expected.modules()]
    assert torch.equal(merged(x), expected(x))
    assert torch.equal(accelerated(plain).unload()(x), copy.deepcopy(plain).unload()(x))


@pytest.mark.parametrize("new_rank", [2, 3, 5])
def test_hotswap(tmp_path, new_rank):
    other = build(lora_config(r=new_rank, lora_alpha=5))
    randomise(other)
    other.save_pretrained(tmp_path)
    plain = build(lora_config())
    fast = accelerated(plain)
    before = fast(inputs(9)).detach()
    apply_to_both(plain, fast, lambda m: hotswap.hotswap_adapter(m, tmp_path / "one", "one"))
    assert_parity(fast, plain, inputs(9))
    assert not torch.equal(fast(inputs(9)), before)


def test_compiled_hotswap_with_tensor_scalings(tmp_path):
    """`prepare_model_for_compiled_hotswap` pads the ranks and makes the scalings tensors."""
    build(lora_config(r=7, lora_alpha=3)).save_pretrained(tmp_path)
    plain = build(lora_config())
    fast = accelerated(plain)
    apply_to_both(
        plain, fast, lambda m: hotswap.prepare_model_for_compiled_hotswap(m, target_rank=8)
    )
    assert isinstance(lora_layers(fast)["base_model.model.up"].scaling["one"], torch.Tensor)
    assert_parity(fast, plain, inputs(9))
    apply_to_both(plain, fast, lambda m: hotswap.hotswap_adapter(m, tmp_path / "one", "one"))
    assert_parity(fast, plain, inputs(9))
    assert lora_kernels.accelerate(fast).delegated == {}


def test_mixed_batch():
    plain = build(lora_config(), lora_config(r=5)).eval()
    fast = accelerated(plain)
    x = inputs(5).detach()

    def mixed(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
        names = ["two", "__base__", "one", "one", "two"]
        return {"y": model(x, adapter_names=names)}

    with torch.no_grad():
        assert_parity(fast, plain, x, mixed)
        assert_parity(fast, plain, x)  # the next call has the active adapters again
    assert lora_kernels.accelerate(fast).delegated_calls == {}
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        fast(x, adapter_names=["one"])


def test_save_and_load(tmp_path):
    plain = build(lora_config(modules_to_save=["head"], lora_bias=True), lora_config(r=2))
    fast = accelerated(plain)
    plain.save_pretrained(tmp_path / "plain")
    fast.save_pretrained(tmp_path / "fast")
    for path in (tmp_path / "plain").rglob("*.safetensors"):
        twin = tmp_path / "fast" / path.relative_to(tmp_path / "plain")
        assert path.read_bytes() == twin.read_bytes(), path

    base = copy.deepcopy(plain).unload()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "fast" / "one", adapter_name="one")
    lora_kernels.accelerate(loaded)
    loaded.load_adapter(tmp_path / "fast" / "two", "two")
    report = lora_kernels.accelerate(loaded)
    assert report.delegated == {}
    loaded.base_model.set_adapter(["one", "two"])
    plain.eval(), fast.eval(), loaded.eval()
    assert torch.equal(loaded(inputs(9)), fast(inputs(9)))
    assert_parity(fast, plain, inputs(9))


@pytest.mark.filterwarnings("ignore:.*meta")
def test_low_cpu_mem_usage(tmp_path):
    plain = build(lora_config())
    plain.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(
        copy.deepcopy(plain).unload(),
        tmp_path / "one",
        adapter_name="one",
        low_cpu_mem_usage=True,
        is_trainable=True,
    ).train()
    assert_parity(accelerated(loaded), plain, inputs(9))


# --- identity, copies, pickles ---------------------------------------------------------------


def test_the_layers_look_like_pefts():
    plain = build(lora_config())
    fast = accelerated(plain)
    assert repr(fast) == repr(plain)
    assert list(fast.state_dict()) == list(plain.state_dict())
    for ours, theirs in zip(lora_layers(fast).values(), lora_layers(plain).values(), strict=True):
        assert isinstance(ours, peft_layer.Linear)
        assert type(ours).__name__ == type(theirs).__name__
        assert type(ours).__qualname__ == type(theirs).__qualname__
        assert vars(ours).keys() == vars(theirs).keys()


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies_are_fast_and_apart(duplicate):
    plain = build(lora_config(), lora_config(use_dora=True))
    fast = accelerated(plain)
    copied = duplicate(fast)
    assert all(type(layer) is peft_layers.Linear for layer in lora_layers(copied).values())
    assert_parity(copied, plain, inputs(9))
    for parameter in copied.parameters():
        parameter.data.zero_()
    assert_parity(fast, plain, inputs(9))


def test_undo_gives_pefts_layers_back():
    plain = build(lora_config())
    model = copy.deepcopy(plain)
    attributes = {name: dict(vars(layer)) for name, layer in lora_layers(model).items()}
    report = lora_kernels.accelerate(model)
    gradients(model, inputs(9))
    report.undo()
    for name, layer in lora_layers(model).items():
        assert type(layer) is peft_layer.Linear
        assert vars(layer) == attributes[name]
    assert torch.equal(model(inputs(9)), plain(inputs(9)))
    report.undo()
    assert report.refresh().fast == []
    assert lora_kernels.accelerate(model).delegated == {}


def test_accelerating_twice_is_harmless():
    plain = build(lora_config())
    model = copy.deepcopy(plain)
    first = lora_kernels.accelerate(model)
    second = lora_kernels.accelerate(model)
    assert str(first) == str(second)
    assert_parity(model, plain, inputs(9))
    first.undo()
    assert all(type(layer) is peft_layer.Linear for layer in lora_layers(model).values())


def test_layers_that_peft_adds_later_wait_for_the_next_call():
    model = build(lora_config(target_modules=["up"]))
    report = lora_kernels.accelerate(model)
    model.add_adapter("two", lora_config())
    report.refresh()
    assert report.fast == ["base_model.model.up"]
    assert set(report.delegated) == {"base_model.model.gate", "base_model.model.down"}
    assert all("call accelerate again" in reason for reason in report.delegated.values())
    assert len(lora_kernels.accelerate(model).fast) == 3


# --- torch's own machinery -------------------------------------------------------------------


@pytest.mark.parametrize(
    "configs",
    [
        [lora_config()],
        [lora_config(lora_dropout=0.25)],
        [lora_config(use_dora=True)],
        [lora_config(lora_bias=True), lora_config(r=2)],
    ],
    ids=["lora", "dropout", "dora", "two"],
)
def test_compiles_without_a_graph_break(configs):
    plain = build(*configs)
    fast = accelerated(plain)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    eager = gradients(fast, inputs(9))
    for name, ours in gradients(compiled, inputs(9)).items():
        torch.testing.assert_close(ours, eager[name.removeprefix("_orig_mod.")], msg=name)


def test_compiled_model_follows_its_state():
    """The guards see another adapter, disabling and merging."""
    plain = build(lora_config(), lora_config(r=2))
    fast = accelerated(plain)
    compiled = torch.compile(fast, backend="eager")
    x = inputs(9)
    assert torch.equal(compiled(x), fast(x))
    for switch in (
        lambda m: m.set_adapter("two"),
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.base_model.enable_adapter_layers(),
        lambda m: m.merge_adapter(),
        lambda m: m.unmerge_adapter(),
    ):
        apply_to_both(plain, fast, switch)
        assert_parity(fast, plain, x)
        torch.testing.assert_close(compiled(x), plain(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export_keeps_to_torchs_operations(strict):
    plain = build(lora_config()).eval()
    x = inputs(9).detach()
    exported = torch.export.export(accelerated(plain), (x,), strict=strict)
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert targets and all(target.startswith("aten.") for target in targets)
    assert torch.equal(exported.module()(x), plain(x))


def test_functional_call():
    plain = build(lora_config())
    fast = accelerated(plain)
    parameters = {name: p.detach() * 0.5 for name, p in plain.named_parameters()}
    ours, theirs = (torch.func.functional_call(m, parameters, inputs(9)) for m in (fast, plain))
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(theirs, plain(inputs(9)))


def test_plain_tensors_in_the_place_of_parameters():
    """FSDP1 and DataParallel's replicas: the tensors are attributes, not parameters."""
    plain = build(lora_config())
    fast = accelerated(plain)
    for layer in lora_layers(fast).values():
        for module in (layer.base_layer, layer.lora_A["one"], layer.lora_B["one"]):
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    del module._parameters[name]
                    setattr(module, name, parameter.detach() * 1.0)
    assert lora_kernels.accelerate(fast).delegated == {}
    with torch.no_grad():
        torch.testing.assert_close(fast(inputs(9)), plain(inputs(9)))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_replays_the_dropout(use_reentrant):
    model = accelerated(build(lora_config(lora_dropout=0.5)))

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.model, x, use_reentrant=use_reentrant)

    expected = gradients(model, inputs(9))
    for name, ours in gradients(Checkpointed(), inputs(9)).items():
        assert torch.equal(ours, expected[name.removeprefix("model.")]), name
