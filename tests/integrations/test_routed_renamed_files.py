"""Files whose modules have other names than the model's: ``load(..., rename={...})``."""

import json
import re

import peft
import pytest
import torch
from routed_models import llama, peft_alone, tokens
from torch import nn

from lora_kernels import RoutedLoRALinear, route
from lora_kernels.files.adapters import read_adapter, write_adapter

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`",
    "ignore:.*gradient_checkpointing.*:FutureWarning",
    "ignore:Could not find a config file",
)


class Wrapper(nn.Module):
    """A language model inside of one with images."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.language_model = inner.model
        self.lm_head = inner.lm_head
        self.vision = nn.ModuleDict({"q_proj": nn.Linear(3, 3)})


def logits(routed, name="one"):
    with routed.adapters(name), torch.no_grad():
        return routed.model(tokens(2, 5)).logits


@pytest.fixture
def directories(tmp_path):
    """One adapter as it is trained in the model, and in the wrapper."""
    peft_alone("one", llama()).save_pretrained(tmp_path / "plain")
    file = read_adapter(tmp_path / "plain")
    write_adapter(
        tmp_path / "wrapped",
        {
            name.replace("model.", "model.language_model.", 1): part
            for name, part in file.modules.items()
        },
        config=file.config,
    )
    return tmp_path


WRAPPED = {"model.language_model": "model"}


def test_a_wrappers_file_in_the_model(directories):
    with pytest.raises(ValueError, match=r"model\.language_model\..*: there is no such module"):
        route(llama()).load("one", directories / "wrapped")
    expected, routed = route(llama()), route(llama())
    expected.load("one", directories / "plain")
    routed.load("one", directories / "wrapped", rename=WRAPPED)
    assert torch.equal(logits(routed), logits(expected))
    routed.save("one", directories / "again")  # with the model's names, for PEFT too
    assert read_adapter(directories / "again").modules.keys() == (
        read_adapter(directories / "plain").modules.keys()
    )
    theirs = peft.PeftModel.from_pretrained(llama(), directories / "again").eval()
    torch.testing.assert_close(theirs(tokens(2, 5)).logits, logits(routed))


def test_a_models_file_in_the_wrapper(directories):
    """Which has a layer more that the config would mean by its own name."""
    model = Wrapper(llama())
    routed = route(model)
    change(directories / "plain", target_modules=r"model\..*\.[qv]_proj")
    routed.load("one", directories / "plain", rename={"model": "model.language_model"})
    layers = {name for name, m in model.named_modules() if isinstance(m, RoutedLoRALinear)}
    assert layers == {
        name.replace("model.", "model.language_model.", 1)
        for name in read_adapter(directories / "plain").modules
    }


def test_one_prefix_before_all_names(directories):
    whole = nn.ModuleDict({"text": llama()})
    routed = route(whole)
    routed.load("one", directories / "plain", rename={"": "text"})
    expected = route(llama())
    expected.load("one", directories / "plain")
    routed.save("one", directories / "inner")
    ours, theirs = (read_adapter(directories / each).modules for each in ("inner", "plain"))
    assert {f"text.{name}" for name in theirs} == ours.keys()
    back = route(llama())
    back.load("one", directories / "inner", rename={"text": ""})
    assert torch.equal(logits(back), logits(expected))


def change(directory, **settings) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_the_config_goes_with_the_files_names(directories):
    """Its patterns, and what it targets, which tells whether the file is whole."""
    change(
        directories / "wrapped",
        target_modules=r"model\.language_model\..*\.[qv]_proj",
        alpha_pattern={r"^model\.language_model\.layers\.0\.self_attn\.q_proj": 77},
        rank_pattern={},
    )
    modules = read_adapter(directories / "wrapped").modules
    routed = route(llama())
    routed.load("one", directories / "wrapped", rename=WRAPPED)
    for name, part in modules.items():
        layer = routed.model.get_submodule(name.replace("language_model.", ""))
        assert layer.bank["one"].scaling == part.scaling
    change(directories / "wrapped", target_modules=r"model\.language_model\..*\.[kqv]_proj")
    with pytest.raises(
        ValueError, match=r"targets 2 modules .* have: model.layers.0.self_attn.k_proj"
    ):
        route(llama()).load("one", directories / "wrapped", rename=WRAPPED)


def test_the_longest_name_counts(directories):
    """And names end at dots: "mod" is no part of "model"."""
    plain = read_adapter(directories / "plain")
    write_adapter(
        directories / "odd",
        {name.replace("layers.1", "last"): part for name, part in plain.modules.items()},
        config=plain.config,
    )
    rename = {"model": "model", "model.last": "model.layers.1"}
    routed, expected = route(llama()), route(llama())
    routed.load("one", directories / "odd", rename=rename)
    expected.load("one", directories / "plain")
    assert torch.equal(logits(routed), logits(expected))


def test_parameters_of_the_base_are_renamed_too(directories):
    peft_alone("last", llama()).save_pretrained(directories / "head")
    assert list(read_adapter(directories / "head").base_parameters) == ["lm_head.weight"]
    whole = nn.ModuleDict({"text": llama()})
    route(whole).load("last", directories / "head", rename={"": "text"})
    with torch.no_grad():
        whole["text"].lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"text\.lm_head\.weight in the file is not the model's"):
        route(whole).load("other", directories / "head", rename={"": "text"})


REFUSED = {
    "a list": (["model"], TypeError, "rename: expected a mapping of modules' names"),
    "a number": ({"model": 3}, TypeError, "rename: expected names of modules, got 'model': 3"),
    "two of one": (
        {"model.layers.0": "model.x", "model.layers.1": "model.x"},
        ValueError,
        "rename: 'model.layers.0' and 'model.layers.1' would both be 'model.x'",
    ),
    "one of another": (
        {"model.layers.0": "model.layers.1"},
        ValueError,
        "would both be 'model.layers.1.self_attn.",
    ),
    "part of a name": ({"mod": "model"}, ValueError, "rename: no module of"),
    "no module's": ({"model.absent": "model"}, ValueError, "is inside of 'model.absent'; there"),
    "to nowhere": ({"model": "absent"}, ValueError, "there is no such module"),
}


@pytest.mark.parametrize(("rename", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(rename, error, message, directories):
    routed = route(llama())
    with pytest.raises(error, match=re.escape(message)):
        routed.load("one", directories / "plain", rename=rename)
    assert routed.names == []
    assert not any(isinstance(module, RoutedLoRALinear) for module in routed.model.modules())


def test_a_name_with_dots_is_served_and_saved(directories):
    routed, expected = route(llama()), route(llama())
    expected.load("one", directories / "plain")
    routed.load("org/one-v1.5", directories / "plain")
    assert routed.names == ["org/one-v1.5"]
    assert torch.equal(logits(routed, "org/one-v1.5"), logits(expected))
    with routed.adapters(["__base__", "org/one-v1.5"]), torch.no_grad():
        mixed = routed.model(tokens(2, 5)).logits
    torch.testing.assert_close(mixed[1], logits(expected)[1])
    again = route(llama())
    again.load("org/one-v1.5", directories / "plain")
    with torch.no_grad():
        for parameter in again.parameters_of("org/one-v1.5"):
            parameter.zero_()
    again.model.load_state_dict(routed.model.state_dict())
    assert torch.equal(logits(again, "org/one-v1.5"), logits(expected))
    routed.save("org/one-v1.5", directories / "again")
    routed.remove("org/one-v1.5")
    assert routed.names == []
    again.load("again", directories / "again")
    assert torch.equal(logits(again, "again"), logits(expected))
