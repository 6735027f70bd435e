"""Reads one PEFT LoRA layer: can a fused forward serve it as it stands, and with what?

Everything here looks at live objects and keeps nothing, because all of it can change between two
calls: adapters, scalings, dropout, hooks, dtypes, where the weights are. A layer is read once per
forward, so attributes come from the modules' own dictionaries: `nn.Module.__getattr__` would cost
ten times as much. :func:`read_ordinary` looks no further than an ordinary layer's modules; what it
leaves, :func:`read_call` reads, and has a reason for each refusal.

Dimensions: K in_features, N out_features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.tuners.lora import dora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.pytorch_utils import Conv1D

from lora_kernels.adapters.factors import LoRAFactors
from lora_kernels.base_weights import DenseWeight
from lora_kernels.nn.base_call import COMPUTED, GLOBAL_HOOKS, OWN_FORWARD, bypassed, tensor_of
from lora_kernels.ops.narrow import masks
from lora_kernels.runtime import dispatch
from lora_kernels.runtime.dtypes import FLOATING, short_name

if TYPE_CHECKING:
    from lora_kernels.integrations.peft.layers import Linear

_MIXED = "mixed batch (adapter_names)"


class ActiveAdapter(NamedTuple):
    """One active adapter of a layer, as it stands."""

    factors: LoRAFactors
    lora_bias: Tensor | None  # [N]
    dropout_p: float  # 0.0 where dropout is not active
    magnitude: Tensor | None  # [N], DoRA's m
    dora_base_under_dropout: bool  # its share of the base is that of D(x), not the result so far


class LayerState(NamedTuple):
    """What a fused forward needs."""

    base: DenseWeight
    bias: Tensor | None  # [N]
    adapters: list[ActiveAdapter]


class MixedState(NamedTuple):
    """What a mixed batch needs: a name for each sequence, and the adapters that they name."""

    base: DenseWeight
    bias: Tensor | None  # [N]
    adapters: dict[str, ActiveAdapter]
    names: Sequence[str]


class OrdinaryCall(NamedTuple):
    """The operands of `adapted_linear` after x of a layer about which nothing is special."""

    base: DenseWeight
    factors: LoRAFactors
    bias: Tensor | None  # [N]
    dropout_p: float
    known_as: tuple  # what is asked of its tensors beside what the operation checks


def read_ordinary(layer: Linear) -> OrdinaryCall | None:
    """The call of a layer with one active adapter, as far as its modules tell; or None.

    Its tensors are not looked at: an operation that knows the call has accepted such tensors, and
    :func:`read_call` with them.
    """
    name = layer.active_adapter
    if type(name) is list and len(name) == 1:
        name = name[0]
    if type(name) is not str or layer._disable_adapters or layer.merged_adapters:
        return None
    own, children = layer.__dict__, layer._modules
    if "forward" in own or "_hf_hook" in own or layer.fan_in_fan_out or name in layer.lora_variant:
        return None

    base, lora_a = children["base_layer"], children["lora_A"]._modules.get(name)
    if type(base) is not nn.Linear or type(lora_a) is not nn.Linear:
        return None
    lora_b, dropout = children["lora_B"]._modules[name], children["lora_dropout"]._modules[name]
    if type(lora_b) is not nn.Linear or any(GLOBAL_HOOKS):
        return None
    if bypassed(base, lora_a, lora_b, dropout):
        return None
    dropout_p = 0.0
    if type(dropout) is nn.Dropout:
        if dropout.inplace:
            return None
        if dropout.training:
            dropout_p = dropout.p
    elif type(dropout) is not nn.Identity:
        return None

    of_base, of_a, of_b = base._parameters, lora_a._parameters, lora_b._parameters
    weight, a, b = of_base.get("weight"), of_a.get("weight"), of_b.get("weight")
    if of_a.get("bias", COMPUTED) is not None or of_b.get("bias", COMPUTED) is not None:
        return None
    if weight is None or a is None or b is None or hasattr(weight, "ds_id"):
        return None
    if "bias" not in of_base:  # a parametrization computes it
        return None
    factors = LoRAFactors(a, b, layer.scaling[name])
    known_as = (
        layer.out_features, layer.in_features, layer.cast_input_dtype_enabled, weight.requires_grad,
    )  # fmt: skip
    return OrdinaryCall(DenseWeight(weight), factors, of_base["bias"], dropout_p, known_as)


def read_call(
    layer: Linear, x: Any, args: tuple, kwargs: dict
) -> LayerState | MixedState | str | None:
    """The layer's state for this very call, or why PEFT's own forward has to serve it; None where
    the base layer serves alone."""
    if args:
        return "extra positional arguments for the base layer"
    names = None
    for name, value in kwargs.items():
        if name == "adapter_names":
            names = value
        elif value is not None or name != "alora_offsets":
            return f"extra argument {name!r}"
    if names is not None:
        return _read_mixed(layer, x, names)
    state = read_layer(layer)
    if state is None or isinstance(state, str):
        return state
    return _unsupported_input(x, state.base.weight) or _unsupported_context() or state


def _read_mixed(layer: Linear, x: Any, names: Any) -> MixedState | str | None:
    """The state for a mixed batch, which is served without gradients, as PEFT serves it."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return f"{_MIXED}: names that are not a list of strings"
    used = list(dict.fromkeys(name for name in names if name != "__base__"))
    state = read_layer(layer, used)
    if state is None or isinstance(state, str):
        return state
    reason = _unsupported_input(x, state.base.weight) or _unsupported_context()
    if reason:
        return reason
    if x.dim() < 2:
        return f"{_MIXED}: x is {tuple(x.shape)}, not [sequences, ..., in_features]"
    if torch.compiler.is_compiling():
        return f"{_MIXED} inside torch.compile"
    with_adapter = layer._modules["lora_A"]._modules
    used = [name for name in used if name in with_adapter]
    adapters = dict(zip(used, state.adapters, strict=True))
    needs_gradient = x.requires_grad or (state.bias is not None and state.bias.requires_grad)
    for name, adapter in adapters.items():
        if adapter.dropout_p > 0.0:
            return f"{_MIXED}: dropout of {name!r} is active"
        if adapter.lora_bias is not None:
            return f"{_MIXED}: adapter {name!r} has lora_bias"
        if adapter.magnitude is not None:
            return f"{_MIXED}: adapter {name!r} has DoRA"
        needs_gradient |= adapter.factors.a.requires_grad or adapter.factors.b.requires_grad
    if needs_gradient and torch.is_grad_enabled():
        return f"{_MIXED}: gradients are recorded; lora_kernels.route trains mixed batches"
    return MixedState(state.base, state.bias, adapters, names)


