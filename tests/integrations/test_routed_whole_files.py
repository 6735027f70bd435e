"""A file against its config and the model: what the config targets, all of it and nothing else."""

import json
import re
import warnings

import peft
import pytest
import safetensors.torch
import torch
from routed_models import VOCABULARY, llama, peft_alone, routed_with, tokens
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from lora_kernels import RoutedLoRALinear, route
from lora_kernels.files.adapters import read_adapter

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`", "ignore:Found missing adapter keys"
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def directory(tmp_path):
    """Adapters on q_proj and v_proj of both layers, and on nothing else."""
    peft_alone("one", llama()).save_pretrained(tmp_path)
    return tmp_path


def change(directory, keep=lambda key: True, **config) -> None:
    tensors = safetensors.torch.load_file(directory / WEIGHTS)
    kept = {key: tensor for key, tensor in tensors.items() if keep(key)}
    safetensors.torch.save_file(kept, directory / WEIGHTS)
    settings = json.loads((directory / CONFIG).read_text()) | config
    (directory / CONFIG).write_text(json.dumps(settings))


def modules_with(routed, name) -> set[str]:
    return {
        module
        for module, layer in routed.model.named_modules()
        if isinstance(layer, RoutedLoRALinear) and name in layer.bank
    }


def logits_of(routed, name):
    with routed.adapters(name), torch.no_grad():
        return routed.model(tokens(2, 5)).logits


def by_peft(directory):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(llama(), directory).eval()(tokens(2, 5)).logits


# --- too little -------------------------------------------------------------------------------

LACKING = {
    "a layer": lambda key: "layers.1" not in key,
    "a kind": lambda key: "v_proj" not in key,
    "one module": lambda key: "layers.0.self_attn.q_proj" not in key,
}


@pytest.mark.parametrize("keep", LACKING.values(), ids=LACKING)
def test_a_part_of_a_file(directory, keep):
    whole = {f"model.layers.{i}.self_attn.{kind}_proj" for i in range(2) for kind in "qv"}
    change(directory, keep)
    lost = sorted(name for name in whole if not keep(name))
    routed = route(llama())
    named = f"targets {len(lost)} modules that the file does not have: {', '.join(lost)}"
    with pytest.raises(ValueError, match=re.escape(named)):
        routed.load("one", directory)
    assert routed.names == [] and not modules_with(routed, "one")
    assert not any(isinstance(module, RoutedLoRALinear) for module in routed.model.modules())
    with pytest.warns(UserWarning, match=re.escape(named)):
        routed.load("one", directory, strict=False)
    assert modules_with(routed, "one") == whole - set(lost)
    # PEFT goes on with an untrained B for them, which is zero.
    torch.testing.assert_close(logits_of(routed, "one"), by_peft(directory))
    routed.save("one", directory / "again")
    again = routed_with(directory, "again", model=llama())
    assert torch.equal(logits_of(again, "again"), logits_of(routed, "one"))


def test_a_model_with_more_of_what_the_config_targets(directory):
    """The file is whole for a model of two layers, not for one of three."""
    config = llama().config
    config.num_hidden_layers = 3
    larger = type(llama())(config).double()
    with pytest.raises(
        ValueError, match=r"targets 2 modules .* model\.layers.2.self_attn.q_proj, model"
    ):
        route(larger).load("one", directory)


def test_a_config_that_targets_nothing_by_name(directory):
    change(directory, target_modules=None)
    routed = route(llama())
    with pytest.raises(ValueError, match="the config has no target_modules"):
        routed.load("one", directory)
    with pytest.warns(UserWarning, match="the config has no target_modules"):
        routed.load("one", directory, strict=False)
    assert len(modules_with(routed, "one")) == 4


# --- too much ---------------------------------------------------------------------------------

NARROWED = {
    "a list": {"target_modules": ["q_proj"]},
    "whole names": {"target_modules": ["model.layers.1.self_attn.v_proj"]},
    "a regex": {"target_modules": r".*\.0\..*\.[qv]_proj"},
    "excluded": {"exclude_modules": ["layers.0.self_attn.v_proj"]},
    "excluded by a regex": {"exclude_modules": r".*v_proj"},
    "layers": {"layers_to_transform": [1]},
    "a layer, and the pattern": {"layers_to_transform": 0, "layers_pattern": "layers"},
}


@pytest.mark.parametrize("settings", NARROWED.values(), ids=NARROWED)
def test_what_the_config_does_not_target_is_left_out(directory, settings):
    whole = by_peft(directory)
    change(directory, **settings)
    routed = route(llama())
    with pytest.warns(UserWarning, match=r"the config does not target model\.layers.* left out"):
        routed.load("one", directory)
    left = modules_with(routed, "one")
    assert left == read_quietly(directory).modules.keys() and 0 < len(left) < 4
    theirs = by_peft(directory)
    torch.testing.assert_close(logits_of(routed, "one"), theirs)
    assert not torch.allclose(theirs, whole)


def read_quietly(directory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_adapter(directory)


def test_what_is_left_out_need_not_be_in_the_model(directory):
    """Nor fit it: PEFT does not look at it."""
    tensors = safetensors.torch.load_file(directory / WEIGHTS)
    prefix = "base_model.model.model.layers."
    for name in ("7.self_attn.k_proj", "0.self_attn.k_proj"):
        tensors[f"{prefix}{name}.lora_A.weight"] = torch.ones(5, 24)
        tensors[f"{prefix}{name}.lora_B.weight"] = torch.ones(7, 5)
    expected = by_peft(directory)
    safetensors.torch.save_file(tensors, directory / WEIGHTS)
    routed = route(llama())
    with pytest.warns(UserWarning, match=r"does not target model\.layers\.0\.self_attn\.k_proj, "):
        routed.load("one", directory)
    torch.testing.assert_close(logits_of(routed, "one"), expected)
    torch.testing.assert_close(by_peft(directory), expected)


def test_a_config_that_targets_nothing_of_the_file(directory):
    change(directory, target_modules=["up_proj"])
    with pytest.raises(ValueError, match="the config targets none of the file's modules"):
        route(llama()).load("one", directory)


def test_patterns_that_match_nothing(directory):
    """A scaling that somebody meant and that does not happen, in PEFT neither."""
    change(directory, alpha_pattern={"layers.1.self_attn.qproj": 99, "v_proj": 5})
    routed = route(llama())
    with pytest.warns(UserWarning, match=r"alpha_pattern 'layers.1.self_attn.qproj', which has no"):
        routed.load("one", directory)
    torch.testing.assert_close(logits_of(routed, "one"), by_peft(directory))


# --- all linear layers ------------------------------------------------------------------------


def test_all_linear_by_its_name(directory, tmp_path):
    """PEFT writes lists, others do not: then all layers count, and the head does not."""
    peft_alone("two", llama()).save_pretrained(tmp_path / "two")
    change(tmp_path / "two", target_modules="all-linear")
    routed = routed_with(tmp_path, "two")
    assert len(modules_with(routed, "two")) == 14
    change(tmp_path / "two", lambda key: "k_proj" not in key)
    with pytest.raises(
        ValueError, match=r"targets 2 modules .* model\.layers.0.self_attn.k_proj, model"
    ):
        routed_with(tmp_path, "two", model=llama())
    change(directory, target_modules="all-linear")
    with pytest.raises(ValueError, match="targets 10 modules"):
        route(llama()).load("one", directory)


def test_all_linear_leaves_a_classifiers_head_out():
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    settings = {"target_modules": "all-linear", "task_type": "SEQ_CLS", "r": 2}
    routed = route(LlamaForSequenceClassification(config))
    routed.add("new", {"peft_type": "LORA", **settings})
    theirs = peft.get_peft_model(
        LlamaForSequenceClassification(config), peft.LoraConfig(**settings)
    )
    expected = {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert modules_with(routed, "new") == expected
    assert isinstance(routed.model.score, nn.Linear)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("trainable", "x"), ("strict", None), ("strict", 1), ("directory", 5), ("directory", None)],
)
def test_arguments_of_a_wrong_type_leave_the_model_as_it_was(tmp_path, argument, value):
    routed = route(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    routed.add("a", rank=2, alpha=4, target_modules=["0", "1"])
    routed.save("a", tmp_path / "a")
    arguments = {"directory": tmp_path / "a", argument: value}
    with pytest.raises(TypeError, match=rf"^{argument}: expected"):
        routed.load("z", **arguments)
    assert routed.names == ["a"]
    assert not any("z" in layer.bank for layer in routed.model)
    routed.load("z", tmp_path / "a", trainable=True)


@pytest.mark.parametrize("value", [1.0, True, 2, "0", torch.tensor([0, 1])], ids=str)
def test_the_axis_of_the_batch_is_0_or_1(value):
    with pytest.raises(ValueError, match=r"^batch_dim: expected 0 or 1"):
        route(nn.Sequential(nn.Linear(8, 8)), batch_dim=value)
