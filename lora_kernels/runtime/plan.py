"""What follows from a call's metadata alone is made once: its plan, looked up by a key.

The key is taken from the live arguments and holds all that the full check looks at. So a call whose
key is known has passed the check, and one that has not is always checked.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from lora_kernels.runtime import tensor_state

Plan = TypeVar("Plan")
Arguments = ParamSpec("Arguments")

_LIMIT = 4096
# By id, as dicts have no hash. Without a lock: an interrupt just before a `with` lets go of one
# would leave it held for good.
_ALL: weakref.WeakValueDictionary[int, Plans] = weakref.WeakValueDictionary()


class Plans(dict):
    """Plans by their keys. When it is full all are forgotten, and made again as they are needed."""

    def __init__(self) -> None:
        super().__init__()
        _ALL[id(self)] = self

    def keep(self, key: tuple | None, plan: Plan) -> Plan:
        """Remember a plan, unless the key is None."""
        if key is not None:
            if len(self) >= _LIMIT:
                self.clear()
            self[key] = plan
        return plan


_remembering: list[Callable[[], None]] = []


def state_of_process() -> tuple[bool, int]:
    """What decides whose measurements count: no table is read where algorithms are to be
    deterministic, and one of a CPU is for a number of threads."""
    return torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()


def until_forgotten(function: Callable[Arguments, Plan]) -> Callable[Arguments, Plan]:
    """``functools.lru_cache`` that :func:`forget_plans` empties."""
    find = functools.lru_cache(maxsize=_LIMIT)(function)
    _remembering.append(find.cache_clear)
    return cast(Callable[Arguments, Plan], find)


def remembered(function: Callable[Arguments, Plan]) -> Callable[Arguments, Plan]:
    """:func:`until_forgotten`, kept apart by the process's state."""

    @until_forgotten
    def find(_state: tuple, *arguments, **named):
        return function(*arguments, **named)

    @functools.wraps(function)
    def found(*arguments: Arguments.args, **named: Arguments.kwargs) -> Plan:
        return find(state_of_process(), *arguments, **named)

    return found


def forget_plans() -> None:
    """Has to be called where what plans were made from has changed: a table, a verdict, the
    extension."""
    for clear in _remembering:
        clear()
    found = None
    while found is None:
        try:
            found = list(_ALL.values())
        except RuntimeError:  # another thread has made some meanwhile
            continue
    for plans in found:
        plans.clear()


def metadata_of(x: Tensor, *others: Tensor | None) -> tuple | None:
    """The types, dtypes, shapes and devices of tensors, of x's shape the last size only.

    None where only the full check can tell: something is no tensor, has no memory of its own (a
    sparse one, a transform's or a mode's wrapper, a storage that was freed, torch's lazy zero), or
    is empty, or x has no dimension.
    """
    try:
        lowest = tensor_state.LOWEST_ADDRESS
        if x.data_ptr() < lowest:
            return None
        found = [type(x), x.dtype, x.shape[-1], x.is_cpu or x.device]
        for tensor in others:
            if tensor is None:
                found.append(None)
            elif tensor.data_ptr() < lowest:
                return None
            else:
                found += type(tensor), tensor.dtype, tensor.shape, tensor.is_cpu or tensor.device
    except (AttributeError, RuntimeError, IndexError):
        return None
    return tuple(found)
