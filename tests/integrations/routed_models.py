"""A small Llama and PEFT adapters for it: all weights random, always the same."""

import copy

import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_kernels import route

VOCABULARY, PAD = 61, 0
CONFIGS = {
    "one": {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]},
    "two": {
        "r": 5,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": "all-linear",
        "rank_pattern": {"down_proj": 2, r"layers\.0\.self_attn\.q_proj": 9},
    },
    "last": {"r": 1, "lora_alpha": 2, "target_modules": ["o_proj", "lm_head"]},
}
NAMES = ["two", "__base__", "last", "one", "two"]


def llama(dtype=torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=PAD,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def peft_alone(name: str, base: nn.Module) -> nn.Module:
    """The base model with that adapter by PEFT, random but always the same."""
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**CONFIGS[name]))
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            value = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.data.copy_(value)
    return model.eval()


def routed_with(files, *names: str, model=None, **options):
    routed = route(llama() if model is None else model)
    for name in names or CONFIGS:
        routed.load(name, files / name, **options)
    return routed


def alone(name: str) -> nn.Module:
    return llama() if name == "__base__" else peft_alone(name, llama())


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(5))


def assert_rows(ours, names, ids) -> None:
    """Logits of a model against those of each row's adapter alone."""
    for row, name in enumerate(names):
        torch.testing.assert_close(ours[row], alone(name)(ids[row : row + 1]).logits[0])


def written(model, ids, **settings):
    settings = {"do_sample": False, "max_new_tokens": 6, **settings}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)


def routed_toy(model, *targets, **options):
    """Two adapters that matter, "one" and "two"."""
    routed = route(model, **options)
    for name in ("one", "two"):
        routed.add(name, rank=2, alpha=2, target_modules=list(targets), init_lora_weights=False)
    return routed
