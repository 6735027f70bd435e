"""Gradients of gradients of accelerated models are PEFT's: forces, gradient penalties."""

import pytest
import torch
from peft_models import (
    Net,
    Parallel,
    accelerated,
    assert_parity,
    build,
    inputs,
    lora_config,
    with_defined_dropout,
)
from test_peft_parity import CONFIGS
from torch import Tensor, nn
from torch.nn import functional as F

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*lora_bias=True")


def found(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {"loss": loss.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def forces(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """A loss on the gradient of an energy, and its gradients to the parameters."""
    x = x.detach().requires_grad_()
    torch.manual_seed(2)
    (slope,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(x.dtype)
    return found(F.mse_loss(-slope, target), model)


def gradient_penalty(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The penalty on a critic's slope beside its ordinary loss."""
    x = x.detach().requires_grad_()
    torch.manual_seed(2)
    scores = model(x).square().sum(-1)
    (slope,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return found((slope.norm(dim=-1) - 1).square().mean() + scores.mean(), model)


NAMES = [
    "rank 3",
    "bias all",
    "lora_bias",
    "dora",
    "dora with dropout",
    "dropout",
    "two adapters",
    "three adapters, one elsewhere",
    "two adapters, one with dropout",
    "dora between plain",
]


@pytest.mark.parametrize("loss", [forces, gradient_penalty])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    # In fp32 no layer's rounding may reach another's result.
    "base, dtype",
    [(Net, torch.float64), (Parallel, torch.float32)],
    ids=["fp64", "fp32"],
)
def test_a_step_is_pefts(base, dtype, name, loss):
    plain = build(*CONFIGS[name], base=base).train().to(dtype)
    x = inputs(2, 14, dtype=dtype)
    assert_parity(accelerated(plain), with_defined_dropout(plain), x, loss)


def penalty_of_every_gradient(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    torch.manual_seed(2)
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]
    first = torch.autograd.grad(model(x).sin().sum(), trained, create_graph=True, allow_unused=True)
    return found(sum(g.square().mean() for g in first if g is not None), model)


@pytest.mark.parametrize("name", NAMES)
def test_a_penalty_of_every_gradient(name):
    plain = build(*CONFIGS[name]).train().double()
    x = inputs(9, dtype=torch.float64)
    assert_parity(accelerated(plain), with_defined_dropout(plain), x, penalty_of_every_gradient)


def freeze_a(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_forces_with_a_frozen_a(use_dora):
    """LoRA-FA: x is not saved, and the forces do not read it."""
    plain = freeze_a(build(lora_config(use_dora=use_dora))).double()
    assert_parity(accelerated(plain), plain, inputs(9, dtype=torch.float64), forces)


def test_a_gradient_that_reads_an_unsaved_input_is_an_error():
    model = accelerated(freeze_a(build(lora_config())))
    with pytest.raises(RuntimeError, match="was not saved because lora_a is frozen"):
        penalty_of_every_gradient(model, inputs(9))
