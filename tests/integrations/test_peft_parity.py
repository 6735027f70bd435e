"""An accelerated model computes PEFT's values, gradients and training, by the error policy."""

import copy

import peft
import pytest
import torch
from peft_models import (
    LAYERS,
    Net,
    Parallel,
    accelerated,
    assert_parity,
    build,
    gradients,
    inputs,
    lora_config,
    lora_layers,
    randomise,
    with_defined_dropout,
)
from torch import Tensor, nn

import lora_kernels
from lora_kernels.testing import assert_as_accurate, redrawn, redrawn_model

# PEFT flips fan_in_fan_out with a warning where linears and Conv1D share a config.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*lora_bias=True")

CONFIGS = {
    "rank 1": [lora_config(r=1)],
    "rank 3": [lora_config(r=3, lora_alpha=1)],
    "rank 16": [lora_config(r=16, lora_alpha=32)],
    "rank above the dimensions": [lora_config(r=40)],
    "rslora": [lora_config(r=16, use_rslora=True)],
    "bias all": [lora_config(bias="all")],
    "bias lora_only": [lora_config(bias="lora_only")],
    "lora_bias": [lora_config(lora_bias=True, target_modules=["up", "gate"])],
    "lora_bias over a base without bias": [lora_config(lora_bias=True)],
    "patterns": [lora_config(rank_pattern={"gate": 5}, alpha_pattern={"down": 2.5})],
    "pissa": [lora_config(init_lora_weights="pissa")],
    "olora": [lora_config(init_lora_weights="olora", target_modules=["up", "down"])],
    "orthogonal": [lora_config(r=4, init_lora_weights="orthogonal")],
    "gaussian": [lora_config(init_lora_weights="gaussian")],
    "modules_to_save": [lora_config(modules_to_save=["head"])],
    "dora": [lora_config(use_dora=True)],
    "dora with bias all": [lora_config(use_dora=True, bias="all")],
    "dora with dropout": [lora_config(use_dora=True, lora_dropout=0.25)],
    "dropout": [lora_config(lora_dropout=0.25)],
    "dropout and lora_bias": [lora_config(lora_dropout=0.1, lora_bias=True)],
    "two adapters": [lora_config(r=2), lora_config(r=5, lora_alpha=3)],
    "three adapters, one elsewhere": [
        lora_config(r=2, lora_bias=True),
        lora_config(r=5, target_modules=["down"]),
        lora_config(r=3, use_rslora=True, lora_bias=True),
    ],
    "two adapters, one with dropout": [lora_config(lora_dropout=0.25), lora_config(r=5)],
    "three adapters, all with dropout": [
        lora_config(lora_dropout=0.25, lora_bias=True),
        lora_config(lora_dropout=0.5, r=5),
        lora_config(lora_dropout=0.125, r=1),
    ],
    "dora after plain": [lora_config(r=2, bias="all"), lora_config(use_dora=True)],
    "dora before plain": [lora_config(use_dora=True), lora_config(r=2, lora_dropout=0.25)],
    "dora between plain": [lora_config(r=2), lora_config(use_dora=True), lora_config(r=5)],
    "two doras": [lora_config(use_dora=True), lora_config(r=5, use_dora=True)],
    "two doras, one with dropout": [
        lora_config(r=2),
        lora_config(use_dora=True, lora_dropout=0.25),
        lora_config(use_dora=True, r=2),
    ],
}

cases = pytest.mark.parametrize("configs", CONFIGS.values(), ids=CONFIGS.keys())


@cases
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_output_and_gradients(configs, mode):
    plain = build(*configs).train(mode == "train")
    x = inputs(2, 14)
    assert_parity(accelerated(plain), with_defined_dropout(plain), x)


@pytest.mark.parametrize("name", [name for name in CONFIGS if "adapters" in name])
def test_joined_adapters_are_as_accurate(name):
    plain = with_defined_dropout(build(*CONFIGS[name], base=Parallel).train())
    fast = accelerated(build(*CONFIGS[name], base=Parallel).train())

    def draw(number: int) -> tuple[dict[str, Tensor], ...]:
        x = redrawn(inputs(40).detach(), number).requires_grad_()
        ours, theirs = redrawn_model(fast, number), redrawn_model(plain, number)
        exact = gradients(copy.deepcopy(theirs).double(), x.detach().double().requires_grad_())
        results = gradients(ours, x), gradients(theirs, x), exact
        # The gradient of a bias is a few sums, torch's own.
        return tuple({n: t for n, t in each.items() if "bias" not in n} for each in results)

    assert_as_accurate(draw)


