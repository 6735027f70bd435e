"""A compiled layer follows what is done to its base layer after it was compiled."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_kernels import LoRALinear, accelerate


def own_layer() -> nn.Module:
    return LoRALinear(16, 8, 4, 8.0, init_lora_weights=False)


def accelerated_layer() -> nn.Module:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(16, 8)), config)
    accelerate(model)
    return model.base_model.model[0]


@pytest.mark.parametrize("make", [own_layer, accelerated_layer])
def test_a_forward_set_on_the_base_layer_later(make):
    torch._dynamo.reset()
    layer, x = make(), torch.randn(5, 16)
    compiled = torch.compile(layer, backend="eager")
    before = compiled(x)
    torch.testing.assert_close(before, layer(x))
    base = layer.base_layer
    base.forward = lambda x: F.linear(x, base.weight) * 3
    after = layer(x)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(compiled(x), after)
    del base.forward
    torch.testing.assert_close(compiled(x), before)
