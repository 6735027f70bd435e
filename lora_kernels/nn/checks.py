"""What the constructors of the drop-in layers refuse."""

import math
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from lora_kernels.nn.sharded import is_sharded
from lora_kernels.runtime.checks import check_count, is_wrapper
from lora_kernels.runtime.dtypes import FLOATING, accumulator_dtype

_INITIALISATIONS = (True, False, "gaussian")


class LoRAOptions(NamedTuple):
    """How a layer's adapter is made; see :class:`LoRALinear`."""

    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    init_lora_weights: bool | str
    adapter_dtype: torch.dtype | None


def check_adapter(options: LoRAOptions) -> None:
    """Raise for the first hyperparameter that does not fit."""
    alpha = options.alpha
    check_count("rank", options.rank)
    if isinstance(alpha, bool) or not isinstance(alpha, Real):
        raise TypeError(f"alpha: expected a number, got {type(alpha).__name__}")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha: expected a finite number, got {alpha}")
    check_initialisation(options.init_lora_weights)


def check_linear(linear: nn.Linear) -> None:
    """Raise unless it is a ``torch.nn.Linear`` that is called where it is used."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear: expected a torch.nn.Linear, got {type(linear).__name__}")
    if isinstance(linear, NonDynamicallyQuantizableLinear):
        raise TypeError(
            "linear: it belongs to a torch.nn.MultiheadAttention, which reads its weight and never "
            "calls it"
        )


def check_base_layer(name: str, module: nn.Linear | nn.Embedding) -> None:
    """Raise where ``module.weight`` cannot be shared with, or replaced in, a copy of the module."""
    check_base_parameters(name, module)
    if is_sharded(module.weight):
        raise TypeError(
            f"{name}: expected weight to be a plain Parameter, got a DTensor; wrap the layer "
            "before it is sharded"
        )
    if "forward" in vars(module):
        raise ValueError(
            f"{name}: its forward was replaced on the instance, which would bypass the adapter; "
            "remove what replaced it first"
        )


def check_base_parameters(name: str, module: nn.Linear | nn.Embedding) -> None:
    """Raise where the weight is computed, not made yet, or stands for others (but for FSDP's)."""
    if not isinstance(module.weight, nn.Parameter):
        raise TypeError(
            f"{name}: expected weight to be a plain Parameter, got "
            f"{type(module.weight).__name__}; remove its parametrization first"
        )
    if is_lazy(module.weight):
        raise TypeError(f"{name}: expected a weight, got one that its first forward will make")
    for each, parameter in module._parameters.items():
        if parameter is not None and is_wrapper(parameter) and not is_sharded(parameter):
            raise TypeError(
                f"{name}: expected {each} to be a plain Parameter, got a "
                f"{type(parameter).__name__}; base_layer can be quantised after it was wrapped"
            )


def check_initialisation(init_lora_weights: bool | str) -> None:
    if init_lora_weights not in _INITIALISATIONS:
        raise ValueError(
            f"init_lora_weights: expected True, False or 'gaussian', got {init_lora_weights!r}"
        )


def adapter_dtype_over(weight: Tensor, adapter_dtype: torch.dtype | None) -> torch.dtype:
    """What an adapter is kept in: fp32 over a half-precision base unless said otherwise."""
    for name, dtype in (("weight", weight.dtype), ("adapter_dtype", adapter_dtype)):
        if dtype is not None and dtype not in FLOATING:
            raise TypeError(
                f"{name}: expected dtype bfloat16, float16, float32 or float64, got {dtype}"
            )
    return adapter_dtype or accumulator_dtype(weight.dtype)
