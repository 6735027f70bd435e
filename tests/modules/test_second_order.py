"""Gradients of gradients through the drop-in layers, against PEFT's layers; and what they are for:
forces and gradient penalties."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_kernels.nn import LoRAEmbedding, LoRALinear
from lora_kernels.runtime.dropout import draw_seed, keep_mask, keep_scale
from lora_kernels.testing import assert_draws_within_policy

import peft_layers  # isort: skip

pytestmark = pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed")

IN, OUT, RANK, ALPHA = 37, 53, 5, 11
VARIANTS = {
    "plain": {},
    "no_base_bias": {"bias": False},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
}
PRECISIONS = {
    "fp64": (torch.float64, None, None),
    "fp32": (torch.float32, None, None),
    "bf16": (torch.bfloat16, torch.bfloat16, None),
    "fp16": (torch.float16, torch.float16, None),
    "bf16_fp32_adapters": (torch.bfloat16, torch.float32, torch.bfloat16),
    "fp16_fp32_adapters": (torch.float16, torch.float32, torch.float16),
    "fp32_autocast": (torch.float32, None, torch.bfloat16),
}
precisions = pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)


def with_magnitudes(layer: nn.Module) -> nn.Module:
    if layer.use_dora:
        with torch.no_grad():
            magnitude = layer.lora_magnitude_vector
            magnitude *= 1 + 0.3 * torch.randn_like(magnitude)
    return layer


def second_order(module, x: Tensor, dy: Tensor, names, autocast=None) -> dict[str, Tensor]:
    """The gradients of the parameters and of x, and those of a signed sum of all of these."""
    inputs = [module.get_parameter(name) for name in names]
    if x.is_floating_point():
        inputs.append(x.detach().requires_grad_())
        x = inputs[-1]
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = module(x)
    dy = dy.to(y.dtype, copy=True).requires_grad_()
    first = torch.autograd.grad(y, inputs, dy, create_graph=True)
    generator = torch.Generator().manual_seed(4)
    signs = [torch.randn(g.shape, generator=generator, dtype=torch.float64) for g in first]
    second = torch.autograd.grad(
        first,
        [*inputs, dy],
        [s.to(g.dtype) for s, g in zip(signs, first, strict=True)],
        allow_unused=True,  # no gradient depends on a bias
        materialize_grads=True,
    )
    named = {f"gradient {place}": gradient.detach() for place, gradient in enumerate(first)}
    return named | {f"its gradient {place}": gradient for place, gradient in enumerate(second)}


def assert_parity(layer, x: Tensor, dy: Tensor, autocast=None, twin=None) -> None:
    peft_layers.assert_parity(layer, x, dy, autocast, twin, second_order)


@precisions
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_linear(variant, precision):
    dtype, adapter_dtype, autocast = precision
    made = {"dtype": dtype, "adapter_dtype": adapter_dtype, "init_lora_weights": False}
    layer = with_magnitudes(LoRALinear(IN, OUT, RANK, ALPHA, **made, **variant))
    x, dy = torch.randn(3, 17, IN, dtype=dtype), torch.randn(3, 17, OUT, dtype=dtype)
    assert_parity(layer, x, dy, autocast)


class FixedMask(nn.Module):
    def __init__(self, keep: Tensor, scale: float) -> None:
        super().__init__()
        self.register_buffer("keep", keep)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.keep.view(x.shape), x * self.scale, 0)


@precisions
def test_linear_with_dropout(precision):
    dtype, adapter_dtype, autocast = precision
    layer = LoRALinear(
        IN, OUT, RANK, ALPHA, dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=0.4,
        init_lora_weights=False,
    )  # fmt: skip
    twin = peft_layers.peft_twin(layer)
    x, dy = torch.randn(3, 17, IN, dtype=dtype), torch.randn(3, 17, OUT, dtype=dtype)
    torch.manual_seed(3)
    keep = keep_mask(draw_seed(torch.device("cpu")), 0.4, 51, IN)
    twin.lora_dropout["default"] = FixedMask(keep, keep_scale(0.4))
    torch.manual_seed(3)
    assert_parity(layer, x, dy, autocast, twin)


@precisions
def test_dora_with_dropout(monkeypatch, precision):
    dtype, adapter_dtype, autocast = precision
    layer = LoRALinear(
        IN, OUT, RANK, ALPHA, dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=0.4,
        use_dora=True, init_lora_weights=False,
    )  # fmt: skip
    keep = torch.rand(3, 17, IN) >= 0.4

    def dropout(x, p=0.5, training=True, inplace=False):
        return torch.where(keep, x / (1 - p), 0) if training else x

    monkeypatch.setattr(F, "dropout", dropout)
    x, dy = torch.randn(3, 17, IN, dtype=dtype), torch.randn(3, 17, OUT, dtype=dtype)
    assert_parity(with_magnitudes(layer), x, dy, autocast)


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "bf16_fp32_adapters"])
@pytest.mark.parametrize(
    "variant",
    [{}, {"padding_idx": 3}, {"use_dora": True}],
    ids=["plain", "padding_idx", "dora"],
)
def test_embedding(variant, precision):
    dtype, adapter_dtype, _ = PRECISIONS[precision]
    made = {"dtype": dtype, "adapter_dtype": adapter_dtype, "init_lora_weights": False}
    layer = with_magnitudes(LoRAEmbedding(41, 26, RANK, ALPHA, **made, **variant))
    x = torch.randint(41, (4, 15))
    x[0, :4] = torch.tensor([0, 40, 3, 3])
    assert_parity(layer, x, torch.randn(4, 15, 26, dtype=dtype))


# --- what it is for --------------------------------------------------------------------------


class Formula(nn.Module):
    """``x (W + s B A)^T + b`` as one would write it down."""

    def __init__(self, layer: LoRALinear) -> None:
        super().__init__()
        self.base_layer, self.scaling = copy.deepcopy(layer.base_layer), layer.scaling.item()
        self.lora_A, self.lora_B = copy.deepcopy(layer.lora_A), copy.deepcopy(layer.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(
            x,
            self.base_layer.weight + self.scaling * self.lora_B.weight @ self.lora_A.weight,
            self.base_layer.bias,
        )


def network(*sizes: int, activation: type[nn.Module]) -> nn.Sequential:
    layers = []
    for into, out in pairwise(sizes):
        layers += [LoRALinear(into, out, 4, 8.0, init_lora_weights=False), activation()]
    return nn.Sequential(*layers[:-1])


def forces(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """A loss on ``-dE/dx``, as interatomic potentials are trained."""
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return F.mse_loss(-slope, target)


def gradient_penalty(model: nn.Module, x: Tensor, fake: Tensor) -> Tensor:
    """The critic's loss of Gulrajani et al., "Improved Training of Wasserstein GANs", 2017."""
    between = torch.lerp(x, fake, 0.3).detach().requires_grad_()
    scores = model(between)
    (slope,) = torch.autograd.grad(scores, between, torch.ones_like(scores), create_graph=True)
    penalty = (slope.norm(dim=1) - 1).square().mean()
    return model(fake).mean() - model(x).mean() + 10 * penalty


@pytest.mark.parametrize("frozen", ["", "lora_A"], ids=["", "frozen A"])
@pytest.mark.parametrize("loss, activation", [(forces, nn.Tanh), (gradient_penalty, nn.SiLU)])
def test_a_step_is_that_of_the_formula(loss, activation, frozen):
    def gradients(model: nn.Module, *data: Tensor) -> dict[str, Tensor]:
        loss(model, *data).backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert len(trained) == (2 if frozen else 4)
        assert all(p.grad.abs().max() > 0 for p in trained.values())
        return {name: p.grad for name, p in trained.items()}

    def draw(number: int):
        torch.manual_seed(number)
        model = network(16, 24, 1, activation=activation)
        for name, parameter in model.named_parameters():
            if frozen and frozen in name:
                parameter.requires_grad_(False)
        formula = nn.Sequential(*(Formula(m) if isinstance(m, LoRALinear) else m for m in model))
        exact = copy.deepcopy(formula).double()
        x, other = torch.randn(33, 16), torch.randn(33, 16)
        return (
            gradients(model, x, other),
            gradients(formula, x, other),
            gradients(exact, x.double(), other.double()),
        )

    assert_draws_within_policy(draw)
