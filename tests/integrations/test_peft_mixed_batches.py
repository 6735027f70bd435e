"""``adapter_names`` on an accelerated model: PEFT's result, by one operation for all adapters."""

import copy

import peft
import pytest
import torch
from peft_models import (
    LAYERS,
    Parallel,
    accelerated,
    assert_parity,
    build,
    inputs,
    lora_config,
    lora_layers,
)
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lora_kernels
from lora_kernels.integrations.peft import layers as peft_layers
from lora_kernels.integrations.peft.layers import delegated_calls
from lora_kernels.ops.routed import unpacked
from lora_kernels.ops.routed.bank.storage import ALIGNMENT
from lora_kernels.runtime import dispatch

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")

NAMES = ["two", "__base__", "three", "one", "two", "__base__", "three"]


def three(**settings) -> nn.Module:
    """Ranks 3, 5 and 1, a rank-stabilised one, one that is not on every layer."""
    return build(
        lora_config(),
        lora_config(r=5, use_rslora=True, target_modules=["up", "gate"]),
        lora_config(r=1, lora_alpha=-2),
        **settings,
    ).eval()


def mixed(names: list[str] = NAMES):
    @torch.no_grad()
    def compute(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        return {"y": model(x, adapter_names=names)}

    return compute


def assert_served(fast: nn.Module) -> None:
    assert {name: delegated_calls(layer) for name, layer in lora_layers(fast).items()} == {
        name: {} for name in lora_layers(fast)
    }


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """How many calls the routed operation has served."""
    calls = []

    def counting(*args):
        calls.append(1)
        return unpacked.routed_linear_unpacked(*args)

    monkeypatch.setattr(peft_layers, "routed_linear_unpacked", counting)
    return calls


BATCHES = {
    "rows": ((7,), NAMES),
    "sequences": ((7, 5), NAMES),
    "patches": ((7, 2, 3), NAMES),
    "one name": ((3, 5), ["one"] * 3),
    "all base": ((3, 5), ["__base__"] * 3),
    "one row": ((1, 4), ["three"]),
    "neighbours": ((4, 5), ["one", "one", "two", "two"]),
    "unknown here": ((2, 5), ["two", "one"]),
    "no tokens": ((3, 0), ["one", "two", "three"]),
}


@pytest.mark.parametrize(("shape", "names"), BATCHES.values(), ids=BATCHES)
def test_parity(shape, names):
    plain = three()
    fast = accelerated(plain)
    assert_parity(fast, plain, inputs(*shape).detach(), mixed(names))
    assert_served(fast)


def test_every_layer_is_served_at_once(counted):
    fast = accelerated(three())
    mixed()(fast, inputs(7, 5).detach())
    assert len(counted) == len(LAYERS)


def test_a_row_without_an_adapter_is_exactly_the_base():
    plain = three(base=Parallel)
    fast = accelerated(plain)
    x = inputs(7, 5).detach()
    with torch.no_grad(), fast.disable_adapter():
        base = fast(x)
    y = mixed()(fast, x)["y"]
    rows = torch.tensor([name == "__base__" for name in NAMES])
    assert torch.equal(y[rows], base[rows])
    assert not torch.isclose(y[~rows], base[~rows]).all(-1).any()


def test_a_broken_adapter_reaches_its_own_rows_only():
    fast = accelerated(three(base=Parallel))
    for layer in lora_layers(fast).values():
        layer.lora_A["three"].weight.data.fill_(float("nan"))
    y = mixed()(fast, inputs(7, 5).detach())["y"]
    for row, name in enumerate(NAMES):
        assert torch.isnan(y[row]).any() == (name == "three")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_adapters_in_the_dtype_of_the_base(dtype):
    plain = three(base=Parallel).to(dtype)
    fast = accelerated(plain)
    assert_parity(fast, plain, inputs(7, 40, dtype=dtype).detach(), mixed())
    assert_served(fast)


def test_fp32_adapters_over_a_half_base_match_peft_under_autocast():
    plain = three(base=Parallel, dtype=torch.bfloat16)
    fast = accelerated(plain)

    def compute(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=model is plain):
            return mixed()(model, x)

    assert_parity(fast, plain, inputs(7, 40, dtype=torch.bfloat16).detach(), compute)
    assert_served(fast)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast(base, x_dtype):
    plain = three(base=Parallel, dtype=base)
    fast = accelerated(plain)

    def compute(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype != torch.float64):
            return mixed()(model, x)

    assert_parity(fast, plain, inputs(7, 40, dtype=x_dtype).detach(), compute)
    assert_served(fast)


def test_adapters_of_several_dtypes():
    plain = three(base=Parallel)
    for layer in lora_layers(plain).values():
        layer.lora_A["one"].bfloat16(), layer.lora_B["one"].bfloat16()
    fast = accelerated(plain)
    assert_parity(fast, plain, inputs(7, 40).detach(), mixed())
    assert_served(fast)


@pytest.mark.parametrize("scale", [0.5, -3], ids=["half", "minus three"])
def test_scalings_that_are_tensors_or_change(scale):
    plain = three()
    fast = accelerated(plain)
    x = inputs(7).detach()
    before = mixed()(fast, x)["y"]
    for model in (plain, fast):
        for layer in lora_layers(model).values():
            layer.scaling["one"] = torch.tensor(layer.scaling["one"] * scale)
            layer.set_scale("three", scale)
    assert_parity(fast, plain, x, mixed())
    assert not torch.equal(mixed()(fast, x)["y"], before)
    assert_served(fast)


def test_values_are_read_anew():
    """Nothing that is kept between calls depends on an adapter's values or on who it is."""
    plain = three()
    fast = accelerated(plain)
    x = inputs(7).detach()
    mixed()(fast, x)
    for model in (plain, fast):
        torch.manual_seed(3)
        for layer in lora_layers(model).values():
            layer.lora_A["one"].weight.data = torch.randn_like(layer.lora_A["one"].weight)
            layer.lora_B["three"].weight.data.mul_(-2)
    assert_parity(fast, plain, x, mixed())
    for model in (plain, fast):
        model.delete_adapter("two")
        model.add_adapter("two", lora_config(r=2, init_lora_weights=False))
    for ours, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
        ours.data.copy_(theirs.data)
    lora_kernels.accelerate(fast)
    assert_parity(fast, plain.eval(), x, mixed())
    assert_served(fast)


def test_caches_hold_numbers_and_stay_small():
    fast = accelerated(three())
    for length in range(1, 50):
        mixed()(fast, inputs(7, length).detach())
    assert unpacked._routing.cache_info().currsize <= 32
    hits = unpacked._routing.cache_info().hits
    renamed = [{"one": "three", "three": "one"}.get(name, name) for name in NAMES]
    mixed(renamed)(fast, inputs(7, 49).detach())
    assert unpacked._routing.cache_info().hits == hits + len(LAYERS)  # the same pattern of names


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_in_either_way(mode):
    plain = three()
    fast = accelerated(plain)
    x = inputs(7).detach()
    unpacked._routing.cache_clear()
    unpacked._tables.cache_clear()
    with mode():
        y = fast(x, adapter_names=NAMES)
    assert_parity(fast, plain, x, mixed())
    assert torch.equal(mixed()(fast, x)["y"], y)
    for parameter in fast.parameters():
        parameter.requires_grad_(False)
    assert torch.equal(fast(x, adapter_names=NAMES), y)  # nothing to record: served as well
    assert_served(fast)


# --- PEFT's errors, and what stays PEFT's ----------------------------------------------------


def assert_same_error(plain: nn.Module, *args, **kwargs) -> None:
    fast = copy.deepcopy(plain)
    lora_kernels.accelerate(fast)
    messages = []
    for model in (plain, fast):
        with torch.no_grad(), pytest.raises((ValueError, TypeError)) as error:
            model(*args, **kwargs)
        messages.append((type(error.value), str(error.value)))
    assert messages[0] == messages[1]


def test_pefts_errors():
    x = inputs(7).detach()
    assert_same_error(three(), x, adapter_names=NAMES[:3])
    assert_same_error(three().train(), x, adapter_names=NAMES)
    assert_same_error(three(), x, adapter_names=["none"] * 7)
    merged = three()
    merged.merge_adapter()
    assert_same_error(merged, x, adapter_names=NAMES)
    dora = build(lora_config(), lora_config(use_dora=True)).eval()
    assert_same_error(dora, x, adapter_names=["one", "two"] * 3 + ["one"])
    layer = lora_layers(three())["base_model.model.up"]
    assert_same_error(layer, x, adapter_names=NAMES[:3])


def test_dora_that_no_sequence_names_is_no_matter():
    plain = build(lora_config(), lora_config(use_dora=True)).eval()
    fast = accelerated(plain)
    assert_parity(fast, plain, inputs(3).detach(), mixed(["one", "__base__", "one"]))
    assert_served(fast)


def test_disabled_adapters():
    plain = three()
    fast = accelerated(plain)
    x = inputs(7).detach()
    with plain.disable_adapter(), fast.disable_adapter():
        assert torch.equal(mixed()(fast, x)["y"], mixed()(plain, x)["y"])
    assert_served(fast)


def hook(layer):
    layer.lora_A["one"].register_forward_hook(lambda module, args, y: y * 1.5)


DELEGATED = {
    "hooks": (hook, "lora_A of 'one' has forward hooks"),
    "dropout": (
        lambda layer: layer.lora_dropout.update({"one": nn.Dropout(1e-9).train()}),
        "mixed batch (adapter_names): dropout of 'one' is active",
    ),
    "trainable base": (
        lambda layer: layer.base_layer.weight.requires_grad_(True),
        "base weight requires grad",
    ),
}


@pytest.mark.parametrize(("prepare", "reason"), DELEGATED.values(), ids=DELEGATED)
def test_delegated(prepare, reason):
    plain = three()
    fast = accelerated(plain)
    up = "base_model.model.up"
    for model in (plain, fast):
        prepare(lora_layers(model)[up])
    x = inputs(7).detach()
    ours, theirs = (mixed()(lora_layers(model)[up], x)["y"] for model in (fast, plain))
    assert torch.equal(ours, theirs)
    assert delegated_calls(lora_layers(fast)[up]) == {reason: 1}
    if "dropout" not in reason:
        names = ["two", "__base__"]  # nor does it matter to those who do not name it
        mixed(names)(lora_layers(fast)[up], x[:2])
        extra = 1 if "base" in reason else 0
        assert delegated_calls(lora_layers(fast)[up]) == {reason: 1 + extra}


def test_lora_bias_stays_pefts():
    plain = build(lora_config(lora_bias=True), lora_config(r=2)).eval()
    fast = accelerated(plain)
    x = inputs(3).detach()
    names = ["one", "two", "__base__"]
    assert torch.equal(mixed(names)(fast, x)["y"], mixed(names)(plain, x)["y"])
    reason = "mixed batch (adapter_names): adapter 'one' has lora_bias"
    calls = lora_kernels.accelerate(fast).delegated_calls
    assert calls == {f"base_model.model.{name}": {reason: 1} for name in LAYERS}


def test_gradients_stay_pefts():
    """PEFT refuses the model's training mode only: gradients through a mixed batch exist."""
    plain = three()
    fast = accelerated(plain)
    results = []
    for model in (plain, fast):
        x = inputs(7)
        model(x, adapter_names=NAMES).square().sum().backward()
        results.append([x.grad] + [p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    reasons = {reason for layer in lora_layers(fast).values() for reason in delegated_calls(layer)}
    assert reasons == {
        "mixed batch (adapter_names): gradients are recorded; lora_kernels.route trains mixed "
        "batches"
    }


def test_compiled_calls_stay_pefts():
    plain = three()
    fast = accelerated(plain)
    x = inputs(7).detach()
    layer = lora_layers(fast)["base_model.model.up"]
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager")
        y = compiled(x, adapter_names=NAMES)
        expected = lora_layers(plain)["base_model.model.up"](x, adapter_names=NAMES)
    torch.testing.assert_close(y, expected)


# --- whole models ----------------------------------------------------------------------------


def language_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=61,
            hidden_size=24,
            intermediate_size=36,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            pad_token_id=0,
            eos_token_id=None,
            bos_token_id=None,
        )
        model, targets = LlamaForCausalLM(config), ["q_proj", "v_proj", "down_proj"]
    else:
        config = GPT2Config(
            vocab_size=61,
            n_positions=32,
            n_embd=24,
            n_layer=2,
            n_head=4,
            initializer_range=0.3,
            pad_token_id=0,
            eos_token_id=None,
            bos_token_id=None,
        )
        model, targets = GPT2LMHeadModel(config), ["c_attn", "c_fc"]  # Conv1D: weights [K, N]
    configs = [{"r": 3, "lora_alpha": 9}, {"r": 5, "lora_alpha": 4, "target_modules": targets[:1]}]
    configs = [peft.LoraConfig(**{"target_modules": targets, **config}) for config in configs]
    model = peft.get_peft_model(model.double(), configs[0], adapter_name="one")
    model.add_adapter("two", configs[1])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
    return model.double().eval()


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_language_models(kind, settings, counted):
    plain = language_model(kind)
    fast = accelerated(plain)
    prompts = torch.randint(1, 61, (3, 5))
    mask = torch.ones_like(prompts)
    prompts[1, :2], mask[1, :2] = 0, 0
    names = ["two", "__base__", "one"]
    arguments = {"input_ids": prompts, "attention_mask": mask, "adapter_names": names}
    torch.testing.assert_close(fast(**arguments).logits, plain(**arguments).logits)
    settings = {"max_new_tokens": 6, "do_sample": False, **settings}
    ours, theirs = (model.generate(**arguments, **settings) for model in (fast, plain))
    assert torch.equal(ours, theirs)
    for row, name in enumerate(names):
        one_name = {**arguments, "adapter_names": [name] * 3}
        assert torch.equal(plain.generate(**one_name, **settings)[row], ours[row])
    assert_served(fast)
    assert len(counted) == 7 * len(lora_layers(fast))  # a forward, a prefill and five steps


# --- the offsets that kernels follow ---------------------------------------------------------


def test_offsets_reach_every_factor_from_the_first():
    memory = torch.arange(4096, dtype=torch.float32)
    memory = memory[-memory.data_ptr() // 4 % 64 :]
    shapes = [(3, 23), (37, 3), (5, 23), (37, 5)]
    starts = [1024, 64, 512, 2048]
    factors = [
        memory[start : start + rows * columns].view(rows, columns)
        for start, (rows, columns) in zip(starts, shapes, strict=True)
    ]
    first = min(factors, key=Tensor.data_ptr)
    rows = unpacked._rows(factors, first, ALIGNMENT)
    assert rows == ((3, 960, 0), (5, 448, 1984))
    table, scaling, thresholds = unpacked._tables(
        (0, 2), rows, (0.5, 2.0), 3, torch.device("cpu"), 0
    )
    assert table[:, :, 0].tolist() == [[3, 3], [0, 0], [5, 5], [0, 0]]
    assert table[:, :, 1].tolist() == [[0, 0]] * 4
    assert table[:, :, 2].tolist() == [[960, 0], [0, 0], [448, 1984], [0, 0]]
    assert scaling.tolist() == [0.5, 0.0, 2.0, 0.0] and thresholds.tolist() == [0] * 4
    for factor in (factors[0].bfloat16(), factors[0].t(), memory[1:70].view(3, 23)):
        assert unpacked._rows([factor, *factors[1:]], first, ALIGNMENT) is None


def test_a_named_backend_that_has_no_use_for_unpacked_adapters(monkeypatch):
    monkeypatch.setattr(dispatch, "PROCESS_DEFAULT", "reference")
    plain = three()
    assert_parity(accelerated(plain), plain, inputs(7).detach(), mixed())
