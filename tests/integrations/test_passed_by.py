"""Layers whose weights a model computes with: an error in ``route``, a word in the report.

And the models of transformers that read weights and call the layers too: nothing is said of them.
"""

import copy
import warnings

import peft
import pytest
import torch
from routed_models import VOCABULARY, llama
from torch import nn
from torch.nn import functional as F

from lora_kernels import LoRALinear, Routing, accelerate, route
from lora_kernels.integrations.peft.layers import Linear

PASSED_BY = "computes with its weight and does not call it"


@pytest.fixture
def alarms():
    """The warnings of this kind in a test."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(each.message) for each in caught if PASSED_BY in str(each.message)]


class Network(nn.Module):
    """Called, read, or not used: as the test says."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(7, 6)
        self.head = nn.Linear(6, 5, bias=False)
        self.tower = nn.Linear(7, 3)

    def forward(self, x, head="called"):
        hidden = torch.tanh(self.body(x))
        if head == "read":
            return F.linear(hidden, self.head.weight)
        if head == "called, then read":
            return self.head(hidden) + F.linear(hidden, self.head.weight)
        if head == "shape":
            return hidden.new_zeros(self.head.weight.shape)
        return self.head(hidden)


X = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(3))
TARGETS = ["body", "head", "tower"]


def routed_network():
    routed = route(Network())
    routed.add("a", rank=2, alpha=3, target_modules=TARGETS, init_lora_weights=False)
    routed.add("b", rank=3, alpha=3, target_modules=TARGETS, init_lora_weights=False)
    return routed


# --- route --------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["a", ["a", "__base__"], "a routing"])
def test_a_read_in_place_of_a_call_is_an_error_at_the_end(names):
    routed = routed_network()
    if names == "a routing":
        names = Routing.from_sequences(["a", "b"], [3, 3], routed.slots)
    error = pytest.raises(RuntimeError, match=r"not called.*: head, by Network\.forward")
    with error, routed.adapters(names):
        y = routed.model(X, "read")
    assert y.shape == (2, 3, 5)  # the error comes after the model's result
    with routed.adapters(names):  # and is no lasting state
        routed.model(X)


def test_in_every_with_that_it_happens_in():
    routed = routed_network()
    for _ in range(3):
        with pytest.raises(RuntimeError, match="head"), routed.adapters("a"):
            routed.model(X, "read")
        with routed.adapters("a"):
            routed.model(X)


def test_training_and_evaluating_in_one_with(alarms):
    routed = routed_network()
    with pytest.raises(RuntimeError, match="head"), routed.adapters("a"):
        routed.model(X).sum().backward()
        routed.model(X, "read")
        routed.model(X, "read")
    assert len(alarms()) == 1


def test_a_read_outside_of_the_model_in_the_with():
    routed = routed_network()
    model = routed.model
    with pytest.raises(RuntimeError, match="head"), routed.adapters("a"):
        F.linear(model.body(X), model.head.weight)


@pytest.mark.parametrize("head", ["called", "called, then read", "shape"])
def test_what_is_no_error(head, alarms):
    """A tower that is not used; weights that are read too, or asked for their shape."""
    routed = routed_network()
    for _ in range(3):
        with routed.adapters(["a", "b"]):
            routed.model(X, head)
            routed.model(X, head)
    assert not alarms()


def test_reads_of_the_base_model_alone(alarms):
    routed = routed_network()
    for names in ("__base__", ["__base__", "__base__"]):
        with routed.adapters(names):
            routed.model(X, "read")
            routed.model(X, "read")
    assert not alarms()


def test_reads_outside_of_with_are_not_its():
    routed = routed_network()
    routed.model.head.weight.sum()
    with routed.adapters("a"):
        routed.model.body(X)
    with routed.adapters("a"):
        pass


def test_an_error_inside_is_not_replaced():
    routed = routed_network()
    with pytest.raises(ZeroDivisionError), routed.adapters("a"):
        routed.model(X, "read")
        raise ZeroDivisionError


def test_our_own_reads_in_route(tmp_path):
    routed = routed_network()
    with routed.adapters("a"):
        routed.add("c", rank=2, alpha=3, target_modules=TARGETS)
        routed.save("a", tmp_path)
        routed.load("d", tmp_path)
        routed.remove("c")
        routed.model.tower.base_layer.weight.sum()


