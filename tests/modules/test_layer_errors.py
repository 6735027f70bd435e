"""Bad input to the layers: the message names the argument, what was expected and what came."""

import re

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn

from lora_kernels.nn import LoRAEmbedding, LoRALinear

HALF_KNOWN = "expected dtype bfloat16, float16, float32 or float64, got"

OPTIONS = {
    "rank_0": ({"rank": 0}, ValueError, "rank: expected at least 1, got 0"),
    "rank_float": ({"rank": 4.0}, TypeError, "rank: expected an integer, got float"),
    "rank_bool": ({"rank": True}, TypeError, "rank: expected an integer, got bool"),
    "alpha_text": ({"alpha": "8"}, TypeError, "alpha: expected a number, got str"),
    "alpha_nan": (
        {"alpha": float("nan")},
        ValueError,
        "alpha: expected a finite number, got nan",
    ),
    "init": (
        {"init_lora_weights": "pissa"},
        ValueError,
        "init_lora_weights: expected True, False or 'gaussian', got 'pissa'",
    ),
    "adapter_int": (
        {"adapter_dtype": torch.int8},
        TypeError,
        f"adapter_dtype: {HALF_KNOWN} torch.int8",
    ),
    "base_float8": (
        {"dtype": torch.float8_e4m3fn, "device": "meta"},
        TypeError,
        f"weight: {HALF_KNOWN} torch.float8_e4m3fn",
    ),
}
LINEAR = {
    "dropout_1": (
        {"dropout_p": 1.0},
        ValueError,
        "dropout_p: expected a probability in [0, 1), got 1.0",
    ),
    "dropout_negative": ({"dropout_p": -0.1}, ValueError, "dropout_p: expected a probability"),
    "dropout_nan": ({"dropout_p": float("nan")}, ValueError, "dropout_p: expected a probability"),
    "dropout_text": ({"dropout_p": "0.1"}, TypeError, "dropout_p: expected a number, got str"),
    "dropout_true": ({"dropout_p": True}, TypeError, "dropout_p: expected a number, got bool"),
    "bias_dora": (
        {"lora_bias": True, "use_dora": True},
        ValueError,
        "lora_bias: not defined together with use_dora=True",
    ),
    "bias_gaussian": (
        {"lora_bias": True, "init_lora_weights": "gaussian"},
        ValueError,
        "lora_bias: expected init_lora_weights=True or False with it, got 'gaussian'",
    ),
    "in_features": ({"in_features": 0}, ValueError, "in_features: expected at least 1, got 0"),
    "out_features": (
        {"out_features": 6.0},
        TypeError,
        "out_features: expected an integer, got float",
    ),
}
EMBEDDING = {
    "num_embeddings": (
        {"num_embeddings": -1},
        ValueError,
        "num_embeddings: expected at least 1, got -1",
    ),
    "embedding_dim": (
        {"embedding_dim": None},
        TypeError,
        "embedding_dim: expected an integer, got NoneType",
    ),
}


@pytest.mark.parametrize(
    ("changes", "error", "message"), (OPTIONS | LINEAR).values(), ids=OPTIONS | LINEAR
)
def test_linear_options(changes, error, message):
    arguments = {"in_features": 8, "out_features": 6, "rank": 2, "alpha": 4}
    with pytest.raises(error, match=re.escape(message)):
        LoRALinear(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"), (OPTIONS | EMBEDDING).values(), ids=OPTIONS | EMBEDDING
)
def test_embedding_options(changes, error, message):
    arguments = {"num_embeddings": 8, "embedding_dim": 6, "rank": 2, "alpha": 4}
    with pytest.raises(error, match=re.escape(message)):
        LoRAEmbedding(**{**arguments, **changes})


def test_a_refused_option_leaves_the_wrapped_layer_trainable():
    linear, embedding = nn.Linear(8, 6), nn.Embedding(8, 6)
    with pytest.raises(ValueError, match="rank"):
        LoRALinear.from_linear(linear, 0)
    with pytest.raises(ValueError, match="rank"):
        LoRAEmbedding.from_embedding(embedding, 0)
    assert linear.weight.requires_grad and embedding.weight.requires_grad


def replaced_forward():
    linear = nn.Linear(8, 6)
    linear.forward = lambda x: x
    return linear


UNFIT = {
    "conv": (
        lambda: nn.Conv1d(8, 6, 1),
        TypeError,
        "linear: expected a torch.nn.Linear, got Conv1d",
    ),
    "lazy": (
        lambda: nn.LazyLinear(6),
        TypeError,
        "linear: expected a weight, got one that its first forward will make",
    ),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)),
        TypeError,
        "linear: expected weight to be a plain Parameter, got Tensor",
    ),
    "replaced_forward": (
        replaced_forward,
        ValueError,
        "linear: its forward was replaced on the instance",
    ),
}


