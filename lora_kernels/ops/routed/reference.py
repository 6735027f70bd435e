"""The definition of ``routed_lora`` in plain differentiable torch: the oracle of every test."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.ops.routed.tensors import RoutingTensors
from lora_kernels.runtime.dropout import (
    MaskPlace,
    drop_threshold,
    keep_scale,
    packed_keep_mask_of_rows,
    unpacked_keep_mask,
)
from lora_kernels.runtime.dtypes import accumulator_dtype


def shrink(
    x: Tensor,  # [M, K]
    version,  # of the bank
    slots: tuple[int, ...] | None,  # that the routing may use; None: all
    routing: RoutingTensors,
    seed: Tensor | None,  # []
    place: MaskPlace = MaskPlace(),
) -> Tensor:  # [P, H]
    """``h = D(x) A^T`` of every pair, zero beyond the rank of its adapter."""
    dtype = accumulator_dtype(x.dtype)
    h = x.new_zeros((routing.tokens.shape[0], version.max_total_rank), dtype=dtype)
    h = h + x[:0].sum()  # nothing, but a function of x
    for adapter in _adapters(version, slots):
        pairs, tokens = _pairs_of(adapter.slot, routing)
        dropped = _dropped(x[tokens], adapter, tokens, seed, place)
        parts = [pair[0].to(x.dtype) for pair in adapter.factors() if pair is not None]
        narrow = F.linear(dropped, torch.cat(parts)).to(dtype)
        narrow = F.pad(narrow, (0, version.max_total_rank - narrow.shape[1]))
        h = h.index_add(0, pairs, narrow)
    return h


def expand(
    h: Tensor,  # [P, H]
    base: Tensor,  # [M, N]
    version,
    slots: tuple[int, ...] | None,
    routing: RoutingTensors,
) -> Tensor:  # [M, N]
    """``base + sum of w s h B^T`` over the pairs of each token, rounding like eager torch."""
    nothing = h[:0].sum()  # but a function of h and of the weights
    if routing.pair_weights is not None:
        nothing = nothing * routing.pair_weights[:0].sum()
    y = base - nothing.to(base.dtype)
    for adapter in _adapters(version, slots):
        pairs, tokens = _pairs_of(adapter.slot, routing)
        narrow = h[pairs][:, : adapter.rank].to(base.dtype).split(adapter.ranks, dim=1)
        parts = [
            part.new_zeros((part.shape[0], width))
            if pair is None
            # torch 2.9 multiplies one strided column wrongly in bf16, in the backward.
            else F.linear(part.contiguous(), pair[1].to(base.dtype))
            * version.tables.scaling[adapter.slot].to(base.device)
            for part, pair, width in zip(
                narrow, adapter.factors(), version.shapes.slice_widths, strict=True
            )
        ]
        delta = torch.cat(parts, dim=1)
        if routing.pair_weights is not None:
            delta = delta * routing.pair_weights[pairs].to(base.dtype).unsqueeze(1)
        y = y.index_add(0, tokens, delta.to(base.dtype))
    assert y.shape[1] == version.slice_columns[-1]
    return y


def _adapters(version, slots: tuple[int, ...] | None) -> list:
    return [entry.adapter for entry in version.entries_in(slots)]


def _pairs_of(slot: int, routing: RoutingTensors) -> tuple[Tensor, Tensor]:
    """The indices of a slot's pairs, and their tokens."""
    start, end = routing.offsets[slot : slot + 2].tolist()
    pairs = torch.arange(start, end, device=routing.tokens.device)
    return pairs, routing.tokens[start:end].long()


def _dropped(
    rows: Tensor, adapter, tokens: Tensor, seed: Tensor | None, place: MaskPlace
) -> Tensor:
    if seed is None or not adapter.training or drop_threshold(adapter.dropout_p) == 0:
        return rows
    p, slot = adapter.dropout_p, adapter.slot
    packed = packed_keep_mask_of_rows(seed, p, tokens, rows.shape[1], slot, place)
    keep = unpacked_keep_mask(packed, rows.shape[1])
    return torch.where(keep, rows * keep_scale(adapter.dropout_p), 0)
