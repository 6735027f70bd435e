"""LoRAEmbedding over a base that looks up other indices than came: A is looked up at the same."""

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from attached import offloaded
from torch import nn
from torch.nn import functional as F
from torchao.quantization.qat import IntxFakeQuantizeConfig
from torchao.quantization.qat.embedding import FakeQuantizedEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

from lora_kernels.nn import LoRAEmbedding
from lora_kernels.testing import assert_within_policy

NUM, DIM, RANK = 23, 32, 5


class Shifted(nn.Embedding):
    """As OPT's and BART's positions."""

    def forward(self, positions):
        return super().forward(positions + 2)


class ShiftedAndScaled(nn.Embedding):
    embed_scale = 3.0

    def forward(self, positions):
        return F.embedding(input=positions.flip(-1), weight=self.weight) * self.embed_scale


class Swapping(ModelHook):
    def pre_forward(self, module, positions):
        return (NUM - 1 - positions,), {}


def class_of_its_own(layer):
    layer.base_layer.__class__ = Shifted
    return lambda x: x + 2


def scaled(layer):
    layer.base_layer.__class__ = ShiftedAndScaled
    return lambda x: x.flip(-1)


def pre_hook(layer):
    layer.base_layer.register_forward_pre_hook(lambda module, args: ((args[0] + 7) % NUM,))
    return lambda x: (x + 7) % NUM


def accelerates_hook(layer):
    add_hook_to_module(layer.base_layer, Swapping())
    return lambda x: NUM - 1 - x


def forward_on_the_instance(layer):
    base = layer.base_layer
    base.forward = lambda x: F.embedding((3 * x) % NUM, base.weight)
    return lambda x: (3 * x) % NUM


def quantisation_aware(layer):
    config = IntxFakeQuantizeConfig(torch.int4, group_size=16)
    layer.base_layer = FakeQuantizedEmbedding.from_embedding(layer.base_layer, config)
    return lambda x: x


ATTACHMENTS = {
    attach.__name__: attach
    for attach in (
        class_of_its_own,
        scaled,
        pre_hook,
        accelerates_hook,
        forward_on_the_instance,
        quantisation_aware,
    )
}


def make(dtype=torch.float32, **options) -> LoRAEmbedding:
    layer = LoRAEmbedding(NUM, DIM, RANK, 7, dtype=dtype, init_lora_weights=False, **options)
    if layer.use_dora:
        with torch.no_grad():
            layer.lora_magnitude_vector *= 1 + 0.3 * torch.randn(DIM)
    return layer


def pefts(layer, x, indices):
    """PEFT's forward, but for the indices."""
    base, scaling = layer.base_layer(x), float(layer.scaling)
    scale = getattr(layer.base_layer, "embed_scale", 1.0)
    delta = layer.lora_embedding_A.t()[indices] @ layer.lora_embedding_B.t() * scaling * scale
    if not layer.use_dora:
        return (base + delta).to(base.dtype)
    product = (layer.lora_embedding_B @ layer.lora_embedding_A).t() * scaling
    norm = torch.linalg.vector_norm((layer.base_layer.weight + product).detach(), dim=0)
    return ((base + delta) * layer.lora_magnitude_vector / norm).to(base.dtype)


def outcome(layer, dy, y):
    parameters = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(y, list(parameters.values()), dy)
    return {"y": y.detach(), **dict(zip(parameters, gradients, strict=True))}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("attach", ATTACHMENTS.values(), ids=ATTACHMENTS)
def test_forward_and_backward(attach, use_dora, dtype):
    if attach is quantisation_aware:
        dtype = torch.float32  # torchao has no fp64
    layer = make(dtype, use_dora=use_dora)
    wide = copy.deepcopy(layer).double()
    shift = attach(layer)
    if attach is quantisation_aware:
        quantised = layer.base_layer.weight_fake_quantizer(layer.base_layer.weight).double()
        wide.base_layer.forward = lambda x: F.embedding(x, quantised)
    else:
        attach(wide)
    x, dy = torch.randint(NUM - 2, (4, 9)), torch.randn(4, 9, DIM, dtype=dtype)
    ours = outcome(layer, dy, layer(x))
    eager = outcome(layer, dy, pefts(layer, x, shift(x)))
    exact = outcome(wide, dy.double(), pefts(wide, x, shift(x)))
    for name, value in ours.items():
        assert_within_policy(name, value, eager[name], exact[name])


def test_transformers_positions():
    """`OPTLearnedPositionalEmbedding` counts the mask, and starts at 2."""
    embedding = OPTLearnedPositionalEmbedding(NUM - 2, DIM)
    layer = LoRAEmbedding.from_embedding(embedding, RANK, 7, init_lora_weights=False)
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    looked_up = torch.tensor([[2, 3, 4, 1], [1, 1, 2, 3]])
    y = layer(mask)
    torch.testing.assert_close(y, pefts(layer, mask, looked_up))
    layer.merge()
    torch.testing.assert_close(layer(mask), y)


def test_every_call_looks_again():
    layer = make()
    x = torch.randint(NUM, (9,))
    plain = layer(x)
    handle = layer.base_layer.register_forward_pre_hook(lambda *_: None)
    assert torch.equal(layer(x), plain)
    handle.remove()
    offloaded(layer)
    assert torch.equal(layer(x), plain)
    layer.use_dora = True
    with pytest.raises(RuntimeError, match="base_layer: its weight is offloaded"):
        layer(x)


class Summed(nn.Embedding):
    def forward(self, x):
        return super().forward(x) + super().forward(x // 2)


class Indexed(nn.Embedding):
    def forward(self, x):
        return self.weight[x]


@pytest.mark.parametrize(("kind", "times"), [(Summed, 2), (Indexed, 0)])
def test_what_cannot_be_followed_says_so(kind, times):
    layer = LoRAEmbedding.from_embedding(kind(NUM, DIM), RANK, 7)
    x = torch.randint(NUM, (9,))
    message = rf"forward of {kind.__name__} to look its weight up once .* got {times} times"
    with pytest.raises(ValueError, match=message):
        layer(x)
    with pytest.raises(RuntimeError, match=rf"base_layer \({kind.__name__}\) has a forward of its"):
        layer.merge()
    layer.disable_adapters = True
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("attach", ATTACHMENTS.values(), ids=ATTACHMENTS)
def test_merging(attach, use_dora):
    layer = make(use_dora=use_dora)
    attach(layer)
    x = torch.randint(NUM - 2, (4, 9))
    y = layer(x)
    if attach in (forward_on_the_instance, quantisation_aware):
        with pytest.raises(RuntimeError, match=r"merge: base_layer .* has a forward of its own"):
            layer.merge()
        return
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
    layer.unmerge()
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("attach", [class_of_its_own, scaled, pre_hook])
def test_compiles_whole(attach):
    torch._dynamo.reset()
    layer = make()
    attach(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randint(NUM - 2, (4, 9))
    torch.testing.assert_close(compiled(x), layer(x))


def test_an_embed_scale_that_has_become_several():
    layer = make()
    layer.base_layer.embed_scale = torch.ones(DIM)
    with pytest.raises(ValueError, match=r"embed_scale to be a number or one element"):
        layer(torch.tensor([1]))
