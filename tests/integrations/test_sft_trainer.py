"""TRL's SFTTrainer over an accelerated model: losses and parameters are plain PEFT's."""

import copy

import datasets
import peft
import pytest
import torch
import transformers
import trl
from peft_models import assert_parity, lora_layers, with_defined_dropout
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

import lora_kernels
from lora_kernels.integrations.peft.layers import delegated_calls

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

WORDS = [f"w{number}" for number in range(57)]
SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
LORA = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
DROPOUT = peft.LoraConfig(
    r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], lora_dropout=0.2,
    task_type="CAUSAL_LM",
)  # fmt: skip


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A token for each word."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL.values(), *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **SPECIAL)


def sentence(length: int, generator: torch.Generator) -> str:
    numbers = torch.randint(0, len(WORDS), (length,), generator=generator)
    return " ".join(WORDS[number] for number in numbers)


def rows(kind: str):
    """Twelve texts, or prompts with completions, of 2 to 9 words each."""
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(2, 10, (12, 2), generator=generator).tolist()
    texts = [[sentence(length, generator) for length in pair] for pair in lengths]
    if kind == "text":
        return datasets.Dataset.from_list([{"text": " ".join(pair)} for pair in texts])
    # The space belongs to the completion: words are split at it.
    return datasets.Dataset.from_list([{"prompt": p, "completion": f" {c}"} for p, c in texts])


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS) + len(SPECIAL), hidden_size=48, intermediate_size=80,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
        bos_token_id=None, eos_token_id=1, attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def lora_model(config: peft.LoraConfig) -> nn.Module:
    model = peft.get_peft_model(llama(), copy.deepcopy(config))
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.05, generator=generator)
    return model


def sft(model: nn.Module, folder, kind: str, peft_config=None, **settings):
    arguments = trl.SFTConfig(
        output_dir=str(folder), max_steps=3, optim="sgd", learning_rate=0.01, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, seed=3,
        per_device_train_batch_size=2, **settings,
    )  # fmt: skip
    return trl.SFTTrainer(
        model=model, args=arguments, train_dataset=rows(kind), processing_class=tokenizer(),
        peft_config=peft_config,
    )  # fmt: skip


def results(trainer, like: Tensor) -> dict[str, Tensor]:
    trainer.train()
    layers = lora_layers(trainer.model)
    assert layers and not any(delegated_calls(layer) for layer in layers.values())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    parameters = [p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]
    return {"losses": torch.tensor(losses, dtype=like.dtype), "parameters": torch.cat(parameters)}


WORKFLOWS = {
    "texts": ("text", {}),
    "packed": ("text", {"packing": True, "max_length": 16}),
    "packed and wrapped": (
        "text",
        {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
    ),
    "completion only": ("prompts", {"completion_only_loss": True}),
    "whole loss": ("prompts", {"completion_only_loss": False}),
    "completions, packed": (
        "prompts",
        {"completion_only_loss": True, "packing": True, "max_length": 24},
    ),
    "accumulated": ("prompts", {"gradient_accumulation_steps": 2}),
    "not checkpointed": ("text", {"gradient_checkpointing": False}),
}


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_sft(workflow, tmp_path):
    kind, settings = WORKFLOWS[workflow]
    plain = lora_model(DROPOUT if "packed" in workflow else LORA)
    fast = copy.deepcopy(plain)
    assert not lora_kernels.accelerate(fast).delegated

    def compute(model: nn.Module, like: Tensor) -> dict[str, Tensor]:
        return results(sft(copy.deepcopy(model), tmp_path, kind, **settings), like)

    assert_parity(fast, with_defined_dropout(plain), torch.tensor(1.0), compute)


def test_completion_only_loss_is_of_the_completions(tmp_path):
    """What the comparison stands on: the two losses differ, and packing keeps the mask."""
    losses, trained = {}, {}
    for only in (True, False):
        for packing in (True, False):
            model = lora_model(LORA)
            lora_kernels.accelerate(model)
            settings = {"packing": packing, "max_length": 64, "completion_only_loss": only}
            trainer = sft(model, tmp_path, "prompts", **settings)
            labels = [batch["labels"] for batch in trainer.get_train_dataloader()]
            trained[only, packing] = sum((part != -100).sum().item() for part in labels)
            losses[only, packing] = results(trainer, torch.tensor(1.0))["losses"]
    for packing in (True, False):
        assert not torch.allclose(losses[True, packing], losses[False, packing])
        assert trained[True, packing] < 0.75 * trained[False, packing]
    assert trained[True, True] == trained[True, False]


def test_accelerate_the_model_that_the_trainer_has_wrapped(tmp_path):
    """With ``peft_config`` the trainer makes the PEFT model itself."""

    def compute(fast: bool) -> dict[str, Tensor]:
        trainer = sft(llama(), tmp_path, "text", peft_config=copy.deepcopy(LORA))
        if fast:
            assert len(lora_kernels.accelerate(trainer.model).fast) == 14
        return results(trainer, torch.tensor(1.0))

    ours, theirs = compute(True), compute(False)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-6)
