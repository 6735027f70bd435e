"""Which calls are found in a model of each sort, and in which order."""

import pytest
import torch
from torch import nn

from lora_kernels import LoRALinear, RoutedLoRALinear, accelerate
from lora_kernels.measuring.linear_call import LinearCase
from lora_kernels.measuring.routed_call import RoutedCase
from lora_kernels.measuring.shapes import work_of
from lora_kernels.measuring.tuning import device_of

CPU = torch.device("cpu")


def llama(dtype=torch.float32, layers=3):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=80, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype)


def peft_model(**options):
    peft = pytest.importorskip("peft")
    names = {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_dropout": 0.1} | options
    return peft.get_peft_model(llama(), peft.LoraConfig(**names))


def found(model, tokens=(7,), **options):
    return list(work_of(model, tokens, CPU, **options).items())


def linear(m, k, n, rank, dropout=0.0, dtype="fp32"):
    return LinearCase(m, k, n, dtype, dropout, rank, 2 * rank)


@pytest.mark.parametrize("accelerated", [False, True])
def test_of_a_peft_model_its_adapted_layers(accelerated):
    model = peft_model(rank_pattern={"down_proj": 6})
    if accelerated:
        accelerate(model)
    assert found(model) == [(linear(7, 80, 32, 6, 0.1), 3), (linear(7, 32, 32, 4, 0.1), 3)]


def test_adapters_without_dropout_are_one_of_their_joined_ranks():
    model = peft_model(lora_dropout=0.0)
    model.add_adapter("more", model.peft_config["default"])
    model.base_model.set_adapter(["default", "more"])
    assert found(model)[0] == (linear(7, 80, 32, 8), 3)


def test_of_our_layers():
    layer = LoRALinear(16, 24, rank=3, alpha=6, dropout_p=0.2, dtype=torch.bfloat16)
    model = nn.Sequential(layer, nn.Linear(24, 50), LoRALinear(16, 24, rank=3, alpha=9))
    assert found(model) == [
        (linear(7, 16, 24, 3, 0.2, "bf16"), 1),
        (linear(7, 16, 24, 3), 1),
    ]


def test_of_routed_layers_with_what_is_in_their_banks():
    layer = RoutedLoRALinear(16, 24)
    for index, rank in enumerate((3, 5)):
        a, b = torch.randn(rank, 16), torch.randn(24, rank)
        layer.bank.add(f"n{index}", a, b, 0.5, dropout_p=0.1 * index)
    empty = RoutedLoRALinear(16, 8)
    assert found(nn.Sequential(layer, empty)) == [
        (RoutedCase(7, 16, (24,), "fp32", 0.1, 5, 2), 1),
        (RoutedCase(7, 16, (8,), "fp32", 0.0, 16, 1), 1),
    ]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_of_a_plain_model_its_linears_but_the_head(device):
    model = llama(torch.bfloat16).to(device)
    assert device_of(model).type == ("cuda" if torch.cuda.is_available() and device == "meta" else
                                     "cpu")  # fmt: skip
    assert found(model) == [
        (linear(7, 32, 80, 16, dtype="bf16"), 6),
        (linear(7, 80, 32, 16, dtype="bf16"), 3),
        (linear(7, 32, 32, 16, dtype="bf16"), 6),
        (linear(7, 32, 16, 16, dtype="bf16"), 6),
    ]


def test_what_is_given_stands_in_the_place_of_the_layers_own():
    assert found(peft_model(), dtype=torch.float16, rank=9, dropout_p=0.0) == [
        (linear(7, 80, 32, 9, dtype="fp16"), 3),
        (linear(7, 32, 32, 9, dtype="fp16"), 3),
    ]
    assert found(llama(), rank=9, dropout_p=0.5)[0] == (linear(7, 32, 80, 9, 0.5), 6)


def test_calls_of_one_cell_are_measured_once():
    """5 and 8 tokens are one cell, 9 another; of a shape those of most tokens come first."""
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(16, 24))
    assert [case.m for case, _ in found(model, (5, 9, 8))] == [9, 8]


def test_what_cannot_be_measured_is_left_out():
    assert found(nn.Linear(16, 24, dtype=torch.float64)) == []
    assert found(nn.Linear(16, 24, dtype=torch.float64), dtype=torch.float32)


def test_layers_of_peft_that_are_none_of_ours_do_not_make_a_plain_model():
    """Their A and B are linear layers."""
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 1), "proj": nn.Linear(8, 8)})
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["conv"]))
    assert found(model) == []
