"""You train many adapters at once: one batch, one backward, each adapter its own gradient."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lora_kernels

torch.manual_seed(0)
llama = LlamaConfig(
    vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
)
model = LlamaForCausalLM(llama).train()
texts = torch.randint(64, (4, 16))
routed = lora_kernels.route(model)
for name in ("sql", "law", "idle"):
    routed.add(name, rank=8, alpha=16, target_modules="all-linear", dropout_p=0.05)
idle = [parameter.clone() for parameter in routed.parameters_of("idle")]
parameters = [p for name in routed.names for p in routed.parameters_of(name)]
optimizer = torch.optim.AdamW(parameters, lr=1e-2)
losses = []
for _ in range(8):
    with routed.adapters(["sql", "law", "sql", "law"]):  # of the four texts
        loss = model(input_ids=texts, labels=texts).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0]
# An adapter that no batch named has no gradient: neither momentum nor decay has moved it.
assert all(map(torch.equal, idle, routed.parameters_of("idle")))

with tempfile.TemporaryDirectory() as folder:
    routed.save("law", folder)  # PEFT's files
    routed.load("a copy", folder)
    with torch.no_grad(), routed.adapters(["law", "a copy"]):
        first, second = model.eval()(texts[:1].expand(2, -1)).logits
torch.testing.assert_close(first, second)
print(f"{routed}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