def read_layer(layer: Linear, names: Sequence[str] | None = None) -> LayerState | str | None:
    """The layer's present state, or why no call can be fused as long as it stands like this.

    None where no adapter acts: disabled, merged, or none of ``names`` (None: the active ones).
    """
    if layer._disable_adapters or layer.merged_adapters:
        return None
    with_adapter = layer._modules["lora_A"]._modules
    if names is None:
        names = layer.active_adapters
    active = [name for name in names if name in with_adapter]
    if not active:
        return None
    # Modules before tensors: what they say also holds while FSDP has the tensors sharded.
    reason = _unsupported_layer(layer)
    for name in active:
        reason = reason or _unsupported_adapter(layer, name)
    if reason:
        return reason
    base = _read_base(layer)
    if isinstance(base, str):
        return base
    weight, bias = base
    adapters = []
    for name in active:
        adapter = _read_adapter(layer, name, weight)
        if isinstance(adapter, str):
            return adapter
        adapters.append(adapter)
    return LayerState(DenseWeight(weight), bias, adapters)


# --- modules: classes, hooks, replaced forwards ----------------------------------------------


def _unsupported_layer(layer: Linear) -> str | None:
    own = layer.__dict__
    if "forward" in own or "_hf_hook" in own:
        return f"the layer has {OWN_FORWARD}"
    if any(GLOBAL_HOOKS):
        return "global module hooks are registered"
    base = layer._modules["base_layer"]
    forward = type(base).forward
    if forward is not nn.Linear.forward and forward is not Conv1D.forward:
        return f"base layer {type(base).__name__} has a forward of its own"
    if layer.fan_in_fan_out != (forward is Conv1D.forward):
        return f"fan_in_fan_out = {layer.fan_in_fan_out} over a {type(base).__name__}"
    left_out = bypassed(base)
    return f"base_layer has {left_out}" if left_out else None


