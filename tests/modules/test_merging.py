"""merge() rounds once and unmerge() gives the frozen bits back, whatever happens in between."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels.adapters.factors import LoRAFactors
from lora_kernels.base_weights import DenseWeight, dense
from lora_kernels.nn import LoRAEmbedding, LoRALinear
from lora_kernels.nn.merging import merged_weight
from lora_kernels.testing import assert_within_policy

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "embedding": {"embedding": True},
    "embedding_dora": {"embedding": True, "use_dora": True},
}


def make(dtype=torch.float32, embedding=False, **options):
    """A layer of 31 inputs (or indices) and 22 outputs with a random adapter."""
    kind = LoRAEmbedding if embedding else LoRALinear
    layer = kind(31, 22, 3, 5, init_lora_weights=False, dtype=dtype, **options)
    if layer.use_dora:
        with torch.no_grad():
            layer.lora_magnitude_vector *= 1 + 0.3 * torch.randn(22)
    return layer


def draw_input(layer, tokens=40):
    if isinstance(layer, LoRAEmbedding):
        return torch.randint(31, (tokens,))
    return torch.randn(tokens, 31, dtype=layer.weight.dtype)


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8).clone()


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


@settings(deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(1, 9),
    block=st.integers(1, 400),
    dtype=st.sampled_from(DTYPES),
    adapter_dtype=st.sampled_from(DTYPES),
    column_major=st.booleans(),
    scaled=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_merged_weight_is_rounded_once(
    rows, columns, rank, block, dtype, adapter_dtype, column_major, scaled, seed
):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight = draw(rows, columns).to(dtype)
    if column_major:
        weight = weight.t().contiguous().t()
    lora_a, lora_b = draw(rank, columns).to(adapter_dtype), draw(rows, rank).to(adapter_dtype)
    scaling = torch.tensor(0.7, dtype=torch.float64)
    output_scale = 1 + 0.3 * draw(rows).float() if scaled else None

    def formula(precision):
        result = weight.to(precision) + scaling * (lora_b.to(precision) @ lora_a.to(precision))
        return result if output_scale is None else output_scale.to(precision)[:, None] * result

    frozen = bits(weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "_CPU_BLOCK", block)
        factors = LoRAFactors(lora_a, lora_b, scaling, output_scale)
        (merged,) = merged_weight(DenseWeight(weight), factors).tensors()
    assert merged.dtype == dtype and merged.stride() == torch.empty_like(weight).stride()
    assert torch.equal(bits(weight), frozen)
    exact = formula(torch.float64)
    rounding = (exact.to(dtype).double() - exact).abs()  # half a unit in the last place, at most
    # Of the sum of R + 1 terms before it, element by element: where they cancel, eager's own
    # error in one draw says nothing (Higham, "Accuracy and Stability", section 3.1).
    terms = weight.double().abs() + scaling * (lora_b.double().abs() @ lora_a.double().abs())
    terms = terms if output_scale is None else output_scale.double().abs()[:, None] * terms
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    summing = (rank + 3) * torch.finfo(wide).eps * terms
    assert ((merged.double() - exact).abs() <= rounding + summing).all()


@pytest.mark.parametrize("kind", ["lora", "dora", "embedding", "embedding_dora"])
def test_no_wide_copy_of_the_weight_is_made(monkeypatch, kind):
    class LargestWide(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                    owned = tensor.untyped_storage().nbytes() // 4
                    self.elements = max(self.elements, owned)
            return out

    layer = make(torch.bfloat16, **KINDS[kind])
    monkeypatch.setattr(dense, "_CPU_BLOCK", 150)
    with LargestWide() as wide:
        layer.merge()
    assert 0 < wide.elements <= 150 < layer.weight.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_merged_layer_computes_the_same(kind, dtype):
    layer = make(dtype, **kind)
    x = draw_input(layer)
    wide = copy.deepcopy(layer).double()
    oracle = wide(x.double() if x.is_floating_point() else x)
    wide.merge()

    def plain(weight, bias):
        if isinstance(layer, LoRAEmbedding):
            return F.embedding(x, weight)
        return F.linear(x, weight, bias)

    bias = getattr(wide, "bias", None)
    eager = plain(wide.weight.to(dtype), bias if bias is None else bias.to(dtype))
    layer.merge()
    assert_within_policy("y", layer(x), eager, oracle)
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("keep", ["device", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_unmerge_puts_the_frozen_parameters_back(kind, dtype, keep):
    layer = make(dtype, **kind)
    x = draw_input(layer)
    before = {name: (p, bits(p)) for name, p in layer.named_parameters()}
    y = layer(x)
    layer.merge(keep)
    assert layer.merged and not same_bits(layer.weight, before["base_layer.weight"][0])
    layer.merge(keep)  # merging what is merged changes nothing
    merged = bits(layer.weight)
    layer.unmerge()
    layer.unmerge()
    assert not layer.merged
    after = dict(layer.named_parameters())
    assert list(after) == list(before)
    for name, (parameter, data) in before.items():
        assert after[name] is parameter and torch.equal(bits(parameter), data), name
    assert same_bits(layer(x), y)
    layer.merge(keep)
    assert torch.equal(bits(layer.weight), merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["lora", "lora_bias", "dora", "embedding", "embedding_dora"])
def test_a_thousand_merges_and_switches_leave_the_same_bits(kind, dtype):
    kind = KINDS[kind]
    layer = make(dtype, **kind)
    adapters = {"mine": copy.deepcopy(layer.state_dict())}
    adapters |= {name: make(dtype, **kind).adapter_state_dict() for name in ("a", "b")}
    adapters["mine"] = {k: t for k, t in adapters["mine"].items() if "base_layer" not in k}
    frozen = {name: bits(p) for name, p in layer.base_layer.named_parameters()}
    x = draw_input(layer, 3)
    expected = {}
    order = torch.randint(6, (1000,)).tolist()
    for step, choice in enumerate(order):
        name, keep = ("mine", "a", "b")[choice % 3], ("device", "cpu")[choice // 3]
        layer.load_adapter(adapters[name])  # unmerges
        seen = [bits(layer(x))]
        layer.merge(keep)
        seen += [bits(layer(x)), bits(layer.weight)]
        if step % 2:
            layer.unmerge()
            assert torch.equal(bits(layer(x)), seen[0])
        expected.setdefault(name, seen)
        assert all(torch.equal(a, b) for a, b in zip(seen, expected[name], strict=True))
    layer.unmerge()
    for name, parameter in layer.base_layer.named_parameters():
        assert torch.equal(bits(parameter), frozen[name])
    assert len(expected) == 3
    assert len({tuple(seen[2].flatten().tolist()) for seen in expected.values()}) == 3


@pytest.mark.parametrize("kind", ["lora", "embedding"])
def test_without_the_frozen_weight_unmerge_says_so(kind):
    layer = make(**KINDS[kind])
    x = draw_input(layer)
    y = layer(x)
    frozen = layer.weight
    layer.merge("none")
    assert layer.weight is not frozen and layer._merge.original == {}
    for call in (
        layer.unmerge,
        lambda: layer.load_adapter(layer.adapter_state_dict()),
        layer.reset_lora_parameters,
    ):
        with pytest.raises(RuntimeError, match=r"unmerge: the frozen weight was not kept by merge"):
            call()
    layer.disable_adapters = True
    with pytest.raises(RuntimeError, match="not kept"):
        layer(x)
    layer.disable_adapters = False
    assert_within_policy("y", layer(x), y, copy.deepcopy(layer).double()(
        x.double() if x.is_floating_point() else x
    ))  # fmt: skip


def test_merging_does_not_write_to_shared_weights():
    embedding = nn.Embedding(31, 22)
    head = nn.Linear(22, 31, bias=False)
    head.weight = embedding.weight
    frozen = bits(head.weight)
    layers = (
        LoRAEmbedding.from_embedding(embedding, 3, init_lora_weights=False),
        LoRALinear.from_linear(head, 3, init_lora_weights=False),
    )
    for layer in layers:
        layer.merge()
    assert not torch.equal(layers[0].weight, layers[1].weight)
    for layer in layers:
        layer.unmerge()
    assert head.weight is embedding.weight and torch.equal(bits(head.weight), frozen)


@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding])
def test_layers_around_one_base_layer_do_not_meet(kind):
    base = kind(31, 22)
    wrap = LoRALinear.from_linear if kind is nn.Linear else LoRAEmbedding.from_embedding
    first, second = (wrap(base, 3, init_lora_weights=False) for _ in range(2))
    x = draw_input(first)
    expected = [bits(module(x)) for module in (base, second)]
    first.merge("none")
    assert [torch.equal(bits(m(x)), e) for m, e in zip((base, second), expected, strict=True)]
    assert first.weight is not base.weight and second.weight is base.weight


def test_hooks_of_an_embedding_still_run():
    embedding = nn.Embedding(31, 22)
    embedding.register_forward_hook(lambda module, args, y: y + 1)
    layer = LoRAEmbedding.from_embedding(embedding, 3)
    x = draw_input(layer)
    assert same_bits(layer(x), embedding.weight[x] + 1)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_no_gradient_reaches_a_merged_adapter(kind):
    layer = make(**KINDS[kind])
    layer.merge()
    x = draw_input(layer).requires_grad_()
    layer(x).sum().backward()
    assert all(p.grad is None for p in layer.parameters())
    (of_merged_weight,) = torch.autograd.grad(F.linear(x, layer.weight, layer.bias).sum(), x)
    assert torch.equal(x.grad, of_merged_weight)
    layer.unmerge()
    layer(x).sum().backward()
    assert layer.lora_A.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["lora", "embedding"])
def test_disabled_adapters_leave_the_base_layer(kind):
    layer = make(**KINDS[kind])
    x = draw_input(layer)
    y, base = layer(x), layer.base_layer(x)
    for merged in (False, True):
        if merged:
            layer.merge()
        layer.disable_adapters = True
        assert same_bits(layer(x), base) and not layer.merged
        layer.disable_adapters = False
        assert same_bits(layer(x), y) and not same_bits(y, base)


def test_a_bias_has_to_have_a_place():
    layer = make(lora_bias=True, bias=False)
    with pytest.raises(RuntimeError, match=r"merge: the adapter has a bias \(lora_bias=True\)"):
        layer.merge()
    assert not layer.merged


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 3e38])
def test_a_broken_adapter_is_not_merged(broken):
    layer = make(torch.bfloat16)
    frozen = layer.weight
    with torch.no_grad():
        layer.lora_B.weight[3, 1] = broken
        layer.lora_A.weight[1] = 4
    with pytest.raises(ValueError, match=r"merge: the merged weight is not finite in .*bfloat16"):
        layer.merge("none")
    assert layer.weight is frozen and not layer.merged


def test_merging_under_inference_mode_leaves_a_trainable_layer():
    layer = make(lora_bias=True)
    with torch.inference_mode():
        layer.merge()
    x = draw_input(layer).requires_grad_()
    layer(x).sum().backward()
    layer.unmerge()
    layer(x).sum().backward()


def test_merging_ignores_autocast():
    layer, other = make(use_dora=True), make(use_dora=True)
    other.load_state_dict(layer.state_dict())
    layer.merge()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other.merge()
    assert same_bits(layer.weight, other.weight)


@pytest.mark.parametrize("keep", ["device", "cpu"])
def test_what_is_kept_follows_the_dtype(keep):
    layer = make(lora_bias=True)
    expected = copy.deepcopy(layer).to(torch.bfloat16)
    layer.merge(keep)
    kept = layer._merge.original["weight"]
    assert layer.to(torch.float32)._merge.original["weight"] is kept  # nothing to do, nothing done
    layer.to(torch.bfloat16)
    assert layer.merged and layer.weight.dtype == torch.bfloat16
    layer.unmerge()
    for name, parameter in layer.named_parameters():
        assert same_bits(parameter, expected.get_parameter(name)), name


def test_a_trained_base_bias_stays_the_optimizers():
    layer = make(lora_bias=True)
    bias = layer.base_layer.bias.requires_grad_(True)
    layer.merge()
    layer.unmerge()
    assert layer.bias is bias and bias.requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_keeping_on_the_cpu_frees_the_device():
    layer = LoRALinear(2048, 2048, 4, 8, init_lora_weights=False, device="cuda")
    frozen, size = bits(layer.weight), layer.weight.nbytes
    before = torch.cuda.memory_allocated()
    layer.merge("cpu")
    assert layer._merge.original["weight"].device.type == "cpu"
    assert torch.cuda.memory_allocated() - before < size // 2
    layer.unmerge()
    assert layer.weight.is_cuda and torch.equal(bits(layer.weight), frozen)
    layer.merge("cpu")
    layer.cpu()
    layer.unmerge()
    assert torch.equal(bits(layer.weight), frozen.cpu())
