"""The two files of a PEFT adapter directory, as they stand there: JSON and safetensors.

Each is read as a whole and written as a whole. safetensors is needed when a file is read or
written; pickles are never opened.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIG, WEIGHTS, PICKLE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
PREFIX = "base_model.model."
_KEY = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def read_config(directory: Path) -> dict[str, Any]:
    """What ``adapter_config.json`` says."""
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"directory: expected a local PEFT adapter directory, there is no {path}"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def read_tensors(directory: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """``{module: {"A": ..., "B": ...}}`` and the base model's parameters."""
    path = directory / WEIGHTS
    if not path.is_file():
        if (directory / PICKLE).is_file():
            raise ValueError(
                f"{directory}: there is only {PICKLE}, a pickle, which can run any code when it is "
                f"opened and is never read here; save the adapter as {WEIGHTS}"
            )
        raise ValueError(f"directory: there is no {path}")
    library = _safetensors()
    try:
        tensors = library.load_file(path)
    except library.SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from None
    factors: dict[str, dict[str, Tensor]] = {}
    base_parameters, unknown = {}, []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            if key.startswith(PREFIX) and ".lora_" not in key:
                name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
                base_parameters[name] = tensor.clone()
            else:
                unknown.append(key)
            continue
        if tensor.dtype not in _FLOATS:
            raise ValueError(
                f"{path}: {key}: expected bfloat16, float16, float32 or float64, got {tensor.dtype}"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {key}: expected finite values, got infinite or NaN ones")
        # A copy: the file may be mapped into memory, and be written to later.
        factors.setdefault(match["module"], {})[match["side"]] = tensor.clone()
    if unknown:
        raise ValueError(
            f"{path}: expected {PREFIX}<module>.lora_A.weight and .lora_B.weight, got "
            f"{_what(unknown)}: {listed(sorted(unknown))}"
        )
    if not factors:
        raise ValueError(f"{path}: there is no adapter in it")
    return factors, base_parameters


def _what(keys: Iterable[str]) -> str:
    """The kind of tensors that are no A or B of a linear layer, in words."""
    kinds = {
        "lora_magnitude_vector": "DoRA's magnitudes",
        "lora_embedding_": "an embedding's adapter",
        ".lora_B.bias": "a bias on lora_B",
    }
    found = {kind for key in keys for part, kind in kinds.items() if part in key}
    return " and ".join(sorted(found)) or "other tensors"


def write_files(directory: Path, config: str, tensors: dict[str, Tensor]) -> None:
    """Both files, each replaced as a whole once it is complete; the directory is made too."""
    save_file = _safetensors().save_file
    directory.mkdir(parents=True, exist_ok=True)
    _replace(directory / WEIGHTS, lambda path: save_file(tensors, path, {"format": "pt"}))
    _replace(directory / CONFIG, lambda path: path.write_text(config, encoding="utf-8"))


def _replace(path: Path, write) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _safetensors():
    """``load_file``, ``save_file`` and ``SafetensorError``."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("adapter files need safetensors: pip install safetensors") from error
    from types import SimpleNamespace

    return SimpleNamespace(
        load_file=safetensors.torch.load_file,
        save_file=safetensors.torch.save_file,
        SafetensorError=safetensors.SafetensorError,
    )


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
