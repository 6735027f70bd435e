"""What :func:`route` looks at in a model before it changes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.nn.active_adapters import ActiveAdapters
from lora_kernels.nn.adapter_layer import AdapterLayer
from lora_kernels.nn.routed_linear import RoutedLoRALinear


def check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft."):
            raise ValueError(
                f"model: expected a plain model, got PEFT's {type(module).__name__} at {name!r}; "
                "take the base model (PEFT's `unload()`), and load the adapters' files"
            )


def modules_of_model(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``named_modules``, but for what is inside of layers with adapters: there may be thousands."""
    seen, rest = set(), [("", model)]
    while rest:
        name, module = rest.pop()
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        if isinstance(module, (RoutedLoRALinear, AdapterLayer)):
            continue
        prefix = f"{name}." if name else ""
        inside = [(prefix + key, each) for key, each in module._modules.items()]
        rest += [(path, each) for path, each in reversed(inside) if each is not None]


def holder_in(model: nn.Module) -> ActiveAdapters | None:
    """What the layers of a model that is routed already share."""
    layers = (module for _, module in modules_of_model(model))
    found = [each.active_adapters for each in layers if isinstance(each, RoutedLoRALinear)]
    holders = {id(holder): holder for holder in found if holder is not None}
    if len(holders) > 1:
        raise ValueError("model: its layers with adapters do not share one ActiveAdapters")
    return next(iter(holders.values()), None)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, RoutedLoRALinear)) or type(module).__name__ == "Conv1D"


def head_of(model: nn.Module, config: Mapping[str, Any]) -> nn.Module | None:
    """The head of a language model or a classifier, which PEFT leaves out of "all-linear"."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is None and callable(get) and config.get("task_type") == "SEQ_CLS":
        heads = (getattr(model, name, None) for name in ("score", "classifier"))
        head = next((each for each in heads if each is not None), None)
    return head


def check_base(model: nn.Module, parameters: Mapping[str, Tensor], where: str) -> None:
    """Raise unless the model has these very parameters, as far as its dtype can tell."""
    for name, theirs in parameters.items():
        path, _, leaf = name.rpartition(".")
        try:
            own = getattr(model.get_submodule(path), leaf).detach()
        except AttributeError:
            own = theirs.new_empty(0)
        dtype = min(own.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal(own.cpu().to(dtype), theirs.to(dtype)):
            raise ValueError(
                f"{where}: {name} in the file is not the model's: the adapter belongs to "
                "another base model, or to one whose vocabulary or head was trained too"
            )
