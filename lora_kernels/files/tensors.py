"""The tensors of a PEFT adapter file by the modules that they belong to."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lora_kernels.runtime.dtypes import FLOATING

PREFIX = "base_model.model."
# PEFT's in-memory names, with the adapter's in the middle, are in files that others have written.
_KEY = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
)
_LONGEST_KEY = 2000
_OTHER_KINDS = {
    "lora_magnitude_vector": "DoRA's magnitudes",
    "lora_embedding_": "an embedding's adapter",
    ".lora_B.bias": "a bias on lora_B",
    ".lora_up.": "kohya's or diffusers' factors",
    ".lora_down.": "kohya's or diffusers' factors",
}
_ALPHA = "an alpha of kohya's or diffusers' format, where PEFT's has it in the config"


def by_module(
    tensors: Mapping[str, Tensor], where: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """``{module: {"A": ..., "B": ...}}`` and the base model's parameters.

    Raises:
        ValueError: a tensor is neither, is not finite or no floating point; there is no adapter, or
            more than one; ``where`` is the file that is named.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    base_parameters, unknown, adapters = {}, [], set()
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if len(key) > _LONGEST_KEY:
            raise ValueError(
                f"{where}: expected names of at most {_LONGEST_KEY} characters, got one of "
                f"{len(key)}: {key[:60]}..."
            )
        match = _KEY.fullmatch(key)
        if match is None:
            if key.startswith(PREFIX) and ".lora_" not in key and not key.endswith(".alpha"):
                name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
                base_parameters[name] = tensor
            else:
                unknown.append(key)
            continue
        if tensor.dtype not in FLOATING:
            raise ValueError(
                f"{where}: {key}: expected bfloat16, float16, float32 or float64, got "
                f"{tensor.dtype}"
            )
        found[key] = tensor
        adapters.add(match["adapter"])
        factors.setdefault(match["module"], {})[match["side"]] = tensor
    _check_finite(found, where)
    if unknown:
        raise ValueError(
            f"{where}: expected {PREFIX}<module>.lora_A.weight and .lora_B.weight, got "
            f"{_what(unknown)}: {listed(sorted(unknown))}"
        )
    if not factors:
        raise ValueError(f"{where}: there is no adapter in it")
    if len(adapters) > 1:
        names = sorted("no name" if name is None else repr(name) for name in adapters)
        raise ValueError(
            f"{where}: expected one adapter, got keys lora_A.<adapter>.weight with {listed(names)}"
        )
    return factors, base_parameters


def _check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise for infinite and NaN values, in few calls: each waits for threads that serve."""
    for dtype in {tensor.dtype for tensor in tensors.values()}:
        some = {key: t for key, t in tensors.items() if t.dtype == dtype and t.numel()}
        if not some:
            continue
        norms = torch._foreach_norm(  # pyright: ignore[reportPrivateImportUsage]
            list(some.values()), math.inf
        )
        largest = torch.stack(norms).tolist()
        for key, value in zip(some, largest, strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"{where}: {key}: expected finite values, got infinite or NaN ones"
                )


def _what(keys: Iterable[str]) -> str:
    """The kind of tensors that are no A or B of a linear layer, in words."""
    found = {kind for key in keys for part, kind in _OTHER_KINDS.items() if part in key}
    if any(key.endswith(".alpha") for key in keys):
        found.add(_ALPHA)
    return " and ".join(sorted(found)) or "other tensors"


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest
