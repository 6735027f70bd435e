"""LoRAEmbedding against PEFT's layer, and as torch's module machinery sees it."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from lora_kernels.nn import LoRAEmbedding
from lora_kernels.testing import assert_within_policy

from peft_layers import Embedding, LoraConfig, assert_parity, peft_twin  # isort: skip

NUM, DIM, RANK, ALPHA = 41, 26, 5, 7

VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "padding_idx": {"padding_idx": 3},
    "negative_padding_idx": {"padding_idx": -2},
    "max_norm": {"max_norm": 2.0},
    "max_norm_l1": {"max_norm": 4.0, "norm_type": 1.0},
    "scale_grad_by_freq": {"scale_grad_by_freq": True},
    "dora": {"use_dora": True},
    "dora_padding_idx_max_norm": {"use_dora": True, "padding_idx": 3, "max_norm": 2.0},
}
PRECISIONS = {
    "fp64": (torch.float64, None, None),
    "fp32": (torch.float32, None, None),
    "bf16": (torch.bfloat16, torch.bfloat16, None),
    "fp16": (torch.float16, torch.float16, None),
    "bf16_fp32_adapters": (torch.bfloat16, torch.float32, None),
    "fp32_autocast": (torch.float32, None, torch.bfloat16),
}


def make(dtype=torch.float32, **options) -> LoRAEmbedding:
    layer = LoRAEmbedding(NUM, DIM, RANK, ALPHA, dtype=dtype, init_lora_weights=False, **options)
    if layer.use_dora:
        with torch.no_grad():
            layer.lora_magnitude_vector *= 1 + 0.3 * torch.randn(DIM)
    return layer


def indices() -> torch.Tensor:
    """Repeated, absent and padding indices, and the first and the last row."""
    x = torch.randint(NUM, (4, 15))
    x[0, :4] = torch.tensor([0, NUM - 1, 3, 3])
    return x


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_forward_and_backward_are_pefts(variant, precision):
    dtype, adapter_dtype, autocast = precision
    layer = make(dtype, adapter_dtype=adapter_dtype, **variant)
    assert_parity(layer, indices(), torch.randn(4, 15, DIM, dtype=dtype), autocast)


@pytest.mark.parametrize("variant", ["max_norm", "dora_padding_idx_max_norm"])
def test_max_norm_renormalises_what_peft_renormalises(variant):
    layer = make(**VARIANTS[variant])
    twin = peft_twin(layer)
    before = copy.deepcopy(layer.state_dict())
    x = indices()
    layer(x), twin(x)
    after = layer.state_dict()
    for name, ours in layer.peft_state_dict().items():
        assert torch.equal(ours, twin.state_dict()[name]), name
    assert not torch.equal(after["base_layer.weight"], before["base_layer.weight"])
    assert not torch.equal(after["lora_embedding_A"], before["lora_embedding_A"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_a_scaled_embedding_scales_the_adapter_too(as_tensor, use_dora, dtype):
    class ScaledEmbedding(nn.Embedding):
        def __init__(self):
            super().__init__(NUM, DIM, padding_idx=0, dtype=dtype)
            if as_tensor:
                self.register_buffer("embed_scale", torch.tensor(5.0), persistent=False)
            else:
                self.embed_scale = 5.0

        def forward(self, x):
            scale = torch.as_tensor(self.embed_scale, dtype=self.weight.dtype)
            return super().forward(x) * scale

    embedding = ScaledEmbedding()
    layer = LoRAEmbedding.from_embedding(
        embedding, RANK, ALPHA, use_dora=use_dora, init_lora_weights=False
    )
    x = indices()
    assert_parity(layer, x, torch.randn(4, 15, DIM, dtype=dtype))
    y = layer(x)
    layer.merge()
    twin = peft_twin(layer)
    oracle = twin.double()(x)
    assert_within_policy("merged", layer(x), y, oracle)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_over_a_sparse_embedding_gradients_are_dense(use_dora):
    """PEFT fails in the backward: torch cannot transpose the sparse gradient."""
    layer = make(sparse=True, use_dora=use_dora)
    dense = make(use_dora=use_dora)
    dense.load_state_dict(layer.state_dict())
    x, dy = indices(), torch.randn(4, 15, DIM)
    for module in (layer, dense):
        module(x).backward(dy)
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, dense.get_parameter(name).grad), name


@pytest.mark.parametrize("init_lora_weights", [True, "gaussian"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_new_adapter_changes_nothing_and_is_drawn_as_pefts(use_dora, init_lora_weights):
    embedding = nn.Embedding(NUM, DIM, padding_idx=1)
    twin_base = copy.deepcopy(embedding)
    layer = LoRAEmbedding.from_embedding(
        embedding, RANK, ALPHA, use_dora=use_dora, init_lora_weights=init_lora_weights
    )
    config = LoraConfig(use_dora=use_dora, init_lora_weights=init_lora_weights)
    twin = Embedding(twin_base, "default", config, r=RANK, lora_alpha=ALPHA)
    assert torch.equal(layer.lora_embedding_A, twin.lora_embedding_A["default"])
    assert layer.lora_embedding_A.count_nonzero() == 0
    assert 0.8 < layer.lora_embedding_B.std() < 1.2 and layer.lora_embedding_B.mean().abs() < 0.3
    if use_dora:
        oracle = embedding.weight.double().norm(dim=0)
        theirs = twin.lora_magnitude_vector["default"].weight
        assert_within_policy("magnitude", layer.lora_magnitude_vector, theirs, oracle)
    x = indices()
    assert torch.equal(layer(x), embedding(x))
    assert layer.weight is embedding.weight
    assert not embedding.weight.requires_grad and layer.padding_idx == 1


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0, 3), (2, 3, 4)], ids=str)
def test_leading_dimensions(shape, dtype):
    layer = make(use_dora=True)
    x = torch.randint(NUM, shape, dtype=dtype)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (*shape, DIM)
    assert_within_policy("y", y, peft_twin(layer)(x), peft_twin(layer).double()(x))


def test_copies_are_their_own():
    layer = make(use_dora=True)
    x = indices()
    layer.merge()
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)
        other.load_state_dict(make(use_dora=True).state_dict())
        assert not torch.equal(other(x), expected) and torch.equal(layer(x), expected)


def test_meta_device_touches_no_data():
    layer = LoRAEmbedding(NUM, DIM, RANK, ALPHA, use_dora=True, device="meta")
    assert all(p.is_meta for p in layer.parameters())
    assert layer(torch.zeros(3, dtype=torch.int64, device="meta")).shape == (3, DIM)
    with pytest.raises(RuntimeError, match="merge: the layer is on the meta device"):
        layer.merge()
    filled = make(use_dora=True)
    layer.load_state_dict(filled.state_dict(), assign=True)
    x = indices()
    assert torch.equal(layer(x), filled(x))


def test_merging_under_max_norm_warns():
    layer = make(max_norm=1.0)
    with pytest.warns(UserWarning, match="merge: the base layer has max_norm"):
        layer.merge()
    assert layer.merged


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_compiles_once_for_twelve_scalings_and_shapes(use_dora):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = make(use_dora=use_dora)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    frames = []  # Dynamo may analyse a frame twice before its first run
    for step in range(12):
        layer.scaling = 0.5 + step
        x = torch.randint(NUM, (2, 4 + step))
        y = compiled(x)
        y.sum().backward()
        assert_within_policy("y", y, layer(x), copy.deepcopy(layer).double()(x))
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 12


def test_repr_says_what_it_is():
    layer = make(use_dora=True)
    assert repr(layer).splitlines()[1].strip() == (
        f"num_embeddings={NUM}, embedding_dim={DIM}, rank={RANK}, alpha={ALPHA}, use_dora"
    )
