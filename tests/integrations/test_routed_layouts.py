"""Batches on another axis, packed, flattened or computed again: right, or refused."""

import copy

import pytest
import torch
import transformers
from routed_models import (
    NAMES,
    PAD,
    VOCABULARY,
    alone,
    assert_rows,
    routed_toy,
    routed_with,
    tokens,
    written,
)
from torch import nn

from lora_kernels import Routing, route

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`", "ignore:.*gradient_checkpointing.*:FutureWarning"
)

# --- which axis, which tokens -----------------------------------------------------------------


@torch.no_grad()
def test_as_many_tokens_as_rows(files):
    routed = routed_with(files)
    ids = tokens(5, 5)
    with routed.adapters(NAMES):
        assert_rows(routed.model(ids).logits, NAMES, ids)


@torch.no_grad()
def test_packed_sequences(files):
    """Two sequences in one row, their positions apart: names cannot tell, a routing can."""
    routed = routed_with(files)
    model = routed.model
    lengths, names = [3, 4], ["two", "one"]
    parts = [tokens(1, length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    first = torch.arange(7) < 3
    mask = (first[:, None] == first).tril()[None, None]
    call = {"position_ids": positions, "attention_mask": mask}
    for split in (names, [*names, "__base__"]):
        with routed.adapters(split), pytest.raises(ValueError, match=r"pass .* a Routing over the"):
            model(torch.cat(parts, 1), **call)
    with routed.adapters(Routing.from_sequences(names, lengths, routed.slots)):
        packed = model(torch.cat(parts, 1), **call).logits[0]
    for ours, part, name in zip(packed.split(lengths), parts, names, strict=True):
        torch.testing.assert_close(ours, alone(name)(part).logits[0])


class Unpads(nn.Module):
    """Cuts padding out between two layers, as models for attention over packed tokens do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, lengths):
        h = self.first(x)
        return self.second(
            torch.cat([row[:length] for row, length in zip(h, lengths, strict=True)])
        )


@torch.no_grad()
def test_padding_cut_out_of_a_later_batch():
    """What is left of it is as many tokens as an earlier batch had, or as many as rows may be."""
    routed = routed_toy(Unpads(), "first", "second")
    model = routed.model
    x = torch.randn(2, 5, 6)
    with routed.adapters(["one", "two"], beams=3):
        whole = model(x[:, :3], [3, 3])
        for lengths in ([2, 4], [1, 5], [5, 2]):
            with pytest.raises(ValueError, match="expected the tokens of 2 or 6 rows"):
                model(x, lengths)
        torch.testing.assert_close(model(x[:, :3], [3, 3]), whole)
    for row, name in enumerate(["one", "two"]):
        own = slice(row * 3, row * 3 + 3)
        with routed.adapters(name):
            torch.testing.assert_close(model(x[:, :3], [3, 3])[own], whole[own])


class SequenceFirst(nn.Module):
    def __init__(self, flatten: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.flatten = flatten

    def forward(self, x):  # [T, B, 6]
        h = self.first(x)
        if self.flatten:
            return self.second(h.flatten(0, 1)).view(x.shape)
        return self.second(h)


@torch.no_grad()
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_the_batch_on_another_axis(length, flatten):
    x = torch.randn(length, 3, 6)
    names = ["one", "two", "__base__"]
    routed = routed_toy(SequenceFirst(flatten), "first", "second", batch_dim=1)
    with routed.adapters(names):
        ours = routed.model(x)
    for row, name in enumerate(names):
        with routed.adapters(name):
            torch.testing.assert_close(ours[:, row], routed.model(x)[:, row])
    if length == 3:
        return
    routed = routed_toy(SequenceFirst(flatten), "first", "second")
    with routed.adapters(names), pytest.raises(ValueError, match="batch_dim"):
        routed.model(x)
    with routed.adapters(names, beams=2), pytest.raises(ValueError, match="batch_dim"):
        routed.model(x)


def test_batch_dim_is_that_of_the_model():
    routed = routed_toy(SequenceFirst(), "first", batch_dim=1)
    with pytest.raises(ValueError, match="batch_dim: the model is routed with 1, got 0"):
        route(routed.model)
    assert route(copy.deepcopy(routed.model), batch_dim=1).names == ["one", "two"]
    with pytest.raises(ValueError, match="batch_dim: expected 0 or 1, got 2"):
        route(SequenceFirst(), batch_dim=2)


# --- experts, and activations that are computed again -----------------------------------------


def moe():
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=20,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        initializer_range=0.3,
        pad_token_id=PAD,
        eos_token_id=None,
        bos_token_id=None,
    )
    return transformers.Qwen2MoeForCausalLM(config).eval()


SHARED = ["q_proj", "shared_expert.gate_proj", "shared_expert.down_proj", "shared_expert_gate"]


@torch.no_grad()
def test_layers_beside_sparse_experts():
    """They take all tokens of the batch, one after the other."""
    routed = routed_toy(moe(), *SHARED)
    names, ids = ["two", "__base__", "one"], tokens(3, 3)
    with routed.adapters(names):
        ours = routed.model(ids).logits
        beams = written(routed.model, ids, num_beams=3)
    for row, name in enumerate(names):
        with routed.adapters(name):
            torch.testing.assert_close(ours[row], routed.model(ids).logits[row])
            assert torch.equal(beams[row], written(routed.model, ids, num_beams=3)[row])
    layer = routed.model.model.layers[0].mlp.shared_expert.gate_proj
    flattened = torch.randn(9, 24)
    with routed.adapters(names), pytest.raises(ValueError, match="expected the tokens of 3 rows"):
        layer(flattened)  # in no forward: nobody knows how many tokens a row has


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_flat_activations_that_are_computed_again(use_reentrant):
    names, ids = ["two", "__base__", "one"], tokens(3, 4)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        routed = routed_toy(moe(), *SHARED)
        if checkpointing:
            routed.model.train().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            routed.model.enable_input_require_grads()
        with routed.adapters(names):
            routed.model(ids).logits.square().sum().backward()
        gradients.append([p.grad for n in routed.names for p in routed.parameters_of(n)])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected)
        assert expected.abs().sum() > 0


def test_the_same_shape_with_two_meanings_is_computed_again_with_its_own():
    """Six tokens of two rows, then of the batch repeated: kept activations do not say which, the
    outputs of the model do; where a backward does not begin from them, it raises."""

    class Checkpoints(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.checkpoints = nn.Linear(6, 6), True

        def forward(self, x):
            flat = x.flatten(0, 1)
            if not self.checkpoints:
                return 2 * self.layer(flat)
            return 2 * torch.utils.checkpoint.checkpoint(self.layer, flat, use_reentrant=False)

    routed = routed_toy(Checkpoints(), "layer")
    short, stacked = torch.randn(2, 3, 6, requires_grad=True), torch.randn(6, 1, 6)
    inputs = short, stacked.requires_grad_()

    def gradients(checkpoints: bool) -> list[torch.Tensor]:
        routed.model.checkpoints = checkpoints
        with routed.adapters(["one", "two"], stacked=3):
            losses = [routed.model(short).square().sum(), routed.model(stacked).square().sum()]
            return [torch.autograd.grad(loss, x)[0] for loss, x in zip(losses, inputs, strict=True)]

    for actual, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(actual, expected)

    inside = []
    routed.model.checkpoints = True
    routed.model.layer.register_forward_hook(lambda layer, args, y: inside.append(y))
    with routed.adapters(["one", "two"], stacked=3):
        routed.model(short), routed.model(stacked)
        with pytest.raises(RuntimeError, match="such inputs had different adapters"):
            inside[1].sum().backward()
