"""LoRALinear against PEFT's layer, and as torch's module machinery sees it."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_kernels.nn import LoRALinear
from lora_kernels.runtime.dropout import draw_seed, keep_mask, keep_scale
from lora_kernels.testing import (
    assert_draws_within_policy,
    assert_within_policy,
    redrawn,
    redrawn_model,
)

from peft_layers import LoraConfig, Linear, assert_parity, peft_twin  # isort: skip

pytestmark = pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed")

IN, OUT, RANK, ALPHA = 37, 53, 5, 11

VARIANTS = {
    "plain": {},
    "no_base_bias": {"bias": False},
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "lora_bias_alone": {"lora_bias": True, "bias": False},
    "dora": {"use_dora": True},
    "dora_rslora_no_bias": {"use_dora": True, "use_rslora": True, "bias": False},
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


def make(dtype=torch.float32, **options) -> LoRALinear:
    """A layer whose adapter is not zero, not even its bias and its magnitude."""
    options = {"init_lora_weights": False, **options}
    layer = LoRALinear(IN, OUT, RANK, ALPHA, dtype=dtype, **options)
    if layer.use_dora:
        with torch.no_grad():
            layer.lora_magnitude_vector *= 1 + 0.3 * torch.randn(OUT)
    return layer


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_forward_and_backward_are_pefts(variant, precision):
    dtype, adapter_dtype, autocast = precision
    layer = make(dtype, adapter_dtype=adapter_dtype, **variant)
    x, dy = torch.randn(3, 17, IN, dtype=dtype), torch.randn(3, 17, OUT, dtype=dtype)
    assert_parity(layer, x, dy, autocast)


class FixedMask(nn.Module):
    """Stands in for PEFT's dropout layer with the mask of our generator."""

    def __init__(self, seed, p, rows, columns):
        super().__init__()
        self.register_buffer("mask", keep_mask(seed, p, rows, columns))
        self.scale = keep_scale(p)

    def forward(self, x):
        return torch.where(self.mask.view(x.shape), x * self.scale, 0)


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("lora_bias", [False, True])
def test_dropout_is_pefts_with_our_mask(precision, lora_bias):
    dtype, adapter_dtype, autocast = precision
    layer = make(dtype, adapter_dtype=adapter_dtype, dropout_p=0.4, lora_bias=lora_bias)
    twin = peft_twin(layer)
    torch.manual_seed(3)
    twin.lora_dropout["default"] = FixedMask(draw_seed(torch.device("cpu")), 0.4, 51, IN)
    torch.manual_seed(3)
    x, dy = torch.randn(3, 17, IN).to(dtype), torch.randn(3, 17, OUT).to(dtype)
    torch.manual_seed(3)
    assert_parity(layer, x, dy, autocast, twin)


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_dora_with_dropout_is_pefts(monkeypatch, precision, bias):
    """PEFT applies the base layer to D(x) as well; one mask of torch's dropout for all runs."""
    dtype, adapter_dtype, autocast = precision
    layer = make(dtype, adapter_dtype=adapter_dtype, dropout_p=0.4, use_dora=True, bias=bias)
    keep = torch.rand(3, 17, IN) >= 0.4

    def dropout(x, p=0.5, training=True, inplace=False):
        assert p == 0.4
        return torch.where(keep, x / (1 - p), 0) if training else x

    monkeypatch.setattr(F, "dropout", dropout)
    x, dy = torch.randn(3, 17, IN, dtype=dtype), torch.randn(3, 17, OUT, dtype=dtype)
    assert_parity(layer, x, dy, autocast)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_dropout_follows_the_training_mode(use_dora):
    layer = make(dropout_p=0.5, use_dora=use_dora)
    still = make(use_dora=use_dora)
    still.load_state_dict(layer.state_dict())
    x = torch.randn(6, IN)
    assert not torch.equal(layer(x), layer(x))
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(first, layer(x))
    assert torch.equal(layer.eval()(x), still(x))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_ten_steps_of_sgd_end_where_pefts_end(variant):
    layer = make(dropout_p=0.0, **{**variant, "init_lora_weights": True})
    data = [(torch.randn(9, IN), torch.randn(9, OUT)) for _ in range(10)]

    def train(module, dtype, number):
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        for step, pair in enumerate(data):
            x, target = (redrawn(tensor, number, str(step)).to(dtype) for tensor in pair)
            optimizer.zero_grad()
            F.mse_loss(module(x), target).backward()
            optimizer.step()
        return module

    def draw(number):
        start = redrawn_model(copy.deepcopy(layer), number)
        twin = peft_twin(start)
        wide = train(copy.deepcopy(twin).double(), torch.float64, number).state_dict()
        ours = train(start, torch.float32, number).peft_state_dict()
        assert ours["lora_B.default.weight"].count_nonzero() > 0
        return ours, train(twin, torch.float32, number).state_dict(), wide

    assert_draws_within_policy(draw)