# --- known readers ------------------------------------------------------------------------------


def mamba(version=""):
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 11, "state_size": 4}
    if version:
        return Mamba2ForCausalLM(Mamba2Config(**sizes, num_heads=4, head_dim=8, n_groups=1))
    return MambaForCausalLM(MambaConfig(**sizes))


def wavlm():
    from transformers.models.wavlm.modeling_wavlm import WavLMAttention

    return nn.Sequential(WavLMAttention(16, 2))


def mobilebert():
    from transformers import MobileBertConfig
    from transformers.models.mobilebert.modeling_mobilebert import MobileBertLMPredictionHead

    sizes = {"embedding_size": 4, "hidden_size": 8, "vocab_size": 11}
    return nn.Sequential(MobileBertLMPredictionHead(MobileBertConfig(**sizes)))


def encoders():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)


KNOWN_READERS = {
    "encoder": (lambda: nn.TransformerEncoderLayer(16, 2, 32), "linear1"),
    "encoder inside": (encoders, ["linear2"]),
    "attention": (lambda: nn.MultiheadAttention(16, 2), "out_proj"),
    "wavlm": (wavlm, ["q_proj"]),
    "mobilebert": (mobilebert, ["dense"]),
    "mamba": (mamba, ["dt_proj"]),
    "mamba, fused": (mamba, ["out_proj"]),
    "mamba2, fused": (lambda: mamba("2"), ["out_proj"]),
}


@pytest.mark.parametrize(("make", "targets"), KNOWN_READERS.values(), ids=KNOWN_READERS.keys())
def test_route_refuses_known_readers(make, targets):
    model = make()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="reads its weight instead of calling it"):
        route(model).add("a", rank=2, alpha=3, target_modules=targets)
    assert [type(module) for module in model.modules()] == before


def test_route_takes_what_they_call():
    route(mamba("2")).add("a", rank=2, alpha=3, target_modules=["in_proj"])
    ours = type("WavLMAttention", (nn.Module,), {})()  # another's class of that name
    ours.q_proj = nn.Linear(4, 4)
    route(nn.Sequential(ours)).add("a", rank=2, alpha=3, target_modules="0.q_proj")


# --- accelerate ---------------------------------------------------------------------------------


def accelerated(model=None, targets=TARGETS):
    model = peft.get_peft_model(
        Network() if model is None else model,
        peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False),
    )
    return model, accelerate(model)


NAME = "base_model.model.head"


@pytest.mark.parametrize("forwards", [1, 3])
def test_the_report_says_that_a_layer_is_not_called(forwards, alarms):
    model, report = accelerated()
    assert len(report.fast) == 3 and not report.uncalled
    for _ in range(forwards):
        model(X, "read")
    report.refresh()
    assert set(report.uncalled) == {NAME} and NAME not in report.fast
    assert "Network.forward" in report.uncalled[NAME] and len(alarms()) == (forwards > 1)
    assert "2 of 3 LoRA layers take the fused forward" in str(report)
    assert "Network.forward" in str(report) and "1 not called" in repr(report)


def test_the_report_of_a_layer_that_is_called_again():
    model, report = accelerated()
    with pytest.warns(UserWarning, match=PASSED_BY):
        for head in ("called", "read", "read"):
            model(X, head)
    assert set(report.refresh().uncalled) == {NAME}
    model(X)
    report.refresh()
    assert not report.uncalled and NAME in report.fast
    assert "Network.forward" in report.notes[NAME]


@pytest.mark.parametrize("head", ["called", "called, then read", "shape"])
def test_the_report_of_ordinary_reads(head, alarms):
    model, report = accelerated()
    for _ in range(3):
        model(X, head)
    report.refresh()
    assert not alarms() and not report.uncalled and not report.notes and len(report.fast) == 3


@pytest.mark.parametrize("state", ["merged", "disabled"])
def test_reads_where_peft_adapts_nothing(state, alarms):
    model, report = accelerated()
    if state == "merged":
        model.merge_adapter()
    else:
        model.base_model.disable_adapter_layers()
    for _ in range(3):
        model(X, "read")
    assert not alarms() and not report.refresh().uncalled


