"""What a :class:`Routing` takes from its caller, checked and made uniform."""

from collections.abc import Iterable, Sequence
from numbers import Integral

import torch
from torch import Tensor

from lora_kernels.ops.routed.bank.slots import BASE, AdapterSlots, ModelVersion


def slots_of(bank) -> AdapterSlots:
    slots = bank if isinstance(bank, AdapterSlots) else getattr(bank, "slots", None)
    if not isinstance(slots, AdapterSlots):
        raise TypeError(
            f"bank: expected an AdapterBank or its AdapterSlots, got {type(bank).__name__}"
        )
    return slots


def bounding_names(adapters: Sequence[str] | None, version: ModelVersion) -> tuple[str, ...] | None:
    """``adapters`` as given to a constructor, checked."""
    if adapters is None:
        return None
    if isinstance(adapters, str) or not isinstance(adapters, Iterable):
        raise TypeError(f"adapters: expected a list of names, got {adapters!r}")
    adapters = tuple(adapters)
    for name in adapters:
        if not isinstance(name, str):
            raise TypeError(f"adapters: expected names, got a {type(name).__name__}")
        if name != BASE and name not in version.names:
            raise ValueError(
                f"adapters: expected names among {sorted(version.names)}, got {name!r}"
            )
    return tuple(name for name in dict.fromkeys(adapters) if name != BASE)


def slots_in(ids: Iterable[int]) -> tuple[int, ...]:
    """The slots among ids, ascending."""
    return tuple(sorted({*ids} - {-1}))


def runs_of(slots: tuple[int, ...]) -> list[tuple[int, int]]:
    """Neighbouring slots as ``(start, end)``."""
    runs: list[tuple[int, int]] = []
    for slot in slots:
        if runs and runs[-1][1] == slot:
            runs[-1] = runs[-1][0], slot + 1
        else:
            runs.append((slot, slot + 1))
    return runs


def integers(name: str, values: Tensor | Sequence) -> Tensor:
    if not isinstance(values, Tensor):
        try:
            dtype = None if len(values) else torch.int64
            values = torch.tensor(values, dtype=dtype, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name}: expected a list of integers or a tensor ({error})") from None
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {values.dtype}")
    return values


def device_for(ids: Tensor, bank, device) -> torch.device | str | None:
    if device is not None or hasattr(bank, "device"):
        return device
    return ids.device


def lengths_of(names: Sequence[str], lengths: int | Sequence[int]) -> list[int]:
    if isinstance(names, str):
        raise TypeError(f"names: expected a list of names, got the string {names!r}")
    tolist = getattr(lengths, "tolist", None)  # of tensors and arrays
    given: object = lengths if tolist is None else tolist()
    if isinstance(given, Integral):
        given = [given] * len(names)
    if not isinstance(given, Sequence):
        raise TypeError(
            f"lengths: expected a number or a list of numbers, got {type(given).__name__}"
        )
    if len(given) != len(names):
        raise ValueError(f"lengths: expected {len(names)}, one per name, got {len(given)}")
    counts = [int(each) for each in given if isinstance(each, Integral) and type(each) is not bool]
    if len(counts) < len(given):
        raise TypeError(f"lengths: expected integers, got {list(given)}")
    if min(counts, default=0) < 0:
        raise ValueError(f"lengths: expected numbers of tokens, got {min(counts)}")
    return counts


def is_fake(tensor: Tensor) -> bool:
    return type(tensor) is not Tensor or torch._C._len_torch_dispatch_stack() > 0
