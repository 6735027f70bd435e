"""What :func:`route` looks at in a model before it changes it: which modules an adapter means, and
which of them can have one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.files.adapters import AdapterFile, report_missing
from lora_kernels.files.config import asks_for_all_linear, targeted, targets
from lora_kernels.files.renaming import Renaming
from lora_kernels.integrations.known_weight_readers import never_calls, parent_of, passes_by
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


def targeted_in(
    model: nn.Module, config: Mapping[str, Any], renaming: Renaming | None = None
) -> list[str]:
    """Names of the modules that a config asks for, by its own names for them."""
    rest = [name for name, _ in modules_of_model(model) if name or _is_linear(model)]
    theirs = renaming.origins(rest) if renaming else dict(zip(rest, rest, strict=True))
    names = [theirs[name] for name in targeted(config, theirs)]
    if asks_for_all_linear(config):
        head = _head_of(model, config)
        modules = [(name, model.get_submodule(name)) for name in names]
        names = [name for name, module in modules if _is_linear(module) and module is not head]
    return names


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, RoutedLoRALinear)) or type(module).__name__ == "Conv1D"


def _head_of(model: nn.Module, config: Mapping[str, Any]) -> nn.Module | None:
    """The head of a language model or a classifier, which PEFT leaves out of "all-linear"."""
    get = getattr(model, "get_output_embeddings", None)
    if not callable(get):
        return None
    heads = [get()]
    if config.get("task_type") == "SEQ_CLS":
        heads += [getattr(model, name, None) for name in ("score", "classifier")]
    return next((head for head in heads if isinstance(head, nn.Module)), None)


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


def check_whole(
    model: nn.Module,
    file: AdapterFile,
    directory: str | os.PathLike,
    strict: bool,
    renaming: Renaming,
) -> None:
    """Raise, or warn, where the model has modules for an adapter that its file does not."""
    if file.config.get("target_modules") is None:
        text = f"{directory}: the config has no target_modules, which tell if the file is whole"
        if strict:
            raise ValueError(f"{text} (strict=False loads what there is)")
        warnings.warn(text, stacklevel=3)
    meant = targeted_in(model, file.config, renaming)
    missing = [name for name in meant if name not in file.modules]
    report_missing(missing, directory, strict)


def check_modules(
    model: nn.Module, names: Iterable[str], allowed: str | Sequence[str] | None
) -> dict[str, nn.Linear | RoutedLoRALinear]:
    """The modules of those names; raises for those that cannot have adapters, naming all of them.

    allowed: what ``target_modules`` of :func:`route` says.
    """
    wrong, fit = {}, {}
    for name in names:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            wrong[name] = "there is no such module"
            continue
        if "experts" in name.split("."):
            wrong[name] = "an expert sees tokens that a router chose, not whole sequences"
        elif allowed is not None and not targets({"target_modules": allowed}, name):
            wrong[name] = f"route(model, target_modules={allowed!r}) leaves it out"
        elif module is model:
            wrong[name] = "the model itself, which nothing could put another layer in for"
        elif not isinstance(module, (nn.Linear, RoutedLoRALinear)):
            wrong[name] = f"a {type(module).__name__}, not a torch.nn.Linear"
        elif reader := _reader_of(model, name):
            wrong[name] = f"{reader} reads its weight instead of calling it"
        else:
            fit[name] = module
    if wrong:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(wrong.items())[:5])
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"modules that cannot have adapters: {listed}{more}")
    return fit


def _reader_of(model: nn.Module, name: str) -> str | None:
    """The class around a layer whose own forward, or fast path, would pass an adapter by."""
    parent, child = parent_of(model, name)
    if not never_calls(parent, child) and not passes_by(parent, child):
        return None
    torch_own = isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer))
    return f"{'torch.nn.' if torch_own else ''}{type(parent).__name__}"
