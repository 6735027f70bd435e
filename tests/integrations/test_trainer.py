"""A tiny Llama with random weights, through transformers: training, generating, loading again."""

import copy

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft_models import assert_parity, lora_layers, randomise, with_defined_dropout
from torch import Tensor, nn
from transformers.integrations.peft import MIN_PEFT_VERSION

import lora_kernels
from lora_kernels.integrations.peft.layers import delegated_calls
from lora_kernels.testing import assert_as_accurate, assert_within_policy, redrawn_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TOKENS = torch.randint(0, 61, (8, 12), generator=torch.Generator().manual_seed(4))


def llama(**settings) -> nn.Module:
    """Two layers, grouped-query attention, tied embeddings; LoRA on every linear of a block."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        attn_implementation="eager",
        use_cache=False,
    )
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | settings
    config_lora = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), config_lora)
    # So small that the network stays well conditioned: with 0.3 it multiplies a rounding by up to a
    # hundred, and which one is luck.
    randomise(model, 0.1)
    return model


def accelerate_all(model: nn.Module) -> nn.Module:
    report = lora_kernels.accelerate(model)
    assert len(report.fast) == 14 and not report.delegated
    return model


def flat(tensors: list[Tensor]) -> Tensor:
    """All of them as one vector: a network carries the rounding of one layer to the others."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def loss_and_gradients(model: nn.Module, scale: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(2)
    model.zero_grad()
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    (loss * scale).backward()
    # transformers computes norms, softmax and loss in fp32 whatever the model's dtype.
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return {"loss": loss.detach().to(scale.dtype), "gradients": flat(gradients)}


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.25}, {"use_dora": True}], ids=str)
def test_loss_and_gradients(settings):
    """Of seventeen networks, the loss by the policy, the gradients by their typical error."""
    plain = llama(**settings)
    fast, plain = accelerate_all(copy.deepcopy(plain)), with_defined_dropout(plain)
    one = torch.tensor(1.0)
    assert_parity(fast, plain, one, loss_and_gradients)

    def draw(number: int) -> tuple[dict[str, Tensor], ...]:
        ours, theirs = redrawn_model(fast, number), redrawn_model(plain, number)
        exact = loss_and_gradients(copy.deepcopy(theirs).double(), one.double())
        results = loss_and_gradients(ours, one), loss_and_gradients(theirs, one), exact
        relative = (results[1]["gradients"].double() - exact["gradients"]).norm()
        assert relative < 1e-5 * exact["gradients"].norm(), "PEFT computes another function"
        return tuple({"gradients": each["gradients"]} for each in results)

    assert_as_accurate(draw)


def train(model: nn.Module, folder, **settings) -> dict[str, Tensor]:
    """The parameters after six steps with transformers' Trainer; the loss must have fallen."""

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(TOKENS)

        def __getitem__(self, index: int) -> dict:
            return {"input_ids": TOKENS[index], "labels": TOKENS[index]}

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=8,
        optim="sgd",
        learning_rate=0.03,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        **settings,
    )
    model = copy.deepcopy(model)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert not any(delegated_calls(layer) for layer in lora_layers(model).values())
    return {"parameters": flat([p for p in model.parameters() if p.requires_grad])}


def checkpointing(use_reentrant: bool | None) -> dict:
    if use_reentrant is None:
        return {}
    arguments = {"use_reentrant": use_reentrant}
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": arguments}


@pytest.mark.parametrize("use_reentrant", [None, True, False], ids=["off", "reentrant", "not"])
def test_trainer_with_gradient_checkpointing(tmp_path, use_reentrant):
    plain = llama()
    fast = accelerate_all(copy.deepcopy(plain))

    def compute(model: nn.Module, _: Tensor) -> dict[str, Tensor]:
        return train(model, tmp_path, **checkpointing(use_reentrant))

    assert_parity(fast, plain, torch.tensor(1.0), compute)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_dropout_is_replayed(tmp_path, use_reentrant):
    """The recomputed forward draws the masks of the first: the same bits with and without."""
    model = accelerate_all(llama(lora_dropout=0.3))
    expected = train(model, tmp_path)["parameters"]
    ours = train(model, tmp_path, **checkpointing(use_reentrant))["parameters"]
    assert torch.equal(ours, expected)


def test_bf16_trainer(tmp_path):
    """The Trainer's bf16 mode is autocast over fp32 weights."""
    plain = llama()

    def compute(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        return train(model, tmp_path, bf16=x.dtype == torch.float32)

    assert_parity(accelerate_all(copy.deepcopy(plain)), plain, torch.tensor(1.0), compute)


def test_generate_and_load_again(tmp_path):
    plain = llama().eval()
    fast = accelerate_all(copy.deepcopy(plain))
    prompt, settings = TOKENS[:2], {"max_new_tokens": 8, "do_sample": False, "use_cache": True}
    tokens = plain.generate(input_ids=prompt, **settings)
    assert torch.equal(fast.generate(input_ids=prompt, **settings), tokens)

    fast.save_pretrained(tmp_path)
    base = copy.deepcopy(plain).unload()
    loaded = accelerate_all(peft.PeftModel.from_pretrained(base, tmp_path))
    assert torch.equal(loaded.generate(input_ids=prompt, **settings), tokens)
    merged = loaded.merge_and_unload()
    assert not lora_layers(merged)
    assert torch.equal(merged.generate(input_ids=prompt, **settings), tokens)


def test_adapters_tied_to_the_embedding():
    """The head's A and B are transposed views of the embedding's."""
    settings = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    plain, fast = llama(**settings), llama(**settings)
    report = lora_kernels.accelerate(fast)
    assert report.fast == ["base_model.model.lm_head"]
    one = torch.tensor(1.0)
    exact = loss_and_gradients(llama(**settings).double(), one.double())
    ours, theirs = loss_and_gradients(fast, one), loss_and_gradients(plain, one)
    for name, oracle in exact.items():
        assert_within_policy(name, ours[name], theirs[name], oracle)


def test_adapters_added_by_transformers_itself():
    model = llama().unload()
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"])
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):  # a release can ask for one to come
        with pytest.raises(ValueError, match=f"PEFT .* use a version >= {MIN_PEFT_VERSION}"):
            model.add_adapter(config)
        return
    model.add_adapter(config)
    randomise(model)
    expected = model(input_ids=TOKENS).logits
    report = lora_kernels.accelerate(model)
    assert len(report.fast) == 2
    torch.testing.assert_close(model(input_ids=TOKENS).logits, expected)


def test_compiles_without_a_graph_break():
    plain = llama()
    fast = accelerate_all(copy.deepcopy(plain))
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(input_ids=TOKENS).logits, plain(input_ids=TOKENS).logits)