def test_the_encoder_of_torch_in_peft(alarms):
    encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model, report = accelerated(encoder, ["linear1", "linear2"])
    assert len(report.fast) == 2 and "TransformerEncoderLayer" in str(report)
    x = torch.randn(2, 3, 16)
    model.train()(x).sum().backward()
    assert not report.refresh().uncalled
    with torch.no_grad():
        model.eval()(x)
    assert len(report.refresh().uncalled) == 2 and len(alarms()) == 2
    model.train()(x)
    assert len(report.refresh().fast) == 2


def test_the_report_knows_layers_that_are_never_called():
    _, report = accelerated(wavlm(), ["q_proj", "gru_rel_pos_linear"])
    assert set(report.uncalled.values()) == {"WavLMAttention"} and len(report.fast) == 1


def test_undo_and_copies(alarms):
    model, report = accelerated()
    model(X, "read")
    copied = copy.deepcopy(model)
    assert not accelerate(copied).uncalled
    report.undo()
    report.refresh()
    assert not report.uncalled and len(report.delegated) == 3
    for _ in range(3):
        model(X, "read")  # PEFT's own layers have the same defect, and say nothing
    assert not alarms()


def test_peft_reads_nothing(tmp_path, monkeypatch):
    """Merging, DoRA, PiSSA, delta weights, saving: nothing of PEFT's reads the layer's weight."""
    from lora_kernels.integrations.peft import layers as peft_layers

    reads = []
    monkeypatch.setattr(peft_layers, "note_read", reads.append)
    model, _ = accelerated()
    for name, options in {"d": {"use_dora": True}, "p": {"init_lora_weights": "pissa"}}.items():
        model.add_adapter(name, peft.LoraConfig(r=2, target_modules=TARGETS, **options))
        model.set_adapter(name)
        model(X).sum().backward()
        model.merge_adapter()
        model.unmerge_adapter()
    model.base_model.model.head.get_delta_weight("default")
    model.save_pretrained(tmp_path)
    model.delete_adapter("p")
    model.merge_and_unload()
    assert not reads


# --- models of transformers ---------------------------------------------------------------------


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4,
        pad_token_id=0, decoder_start_token_id=0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5ForConditionalGeneration(config), {}


def whisper():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, num_mel_bins=8,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, max_source_positions=10, max_target_positions=20, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config), {"input_features": torch.randn(2, 8, 20)}


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, pad_token_id=0,
    )  # fmt: skip
    return MixtralForCausalLM(config), {}


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, max_position_embeddings=40, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration(config), {}


def gemma3n():
    """A model that reads the weight of linears which it calls, as data."""
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    config = Gemma3nTextConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, laurel_rank=2, pad_token_id=0,
        vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=4,
        num_kv_shared_layers=0, layer_types=["full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 2,
    )  # fmt: skip
    return Gemma3nForCausalLM(config), {}


MODELS = {
    "llama": lambda: (llama(torch.float32), {}),
    "t5": t5,
    "whisper": whisper,
    "mixtral": mixtral,
    "bart": bart,
    "gemma3n": gemma3n,
}
TOKENS = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(5))


def run(model: nn.Module, options) -> None:
    """A training step, a look at the model, and generation with a cache, twice."""
    inputs = options or {"input_ids": TOKENS}
    for _ in range(2):
        model.train()(**inputs, labels=TOKENS).loss.backward()
        model.eval()
        model.num_parameters(), model.get_memory_footprint()
        with torch.no_grad():
            model.generate(**inputs, max_new_tokens=4, do_sample=False)
            model.generate(**inputs, max_new_tokens=3, num_beams=2)


@pytest.mark.parametrize("how", ["modules", "route", "accelerate"])
@pytest.mark.parametrize("case", MODELS)
def test_no_false_alarm_in(case, how, alarms):
    torch.manual_seed(0)
    model, options = MODELS[case]()
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head" and "experts" not in name
    ]
    if how == "accelerate":
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=linears))
        report = accelerate(model)
        run(model.base_model.model, options)
        assert not report.refresh().uncalled and len(report.fast) == len(linears)
        assert any(isinstance(module, Linear) for module in model.modules())
    elif how == "route":
        routed = route(model)
        routed.add("a", rank=2, alpha=3, target_modules=linears)
        with routed.adapters("a"):
            run(model, options)
    else:
        for name in linears:
            layer = LoRALinear.from_linear(model.get_submodule(name), 2)
            model.set_submodule(name, layer)
        model.tie_weights()
        run(model, options)
    assert not alarms()
