"""What users do with PEFT models, accelerated: losses, gradients and parameters are plain PEFT's.

Tiny models with random weights; adapters and steps are small, so that no network multiplies what a
layer has rounded.
"""

import copy
from collections.abc import Callable

import peft
import pytest
import torch
import transformers
from peft_models import assert_parity, lora_layers, with_defined_dropout
from torch import Tensor, nn

import lora_kernels
from lora_kernels.integrations.peft.layers import delegated_calls

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

VOCABULARY, PAD, LABELS = 61, 0, 3
GENERATOR = torch.Generator().manual_seed(4)
TOKENS = torch.randint(1, VOCABULARY, (8, 12), generator=GENERATOR)
CLASSES = torch.randint(0, LABELS, (8,), generator=GENERATOR)
ONE = torch.tensor(1.0)

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": PAD,
}


def llama(kind: type = transformers.LlamaForCausalLM, **settings) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=2, attn_implementation="eager", num_labels=LABELS, **settings
    )
    return randomised(kind(config), "bias")


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **SIZES, num_labels=LABELS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return randomised(transformers.BertForSequenceClassification(config), "bias")


def gptj() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPTJConfig(
        vocab_size=VOCABULARY, n_positions=64, n_embd=48, n_layer=2, n_head=4, rotary_dim=6,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return randomised(transformers.GPTJForCausalLM(config), "bias")


def with_lora(base: nn.Module, **settings) -> nn.Module:
    settings = {"r": 4, "lora_alpha": 6} | settings
    return randomised(peft.get_peft_model(base, peft.LoraConfig(**settings)))


def randomised(model: nn.Module, names: str = "lora_") -> nn.Module:
    """The model with small signed values in parameters of such names, which start at zero."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if names in name:
            parameter.data.normal_(0.0, 0.05, generator=generator)
    return model


def accelerated(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    report = lora_kernels.accelerate(model)
    assert report.fast and not report.delegated, str(report)
    return model


def assert_all_calls_were_fused(model: nn.Module) -> None:
    assert not any(delegated_calls(layer) for layer in lora_layers(model).values())


def results(model: nn.Module, losses: list[Tensor], like: Tensor) -> dict[str, Tensor]:
    """What training has left. Whole vectors: a network carries one layer's rounding to others."""
    assert_all_calls_were_fused(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == trained.keys()
    return {
        # transformers computes the loss in fp32, whatever the model's dtype.
        "losses": torch.stack(losses).detach().to(like.dtype),
        "parameters": flat(trained.values()),
        "gradients": flat(gradients.values()),
    }


def flat(tensors) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def trains(*batches: dict, accumulate: int = 1, steps: int = 3) -> Callable:
    """For `assert_parity`: steps of SGD, each over so many batches."""

    def compute(model: nn.Module, like: Tensor) -> dict[str, Tensor]:
        model = copy.deepcopy(model).train()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trainable, lr=0.01, momentum=0.9)
        torch.manual_seed(2)
        losses = []
        for step in range(steps):
            optimizer.zero_grad()
            for part in range(accumulate):
                loss = model(**batches[(step * accumulate + part) % len(batches)]).loss
                (loss / accumulate).backward()
                losses.append(loss)
            optimizer.step()
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad != torch.equal(parameter, before[name]), name
        return results(model, losses, like)

    return compute


LANGUAGE = {"input_ids": TOKENS, "labels": TOKENS}


# --- gradient accumulation -------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.2}, {"use_dora": True}], ids=str)
def test_gradient_accumulation(settings):
    plain = with_lora(llama(), target_modules="all-linear", **settings)
    parts = [{"input_ids": part, "labels": part} for part in TOKENS.split([1, 3, 2, 2])]
    compute = trains(*parts, accumulate=4)
    assert_parity(accelerated(plain), with_defined_dropout(plain), ONE, compute)


def by_trainer(model: nn.Module, folder, like: Tensor, rows: list[dict], **settings):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=3, optim="sgd", learning_rate=0.01, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=3, **settings,
    )  # fmt: skip
    model = copy.deepcopy(model)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert_all_calls_were_fused(model)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    parameters = flat(p for p in model.parameters() if p.requires_grad)
    return {"losses": torch.tensor(losses, dtype=like.dtype), "parameters": parameters}


def test_gradient_accumulation_by_the_trainer(tmp_path):
    """Its loss is divided by the tokens of all the batches of a step."""
    plain = with_lora(llama(), target_modules="all-linear")
    labels = TOKENS.masked_fill(TOKENS % 3 == 0, -100)  # another number of tokens in each
    rows = [{"input_ids": i, "labels": j} for i, j in zip(TOKENS, labels, strict=True)]
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}

    def compute(model: nn.Module, like: Tensor) -> dict[str, Tensor]:
        return by_trainer(model, tmp_path, like, rows, **split)

    assert_parity(accelerated(plain), plain, ONE, compute)


