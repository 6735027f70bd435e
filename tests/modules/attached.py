"""What others do to the base of a LoRALinear that was made before, and PEFT's forward there."""

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from torch import nn
from torch.nn import functional as F
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

from lora_kernels import LoRALinear

K, N, RANK = 32, 21, 3


class Doubled(nn.Linear):
    """A forward of its own."""

    def forward(self, x):
        return super().forward(2 * x)


class Trained(nn.Module):
    """A parametrization with a parameter that is trained."""

    def __init__(self, like):
        super().__init__()
        ramp = torch.linspace(0.5, 1.5, like.shape[0], dtype=like.dtype)
        self.gain = nn.Parameter(ramp.unsqueeze(1))

    def forward(self, weight):
        return weight * self.gain


class Kept(torch.Tensor):
    """A class of tensors with an ``F.linear`` of its own."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, bias = args
            return F.linear(x, weight.as_subclass(torch.Tensor) * 3, bias)
        return super().__torch_function__(function, types, args, kwargs or {})


class Halving(ModelHook):
    def pre_forward(self, module, x):
        return (x / 2,), {}


def forward_hook(layer):
    layer.base_layer.register_forward_hook(lambda module, args, y: 2 * y + 1)


def pre_hook(layer):
    layer.base_layer.register_forward_pre_hook(lambda module, args: (args[0] / 2,))


def backward_hook(layer):
    layer.base_layer.register_full_backward_hook(lambda module, dx, dy: (2 * dx[0],))


def forward_on_the_instance(layer):
    base = layer.base_layer
    base.forward = lambda x: F.linear(x, base.weight, base.bias).sin()


def class_of_its_own(layer):
    layer.base_layer.__class__ = Doubled


def accelerates_hook(layer):
    add_hook_to_module(layer.base_layer, Halving())


def offloaded(layer):
    base = layer.base_layer
    values = {name: value.clone() for name, value in base.state_dict().items()}
    add_hook_to_module(base, AlignDevicesHook("cpu", offload=True, weights_map=values))
    assert base.weight.is_meta


def parametrized(layer):
    base = layer.base_layer
    nn.utils.parametrize.register_parametrization(base, "weight", Trained(base.weight))


def quantisation_aware(layer):
    fake = IntxFakeQuantizeConfig(torch.int4, group_size=16)
    config = QATConfig(weight_config=fake, step="prepare")
    quantize_(layer, config, filter_fn=lambda module, name: name == "base_layer")


def tensor_subclass(layer):
    base = layer.base_layer
    base.weight = nn.Parameter(base.weight.detach().as_subclass(Kept), requires_grad=False)


ATTACHMENTS = {
    attach.__name__: attach
    for attach in (
        forward_hook,
        pre_hook,
        backward_hook,
        forward_on_the_instance,
        class_of_its_own,
        accelerates_hook,
        offloaded,
        parametrized,
        quantisation_aware,
        tensor_subclass,
    )
}


def make(dtype=torch.float32, adapter_dtype=None, **options) -> LoRALinear:
    layer = LoRALinear(
        K, N, RANK, 7, dtype=dtype, adapter_dtype=adapter_dtype, init_lora_weights=False, **options
    )
    if layer.use_dora:
        with torch.no_grad():
            layer.lora_magnitude_vector *= 1 + 0.3 * torch.randn(N)
    return layer


def pefts(layer: LoRALinear, x: torch.Tensor) -> torch.Tensor:
    """PEFT's forward around the same base layer."""
    base, scaling = layer.base_layer, float(layer.scaling)
    a, b = layer.lora_A, layer.lora_B
    y = base(x)
    delta = F.linear(F.linear(x.to(a.weight.dtype), a.weight), b.weight, b.bias) * scaling
    if not layer.use_dora:
        return (y + delta).to(y.dtype)
    with torch.autocast("cpu", enabled=False):
        wide = torch.promote_types(base.weight.dtype, a.weight.dtype)
        weight = base.weight.to(wide) + scaling * (b.weight @ a.weight).to(wide)
        norm = torch.linalg.vector_norm(weight.detach(), dim=1)
    c = layer.lora_magnitude_vector / norm
    base_result = y if base.bias is None else y - base.bias
    return (y + (c - 1) * base_result + c * delta).to(y.dtype)
