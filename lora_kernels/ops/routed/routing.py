"""Which adapters each token of a batch uses."""

import copy
import os
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lora_kernels.ops.routed.bank.slots import BASE, ModelVersion, Pinned
from lora_kernels.ops.routed.routing_arguments import (
    bounding_names,
    device_for,
    integers,
    is_fake,
    lengths_of,
    runs_of,
    slots_in,
    slots_of,
)
from lora_kernels.ops.routed.tensors import (
    RoutingTensors,
    check_groups_can_be_read,
    groups_of,
)
from lora_kernels.runtime.capture import is_captured
from lora_kernels.runtime.checks import check_count
from lora_kernels.runtime.dtypes import computes_in_64_bits

# Pairs per tile of the kernels: the smallest a matrix instruction takes while the batch is small.
_SMALL_BLOCK, _LARGE_BLOCK = 16, 64
_SMALL_BATCH = 256

Names = Sequence[str]
Device = torch.device | str
Ids = Tensor | Sequence[int]
IdRows = Tensor | Sequence[Sequence[int]]
WeightRows = Tensor | Sequence[Sequence[float]]

# Read once, at import: checking ids on a device needs a synchronisation.
_DEBUG = os.environ.get("LORA_KERNELS_DEBUG", "0") not in ("", "0")


