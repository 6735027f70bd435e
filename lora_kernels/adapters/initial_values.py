"""What a new adapter holds: PEFT's initial values, drawn in PEFT's order."""

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def draw_lora_a_(lora_a: Tensor, init_lora_weights: bool | str) -> None:
    """A ``[R, K]``: Kaiming-uniform, or normal with standard deviation 1/R for "gaussian"."""
    if init_lora_weights == "gaussian":
        nn.init.normal_(lora_a, std=1 / lora_a.shape[0])
    else:
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))


@torch.no_grad()
def draw_lora_b_(lora_b: Tensor, init_lora_weights: bool | str) -> None:
    """B ``[N, R]``: zeros, so that the adapter changes nothing; Kaiming-uniform for False."""
    if init_lora_weights:
        nn.init.zeros_(lora_b)
    else:
        nn.init.kaiming_uniform_(lora_b, a=math.sqrt(5))


@torch.no_grad()
def draw_lora_bias_(bias: Tensor, rank: int, init_lora_weights: bool | str) -> None:
    """B's bias ``[N]``: zeros; uniform as in ``torch.nn.Linear`` for False."""
    if init_lora_weights:
        nn.init.zeros_(bias)
    else:
        nn.init.uniform_(bias, -1 / math.sqrt(rank), 1 / math.sqrt(rank))
