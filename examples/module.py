"""You fine-tune without PEFT: swap a layer of your own model, train it, keep its adapter."""

import torch
from torch import nn

from lora_kernels import LoRALinear

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
frozen = model[0].weight.detach().clone()
x, target = torch.randn(128, 32), torch.randn(128, 8)

model.requires_grad_(False)
for index in (0, 2):
    model[index] = LoRALinear.from_linear(model[index], rank=4, alpha=8, dropout_p=0.05)
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
print(f"{sum(p.numel() for p in trained)} of {sum(p.numel() for p in model.parameters())} trained")

optimizer = torch.optim.AdamW(trained, lr=1e-2)
losses = []
for _ in range(20):
    loss = (model(x) - target).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0] and torch.equal(model[0].base_layer.weight, frozen)

other = LoRALinear.from_linear(model[0].base_layer, rank=4, alpha=8)
other.load_adapter(model[0].adapter_state_dict())  # the adapter alone: PEFT's names
model.eval(), other.eval()
assert torch.equal(other(x), model[0](x))
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; the frozen weight is what it was")
