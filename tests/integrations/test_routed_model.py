"""``route(model)``: a different adapter for every sequence, against PEFT one adapter at a time."""

import copy
import threading

import peft
import pytest
import torch
from routed_models import (
    CONFIGS,
    NAMES,
    PAD,
    VOCABULARY,
    alone,
    llama,
    peft_alone,
    routed_with,
    tokens,
)
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from lora_kernels import RoutedLoRALinear, Routing, route
from lora_kernels.files.adapters import read_adapter
from lora_kernels.testing import assert_within_policy

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`", "ignore:.*gradient_checkpointing.*:FutureWarning"
)

# --- serving ---------------------------------------------------------------------------------


@torch.no_grad()
def test_a_mixed_batch_is_each_adapter_alone(files):
    routed = routed_with(files)
    ids = tokens(5, 7)
    with routed.adapters(NAMES):
        logits = routed.model(ids).logits
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(logits[row], alone(name)(ids[row : row + 1]).logits[0])
        with routed.adapters(name):
            torch.testing.assert_close(routed.model(ids).logits[row], logits[row])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_within_the_error_policy(files, dtype):
    model = llama(dtype)
    routed = routed_with(files, model=copy.deepcopy(model))
    # Adapters over half precision are computed in it: PEFT under autocast.
    layer = routed.model.model.layers[0].self_attn.q_proj
    plain = peft_alone("two", model).base_model.model.model.layers[0].self_attn.q_proj
    exact = peft_alone("two", model).double().base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 50, 24, dtype=dtype)
    with routed.adapters("two"), torch.autocast("cpu", dtype, enabled=dtype.itemsize == 2):
        assert layer.bank.dtype == torch.float32
        assert_within_policy("y", layer(x), plain(x), exact.double()(x.double()))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_the_adapter_of_its_sequence(files, side):
    routed = routed_with(files)
    lengths = [3, 7, 1, 5, 6]
    ids = torch.full((5, 7), PAD)
    mask = torch.zeros(5, 7, dtype=torch.int64)
    for row, length in enumerate(lengths):
        part = slice(7 - length, 7) if side == "left" else slice(0, length)
        ids[row, part], mask[row, part] = tokens(5, 7)[row, :length], 1
    with routed.adapters(NAMES):
        logits = routed.model(ids, attention_mask=mask, position_ids=_positions(mask)).logits
    for row, (name, length) in enumerate(zip(NAMES, lengths, strict=True)):
        expected = alone(name)(tokens(5, 7)[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(logits[row][mask[row].bool()], expected)


def _positions(mask):
    return (mask.cumsum(1) - 1).clamp_min(0)


GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "num_return_sequences": 2, "top_k": 1},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("settings", GENERATION.values(), ids=GENERATION)
def test_generate(files, settings):
    routed = routed_with(files)
    settings = {"do_sample": False, "max_new_tokens": 6, **settings}
    prompts, mask = tokens(5, 4), torch.ones(5, 4, dtype=torch.int64)
    prompts[1, :2], mask[1, :2] = PAD, 0  # left-padded
    with routed.adapters(NAMES):
        ours = routed.model.generate(prompts, attention_mask=mask, **settings)
    rows = len(ours) // len(NAMES)
    answers = [alone(name).generate(prompts, attention_mask=mask, **settings) for name in NAMES]
    for row, theirs in enumerate(answers):
        own = slice(row * rows, (row + 1) * rows)
        assert torch.equal(ours[own], theirs[own])
    assert len({tuple(answer[0].tolist()) for answer in answers}) > 2  # the adapters matter


@torch.no_grad()
def test_an_encoder_and_a_decoder(tmp_path):
    """The decoder's rows are the beams', the encoder's are not."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=24,
        d_kv=6,
        d_ff=36,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
        initializer_factor=3.0,
    )
    base = T5ForConditionalGeneration(config).double().eval()
    models = {"__base__": copy.deepcopy(base)}
    for name in ("one", "two"):
        settings = {"r": 3, "lora_alpha": 9, "target_modules": ["q", "v", "wi_0", "wo"]}
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings)).eval()
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.normal_(0, 0.3)
        model.save_pretrained(tmp_path / name)
        models[name] = model
    routed = route(base)
    for name in ("one", "two"):
        routed.load(name, tmp_path / name)
    names, prompts = ["two", "__base__", "one"], tokens(3, 5)
    settings = {"num_beams": 2, "max_new_tokens": 5, "do_sample": False}
    with routed.adapters(names):
        ours = base.generate(input_ids=prompts, **settings)
    for row, name in enumerate(names):
        theirs = models[name].generate(input_ids=prompts, **settings)
        assert torch.equal(ours[row], theirs[row])


@torch.no_grad()
def test_one_routing_serves_all_layers(files, monkeypatch):
    routed = routed_with(files)
    made = []
    from_sequences = Routing.from_sequences
    monkeypatch.setattr(
        Routing,
        "from_sequences",
        lambda *args, **kwargs: (made.append(args[1]), from_sequences(*args, **kwargs))[1],
    )
    with routed.adapters(NAMES):
        routed.model.generate(tokens(5, 4), max_new_tokens=5, do_sample=False)
        routed.model(tokens(5, 4))
    assert made == [4, 1]  # tokens per sequence of the prefill and of a step


@torch.no_grad()
def test_a_routing_of_ones_own_for_packed_sequences(files):
    """Two sequences in one row, kept apart by their positions alone in this model without mask."""
    routed = routed_with(files)
    layer = routed.model.model.layers[0].self_attn.q_proj
    x = torch.randn(1, 7, 24, dtype=torch.float64)
    with routed.adapters(Routing.from_sequences(["one", "two"], [3, 4], routed.slots)):
        packed = layer(x)
    for name, part in (("one", slice(0, 3)), ("two", slice(3, 7))):
        with routed.adapters(name):
            torch.testing.assert_close(packed[:, part], layer(x[:, part]))


@torch.no_grad()
def test_adapters_may_come_and_go_inside(files):
    routed = routed_with(files, "one")
    ids = tokens(2, 3)
    with routed.adapters(["one", "__base__"]):
        before = routed.model(ids).logits
        routed.load("two", files / "two")
        torch.testing.assert_close(routed.model(ids).logits, before)
        for extra in range(70):  # more than there were slots
            routed.add(str(extra), rank=1, alpha=1, target_modules=["k_proj"])
        torch.testing.assert_close(routed.model(ids).logits, before)
        routed.remove("two")
        torch.testing.assert_close(routed.model(ids).logits, before)


# --- training --------------------------------------------------------------------------------


def loss_of(model, ids, labels=None):
    """Summed over the batch, so that batches add up."""
    logits = model(ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def gradients_alone(name, ids):
    """By module, of PEFT training that adapter on its own sequences."""
    model = peft_alone(name, llama())
    loss_of(model, ids).backward()
    return {
        key.removeprefix("base_model.model.").replace(".default.weight", ""): parameter.grad
        for key, parameter in model.named_parameters()
        if "lora_" in key
    }


def gradients_of(routed, name):
    found = {}
    for module, layer in routed.model.named_modules():
        if isinstance(layer, RoutedLoRALinear) and name in layer.bank:
            adapter = layer.bank[name]
            found[f"{module}.lora_A"] = adapter.lora_a.grad
            found[f"{module}.lora_B"] = adapter.lora_b.grad
    return found


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["", "reentrant", "checkpoint"])
def test_gradients_are_those_of_training_alone(files, checkpointing):
    routed = routed_with(files, trainable=True)
    if checkpointing is not None:
        routed.model.train().gradient_checkpointing_enable({"use_reentrant": checkpointing})
        routed.model.enable_input_require_grads()
    ids = tokens(5, 7)
    with routed.adapters(NAMES):
        loss_of(routed.model, ids).backward()
    for name in CONFIGS:
        own = torch.tensor([row for row, each in enumerate(NAMES) if each == name])
        expected = gradients_alone(name, ids[own])
        ours = gradients_of(routed, name)
        assert ours.keys() == expected.keys()
        for key, gradient in expected.items():
            torch.testing.assert_close(ours[key], gradient, msg=f"{name} {key}")
            assert gradient.abs().sum() > 0


def test_each_adapter_has_an_optimizer_of_its_own(files):
    routed = routed_with(files, "one", "two", trainable=True)
    optimizer = torch.optim.AdamW(routed.parameters_of("one"), lr=0.1, weight_decay=0.1)
    before = {name: [p.clone() for p in routed.parameters_of(name)] for name in routed.names}
    ids = tokens(3, 5)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        with routed.adapters(["one", "two", "__base__"]):
            loss = loss_of(routed.model, ids)
        loss.backward()  # nothing is computed again: outside will do
        losses.append(loss.item())
        optimizer.step()
    assert losses[2] < losses[0]
    assert not any(map(torch.equal, before["one"], routed.parameters_of("one")))
    assert all(map(torch.equal, before["two"], routed.parameters_of("two")))
    trainable = {id(p) for p in routed.model.parameters() if p.requires_grad}
    both = routed.parameters_of("one") + routed.parameters_of("two")
    assert trainable == {id(p) for p in both}


def test_loaded_adapters_are_frozen_unless_asked(files):
    routed = routed_with(files, "one")
    assert not any(p.requires_grad for p in routed.model.parameters())
    routed.add("new", rank=2, alpha=2, target_modules=["q_proj"])
    assert all(p.requires_grad for p in routed.parameters_of("new"))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_backward_computes_again_with_the_adapters_of_its_forward(files, use_reentrant):
    routed = routed_with(files, trainable=True)
    routed.model.train()
    routed.model.enable_input_require_grads()
    parameters = [p for name in routed.names for p in routed.parameters_of(name)]

    def gradients(backward) -> list[torch.Tensor | None]:
        for parameter in parameters:
            parameter.grad = None
        with routed.adapters(NAMES):
            loss = loss_of(routed.model, tokens(5, 7))
        backward(loss)
        return [parameter.grad for parameter in parameters]

    def in_another(loss):
        with routed.adapters("one"):
            routed.model(tokens(5, 7))
            loss.backward()

    def in_a_thread(loss):
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()

    expected = gradients(torch.Tensor.backward)
    routed.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for backward in (torch.Tensor.backward, in_another, in_a_thread):
        for actual, wanted in zip(gradients(backward), expected, strict=True):
            assert (actual is None) == (wanted is None)
            if actual is not None:
                torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_one_backward_of_checkpointed_batches(files, use_reentrant):
    """Of the same adapters it is right; of others, which a recomputation cannot tell, it raises."""
    routed = routed_with(files, trainable=True)
    routed.model.train()
    routed.model.enable_input_require_grads()
    handles = [routed.batch(names) for names in (["one", "two"], ["one", "two"], ["two", "one"])]

    def gradients(*pairs) -> list[torch.Tensor]:
        losses = [handle.call(loss_of, routed.model, ids) for handle, ids in pairs]
        parameters = routed.parameters_of("one") + routed.parameters_of("two")
        for parameter in parameters:
            parameter.grad = None
        sum(losses).backward()
        return [parameter.grad for parameter in parameters]

    first, second = tokens(2, 7), tokens(2, 5)
    same = (handles[0], first), (handles[1], second)
    expected = gradients(*same)
    routed.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for actual, wanted in zip(gradients(*same), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    with pytest.raises(RuntimeError, match="batches with different adapters"):
        gradients((handles[0], first), (handles[2], first))


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_checkpoints_inside_of_checkpoints(outer, inner):
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.checkpoints = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), True

        def segment(self, x):
            for layer in self.layers:
                x = self.checkpoint(layer, x, inner).tanh()
            return x

        def checkpoint(self, function, x, use_reentrant):
            if not self.checkpoints:
                return function(x)
            return torch.utils.checkpoint.checkpoint(function, x, use_reentrant=use_reentrant)

        def forward(self, x):
            return self.checkpoint(self.segment, x, outer).square()

    routed = route(Nested())
    for name in ("one", "two"):
        routed.add(name, rank=2, alpha=4, target_modules=["0", "1", "2"], init_lora_weights=False)
    handle, x = routed.batch("one"), torch.randn(4, 6)

    def gradients(elsewhere: bool) -> list[torch.Tensor]:
        inputs = x.clone().requires_grad_()
        loss = handle(inputs).sum()
        if elsewhere:
            with routed.adapters("two"):
                routed.model(x)
                loss.backward()
        else:
            loss.backward()
        found = [inputs.grad, *(p.grad for p in routed.parameters_of("one"))]
        routed.model.zero_grad()
        return found

    routed.model.checkpoints = False
    expected = gradients(False)
    routed.model.checkpoints = True
    for elsewhere in (False, True):
        for actual, wanted in zip(gradients(elsewhere), expected, strict=True):
            torch.testing.assert_close(actual, wanted)


def test_one_backward_of_batches_that_differ_by_a_scaling(files):
    routed = routed_with(files, "one", trainable=True)
    routed.model.train().gradient_checkpointing_enable({"use_reentrant": False})
    routed.model.enable_input_require_grads()
    handle, ids = routed.batch("one"), tokens(2, 7)
    first = handle.call(loss_of, routed.model, ids)
    for layer in routed._layers().values():
        layer.bank["one"].scaling = 3.0
    with pytest.raises(RuntimeError, match="batches with different adapters"):
        (first + handle.call(loss_of, routed.model, ids)).backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("change", ["wider", "removed", "replaced"])
def test_adapters_change_between_a_forward_and_what_its_backward_computes_again(
    files, use_reentrant, change
):
    routed = routed_with(files, trainable=True)
    routed.model.train()
    routed.model.enable_input_require_grads()
    routed.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    handle, ids = routed.batch(["one", "two"]), tokens(2, 7)
    parameters = routed.parameters_of("one") + routed.parameters_of("two")
    for time in ("before", "while"):
        loss = handle.call(loss_of, routed.model, ids)
        if time == "while" and change == "wider":
            routed.add("wide", rank=40, alpha=2, target_modules=["q_proj", "o_proj"])
        elif time == "while" and change == "removed":
            routed.remove("two")
        elif time == "while":
            routed.replace("two", files / "one")
        loss.backward()
        if time == "before":
            expected = [parameter.grad for parameter in parameters]
            for parameter in parameters:
                parameter.grad = None
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_training_after_inference_mode_in_one_choice(files):
    routed = routed_with(files, "one", trainable=True)
    ids = tokens(2, 3)
    with routed.adapters(["one", "__base__"]):
        with torch.inference_mode():
            routed.model(ids)
        loss_of(routed.model, ids).backward()
    assert all(p.grad is not None for p in routed.parameters_of("one"))


def test_dropout_of_each_adapter(tmp_path):
    model = peft.get_peft_model(
        llama(), peft.LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path)
    routed = route(llama())
    routed.load("one", tmp_path)
    routed.add("two", rank=2, alpha=2, target_modules=["q_proj"], init_lora_weights=False)
    bank = routed.model.model.layers[0].self_attn.q_proj.bank
    assert (bank["one"].dropout_p, bank["two"].dropout_p) == (0.5, 0.0)
    assert not bank["one"].training
    routed.model.train()
    assert bank["one"].training
    routed.save("one", tmp_path / "again")
    assert read_adapter(tmp_path / "again").dropout_p == 0.5


def test_layers_that_are_read_and_not_called_are_refused():
    attention = torch.nn.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match=r"out_proj: .*MultiheadAttention reads its weight"):
        route(attention).add("a", rank=2, alpha=4, target_modules=["out_proj"])
    encoder = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ValueError, match=r"linear1: .*TransformerEncoderLayer reads its weight"):
        route(encoder).add("a", rank=2, alpha=4, target_modules=["linear1"])


def test_two_adapters_for_one_layer_in_two_places_are_refused(tmp_path):
    apart = torch.nn.ModuleDict({"first": torch.nn.Linear(8, 8), "second": torch.nn.Linear(8, 8)})
    routed = route(apart)
    routed.add("a", rank=2, alpha=4, target_modules=["first", "second"])
    routed.save("a", tmp_path)
    model = torch.nn.Module()
    model.first = model.second = torch.nn.Linear(8, 8)
    with pytest.raises(ValueError, match="one layer in two places, first and second"):
        route(model).load("a", tmp_path)
    assert type(model.first) is torch.nn.Linear
