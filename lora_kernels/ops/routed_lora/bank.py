"""The adapters of one layer in one storage.

Dimensions: K in_features, N_s out_features of slice s, R_s an adapter's rank there, R their sum.

An adapter's ``nn.Parameter``s are bound to its slabs of the storage by ``p.data = slab``, so that
each has a version counter of its own.
"""

import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lora_kernels.dropout import drop_threshold
from lora_kernels.dtypes import FLOATING
from lora_kernels.ops.routed_lora.adapter import Adapter, check_dropout, check_scaling
from lora_kernels.ops.routed_lora.adapters_by_name import AdaptersByName
from lora_kernels.ops.routed_lora.layouts import GradientLayouts
from lora_kernels.ops.routed_lora.operands import BankTensors, GradientLayout, Trained
from lora_kernels.ops.routed_lora.slots import BASE, AdapterSlots
from lora_kernels.ops.routed_lora.storage import FactorStorage
from lora_kernels.ops.routed_lora.tables import SlotTables
from lora_kernels.ops.tensor_state import check_has_values, has_memory
from lora_kernels.ops.wrappers import check_no_wrapper

# What a bank makes must be plain tensors, also under inference_mode: a later step may save them.
_OUTSIDE_INFERENCE = torch.inference_mode(False)


class AdapterBank(nn.Module):
    r"""Adapters of one layer, of any ranks, for :func:`routed_lora` and its kin.

    .. math::
        \Delta y = \sum_i w_i \, s_i \cdot D_i(x) A_i^T B_i^T  \quad \text{over a token's adapters}

    All factors lie in one storage, each in a contiguous slab that is an ``nn.Parameter`` of the
    adapter's; nothing is padded. Adapters come and go by name (``add``, ``remove``) while others
    train or serve: nothing live moves, except when the storage has to grow.

    A *sliced* bank serves layers that read the same x, such as q, k and v: ``out_features`` is a
    list, the result has their columns side by side, an adapter may have another rank in each slice
    and 0 (None instead of factors) in some.

    The bank is a module: ``.to``, ``deepcopy``, pickling and ``load_state_dict`` work, and bind the
    same parameters to a new storage. What would pull the parameters from under the kernels raises
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
            more: CUDA graphs captured before would not see it. None grows when needed, to twice the
            size. See :meth:`reserve`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which and why.
    """

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
        self.slots.join(self)
        self.adapters = AdaptersByName()
        self._storage = FactorStorage(in_features, self.slice_widths, dtype, device)
        self._tables = SlotTables(self.slots.capacity, len(widths), self.device)
        self._max_rank: int | None = None  # set where nothing may grow
        self._derive()
        if rank_capacity is not None:
            self.reserve(rank_capacity, max_rank)
        elif max_rank is not None:
            raise ValueError("max_rank: expected None without rank_capacity")
        self.register_load_state_dict_post_hook(_rebind)

    # --- adapters -----------------------------------------------------------------------------

    @_OUTSIDE_INFERENCE
    def add(
        self,
        name: str,
        lora_a: Tensor | Sequence[Tensor | None],
        lora_b: Tensor | Sequence[Tensor | None],
        scaling: float | Tensor,
        dropout_p: float = 0.0,
    ) -> Adapter:
        """Copy an adapter into the bank under a new name.

        Args:
            name: not empty, not ``"__base__"``, not an attribute of ModuleDict. In a state dict's
                keys a dot of it is ``%2E``.
            lora_a: ``[R, K]``; in a sliced bank a list with one ``[R_s, K]`` or None per slice.
            lora_b: ``[N, R]``; in a sliced bank a list with one ``[N_s, R_s]`` or None per slice.
            scaling: s, a number or a 0-d tensor.
            dropout_p: probability in [0, 1) of dropping an element of x in training.

        Returns:
            The adapter, whose parameters require grad and hold copies in the bank's dtype.

        Raises:
            TypeError, ValueError: an argument does not fit, such as a DTensor or a quantised weight
                in a factor's place; the bank is unchanged then.
            RuntimeError: the storage is full and must not move (``rank_capacity``).
        """
        _check_name(name, self)
        pairs = self._check_factors(lora_a, lora_b)
        check_scaling(scaling)
        if isinstance(scaling, Tensor) and scaling.is_meta and self.device.type != "meta":
            raise ValueError("scaling: expected a value, got a tensor on the meta device")
        check_dropout(dropout_p)
        ranks = tuple(0 if pair is None else pair[0].shape[0] for pair in pairs)
        if self._max_rank is not None and sum(ranks) > self._max_rank:
            raise RuntimeError(
                f"add: rank {sum(ranks)} is above max_rank {self._max_rank}, which captured CUDA "
                "graphs rely on; reserve() raises it, and they must be captured again"
            )
        start = self._allocate(self._storage.region_size(ranks))
        self._storage.clear_gaps(start, ranks)
        slot = self.slots.acquire(name)
        entry = self._tables.write(slot, ranks, self._storage.offsets(start, ranks), scaling)
        adapter = Adapter(slot, ranks, start, entry, dropout_p)
        adapter.keep_scaling(scaling)
        for names, pair, slabs in zip(
            adapter.parameter_names(), pairs, self._storage.slabs(start, ranks), strict=True
        ):
            for key, given, slab in zip(names, pair or (), slabs or (), strict=False):
                with torch.no_grad():
                    slab.copy_(given)
                parameter = nn.Parameter(torch.empty(0, dtype=slab.dtype, device=slab.device))
                parameter.data = slab
                adapter.register_parameter(key, parameter)
        self.adapters[name] = adapter.train(self.training)
        self._derive()
        return adapter

    @_OUTSIDE_INFERENCE
    def remove(self, name: str) -> Adapter:
        """Take an adapter out; its region becomes free for others and nothing else moves.

        Returns:
            The adapter, whose parameters keep their values in memory of their own.
        """
        adapter = self[name]
        adapter.scaling_entry = adapter.scaling_entry.clone()
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.data = parameter.data.clone()
                # A backward that is still to come would read what is written there next: it raises.
                torch.autograd.graph.increment_version(parameter)
        del self.adapters[name]
        self._storage.give_back(adapter.start, self._storage.region_size(adapter.ranks))
        self._tables.clear(adapter.slot)
        self._derive()
        self.slots.release(name)
        return adapter

    def load(
        self,
        name: str,
        directory: str | os.PathLike,
        module: str | Sequence[str],
        *,
        strict: bool = True,
    ) -> Adapter:
        """Add an adapter from a PEFT adapter directory; see :func:`adapter_files.load_adapter`.

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
        from lora_kernels.adapter_files import load_adapter

        return load_adapter(self, name, directory, module, strict=strict)

    def save(self, name: str, directory: str | os.PathLike, module: str | Sequence[str]) -> None:
        """Write an adapter of this one layer as a PEFT adapter directory.

        Args:
            name: of the adapter.
            directory: made where it is absent.
            module: the layer's name in the model; in a sliced bank a list with one per slice.
        """
        from lora_kernels.adapter_files import save_adapter

        save_adapter(self, name, directory, module)

    def __getitem__(self, name: str) -> Adapter:
        if name not in self.adapters:
            raise KeyError(f"no adapter {name!r} in this bank; there are {list(self.adapters)}")
        return self.adapters[name]

    def __contains__(self, name: object) -> bool:
        return name in self.adapters

    def __iter__(self) -> Iterator[str]:
        return iter(self.adapters)

    def __len__(self) -> int:
        return len(self.adapters)

    def __bool__(self) -> bool:
        return True  # an empty bank is a bank

    # --- storage ------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self._storage.tensor.device

    @property
    def dtype(self) -> torch.dtype:
        return self._storage.tensor.dtype

    @_OUTSIDE_INFERENCE
    def reserve(self, rank_capacity: int, max_rank: int | None = None) -> None:
        """Make room now, and refuse to grow unasked; CUDA graphs must be captured again.

        Args:
            rank_capacity: the sum of the adapters' ranks (over slices) that there is room for.
            max_rank: of one adapter, None for rank_capacity: h gets a column for each, so a smaller
                number saves memory and, where the widest adapter is far below it, a little time.

        Raises:
            TypeError, ValueError: an argument is no number of at least 1, or there is an adapter of
                a higher rank.
        """
        _check_size("rank_capacity", rank_capacity)
        widest = max([adapter.rank for adapter in self._ordered], default=0)
        max_rank = max(rank_capacity, widest) if max_rank is None else max_rank
        _check_size("max_rank", max_rank)
        if widest > max_rank:
            raise ValueError(f"max_rank: expected at least {widest}, the widest adapter's rank")
        self._grow_to(self._storage.size_for(rank_capacity))
        self._max_rank = max_rank
        self._derive()

    @_OUTSIDE_INFERENCE
    def rebind(self) -> None:
        """Bind every parameter to its slab again, where something has replaced its data.

        Values go into the storage as it is if they fit there, and into a new one if their dtype or
        device is another. The bank calls it itself wherever it notices.

        Raises:
            RuntimeError: a parameter has another shape, is no plain parameter any more, or its
                memory was freed.
        """
        self._check_memory()
        kinds = {(parameter.dtype, parameter.device) for parameter in self.parameters()}
        if len(kinds) > 1:
            raise RuntimeError(
                f"the bank's parameters have different dtypes or devices: {sorted(map(str, kinds))}"
            )
        self._become(*(kinds.pop() if kinds else (self.dtype, self.device)))
        self._bind()

    @torch.no_grad()
    def _bind(self) -> None:
        astray = []
        for name, adapter in self.adapters.items():
            slabs = self._storage.slabs(adapter.start, adapter.ranks)
            for pair, slab_pair in zip(adapter.factors(), slabs, strict=True):
                for parameter, slab in zip(pair or (), slab_pair or (), strict=True):
                    _check_parameter(name, parameter, slab)
                    if slab.is_meta or parameter.data_ptr() != slab.data_ptr():
                        astray.append((parameter, slab))
        # All values first: some may lie in slabs that others are about to be written to.
        own = self._storage.tensor.untyped_storage().data_ptr()
        values = [
            p.data.clone() if p.data.untyped_storage().data_ptr() == own else p.data
            for p, _ in astray
        ]
        for (parameter, slab), value in zip(astray, values, strict=True):
            slab.copy_(value)
            parameter.data = slab
        self._derive()

    def _check_memory(self) -> None:
        """Raise for a parameter whose storage was freed: copying it would crash."""
        for name, parameter in self.named_parameters():
            if not has_memory(parameter):
                raise RuntimeError(
                    f"{name}: its storage was freed (untyped_storage().resize_(0), as FSDP does), "
                    "and with it the numbers of the adapter; tell FSDP to ignore the bank"
                )

    @_OUTSIDE_INFERENCE
    def _follow_data(self) -> None:
        """Somebody has replaced ``p.data``, and may put back what it was before.

        So the old slabs are left to whoever holds them, and all parameters move to a new storage;
        except where nothing may move: there the new values are copied over the old ones.
        """
        if self._max_rank is None:
            self._storage.become(self.dtype, self.device)
        self.rebind()

    def _become(self, dtype: torch.dtype, device: torch.device) -> None:
        """Take another dtype or device: new storage, tables of the same content."""
        if (dtype, device) != (self.dtype, self.device):
            self._storage.become(dtype, device)
        if self._tables.scaling.device != device:
            self._make_tables(device)

    def _allocate(self, size: int) -> int:
        start = self._storage.take(size)
        if start is not None:
            return start
        if self._max_rank is not None:
            raise RuntimeError(
                f"add: {size} elements do not fit in what rank_capacity reserved "
                f"({self._storage.size} elements, {self._storage.largest_free()} of them free in "
                "one piece); reserve() makes room, which moves the storage: CUDA graphs captured "
                "before must be captured again"
            )
        self._grow_to(max(2 * self._storage.size, self._storage.size + size))
        return self._storage.take(size)

    def _grow_to(self, size: int) -> None:
        if size > self._storage.size:
            self._storage.grow(size)
            self._bind()

    # --- tables -------------------------------------------------------------------------------

    @_OUTSIDE_INFERENCE
    def fit_tables(self) -> None:
        """Follow the slots where they have become more."""
        if self._tables.slots != self.slots.capacity:
            self._make_tables(self.device)

    def _make_tables(self, device: torch.device) -> None:
        self._tables = SlotTables(self.slots.capacity, len(self.slice_widths), device)
        for adapter in self.adapters.values():
            offsets = self._storage.offsets(adapter.start, adapter.ranks)
            scaling = adapter.scaling_entry
            if scaling.is_meta:
                scaling = adapter.scaling_on_meta
            adapter.scaling_entry = self._tables.write(
                adapter.slot, adapter.ranks, offsets, scaling
            )
            adapter.keep_scaling(scaling)
        self._derive()

    # --- for the operation --------------------------------------------------------------------

    def tensors(self) -> BankTensors:
        """The bank as the backends take it, after checking that it still stands as it was built."""
        if not torch.compiler.is_compiling():
            for parameters, name, parameter, address in self._bound:
                if parameters.get(name) is not parameter:
                    _refuse(parameters.get(name))
                if parameter.data_ptr() != address:
                    self._check_memory()
                    self._follow_data()
                    break
        self._follow_dropout()
        return self._tensors

    def train(self, mode: bool = True) -> "AdapterBank":
        """Dropout of all adapters on or off."""
        super().train(mode)
        self._follow_dropout()
        return self

    def _derive(self) -> None:
        """Prepare what calls need, after every change: a call that is being traced only reads."""
        self._ordered = sorted(self.adapters.values(), key=lambda adapter: adapter.slot)
        factors, bound = [], []
        for name, adapter in self.adapters.items():
            slabs = self._storage.slabs(adapter.start, adapter.ranks)
            for keys, slab_pair in zip(adapter.parameter_names(), slabs, strict=True):
                for key, slab in zip(keys, slab_pair or (), strict=False):
                    parameter = adapter._parameters.get(key)
                    _check_parameter(name, parameter, slab)
                    bound.append((adapter._parameters, key, parameter, slab.data_ptr()))
        for adapter in self._ordered:
            factors += self._storage.factors(adapter.start, adapter.ranks)
        columns = [0]
        for width in self.slice_widths:
            columns.append(columns[-1] + width)
        # (where the parameter is kept, its name there, itself, its address)
        self._bound: list[tuple[dict, str, nn.Parameter, int]] = bound
        self._tensors = BankTensors(
            factors=factors,
            slots=[adapter.slot for adapter in self._ordered],
            thresholds=[-1] * len(self._ordered),  # not entered yet
            slice_columns=columns,
            width=self._max_rank or max([adapter.rank for adapter in self._ordered], default=0),
            storage=self._storage.tensor,
            table=self._tables.factors,
            scaling=self._tables.scaling,
            threshold_table=self._tables.thresholds,
        )
        self._follow_dropout()
        self._layouts = GradientLayouts(self._ordered, self._storage, self._tables.slots)

    def _follow_dropout(self) -> None:
        """Enter the dropout of adapters in training mode, where that has changed."""
        thresholds = [
            drop_threshold(adapter._dropout_p) if adapter.training else 0
            for adapter in self._ordered
        ]
        if thresholds == self._tensors.thresholds:
            return
        by_slot = [0] * (self._tables.slots + 1)
        for adapter, threshold in zip(self._ordered, thresholds, strict=True):
            by_slot[adapter.slot] = threshold
        self._tables.thresholds.copy_(torch.tensor(by_slot, dtype=torch.int32))
        self._tensors = self._tensors._replace(thresholds=thresholds)

    def adapters_in(self, slots: tuple[int, ...] | None) -> list[Adapter]:
        """The adapters in ``slots`` (None: all), in the order of their slots."""
        return self._layouts.adapters(slots)

    def gradients(self, slots: tuple[int, ...] | None) -> tuple[GradientLayout, Trained]:
        """Where a backward puts the gradients of the adapters in ``slots`` (None: all).

        Returns:
            The layout, and the parameters that autograd has to see; of nothing without grad mode.
        """
        return self._layouts.of(slots) if torch.is_grad_enabled() else self._layouts.nothing

    # --- what moves or copies a module --------------------------------------------------------

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if not len(self.adapters):
            kind = fn(torch.empty(0, dtype=self.dtype, device=self.device))
            self._become(kind.dtype, kind.device)
        self.rebind()
        return self

    def __getstate__(self) -> dict:
        left_out = (
            "_tables",
            "_tensors",
            "_ordered",
            "_bound",
            "_layouts",
        )
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.slots.join(self)
        self._make_tables(self.device)
        self.rebind()

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