@pytest.mark.parametrize("frozen", ["x", "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"])
def test_gradients_only_where_they_are_wanted(frozen):
    layer = make(use_dora=True)
    x = torch.randn(4, IN, requires_grad=frozen != "x")
    if frozen != "x":
        layer.get_parameter(frozen).requires_grad_(False)
    layer(x).square().sum().backward()
    found = {name for name, p in layer.named_parameters() if p.grad is not None}
    wanted = {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"} - {frozen}
    assert found == wanted
    assert (x.grad is None) == (frozen == "x")


def test_a_trained_base_bias_gets_its_gradient():
    layer = make(lora_bias=True)
    layer.base_layer.bias.requires_grad_(True)
    x, dy = torch.randn(70, IN), torch.randn(70, OUT)
    twin = peft_twin(layer)
    twin.base_layer.bias.requires_grad_(True)
    assert_parity(layer, x, dy, twin=twin)


@pytest.mark.parametrize("shape", [(IN,), (0, IN), (2, 0, IN), (2, 3, 4, IN)], ids=str)
def test_leading_dimensions(shape):
    layer = make(use_dora=True, dropout_p=0.2)
    for mode in (True, False):
        y = layer.train(mode)(torch.randn(shape))
        assert y.shape == (*shape[:-1], OUT) and torch.isfinite(y).all()
    x = torch.randn(shape)
    twin = peft_twin(layer)
    eager = twin(x).view(y.shape)  # PEFT's DoRA gives a vector a dimension
    oracle = twin.double()(x.double()).view(y.shape)
    assert_within_policy("y", layer(x), eager, oracle)


NEW = {f"{name}-True": (variant, True) for name, variant in VARIANTS.items()} | {
    f"{name}-gaussian": (variant, "gaussian")
    for name, variant in VARIANTS.items()
    if "lora_bias" not in variant
}


@pytest.mark.parametrize(("variant", "init_lora_weights"), NEW.values(), ids=NEW)
def test_a_new_adapter_changes_nothing_and_is_drawn_as_pefts(variant, init_lora_weights):
    linear = nn.Linear(IN, OUT, bias=variant.get("bias", True))
    options = {key: value for key, value in variant.items() if key != "bias"}
    twin_base = copy.deepcopy(linear)
    torch.manual_seed(4)
    layer = LoRALinear.from_linear(
        linear, RANK, ALPHA, init_lora_weights=init_lora_weights, **options
    )
    torch.manual_seed(4)
    config = LoraConfig(init_lora_weights=init_lora_weights, **options)
    twin = Linear(twin_base, "default", config, r=RANK, lora_alpha=ALPHA)
    theirs = twin.state_dict()
    for name, ours in layer.peft_state_dict().items():
        if "magnitude" in name:
            oracle = linear.weight.double().norm(dim=1)
            assert_within_policy(name, ours, theirs[name], oracle)
        else:
            assert torch.equal(ours, theirs[name]), name
    assert float(layer.scaling) == twin.scaling["default"]
    x = torch.randn(8, IN)
    assert torch.equal(layer(x), linear(x))


def test_a_random_adapter_is_drawn_like_torchs_layers():
    """init_lora_weights=False: uniform within 1 / sqrt(fan_in), both of them."""
    layer = LoRALinear(400, 300, 100, 1, init_lora_weights=False, lora_bias=True)
    for parameter, fan_in in (
        (layer.lora_A.weight, 400),
        (layer.lora_B.weight, 100),
        (layer.lora_B.bias, 100),
    ):
        largest = parameter.abs().max().item() * fan_in**0.5
        assert 0.95 < largest <= 1 and abs(parameter.mean().item()) * fan_in**0.5 < 0.1


def test_from_linear_shares_and_freezes():
    linear = nn.Linear(IN, OUT, dtype=torch.bfloat16).eval()
    weight = linear.weight
    layer = LoRALinear.from_linear(linear)
    assert layer.weight is weight and layer.bias is linear.bias and not weight.requires_grad
    assert (layer.rank, layer.alpha, float(layer.scaling)) == (16, 32, 2.0)
    assert not layer.training
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {
        "lora_A.weight",
        "lora_B.weight",
    }
    assert layer.lora_A.weight.dtype == layer.lora_B.weight.dtype == torch.float32
    layer(torch.randn(3, IN, dtype=torch.bfloat16)).sum().backward()
    assert weight.grad is None and layer.lora_B.weight.grad.dtype == torch.float32


def test_repr_says_what_it_is():
    layer = make(dropout_p=0.1, use_dora=True, use_rslora=True)
    first_line = repr(layer).splitlines()[1].strip()
    assert first_line == (
        f"in_features={IN}, out_features={OUT}, rank={RANK}, alpha={ALPHA}, dropout_p=0.1, "
        "use_rslora, use_dora"
    )
    layer.merge()
    assert "merged" in repr(layer)


@pytest.mark.parametrize("merged", [False, True])
def test_copies_are_their_own(merged):
    layer = make(torch.bfloat16, use_dora=True)
    x = torch.randn(4, IN, dtype=torch.bfloat16)
    frozen = layer.weight.clone()
    if merged:
        layer.merge()
    expected = layer(x)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(saved, weights_only=False),
    ):
        assert torch.equal(other(x), expected)
        other.unmerge()
        assert torch.equal(other.weight, frozen)
        other.load_state_dict(make(torch.bfloat16, use_dora=True).state_dict())
        assert not torch.equal(other(x), expected)
        assert torch.equal(layer(x), expected)


