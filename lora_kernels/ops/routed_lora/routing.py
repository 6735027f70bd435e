"""Which adapters each token of a batch uses."""

import os
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from lora_kernels.dtypes import computes_in_64_bits
from lora_kernels.ops.routed_lora.operands import RoutingTensors
from lora_kernels.ops.routed_lora.slots import AdapterSlots

# Pairs per tile of the kernels: the smallest a matrix instruction takes while the batch is small.
_SMALL_BLOCK, _LARGE_BLOCK = 16, 64
_SMALL_BATCH = 256

# Read once, at import: checking ids on a device needs a synchronisation.
_DEBUG = os.environ.get("LORA_KERNELS_DEBUG", "0") not in ("", "0")


class Routing:
    """The adapters of each token: pairs (token, slot, weight), grouped by slot.

    It depends on the slots only, so that one routing serves every layer of a model; it has no
    autograd of its own but lets gradients through to weights that require them. It is built on the
    device by operations of fixed shapes, without a synchronisation, in buffers that can be filled
    again in place: a CUDA graph captured with a routing replays with whatever it holds by then.
    For a device other than a CPU or a CUDA one it is built on the CPU, and its buffers are copied.

    Make one with :meth:`from_tokens`, :meth:`from_sequences`, :meth:`from_segments` or
    :meth:`from_weighted`, or :meth:`empty` and the methods that end in ``_``.

    A slot of -1 means no adapter. Ids that are no adapter's are an error where they can be read
    without waiting for a device (lists, tensors on the CPU) or with ``LORA_KERNELS_DEBUG=1`` in the
    environment; on a device they otherwise act as -1. On a CUDA device the composed backend reads
    the groups' sizes once per filling, which waits for the device; the kernels never do.

    Attributes:
        max_tokens: how many tokens there is room for.
        num_tokens: how many were set last. x may have that many rows, or ``max_tokens``: the rest
            use no adapter.
        pairs_per_token: how many adapters a token may use.
        slots: the slots that the ids are numbers of.
    """

    @torch.inference_mode(False)  # a routing made while serving may train
    def __init__(
        self, max_tokens: int, slots: AdapterSlots, pairs_per_token: int, device: torch.device
    ) -> None:
        self.max_tokens, self.pairs_per_token = max_tokens, pairs_per_token
        self.slots = slots
        self.device = torch.device(device)
        # Where int64 is not to be relied on the host makes the groups: composed, which alone runs
        # there, reads them on the host in any case.
        on_device = computes_in_64_bits(self.device)
        self._built_on = self.device if on_device else torch.device("cpu")
        self.num_tokens = 0
        self.version = slots.version
        self._capacity = slots.capacity
        pairs, groups = max_tokens * pairs_per_token, slots.capacity + 1
        self.block = _SMALL_BLOCK if pairs <= _SMALL_BATCH else _LARGE_BLOCK
        num_tiles = pairs // self.block + min(groups, pairs)

        def ints(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=self.device)

        self._tokens, self._inverse = ints(pairs), ints(pairs)
        self._offsets, self._tiles = ints(groups + 1), ints(num_tiles, 2)
        self._order = torch.empty(pairs, dtype=torch.int64, device=self.device)
        self._weight_buffer: Tensor | None = None
        self._weights: Tensor | None = None  # the buffer, or [M, k] as given if it requires grad
        self._plan: Tensor | None = None
        self._padded_plan: Tensor | None = None
        self._fill(torch.full((0,), -1, dtype=torch.int64, device=self._built_on), 0)

    # --- constructors -------------------------------------------------------------------------

    @staticmethod
    def empty(
        max_tokens: int,
        bank,
        pairs_per_token: int = 1,
        *,
        device: torch.device | str | None = None,
    ) -> "Routing":
        """A routing with room for ``max_tokens`` tokens, none of which uses an adapter yet.

        Args:
            max_tokens: at least 0.
            bank: an ``AdapterBank``, or the ``AdapterSlots`` that banks share.
            pairs_per_token: how many adapters a token may use, at least 1.
            device: where it is built; None is the bank's device, or the CPU.
        """
        for name, value, least in (
            ("max_tokens", max_tokens, 0),
            ("pairs_per_token", pairs_per_token, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
                raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        slots = _slots_of(bank)
        if max_tokens * pairs_per_token >= 2**31:
            raise ValueError(
                f"max_tokens: expected fewer than 2^31 pairs of a token and an adapter, got "
                f"{max_tokens} * {pairs_per_token}"
            )
        if device is None:
            device = getattr(bank, "device", "cpu")
        return Routing(max_tokens, slots, pairs_per_token, torch.device(device))

    @staticmethod
    def from_tokens(
        ids: Tensor | Sequence[int], bank, *, device: torch.device | str | None = None
    ) -> "Routing":
        """Each token names its slot: ids ``[...]``, integers, -1 for none."""
        ids = _integers("ids", ids)
        device = _device_for(ids, bank, device)
        return Routing.empty(ids.numel(), bank, device=device).set_tokens_(ids)

    @staticmethod
    def from_sequences(
        names: Sequence[str],
        lengths: int | Sequence[int],
        bank,
        *,
        device: torch.device | str | None = None,
    ) -> "Routing":
        """Sequences one after the other, each naming its adapter (or ``"__base__"``).

        Args:
            names: one per sequence.
            lengths: tokens of each sequence, or one number for all.
        """
        lengths = _lengths(names, lengths)
        return Routing.empty(sum(lengths), bank, device=device).set_sequences_(names, lengths)

    @staticmethod
    def from_segments(
        ids: Tensor | Sequence[int],
        offsets: Tensor | Sequence[int],
        bank,
        *,
        num_tokens: int | None = None,
        device: torch.device | str | None = None,
    ) -> "Routing":
        """Segments of neighbouring tokens: ids ``[n]`` and offsets ``[n + 1]``, ascending.

        Segment i holds the tokens ``offsets[i] .. offsets[i + 1] - 1``; tokens outside of every
        segment use no adapter.

        Args:
            num_tokens: of the whole batch; None is ``offsets[-1]``, which must then be readable
                without waiting for a device.
        """
        offsets = _integers("offsets", offsets)
        if num_tokens is None:
            if offsets.device.type != "cpu":
                raise ValueError(
                    f"num_tokens: expected a number, as offsets are on {offsets.device} and are "
                    "not read back"
                )
            num_tokens = int(offsets[-1]) if offsets.numel() else 0
        ids = _integers("ids", ids)
        device = _device_for(ids, bank, device)
        return Routing.empty(num_tokens, bank, device=device).set_segments_(ids, offsets)

    @staticmethod
    def from_weighted(
        ids: Tensor | Sequence[Sequence[int]],
        weights: Tensor | Sequence[Sequence[float]],
        bank,
        *,
        device: torch.device | str | None = None,
    ) -> "Routing":
        """Several weighted adapters per token: ids and weights ``[M, k]``.

        A token's result is the sum of its adapters' contributions times their weights. Gradients
        reach ``weights`` if it requires them.
        """
        ids = _integers("ids", ids)
        if ids.ndim != 2 or ids.shape[1] < 1:
            raise ValueError(f"ids: expected [tokens, adapters per token], got {list(ids.shape)}")
        device = _device_for(ids, bank, device)
        return Routing.empty(ids.shape[0], bank, ids.shape[1], device=device).set_weighted_(
            ids, weights
        )

    # --- filling ------------------------------------------------------------------------------

    def set_tokens_(self, ids: Tensor | Sequence[int]) -> "Routing":
        """Fill it again as :meth:`from_tokens` does, with at most ``max_tokens`` tokens."""
        ids = _integers("ids", ids).flatten()
        if self.pairs_per_token != 1:
            raise ValueError(
                f"ids: this routing has {self.pairs_per_token} adapters per token; fill it with "
                "set_weighted_"
            )
        self._check_room(ids.shape[0])
        self._check_ids(ids)
        self._weights = None
        self._fill(ids, ids.shape[0])
        return self

    def set_sequences_(self, names: Sequence[str], lengths: int | Sequence[int]) -> "Routing":
        """Fill it again as :meth:`from_sequences` does."""
        lengths = _lengths(names, lengths)
        unknown = [name for name in names if name != "__base__" and name not in self.slots]
        if unknown:
            raise ValueError(
                f"names: expected '__base__' or one of {sorted(self.slots)}, got {unknown[0]!r}"
            )
        slots = torch.tensor([self.slots[name] for name in names], dtype=torch.int64)
        return self.set_tokens_(slots.repeat_interleave(torch.tensor(lengths, dtype=torch.int64)))

    def set_segments_(
        self, ids: Tensor | Sequence[int], offsets: Tensor | Sequence[int]
    ) -> "Routing":
        """Fill all ``max_tokens`` tokens again as :meth:`from_segments` does."""
        ids, offsets = _integers("ids", ids), _integers("offsets", offsets)
        if ids.ndim != 1 or tuple(offsets.shape) != (ids.shape[0] + 1,):
            raise ValueError(
                f"offsets: expected one more than ids {list(ids.shape)}, got {list(offsets.shape)}"
            )
        self._check_ids(ids)
        if (offsets.device.type == "cpu" or _DEBUG) and not _is_fake(offsets):
            steps = offsets.tolist()
            if steps != sorted(steps) or (steps and (steps[0] < 0 or steps[-1] > self.max_tokens)):
                raise ValueError(
                    f"offsets: expected ascending numbers from 0 to at most {self.max_tokens}, "
                    f"got {steps}"
                )
        ids, offsets = ids.to(self._built_on, torch.int64), offsets.to(self._built_on)
        # A segment -1 before the first and after the last.
        padded = torch.nn.functional.pad(ids, (1, 1), value=-1)
        token = torch.arange(self.max_tokens, device=self._built_on)
        segment = torch.searchsorted(offsets.contiguous(), token, right=True)
        return self.set_tokens_(padded.gather(0, segment))

    def set_weighted_(
        self, ids: Tensor | Sequence[Sequence[int]], weights: Tensor | Sequence[Sequence[float]]
    ) -> "Routing":
        """Fill it again as :meth:`from_weighted` does."""
        ids = _integers("ids", ids)
        if ids.ndim != 2 or ids.shape[1] != self.pairs_per_token:
            raise ValueError(
                f"ids: expected [tokens, {self.pairs_per_token}], got {list(ids.shape)}"
            )
        if not isinstance(weights, Tensor):
            weights = torch.tensor(weights, dtype=torch.float32)
        if not weights.is_floating_point():
            raise TypeError(f"weights: expected floating point numbers, got {weights.dtype}")
        if weights.shape != ids.shape:
            raise ValueError(
                f"weights: expected {list(ids.shape)} like ids, got {list(weights.shape)}"
            )
        self._check_room(ids.shape[0])
        self._check_ids(ids)
        self._fill(ids.flatten(), ids.shape[0])
        if weights.requires_grad and torch.is_grad_enabled():
            self._weights = weights
            return self
        with torch.inference_mode(False), torch.no_grad():
            sorted_weights = self._sorted(weights)
            if self._weight_buffer is None or self._weight_buffer.dtype != sorted_weights.dtype:
                self._weight_buffer = sorted_weights
            self._weights = self._weight_buffer.copy_(sorted_weights)
        return self

    def _check_room(self, tokens: int) -> None:
        if tokens > self.max_tokens:
            raise ValueError(
                f"ids: expected at most {self.max_tokens} tokens, which this routing was made "
                f"for, got {tokens}"
            )
        if self.slots.capacity != self._capacity:
            raise ValueError(
                f"routing: there are {self.slots.capacity} slots now and were {self._capacity} "
                "when this routing was made; make a new one (and capture CUDA graphs again)"
            )

    def _check_ids(self, ids: Tensor) -> None:
        if ids.is_meta and self.device.type != "meta":
            raise ValueError("ids: expected values, got a tensor on the meta device")
        readable = ids.device.type == "cpu" or _DEBUG
        if not readable or torch.compiler.is_compiling() or _is_fake(ids):
            return
        live = {-1, *(self.slots[name] for name in self.slots)}
        wrong = set(ids.unique().tolist()) - live
        if wrong:
            raise ValueError(
                f"ids: expected -1 or slots of adapters, {self.slots}, got {min(wrong)}"
            )

    @torch.inference_mode(False)
    @torch.no_grad()
    def _fill(self, ids: Tensor, num_tokens: int) -> None:
        """Group the pairs: fixed shapes, no reading back. ids ``[n]`` in the order of the pairs."""
        pairs, none, device = self._tokens.shape[0], self._capacity, self._built_on
        self.num_tokens, self.version = num_tokens, self.slots.version
        self._plan = self._padded_plan = None
        ids = ids.to(device, torch.int64)
        ids = torch.nn.functional.pad(ids, (0, pairs - ids.shape[0]), value=-1)
        group = torch.where((ids >= 0) & (ids < none), ids, none)
        _, order = torch.sort(group, stable=True)
        counts = torch.zeros(none + 1, dtype=torch.int64, device=device)
        counts.scatter_add_(0, group, torch.ones_like(group))
        ends = counts.cumsum(0)
        starts = ends - counts
        tiles_of_group = (counts + (self.block - 1)) // self.block
        tile_ends = tiles_of_group.cumsum(0)
        tile = torch.arange(self._tiles.shape[0], device=device)
        owner = torch.searchsorted(tile_ends, tile, right=True)
        inside = owner <= none
        owner = owner.clamp_max(none)
        first = starts[owner] + (tile - (tile_ends - tiles_of_group)[owner]) * self.block
        self._order.copy_(order)
        self._tokens.copy_(order // self.pairs_per_token)
        self._inverse.copy_(
            torch.empty_like(order).scatter_(0, order, torch.arange(pairs, device=device))
        )
        self._offsets[:-1].copy_(starts)
        self._offsets[-1:].fill_(pairs)
        self._tiles[:, 0].copy_(torch.where(inside, owner, -1))
        self._tiles[:, 1].copy_(torch.where(inside, first, 0))
        if self.device.type == "cpu" and not _is_fake(self._tokens):
            self.plan()  # now, and not while a graph is traced

    # --- reading ------------------------------------------------------------------------------

    def pair_weights(self) -> Tensor | None:
        """``[P]`` in the order of the pairs, or None where every weight is 1."""
        if self._weights is None or self._weights is self._weight_buffer:
            return self._weights
        # Sorted for every call: so each has a graph of its own, as it would from the tensor itself.
        return self._sorted(self._weights)

    def _sorted(self, weights: Tensor) -> Tensor:
        dtype = torch.float32
        if computes_in_64_bits(self.device):
            dtype = torch.promote_types(weights.dtype, dtype)
        flat = weights.to(self.device, dtype).flatten()
        flat = torch.nn.functional.pad(flat, (0, self._order.shape[0] - flat.shape[0]))
        return flat.index_select(0, self._order)

    def plan(self) -> Tensor:
        """The groups for loops on the host: int64 ``[G, 4]`` on the CPU, without empty groups.

        Each row is (slot, first pair, end, first token); first token is -1 where the group's tokens
        are not neighbours in ascending order. Computed once per filling; on a device this waits.
        In a traced graph rows of slot -1 fill it up to a fixed shape.
        """
        if self.device.type == "meta":
            return torch.empty((0, 4), dtype=torch.int64)
        if torch.compiler.is_compiling() and self._padded_plan is not None:
            return self._padded_plan
        if self._plan is None:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "the composed backend reads the sizes of a routing's groups, which cannot be "
                    "captured in a CUDA graph; use backend='triton'"
                )
            starts, tokens = self._offsets.cpu().long(), self._tokens.cpu().long()
            counts = starts[1:] - starts[:-1]
            slot = torch.nonzero(counts[:-1]).flatten()
            start, end = starts[slot], starts[slot + 1]
            jumps = torch.nn.functional.pad((tokens[1:] - tokens[:-1] != 1).cumsum(0), (1, 0))
            first = torch.where(jumps[end - 1] == jumps[start], tokens[start], -1)
            self._plan = torch.stack([slot, start, end, first], dim=1)
            # For graphs, which would be compiled again for another number of groups.
            rows = min(self._capacity, self._tokens.shape[0]) - self._plan.shape[0]
            self._padded_plan = torch.nn.functional.pad(self._plan, (0, 0, 0, rows), value=-1)
        return self._plan

    def check_current(self) -> None:
        """Raise if slots have got another meaning since the routing was filled."""
        if self.version != self.slots.version:
            raise ValueError(
                "routing: adapters were removed, or slots added, since it was filled; fill it again"
            )

    def tensors(self, *, with_plan: bool) -> RoutingTensors:
        """The routing as the backends take it; raises if the slots have changed since."""
        self.check_current()
        plan = self.plan() if with_plan else torch.empty((0, 4), dtype=torch.int64)
        return RoutingTensors(
            self._tokens,
            self._offsets,
            self._tiles,
            self._inverse,
            self.pair_weights(),
            plan,
            self.pairs_per_token,
            self.block,
        )

    def __repr__(self) -> str:
        return (
            f"Routing({self.num_tokens} of at most {self.max_tokens} tokens, "
            f"{self.pairs_per_token} adapters each, {self.slots.capacity} slots, {self.device})"
        )


def _slots_of(bank) -> AdapterSlots:
    slots = bank if isinstance(bank, AdapterSlots) else getattr(bank, "slots", None)
    if not isinstance(slots, AdapterSlots):
        raise TypeError(
            f"bank: expected an AdapterBank or its AdapterSlots, got {type(bank).__name__}"
        )
    return slots


def _integers(name: str, values: Tensor | Sequence) -> Tensor:
    if not isinstance(values, Tensor):
        try:
            values = torch.tensor(values, dtype=None if len(values) else torch.int64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name}: expected a list of integers or a tensor ({error})") from None
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {values.dtype}")
    return values


def _device_for(ids: Tensor, bank, device) -> torch.device | str | None:
    if device is not None or hasattr(bank, "device"):
        return device
    return ids.device


def _lengths(names: Sequence[str], lengths: int | Sequence[int]) -> list[int]:
    if isinstance(names, str):
        raise TypeError(f"names: expected a list of names, got the string {names!r}")
    if hasattr(lengths, "tolist"):  # tensors and arrays
        lengths = lengths.tolist()
    if isinstance(lengths, Integral):
        lengths = [lengths] * len(names)
    if not isinstance(lengths, Sequence):
        raise TypeError(
            f"lengths: expected a number or a list of numbers, got {type(lengths).__name__}"
        )
    lengths = list(lengths)
    if len(lengths) != len(names):
        raise ValueError(f"lengths: expected {len(names)}, one per name, got {len(lengths)}")
    if any(isinstance(length, bool) or not isinstance(length, Integral) for length in lengths):
        raise TypeError(f"lengths: expected integers, got {lengths}")
    if any(length < 0 for length in lengths):
        raise ValueError(f"lengths: expected numbers of tokens, got {min(lengths)}")
    return [int(length) for length in lengths]


def _is_fake(tensor: Tensor) -> bool:
    return type(tensor) is not Tensor or torch._C._len_torch_dispatch_stack() > 0
