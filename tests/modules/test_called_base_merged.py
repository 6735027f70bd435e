"""Merging, and DoRA's reset, over a base that does more than its weight says: right or refused."""

import pytest
import torch
from attached import (
    ATTACHMENTS,
    K,
    accelerates_hook,
    backward_hook,
    class_of_its_own,
    forward_hook,
    make,
    parametrized,
    pefts,
    tensor_subclass,
)
from torch.nn import functional as F
from torchao.quantization import Int8WeightOnlyConfig, quantize_

UNMERGEABLE = {
    "class_of_its_own": r"base_layer \(Doubled\) has a forward of its own",
    "forward_on_the_instance": r"base_layer \(Linear\) has a forward of its own",
    "quantisation_aware": r"base_layer \(FakeQuantizedLinear\) has a forward of its own",
    "parametrized": "base_layer's weight is computed when it is read",
    "offloaded": "the layer's weights are offloaded",
    "int8": "base_layer's weight is quantised \\(\\w+Tensor, torch.float32",
}


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(("attach", "message"), UNMERGEABLE.items(), ids=UNMERGEABLE)
def test_what_cannot_be_merged_says_so(attach, message, use_dora):
    layer = make(use_dora=use_dora)
    if attach == "int8":
        quantize_(layer.base_layer, Int8WeightOnlyConfig())
    else:
        ATTACHMENTS[attach](layer)
    before = layer.base_layer.weight
    with pytest.raises(RuntimeError, match=f"merge: {message}"):
        layer.merge()
    assert not layer.merged
    assert layer.base_layer.weight is before or attach == "parametrized"


@pytest.mark.parametrize("attach", [backward_hook, accelerates_hook])
def test_hooks_run_on_the_merged_result(attach):
    layer = make()
    attach(layer)
    x = torch.randn(7, K)
    y = layer(x)
    layer.merge()
    half = 2 if attach is accelerates_hook else 1
    merged = F.linear(x / half, layer.base_layer.weight, layer.base_layer.bias)
    assert torch.equal(layer(x), merged)
    layer.unmerge()
    assert torch.equal(layer(x), y)


def test_merged_and_then_quantised():
    """The usual end: the merged weight is quantised, and the layer is its base alone."""
    layer = make()
    x = torch.randn(4, K)
    layer.merge()
    quantize_(layer.base_layer, Int8WeightOnlyConfig())
    weight = layer.base_layer.weight.dequantize()
    torch.testing.assert_close(layer(x), F.linear(x, weight, layer.base_layer.bias))
    layer.unmerge()
    torch.testing.assert_close(layer(x), pefts(layer, x))


@pytest.mark.parametrize("attach", [forward_hook, class_of_its_own, parametrized, tensor_subclass])
def test_doras_reset_over_such_a_base(attach):
    layer = make(use_dora=True)
    attach(layer)
    layer.reset_lora_parameters()
    norm = torch.linalg.vector_norm(
        layer.base_layer.weight.detach().as_subclass(torch.Tensor), dim=1
    )
    torch.testing.assert_close(layer.lora_magnitude_vector.detach(), norm)
    x = torch.randn(4, K)
    torch.testing.assert_close(layer(x), layer.base_layer(x))
