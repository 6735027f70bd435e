"""PEFT's adapter directories: ``adapter_config.json`` beside ``adapter_model.safetensors``.

PEFT is not needed; safetensors is, when a file is read or written. Pickles are never opened. Files
that hold more than LoRA of linear layers are refused with what was found in them: half an adapter
would be another adapter.

Dimensions: K in_features, N out_features, R rank.
"""

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.files.config import (
    as_json,
    check_config,
    describes,
    idle_patterns,
    ranks_and_alphas,
    ranks_and_scalings,
    targeted,
)
from lora_kernels.files.directory import CONFIG, WEIGHTS, read_files, write_files
from lora_kernels.files.tensors import PREFIX, by_module, listed
from lora_kernels.ops.routed import Adapter, AdapterBank


class ModuleAdapter(NamedTuple):
    """What an adapter adds to one linear layer: ``scaling * B A``."""

    lora_a: Tensor  # [R, K]
    lora_b: Tensor  # [N, R]
    scaling: float


@dataclass(frozen=True)
class AdapterFile:
    """A PEFT adapter directory in memory.

    Attributes:
        config: what ``adapter_config.json`` says, as it stands there.
        modules: the factors and scaling by the name of the linear layer in the base model, of those
            that the config targets.
        dropout_p: probability of dropping an element of the adapter's input in training.
        base_parameters: parameters of the base model by name. PEFT adds those of embeddings and of
            the head where adapters target them; the adapter belongs to a base that has the same.
    """

    config: dict[str, Any]
    modules: dict[str, ModuleAdapter]
    dropout_p: float
    base_parameters: dict[str, Tensor]


def read_adapter(directory: str | os.PathLike) -> AdapterFile:
    """Read a PEFT adapter directory; tensors are on the CPU, in the file's dtype.

    The scaling of a module is PEFT's: ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora``,
    alpha and r after ``alpha_pattern`` and ``rank_pattern``. Modules that the config does not
    target are left out with a warning, as by PEFT; another one names patterns that match no module.
    An adapter's name inside of the keys (``lora_A.default.weight``) is passed over.

    Beside :func:`write_adapter`, both files are of one save. They may be read several times for
    that, where a file has changed within the last moments. A config that was edited by hand is
    taken as it is. Of files that others write, one that has changed while it was read is read
    again; between the two files another writer cannot be seen.

    Raises:
        ValueError: a file is missing, cannot be read, is malformed, or holds what is not plain LoRA
            of linear layers (the message names it); shapes do not fit each other or the config; a
            value is not finite; a pattern of the config takes more than some seconds to match, or
            needs the package regex for not doing so; both files are written to all the time.
        ImportError: safetensors is not installed.
    """
    directory = path_of(directory)
    config, tensors = read_files(directory)
    config_file = f"{directory / CONFIG}"
    check_config(config, config_file)
    factors, base_parameters = by_module(tensors, f"{directory / WEIGHTS}")
    _leave_out(factors, config, directory)
    kinds = ranks_and_scalings(config, factors, config_file)
    modules = {}
    for name, sides in factors.items():
        where = f"{directory / WEIGHTS}: {name}"
        if len(sides) == 1:
            missing = "B" if "A" in sides else "A"
            raise ValueError(
                f"{where}: there is no lora_{missing} for its lora_{next(iter(sides))}"
            )
        rank, scaling = kinds[name]
        lora_a, lora_b = sides["A"], sides["B"]
        if lora_a.ndim != 2 or lora_b.ndim != 2:
            raise ValueError(
                f"{where}: expected matrices lora_A and lora_B of a linear layer, got "
                f"{list(lora_a.shape)} and {list(lora_b.shape)} (a convolution's?)"
            )
        if lora_a.shape[0] != rank or lora_b.shape[1] != rank:
            raise ValueError(
                f"{where}: expected rank {rank} by the config, got lora_A {list(lora_a.shape)} and "
                f"lora_B {list(lora_b.shape)}"
            )
        modules[name] = ModuleAdapter(lora_a, lora_b, scaling)
    if idle := idle_patterns(config, modules, config_file):
        warnings.warn(
            f"{config_file}: no module of the adapter is meant by {listed(idle)}, which has "
            "no effect, as in PEFT",
            stacklevel=2,
        )
    dropout_p = float(config.get("lora_dropout") or 0.0)
    return AdapterFile(config, modules, dropout_p, base_parameters)


