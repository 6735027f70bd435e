"""PEFT's files of the adapters in routed_models.py, written once per module of tests; and every
accelerated layer's glance at itself is held against the full reading."""

import pytest
from routed_models import CONFIGS, llama, peft_alone

from lora_kernels.integrations.peft import layers as peft_layers
from lora_kernels.integrations.peft.state import ActiveAdapter, LayerState, read_call, read_ordinary
from lora_kernels.ops.linear import _check
from lora_kernels.runtime.dtypes import cast_for_autocast


@pytest.fixture(autouse=True)
def what_is_ordinary_the_full_reading_accepts(monkeypatch):
    read_once = read_ordinary  # a graph finds no globals of a module that shares its name

    def read_twice(layer, x):
        operands = read_once(layer, x)
        if operands is not None:
            weight, lora_a, lora_b, scaling, bias, dropout_p = operands
            state = read_call(layer, x, (), {})
            assert type(state) is LayerState, state
            assert state.weight is weight and state.bias is bias
            adapter = ActiveAdapter(lora_a, lora_b, None, scaling, dropout_p, None, False)
            assert all(a is b or a == b for a, b in zip(*state.adapters, adapter, strict=True))
            x, weight, bias = cast_for_autocast(x, weight, bias)
            _check(x, weight, lora_a, lora_b, scaling, bias, None, dropout_p, None)
        return operands

    monkeypatch.setattr(peft_layers, "read_ordinary", read_twice)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapters")
    for name in CONFIGS:
        peft_alone(name, llama()).save_pretrained(directory / name)
    return directory