def _unsupported_adapter(layer: Linear, name: str) -> str | None:
    children = layer._modules
    variant = layer.lora_variant.get(name)
    if variant is not None:
        if type(variant) is not DoraLinearVariant:
            return f"adapter {name!r} is of the variant {type(variant).__name__}"
        magnitude = children["lora_magnitude_vector"]._modules[name]
        if type(magnitude) is not DoraLinearLayer:
            return f"DoRA of {name!r} is {type(magnitude).__name__}, not DoraLinearLayer"
        if left_out := bypassed(magnitude):
            return f"lora_magnitude_vector of {name!r} has {left_out}"
        if dora.ENABLE_DORA_CACHING and not magnitude.training:
            return "PEFT's DoRA cache is enabled"
    for role in ("lora_A", "lora_B"):
        module = children[role]._modules[name]
        if type(module).forward is not nn.Linear.forward:
            return f"{role} of {name!r} is {type(module).__name__}, not nn.Linear"
        if left_out := bypassed(module):
            return f"{role} of {name!r} has {left_out}"
    dropout = children["lora_dropout"]._modules[name]
    if type(dropout) is not nn.Identity and type(dropout) is not nn.Dropout:
        return f"lora_dropout of {name!r} is {type(dropout).__name__}, not nn.Dropout"
    left_out = bypassed(dropout)
    return f"lora_dropout of {name!r} has {left_out}" if left_out else None


# --- tensors: where and what they are --------------------------------------------------------


def _read_base(layer: Linear) -> tuple[Tensor, Tensor | None] | str:
    base = layer._modules["base_layer"]
    weight, bias = tensor_of(base, "weight"), tensor_of(base, "bias")
    if unsupported := _unsupported_parameter(weight) or dispatch.unserved(weight.device):
        return f"base weight: {unsupported}"
    if bias is not None:
        if unsupported := _unsupported_parameter(bias):
            return f"base bias: {unsupported}"
        if bias.dtype is not weight.dtype:
            return f"base bias is {short_name(bias.dtype)}, base weight {short_name(weight.dtype)}"
    if weight.requires_grad:
        return "base weight requires grad"
    if hasattr(weight, "ds_id"):
        return "base weight is partitioned (DeepSpeed ZeRO-3)"
    if layer.fan_in_fan_out:
        weight = weight.t()
    expected = (layer.out_features, layer.in_features)
    if weight.shape != expected:
        return f"base weight is {tuple(weight.shape)}, not {expected}: partitioned or offloaded"
    return weight, bias


