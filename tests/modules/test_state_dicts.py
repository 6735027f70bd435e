"""State dicts: PEFT's names, PEFT's layers, and what is saved from a merged layer."""

import copy

import pytest
import torch
from torch import nn

from lora_kernels.nn import LoRAEmbedding, LoRALinear
from lora_kernels.nn.peft_names import in_memory_name, our_names
from lora_kernels.testing import assert_within_policy

from peft_layers import LoraConfig, peft_twin  # isort: skip
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

KINDS = {
    "linear": (LoRALinear, {}),
    "linear_no_bias": (LoRALinear, {"bias": False}),
    "linear_lora_bias": (LoRALinear, {"lora_bias": True}),
    "linear_dora": (LoRALinear, {"use_dora": True}),
    "embedding": (LoRAEmbedding, {}),
    "embedding_dora": (LoRAEmbedding, {"use_dora": True}),
}
NAMES = {
    "base_layer.weight": "base_layer.weight",
    "base_layer.bias": "base_layer.bias",
    "lora_A.weight": "lora_A.{}.weight",
    "lora_B.weight": "lora_B.{}.weight",
    "lora_B.bias": "lora_B.{}.bias",
    "lora_magnitude_vector": "lora_magnitude_vector.{}.weight",
    "lora_embedding_A": "lora_embedding_A.{}",
    "lora_embedding_B": "lora_embedding_B.{}",
}


def make(kind, dtype=torch.float32):
    layer_class, options = KINDS[kind]
    layer = layer_class(19, 23, 4, 6, init_lora_weights=False, dtype=dtype, **options)
    if layer.use_dora:
        nn.init.uniform_(layer.lora_magnitude_vector, 0.5, 2)
    return layer


def draw_input(layer):
    if isinstance(layer, LoRAEmbedding):
        return torch.randint(19, (7,))
    return torch.randn(7, 19, dtype=layer.weight.dtype)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("adapter", ["default", "weight", "lora_A", "Anna's 2nd"])
def test_names(adapter):
    theirs = [name.format(adapter) for name in NAMES.values()]
    assert [in_memory_name(name, adapter) for name in NAMES] == theirs
    adapter_only = {k: v for k, v in zip(theirs, NAMES, strict=True) if "base_layer" not in k}
    assert our_names(theirs) == adapter_only
    assert our_names(NAMES) == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_to_pefts_layer_and_back_unchanged(kind, dtype):
    layer, other = make(kind, dtype), make(kind, dtype)
    twin = peft_twin(other)
    x = draw_input(layer)
    assert not torch.equal(layer(x), other(x))
    twin.load_state_dict(layer.peft_state_dict())  # strict
    other.load_state_dict(twin.state_dict())  # strict
    assert same(layer.state_dict(), other.state_dict())
    assert same(layer.peft_state_dict(), twin.state_dict())
    assert torch.equal(layer(x), other(x))