def write_adapter(
    directory: str | os.PathLike,
    modules: Mapping[str, ModuleAdapter],
    *,
    dropout_p: float = 0.0,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write a directory that ``PeftModel.from_pretrained`` loads to the same numbers.

    Each file is replaced as a whole once it is complete, the weights before the config. The digest
    of the config stands in the weights' metadata, by which :func:`read_adapter` takes both from one
    save, whichever writers and readers are at work. PEFT ignores it: its ``from_pretrained`` may
    find the config of before and the new weights, while a save is under way.

    Files have the permissions of any new file, what else is in the directory stays, and the
    directory is made if need be. A process that is killed in the moment between the two leaves its
    config as a hidden ``.partial`` file, where :func:`read_adapter` finds it and PEFT does not; a
    loss of power may lose both files.

    Args:
        directory: where to.
        modules: the adapter by the name of the linear layer in the base model.
        dropout_p: PEFT's ``lora_dropout``.
        config: settings to keep, such as ``task_type``, ``base_model_name_or_path``,
            ``target_modules`` or ``use_rslora``. Ranks and alphas in it are replaced where they do
            not give those of ``modules``.

    Raises:
        TypeError, ValueError: modules or config are not plain LoRA of linear layers, or the config
            does not target all of the modules; a directory is in a file's place.
        OSError: a file cannot be written.
        ImportError: safetensors is not installed.
    """
    modules = {name: ModuleAdapter(*part) for name, part in modules.items()}
    _check_modules(modules)
    given = {} if config is None else dict(config)
    if given.get("target_modules") is None:
        given.pop("target_modules", None)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "target_modules": sorted(modules),
        **given,
        "lora_dropout": float(dropout_p),
    }
    kinds = {name: (part.lora_a.shape[0], part.scaling) for name, part in modules.items()}
    if not describes(config, kinds):
        config |= ranks_and_alphas(kinds, bool(config["use_rslora"]))
    check_config(config, "config")
    if lost := modules.keys() - set(targeted(config, modules)):
        raise ValueError(
            f"config: its target_modules leave out modules that are written: {listed(sorted(lost))}"
        )
    tensors = {}
    for name, (lora_a, lora_b, _) in modules.items():
        for side, factor in (("A", lora_a), ("B", lora_b)):
            # A copy: safetensors refuses tensors that share one memory, and a bank's do.
            copy = factor.detach().to("cpu", copy=True).contiguous()
            tensors[f"{PREFIX}{name}.lora_{side}.weight"] = copy
    text = json.dumps(config, indent=2, sort_keys=True, default=as_json)
    write_files(path_of(directory), text, tensors)


def load_adapter(
    bank: AdapterBank,
    name: str,
    directory: str | os.PathLike,
    module: str | Sequence[str],
    *,
    strict: bool = True,
) -> Adapter:
    """Add an adapter to one bank from a PEFT adapter directory.

    Args:
        bank: of the layer; it is unchanged if anything raises.
        name: of the new adapter.
        directory: as PEFT's ``save_pretrained`` writes it. Only safetensors are read.
        module: the layer's name in the file; for a sliced bank a list with one name per slice. The
            adapter has rank 0 in slices whose module the config does not target.
        strict: whether a module that the config targets and the file does not have is an error; if
            not, it is a warning and the adapter has rank 0 there.

    Returns:
        The adapter. Its factors are copies in the bank's dtype.

    Raises:
        TypeError, ValueError: as :func:`read_adapter` and ``bank.add``; none of the modules is in
            the file, or one that the config targets is not, or parameters of the base model are;
            their scalings differ; a value is not finite in the bank's dtype.
    """
    check_flag("strict", strict)
    names = _names_of_slices(bank, module)
    file = read_adapter(directory)
    if file.base_parameters:
        raise ValueError(
            f"{directory}: expected nothing but the adapter, got parameters of the base model too, "
            f"which a bank cannot compare with its own: {listed(sorted(file.base_parameters))}; "
            "save with PEFT's save_embedding_layers=False, or load into a model with route()"
        )
    parts = [file.modules.get(each) for each in names]
    found = [part for part in parts if part is not None]
    if not found:
        raise ValueError(
            f"module: {directory} has none of {names}; it has {listed(sorted(file.modules))}"
        )
    missing = targeted(file.config, [each for each in names if each not in file.modules])
    report_missing(missing, directory, strict)
    scalings = {each: part.scaling for each, part in zip(names, parts, strict=True) if part}
    if len(set(scalings.values())) > 1:
        raise ValueError(
            f"module: an adapter of a sliced bank has one scaling, and those of {directory} "
            f"differ: {scalings}; use a bank for each module"
        )
    for each, part in zip(names, parts, strict=True):
        if part is not None:
            check_finite_in(bank.dtype, part, f"{directory}: {each}")
    lora_a = [part and part.lora_a for part in parts]
    lora_b = [part and part.lora_b for part in parts]
    return bank.add(name, lora_a, lora_b, found[0].scaling, file.dropout_p)


def save_adapter(
    bank: AdapterBank, name: str, directory: str | os.PathLike, module: str | Sequence[str]
) -> None:
    """Write one bank's adapter as a PEFT adapter directory.

    Args:
        bank, name: whose.
        directory: to write to; made if need be.
        module: the layer's name in the base model; for a sliced bank a list with one per slice.

    Raises:
        KeyError: the bank has no such adapter.
        TypeError, ValueError: module does not fit the bank.
    """
    names = _names_of_slices(bank, module)
    adapter = bank[name]
    write_adapter(directory, modules_of(adapter, names), dropout_p=adapter.dropout_p)


def modules_of(adapter: Adapter, names: Sequence[str]) -> dict[str, ModuleAdapter]:
    """A bank's adapter by the names of the slices' modules, those of rank 0 left out."""
    scaling = float(adapter.scaling)
    return {
        name: ModuleAdapter(pair[0].detach(), pair[1].detach(), scaling)
        for name, pair in zip(names, adapter.factors(), strict=True)
        if pair is not None
    }


def path_of(directory: str | os.PathLike) -> Path:
    if not isinstance(directory, (str, os.PathLike)):
        raise TypeError(f"directory: expected a path, got {type(directory).__name__}")
    return Path(directory)


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def report_missing(missing: Sequence[str], directory: str | os.PathLike, strict: bool) -> None:
    """Raise, or warn, where a file lacks modules that its config targets."""
    if not missing:
        return
    text = (
        f"{directory}: the config targets {len(missing)} modules that the file does not have: "
        f"{listed(sorted(missing))}"
    )
    if strict:
        raise ValueError(f"{text}; with strict=False they stay without the adapter")
    warnings.warn(f"{text}; they stay without the adapter", stacklevel=3)


def check_finite_in(dtype: torch.dtype, part: ModuleAdapter, where: str) -> None:
    """Raise where a factor overflows the dtype it is to be kept in; on meta there are no values."""
    for side, factor in (("A", part.lora_a), ("B", part.lora_b)):
        if torch.finfo(dtype).max >= torch.finfo(factor.dtype).max:
            continue  # what is finite in its own is finite there
        if not factor.is_meta and not torch.isfinite(factor.to(dtype)).all():
            raise ValueError(f"{where}: lora_{side} ({factor.dtype}) overflows the bank's {dtype}")


def _leave_out(factors: dict[str, Any], config: Mapping[str, Any], directory: Path) -> None:
    """Take out of a file's factors what its config does not target, if it says what it does."""
    if config.get("target_modules") is None:
        return
    meant = set(targeted(config, factors, f"{directory / CONFIG}"))
    others = [name for name in factors if name not in meant]
    if len(others) == len(factors):
        raise ValueError(
            f"{directory}: the config targets none of the file's modules: {listed(sorted(others))}"
        )
    for name in others:
        del factors[name]
    if others:
        warnings.warn(
            f"{directory}: the config does not target {listed(sorted(others))}, which are in the "
            "file; left out, as by PEFT",
            stacklevel=3,
        )


# --- arguments -------------------------------------------------------------------------------


def _check_modules(modules: Mapping[str, ModuleAdapter]) -> None:
    if not modules:
        raise ValueError("modules: expected at least one, got none")
    for name, part in modules.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"modules: expected names of modules, got {name!r}")
        lora_a, lora_b, scaling = part
        shapes = [list(factor.shape) for factor in (lora_a, lora_b)]
        if lora_a.ndim != 2 or lora_b.ndim != 2 or shapes[0][0] != shapes[1][1] or not shapes[0][0]:
            raise ValueError(
                f"modules: {name}: expected lora_a [R, K] and lora_b [N, R], got {shapes[0]} and "
                f"{shapes[1]}"
            )
        if not math.isfinite(scaling):
            raise ValueError(f"modules: {name}: expected a finite scaling, got {scaling}")


def _names_of_slices(bank: AdapterBank, module: str | Sequence[str]) -> list[str]:
    if not isinstance(bank, AdapterBank):
        raise TypeError(f"bank: expected an AdapterBank, got {type(bank).__name__}")
    names = [module] if isinstance(module, str) else list(module)
    if len(names) != len(bank.slice_widths) or len(set(names)) != len(names):
        raise ValueError(
            f"module: expected a name for each of the {len(bank.slice_widths)} slices, all "
            f"different, got {names}"
        )
    return names