def _read_adapter(layer: Linear, name: str, weight: Tensor) -> ActiveAdapter | str:
    children = layer._modules
    lora_a_module = children["lora_A"]._modules[name]
    lora_b_module = children["lora_B"]._modules[name]
    lora_a, lora_b = tensor_of(lora_a_module, "weight"), tensor_of(lora_b_module, "weight")
    if unsupported := _unsupported_parameter(lora_a) or _unsupported_parameter(lora_b):
        return f"weights of {name!r}: {unsupported}"
    lora_bias = tensor_of(lora_b_module, "bias")
    if lora_bias is not None and (unsupported := _unsupported_parameter(lora_bias)):
        return f"lora_B's bias of {name!r}: {unsupported}"
    if tensor_of(lora_a_module, "bias") is not None:
        return f"lora_A of {name!r} has a bias"
    if lora_a.device != weight.device or lora_b.device != weight.device:
        return f"adapter {name!r} is on {lora_a.device}, the base weight on {weight.device}"
    if lora_a.dtype is not weight.dtype or lora_b.dtype is not weight.dtype:
        if lora_a.dtype is torch.float64 or lora_b.dtype is torch.float64:
            return f"adapter {name!r} is float64 over a {short_name(weight.dtype)} base"
        if not layer.cast_input_dtype_enabled:
            return "cast_input_dtype is disabled and the adapter has another dtype than the base"

    scaling = layer.scaling[name]
    if isinstance(scaling, Tensor):
        if type(scaling) is not Tensor or scaling.dim() != 0 or scaling.requires_grad:
            return f"scaling of {name!r} is not a plain 0-d tensor without grad"
    elif not isinstance(scaling, (int, float)):
        return f"scaling of {name!r} is a {type(scaling).__name__}"

    dropout, dropout_p = children["lora_dropout"]._modules[name], 0.0
    if type(dropout) is nn.Dropout:
        if dropout.inplace:
            return f"lora_dropout of {name!r} works in place"
        if dropout.training:
            dropout_p = dropout.p
        if dropout_p >= 1.0:
            return f"lora_dropout of {name!r} drops everything (p = 1)"

    magnitude, under_dropout = None, False
    if name in layer.lora_variant:
        magnitude = tensor_of(children["lora_magnitude_vector"]._modules[name], "weight")
        if unsupported := _unsupported_parameter(magnitude):
            return f"lora_magnitude_vector of {name!r}: {unsupported}"
        if magnitude.device != weight.device:
            return f"lora_magnitude_vector of {name!r} is on {magnitude.device}"
        if lora_bias is not None:
            return f"adapter {name!r} has DoRA and lora_bias at once"
        # PEFT's DoRA asks the layer whether to drop, and then the dropout how.
        under_dropout = layer.training and type(dropout) is nn.Dropout
        if not under_dropout:
            dropout_p = 0.0
    elif dropout_p > 0.0 and (reason := masks.slow_on(weight.device)):
        return f"dropout of {name!r} is active, for which PEFT's forward is faster there: {reason}"
    factors = LoRAFactors(lora_a, lora_b, scaling)
    return ActiveAdapter(factors, lora_bias, dropout_p, magnitude, under_dropout)


def _unsupported_parameter(parameter: Any) -> str | None:
    """Why the tensor cannot be handed to a kernel."""
    if type(parameter) is not nn.Parameter and type(parameter) is not Tensor:
        if parameter is COMPUTED:
            return "computed when it is read (parametrized)"
        return f"a tensor subclass ({type(parameter).__name__})"
    if parameter.dtype not in FLOATING:
        return f"dtype {short_name(parameter.dtype)}"
    if parameter.layout is not torch.strided:
        return f"layout {parameter.layout}"
    if parameter.numel() == 0:
        return "empty (partitioned or offloaded)"
    return None


# --- the call --------------------------------------------------------------------------------


def _unsupported_input(x: Any, weight: Tensor) -> str | None:
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"x is a {type(x).__name__}, not a plain tensor"
    if x.layout is not torch.strided or x.is_nested:
        return "x is not a dense tensor"
    if x.dtype not in FLOATING:
        return f"x is {short_name(x.dtype)}"
    if x.device != weight.device:
        return f"x is on {x.device}, the base weight on {weight.device}"
    if x.dtype is not weight.dtype or x.dtype is torch.float64:
        # torch does not know autocast of meta tensors.
        autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        if x.dtype is not weight.dtype and not autocast:
            dtypes = f"x is {short_name(x.dtype)} and the base weight {short_name(weight.dtype)}"
            return f"{dtypes}, outside autocast"
        if autocast and torch.float64 in (x.dtype, weight.dtype):
            return "float64 under autocast"
    return None


def _unsupported_context() -> str | None:
    """Why PEFT has to serve: a standard torch graph is asked for, or a derivative not ours."""
    # torch's compiler traces jit.is_tracing, which its stub does not export.
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    # What torch.compiler.is_exporting() returns; torch 2.9's compiler takes that call for True.
    if tracing or torch.compiler._is_exporting_flag:
        return "tracing or exporting: the graph keeps to torch's own operations"
    if torch._C._are_functorch_transforms_active():
        return "inside a torch.func transform"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    return None