# --- prompt learning over LoRA ---------------------------------------------------------------

PROMPTS = {
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=20
    ),
    "prefix tuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("trains_lora", [False, True], ids=["frozen lora", "both trained"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_learning_over_lora(prompt, trains_lora):
    """PEFT puts no two kinds in one model: LoRA is injected, and a prompt wrapped around."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])
    base = peft.inject_adapter_in_model(config, llama())
    plain = peft.get_peft_model(base, copy.deepcopy(PROMPTS[prompt]))
    randomised(plain)
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(trains_lora)
    fast = accelerated(plain)
    assert_parity(fast, plain, ONE, trains(LANGUAGE))
    settings = {"max_new_tokens": 6, "do_sample": False}
    expected = plain.eval().generate(input_ids=TOKENS, **settings)
    assert torch.equal(fast.eval().generate(input_ids=TOKENS, **settings), expected)


# --- architectures and tasks -----------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.2}, {"use_dora": True}], ids=str)
def test_gptj(settings):
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"]
    plain = with_lora(gptj(), target_modules=targets, task_type="CAUSAL_LM", **settings)
    fast = accelerated(plain)
    assert_parity(fast, with_defined_dropout(plain), ONE, trains(LANGUAGE))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    expected = plain.eval().generate(input_ids=TOKENS, **settings)
    assert torch.equal(fast.eval().generate(input_ids=TOKENS, **settings), expected)


CLASSIFIERS = {
    "llama": (lambda: llama(transformers.LlamaForSequenceClassification), "score"),
    "bert": (bert, "classifier"),
}


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_sequence_classification_with_modules_to_save(kind, tmp_path):
    """The head is trained whole beside the adapters, and saved and loaded with them."""
    make, head = CLASSIFIERS[kind]
    targets = ["q_proj", "v_proj"] if kind == "llama" else ["query", "value", "dense"]
    plain = with_lora(make(), task_type="SEQ_CLS", target_modules=targets, modules_to_save=[head])
    names = [n for n, p in plain.named_parameters() if p.requires_grad and head in n]
    assert names and all("modules_to_save" in name for name in names)
    padded = TOKENS.masked_fill(torch.arange(12) >= 7, PAD)
    batch = {"input_ids": padded, "attention_mask": (padded != PAD).long(), "labels": CLASSES}
    fast = accelerated(plain)
    assert_parity(fast, plain, ONE, trains(batch))

    fast.eval().save_pretrained(tmp_path)
    loaded = accelerated(peft.PeftModel.from_pretrained(make(), tmp_path).eval())
    assert torch.equal(loaded(**batch).logits, fast(**batch).logits)


# --- which layers, which biases --------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, [0, 2]], ids=str)
@pytest.mark.parametrize("pattern", [None, "layers", ["blocks", "layers"]], ids=str)
def test_layers_to_transform(layers, pattern):
    plain = with_lora(
        llama(), target_modules=["q_proj", "up_proj"], layers_to_transform=layers,
        layers_pattern=pattern,
    )  # fmt: skip
    fast = copy.deepcopy(plain)
    report = lora_kernels.accelerate(fast)
    wanted = [layers] if isinstance(layers, int) else layers
    assert not report.delegated
    assert sorted(report.fast) == [
        f"base_model.model.model.layers.{index}.{module}"
        for index in wanted
        for module in ("mlp.up_proj", "self_attn.q_proj")
    ]
    assert_parity(fast, plain, ONE, trains(LANGUAGE))


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("kind", ["llama", "gptj"])
def test_trained_biases(kind, bias, dropout_p):
    """Biases of the base model are trained: all, or those of the layers with adapters."""
    base = llama(attention_bias=True) if kind == "llama" else gptj()
    targets = ["q_proj", "o_proj"] if kind == "llama" else ["q_proj", "fc_in"]
    plain = with_lora(base, target_modules=targets, bias=bias, lora_dropout=dropout_p)
    biases = [n for n, p in plain.named_parameters() if n.endswith("bias") and p.requires_grad]
    in_lora_layers = [name for name in biases if "base_layer" in name]
    assert in_lora_layers and (biases == in_lora_layers) == (bias == "lora_only")
    compute = trains(LANGUAGE)
    assert_parity(accelerated(plain), with_defined_dropout(plain), ONE, compute)
