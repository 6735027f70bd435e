"""Our layers in a transformers model with tied embeddings: tying, resizing, saving."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from routed_models import llama
from safetensors.torch import load_file, load_model
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from lora_kernels import LoRAEmbedding, LoRALinear, RoutedLoRALinear, route

VOCABULARY, MORE, FEWER = 61, 67, 53
TOKENS = torch.randint(1, FEWER, (2, 5), generator=torch.Generator().manual_seed(2))


def tied(dtype=torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = llama(dtype).config
    model = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "tie_word_embeddings": True}))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model.to(dtype).eval()


def randomise(model: nn.Module) -> None:
    """Signed random values in every adapter tensor; a merged embedding must stay in range."""
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape))


def adapt(model: LlamaForCausalLM, case: str, **options) -> LlamaForCausalLM:
    """The model with our layers in its head, its embedding, or both; or routed."""
    if case == "route":
        routed = route(model)
        config = {"rank": 3, "alpha": 4, "target_modules": ["lm_head", "q_proj"]}
        routed.add("a", **config, init_lora_weights=False)
        plain = model.forward

        def forward(*args, **kwargs):
            with routed.adapters("a"):
                return plain(*args, **kwargs)

        model.forward = forward
        return model
    if case in ("head", "both"):
        model.lm_head = LoRALinear.from_linear(model.lm_head, 4, **options)
    if case in ("embedding", "both"):
        model.model.embed_tokens = LoRAEmbedding.from_embedding(model.model.embed_tokens, 4)
    randomise(model)
    return model


def base(layer: nn.Module) -> nn.Module:
    return getattr(layer, "base_layer", layer)


def is_tied(model: LlamaForCausalLM) -> bool:
    return base(model.lm_head).weight is base(model.model.embed_tokens).weight


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


CASES = ["head", "embedding", "both", "route"]


# --- tying --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_tie_weights(case):
    model = adapt(tied(), case)
    before = logits(model)
    for _ in range(2):
        model.tie_weights()
        assert is_tied(model) and torch.equal(logits(model), before)
    # A head that held a weight of its own takes the embedding's.
    base(model.lm_head).weight = nn.Parameter(torch.randn(VOCABULARY, 24), requires_grad=False)
    assert not is_tied(model)
    model.tie_weights()
    assert is_tied(model) and torch.equal(logits(model), before)


@pytest.mark.parametrize("make", [LoRALinear.from_linear, RoutedLoRALinear.from_linear])
def test_a_parameter_that_is_assigned_is_the_base_layers(make):
    layer = make(nn.Linear(7, 5))
    names = [name for name, _ in layer.named_parameters()]
    weight, bias = (nn.Parameter(torch.randn(s), requires_grad=False) for s in ([5, 7], [5]))
    layer.weight, layer.bias = weight, bias
    assert layer.weight is layer.base_layer.weight is weight
    assert layer.bias is layer.base_layer.bias is bias
    assert [name for name, _ in layer.named_parameters()] == names
    x = torch.randn(3, 7)
    if make == RoutedLoRALinear.from_linear:
        torch.testing.assert_close(layer(x), F.linear(x, weight, bias))
    layer.bias = None
    assert layer.base_layer.bias is None
    with pytest.raises(ValueError, match=r"weight: expected .* \[5, 7\].* got \[7, 5\]"):
        layer.weight = nn.Parameter(torch.randn(7, 5))
    with pytest.raises(TypeError):
        layer.weight = torch.randn(5, 7)
    assert layer.weight is weight


def test_a_bias_that_is_tied_too(tmp_path):
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, tie_word_embeddings=True,
    )  # fmt: skip
    model = BertForMaskedLM(config).eval()
    head = model.cls.predictions
    head.decoder = LoRALinear.from_linear(head.decoder, 3, init_lora_weights=False)
    before = logits(model)
    head.decoder.weight = model.bert.embeddings.word_embeddings.weight
    head.decoder.bias = head.bias
    assert head.decoder.base_layer.bias is head.bias and torch.equal(logits(model), before)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert not [name for name in names if "decoder.base_layer" in name]
    assert {"cls.predictions.bias", "bert.embeddings.word_embeddings.weight"} <= names


# --- merged layers ------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["device", "cpu"])
@pytest.mark.parametrize("case", ["head", "embedding", "both"])
def test_tying_while_merged(case, keep):
    model = adapt(tied(), case)
    unmerged = logits(model)
    layers = [m for m in model.modules() if isinstance(m, (LoRALinear, LoRAEmbedding))]
    for layer in layers:
        layer.merge(keep)
    merged = logits(model)
    torch.testing.assert_close(merged, unmerged)
    model.tie_weights()
    assert all(layer.merged for layer in layers) and torch.equal(logits(model), merged)
    for layer in layers:
        layer.unmerge()
    assert is_tied(model) and torch.equal(logits(model), unmerged)


def test_another_weight_is_merged_into():
    layer = LoRALinear.from_linear(nn.Linear(7, 5), 3, init_lora_weights=False)
    x, other = torch.randn(3, 7), nn.Parameter(torch.randn(5, 7), requires_grad=False)
    twin = copy.deepcopy(layer)
    twin.weight = other
    layer.merge()
    layer.weight = other
    assert layer.merged
    torch.testing.assert_close(layer(x), twin(x))
    layer.unmerge()
    assert layer.weight is other and torch.equal(layer(x), twin(x))


def test_what_was_merged_for_good_cannot_be_tied():
    model = adapt(tied(), "both")
    model.lm_head.merge("none")
    before = logits(model)
    with pytest.raises(RuntimeError, match="unmerge"):
        model.tie_weights()
    model = adapt(tied(), "both")
    model.model.embed_tokens.merge("none")
    before = logits(model)
    with pytest.raises(RuntimeError, match=r"weight: it cannot be tied .* keep='none'"):
        model.tie_weights()
    assert torch.equal(logits(model), before)


# --- saving -------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["", "merged"])
@pytest.mark.parametrize("case", CASES)
def test_save_pretrained(case, state, tmp_path):
    model = adapt(tied(), case)
    before = logits(model)
    if state and case != "route":
        for layer in (model.lm_head, model.model.embed_tokens):
            if hasattr(layer, "merge"):
                layer.merge()
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    big = [name for name, tensor in file.items() if tensor.shape == (VOCABULARY, 24)]
    assert len(big) == 1  # the tied weight once

    # The same layers with other values take all of it.
    other = adapt(tied(), case)
    for parameter in other.parameters():
        parameter.data.add_(1)
    if case == "route":  # the slabs of a bank are no storages of their own, as load_model asks
        missing, unexpected = other.load_state_dict(file, strict=False)
        assert missing == ["lm_head.base_layer.weight"]  # the embedding's
    else:
        missing, unexpected = load_model(other, tmp_path / "model.safetensors")
        assert not missing
    assert not unexpected
    assert is_tied(other) and torch.equal(logits(other), before)


def test_the_base_model_is_in_the_file(tmp_path):
    """Where the head alone is adapted, the embedding has its own name, and carries the head."""
    adapt(tied(), "head").save_pretrained(tmp_path)
    model, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and is_tied(model)
    assert torch.equal(logits(model), logits(tied()))


# --- resizing -----------------------------------------------------------------------------------


def resize(model: LlamaForCausalLM, size: int) -> None:
    model.resize_token_embeddings(size, mean_resizing=False)
    if Version(transformers.__version__) < Version("5.6"):  # leaves this to the user
        model.lm_head.out_features = size


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("size", [MORE, FEWER])
def test_resizing_with_an_adapted_head(size, options):
    model = adapt(tied(torch.float64), "head", **options)
    before, adapter = logits(model), model.lm_head.adapter_state_dict()
    identities = {name: id(p) for name, p in model.lm_head.named_parameters()}
    model.lm_head(torch.randn(3, 24, dtype=torch.float64)).sum().backward()
    resize(model, size)
    head = model.lm_head
    assert is_tied(model) and head.weight.shape == (size, 24)
    assert head.out_features == head.base_layer.out_features == head.lora_B.out_features == size
    assert {name: id(p) for name, p in head.named_parameters()} == identities

    known, after = min(size, VOCABULARY), logits(model)
    assert after.shape == (2, 5, size)
    torch.testing.assert_close(after[..., :known], before[..., :known])
    for name, tensor in head.adapter_state_dict().items():
        if "lora_B" in name:
            assert torch.equal(tensor[:known], adapter[name][:known]) and not tensor[known:].any()
    # New tokens have the base model's logits, and a gradient.
    hidden = model.model(TOKENS).last_hidden_state
    torch.testing.assert_close(after[..., known:], (hidden @ head.weight.T)[..., known:].detach())
    head(hidden.detach()).square().sum().backward()
    assert head.lora_B.weight.grad.shape == (size, 4)
    if size > known:
        assert head.lora_B.weight.grad[known:].abs().sum(1).min() > 0


@pytest.mark.parametrize("case", CASES)
def test_a_resize_to_the_same_size_freezes_no_adapter(case):
    model = adapt(tied(), case)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    model.resize_token_embeddings(VOCABULARY)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    for layer in (model.lm_head, model.model.embed_tokens):
        layer.requires_grad_(False)  # as the user says
    assert not any(p.requires_grad for p in model.lm_head.parameters())


def test_resizing_with_a_merged_head():
    model = adapt(tied(), "head")
    before = logits(model)
    model.lm_head.merge()
    with pytest.raises(RuntimeError, match=r"unmerge\(\), and resize again"):
        resize(model, MORE)
    model.lm_head.unmerge()
    resize(model, MORE)
    torch.testing.assert_close(logits(model)[..., :VOCABULARY], before)
    assert is_tied(model) and model.config.vocab_size == MORE


def test_resizing_with_an_adapted_embedding():
    """transformers refuses it before anything is changed; with the base layer in place it works."""
    model = adapt(tied(torch.float64), "both")
    before, embedding = logits(model), model.model.embed_tokens
    with pytest.raises(TypeError, match="LoRAEmbedding"):
        resize(model, MORE)
    assert torch.equal(logits(model), before) and model.config.vocab_size == VOCABULARY

    model.set_input_embeddings(embedding.base_layer)
    resize(model, MORE)
    embedding.num_embeddings = MORE
    model.set_input_embeddings(embedding)
    assert is_tied(model) and embedding.lora_embedding_A.shape == (4, MORE)
    torch.testing.assert_close(logits(model)[..., :VOCABULARY], before)
    new = torch.arange(VOCABULARY, MORE)
    assert torch.equal(embedding(new), embedding.weight[new])


def test_resizing_a_routed_model():
    model = tied()
    routed = route(model)
    for name in ("a", "b"):
        routed.add(name, rank=3, alpha=4, target_modules=["lm_head"], init_lora_weights=False)
    with pytest.raises(RuntimeError, match=r"out_features: .*\['a', 'b'\].*remove them"):
        resize(model, MORE)
    for name in routed.names:
        routed.remove(name)
    resize(model, MORE)
    routed.add("c", rank=3, alpha=4, target_modules=["lm_head"], init_lora_weights=False)
    assert isinstance(model.lm_head, RoutedLoRALinear) and is_tied(model)
    with routed.adapters("c"):
        assert logits(model).shape == (2, 5, MORE)


def test_sizes_that_do_not_fit():
    linear = LoRALinear(7, 5, 3, 4.0)
    table = LoRAEmbedding(5, 7, 3, 4.0, use_dora=True)
    routed = RoutedLoRALinear(7, 5)
    for layer, name in ((linear, "out_features"), (routed, "out_features")):
        with pytest.raises(ValueError, match=f"{name}: expected 5, .* got 6"):
            setattr(layer, name, 6)
        assert layer.out_features == 5
    with pytest.raises(ValueError, match=r"num_embeddings: expected 5, .* got 6"):
        table.num_embeddings = 6
    table.base_layer.weight.data = torch.randn(6, 7)
    with pytest.raises(ValueError, match=r"num_embeddings: .*DoRA"):
        table.num_embeddings = 6
    linear.merge()
    with pytest.raises(RuntimeError, match=r"out_features: .*merged"):
        linear.out_features = 6
