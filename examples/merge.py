"""You ship one model: merge an adapter into its weight, and take it out again bit for bit."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import lora_kernels

torch.manual_seed(0)
linear = torch.nn.Linear(96, 80, dtype=torch.bfloat16)
layer = lora_kernels.LoRALinear.from_linear(linear, rank=8, alpha=16)
torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
frozen, x = linear.weight.clone(), torch.randn(5, 96, dtype=torch.bfloat16)
with torch.no_grad():
    unmerged = layer(x)
    layer.merge()  # computed in fp32, rounded once
    torch.testing.assert_close(layer(x), unmerged, rtol=2e-2, atol=2e-2)
    layer.unmerge()  # not a subtraction: the frozen weight was kept
assert torch.equal(layer.base_layer.weight, frozen) and torch.equal(layer(x), unmerged)

# PEFT's own merging works on accelerated layers as before.
llama = LlamaConfig(
    vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
)
model = get_peft_model(LlamaForCausalLM(llama).eval(), LoraConfig(target_modules="all-linear"))
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.1)
lora_kernels.accelerate(model)
tokens = torch.randint(64, (2, 9))
with torch.no_grad():
    adapted = model(tokens).logits
    merged = model.merge_and_unload()  # a plain transformers model
    torch.testing.assert_close(merged(tokens).logits, adapted, rtol=1e-4, atol=1e-4)
assert type(merged) is LlamaForCausalLM
print("merged once, unmerged bit for bit; PEFT's merge_and_unload gives the same logits")
