"""What ``AdapterBank.add`` refuses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.runtime.checks import check_no_wrapper, kind_of
from lora_kernels.runtime.dtypes import FLOATING
from lora_kernels.runtime.tensor_state import check_has_values

Factor = Tensor | Sequence[Tensor | None]


def checked_factors(
    lora_a: Factor, lora_b: Factor, in_features: int, widths: tuple[int, ...], on_meta: bool
) -> list[tuple[Tensor, Tensor] | None]:
    """``(A, B)`` of each slice, of those ``widths``; None where it has none."""
    slices = len(widths)
    if slices == 1:
        lora_a, lora_b = ([f] if isinstance(f, Tensor) else f for f in (lora_a, lora_b))
    for name, factors in (("lora_a", lora_a), ("lora_b", lora_b)):
        if isinstance(factors, Tensor) or not isinstance(factors, Sequence):
            raise TypeError(
                f"{name}: expected {'a tensor' if slices == 1 else 'a list of tensors or None'}"
                f", got {type(factors).__name__}"
            )
        if len(factors) != slices:
            raise ValueError(f"{name}: expected one per slice, {slices}, got {len(factors)}")
    pairs = []
    for s, (a, b, width) in enumerate(zip(lora_a, lora_b, widths, strict=True)):
        if a is None or b is None:
            if a is not b:
                raise ValueError(f"lora_a, lora_b: one of slice {s} is None and the other is not")
            pairs.append(None)
            continue
        _check_factor("lora_a", a, on_meta)
        _check_factor("lora_b", b, on_meta)
        if a.ndim != 2 or a.shape[0] < 1 or a.shape[1] != in_features:
            raise ValueError(f"lora_a: expected [rank >= 1, {in_features}], got {list(a.shape)}")
        if tuple(b.shape) != (width, a.shape[0]):
            raise ValueError(
                f"lora_b: expected [{width}, {a.shape[0]}] to match lora_a {list(a.shape)}, "
                f"got {list(b.shape)}"
            )
        pairs.append((a, b))
    if all(pair is None for pair in pairs):
        raise ValueError("lora_a: expected factors for at least one slice, got None for all")
    return pairs


def _check_factor(name: str, factor: Tensor, on_meta: bool) -> None:
    if not isinstance(factor, Tensor) or factor.dtype not in FLOATING:
        raise TypeError(f"{name}: expected a tensor of floating point, got {kind_of(factor)}")
    check_no_wrapper(name, factor)
    if factor.layout is not torch.strided or factor.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got {factor.layout}")
    if factor.is_meta and not on_meta:
        raise ValueError(f"{name}: expected values, got a tensor on the meta device")
    check_has_values(name, factor)
