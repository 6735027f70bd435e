"""Where the pairs of a routing stand: for loops on the host, and for gathers on a device.

Dimensions: M tokens, P pairs, k pairs per token, G groups, T pairs of the longest group.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lora_kernels.ops.routed.tensors import RoutingTensors
from lora_kernels.runtime.capture import stream_of


class Group(NamedTuple):
    """The pairs of one adapter."""

    slot: int
    start: int  # first pair
    end: int
    first: int  # token; -1 where the group's tokens are not neighbours in ascending order

    @property
    def pairs(self) -> slice:
        return slice(self.start, self.end)

    @property
    def tokens(self) -> slice:
        return slice(self.first, self.first + self.end - self.start)


class Layout(NamedTuple):
    """Rows that hold the groups' pairs, one group after the other, as tensors on the device."""

    count: int  # of rows
    pairs: Tensor | None  # [count]: which pair each row holds; None: row p holds pair p
    tokens: Tensor  # [count] int64: whose it is
    slots: Tensor  # [count]
    of_tokens: Tensor  # [k, M]: the row of each token's pairs, in order; count where it has none


class Pairs:
    """The groups of one filling. What a device reads of them is copied there when it is needed,
    once for each stream: see :func:`stream_of`."""

    def __init__(self, plan: Tensor, routing: RoutingTensors) -> None:
        self.groups = [Group(*row) for row in plan.tolist() if row[0] >= 0]  # none of them empty
        self.count = self.groups[-1].end if self.groups else 0  # of their pairs, which come first
        self.some_without = self.count < routing.tokens.shape[0]  # whether others have no adapter
        # Whether every group's tokens are neighbours: its rows are a view.
        self.by_tokens = all(group.first >= 0 for group in self.groups)
        # Token minus pair where that is the same for all of them, else None.
        offsets = {group.first - group.start for group in self.groups}
        self.offset = offsets.pop() if self.by_tokens and len(offsets) == 1 else None
        self.longest = max((group.end - group.start for group in self.groups), default=0)  # T
        self._dense: dict[int, Layout] = {}
        self._padded: dict[int, Layout] = {}

    def dense(self, routing: RoutingTensors) -> Layout:
        """Row p holds pair p."""
        stream = stream_of(routing.tokens.device)
        layout = self._dense.get(stream)
        if layout is None:
            layout = self._dense[stream] = self._laid_out(routing, None)
        return layout

    def padded(self, routing: RoutingTensors) -> Layout:
        """T rows for each group; those behind its pairs hold its first one again."""
        stream = stream_of(routing.tokens.device)
        layout = self._padded.get(stream)
        if layout is None:
            starts = _on_host([group.start for group in self.groups], torch.int32)
            sizes = _on_host([group.end - group.start for group in self.groups], torch.int32)
            place = torch.arange(self.longest, dtype=torch.int32, device="cpu")
            place = torch.where(place < sizes[:, None], place, 0)
            layout = self._padded[stream] = self._laid_out(routing, starts[:, None] + place)
        return layout

    @torch.inference_mode(False)
    def _laid_out(self, routing: RoutingTensors, padded: Tensor | None) -> Layout:
        device = routing.tokens.device
        sizes = _on_host([group.end - group.start for group in self.groups], torch.int64)
        slots = _on_host([group.slot for group in self.groups], torch.int32)
        of_pairs = routing.inverse.view(-1, routing.pairs_per_token).t()
        if padded is None:
            pairs, tokens = None, routing.tokens[: self.count].long()
            count, slots = self.count, slots.repeat_interleave(sizes, output_size=self.count)
            of_tokens = of_pairs.clamp_max(count)
        else:
            count, slots = padded.numel(), slots.repeat_interleave(self.longest)
            moved = torch.arange(len(self.groups), device="cpu") * self.longest - padded[:, 0]
            moved = moved.repeat_interleave(sizes, output_size=self.count)
            rows = torch.full((routing.tokens.shape[0],), count, dtype=torch.int32, device="cpu")
            rows[: self.count] = torch.arange(self.count, device="cpu") + moved
            pairs = padded.flatten().to(device)
            tokens = routing.tokens.index_select(0, pairs).long()
            of_tokens = rows.to(device)[of_pairs.long()]
        return Layout(count, pairs, tokens, slots.to(device), of_tokens.contiguous())


def _on_host(numbers: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU, wherever torch makes tensors by default."""
    return torch.tensor(numbers, dtype=dtype, device="cpu")


_of_plans: WeakIdKeyDictionary = WeakIdKeyDictionary()


def pairs_of(routing: RoutingTensors) -> Pairs:
    """Of a routing with a plan, which is a tensor of its own for every filling."""
    pairs = _of_plans.get(routing.plan)
    if pairs is None:
        pairs = _of_plans[routing.plan] = Pairs(routing.plan, routing)
    return pairs
