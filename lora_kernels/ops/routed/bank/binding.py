"""How an adapter's parameters come to lie in a region of memory, and what cannot be bound to one.

``p.data = slab`` lets a Parameter have its numbers where the kernels read them.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor, nn

from lora_kernels.ops.routed.bank.adapter import Adapter
from lora_kernels.ops.routed.bank.slots import Change
from lora_kernels.ops.routed.bank.versions import BankVersion, Bound, Entry, table_rows


def new_factors(version: BankVersion, ranks: tuple[int, ...]) -> list[Tensor]:
    """A region of zeros: A of all slices, B of each."""
    size = version.shapes.region_size(ranks)
    if version.reserved is None:
        region = torch.zeros(size, dtype=version.dtype, device=version.device)
        return version.shapes.factors(region, ranks)
    max_rank, arena = version.reserved.max_rank, version.reserved.arena
    if sum(ranks) > max_rank:
        raise RuntimeError(
            f"add: rank {sum(ranks)} is above max_rank {max_rank}, which captured CUDA graphs "
            "rely on; reserve() raises it, and they must be captured again"
        )
    region = arena.take(size)
    if region is None:
        raise RuntimeError(
            f"add: {size} elements do not fit in what rank_capacity reserved ({arena.size} "
            f"elements, {arena.largest_free()} of them free in one piece); reserve() makes "
            "room, which moves the storage: CUDA graphs captured before must be captured again"
        )
    return version.shapes.factors(region, ranks)


def bound_to(
    version: BankVersion, adapter: Adapter, factors: list[Tensor], trainable: bool = True
) -> Entry:
    """An adapter whose values are in ``factors`` already, its parameters bound to them; they are
    made where it has none yet."""
    bound, slabs = [], version.shapes.slabs(factors, adapter.ranks)
    for names, pair in zip(adapter.parameter_names(), slabs, strict=True):
        for key, slab in zip(names, pair or (), strict=False):
            parameter = adapter._parameters.get(key)
            if parameter is None:
                parameter = nn.Parameter(slab.new_empty(0), requires_grad=trainable)
                adapter.register_parameter(key, parameter)
            parameter.data = slab
            bound.append(Bound(adapter._parameters, key, parameter, slab.data_ptr()))
    rows = table_rows(adapter.ranks, factors, version.storage)
    return Entry(adapter.slot, adapter, factors, rows, bound, adapter.rank)


@torch.no_grad()
def moved(change: Change, version: BankVersion, name: str, adapter: Adapter) -> Entry:
    """An adapter in a region of its own, with the values that its parameters have."""
    factors = new_factors(version, adapter.ranks)
    slabs = version.shapes.slabs(factors, adapter.ranks)
    for names, pair in zip(adapter.parameter_names(), slabs, strict=True):
        for key, slab in zip(names, pair or (), strict=False):
            parameter = _checked(name, adapter._parameters.get(key), slab)
            slab.copy_(parameter.data)
            data = parameter.data
            change.on_undo(lambda p=parameter, data=data: setattr(p, "data", data))
    return bound_to(version, adapter, factors)


@torch.no_grad()
def copied_over(version: BankVersion, name: str, entry: Entry) -> Entry:
    """An adapter where it was, with the values that its parameters have."""
    slabs = version.shapes.slabs(entry.factors, entry.adapter.ranks)
    values = [bound.parameter.data.clone() for bound in entry.bound]
    places = [slab for pair in slabs for slab in pair or ()]
    for bound, value, slab in zip(entry.bound, values, places, strict=True):
        _checked(name, bound.parameter, slab)
        slab.copy_(value)
        # A backward that is still to come would read the new values: it raises.
        torch.autograd.graph.increment_version(bound.parameter)
    return bound_to(version, entry.adapter, entry.factors)


def _checked(name: str, parameter: nn.Parameter | None, slab: Tensor) -> nn.Parameter:
    if parameter is None or type(parameter) is not nn.Parameter or hasattr(parameter, "ds_id"):
        refuse(parameter)
    if parameter.shape != slab.shape:
        raise RuntimeError(
            f"a parameter of adapter {name!r} has become {list(parameter.shape)}, its slab is "
            f"{list(slab.shape)}: remove and add the adapter to change its rank; FSDP and ZeRO-3 "
            "must be told to ignore the bank"
        )
    return parameter


def refuse(parameter: object) -> NoReturn:
    """Raise for what has come in a parameter's place; None is what computes it."""
    came = "something that computes it" if parameter is None else f"a {type(parameter).__name__}"
    if hasattr(parameter, "ds_id"):
        came += " partitioned by ZeRO-3"
    raise RuntimeError(
        f"an adapter's parameter was replaced by {came}: the bank works on its own storage; tell "
        "FSDP and ZeRO-3 to ignore it, do not use functional_call or parametrizations on it, and "
        "call rebind() after putting another Parameter in place"
    )