def test_another_dtype():
    layer = make(dropout_p=0.2).eval()
    x = torch.randn(4, IN)
    wide = copy.deepcopy(layer).double()
    assert wide.scaling.dtype == torch.float64 and wide(x.double()).dtype == torch.float64
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(layer).to(dtype)
        assert float(half.scaling) == ALPHA / RANK  # not rounded with the parameters
        twin = peft_twin(layer).to(dtype)
        oracle = copy.deepcopy(twin).double()(x.to(dtype).double())
        assert_within_policy("y", half(x.to(dtype)), twin(x.to(dtype)), oracle)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_meta_device_touches_no_data(use_dora):
    with torch.device("meta"):
        linear = nn.Linear(IN, OUT, dtype=torch.bfloat16)
        layer = LoRALinear.from_linear(linear, RANK, ALPHA, use_dora=use_dora)
    assert all(p.is_meta for p in layer.parameters())
    assert layer(torch.randn(3, IN, dtype=torch.bfloat16, device="meta")).shape == (3, OUT)

    filled = make(torch.bfloat16, use_dora=use_dora)
    layer.load_state_dict(filled.state_dict(), assign=True)
    x = torch.randn(3, IN, dtype=torch.bfloat16)
    assert torch.equal(layer(x), filled(x))

    empty = LoRALinear(IN, OUT, RANK, ALPHA, use_dora=use_dora, device="meta")
    empty.to_empty(device="cpu")
    empty.base_layer.reset_parameters()
    empty.reset_lora_parameters()
    assert torch.equal(empty(x.float()), empty.base_layer(x.float()))


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_fake_tensors_see_no_host_read(use_dora):
    """A value read back to the host raises under FakeTensorMode."""
    with FakeTensorMode():
        layer = LoRALinear(IN, OUT, RANK, ALPHA, use_dora=use_dora, dropout_p=0.1)
        x = torch.randn(3, IN, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == (3, OUT) and x.grad.shape == x.shape


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_once_for_twelve_scalings_and_shapes(use_dora, backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    layer = make(use_dora=use_dora, dropout_p=0.3)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    frames = []  # Dynamo may analyse a frame twice before its first run
    for step in range(12):
        layer.scaling = 0.5 + step
        x = torch.randn(4 + step, IN, requires_grad=True)
        compiled(x).sum().backward()
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 12
    layer.eval()
    x = torch.randn(7, IN)
    expected = layer(x)
    assert_within_policy("y", compiled(x), expected, copy.deepcopy(layer).double()(x.double()))


def test_one_compilation_serves_layers_of_one_shape():
    """Several layers with their own scalings must not run into the recompile limit."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = nn.Sequential(*(LoRALinear(IN, IN, RANK, alpha) for alpha in range(1, 13)))
    forward = torch.compile(lambda layer, x: layer(x), fullgraph=True, backend=counter)
    frames = []
    for layer in model:
        forward(layer, torch.randn(3, IN)).sum().backward()
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 12


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_checkpointing_replays_the_mask(use_dora, use_reentrant):
    layer = make(dropout_p=0.5, use_dora=use_dora)
    x = torch.randn(6, IN, requires_grad=True)

    def run(wrap):
        torch.manual_seed(5)
        y = wrap(layer, x)
        inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
        y.square().sum().backward()
        gradients = [p.grad.clone() for p in inputs]
        for p in inputs:
            p.grad = None
        return [y, *gradients]

    plain = run(lambda module, x: module(x))
    replayed = run(lambda module, x: checkpoint(module, x, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, replayed, strict=True))


def test_a_dead_row_under_dora_stays_dead_and_finite():
    """PEFT divides zero by zero for a row of zeros; here the row's output is its bias."""
    linear = nn.Linear(IN, OUT)
    with torch.no_grad():
        linear.weight[3] = 0
    layer = LoRALinear.from_linear(linear, RANK, ALPHA, use_dora=True)
    x = torch.randn(4, IN, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y[:, 3], linear.bias[3].expand(4))
    for tensor in (y, x.grad, layer.lora_A.weight.grad, layer.lora_magnitude_vector.grad):
        assert torch.isfinite(tensor).all()


def test_a_scaling_on_the_device_is_read_when_it_is_used():
    layer = make()
    scaling = torch.tensor(2.0)
    layer.scaling = scaling
    x = torch.randn(4, IN)
    first = layer(x)
    scaling.fill_(0.0)
    assert torch.equal(layer(x), layer.base_layer(x)) and not torch.equal(first, layer(x))


def test_a_number_set_as_scaling_under_inference_mode_can_be_trained_with():
    layer = make(init_lora_weights=False)
    x = torch.randn(4, IN)
    with torch.inference_mode():
        layer.scaling = 2.0
    y = layer(x)
    y.sum().backward()
    adapter = layer.lora_B(layer.lora_A(x))
    torch.testing.assert_close(y, layer.base_layer(x) + 2.0 * adapter)
    assert layer.lora_A.weight.grad.abs().sum() > 0
