"""PEFT's own layers with the values of ours, and both run on the same input."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lora_kernels.nn.peft_names import in_memory_name
from lora_kernels.testing import assert_draws_within_policy, redrawn, redrawn_model
from lora_kernels.testing.policy import Draw

pytest.importorskip("peft")
from peft import LoraConfig
from peft.tuners.lora.layer import Embedding, Linear


def peft_twin(layer: nn.Module) -> nn.Module:
    """PEFT's layer over a copy of the same base layer, its parameters loaded from ``layer``."""
    is_linear = hasattr(layer, "lora_A")
    config = LoraConfig(
        use_dora=layer.use_dora,
        use_rslora=layer.use_rslora,
        lora_dropout=getattr(layer, "dropout_p", 0.0),
        lora_bias=is_linear and layer.lora_B.bias is not None,
    )
    kind = Linear if is_linear else Embedding
    twin = kind(
        copy.deepcopy(layer.base_layer), "default", config, r=layer.rank, lora_alpha=layer.alpha
    )
    for name, parameter in layer.named_parameters():
        # PEFT keeps adapters in fp32 over a half base from outside the layer, like this.
        twin.get_parameter(in_memory_name(name, "default")).data = parameter.detach().clone()
    twin.base_layer.requires_grad_(False)
    return twin.train(layer.training)


def results(module, x: Tensor, dy: Tensor, names, autocast: torch.dtype | None = None):
    """``module``'s output and the gradients of x (if it has one) and of the named parameters."""
    inputs = [module.get_parameter(name) for name in names]
    if x.is_floating_point():
        x = x.detach().requires_grad_()
        inputs = [x, *inputs]
        names = ("x", *names)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = module(x)
    gradients = torch.autograd.grad(y, inputs, dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(names, gradients, strict=True))}


def assert_parity(
    layer,
    x: Tensor,
    dy: Tensor,
    autocast: torch.dtype | None = None,
    twin=None,
    compute=results,
):
    """Ours, PEFT's in the same precision, and PEFT's in fp64, by the error policy."""
    twin = peft_twin(layer) if twin is None else twin
    state = torch.get_rng_state()  # what dropout draws from in every draw

    def draw(number: int) -> Draw:
        # A forward with max_norm writes to the weights that are looked up.
        ours, theirs = copy.deepcopy(layer), copy.deepcopy(twin)
        if number:
            ours = redrawn_model(ours, number)
            for name, parameter in ours.named_parameters():
                theirs.get_parameter(in_memory_name(name, "default")).data = parameter.data.clone()
        given = redrawn(x, number, "x") if x.is_floating_point() else x
        torch.set_rng_state(state)
        found = three_results(ours, given, redrawn(dy, number, "dy"), autocast, theirs, compute)
        assert found[0].keys() == found[1].keys() == found[2].keys()
        return found

    assert_draws_within_policy(draw, autocast)


def three_results(
    layer,
    x: Tensor,
    dy: Tensor,
    autocast: torch.dtype | None = None,
    twin=None,
    compute=results,
):
    """Ours, PEFT's in the same precision, and PEFT's in fp64, under our names."""
    twin = peft_twin(layer) if twin is None else twin
    names = tuple(name for name, p in layer.named_parameters() if p.requires_grad)
    theirs = tuple(in_memory_name(name, "default") for name in names)
    oracle_twin = copy.deepcopy(twin).double()
    wide_x = x.double() if x.is_floating_point() else x

    ours = compute(layer, x, dy, names, autocast)
    eager = compute(twin, x, dy, theirs, autocast)
    oracle = compute(oracle_twin, wide_x, dy.double(), theirs)
    rename = dict(zip(theirs, names, strict=True))
    eager, oracle = (
        {rename.get(name, name): tensor for name, tensor in found.items()}
        for found in (eager, oracle)
    )
    return ours, eager, oracle
