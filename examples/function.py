"""You write an engine: the operation itself, against the formula as one writes it."""

import torch
from torch.nn.functional import linear

from lora_kernels import explain, lora_linear

torch.manual_seed(0)
x = torch.randn(6, 40, 96, requires_grad=True)  # any leading dimensions
weight, bias = torch.randn(80, 96) / 10, torch.randn(80)
lora_a = (torch.randn(8, 96) / 10).requires_grad_()
lora_b = (torch.randn(80, 8) / 10).requires_grad_()
scaling = 2.0

print(explain(x, weight, lora_a, lora_b, scaling, bias))  # which backend, and why

y = lora_linear(x, weight, lora_a, lora_b, scaling, bias)
grads = torch.autograd.grad(y.square().sum(), (x, lora_a, lora_b))

plain = linear(x, weight, bias) + scaling * (x @ lora_a.t() @ lora_b.t())
torch.testing.assert_close(y, plain)
expected = torch.autograd.grad(plain.square().sum(), (x, lora_a, lora_b))
torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-4)

# The adapter's contribution alone, and a mask that a seed says.
delta = lora_linear(x, None, lora_a, lora_b, scaling)
torch.testing.assert_close(linear(x, weight, bias) + delta, y)
seed = torch.tensor(7)
dropped = [lora_linear(x, weight, lora_a, lora_b, 2.0, dropout_p=0.1, seed=seed) for _ in range(2)]
assert torch.equal(*dropped)
print("output and gradients are the formula's; the same seed draws the same mask")
