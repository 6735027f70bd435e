"""What a materialised layer holds: a new adapter changes nothing, whoever draws in what order."""

import copy
import itertools
import pickle
import weakref

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel

from lora_kernels import AdapterBank, LoRALinear, RoutedLoRALinear, Routing, route
from lora_kernels.nn import LoRAEmbedding

K, N, RANK = 19, 13, 4

KINDS = {
    "lora": (LoRALinear, {}),
    "lora_bias": (LoRALinear, {"lora_bias": True, "init_lora_weights": True}),
    "gaussian": (LoRALinear, {"init_lora_weights": "gaussian", "bias": False}),
    "dora": (LoRALinear, {"use_dora": True}),
    "embedding": (LoRAEmbedding, {}),
    "embedding_dora": (LoRAEmbedding, {"use_dora": True}),
}
RANDOM = {
    "lora_bias": (LoRALinear, {"lora_bias": True}),
    "dora": (LoRALinear, {"use_dora": True}),
    "embedding_dora": (LoRAEmbedding, {"use_dora": True}),
}


def draw_input(layer):
    if isinstance(layer, LoRAEmbedding):
        return torch.randint(K, (3, 5))
    return torch.randn(3, 5, K)


def resettable(model):
    return [module for module in model.modules() if hasattr(module, "reset_parameters")]


def assert_new(layer, init_lora_weights=True):
    assert not any(parameter.is_meta for parameter in layer.parameters())
    assert all(torch.isfinite(parameter).all() for parameter in layer.parameters())
    if init_lora_weights:
        x = draw_input(layer)
        assert torch.equal(layer(x), layer.base_layer(x))
    if layer.use_dora:
        assert torch.equal(layer.lora_magnitude_vector, layer._weight_norm())


def materialise_at_once(layer, order):
    layer.to_empty(device="cpu")
    for module in order:
        module.reset_parameters()


def materialise_one_by_one(layer, order):
    """As FSDP1: a module's own parameters are made when its turn has come."""
    for module in order:
        module.to_empty(device="cpu", recurse=False)
        module.reset_parameters()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("materialise", [materialise_at_once, materialise_one_by_one])
@pytest.mark.parametrize(("kind", "options"), KINDS.values(), ids=KINDS)
def test_a_new_adapter_changes_nothing_in_any_order(kind, options, materialise):
    modules = len(resettable(kind(K, N, RANK, 8.0, **options)))
    for order in itertools.permutations(range(modules)):
        layer = kind(K, N, RANK, 8.0, device="meta", **options)
        materialise(layer, [resettable(layer)[index] for index in order])
        assert_new(layer)
        if kind is LoRALinear:
            spread = 1 / RANK if options.get("init_lora_weights") == "gaussian" else (3 * K) ** -0.5
            assert 0.5 < layer.lora_A.weight.std() / spread < 1.5
            assert layer.lora_A.weight.mean().abs() < spread / 2
        else:
            assert 0.5 < layer.lora_embedding_B.std() < 1.5


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("kind", "options"), RANDOM.values(), ids=RANDOM)
def test_a_random_adapter_is_drawn_again_and_its_norm_follows(kind, options):
    options = {**options, "init_lora_weights": False}
    modules = len(resettable(kind(K, N, RANK, 8.0, **options)))
    for order in itertools.permutations(range(modules)):
        layer = kind(K, N, RANK, 8.0, device="meta", **options)
        materialise_at_once(layer, [resettable(layer)[index] for index in order])
        assert_new(layer, init_lora_weights=False)
        x = draw_input(layer)
        assert not torch.allclose(layer(x), layer.base_layer(x))


def test_the_base_is_drawn_by_its_class():
    layer, plain = LoRALinear(K, N, RANK, 8.0), nn.Linear(K, N)
    torch.manual_seed(3)
    plain.reset_parameters()
    torch.manual_seed(3)
    layer.base_layer.reset_parameters()
    for name, parameter in plain.named_parameters():
        assert torch.equal(layer.base_layer.get_parameter(name), parameter)


def test_a_merged_layer_is_unmerged_first():
    for order in (lambda modules: modules, reversed):
        layer = LoRALinear(K, N, RANK, 8.0, init_lora_weights=False, use_dora=True)
        layer.init_lora_weights = True
        frozen = layer.base_layer.weight
        layer.merge()
        for module in order(resettable(layer)):
            module.reset_parameters()
        assert not layer.merged and layer.base_layer.weight is frozen
        assert_new(layer)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_reset_themselves(duplicate):
    layer = LoRALinear(K, N, RANK, 8.0, use_dora=True)
    again, base = duplicate(layer), duplicate(layer.base_layer)
    before = copy.deepcopy(layer.state_dict())
    for module in (*resettable(again), base):
        module.reset_parameters()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not torch.equal(base.weight, layer.base_layer.weight)
    assert not torch.equal(again.base_layer.weight, layer.base_layer.weight)
    assert_new(again)
    other = LoRALinear.from_linear(layer.base_layer, RANK, use_dora=True)
    other.base_layer.reset_parameters()
    assert_new(other)


