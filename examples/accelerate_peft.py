"""You fine-tune with PEFT: one line after get_peft_model; the files stay PEFT's."""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import lora_kernels

torch.manual_seed(0)
llama = LlamaConfig(
    vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
)
base = LlamaForCausalLM(llama)
weights = {name: value.clone() for name, value in base.state_dict().items()}
tokens = torch.randint(64, (4, 16))

settings = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear")
model = get_peft_model(base, settings)
report = lora_kernels.accelerate(model)
print(report)
assert not report.delegated

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
for _ in range(8):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {loss.item():.4f}")

with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    model.save_pretrained(folder)
    plain = LlamaForCausalLM(llama)
    plain.load_state_dict(weights)
    plain = PeftModel.from_pretrained(plain, folder)  # PEFT's own forward
    ours, theirs = model.eval()(tokens).logits, plain.eval()(tokens).logits
torch.testing.assert_close(ours, theirs)
print("plain PEFT reads the adapter and gives the same logits")