@pytest.mark.parametrize(("build", "error", "message"), UNFIT.values(), ids=UNFIT)
def test_layers_that_cannot_be_wrapped(build, error, message):
    with pytest.raises(error, match=re.escape(message)):
        LoRALinear.from_linear(build())


def test_embeddings_that_cannot_be_wrapped():
    with pytest.raises(TypeError, match=r"embedding: expected a torch.nn.Embedding, got Linear"):
        LoRAEmbedding.from_embedding(nn.Linear(8, 6))
    embedding = nn.Embedding(8, 6)
    embedding.forward = lambda x: x
    with pytest.raises(ValueError, match="embedding: its forward was replaced on the instance"):
        LoRAEmbedding.from_embedding(embedding)
    parametrized = nn.utils.parametrizations.weight_norm(nn.Embedding(8, 6))
    with pytest.raises(TypeError, match="embedding: expected weight to be a plain Parameter"):
        LoRAEmbedding.from_embedding(parametrized)
    embedding = nn.Embedding(8, 6)
    embedding.embed_scale = torch.ones(6)
    with pytest.raises(ValueError, match=r"embed_scale to be a number or one element, got .*\[6\]"):
        LoRAEmbedding.from_embedding(embedding)


def test_an_embeddings_input():
    layer = LoRAEmbedding(8, 6, 2, 4)
    for merged in (False, True):
        with pytest.raises(
            TypeError, match=r"x: expected .* int32 or int64 indices, got .*float32"
        ):
            layer(torch.ones(3))
        with pytest.raises(TypeError, match=r"x: expected .* int32 or int64 indices, got list"):
            layer([1, 2])
        if not merged:
            layer.merge()


def test_a_linears_input():
    layer = LoRALinear(8, 6, 2, 4)
    with pytest.raises(ValueError, match=re.escape("x: expected [..., 8] to match lora_a [2, 8]")):
        layer(torch.ones(3, 7))
    with pytest.raises(TypeError, match=r"weight: expected x's dtype .*float64, got .*float32"):
        layer(torch.ones(3, 8, dtype=torch.float64))
    layer.base_layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="weight: expected a frozen tensor"):
        layer(torch.ones(3, 8))


def test_scaling():
    layer = LoRALinear(8, 6, 2, 4)
    with pytest.raises(TypeError, match="scaling: expected a number or a 0-d tensor, got str"):
        layer.scaling = "2"
    with pytest.raises(ValueError, match=r"scaling: expected .* got a tensor of shape \[1\]"):
        layer.scaling = torch.ones(1)
    with pytest.raises(ValueError, match=r"scaling: expected .* with requires_grad=True"):
        layer.scaling = torch.tensor(1.0, requires_grad=True)
    layer.merge()
    with pytest.raises(RuntimeError, match=r"scaling: the layer is merged .* unmerge\(\) first"):
        layer.scaling = 3
    assert float(layer.scaling) == 2


def test_merging():
    layer = LoRALinear(8, 6, 2, 4)
    with pytest.raises(ValueError, match="keep: expected 'device', 'cpu' or 'none', got 'disk'"):
        layer.merge("disk")
    with pytest.raises(ValueError, match="init_lora_weights: expected True, False or 'gaussian'"):
        layer.reset_lora_parameters("olora")
    with pytest.raises(RuntimeError, match="merge: the layer is on the meta device"):
        LoRALinear(8, 6, 2, 4, device="meta").merge()


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def replace_forward(module):
    module.forward = lambda x: x


ATTACHED = {
    "class": (
        lambda module: setattr(module, "__class__", OwnForward),
        "OwnForward has a forward of its own",
    ),
    "forward": (replace_forward, "it has a forward or a hook of its own (accelerate's offload"),
    "accelerate": (
        lambda module: add_hook_to_module(module, AlignDevicesHook(offload=True, weights_map={})),
        "put it on the LoRA layer as a whole (accelerate: preload_module_classes)",
    ),
}


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize(("attach", "message"), ATTACHED.values(), ids=ATTACHED)
def test_what_is_attached_to_a_factor_is_not_skipped_in_silence(part, attach, message):
    layer = LoRALinear(8, 6, rank=2, alpha=4)
    attach(getattr(layer, part))
    with pytest.raises(ValueError, match=f"^{part}: .*{re.escape(message)}"):
        layer(torch.randn(3, 8))


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_on_a_part_are_not_skipped_in_silence(part, register):
    layer = LoRALinear(8, 6, rank=2, alpha=4)
    x = torch.randn(3, 8)
    handle = getattr(getattr(layer, part), register)(lambda *_: None)
    with pytest.raises(ValueError, match=f"{part}: it has hooks, which the fused forward"):
        layer(x)
    handle.remove()
    calls = []
    getattr(layer, register)(lambda *_: calls.append(1))
    layer(x).sum().backward()
    assert calls
