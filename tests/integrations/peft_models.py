"""Small PEFT models with every weight random, and the comparison of an accelerated one with them.

Parity means the error policy: both models against the same model in fp64.
"""

import copy
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_kernels
from lora_kernels.runtime.dropout import draw_seed, keep_mask, keep_scale
from lora_kernels.testing import assert_draws_within_policy, redrawn, redrawn_model
from lora_kernels.testing.policy import Draw

LAYERS = ["up", "gate", "down"]


class Net(nn.Module):
    """A linear, a Conv1D and a linear without a bias; sizes that are multiples of nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(23, 37)
        self.gate = Conv1D(29, 37)
        self.down = nn.Linear(29, 31, bias=False)
        self.head = nn.Linear(31, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(x))
        return self.head(self.down(torch.tanh(self.gate(hidden))))


class Parallel(nn.Module):
    """The same kinds of layer side by side: no layer's rounding reaches another's result."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(23, 37)
        self.gate = Conv1D(29, 23)
        self.down = nn.Linear(23, 31, bias=False)
        self.head = nn.Linear(23, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.up(x), self.gate(x), self.down(x)], -1)


def lora_config(**settings) -> LoraConfig:
    settings = {"r": 3, "lora_alpha": 7, "target_modules": LAYERS} | settings
    return LoraConfig(**settings)


def randomise(model: nn.Module, scale: float = 0.3) -> None:
    """Signed random values in every adapter tensor and bias; PEFT starts some of them at zero."""
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
        elif "lora_" in name or name.endswith("bias"):
            parameter.data.normal_(0.0, scale)


def build(
    *configs: LoraConfig,
    base: type[nn.Module] = Net,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A PEFT model with one adapter per config, named one, two, three, all of them active."""
    torch.manual_seed(0)
    configs = copy.deepcopy(configs)  # PEFT writes into them
    names = ["one", "two", "three"][: len(configs)]
    model = get_peft_model(base().to(dtype), configs[0], adapter_name=names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    model.base_model.set_adapter(names)
    randomise(model)
    return model


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[*shape, 23], requires grad."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, 23, generator=generator).to(dtype).requires_grad_()


class DefinedDropout(nn.Module):
    """The package's dropout as a module for PEFT: it draws seeds as the fused forward does."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        rows = x.reshape(-1, x.shape[-1])
        mask = keep_mask(draw_seed(x.device), self.p, *rows.shape).view(x.shape)
        return torch.where(mask, x * keep_scale(self.p), 0.0)


def with_defined_dropout(model: nn.Module) -> nn.Module:
    """A copy whose adapters, DoRA's aside, draw their masks as `lora_linear` does."""
    model = copy.deepcopy(model)
    for layer in lora_layers(model).values():
        for name, dropout in layer.lora_dropout.items():
            if isinstance(dropout, nn.Dropout) and name not in layer.lora_variant:
                layer.lora_dropout[name] = DefinedDropout(dropout.p).train(dropout.training)
    return model


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    from peft.tuners.lora import LoraLayer

    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def accelerated(model: nn.Module) -> nn.Module:
    """An accelerated copy, all of whose LoRA layers are fast."""
    model = copy.deepcopy(model)
    report = lora_kernels.accelerate(model)
    assert not report.delegated, str(report)
    return model


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output and every gradient of one forward and backward under a fixed random cotangent."""
    x = x.detach().clone().requires_grad_(x.requires_grad)
    model.zero_grad()
    torch.manual_seed(2)
    y = model(x)
    generator = torch.Generator().manual_seed(3)
    cotangent = torch.randn(y.shape, generator=generator).to(y.dtype)
    if y.requires_grad:
        y.backward(cotangent)
    tensors = {"y": y.detach()}
    if x.grad is not None:
        tensors["x"] = x.grad
    named = model.named_parameters(remove_duplicate=False)
    return tensors | {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_parity(
    fast: nn.Module,
    plain: nn.Module,
    x: Tensor,
    compute: Callable[[nn.Module, Tensor], dict[str, Tensor]] = gradients,
) -> None:
    """`fast` computes what `plain` does, in value, dtype and in which gradients exist.

    Where a layer's input is another's result, keep the network well conditioned (small adapters,
    small steps): one that multiplies a rounding by a hundred tells how lucky it was.
    """

    def draw(number: int) -> Draw:
        drawn, other = redrawn_model(plain, number), redrawn_model(fast, number)
        given = redrawn(x.detach(), number).requires_grad_(x.requires_grad)
        oracle = copy.deepcopy(drawn).double()
        with torch.autocast("cpu", enabled=False):
            exact = compute(oracle, given.detach().double().requires_grad_(x.requires_grad))
        ours, theirs = compute(other, given), compute(drawn, given)
        assert ours.keys() == theirs.keys() == exact.keys()
        return ours, theirs, exact

    first = draw(0)
    # fp32 gradients of fp32 adapters come out of half-precision products where others do.
    computed_in = min((result.dtype for result in first[1].values()), key=lambda d: d.itemsize)
    assert_draws_within_policy(lambda number: draw(number) if number else first, computed_in)
