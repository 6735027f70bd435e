"""Our forward inside PEFT's LoRA layer, chosen anew at every call.

`Linear` carries the name of the PEFT class that it extends, so that repr, pickles and anything that
looks at `type(layer).__name__` see what they saw before.

Dimensions: K in_features, N out_features.
"""

from __future__ import annotations

import weakref
from collections import Counter
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention
from torch import Tensor

from lora_kernels.adapters.factors import LoRAFactors
from lora_kernels.base_weights import DenseWeight
from lora_kernels.integrations.peft.state import (
    ActiveAdapter,
    LayerState,
    MixedState,
    read_call,
    read_layer,
    read_ordinary,
)
from lora_kernels.nn.weight_reads import forget, note_call, note_read
from lora_kernels.ops.linear import adapted_linear, remember
from lora_kernels.ops.norm import lora_weight_norm
from lora_kernels.ops.routed.unpacked import routed_linear_unpacked
from lora_kernels.runtime.dtypes import accumulator_dtype

__all__ = [
    "Linear",
    "LoraLayer",
    "MultiheadAttention",
    "PeftLinear",
    "delegated_calls",
    "forget_calls",
    "fused_forward",
    "mixed_forward",
    "read_layer",
]

# How often, and why, PEFT's own forward served an accelerated layer. Kept apart from the layers, so
# that nothing of ours is copied, pickled or saved with them.
_delegated_calls: weakref.WeakKeyDictionary[torch.nn.Module, Counter[str]] = (
    weakref.WeakKeyDictionary()
)


if TYPE_CHECKING:

    class Children(torch.nn.Module):
        """A module of PEFT's: none of its children is None, as torch's stub allows for."""

        _modules: dict[str, Children]


class Linear(PeftLinear):
    """PEFT's `lora.Linear`, whose forward is `lora_linear` wherever that is the same function, and
    `routed_lora_linear` where a batch names an adapter per sequence (`adapter_names`)."""

    _modules: dict[str, Children]
    _backend = "auto"  # of the calls of this layer

    @property
    def weight(self) -> Tensor:
        """PEFT's: the base layer's. Computing with it passes the adapters by, with a warning."""
        if not self._disable_adapters and not self.merged_adapters:
            note_read(self)
        return super().weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged_adapters:  # there is nothing to fuse
            return super().forward(x, *args, **kwargs)
        note_call(self)
        ordinary = None if args or kwargs else read_ordinary(self)
        backend = self._backend
        if ordinary is not None:
            y = adapted_linear(x, *ordinary[:4], known_as=ordinary.known_as, backend=backend)
            if y is not None:
                return y
        state = read_call(self, x, args, kwargs)
        if isinstance(state, str):
            if not torch.compiler.is_compiling():
                _delegated_calls.setdefault(self, Counter())[state] += 1
            return super().forward(x, *args, **kwargs)
        if state is None:
            return super().forward(x, *args, **kwargs)
        if isinstance(state, MixedState):
            self._check_forward_args(x, adapter_names=state.names)
            return mixed_forward(x, state, backend)
        y = fused_forward(x, state, backend)
        if ordinary is not None and not torch.compiler.is_compiling():
            remember(x, *ordinary, backend)
        return y


def delegated_calls(layer: torch.nn.Module) -> dict[str, int]:
    """How many calls of the layer PEFT's own forward has served, by reason; compiled ones aside."""
    return dict(_delegated_calls.get(layer, ()))


def take_backend(layer: Linear, backend: str) -> None:
    """Let the layer's calls take a backend from now on."""
    if backend != layer._backend:
        layer._backend = backend


def forget_calls(layer: torch.nn.Module) -> None:
    """Leave nothing of ours at a layer that has its PEFT class back."""
    layer.__dict__.pop("_backend", None)
    _delegated_calls.pop(layer, None)
    forget(layer)


def fused_forward(
    x: Tensor,  # [..., K]
    state: LayerState,
    backend: str = "auto",
) -> Tensor:  # [..., N], the dtype of the base layer's result
    """The active adapters in PEFT's order, the first in one operation with the base layer."""
    base, bias, adapters = state
    first, *others = adapters if len(adapters) == 1 else _join(adapters)
    if first.magnitude is None:
        y = _lora(x, base, bias, first, backend)
    elif first.dropout_p > 0.0 and not first.dora_base_under_dropout:
        y, others = base.matmul(x, bias), [first, *others]
    else:
        scale = _dora_scale(base, first.factors, first.magnitude)
        dropped = x if first.dropout_p == 0.0 else _dropped(x, first)
        factors = first.factors._replace(output_scale=scale)
        y = adapted_linear(dropped, base, factors, bias, backend=backend)
        if dropped is not x:
            # x W' + b + (c - 1) D(x) W' + c s D(x) A' B', with the terms in D(x) joined.
            y = y + base.matmul(x - dropped)
    dtype = y.dtype
    for adapter in others:
        if adapter.magnitude is None:
            y = y + _lora(x, None, None, adapter, backend)
        else:
            y = _add_dora(y, x, base, bias, adapter, adapter.magnitude, backend)
    return y.to(dtype)


