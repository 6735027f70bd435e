"""Dropout of the pairs' rows: gathered and masked in one pass, by Triton's kernel where it runs.

Dimensions: M tokens, P pairs, K in_features. A mask is ``[P, ceil(K/8)]`` uint8, one row of
:func:`lora_kernels.runtime.dropout.packed_keep_mask` per pair, drawn for its token and its slot.
"""

from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from lora_kernels.ops.narrow.masks import has_kernels, with_neighbours
from lora_kernels.ops.narrow.products import row_chunks
from lora_kernels.ops.routed.pairs import Group, pairs_of
from lora_kernels.ops.routed.tensors import BankTensors, RoutingTensors
from lora_kernels.runtime.dropout import MaskPlace, packed_keep_mask_of_rows, zero_dropped


def gather_masked(
    x: Tensor,  # [M, K]
    routing: RoutingTensors,
    bank: BankTensors,
    seed: Tensor,  # []; not read where a mask is given
    place: MaskPlace,
    mask: Tensor | None,  # [P, ceil(K/8)]
    pairs: slice,  # whole groups; all pairs on a device
) -> tuple[Tensor, Tensor]:
    """``keep * scale * x`` of some pairs ``[n, K]``, rounded once, and the mask of all.

    Rows of pairs whose adapter is not in the bank are zero.
    """
    if (kernels := _kernels(x)) is not None:
        x, mask = with_neighbours(x), None if mask is None else mask.contiguous()
        return kernels.gather_masked(x, routing, bank.threshold_table, seed, place, mask)
    if mask is None:
        mask = draw_masks(x.shape[1], routing, bank, seed, place)
    kept = x.new_zeros((pairs.stop - pairs.start, x.shape[1]))
    for some, threshold in _chunks(routing, bank, pairs, x):
        gathered = x.index_select(0, routing.tokens[some])
        rows = slice(some.start - pairs.start, some.stop - pairs.start)
        kept[rows] = _masked(gathered, mask[some], threshold)
    return kept, mask


def mask_rows_(
    z: Tensor,  # [P, K]
    routing: RoutingTensors,
    bank: BankTensors,
    mask: Tensor,  # [P, ceil(K/8)]
) -> None:
    """``z = keep * scale * z`` for the pairs whose adapter is in the bank."""
    if (kernels := _kernels(z)) is not None:
        kernels.mask_rows_(z, routing, bank.threshold_table, mask.contiguous())
        return
    for some, threshold in _chunks(routing, bank, slice(0, z.shape[0]), z):
        if threshold:
            z[some] = _masked(z[some], mask[some], threshold)


def draw_masks(
    columns: int, routing: RoutingTensors, bank: BankTensors, seed: Tensor, place: MaskPlace
) -> Tensor:
    """The masks alone; zeros for pairs whose adapter does not drop."""
    shape = (routing.tokens.shape[0], -(-columns // 8))
    mask = torch.zeros(shape, dtype=torch.uint8, device=seed.device)
    for group, threshold in _groups(routing, bank):
        if threshold:
            tokens = routing.tokens[group.pairs]
            mask[group.pairs] = packed_keep_mask_of_rows(
                seed, threshold / 65536, tokens, columns, group.slot, place
            )
    return mask


def _groups(routing: RoutingTensors, bank: BankTensors) -> Iterator[tuple[Group, int]]:
    threshold_of = dict(zip(bank.slots, bank.thresholds, strict=True))
    for group in pairs_of(routing).groups:
        if group.slot in threshold_of:
            yield group, threshold_of[group.slot]


def _chunks(
    routing: RoutingTensors, bank: BankTensors, pairs: slice, x: Tensor
) -> Iterator[tuple[slice, int]]:
    """Pairs of one adapter each, and its threshold."""
    for group, threshold in _groups(routing, bank):
        if pairs.start <= group.start < pairs.stop:
            for chunk in row_chunks(group.end - group.start, x.shape[1], x.device):
                yield slice(group.start + chunk.start, group.start + chunk.stop), threshold


def _masked(x: Tensor, mask: Tensor, threshold: int) -> Tensor:
    if threshold == 0:
        return x
    return zero_dropped(x, mask).mul_(65536 / (65536 - threshold))


def _kernels(x: Tensor) -> ModuleType | None:
    """Triton's module where it serves x's device and dtype."""
    return import_module("lora_kernels.ops.routed.triton.masked") if has_kernels(x) else None
