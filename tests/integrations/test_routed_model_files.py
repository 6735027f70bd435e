"""``route(model)``: adapters come from PEFT's files and go back to them, all or nothing."""

import copy
import json
import re

import peft
import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from routed_models import CONFIGS, alone, llama, peft_alone, routed_with, tokens
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import lora_kernels
from lora_kernels import RoutedLoRALinear, route
from lora_kernels.files.adapters import read_adapter, write_adapter
from lora_kernels.files.config import targets
from lora_kernels.testing import assert_within_policy

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`", "ignore:.*gradient_checkpointing.*:FutureWarning"
)

# --- files -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_peft_loads_what_is_saved(files, name, tmp_path):
    routed = routed_with(files)
    with torch.no_grad():
        for parameter in routed.parameters_of(name):
            parameter.mul_(-1.5)
    routed.save(name, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    ids = tokens(2, 5)
    with routed.adapters(name):
        ours = routed.model(ids).logits
    torch.testing.assert_close(ours, theirs(ids).logits)
    again = route(llama())
    again.load("anew", tmp_path)
    with again.adapters("anew"):
        assert torch.equal(again.model(ids).logits, ours)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    original = json.loads((files / name / "adapter_config.json").read_text())
    assert saved["target_modules"] and sorted(saved.items(), key=str) == sorted(
        {**original, "target_modules": saved["target_modules"]}.items(), key=str
    )


@torch.no_grad()
@pytest.mark.parametrize("as_object", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_added_adapters_are_pefts(name, as_object, tmp_path):
    """The same modules, ranks, scalings and kind of initial values."""
    config = peft.LoraConfig(**CONFIGS[name])
    routed = route(llama())
    routed.add("new", config if as_object else {"peft_type": "LORA", **CONFIGS[name]})
    theirs = peft.get_peft_model(llama(), copy.deepcopy(config))
    theirs.save_pretrained(tmp_path / "theirs")
    routed.save("new", tmp_path / "ours")
    ours, expected = (read_adapter(tmp_path / each).modules for each in ("ours", "theirs"))
    assert ours.keys() == expected.keys()
    for module, part in expected.items():
        assert ours[module].scaling == part.scaling
        assert ours[module].lora_a.shape == part.lora_a.shape
        bound = part.lora_a.shape[1] ** -0.5
        assert 0.5 * bound < ours[module].lora_a.abs().max() <= bound
        assert (ours[module].lora_b == 0).all()
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    ids = tokens(2, 5)
    with routed.adapters("new"):
        torch.testing.assert_close(loaded(ids).logits, routed.model(ids).logits)


SELECTIONS = {
    "suffix": {"target_modules": ["q_proj", "mlp.down_proj"]},
    "whole name": {"target_modules": ["model.layers.1.mlp.up_proj"]},
    "regex": {"target_modules": r".*\.(k|v)_proj"},
    "excluded list": {
        "target_modules": ["q_proj"],
        "exclude_modules": ["layers.0.self_attn.q_proj"],
    },
    "excluded regex": {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.1.*"},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "layer": {"target_modules": ["q_proj"], "layers_to_transform": 0},
    "layers and pattern": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "all but": {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
}


@pytest.mark.parametrize("settings", SELECTIONS.values(), ids=SELECTIONS)
def test_modules_are_selected_as_by_peft(settings, tmp_path):
    routed = route(llama())
    routed.add("new", peft.LoraConfig(**settings))
    routed.save("new", tmp_path / "ours")
    peft.get_peft_model(llama(), peft.LoraConfig(**settings)).save_pretrained(tmp_path / "theirs")
    ours, theirs = (read_adapter(tmp_path / each).modules for each in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()


# PEFT refuses the other combinations.
LAYERS = [
    (None, None),
    ([], None),
    (0, None),
    ([1, 2], None),
    (0, "layers"),
    ([1], ["h", "layers"]),
]
MATCHES = [
    (wanted, *layers) for wanted in (["q", "a.layers.1.q"], ["layers.0.q"]) for layers in LAYERS
]
MATCHES += [(r".*\.(q|k)", None, None)]


@pytest.mark.parametrize(("wanted", "layers", "pattern"), MATCHES, ids=str)
def test_names_match_as_in_peft(wanted, layers, pattern):
    settings = {"target_modules": wanted, "layers_to_transform": layers, "layers_pattern": pattern}
    settings |= {"exclude_modules": ["2.q"]}
    config = peft.LoraConfig(**settings)
    paths = [
        "{}",
        "layers.{}",
        "a.layers.{}",
        "a.h.{}",
        "a.b.h.{}.experts.2",
        "a.layers.{}.layers.1",
    ]
    names = [
        path.format(i) + f".{leaf}" for path in paths for i in range(3) for leaf in ("q", "kq")
    ]
    for name in ["q", "k", "xq", *names]:
        assert targets(settings, name) == bool(check_target_module_exists(config, name)), name


# --- all or nothing --------------------------------------------------------------------------


def snapshot(routed):
    state = {name: value.clone() for name, value in routed.model.state_dict().items()}
    kinds = {name: type(module) for name, module in routed.model.named_modules()}
    return state, kinds, routed.names, len(routed.slots)


def assert_unchanged(routed, before) -> None:
    state, *rest = snapshot(routed)
    assert state.keys() == before[0].keys()
    assert all(torch.equal(value, before[0][name]) for name, value in state.items())
    assert rest == list(before[1:])


def module_file(path, name="model.layers.0.self_attn.q_proj", n=24, k=24):
    part = (torch.ones(2, k), torch.ones(n, 2), 1.0)
    modules = {"model.layers.0.self_attn.o_proj": (torch.ones(2, 24), torch.ones(24, 2), 1.0)}
    write_adapter(path, modules | {name: part})


BAD_FILES = {
    "absent": (
        {"name": "model.layers.7.self_attn.q_proj"},
        "model.layers.7.self_attn.q_proj: there is no such module",
    ),
    "not linear": ({"name": "model.layers.0.self_attn"}, "a LlamaAttention, not a torch.nn.Linear"),
    "embedding": ({"name": "model.embed_tokens"}, "a Embedding, not a torch.nn.Linear"),
    "in_features": ({"k": 23}, "q_proj: expected lora_A [r, 24] and lora_B [24, r], got [2, 23]"),
    "out_features": ({"n": 12}, "expected lora_A [r, 24] and lora_B [24, r], got [2, 24] and [12,"),
    "parametrized": (
        {"name": "model.layers.1.mlp.up_proj", "n": 36},
        "up_proj: linear: expected weight to be a plain Parameter",
    ),
}


@pytest.mark.parametrize("swapped", [True, False])
@pytest.mark.parametrize(("changes", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_changes_nothing(files, tmp_path, changes, message, swapped):
    routed = routed_with(files, "one") if swapped else route(llama())
    nn.utils.parametrizations.weight_norm(routed.model.model.layers[1].mlp.up_proj)
    module_file(tmp_path, **changes)
    before = snapshot(routed)
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        routed.load("new", tmp_path)
    assert_unchanged(routed, before)


def test_an_error_half_way_changes_nothing(files, monkeypatch):
    routed = routed_with(files, "one")
    before = snapshot(routed)
    add, calls = lora_kernels.AdapterBank.add, []

    def fails_late(*args, **kwargs):
        calls.append(1)
        if len(calls) == 9:
            raise MemoryError("no more")
        return add(*args, **kwargs)

    monkeypatch.setattr(lora_kernels.AdapterBank, "add", fails_late)
    with pytest.raises(MemoryError):
        routed.load("two", files / "two")
    assert_unchanged(routed, before)
    monkeypatch.undo()
    routed.load("two", files / "two")


def test_overflow_of_the_banks_dtype_changes_nothing(tmp_path):
    routed = route(llama(torch.float16), adapter_dtype=torch.float16)
    write_adapter(tmp_path, {"lm_head": (torch.full((2, 24), 1e6), torch.ones(61, 2), 1.0)})
    before = snapshot(routed)
    with pytest.raises(ValueError, match=r"lm_head: lora_A .* overflows the bank's torch.float16"):
        routed.load("new", tmp_path)
    assert_unchanged(routed, before)


def test_an_adapter_of_another_base_changes_nothing(files):
    """PEFT's files hold the head's weight where the head has an adapter."""
    assert list(read_adapter(files / "last").base_parameters) == ["lm_head.weight"]
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[-1, -1] += 1
    routed = route(model)
    before = snapshot(routed)
    with pytest.raises(ValueError, match=r"last: lm_head.weight in the file is not the model's"):
        routed.load("last", files / "last")
    assert_unchanged(routed, before)
    with pytest.raises(ValueError, match="is not the model's"):
        route(nn.Sequential(nn.Linear(2, 2))).load("last", files / "last")
    routed_with(files, "last", model=llama().to(torch.bfloat16))  # as far as its dtype can tell


BAD_ADDS = {
    "nothing": ({}, TypeError, "expected a config, or rank, alpha and target_modules"),
    "both": ({"config": {}, "rank": 3}, TypeError, "got both"),
    "no module": ({"target_modules": ["absent"]}, ValueError, "no module of the model is named by"),
    "container": ({"target_modules": ["mlp"]}, ValueError, "a LlamaMLP, not a torch.nn.Linear"),
    "regex": ({"target_modules": ".*embed.*"}, ValueError, "embed_tokens: a Embedding, not a"),
    "rank": ({"rank": 0, "target_modules": ["q_proj"]}, ValueError, "r: expected an integer of"),
    "dora": (
        {"config": peft.LoraConfig(use_dora=True, target_modules=["q_proj"])},
        ValueError,
        "DoRA is not served here",
    ),
    "init": (
        {"config": peft.LoraConfig(init_lora_weights="orthogonal", target_modules=["q_proj"])},
        ValueError,
        "init_lora_weights: expected True, False or 'gaussian', got 'orthogonal'",
    ),
    "name": (
        {"name": "keys", "target_modules": ["q_proj"]},
        ValueError,
        "expected one that is not empty",
    ),
    "base": (
        {"name": "__base__", "target_modules": ["q_proj"]},
        ValueError,
        "not empty, '__base__' or",
    ),
    "twice": (
        {"name": "one", "target_modules": ["q_proj"]},
        ValueError,
        "there is an adapter 'one'",
    ),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ADDS.values(), ids=BAD_ADDS)
def test_a_bad_add_changes_nothing(files, arguments, error, message):
    routed = routed_with(files, "one")
    before = snapshot(routed)
    arguments = {"name": "new", **arguments}
    if "target_modules" in arguments:
        arguments = {"rank": 2, "alpha": 2, **arguments}
    with pytest.raises(error, match=re.escape(message)):
        routed.add(**arguments)
    assert_unchanged(routed, before)


def test_only_the_layers_that_route_names(files, tmp_path):
    routed = route(llama(), target_modules=["q_proj", "v_proj"])
    routed.load("one", files / "one")
    with pytest.raises(ValueError, match=r"lm_head: route\(model, target_modules=.* leaves it out"):
        routed.load("last", files / "last")
    assert routed.names == ["one"]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.shared_expert = nn.Linear(4, 4)


def test_experts_are_refused():
    routed = route(Experts())
    with pytest.raises(ValueError, match="an expert sees tokens that a router chose"):
        routed.add("one", rank=2, alpha=2, target_modules="all-linear")
    routed.add("one", rank=2, alpha=2, target_modules=["shared_expert"])


def test_conv1d_is_refused():
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match=r"a Conv1D, not a torch.nn.Linear"):
        route(GPT2LMHeadModel(config)).add("one", rank=2, alpha=2, target_modules=["c_attn"])


def test_models_that_are_refused():
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got dict"):
        route({})
    with pytest.raises(ValueError, match="expected a plain model, got PEFT's PeftModel at ''"):
        route(peft_alone("one", llama()))
    with pytest.raises(ValueError, match="the model itself"):
        route(nn.Linear(3, 3)).add("one", rank=2, alpha=2, target_modules=".*")


# --- coming and going ------------------------------------------------------------------------


@torch.no_grad()
def test_remove_and_undo(files):
    model = llama()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    routed = routed_with(files, model=model)
    assert not any(p.requires_grad for p in trainable)
    routed.remove("two")
    assert routed.names == ["one", "last"]
    with pytest.raises(KeyError, match="no adapter 'two'"):
        routed.parameters_of("two")
    for call in (routed.remove, lambda name: routed.save(name, "nowhere")):
        with pytest.raises(KeyError, match="no adapter 'two'"):
            call("two")
    ids = tokens(2, 5)
    with routed.adapters(["last", "one"]):
        logits = model(ids).logits
    for row, name in enumerate(["last", "one"]):
        torch.testing.assert_close(logits[row], alone(name)(ids[row : row + 1]).logits[0])
    routed.undo()
    assert routed.names == []
    assert {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)} == layers
    assert not any(isinstance(m, RoutedLoRALinear) for m in model.modules())
    assert all(p.requires_grad for p in trainable)
    assert torch.equal(model(ids).logits, llama()(ids).logits)
    assert list(model.state_dict()) == list(llama().state_dict())


@torch.no_grad()
def test_routing_again_and_copies(files, tmp_path):
    routed = routed_with(files)
    again = route(routed.model)
    assert again.names == routed.names
    ids = tokens(2, 5)
    with again.adapters(["one", "two"]):
        expected = routed.model(ids).logits
    copied = route(copy.deepcopy(routed.model))
    assert copied.slots is not routed.slots
    copied.remove("last")
    with copied.adapters(["one", "two"]):
        assert torch.equal(copied.model(ids).logits, expected)
    assert "last" in routed.names
    copied.save("two", tmp_path)  # its config is not known any more: written from what is there
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(theirs(ids[1:]).logits[0], expected[1])


def test_a_layer_in_two_places():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

        def forward(self, x):
            return self.second(self.first(x))

    model = Twice()
    routed = route(model)
    routed.add("one", rank=2, alpha=2, target_modules=["first"])
    assert model.first is model.second
    assert isinstance(model.second, RoutedLoRALinear)
    with routed.adapters("one"):
        model(torch.randn(3, 4)).sum().backward()


@torch.no_grad()
def test_moving_the_model(files):
    routed = routed_with(files)
    ids = tokens(2, 5)
    exact = alone("two")(ids).logits
    model = routed.model.float()
    with routed.adapters("two"):
        assert_within_policy("y", model(ids).logits, alone("two").float()(ids).logits, exact)
