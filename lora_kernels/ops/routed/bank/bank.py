"""The adapters of one layer.

Dimensions: K in_features, N_s out_features of slice s, R_s an adapter's rank there, R their sum.

An adapter's ``nn.Parameter``s are bound to its slabs of a region of memory by ``p.data = slab``, so
that each has a version counter of its own. What calls read is a :class:`BankVersion`; every change
makes the next one.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lora_kernels.ops.routed.bank.adapter import Adapter, check_dropout, check_scaling
from lora_kernels.ops.routed.bank.adapters_by_name import AdaptersByName
from lora_kernels.ops.routed.bank.slots import BASE, AdapterSlots, Change, ModelVersion
from lora_kernels.ops.routed.bank.storage import Arena, FactorShapes, anchor
from lora_kernels.ops.routed.bank.tables import SlotTables
from lora_kernels.ops.routed.bank.versions import BankVersion, Bound, Entry, Reserved, table_rows
from lora_kernels.ops.routed.tensors import BankTensors, GradientLayout, TrainableFactors
from lora_kernels.runtime.capture import is_captured
from lora_kernels.runtime.checks import check_no_wrapper
from lora_kernels.runtime.dtypes import FLOATING
from lora_kernels.runtime.tensor_state import check_has_values, has_memory

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
        widths = [out_features] if isinstance(out_features, int) else list(out_features)
        _check_size("in_features", in_features)
        if not widths:
            raise ValueError("out_features: expected at least one slice, got none")
        for width in widths:
            _check_size("out_features", width)
        dtype = dtype or torch.get_default_dtype()
        if dtype not in FLOATING:
            raise TypeError(f"dtype: expected bfloat16, float16, float32 or float64, got {dtype}")
        if slots is not None and not isinstance(slots, AdapterSlots):
            raise TypeError(f"slots: expected AdapterSlots, got {type(slots).__name__}")
        self.in_features, self.out_features = in_features, sum(widths)
        self.slice_widths = tuple(widths)
        self.slots = slots if slots is not None else AdapterSlots()
        self.adapters = AdaptersByName()
        self.slots.join(self, self._version_on(anchor(dtype, device)))
        if rank_capacity is not None:
            self.reserve(rank_capacity, max_rank)
        elif max_rank is not None:
            raise ValueError("max_rank: expected None without rank_capacity")
        self.register_load_state_dict_post_hook(_rebind)

    def _version_on(self, storage: Tensor, reserved: Reserved | None = None) -> BankVersion:
        """One without adapters."""
        shapes = FactorShapes(self.in_features, self.slice_widths)
        tables = SlotTables.empty(self.slots.capacity, len(self.slice_widths), storage.device)
        bank = weakref.ref(self)
        return BankVersion(bank, shapes, storage, tables, {}, {}, reserved, trains=False, widest=0)

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
        _check_name(name, self)
        pairs = self._check_factors(lora_a, lora_b)
        check_scaling(scaling)
        if isinstance(scaling, Tensor) and scaling.is_meta and self.device.type != "meta":
            raise ValueError("scaling: expected a value, got a tensor on the meta device")
        check_dropout(dropout_p)
        ranks = tuple(0 if pair is None else pair[0].shape[0] for pair in pairs)
        with self.slots.change() as change:
            _check_name(name, self)
            slot = self.slots.acquire(name)
            version = self._latest
            factors = self._region(version, ranks)
            for pair, slabs in zip(pairs, version.shapes.slabs(factors, ranks), strict=True):
                for given, slab in zip(pair or (), slabs or (), strict=True):
                    with torch.no_grad():
                        slab.copy_(given)
            adapter = Adapter(slot, ranks, scaling, dropout_p, self.device)
            adapter.train(self.training)
            entry = self._entry(version, adapter, factors, trainable)
            change.set_bank(self, version.with_entry(entry))
            adapter.belong_to(self)
            self._set_module(change, name, adapter)
        return adapter

    def _entry(
        self,
        version: BankVersion,
        adapter: Adapter,
        factors: list[Tensor],
        trainable: bool = True,
    ) -> Entry:
        """An adapter whose values are in ``factors`` already, its parameters bound to them; they
        are made where it has none yet."""
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

    def _region(self, version: BankVersion, ranks: tuple[int, ...]) -> list[Tensor]:
        """New factors, of zeros."""
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

    def _set_module(self, change: Change, name: str, adapter: Adapter | None) -> None:
        """Put an adapter among the submodules, or take it out, where others may be looking."""
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
        """Add an adapter from a PEFT adapter directory, with ``load_adapter`` of
        :mod:`lora_kernels.files.adapters`.

        Args:
            name: of the new adapter.
            directory: as PEFT's ``save_pretrained`` writes it. Only safetensors are read.
            module: the layer's name in the file; in a sliced bank a list with one per slice.
            strict: whether it is an error that the file lacks one which its config targets; if not,
                it is a warning.

        Raises:
            TypeError, ValueError: the files are malformed, not finite, of another shape or kind;
                the bank is unchanged then.
        """
        from lora_kernels.files.adapters import load_adapter

        return load_adapter(self, name, directory, module, strict=strict)

    def save(self, name: str, directory: str | os.PathLike, module: str | Sequence[str]) -> None:
        """Write an adapter of this one layer as a PEFT adapter directory.

        Args:
            name: of the adapter.
            directory: made where it is absent.
            module: the layer's name in the model; in a sliced bank a list with one per slice.
        """
        from lora_kernels.files.adapters import save_adapter

        save_adapter(self, name, directory, module)

    def __getitem__(self, name: str) -> Adapter:
        latest = self.slots.latest
        slot = latest.names.get(name)
        entry = None if slot is None else latest.of(self).entry(slot)
        if entry is None:
            raise KeyError(f"no adapter {name!r} in this bank; there are {list(self)}")
        return entry.adapter

    def __contains__(self, name: object) -> bool:
        latest = self.slots.latest
        slot = latest.names.get(name)
        return slot is not None and latest.of(self).entry(slot) is not None

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
        return self.slots.latest.of(self)

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
            _check_size("rank_capacity", rank_capacity)
            max_rank = max(rank_capacity, widest) if max_rank is None else max_rank
            _check_size("max_rank", max_rank)
            if widest > max_rank:
                raise ValueError(f"max_rank: expected at least {widest}, the widest adapter's rank")
            # What is there counts, whatever was asked for.
            size = version.shapes.region_size_for(max(rank_capacity, sum(ranks)))
            arena = Arena(size, version.dtype, version.device)
            tables = SlotTables.empty(version.tables.slots, len(self.slice_widths), version.device)
            self._move_to(arena.tensor, Reserved(arena, tables, max_rank))
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
        """Take another dtype or device, or what parameters have become."""
        version = self._latest
        storage, reserved = version.storage, version.reserved
        if (dtype, device) != (version.dtype, version.device):
            if reserved is None:
                storage = anchor(dtype, device)
            else:
                arena = Arena(reserved.arena.size, dtype, device)
                tables = SlotTables.empty(version.tables.slots, len(self.slice_widths), device)
                storage, reserved = arena.tensor, Reserved(arena, tables, reserved.max_rank)
        self._move_to(storage, reserved)

    def _move_to(self, storage: Tensor, reserved: Reserved | None) -> None:
        """Make a version anew, from the parameters: those stay that lie in a region as they
        should, others get one."""
        with self.slots.change() as change:
            old = self.slots.latest.of(self)
            if old is not None:
                old.wait()
            version = self._version_on(storage, reserved)
            same = old is not None and old.storage is storage
            entries = []
            for name, adapter in self.adapters.items():
                adapter.slot = self.slots[name]
                adapter.move_scaling(version.device)
                entry = old.entry(adapter.slot) if same else None
                if entry is None or entry.adapter is not adapter or not entry.is_in_place():
                    entry = self._moved(change, version, name, adapter)
                elif not storage.is_meta:  # shared memory may have moved it as a whole
                    rows = table_rows(adapter.ranks, entry.factors, storage)
                    entry = entry._replace(rows=rows)
                adapter.belong_to(self)
                entries.append(entry)
            change.set_bank(self, version.with_entries(entries).with_thresholds())

    @torch.no_grad()
    def _moved(self, change: Change, version: BankVersion, name: str, adapter: Adapter) -> Entry:
        """An adapter in a region of its own, with the values that its parameters have."""
        factors = self._region(version, adapter.ranks)
        slabs = version.shapes.slabs(factors, adapter.ranks)
        for pair, slab_pair in zip(adapter.factors(), slabs, strict=True):
            for parameter, slab in zip(pair or (), slab_pair or (), strict=True):
                _check_parameter(name, parameter, slab)
                slab.copy_(parameter.data)
                data = parameter.data
                change.on_undo(lambda p=parameter, data=data: setattr(p, "data", data))
        return self._entry(version, adapter, factors)

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
            return self._version_on(anchor(self.dtype, self.device))
        for kept_in, name, parameter, address in version.part(slots, capacity).bound:
            if kept_in.get(name) is not parameter or parameter.data_ptr() != address:
                return self._repack_moved_parameters(model, slots)
        return version

    @_OUTSIDE_INFERENCE
    def _repack_moved_parameters(
        self, model: ModelVersion, slots: tuple[int, ...] | None
    ) -> BankVersion:
        """Somebody has replaced ``p.data``, and may put back what it was before.

        So the old slabs are left to whoever holds them, and the adapter gets another region; except
        where nothing may move: there the new values are copied over the old ones. Where a change of
        adapters has moved a parameter, the batch goes on with what it began with.
        """
        if is_captured(self.device):
            raise RuntimeError(
                "an adapter's parameter has other data than when its bank was reserved, and a CUDA "
                "graph that is captured holds addresses: call rebind() before"
            )
        with self.slots.change() as change:
            self._check_memory()
            version, current = model.of(self), self.slots.current.of(self)
            current.wait()
            for entry in version.entries_in(slots):
                if current.entry(entry.slot) is not entry or entry.is_in_place():
                    continue
                for bound in entry.bound:
                    if bound.kept_in.get(bound.name) is not bound.parameter:
                        _refuse(bound.kept_in.get(bound.name))
                name = next(n for n, a in self.adapters.items() if a is entry.adapter)
                kinds = {(p.dtype, p.device) for p in entry.adapter.parameters()}
                if kinds != {(version.dtype, version.device)}:
                    self.rebind()
                    return self._latest
                if version.reserved is not None:
                    moved = self._copied_over(name, entry)
                else:
                    moved = self._moved(change, version, name, entry.adapter)
                version, current = version.with_entry(moved), current.with_entry(moved)
            for each in (version, current):
                each.published()
            model.replace_in_place(self, version)
            self.slots.current.replace_in_place(self, current)
            self.traced_version = current
        return version

    @torch.no_grad()
    def _copied_over(self, name: str, entry: Entry) -> Entry:
        version = self._latest
        slabs = version.shapes.slabs(entry.factors, entry.adapter.ranks)
        values = [bound.parameter.data.clone() for bound in entry.bound]
        places = [slab for pair in slabs for slab in pair or ()]
        for bound, value, slab in zip(entry.bound, values, places, strict=True):
            _check_parameter(name, bound.parameter, slab)
            slab.copy_(value)
            # A backward that is still to come would read the new values: it raises.
            torch.autograd.graph.increment_version(bound.parameter)
        return self._entry(version, entry.adapter, entry.factors)

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
        reserved = version.reserved
        kept = None if reserved is None else (reserved.arena.size, reserved.max_rank)
        state = {name: value for name, value in self.__dict__.items() if name != "traced_version"}
        return {**state, "_kind": (version.dtype, version.device, kept, self.slots.latest.number)}

    @_OUTSIDE_INFERENCE
    def __setstate__(self, state: dict) -> None:
        dtype, device, kept, number = state.pop("_kind")
        super().__setstate__(state)
        if number != self.slots.number_copied:
            raise RuntimeError(
                "the model was copied while adapters were loaded, changed or removed beside it: "
                "the copy would have parts of both; copy it again"
            )
        kinds = {(p.dtype, p.device) for p in self.parameters()}
        if len(kinds) == 1:
            dtype, device = kinds.pop()
        storage, reserved = anchor(dtype, device), None
        if kept is not None:
            size, max_rank = kept
            arena = Arena(size, dtype, device)
            tables = SlotTables.empty(self.slots.capacity, len(self.slice_widths), device)
            storage, reserved = arena.tensor, Reserved(arena, tables, max_rank)
        with self.slots.change():
            self.slots.join(self, self._version_on(storage, reserved))
            self._move_to(storage, reserved)
        if reserved is not None:
            self.slots.reserve_for(self)
            self.slots.enter_reserved()

    def extra_repr(self) -> str:
        widths = self.slice_widths[0] if len(self.slice_widths) == 1 else list(self.slice_widths)
        return f"in_features={self.in_features}, out_features={widths}, dtype={self.dtype}"

    # --- checks -------------------------------------------------------------------------------

    def _check_factors(self, lora_a, lora_b) -> list[tuple[Tensor, Tensor] | None]:
        slices = len(self.slice_widths)
        if slices == 1:
            lora_a, lora_b = ([f] if isinstance(f, Tensor) else f for f in (lora_a, lora_b))
        for name, factors in (("lora_a", lora_a), ("lora_b", lora_b)):
            if isinstance(factors, Tensor) or not isinstance(factors, Sequence):
                raise TypeError(
                    f"{name}: expected {'a tensor' if slices == 1 else 'a list of tensors or None'}"
                    f", got {type(factors).__name__}"
                )
            if len(factors) != slices:
                raise ValueError(f"{name}: expected one per slice, {slices}, got {len(factors)}")
        pairs = []
        for s, (a, b, width) in enumerate(zip(lora_a, lora_b, self.slice_widths, strict=True)):
            if (a is None) != (b is None):
                raise ValueError(f"lora_a, lora_b: one of slice {s} is None and the other is not")
            if a is None:
                pairs.append(None)
                continue
            for name, factor in (("lora_a", a), ("lora_b", b)):
                if not isinstance(factor, Tensor) or factor.dtype not in FLOATING:
                    came = factor.dtype if isinstance(factor, Tensor) else type(factor).__name__
                    raise TypeError(f"{name}: expected a tensor of floating point, got {came}")
                check_no_wrapper(name, factor)
                if factor.layout is not torch.strided or factor.is_nested:
                    raise TypeError(f"{name}: expected a dense tensor, got {factor.layout}")
                if factor.is_meta and self.device.type != "meta":
                    raise ValueError(f"{name}: expected values, got a tensor on the meta device")
                check_has_values(name, factor)
            if a.ndim != 2 or a.shape[0] < 1 or a.shape[1] != self.in_features:
                raise ValueError(
                    f"lora_a: expected [rank >= 1, {self.in_features}], got {list(a.shape)}"
                )
            if tuple(b.shape) != (width, a.shape[0]):
                raise ValueError(
                    f"lora_b: expected [{width}, {a.shape[0]}] to match lora_a {list(a.shape)}, "
                    f"got {list(b.shape)}"
                )
            pairs.append((a, b))
        if all(pair is None for pair in pairs):
            raise ValueError("lora_a: expected factors for at least one slice, got None for all")
        return pairs


def _check_name(name: str, bank: AdapterBank) -> None:
    if not isinstance(name, str):
        raise TypeError(f"name: expected a string, got {type(name).__name__}")
    if name in bank:
        raise ValueError(f"name: there is an adapter {name!r} already; remove it first")
    if name == BASE or not bank.adapters.accepts(name):
        raise ValueError(
            f"name: expected one that is not empty, {BASE!r} or an attribute of ModuleDict, got "
            f"{name!r}"
        )


def _check_size(name: str, size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{name}: expected an integer, got {type(size).__name__}")
    if size < 1:
        raise ValueError(f"{name}: expected at least 1, got {size}")


def _rebind(bank: AdapterBank, incompatible_keys) -> None:
    """After loading a state dict, which may have put other parameters in place (assign=True)."""
    bank.rebind()


def _check_parameter(name: str, parameter: Tensor, slab: Tensor) -> None:
    if type(parameter) is not nn.Parameter or hasattr(parameter, "ds_id"):
        _refuse(parameter)
    if parameter.shape != slab.shape:
        raise RuntimeError(
            f"a parameter of adapter {name!r} has become {list(parameter.shape)}, its slab is "
            f"{list(slab.shape)}: remove and add the adapter to change its rank; FSDP and ZeRO-3 "
            "must be told to ignore the bank"
        )


def _described(parameter: object) -> str:
    if parameter is None:
        return "something that computes it"
    zero = " partitioned by ZeRO-3" if hasattr(parameter, "ds_id") else ""
    return f"a {type(parameter).__name__}{zero}"


def _refuse(parameter: object) -> None:
    raise RuntimeError(
        f"an adapter's parameter was replaced by {_described(parameter)}: the bank works on its "
        "own storage; tell FSDP and ZeRO-3 to ignore it, do not use functional_call or "
        "parametrizations on it, and call rebind() after putting another Parameter in place"
    )