@cases
def test_ten_steps_of_sgd_reach_the_same_parameters(configs):
    """Of a size at which no loss rises: where it does, each step multiplies what was rounded."""
    plain = build(*configs).train()

    def train(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        model = copy.deepcopy(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.001)
        torch.manual_seed(5)
        for step in range(10):
            optimizer.zero_grad()
            y = model(x.roll(step, dims=0))
            (y.square() + y.sin()).mean().backward()
            optimizer.step()
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    assert_parity(accelerated(plain), with_defined_dropout(plain), inputs(11), train)


@pytest.mark.parametrize("name", ["dropout", "dora with dropout", "two doras, one with dropout"])
@pytest.mark.parametrize("in_training", ["layer", "dropout"])
def test_modes_that_differ_between_a_layer_and_its_dropout(name, in_training):
    """PEFT's DoRA asks the layer whether to drop, and the dropout how; LoRA asks the dropout."""
    plain = build(*CONFIGS[name])
    for layer in lora_layers(plain).values():
        layer.training = in_training == "layer"
        for dropout in layer.lora_dropout.values():
            dropout.train(in_training == "dropout")
    assert_parity(accelerated(plain), with_defined_dropout(plain), inputs(9))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 1, 4)], ids=str)
@pytest.mark.parametrize(
    "config", [lora_config(), lora_config(use_dora=True)], ids=["lora", "dora"]
)
def test_leading_dimensions(shape, config):
    plain = build(config, lora_config(r=2))
    # transformers' Conv1D takes at least two dimensions.
    assert_parity(accelerated(plain), plain, inputs(*shape) if shape else inputs(1)[0][None])


def test_input_strides():
    class Transposed(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model.base_model.model.up

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x.transpose(0, 1)[:, ::2])

    plain = build(lora_config())
    assert_parity(Transposed(accelerated(plain)), Transposed(plain), inputs(6, 5))