class _Captured:
    """Whether captured CUDA graphs read weights of a routing, or of its copies for versions."""

    def __init__(self) -> None:
        self.without_weights = self.weight_buffer = False

    def note(self, weights: Tensor | None, buffer: Tensor | None) -> None:
        self.without_weights |= weights is None
        self.weight_buffer |= weights is not None and weights is buffer


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

    It also says whose parameters have gradients. Where names, or ids that can be read, tell which
    adapters the tokens use, those have gradients and all others none: their ``.grad`` stays None,
    and an optimizer leaves them alone. With ids on a device, in a captured CUDA graph and in a
    compiled one that is not known: all adapters have gradients, exact zeros for those without
    tokens. ``adapters=`` bounds them: a list of names, outside of which no token uses an adapter
    and no parameter has a gradient. It bounds what they cost, but in a compiled graph.

    Attributes:
        max_tokens: how many tokens there is room for.
        num_tokens: how many were set last. x may have that many rows, or ``max_tokens``: the rest
            use no adapter.
        pairs_per_token: how many adapters a token may use.
        slots: the slots that the ids are numbers of.
        adapters: the names outside of which no token uses an adapter; None for all of ``slots``.
        capacity: how many slots there were when it was made.
    """

    @torch.inference_mode(False)  # a routing made while serving may train
    def __init__(
        self,
        max_tokens: int,
        bank,
        pairs_per_token: int = 1,
        adapters: Names | None = None,
        device: Device | None = None,
    ) -> None:
        check_count("max_tokens", max_tokens, least=0)
        check_count("pairs_per_token", pairs_per_token)
        self.max_tokens, self.pairs_per_token = max_tokens, pairs_per_token
        self.slots = slots_of(bank)
        # What a batch reads that this routing was made for; None: what is current when it is used.
        self.pinned = bank.version if isinstance(bank, Pinned) else None
        model = self._model()
        self.adapters = bounding_names(adapters, model)
        pairs, groups = max_tokens * pairs_per_token, model.capacity + 1
        if pairs >= 2**31:
            raise ValueError(
                f"max_tokens: expected fewer than 2^31 pairs of a token and an adapter, got "
                f"{max_tokens} * {pairs_per_token}"
            )
        self.device = torch.device(getattr(bank, "device", "cpu") if device is None else device)
        # Where int64 is not to be relied on the host makes the groups: composed, which alone runs
        # there, reads them on the host in any case.
        on_device = computes_in_64_bits(self.device)
        self._built_on = self.device if on_device else torch.device("cpu")
        self.num_tokens = 0
        self.capacity = model.capacity
        self.block = _SMALL_BLOCK if pairs <= _SMALL_BATCH else _LARGE_BLOCK
        num_tiles = pairs // self.block + min(groups, pairs)

        def ints(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=self.device)

        self._tokens, self._inverse = ints(pairs), ints(pairs)
        self._offsets, self._tiles = ints(groups + 1), ints(num_tiles, 2)
        self._order = torch.empty(pairs, dtype=torch.int64, device=self.device)
        self._weight_buffer: Tensor | None = None
        self._weights: Tensor | None = None  # the buffer, or [M, k] as given if it requires grad
        self._captured = _Captured()
        self._names: dict[str, int] = model.names
        self._plan: Tensor | None = None
        self._padded_plan: Tensor | None = None
        self._as_tensors: dict[bool, RoutingTensors] = {}  # of this filling, by whether with a plan
        self._bound: tuple[int, ...] | None = None  # the slots of ``adapters``
        self._is_bound: Tensor | None = None  # [L + 1] bool: whether a slot is one of them
        self._used: tuple[int, ...] | None = None  # by the tokens, where that is known
        self._bind_adapters(model)

    def _model(self) -> ModelVersion:
        """The version that a filling refers to."""
        return self.slots.latest if self.pinned is None else self.pinned

    def at(self, version: ModelVersion) -> "Routing":
        """This filling for a batch that reads that version; it shares the buffers.

        Raises:
            ValueError: as :meth:`check_current`.
        """
        self.check_current(version)
        pinned = copy.copy(self)
        pinned.pinned, pinned._as_tensors = version, self._as_tensors
        pinned._captured = self._captured
        return pinned

    # --- constructors -------------------------------------------------------------------------

    @staticmethod
    def empty(
        max_tokens: int,
        bank,
        pairs_per_token: int = 1,
        *,
        adapters: Names | None = None,
        device: Device | None = None,
    ) -> "Routing":
        """A routing with room for ``max_tokens`` tokens, none of which uses an adapter yet.

        Args:
            max_tokens: at least 0.
            bank: an ``AdapterBank``, or the ``AdapterSlots`` that banks share.
            pairs_per_token: how many adapters a token may use, at least 1.
            adapters: names of the only adapters that tokens may use and that may have gradients,
                in this filling and later ones; None for all. The id of another one is an error
                where it can be read, and acts as -1 on a device. Smaller gradients, not another
                result, where ids on a device name few of many adapters.
            device: where it is built; None is the bank's device, or the CPU.

        Raises:
            TypeError, ValueError: an argument does not fit, or ``adapters`` names one that there
                is not.
        """
        routing = Routing(max_tokens, bank, pairs_per_token, adapters, device)
        none = torch.full((0,), -1, dtype=torch.int64, device=routing._built_on)
        return routing._fill(routing._model(), none, 0, used=())

    @staticmethod
    def from_tokens(
        ids: Ids, bank, *, adapters: Names | None = None, device: Device | None = None
    ) -> "Routing":
        """Each token names its slot.

        Args:
            ids: ``[...]``, integers, one per token: a slot of the bank, -1 for none.
            bank, adapters: as for :meth:`empty`.
            device: where it is built; None is the bank's device, or that of ``ids`` where the bank
                is :class:`AdapterSlots`, which have none.

        Raises:
            TypeError, ValueError: an argument does not fit, or an id that can be read is of no
                adapter, or of none of ``adapters``.
        """
        ids = integers("ids", ids)
        device = device_for(ids, bank, device)
        return Routing(ids.numel(), bank, 1, adapters, device).set_tokens_(ids)

    @staticmethod
    def from_sequences(
        names: Sequence[str],
        lengths: int | Sequence[int],
        bank,
        *,
        adapters: Names | None = None,
        device: Device | None = None,
    ) -> "Routing":
        """Sequences one after the other, each naming its adapter (or ``"__base__"``).

        Args:
            names: one per sequence.
            lengths: tokens of each sequence, or one number for all.
            bank, adapters, device: as for :meth:`empty`.

        Raises:
            TypeError, ValueError: an argument does not fit, or a name is of no adapter.
        """
        lengths = lengths_of(names, lengths)
        return Routing(sum(lengths), bank, 1, adapters, device).set_sequences_(names, lengths)

    @staticmethod
    def from_segments(
        ids: Ids,
        offsets: Ids,
        bank,
        *,
        num_tokens: int | None = None,
        adapters: Names | None = None,
        device: Device | None = None,
    ) -> "Routing":
        """Segments of neighbouring tokens.

        Segment i holds the tokens ``offsets[i] .. offsets[i + 1] - 1``; tokens outside of every
        segment use no adapter.

        Args:
            ids: ``[n]``, integers, one per segment: a slot of the bank, -1 for none.
            offsets: ``[n + 1]``, integers, ascending.
            num_tokens: of the whole batch; None is ``offsets[-1]``, which must then be readable
                without waiting for a device.
            bank, adapters, device: as for :meth:`from_tokens`.

        Raises:
            TypeError, ValueError: an argument does not fit, see :meth:`from_tokens`.
        """
        offsets = integers("offsets", offsets)
        if num_tokens is None:
            if offsets.device.type != "cpu":
                raise ValueError(
                    f"num_tokens: expected a number, as offsets are on {offsets.device} and are "
                    "not read back"
                )
            num_tokens = int(offsets[-1]) if offsets.numel() else 0
        ids = integers("ids", ids)
        device = device_for(ids, bank, device)
        return Routing(num_tokens, bank, 1, adapters, device).set_segments_(ids, offsets)

    @staticmethod
    def from_weighted(
        ids: IdRows,
        weights: WeightRows,
        bank,
        *,
        adapters: Names | None = None,
        device: Device | None = None,
    ) -> "Routing":
        """Several weighted adapters per token.

        A token's result is the sum of its adapters' contributions times their weights.

        Args:
            ids: ``[M, k]``, integers: slots of the bank, -1 for none.
            weights: ``[M, k]``, any floating dtype; gradients reach it if it requires them.
            bank, adapters, device: as for :meth:`from_tokens`.

        Raises:
            TypeError, ValueError: an argument does not fit, see :meth:`from_tokens`.
        """
        ids = integers("ids", ids)
        if ids.ndim != 2 or ids.shape[1] < 1:
            raise ValueError(f"ids: expected [tokens, adapters per token], got {list(ids.shape)}")
        device = device_for(ids, bank, device)
        routing = Routing(ids.shape[0], bank, ids.shape[1], adapters, device)
        return routing.set_weighted_(ids, weights)

    # --- filling ------------------------------------------------------------------------------

    def set_tokens_(self, ids: Ids) -> "Routing":
        """Fill it again as :meth:`from_tokens` does, with at most ``max_tokens`` tokens."""
        ids = integers("ids", ids).flatten()
        model = self._check_room(ids.shape[0])
        return self._fill(model, ids, ids.shape[0], self._check_ids(model, ids))

    def set_sequences_(self, names: Sequence[str], lengths: int | Sequence[int]) -> "Routing":
        """Fill it again as :meth:`from_sequences` does."""
        counts = lengths_of(names, lengths)
        model = self._check_room(sum(counts))
        for name in names:
            if name != BASE and name not in model.names:
                raise ValueError(
                    f"names: expected {BASE!r} or one of {sorted(model.names)}, got {name!r}"
                )
        for name in names:
            if name != BASE and self.adapters is not None and name not in self.adapters:
                raise ValueError(
                    f"names: expected {BASE!r} or one of adapters={list(self.adapters)}, which "
                    f"this routing was made with, got {name!r}"
                )
        slots = [model.slot_of(name) for name in names]
        used = slots_in(slot for slot, count in zip(slots, counts, strict=True) if count)
        self._check_capacity(model, used)
        # On the CPU wherever torch makes tensors by default, as other lists.
        ids = integers("ids", slots).repeat_interleave(integers("lengths", counts))
        return self._fill(model, ids, ids.shape[0], used)

    def set_segments_(self, ids: Ids, offsets: Ids) -> "Routing":
        """Fill all ``max_tokens`` tokens again as :meth:`from_segments` does."""
        ids, offsets = integers("ids", ids), integers("offsets", offsets)
        if ids.ndim != 1 or tuple(offsets.shape) != (ids.shape[0] + 1,):
            raise ValueError(
                f"offsets: expected one more than ids {list(ids.shape)}, got {list(offsets.shape)}"
            )
        model = self._check_room(self.max_tokens)
        used = self._check_ids(model, ids)
        if (offsets.device.type == "cpu" or _DEBUG) and not is_fake(offsets):
            steps = offsets.tolist()
            if steps != sorted(steps) or (steps and (steps[0] < 0 or steps[-1] > self.max_tokens)):
                raise ValueError(
                    f"offsets: expected ascending numbers from 0 to at most {self.max_tokens}, "
                    f"got {steps}"
                )
            if used is not None:  # by segments that are not empty
                segments = zip(ids.tolist(), pairwise(steps), strict=True)
                used = slots_in(slot for slot, (start, end) in segments if start < end)
        ids, offsets = ids.to(self._built_on, torch.int64), offsets.to(self._built_on)
        # A segment -1 before the first and after the last.
        padded = torch.nn.functional.pad(ids, (1, 1), value=-1)
        token = torch.arange(self.max_tokens, device=self._built_on)
        segment = torch.searchsorted(offsets.contiguous(), token, right=True)
        return self._fill(model, padded.gather(0, segment), self.max_tokens, used)

    def set_weighted_(self, ids: IdRows, weights: WeightRows) -> "Routing":
        """Fill it again as :meth:`from_weighted` does.

        A CUDA graph that was captured with weights that require grad goes on reading that tensor.

        Raises:
            TypeError, ValueError: an argument does not fit.
            RuntimeError: a CUDA graph was captured with it before it had weights.
        """
        ids = integers("ids", ids)
        if ids.ndim != 2 or ids.shape[1] != self.pairs_per_token:
            raise ValueError(
                f"ids: expected [tokens, {self.pairs_per_token}], got {list(ids.shape)}"
            )
        if not isinstance(weights, Tensor):
            weights = torch.tensor(weights, dtype=torch.float32, device="cpu")
        if not weights.is_floating_point():
            raise TypeError(f"weights: expected floating point numbers, got {weights.dtype}")
        if weights.shape != ids.shape:
            raise ValueError(
                f"weights: expected {list(ids.shape)} like ids, got {list(weights.shape)}"
            )
        if self._captured.without_weights:
            raise RuntimeError(
                "weights: a CUDA graph was captured with this routing before it had any, and goes "
                "on without; make a new routing, fill it with weights, and capture again"
            )
        model = self._check_room(ids.shape[0], weighted=True)
        self._fill(model, ids.flatten(), ids.shape[0], self._check_ids(model, ids))
        if weights.requires_grad and torch.is_grad_enabled():
            self._weights = weights
            return self
        with torch.inference_mode(False), torch.no_grad():
            found, buffer = self._sorted(weights), self._weight_buffer
            if buffer is None or (buffer.dtype != found.dtype and not self._captured.weight_buffer):
                self._weights = self._weight_buffer = found
            else:
                self._weights = buffer.copy_(found)
        return self

    def _unweighted(self) -> None:
        """The next filling has no weights; to a graph that reads some all are 1."""
        self._weights = None
        if self._weight_buffer is not None:
            with torch.inference_mode(False), torch.no_grad():
                self._weight_buffer.fill_(1.0)

    def _check_room(self, tokens: int, weighted: bool = False) -> ModelVersion:
        """Raise unless it can be filled with so many tokens; returns what ids are slots of."""
        if self.pairs_per_token != 1 and not weighted:
            raise ValueError(
                f"ids: this routing has {self.pairs_per_token} adapters per token; fill it with "
                "set_weighted_"
            )
        if tokens > self.max_tokens:
            raise ValueError(
                f"ids: expected at most {self.max_tokens} tokens, which this routing was made "
                f"for, got {tokens}"
            )
        model = self._model()
        if model.names is not self._names:
            self._bind_adapters(model)
        return model

    def _check_capacity(self, model: ModelVersion, used: tuple[int, ...] | None) -> None:
        """Raise where slots may be used that came after the routing was made."""
        fits = used is not None and max(used, default=0) < self.capacity
        if fits or model.capacity == self.capacity:
            return
        raise ValueError(
            f"routing: there are {model.capacity} slots now and were {self.capacity} when this "
            "routing was made; make a new one (and capture CUDA graphs again)"
        )

    @torch.inference_mode(False)
    def _bind_adapters(self, model: ModelVersion) -> None:
        """Follow the slots of ``adapters``, in place: a captured graph reads the table."""
        if self.adapters is None:
            return
        gone = [name for name in self.adapters if name not in model.names]
        if gone:
            raise ValueError(
                f"adapters: {gone[0]!r}, which this routing was made with, was removed; make a new "
                "one"
            )
        bound = slots_in(model.slot_of(name) for name in self.adapters)
        self._check_capacity(model, bound)
        if bound == self._bound:
            return
        self._bound = bound
        if self._is_bound is None:
            self._is_bound = torch.empty(self.capacity + 1, dtype=torch.bool, device=self._built_on)
        self._is_bound.fill_(False)
        # By fills and not from a list: a copy to a device would have to be waited for.
        for start, end in runs_of(self._bound):
            self._is_bound[start:end].fill_(True)

    def _check_ids(self, model: ModelVersion, ids: Tensor) -> tuple[int, ...] | None:
        """Raise for ids that tokens may not have; returns the slots among them.

        None, and nothing is checked, where ids cannot be read; None too where they can in debug
        mode only.
        """
        if ids.is_meta and self.device.type != "meta":
            raise ValueError("ids: expected values, got a tensor on the meta device")
        on_host = ids.device.type == "cpu"
        if not (on_host or _DEBUG) or torch.compiler.is_compiling() or is_fake(ids):
            self._check_capacity(model, self._bound)
            return None
        found = slots_in(ids.unique().tolist())
        names = model.names if self.adapters is None else self.adapters
        wrong = set(found) - {model.slot_of(name) for name in names}
        if wrong:
            allowed = f"slots of adapters, {self.slots}"
            if self.adapters is not None:
                allowed = (
                    f"slots of adapters={list(self.adapters)}, which this routing was made with"
                )
            raise ValueError(f"ids: expected -1 or {allowed}, got {min(wrong)}")
        self._check_capacity(model, found)
        return found if on_host else None

    @torch.inference_mode(False)
    @torch.no_grad()
    def _fill(
        self, model: ModelVersion, ids: Tensor, num_tokens: int, used: tuple[int, ...] | None = None
    ) -> "Routing":
        """Group the pairs: fixed shapes, no reading back. ids ``[n]`` in the order of the pairs.

        model: what ids are slots of. used: the slots among them, where that is known.
        """
        pairs, none, device = self._tokens.shape[0], self.capacity, self._built_on
        self.num_tokens = num_tokens
        self._names, self._serials, self._changes = model.names, model.serials, model.changes
        self._used = used
        self._unweighted()
        self._plan = self._padded_plan = None
        self._as_tensors = {}
        ids = ids.to(device, torch.int64)
        ids = torch.nn.functional.pad(ids, (0, pairs - ids.shape[0]), value=-1)
        group = torch.where((ids >= 0) & (ids < none), ids, none)
        if self._is_bound is not None:
            group = torch.where(self._is_bound.gather(0, group), group, none)
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
        if self.device.type == "cpu" and not is_fake(self._tokens):
            self.plan()  # now, and not while a graph is traced
        if not is_captured(self.device):
            self.slots.enter_reserved()
        return self

    # --- reading ------------------------------------------------------------------------------

    def trained_slots(self) -> tuple[int, ...] | None:
        """The slots of the adapters that a backward may have gradients for; None for all.

        A graph outlives this filling, be it compiled or captured: it serves any other one too.
        """
        if torch.compiler.is_compiling() or self._used is None or is_captured(self.device):
            return self._bound
        return self._used

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

        Raises:
            RuntimeError: a CUDA graph is captured.
        """
        if self.device.type == "meta":
            return torch.empty((0, 4), dtype=torch.int64, device="cpu")
        if torch.compiler.is_compiling() and self._padded_plan is not None:
            return self._padded_plan
        check_groups_can_be_read(self.device)  # also where a warm-up has: a replay reads nothing
        if self._plan is None:
            self._plan = groups_of(self._offsets, self._tokens)
            # For graphs, which would be compiled again for another number of groups.
            rows = min(self.capacity, self._tokens.shape[0]) - self._plan.shape[0]
            self._padded_plan = torch.nn.functional.pad(self._plan, (0, 0, 0, rows), value=-1)
        return self._plan

    def check_current(self, model: ModelVersion | None = None) -> None:
        """Raise if one of its own slots has got another meaning since the routing was filled.

        Args:
            model: what the batch reads; None for what is current.
        """
        model = model or self.pinned or self.slots.current
        compiling = torch.compiler.is_compiling()
        # With as many changes names have only come: an older version is one that has fewer.
        if model.changes == self._changes and (
            compiling or model.names is self._names or len(model.names) >= len(self._names)
        ):
            return
        own = self._used if self._used is not None else self._bound
        if own is None:
            own = tuple(self._names.values())
        if compiling or any(
            model.serials.get(slot, 0) != self._serials.get(slot, 0) for slot in own
        ):
            raise ValueError(
                "routing: adapters were removed or replaced since it was filled; fill it again"
            )
        if not set(own) <= {*model.names.values()}:
            raise ValueError(
                "routing: it was filled with adapters that came after the batch had begun"
            )

    @property
    def filling(self) -> int:
        """A number that changes with every filling."""
        return self._tokens._version

    def tensors(self, *, with_plan: bool) -> RoutingTensors:
        """The routing as the backends take it."""
        compiling = torch.compiler.is_compiling()  # a call that is being traced only reads
        if not compiling and is_captured(self.device):
            if with_plan:
                check_groups_can_be_read(self.device)
            self._captured.note(self._weights, self._weight_buffer)
        if not compiling and (tensors := self._as_tensors.get(with_plan)) is not None:
            return tensors
        none = torch.empty((0, 4), dtype=torch.int64, device="cpu")
        plan = self.plan() if with_plan else none
        tensors = RoutingTensors(
            self._tokens,
            self._offsets,
            self._tiles,
            self._inverse,
            self.pair_weights(),
            plan,
            self.pairs_per_token,
            self.block,
        )
        # Weights that require grad are sorted for every call.
        kept = self._weights is None or self._weights is self._weight_buffer
        if kept and not compiling:
            self._as_tensors[with_plan] = tensors
        return tensors

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_as_tensors": {}, "_captured": _Captured()}

    def __setstate__(self, state: dict) -> None:
        if "_capacity" in state:  # pickled by 0.1.0
            state = {**state, "capacity": state["_capacity"], "_as_tensors": {}}
            del state["_capacity"]
        self.__dict__.update({"_captured": _Captured(), **state})

    def __repr__(self) -> str:
        return (
            f"Routing({self.num_tokens} of at most {self.max_tokens} tokens, "
            f"{self.pairs_per_token} adapters each, {self.capacity} slots, {self.device})"
        )