def mixed_forward(
    x: Tensor,  # [S, ..., K], a row for each name
    state: MixedState,
    backend: str = "auto",
) -> Tensor:  # [S, ..., N], the dtype of the base layer's result
    """Every row with the adapter it names; no gradients, no adapter is copied."""
    base, bias, adapters, names = state
    factors = {name: adapter.factors for name, adapter in adapters.items()}
    return routed_linear_unpacked(x, base, bias, factors, names, backend)


def _lora(
    x: Tensor,
    base: DenseWeight | None,
    bias: Tensor | None,
    adapter: ActiveAdapter,
    backend: str,
) -> Tensor:
    factors, lora_bias, dropout_p, *_ = adapter
    if lora_bias is not None:
        lora_bias = lora_bias * factors.scaling
        bias = (lora_bias if bias is None else bias + lora_bias).to(x.dtype)
    return adapted_linear(x, base, factors, bias, dropout_p, backend=backend)


def _add_dora(
    y: Tensor,  # [..., N], the result so far, with the bias
    x: Tensor,  # [..., K]
    base: DenseWeight,
    bias: Tensor | None,  # [N]
    adapter: ActiveAdapter,
    magnitude: Tensor,  # [N]
    backend: str,
) -> Tensor:  # [..., N], in the wider dtype of y and the magnitude, as in PEFT
    """``y + (c - 1) base + c s B A D(x)``; base is y without its bias, or ``W D(x)``."""
    c = _dora_scale(base, adapter.factors, magnitude)
    if adapter.dropout_p > 0.0:
        x = _dropped(x, adapter)
    if adapter.dora_base_under_dropout:
        alone = base.matmul(x)
    elif bias is None:
        alone = y
    else:
        alone = y - bias
    return y + (c - 1) * alone + c * _lora(x, None, None, adapter._replace(dropout_p=0.0), backend)


def _dropped(x: Tensor, adapter: ActiveAdapter) -> Tensor:
    """D(x), drawn by torch."""
    # In A's dtype, as in PEFT: a half-precision 1 / (1 - p) is off by the same in every row.
    return F.dropout(x.to(adapter.factors.a.dtype), adapter.dropout_p).to(x.dtype)


def _dora_scale(base: DenseWeight, factors: LoRAFactors, magnitude: Tensor) -> Tensor:
    """``c = m / ||W + s B A||`` by rows ``[N]``; the norm is a constant to the gradient."""
    a, b, scaling, *_ = factors
    return magnitude / lora_weight_norm(base, a, b, scaling)


def _join(adapters: list[ActiveAdapter]) -> list[ActiveAdapter]:
    """Neighbours without DoRA and without active dropout become one adapter of their joined ranks.

    Only DoRA makes the order matter; without it the adapters that can be joined come first.
    """
    if all(adapter.magnitude is None for adapter in adapters):
        adapters = sorted(adapters, key=_stands_alone)
    joined = []
    for stands_alone, group in groupby(adapters, key=_stands_alone):
        members = list(group)
        joined.extend(members if stands_alone or len(members) == 1 else [_joined(members)])
    return joined


def _stands_alone(adapter: ActiveAdapter) -> bool:
    return adapter.magnitude is not None or adapter.dropout_p > 0.0


def _joined(adapters: list[ActiveAdapter]) -> ActiveAdapter:
    lora_a = torch.cat([adapter.factors.a for adapter in adapters])
    # In fp32, so that the scaling costs a half-precision B no rounding of its own.
    wide = [each.factors.b.to(accumulator_dtype(each.factors.b.dtype)) for each in adapters]
    scaled = [each.factors.scaling * b for each, b in zip(adapters, wide, strict=True)]
    lora_b = torch.cat(scaled, dim=1)
    biases = [a.factors.scaling * a.lora_bias for a in adapters if a.lora_bias is not None]
    lora_bias = sum(biases[1:], biases[0]) if biases else None
    return ActiveAdapter(LoRAFactors(lora_a, lora_b, 1.0), lora_bias, 0.0, None, False)
