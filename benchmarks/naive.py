"""LoRA as one writes it: the formula, under plain autograd."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def naive_linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    lora_a: Tensor,  # [R, K]
    lora_b: Tensor,  # [N, R]
    scaling: float,
    dropout_p: float,
    bias: Tensor | None = None,  # [N]
) -> Tensor:  # [..., N]
    dropped = F.dropout(x, dropout_p)
    return F.linear(x, weight, bias) + (dropped @ lora_a.t() @ lora_b.t()) * scaling


def naive_fp32_linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    lora_a: Tensor,  # [R, K], fp32
    lora_b: Tensor,  # [N, R], fp32
    scaling: float,
    dropout_p: float,
) -> Tensor:  # [..., N]
    """PEFT's default arithmetic without PEFT: x goes to the fp32 adapters as an fp32 copy."""
    h = F.linear(F.dropout(x.to(lora_a.dtype), dropout_p), lora_a)  # [..., R]
    return (F.linear(x, weight) + scaling * F.linear(h, lora_b)).to(x.dtype)


class NaiveLinear(nn.Module):
    """In place of a frozen ``nn.Linear``; the factors have its dtype."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout_p: float) -> None:
        super().__init__()
        self.linear, self.scaling, self.dropout_p = linear, alpha / rank, dropout_p
        like = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(linear.out_features, rank, **like))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, p = self.linear.weight, self.linear.bias, self.dropout_p
        return naive_linear(x, weight, self.lora_A, self.lora_B, self.scaling, p, bias)
