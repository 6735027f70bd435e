"""What the backends of ``routed_lora`` work on: a bank and a routing as plain tensors and numbers.

Dimensions: L slots, S slices, P pairs of a token and an adapter, K in_features, N_s out_features of
slice s, R_s an adapter's rank there, R = R_1 + ... + R_S, H the widest R of the bank.

A *factor* of an adapter is its A of all slices ``[R, K]``, or its B of one slice ``[N_s, R_s]``:
1 + S factors, A first.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from lora_kernels.ops.routed.bank.storage import ALIGNMENT
from lora_kernels.runtime.capture import is_captured


class BankTensors(NamedTuple):
    """The adapters of one layer.

    The order of the adapters, and so of everything that is listed once per adapter or per factor,
    is that of their slots.
    """

    factors: list[Tensor]  # 1 + S per adapter
    slots: list[int]  # per adapter
    thresholds: list[int]  # per adapter: q of its dropout, 0 where it does not drop
    slice_columns: list[int]  # [S + 1]: where each slice begins in the result, and its width
    max_total_rank: int  # H: the widest adapter, its slices together
    storage: Tensor  # the factors of all adapters, flat
    slot_table: Tensor  # [L + 1, 1 + S, 3] int64: rank, first column of it in h, offset in storage
    scaling: Tensor  # [L + 1] fp64 (fp32 where composed alone runs)
    threshold_table: Tensor  # [L + 1] int32

    @property
    def num_slices(self) -> int:
        return len(self.slice_columns) - 1

    def factors_of(self, adapter: int) -> list[Tensor]:
        """``[A, B_1, ... B_S]`` of the adapter with that index (not slot)."""
        count = 1 + self.num_slices
        return self.factors[adapter * count : (adapter + 1) * count]

    def parts_of(self, adapter: int) -> "list[Part]":
        """The slices in which the adapter with that index has a rank."""
        found, start = [], 0
        for index, b in enumerate(self.factors_of(adapter)[1:]):
            columns = slice(self.slice_columns[index], self.slice_columns[index + 1])
            if b.shape[1]:
                found.append(Part(index, columns, slice(start, start + b.shape[1])))
            start += b.shape[1]
        return found


class Part(NamedTuple):
    """Where one slice of one adapter stands."""

    index: int  # of the slice
    columns: slice  # of the result
    ranks: slice  # of h


def in_one_piece(bank: BankTensors, dtype: torch.dtype | None = None) -> BankTensors:
    """The same adapters in a storage of their own, of that dtype if given, one factor behind the
    other."""
    table, factors, end = bank.slot_table.clone(), [], 0
    for index, slot in enumerate(bank.slots):
        for row, factor in zip(table[slot], bank.factors_of(index), strict=True):
            row[2].fill_(end)
            factors.append(F.pad(factor.flatten(), (0, -factor.numel() % ALIGNMENT)))
            end += factors[-1].numel()
    storage = torch.cat([bank.storage.new_zeros(0), *factors])
    return bank._replace(storage=storage.to(dtype or storage.dtype), slot_table=table)


class GradientLayout(NamedTuple):
    """Where the gradients of the factors lie in one flat tensor, without gaps for those not needed.

    It holds the adapters that a batch may use, in the order of their slots, and no others. An
    offset is -1 where no gradient is needed.
    """

    slots: list[int]  # of those adapters
    offsets: list[int]  # 1 + S for each of them
    numel: int
    table: Tensor  # [L + 1, 1 + S] int64: the same by slot, -1 for all other slots

    def needs_gradient(self, bank: BankTensors) -> tuple[bool, bool]:
        """Whether any A, and whether any B, needs a gradient."""
        of_a = self.offsets[:: len(bank.slice_columns)]
        needed, needed_of_a = len(self.offsets) - self.offsets.count(-1), len(of_a) - of_a.count(-1)
        return needed_of_a > 0, needed > needed_of_a

    def by_slot(self, bank: BankTensors) -> dict[int, list[int]]:
        """The offsets ``[A, B_1, ... B_S]`` of each adapter."""
        count = 1 + bank.num_slices
        return {
            slot: self.offsets[index * count : (index + 1) * count]
            for index, slot in enumerate(self.slots)
        }


class TrainableFactors(NamedTuple):
    """The parameters of a layout's adapters as arguments of an op: autograd sees them there."""

    parameters: list[Tensor]
    offsets: list[int]  # of the gradient in the flat tensor; -1 where none is needed
    slots: list[int]  # whose it is

    def used(self, routing: "RoutingTensors") -> list[Tensor]:
        """The parameters of the adapters that the batch uses, as far as the host knows."""
        if type(routing.plan) is not Tensor:
            return []  # a graph is being traced: there are no values to look at
        # Past modes: checkpointing compares what two calls save, of which one may be under a mode.
        if torch._C._len_torch_dispatch_stack() > 0:
            with _disable_current_modes():
                return self.used(routing)
        is_used = set(routing.plan[:, 0].tolist()).__contains__
        return list(itertools.compress(self.parameters, map(is_used, self.slots)))

    def gradients(self, flat: Tensor) -> list[Tensor | None]:
        return [
            flat.as_strided(parameter.shape, (parameter.shape[1], 1), offset)
            if offset >= 0
            else None
            for offset, parameter in zip(self.offsets, self.parameters, strict=True)
        ]


class RoutingTensors(NamedTuple):
    """Which adapters each token uses: pairs (token, slot, weight), grouped by slot.

    Group L holds the pairs without an adapter. Within a group the pairs keep the tokens' order.
    """

    tokens: Tensor  # [P] int32
    offsets: Tensor  # [L + 2] int32: where each group begins; the last is P
    tiles: Tensor  # [T, 2] int32: slot and first pair of at most BLOCK pairs; slot -1: none
    inverse: Tensor  # [P] int32: where the pairs of token 0 are, then those of token 1, ...
    pair_weights: Tensor | None  # [P] fp32
    plan: Tensor  # [G, 4] int64, on the CPU: see Routing.plan; [0, 4] where nobody needs it
    pairs_per_token: int
    block: int  # pairs per tile


def check_groups_can_be_read(device: torch.device) -> None:
    """Raise where a CUDA graph is captured: loops over the groups that a routing has now, be they
    known from an earlier call, would be replayed with the next filling too."""
    if is_captured(device):
        raise RuntimeError(
            "the composed backend reads the sizes of a routing's groups, which cannot be captured "
            "in a CUDA graph; use backend='triton', or leave the call out of the graph"
        )


def groups_of(
    offsets: Tensor,  # [L + 2]
    tokens: Tensor,  # [P]
) -> Tensor:
    """The groups of a routing for loops on the host: int64 ``[G, 4]`` on the CPU, see Routing.plan.

    This waits for a device.

    Raises:
        RuntimeError: a CUDA graph is captured.
    """
    if tokens.is_meta:
        return torch.empty((0, 4), dtype=torch.int64, device="cpu")
    check_groups_can_be_read(tokens.device)
    starts, tokens = offsets.cpu().long(), tokens.cpu().long()
    counts = starts[1:] - starts[:-1]
    slot = torch.nonzero(counts[:-1]).flatten()
    start, end = starts[slot], starts[slot + 1]
    jumps = torch.nn.functional.pad((tokens[1:] - tokens[:-1] != 1).cumsum(0), (1, 0))
    first = torch.where(jumps[end - 1] == jumps[start], tokens[start], -1)
    return torch.stack([slot, start, end, first], dim=1)