def test_a_layers_memory_is_freed_with_it():
    layer = LoRALinear(K, N, RANK, 8.0, use_dora=True)
    reference = weakref.ref(layer)
    del layer
    assert reference() is None  # by counting, without a search for cycles


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("order", [lambda modules: modules, reversed])
def test_a_routed_layers_bank(order):
    layer = RoutedLoRALinear(K, N, device="meta")
    bank, made = layer.bank, {"device": "meta"}
    bank.add("one", torch.empty(3, K, **made), torch.empty(N, 3, **made), 2.5, dropout_p=0.25)
    bank.add("two", torch.empty(5, K, **made), torch.empty(N, 5, **made), 1.0)
    bank["two"].scaling = -0.5
    layer.to_empty(device="cpu")
    for module in order(resettable(layer)):
        module.reset_parameters()
    assert float(bank["one"].scaling) == 2.5 and float(bank["two"].scaling) == -0.5
    x = torch.randn(4, K)
    y = layer(x, Routing.from_tokens([0, -1, 1, 0], bank))
    assert torch.equal(y, layer.base_layer(x))
    y.sum().backward()
    for adapter in bank.adapters.values():
        assert 0.5 < adapter.lora_a.std() * (3 * K) ** 0.5 < 1.5
        assert adapter.lora_b.grad.abs().sum() > 0  # its scaling is not zero


@pytest.mark.usefixtures("poisoned_memory")
def test_a_sliced_bank():
    bank = AdapterBank(K, [N, 7], device="meta")
    a, b = torch.empty(3, K, device="meta"), torch.empty(7, 3, device="meta")
    bank.add("one", [None, a], [None, b], 2.5)
    bank.to_empty(device="cpu")
    bank["one"].reset_parameters()
    assert 0.5 < bank["one"].lora_a_1.std() * (3 * K) ** 0.5 < 1.5
    assert bank["one"].lora_b_1.count_nonzero() == 0 and float(bank["one"].scaling) == 2.5


def test_a_scaling_outlives_a_stay_on_meta():
    bank = AdapterBank(K, N)
    bank.add("one", torch.randn(3, K), torch.randn(N, 3), 2.5)
    bank.to("meta")
    again = copy.deepcopy(bank).to_empty(device="cpu")
    assert float(bank.to_empty(device="cpu")["one"].scaling) == 2.5
    assert float(again["one"].scaling) == 2.5


@pytest.mark.usefixtures("poisoned_memory")
def test_an_adapter_of_a_routed_model_keeps_its_choice():
    routed = route(nn.Sequential(nn.Linear(K, N, device="meta")))
    routed.add("random", rank=3, alpha=6, target_modules=["0"], init_lora_weights=False)
    routed.add("new", rank=3, alpha=6, target_modules=["0"])
    routed.model.to_empty(device="cpu")
    for module in resettable(routed.model):
        module.reset_parameters()
    bank = routed.model[0].bank
    assert bank["random"].lora_b.count_nonzero() == 3 * N
    assert bank["new"].lora_b.count_nonzero() == 0
    assert float(bank["new"].scaling) == 2.0


# --- transformers ----------------------------------------------------------------------------


class WithLoRA(PreTrainedModel):
    """A model that makes its own layers with adapters."""

    config_class = PretrainedConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.plain = nn.Linear(K, N)
        self.lora = LoRALinear(K, N, RANK, 8.0)
        self.dora = LoRALinear(K, N, RANK, 8.0, use_dora=True)
        self.embedding = LoRAEmbedding(K, N, RANK, 8.0, use_dora=True)
        self.random = LoRALinear(K, N, RANK, 8.0, init_lora_weights=False)
        self.post_init()


def assert_new_model(model):
    for layer in (model.lora, model.dora, model.embedding):
        assert_new(layer)
        assert 0.015 < layer.base_layer.weight.std() < 0.025  # transformers' initializer_range
    assert model.random.lora_B.weight.std() > 0.1
    assert model.lora.lora_A.weight.std() > 0.08


def test_a_transformers_model_with_layers_of_ours():
    assert_new_model(WithLoRA(PretrainedConfig()))


def test_missing_from_a_checkpoint(tmp_path):
    model = WithLoRA(PretrainedConfig())
    model.dora.lora_magnitude_vector.data *= 2
    for layer in (model.lora, model.dora):
        nn.init.normal_(layer.lora_B.weight)
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    again = WithLoRA.from_pretrained(tmp_path)
    for name, value in again.state_dict().items():
        assert torch.equal(value, state[name]), name
    kept = {name: value for name, value in state.items() if "lora_" not in name}
    assert_new_model(WithLoRA.from_pretrained(None, config=model.config, state_dict=kept))
    kept |= {name: value for name, value in state.items() if name.startswith("lora.")}
    partly = WithLoRA.from_pretrained(None, config=model.config, state_dict=kept)
    assert torch.equal(partly.lora.lora_B.weight, model.lora.lora_B.weight)
    assert_new(partly.dora)


def tiny_llama():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 31}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def test_layers_of_a_model_that_is_initialised_are_left_alone():
    model = tiny_llama()
    attention = model.model.layers[0].self_attn
    attention.q_proj = LoRALinear.from_linear(attention.q_proj, RANK)
    attention.k_proj = LoRALinear.from_linear(attention.k_proj, RANK, init_lora_weights=False)
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_mark_alone_draws_nothing():
    """Code that wants to keep what there is sets it by hand."""
    layer = LoRALinear(K, N, RANK, 8.0, init_lora_weights=False)
    before = copy.deepcopy(layer.state_dict())
    layer._is_hf_initialized = True
    assert layer._is_hf_initialized
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
