"""What the steps of one call of ``routed_lora`` share on the vendor's GEMMs.

Dimensions: M tokens, P pairs, K in_features, N out_features of all slices, H the widest rank of the
bank, R an adapter's rank over its slices, n the pairs of one group.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.ops.narrow.grouped import cast, factor_dtype
from lora_kernels.ops.routed.call import RoutedCall
from lora_kernels.ops.routed.pairs import Group, Layout, pairs_of
from lora_kernels.ops.routed.tensors import GradientLayout, Part
from lora_kernels.runtime.dtypes import accumulator_dtype

# Of activations that a CPU gathers at once: as little as makes up for the operations.
_CPU_ELEMENTS = 1 << 14

OF_A, OF_B = slice(0, 1), slice(1, None)  # among the factors of an adapter


class Member(NamedTuple):
    """A group whose adapter is in the bank."""

    group: Group
    factors: list[Tensor]  # A of all slices, B of each
    parts: list[Part]


class Rows(NamedTuple):
    """The groups' rows of a tensor: parts of itself, or of what was gathered from it."""

    rows: Tensor
    first: int | None  # pair of the first row; None: the tensor itself, with a row per token

    def __getitem__(self, group: Group) -> Tensor:
        if self.first is None:
            return self.rows[group.tokens]
        return self.rows[group.start - self.first : group.end - self.first]


class Block(NamedTuple):
    """Members whose rows are gathered together."""

    members: list[Member]
    pairs: slice


def _block_of(members: list[Member]) -> Block:
    return Block(members, slice(members[0].group.start, members[-1].group.end))


class Batch:
    """The groups of a call; ``like`` are its activations ``[M, ...]``."""

    def __init__(self, call: RoutedCall, like: Tensor) -> None:
        self.call, self.like = call, like
        self.pairs = pairs_of(call.routing)
        bank = call.bank
        adapter_of = {slot: index for index, slot in enumerate(bank.slots)}
        self.members: list[Member] = []
        self.absent: list[Group] = []
        for group in self.pairs.groups:
            adapter = adapter_of.get(group.slot)
            if adapter is None:
                self.absent.append(group)
                continue
            factors, parts = bank.factors_of(adapter), bank.parts_of(adapter)
            self.members.append(Member(group, factors, parts))
        self.ranks = sum(member.factors[0].shape[0] for member in self.members)

    def blocks(self) -> Iterator[Block]:
        """All at once on a device; on a CPU few rows at a time, or those of one group."""
        if self.like.device.type != "cpu" or not self.members:
            yield Block(self.members, slice(0, self.call.routing.tokens.shape[0]))
            return
        most, members = _CPU_ELEMENTS // self.like.shape[1], []
        for member in self.members:
            if members and member.group.end - members[0].group.start > most:
                yield _block_of(members)
                members = []
            members.append(member)
        yield _block_of(members)

    def layout(self) -> Layout:
        return self.pairs.dense(self.call.routing)

    def tokens(self, block: Block) -> Tensor:
        return self.layout().tokens[block.pairs]

    def rows(self, x: Tensor, block: Block) -> Rows:
        if self.pairs.by_tokens:
            return Rows(x, None)
        return Rows(x.index_select(0, self.tokens(block)), block.pairs.start)

    def scale(self, layout: Layout, *, weighted: bool = True) -> Tensor:
        """``[rows, 1]``: the scaling of each pair's adapter, times its weight."""
        weights, dtype = self.call.routing.pair_weights, accumulator_dtype(self.like.dtype)
        scale = self.call.bank.scaling.index_select(0, layout.slots).to(dtype)
        if not weighted or weights is None:
            return scale.unsqueeze(1)
        at = layout.pairs
        weights = weights[: layout.count] if at is None else weights.index_select(0, at)
        return (scale * weights.to(dtype)).unsqueeze(1)

    def narrow(self, rows: int, dtype: torch.dtype) -> Tensor:
        """``[rows, H]`` for h or t of the pairs, zero where no product will write."""
        width = self.call.bank.max_total_rank
        written = sum(
            member.factors[0].shape[0] * (member.group.end - member.group.start)
            for member in self.members
        )
        new = self.like.new_empty if written == rows * width else self.like.new_zeros
        return new((rows, width), dtype=dtype)

    def factors(
        self, which: slice, *, narrow: bool
    ) -> tuple[Mapping[int, Sequence[Tensor]], Tensor | None]:
        """A, or the B, of each member as products take them, by slot; ``narrow`` says whether the
        products are h or t, which are to be multiplied by the second result if it is not None."""
        found = [factor for member in self.members for factor in member.factors[which]]
        if not found:
            return {}, None
        dtype = factor_dtype(self.like, found[0].dtype, self.ranks, narrow)
        made, exponent = cast(found, dtype, in_range=narrow)
        count = len(found) // len(self.members)
        by_slot = {
            member.group.slot: made[index * count : (index + 1) * count]
            for index, member in enumerate(self.members)
        }
        return by_slot, exponent


class FlatGradient:
    """The gradients of all factors, flat, in a dtype that products can be written in."""

    def __init__(self, batch: Batch, layout: GradientLayout) -> None:
        self.members, bank = batch.members, batch.call.bank
        self.dtype = dtype = bank.storage.dtype
        wide = accumulator_dtype(batch.like.dtype)
        if dtype == torch.float16 or dtype not in (batch.like.dtype, wide):
            dtype = wide
        self.flat = bank.storage.new_zeros(layout.numel, dtype=dtype)
        self.offsets, nowhere = layout.by_slot(bank), [-1] * (1 + bank.num_slices)
        self.needs_a = self.needs_b = False
        for member in self.members:
            of_a, *of_b = self.offsets.setdefault(member.group.slot, nowhere)
            self.needs_a |= of_a >= 0
            self.needs_b |= max(of_b) >= 0

    def of(self, member: Member, index: int) -> Tensor | None:
        """The place of one factor's gradient; None where none is needed."""
        factor, offset = member.factors[index], self.offsets[member.group.slot][index]
        if offset < 0:
            return None
        return self.flat[offset : offset + factor.numel()].view(factor.shape)

    def multiply_(self, which: slice, exponent: Tensor) -> None:
        """Multiply gradients by what the operands of their products were divided by."""
        indices = range(len(self.members[0].factors))[which]
        found = [self.of(member, index) for member in self.members for index in indices]
        gradients = [gradient for gradient in found if gradient is not None]
        torch._foreach_mul_(gradients, exponent)  # pyright: ignore[reportPrivateImportUsage]

    def result(self) -> Tensor:
        return self.flat.to(self.dtype)