@pytest.mark.parametrize(
    "configs",
    [CONFIGS[name] for name in ("rank 3", "lora_bias", "dora", "two adapters", "dora after plain")],
    ids=["lora", "lora_bias", "dora", "two", "dora after plain"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_adapters_in_the_dtype_of_the_base(configs, dtype):
    plain = build(*configs, base=Parallel).to(dtype)
    assert_parity(accelerated(plain), plain, inputs(200, dtype=dtype))


@pytest.mark.parametrize("scale", [0.5, 3], ids=["half", "triple"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_tensor_scaling(scale, dora):
    # Side by side: thrice the scaling saturates tanh, which multiplies the roundings before it.
    plain = build(lora_config(use_dora=dora), lora_config(r=2), base=Parallel)
    for layer in lora_layers(plain).values():
        layer.scaling = {name: torch.tensor(value * scale) for name, value in layer.scaling.items()}
    assert_parity(accelerated(plain), plain, inputs(9))


@pytest.mark.parametrize("frozen", ["x", "lora_A", "lora_B", "lora_magnitude_vector"])
def test_partial_gradients(frozen):
    plain = build(lora_config(use_dora=True))
    for name, parameter in plain.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
    x = inputs(9).requires_grad_(frozen != "x")
    assert_parity(accelerated(plain), plain, x)


def test_weighted_adapters():
    plain = build(lora_config(), lora_config(r=3))
    for combination in ("linear", "cat", "svd"):
        plain.add_weighted_adapter(
            ["one", "two"], [0.7, -0.4], combination, combination_type=combination
        )
        plain.set_adapter(combination)
        assert_parity(accelerated(plain), plain, inputs(9))


def test_embedding_tied_to_the_head():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(17, 23)
            self.head = nn.Linear(23, 17, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x.argmax(-1) % 17))

    torch.manual_seed(0)
    plain = peft.get_peft_model(Tied(), lora_config(target_modules=["head"]))
    randomise(plain)
    assert_parity(accelerated(plain), plain, inputs(9).detach())


def test_result_can_be_changed_in_place():
    plain = build(lora_config()).base_model.model.up

    def compute(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        return gradients(nn.Sequential(model, nn.ReLU(inplace=True)), x)

    fast = accelerated(build(lora_config())).base_model.model.up
    assert_parity(fast, plain, inputs(2, 9), compute)


# --- half-precision bases and autocast -------------------------------------------------------


def under_autocast(dtype: torch.dtype):
    def compute(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        enabled = x.dtype != torch.float64
        with torch.autocast("cpu", dtype, enabled=enabled):
            return gradients(model, x)

    return compute


AUTOCAST_CONFIGS = ["rank 3", "lora_bias", "dora", "dora with dropout", "dropout", "two adapters"]


@pytest.mark.parametrize("name", [*AUTOCAST_CONFIGS, "dora after plain"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast(name, base, x_dtype):
    plain = build(*CONFIGS[name], base=Parallel, dtype=base)
    for parameter_name, parameter in plain.named_parameters():
        if "lora_" in parameter_name:
            assert parameter.dtype == torch.float32
    x = inputs(200, dtype=x_dtype)
    compute = under_autocast(torch.bfloat16)
    assert_parity(accelerated(plain), with_defined_dropout(plain), x, compute)


@pytest.mark.parametrize(
    "name", ["rank 3", "lora_bias", "dora", "two adapters", "dora between plain"]
)
def test_fp32_adapters_over_a_half_base_match_peft_under_autocast(name):
    plain = build(*CONFIGS[name], base=Parallel, dtype=torch.bfloat16)
    model = copy.deepcopy(plain)
    report = lora_kernels.accelerate(model)
    assert set(report.notes.values()) == {
        "float32 adapters over a bfloat16 base: computed in bfloat16, as PEFT does under autocast"
    }
    assert sorted(report.notes) == sorted(report.fast)

    plain.autocast = True  # its copies' too

    def compute(candidate: nn.Module, x: Tensor) -> dict[str, Tensor]:
        enabled = hasattr(candidate, "autocast") and x.dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return gradients(candidate, x)

    assert_parity(model, plain, inputs(200, dtype=torch.bfloat16), compute)


def test_half_adapters_over_an_fp32_base():
    plain = build(lora_config(), lora_config(r=2), base=Parallel)
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    assert_parity(accelerated(plain), plain, inputs(200))


# --- dropout ---------------------------------------------------------------------------------


def test_dropout_has_pefts_distribution():
    """The kept share of every input column, and the mean over the masks, are PEFT's."""
    torch.manual_seed(0)
    layer = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 8)),
        lora_config(r=8, lora_dropout=0.3, lora_alpha=8, target_modules=["0"]),
    )
    layer = layer.base_model.model[0]
    layer.base_layer.weight.data.zero_()
    layer.base_layer.bias.data.zero_()
    layer.lora_A["default"].weight.data = torch.eye(8)
    layer.lora_B["default"].weight.data = torch.eye(8)
    lora_kernels.accelerate(layer)
    draws = layer(torch.ones(20_000, 8))  # every element is 0 or 1 / (1 - p)
    kept = draws != 0
    assert torch.equal(draws[kept].unique(), torch.tensor([65536 / (65536 - round(0.3 * 65536))]))
    # Four standard deviations of a share of 20000.
    assert (kept.double().mean(0) - 0.7).abs().max() < 4 * (0.21 / 20_000) ** 0.5
    assert not torch.equal(layer(torch.ones(64, 8)), layer(torch.ones(64, 8)))


def test_dropout_is_reproduced_by_the_seed_and_off_in_eval():
    model = accelerated(build(lora_config(lora_dropout=0.5)))
    x = inputs(9)
    torch.manual_seed(7)
    first = model(x)
    second = model(x)
    torch.manual_seed(7)
    assert torch.equal(model(x), first)
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(x), model(x))


def test_each_layer_has_its_own_mask():
    model = accelerated(build(lora_config(lora_dropout=0.5, target_modules=["up"])))
    layer = model.base_model.model.up
    layer.base_layer.weight.data.zero_()
    x = inputs(64).detach()
    assert not torch.equal(layer(x), copy.deepcopy(layer)(x))


def test_all_target_layers_are_fast():
    report = lora_kernels.accelerate(build(lora_config()))
    assert report.fast == [f"base_model.model.{name}" for name in LAYERS]
    assert report.delegated == {}
    assert Net().up.weight.shape == (37, 23)