def test_in_a_model_and_in_pefts_files():
    """The keys of a model made of our layers are PEFT's file keys but for PEFT's prefix."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(19, 23)
            self.up = nn.Linear(23, 31)
            self.down = nn.Linear(31, 23)

        def forward(self, x):
            return self.down(self.up(self.embed(x)).relu())

    ours, base = Model(), Model()
    base.load_state_dict(ours.state_dict())
    ours.embed = LoRAEmbedding.from_embedding(ours.embed, 4, 8, init_lora_weights=False)
    ours.up = LoRALinear.from_linear(ours.up, 4, 8, init_lora_weights=False, use_dora=False)
    ours.down = LoRALinear.from_linear(ours.down, 4, 8, init_lora_weights=False)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["embed", "up", "down"])
    peft_model = get_peft_model(base, config, adapter_name="mine")

    adapter = {
        f"base_model.model.{name}": tensor
        for name, tensor in ours.state_dict().items()
        if "base_layer" not in name
    }
    found = set_peft_model_state_dict(peft_model, adapter, adapter_name="mine")
    assert not found.unexpected_keys
    saved = get_peft_model_state_dict(peft_model, adapter_name="mine", save_embedding_layers=False)
    assert same(saved, adapter)
    x = torch.randint(19, (3, 5))
    with torch.no_grad():
        oracle = copy.deepcopy(ours).double()(x)
        assert_within_policy("y", ours(x), peft_model(x), oracle)

    fresh = copy.deepcopy(ours)
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter.data)
    prefix = "base_model.model."
    fresh.load_state_dict({k.removeprefix(prefix): t for k, t in peft_model.state_dict().items()})
    assert same(fresh.state_dict(), ours.state_dict())


def test_two_adapters_at_once_are_refused():
    layer = make("linear")
    state = layer.peft_state_dict("a") | layer.peft_state_dict("b")
    for load in (layer.load_state_dict, layer.load_adapter):
        with pytest.raises(ValueError, match=r"state_dict: expected one adapter, got \['a', 'b'\]"):
            load(state)


@pytest.mark.parametrize("keep", ["device", "cpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_layer_saves_what_it_was_made_from(kind, keep):
    layer, fresh = make(kind), make(kind)
    x = draw_input(layer)
    y, unmerged = layer(x), copy.deepcopy(layer.state_dict())
    twin = peft_twin(layer)
    layer.merge(keep)
    assert same(layer.state_dict(), unmerged)
    assert list(layer.state_dict()) == list(unmerged)
    twin.load_state_dict(layer.peft_state_dict())
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), y)
    parent = nn.ModuleDict({"inner": nn.ModuleList([layer])})
    assert same(parent.state_dict(prefix="p."), {f"p.inner.0.{k}": t for k, t in unmerged.items()})

    layer.load_state_dict(layer.state_dict())
    assert not layer.merged and same(layer.state_dict(), unmerged)
    layer.merge(keep)
    other = make(kind)
    layer.load_state_dict(other.peft_state_dict())
    assert not layer.merged and same(layer.state_dict(), other.state_dict())
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("kind", ["linear", "linear_dora", "embedding"])
def test_a_layer_merged_for_good_saves_that_it_is(kind):
    layer, fresh = make(kind), make(kind)
    adapter, x = copy.deepcopy(layer.adapter_state_dict()), draw_input(layer)
    layer.merge("none")
    y, state = layer(x), layer.state_dict()
    assert same({k: t for k, t in state.items() if k.startswith("lora")}, adapter)

    nn.ModuleList([fresh]).load_state_dict({f"0.{name}": t for name, t in state.items()})
    assert fresh.merged and torch.equal(fresh(x), y)  # the adapter is not applied twice
    assert same(fresh.state_dict(), state) and same(copy.deepcopy(fresh).state_dict(), state)
    with pytest.raises(RuntimeError, match="not kept"):
        fresh.unmerge()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        peft_twin(make(kind)).load_state_dict(layer.peft_state_dict())

    # A whole state dict brings the weight along that was not kept; an adapter alone does not.
    other = make(kind)
    with pytest.raises(RuntimeError, match="not kept"):
        fresh.load_state_dict(other.adapter_state_dict(), strict=False)
    fresh.load_state_dict(other.state_dict())
    assert not fresh.merged and torch.equal(fresh(x), other(x))
    layer.load_state_dict(state)
    assert layer.merged and torch.equal(layer(x), y)


@pytest.mark.parametrize("kind", KINDS)
def test_switching_adapters(kind):
    layer, other = make(kind), make(kind)
    other.base_layer.load_state_dict(layer.base_layer.state_dict())
    x = draw_input(layer)
    parameters = dict(layer.named_parameters())
    for state in (other.adapter_state_dict(), {
        k: t for k, t in other.peft_state_dict("b").items() if "base_layer" not in k
    }):  # fmt: skip
        layer.reset_lora_parameters(False)
        layer.merge()
        layer.load_adapter(state)
        assert not layer.merged and torch.equal(layer(x), other(x))
        assert all(layer.get_parameter(name) is p for name, p in parameters.items())


def test_adapters_that_do_not_fit():
    layer = make("linear")
    state = layer.adapter_state_dict()
    layer.merge()
    for bad, message in (
        ({}, r"got \[\]"),
        ({"lora_A.weight": state["lora_A.weight"]}, r"got \['lora_A.weight'\]"),
        (state | {"lora_C": torch.ones(1)}, r"expected the adapter's tensors \['lora_A.weight', "),
        (
            state | {"lora_B.weight": torch.ones(23, 5)},
            r"expected lora_B.weight of shape \[23, 4\], got \[23, 5\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            layer.load_adapter(bad)
    assert layer.merged
    with pytest.raises(RuntimeError, match=r"size mismatch for lora_A\.weight"):
        layer.load_state_dict(LoRALinear(19, 23, 5, 6).state_dict())


def test_loading_by_assignment():
    layer, other = make("linear_dora"), make("linear_dora")
    layer.merge()
    state = copy.deepcopy(other.peft_state_dict())
    layer.load_state_dict(state, assign=True)
    assert layer.lora_A.weight.data_ptr() == state["lora_A.default.weight"].data_ptr()
    assert same(layer.state_dict(), other.state_dict())
    x = draw_input(layer)
    layer.merge()
    layer.unmerge()
    assert torch.equal(layer(x), other(x))
