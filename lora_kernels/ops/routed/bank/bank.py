"""The adapters of one layer.

Dimensions: K in_features, N_s out_features of slice s, R_s an adapter's rank there, R their sum.

An adapter's ``nn.Parameter``s are bound to its slabs of a region of memory by ``p.data = slab``, so
that each has a version counter of its own. What calls read is a :class:`BankVersion`; every change
makes the next one.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lora_kernels.ops.routed.bank.adapter import Adapter, check_scaling
from lora_kernels.ops.routed.bank.adapters_by_name import AdaptersByName
from lora_kernels.ops.routed.bank.binding import bound_to, copied_over, moved, new_factors, refuse
from lora_kernels.ops.routed.bank.checks import checked_factors
from lora_kernels.ops.routed.bank.slots import BASE, AdapterSlots, Change, ModelVersion
from lora_kernels.ops.routed.bank.storage import Arena, FactorShapes, anchor
from lora_kernels.ops.routed.bank.tables import SlotTables
from lora_kernels.ops.routed.bank.versions import BankVersion, Reserved, table_rows
from lora_kernels.ops.routed.tensors import BankTensors, GradientLayout, TrainableFactors
from lora_kernels.runtime.capture import is_captured
from lora_kernels.runtime.checks import check_count, check_dropout_p
from lora_kernels.runtime.dtypes import FLOATING
from lora_kernels.runtime.tensor_state import has_memory

# What a bank makes must be plain tensors, also under inference_mode: a later step may save them.
_OUTSIDE_INFERENCE = torch.inference_mode(False)


class AdapterBank(nn.Module):
    r"""Adapters of one layer, of any ranks, for :func:`routed_lora` and its kin.

    .. math::
        \Delta y = \sum_i w_i \, s_i \cdot D_i(x) A_i^T B_i^T  \quad \text{over a token's adapters}

    The factors of an adapter lie in a region of memory of its own, each in a contiguous slab that
    is an ``nn.Parameter``; nothing is padded. Adapters come and go by name (``add``, ``remove``),
    from any thread, while others train or serve: nothing live moves, and a call that has begun goes
    on with what was there then, its backward too.

    A *sliced* bank serves layers that read the same x, such as q, k and v: ``out_features`` is a
    list, the result has their columns side by side, an adapter may have another rank in each slice
    and 0 (None instead of factors) in some.

    The bank is a module: ``.to``, ``deepcopy``, pickling and ``load_state_dict`` work, and bind the
    same parameters to new regions. What would pull the parameters from under the kernels raises
    when the bank is used: FSDP and ZeRO-3 must be told to ignore it, ``functional_call`` and
    parametrizations are not supported.

    Args:
        in_features: K.
        out_features: N, or a list with one for each slice.
        dtype: of the factors; None is torch's default dtype.
        device: of the factors.
        slots: shared by the banks of one model; None makes its own.
        rank_capacity, max_rank: reserve room for adapters whose ranks (over slices) sum to
            rank_capacity and are at most max_rank each (None: no more than the sum), and refuse
            more, which CUDA graphs need that are captured. See :meth:`reserve`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which and why.
    """

    traced_version: BankVersion  # for graphs of torch.compile: they cannot look a bank up

    @_OUTSIDE_INFERENCE
    def __init__(
        self,
        in_features: int,
        out_features: int | Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        slots: AdapterSlots | None = None,
        rank_capacity: int | None = None,
        max_rank: int | None = None,
    ) -> None:
        super().__init__()
        widths = list(out_features) if isinstance(out_features, Iterable) else [out_features]
        check_count("in_features", in_features)
        if not widths:
            raise ValueError("out_features: expected at least one slice, got none")
        for width in widths:
            check_count("out_features", width)
        dtype = dtype or torch.get_default_dtype()
        if dtype not in FLOATING:
            raise TypeError(f"dtype: expected bfloat16, float16, float32 or float64, got {dtype}")
        if slots is not None and not isinstance(slots, AdapterSlots):
            raise TypeError(f"slots: expected AdapterSlots, got {type(slots).__name__}")
        self.in_features, self.out_features = in_features, sum(widths)
        self.slice_widths = tuple(widths)
        self.slots = slots if slots is not None else AdapterSlots()
        self.adapters = AdaptersByName()
        self.slots.join(self, self._version_on(*self._memory(dtype, device)))
        if rank_capacity is not None:
            self.reserve(rank_capacity, max_rank)
        elif max_rank is not None:
            raise ValueError("max_rank: expected None without rank_capacity")
        self.register_load_state_dict_post_hook(_rebind)

    def _version_on(self, storage: Tensor, reserved: Reserved | None = None) -> BankVersion:
        """A version without adapters, on that storage."""
        shapes = FactorShapes(self.in_features, self.slice_widths)
        tables = SlotTables.empty(self.slots.capacity, len(self.slice_widths), storage.device)
        bank: weakref.ref[AdapterBank] = weakref.ref(self)
        return BankVersion(bank, shapes, storage, tables, {}, {}, reserved)

    def _memory(
        self,
        dtype: torch.dtype,
        device: torch.device | str | None,
        room: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Reserved | None]:
        """An anchor; or, with ``room`` as in :class:`Reserved`, an arena and its tables."""
        if room is None:
            return anchor(dtype, device), None
        arena = Arena(room[0], dtype, device)
        device = arena.tensor.device
        tables = SlotTables.empty(self.slots.capacity, len(self.slice_widths), device)
        return arena.tensor, Reserved(arena, tables, room[1])

    # --- adapters -----------------------------------------------------------------------------

    @_OUTSIDE_INFERENCE
    def add(
        self,
        name: str,
        lora_a: Tensor | Sequence[Tensor | None],
        lora_b: Tensor | Sequence[Tensor | None],
        scaling: float | Tensor,
        dropout_p: float = 0.0,
        *,
        trainable: bool = True,
    ) -> Adapter:
        """Copy an adapter into the bank under a new name. Batches that have begun don't see it.

        Args:
            name: not empty, not ``"__base__"``, not an attribute of ModuleDict. In a state dict's
                keys a dot of it is ``%2E``.
            lora_a: ``[R, K]``; in a sliced bank a list with one ``[R_s, K]`` or None per slice.
            lora_b: ``[N, R]``; in a sliced bank a list with one ``[N_s, R_s]`` or None per slice.
            scaling: s, a number or a 0-d tensor.
            dropout_p: probability in [0, 1) of dropping an element of x in training.
            trainable: whether its parameters require grad.

        Returns:
            The adapter, whose parameters hold copies in the bank's dtype.

        Raises:
            TypeError, ValueError: an argument does not fit, such as a DTensor or a quantised weight
                in a factor's place; the bank is unchanged then.
            RuntimeError: what was reserved is full (``rank_capacity``).
        """
        self._check_name(name)
        on_meta = self.device.type == "meta"
        pairs = checked_factors(lora_a, lora_b, self.in_features, self.slice_widths, on_meta)
        check_scaling(scaling)
        if isinstance(scaling, Tensor) and scaling.is_meta and not on_meta:
            raise ValueError("scaling: expected a value, got a tensor on the meta device")
        check_dropout_p(dropout_p)
        ranks = tuple(0 if pair is None else pair[0].shape[0] for pair in pairs)
        with self.slots.change() as change:
            self._check_name(name)
            slot = self.slots.acquire(name)
            version = self._latest
            factors = new_factors(version, ranks)
            for pair, slabs in zip(pairs, version.shapes.slabs(factors, ranks), strict=True):
                for given, slab in zip(pair or (), slabs or (), strict=True):
                    with torch.no_grad():
                        slab.copy_(given)
            adapter = Adapter(slot, ranks, scaling, dropout_p, self.device)
            adapter.train(self.training)
            entry = bound_to(version, adapter, factors, trainable)
            change.set_bank(self, version.with_entries(entry))
            adapter.belong_to(self)
            self._set_module(change, name, adapter)
        return adapter

    def _set_module(self, change: Change, name: str, adapter: Adapter | None) -> None:
        """Set a submodule, or with None take it out, while others may be reading them."""
        before = self.adapters._modules
        change.on_undo(lambda: self.adapters.__dict__.update(_modules=before))
        self.adapters.replace(name, adapter)

    @_OUTSIDE_INFERENCE
    def remove(self, name: str) -> Adapter:
        """Take an adapter out; nothing else moves.

        Batches that have begun, and their backwards, still have it.

        Returns:
            The adapter, whose parameters keep their values.
        """
        with self.slots.change() as change:
            adapter = self[name]
            version = self._latest
            change.set_bank(self, version.without(adapter.slot))
            self._set_module(change, name, None)
            self.slots.release(name)
            if version.reserved is not None:  # the region will be another's
                own = [(parameter, parameter.data) for parameter in adapter.parameters()]
                change.on_undo(lambda: [setattr(p, "data", data) for p, data in own])
                for parameter, data in own:
                    parameter.data = data.clone()
            change.on_undo(lambda: adapter.belong_to(self))
            adapter.belong_to(None)
        return adapter

    def load(
        self,
        name: str,
        directory: str | os.PathLike,
        module: str | Sequence[str],
        *,
        strict: bool = True,
    ) -> Adapter:
        """Add an adapter from a PEFT adapter directory; arguments and errors are those of
        ``load_adapter`` of :mod:`lora_kernels.files.adapters`."""
        from lora_kernels.files.adapters import load_adapter

        return load_adapter(self, name, directory, module, strict=strict)

    def save(self, name: str, directory: str | os.PathLike, module: str | Sequence[str]) -> None:
        """Write an adapter of this one layer as a PEFT adapter directory; arguments and errors are
        those of ``save_adapter`` of :mod:`lora_kernels.files.adapters`."""
        from lora_kernels.files.adapters import save_adapter

        save_adapter(self, name, directory, module)

    def __getitem__(self, name: str) -> Adapter:
        adapter = self.slots.latest.adapter_of(self, name)
        if adapter is None:
            raise KeyError(f"no adapter {name!r} in this bank; there are {list(self)}")
        return adapter

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.slots.latest.adapter_of(self, name) is not None

    def __iter__(self) -> Iterator[str]:
        """The names, in the order in which they came."""
        return iter(list(self.adapters))

    def __len__(self) -> int:
        return len(self._latest)

    def __bool__(self) -> bool:
        return True  # an empty bank is a bank

    # --- storage ------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self._latest.device

    @property
    def dtype(self) -> torch.dtype:
        return self._latest.dtype

    @property
    def _latest(self) -> BankVersion:
        if torch.compiler.is_compiling():
            return self.traced_version
        version = self.slots.latest.of(self)
        assert version is not None, "a bank joins its slots when it is made"
        return version

    @_OUTSIDE_INFERENCE
    def reserve(self, rank_capacity: int | None = None, max_rank: int | None = None) -> None:
        """Keep all adapters, now and later, in memory that stays where it is: only such a bank can
        be captured in a CUDA graph. Graphs that were captured before must be captured again.

        A captured graph sees adapters that were added, replaced or removed, and other scalings,
        from the next filling of a routing on (``Routing.set_...``, in the stream that replays it).
        It draws masks only if an adapter dropped when it was captured.

        Args:
            rank_capacity: the sum of the adapters' ranks (over slices) that there is room for; None
                for what there is now, the widest adapter's included.
            max_rank: of one adapter, None for rank_capacity: h gets a column for each, so a smaller
                number saves memory and, where the widest adapter is far below it, a little time.

        Raises:
            TypeError, ValueError: an argument is no number of at least 1, or there is an adapter of
                a higher rank.
        """
        with self.slots.change():
            version = self._latest
            ranks = [entry.rank for entry in version.entries]
            widest = max(ranks, default=0)
            if rank_capacity is None:
                rank_capacity = sum(ranks)
                max_rank = widest if max_rank is None else max_rank
            check_count("rank_capacity", rank_capacity)
            max_rank = max(rank_capacity, widest) if max_rank is None else max_rank
            check_count("max_rank", max_rank)
            if widest > max_rank:
                raise ValueError(f"max_rank: expected at least {widest}, the widest adapter's rank")
            # What is there counts, whatever was asked for.
            size = version.shapes.region_size_for(max(rank_capacity, sum(ranks)))
            self._move_to(*self._memory(version.dtype, version.device, (size, max_rank)))
            self.slots.reserve_for(self)
        self.slots.enter_reserved()

    @_OUTSIDE_INFERENCE
    def rebind(self) -> None:
        """Let every parameter lie where the kernels read it, where something has replaced its data.

        The bank calls it itself wherever it notices.

        Raises:
            RuntimeError: a parameter has another shape, is no plain parameter any more, or its
                memory was freed.
        """
        with self.slots.change():
            self._check_memory()
            version = self._latest
            kinds = {(parameter.dtype, parameter.device) for parameter in self.parameters()}
            if len(kinds) > 1:
                raise RuntimeError(
                    "the bank's parameters have different dtypes or devices: "
                    f"{sorted(map(str, kinds))}"
                )
            kind = kinds.pop() if kinds else (version.dtype, version.device)
            self._convert(*kind)

    def _convert(self, dtype: torch.dtype, device: torch.device) -> None:
        """Move the adapters to a dtype and a device, and bind again what has moved by itself."""
        version = self._latest
        if (dtype, device) == (version.dtype, version.device):
            self._move_to(version.storage, version.reserved)
        else:
            room = version.reserved and version.reserved.room
            self._move_to(*self._memory(dtype, device, room))

    def _move_to(self, storage: Tensor, reserved: Reserved | None) -> None:
        """Make the version anew from the parameters. Those that lie in a region as they should stay
        there, the others get one."""
        with self.slots.change() as change:
            old = self._latest
            old.wait()
            version = self._version_on(storage, reserved)
            same = old.storage is storage
            entries = []
            for name, adapter in self.adapters.items():
                adapter.slot = self.slots[name]
                adapter.move_scaling(version.device)
                entry = old.entry(adapter.slot) if same else None
                if entry is None or entry.adapter is not adapter or not entry.is_in_place():
                    entry = moved(change, version, name, adapter)
                elif not storage.is_meta:  # shared memory may have moved it as a whole
                    rows = table_rows(adapter.ranks, entry.factors, storage)
                    entry = entry._replace(rows=rows)
                adapter.belong_to(self)
                entries.append(entry)
            change.set_bank(self, version.with_entries(*entries))

    def _check_memory(self) -> None:
        """Raise for a parameter whose storage was freed: copying it would crash."""
        for name, parameter in self.named_parameters():
            if not has_memory(parameter):
                raise RuntimeError(
                    f"{name}: its storage was freed (untyped_storage().resize_(0), as FSDP does), "
                    "and with it the numbers of the adapter; tell FSDP to ignore the bank"
                )

    # --- for the operation --------------------------------------------------------------------

    def version_for(
        self,
        model: ModelVersion | None = None,
        slots: tuple[int, ...] | None = None,
        capacity: int = 0,
    ) -> BankVersion:
        """What a batch reads, after a look at whether the parameters that it uses still lie there.

        Args:
            model: the version that the batch began with; None for the current one.
            slots: of the adapters that it may use; None for all.
            capacity: how many slots its routing knows; 0 for all.
        """
        if torch.compiler.is_compiling():
            return self.traced_version
        model = self.slots.current if model is None else model
        version = model.of(self)
        if version is None:  # the bank came after the batch had begun
            return self._version_on(*self._memory(self.dtype, self.device))
        for kept_in, name, parameter, address in version.part(slots, capacity).bound:
            if kept_in.get(name) is not parameter or parameter.data_ptr() != address:
                return self._repack_moved_parameters(model, version, slots)
        return version

    @_OUTSIDE_INFERENCE
    def _repack_moved_parameters(
        self, model: ModelVersion, version: BankVersion, slots: tuple[int, ...] | None
    ) -> BankVersion:
        """Let the kernels read parameters whose ``p.data`` somebody has replaced.

        He may put back what it was before: the old slabs are left to whoever holds them, and the
        adapter gets another region; except where nothing may move: there the new values are copied
        over the old ones. Where a change of adapters has moved a parameter, the batch goes on with
        what it began with.
        """
        if is_captured(self.device):
            raise RuntimeError(
                "an adapter's parameter has other data than when its bank was reserved, and a CUDA "
                "graph that is captured holds addresses: call rebind() before"
            )
        with self.slots.change() as change:
            self._check_memory()
            version, current = model.of(self) or version, self.slots.current.of(self) or version
            current.wait()
            for entry in version.entries_in(slots):
                if current.entry(entry.slot) is not entry or entry.is_in_place():
                    continue
                for bound in entry.bound:
                    if bound.kept_in.get(bound.name) is not bound.parameter:
                        refuse(bound.kept_in.get(bound.name))
                name = next(n for n, a in self.adapters.items() if a is entry.adapter)
                kinds = {(p.dtype, p.device) for p in entry.adapter.parameters()}
                if kinds != {(version.dtype, version.device)}:
                    self.rebind()
                    return self._latest
                if version.reserved is not None:
                    entry = copied_over(version, name, entry)
                else:
                    entry = moved(change, version, name, entry.adapter)
                version, current = version.with_entries(entry), current.with_entries(entry)
            for each in (version, current):
                each.published()
            model.replace_in_place(self, version)
            self.slots.current.replace_in_place(self, current)
            self.traced_version = current
        return version

    def tensors(self) -> BankTensors:
        """The bank as the backends take it, with all adapters."""
        return self.version_for().tensors()

    def gradients(self, slots: tuple[int, ...] | None) -> tuple[GradientLayout, TrainableFactors]:
        """Where a backward puts the gradients of the adapters in ``slots`` (None: all)."""
        return self._latest.gradients(slots)

    @_OUTSIDE_INFERENCE
    def adapter_changed(self, adapter: Adapter, what: str) -> None:
        """An adapter's scaling or dropout is another: so is the version."""
        with self.slots.change() as change:
            version = self._latest
            entry = version.entry(adapter.slot)
            if entry is None or entry.adapter is not adapter:
                return
            edits = change.draft().edits
            edits[adapter.slot] = edits.get(adapter.slot, 0) + 1
            if what == "scaling":
                change.set_bank(self, version.with_scaling(adapter.slot))
            else:
                change.refresh(self)

    @_OUTSIDE_INFERENCE
    def train(self, mode: bool = True) -> AdapterBank:
        """Dropout of all adapters on or off."""
        with self.slots.change():
            return super().train(mode)

    # --- what moves or copies a module --------------------------------------------------------

    @_OUTSIDE_INFERENCE
    def _apply(self, fn, recurse=True):
        with self.slots.change():
            super()._apply(fn, recurse)
            if not len(self.adapters):
                kind = fn(torch.empty(0, dtype=self.dtype, device=self.device))
                self._convert(kind.dtype, kind.device)
            self.rebind()
        return self

    def __getstate__(self) -> dict:
        version = self._latest
        state = {name: value for name, value in self.__dict__.items() if name != "traced_version"}
        room = version.reserved and version.reserved.room
        return {**state, "_kind": (version.dtype, version.device, room, self.slots.latest.number)}

    @_OUTSIDE_INFERENCE
    def __setstate__(self, state: dict) -> None:
        dtype, device, room, number = state.pop("_kind")
        super().__setstate__(state)
        if number != self.slots.number_copied:
            raise RuntimeError(
                "the model was copied while adapters were loaded, changed or removed beside it: "
                "the copy would have parts of both; copy it again"
            )
        kinds = {(p.dtype, p.device) for p in self.parameters()}
        if len(kinds) == 1:
            dtype, device = kinds.pop()
        storage, reserved = self._memory(dtype, device, room)
        with self.slots.change():
            self.slots.join(self, self._version_on(storage, reserved))
            self._move_to(storage, reserved)
        if reserved is not None:
            self.slots.reserve_for(self)
            self.slots.enter_reserved()

    def extra_repr(self) -> str:
        widths = self.slice_widths[0] if len(self.slice_widths) == 1 else list(self.slice_widths)
        return f"in_features={self.in_features}, out_features={widths}, dtype={self.dtype}"

    def _check_name(self, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name: expected a string, got {type(name).__name__}")
        if name in self:
            raise ValueError(f"name: there is an adapter {name!r} already; remove it first")
        if name == BASE or not self.adapters.accepts(name):
            raise ValueError(
                f"name: expected one that is not empty, {BASE!r} or an attribute of ModuleDict, "
                f"got {name!r}"
            )


def _rebind(bank: AdapterBank, incompatible_keys) -> None:
    """Bind what a state dict has put in place: other parameters, with assign=True."""
    bank.rebind()
