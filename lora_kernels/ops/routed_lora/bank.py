"""The adapters of one layer in one storage.

Dimensions: K in_features, N_s out_features of slice s, R_s an adapter's rank there, R their sum.

Each adapter has one region of the storage: its A of all slices, one below the other ``[R, K]``, and
then its B of each slice ``[N_s, R_s]``, each factor starting at a multiple of ``_ALIGNMENT``
elements. Its ``nn.Parameter``s are bound to the storage by ``p.data = slab``, so that each has a
version counter of its own.
"""

import weakref
from collections.abc import Iterator, Sequence
from numbers import Real

import torch
from torch import Tensor, nn

from lora_kernels.dropout import drop_threshold
from lora_kernels.ops.routed_lora.operands import BankTensors, GradientLayout
from lora_kernels.ops.routed_lora.slots import BASE, AdapterSlots
from lora_kernels.ops.routed_lora.space import Space

_ALIGNMENT = 64  # elements: whole cache lines, and what TMA and vector loads need
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Adapter(nn.Module):
    """One adapter of an :class:`AdapterBank`: its parameters, scaling and dropout.

    ``lora_a`` ``[R, K]`` and ``lora_b`` ``[N, R]`` are ordinary parameters with their own
    ``requires_grad``; an optimizer may hold those of one adapter. In a sliced bank they are
    ``lora_a_0``, ``lora_b_0``, ``lora_a_1``, ... without those of slices where the rank is 0.

    Dropout acts while the adapter is in training mode: ``bank.train()`` and ``eval()`` set all,
    ``bank[name].eval()`` this one.
    """

    def __init__(self, slot: int, ranks: tuple[int, ...], dropout_p: float) -> None:
        super().__init__()
        self.slot, self.ranks = slot, ranks
        self.dropout_p = dropout_p
        self.start = -1  # of the region in the storage

    @property
    def rank(self) -> int:
        """Over all slices."""
        return sum(self.ranks)

    @property
    def dropout_p(self) -> float:
        """The probability with which an element of x is dropped in training."""
        return self._dropout_p

    @dropout_p.setter
    def dropout_p(self, value: float) -> None:
        _check_dropout(value)
        self._dropout_p = float(value)

    @property
    def scaling(self) -> Tensor:
        """What the contribution is multiplied by, a 0-d tensor; set it to a number or a tensor."""
        if "_bank" not in self.__dict__:
            return self._own_scaling
        return self._bank()._tables.scaling[self.slot]

    @scaling.setter
    def scaling(self, value: float | Tensor) -> None:
        _check_scaling(value)
        with torch.no_grad():
            self.scaling.copy_(torch.as_tensor(value))

    def factors(self) -> list[tuple[nn.Parameter, nn.Parameter] | None]:
        """``(A, B)`` of each slice; None where the rank is 0."""
        one = len(self.ranks) == 1
        return [
            (self._parameters[_name("lora_a", s, one)], self._parameters[_name("lora_b", s, one)])
            if rank
            else None
            for s, rank in enumerate(self.ranks)
        ]

    def __getattr__(self, name: str):
        if name in ("lora_a", "lora_b") and len(self.__dict__.get("ranks", (0,))) > 1:
            raise AttributeError(
                f"{name}: the bank has {len(self.ranks)} slices; use {name}_0, {name}_1, ... or "
                "factors()"
            )
        return super().__getattr__(name)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_bank"}

    def extra_repr(self) -> str:
        ranks = self.ranks[0] if len(self.ranks) == 1 else self.ranks
        dropout = f", dropout_p={self.dropout_p}" if self.dropout_p else ""
        return f"slot={self.slot}, rank={ranks}{dropout}"


class _Tables(nn.Module):
    """What the kernels look up by slot. Not part of state dicts."""

    def __init__(self, slots: int, slices: int, device: torch.device) -> None:
        super().__init__()

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.factors = zeros(slots + 1, 1 + slices, 3, dtype=torch.int64)
        self.scaling = zeros(slots + 1, dtype=torch.float64)
        self.thresholds = zeros(slots + 1, dtype=torch.int32)

    def _apply(self, fn, recurse=True):
        return self  # rebuilt by the bank: casting must not touch them


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
        rank_capacity: reserve storage for adapters whose ranks (over slices) sum to this, and
            refuse to grow beyond: growing moves the storage, which CUDA graphs captured before
            would not see. None grows when needed, to twice the size. See :meth:`reserve`.

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
    ) -> None:
        super().__init__()
        widths = [out_features] if isinstance(out_features, int) else list(out_features)
        _check_size("in_features", in_features)
        if not widths:
            raise ValueError("out_features: expected at least one slice, got none")
        for width in widths:
            _check_size("out_features", width)
        dtype = dtype or torch.get_default_dtype()
        if dtype not in _DTYPES:
            raise TypeError(f"dtype: expected bfloat16, float16, float32 or float64, got {dtype}")
        if slots is not None and not isinstance(slots, AdapterSlots):
            raise TypeError(f"slots: expected AdapterSlots, got {type(slots).__name__}")
        self.in_features, self.out_features = in_features, sum(widths)
        self.slice_widths = tuple(widths)
        self.slots = slots if slots is not None else AdapterSlots()
        self.slots.join(self)
        self.adapters = nn.ModuleDict()
        self._storage = torch.empty(0, dtype=dtype, device=device)
        self._space = Space(_ALIGNMENT)
        self._fixed = False
        self._make_tables()
        if rank_capacity is not None:
            self.reserve(rank_capacity)
        self.register_load_state_dict_post_hook(lambda bank, keys: bank.rebind())

    # --- adapters -----------------------------------------------------------------------------

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
            name: not empty, without dots, not ``"__base__"``.
            lora_a: ``[R, K]``; in a sliced bank a list with one ``[R_s, K]`` or None per slice.
            lora_b: ``[N, R]``; in a sliced bank a list with one ``[N_s, R_s]`` or None per slice.
            scaling: s, a number or a 0-d tensor.
            dropout_p: probability in [0, 1) of dropping an element of x in training.

        Returns:
            The adapter, whose parameters require grad and hold copies in the bank's dtype.

        Raises:
            TypeError, ValueError: an argument does not fit; the bank is unchanged then.
            RuntimeError: the storage is full and must not move (``rank_capacity``).
        """
        _check_name(name, self)
        pairs = self._check_factors(lora_a, lora_b)
        _check_scaling(scaling)
        _check_dropout(dropout_p)
        ranks = tuple(0 if pair is None else pair[0].shape[0] for pair in pairs)
        start = self._allocate(self._region_size(ranks))
        adapter = Adapter(self.slots.acquire(name), ranks, dropout_p)
        adapter.start = start
        adapter.train(self.training)
        one = len(ranks) == 1
        with torch.no_grad():
            for s, (pair, slabs) in enumerate(zip(pairs, self._slabs(adapter), strict=True)):
                if pair is None:
                    continue
                for role, given, slab in zip(("lora_a", "lora_b"), pair, slabs, strict=True):
                    slab.copy_(given.detach())
                    parameter = nn.Parameter(torch.empty(0, dtype=slab.dtype, device=slab.device))
                    parameter.data = slab
                    adapter.register_parameter(_name(role, s, one), parameter)
        adapter.__dict__["_bank"] = weakref.ref(self)
        self.adapters[name] = adapter
        self._fit_tables()
        self._write_tables(adapter, scaling)
        self._forget()
        return adapter

    def remove(self, name: str) -> Adapter:
        """Take an adapter out; its region becomes free for others and nothing else moves.

        Returns:
            The adapter, whose parameters keep their values in memory of their own.
        """
        adapter = self[name]
        scaling = adapter.scaling.clone()
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.data = parameter.data.clone()
                parameter.add_(0)  # a backward that still needs the old memory must raise
        del self.adapters[name]
        self._space.free(adapter.start, self._region_size(adapter.ranks))
        self._tables.factors[adapter.slot] = 0
        self._tables.scaling[adapter.slot] = 0
        self.slots.release(name)
        del adapter.__dict__["_bank"]
        adapter._own_scaling = scaling
        self._forget()
        return adapter

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
        return self._storage.device

    @property
    def dtype(self) -> torch.dtype:
        return self._storage.dtype

    def reserve(self, rank_capacity: int) -> None:
        """Make room for adapters whose ranks sum to ``rank_capacity``, now; never grow unasked.

        The storage moves if it is smaller: CUDA graphs captured before must be captured again.
        """
        _check_size("rank_capacity", rank_capacity)
        per_rank = self.in_features + max(self.slice_widths)
        # Every factor may be followed by a gap; there are at most 1 + S factors to each rank.
        gaps = _ALIGNMENT * (1 + len(self.slice_widths)) * rank_capacity
        self._grow_to(rank_capacity * per_rank + gaps)
        self._fixed = True

    def rebind(self) -> None:
        """Bind every parameter to its slab again, where something has replaced its data.

        Values go into the storage as it is if they fit there, and into a new one if their dtype or
        device is another.
        """
        parameters = list(self.parameters())
        kinds = {(p.dtype, p.device) for p in parameters}
        if len(kinds) > 1:
            raise RuntimeError(
                f"the bank's parameters have different dtypes or devices: {sorted(map(str, kinds))}"
            )
        dtype, device = kinds.pop() if kinds else (self.dtype, self.device)
        if (dtype, device) != (self.dtype, self.device):
            self._storage = torch.empty(self._storage.shape, dtype=dtype, device=device)
        self._bind()
        if self._tables.factors.device != device:
            self._move_tables(device)
        self._forget()

    def _bind(self) -> None:
        with torch.no_grad():
            for name, adapter in self.adapters.items():
                for pair, slabs in zip(adapter.factors(), self._slabs(adapter), strict=True):
                    for parameter, slab in zip(pair or (), slabs or (), strict=True):
                        _check_parameter(name, parameter, slab)
                        if parameter.data_ptr() != slab.data_ptr() or slab.is_meta:
                            slab.copy_(parameter.data)
                            parameter.data = slab

    def _region_size(self, ranks: tuple[int, ...]) -> int:
        sizes = [sum(ranks) * self.in_features]
        sizes += [rank * width for rank, width in zip(ranks, self.slice_widths, strict=True)]
        return sum(map(_aligned, sizes))

    def _factor_offsets(self, adapter: Adapter) -> list[int]:
        """Where A of all slices and B of each begin in the storage."""
        offsets = [adapter.start]
        size = adapter.rank * self.in_features
        for rank, width in zip(adapter.ranks, self.slice_widths, strict=True):
            offsets.append(offsets[-1] + _aligned(size))
            size = rank * width
        return offsets

    def _whole_factors(self, adapter: Adapter) -> list[Tensor]:
        """Views of the storage: A of all slices ``[R, K]``, then B of each ``[N_s, R_s]``."""
        shapes = [(adapter.rank, self.in_features)]
        shapes += list(zip(self.slice_widths, adapter.ranks, strict=True))
        return [
            self._storage[offset : offset + rows * columns].view(rows, columns)
            for offset, (rows, columns) in zip(self._factor_offsets(adapter), shapes, strict=True)
        ]

    def _slabs(self, adapter: Adapter) -> list[tuple[Tensor, Tensor] | None]:
        """The slabs of each slice's A and B; None where the rank is 0."""
        whole_a, *b = self._whole_factors(adapter)
        a = whole_a.split(adapter.ranks)
        return [pair if pair[0].shape[0] else None for pair in zip(a, b, strict=True)]

    def _allocate(self, size: int) -> int:
        start = self._space.take(size)
        if start is not None:
            return start
        if self._fixed:
            raise RuntimeError(
                f"add: {size} elements do not fit in what rank_capacity reserved "
                f"({self._space.size} elements, {self._space.largest()} of them in one piece); "
                "reserve() makes room, which moves the storage: CUDA graphs captured before must "
                "be captured again"
            )
        self._grow_to(max(2 * self._space.size, self._space.size + size))
        return self._space.take(size)

    def _grow_to(self, size: int) -> None:
        if size <= self._space.size:
            return
        self._space.grow(size)
        self._storage = torch.empty(size, dtype=self.dtype, device=self.device)
        self._bind()
        self._forget()

    # --- tables -------------------------------------------------------------------------------

    def _make_tables(self) -> None:
        self._tables = _Tables(self.slots.capacity, len(self.slice_widths), self.device)
        self._forget()

    def _fit_tables(self) -> None:
        """Follow the slots where they have become more."""
        before = self._tables
        if before.scaling.shape[0] == self.slots.capacity + 1:
            return
        self._make_tables()
        live = [adapter.slot for adapter in self.adapters.values()]
        for name, table in vars(self._tables).items():
            if isinstance(table, Tensor):
                table[live] = getattr(before, name)[live]

    def _move_tables(self, device: torch.device) -> None:
        before = self._tables
        self._make_tables()
        if device.type != "meta" and before.factors.device.type != "meta":
            self._tables.scaling.copy_(before.scaling)
        for adapter in self.adapters.values():
            self._write_tables(adapter, self._tables.scaling[adapter.slot])

    def _write_tables(self, adapter: Adapter, scaling: float | Tensor) -> None:
        a_offset, *b_offsets = self._factor_offsets(adapter)
        rows, column = [[adapter.rank, 0, a_offset]], 0
        for rank, offset in zip(adapter.ranks, b_offsets, strict=True):
            rows.append([rank, column, offset])
            column += rank
        self._tables.factors[adapter.slot].copy_(torch.tensor(rows))
        with torch.no_grad():
            self._tables.scaling[adapter.slot] = scaling

    # --- for the operation --------------------------------------------------------------------

    def _forget(self) -> None:
        """Drop what was derived from the storage and the adapters."""
        self._tensors: BankTensors | None = None
        self._layouts: dict[tuple[bool, ...], GradientLayout] = {}
        self._dropping: tuple[int, ...] = ()
        self._ordered: list[Adapter] = []

    def tensors(self) -> BankTensors:
        """The bank as the backends take it, after checking that it still stands as it was built."""
        compiling = torch.compiler.is_compiling()
        if self._tables.scaling.shape[0] != self.slots.capacity + 1:
            self._fit_tables()
            self._forget()
        if self._tensors is None:
            self._ordered = sorted(self.adapters.values(), key=lambda adapter: adapter.slot)
        if not compiling:
            self._check_bound()
        thresholds = tuple(
            drop_threshold(adapter._dropout_p) if adapter.training else 0
            for adapter in self._ordered
        )
        if self._tensors is None or thresholds != self._dropping:
            self._tensors = self._make_tensors(thresholds)
        return self._tensors

    def _make_tensors(self, thresholds: tuple[int, ...]) -> BankTensors:
        columns = [0]
        for width in self.slice_widths:
            columns.append(columns[-1] + width)
        by_slot = [0] * (self.slots.capacity + 1)
        for adapter, threshold in zip(self._ordered, thresholds, strict=True):
            by_slot[adapter.slot] = threshold
        if any(by_slot) or any(self._dropping):
            self._tables.thresholds.copy_(torch.tensor(by_slot, dtype=torch.int32))
        self._dropping = thresholds
        return BankTensors(
            factors=[t for adapter in self._ordered for t in self._whole_factors(adapter)],
            slots=[adapter.slot for adapter in self._ordered],
            thresholds=list(thresholds),
            slice_columns=columns,
            width=max((adapter.rank for adapter in self._ordered), default=0),
            storage=self._storage,
            table=self._tables.factors,
            scaling=self._tables.scaling,
            threshold_table=self._tables.thresholds,
        )

    def ordered_adapters(self) -> list[Adapter]:
        """The adapters in the order of :meth:`tensors`."""
        return self._ordered

    def gradient_layout(self) -> GradientLayout:
        """Where a backward puts the gradients of the factors that require them now."""
        needed = tuple(p.requires_grad for a in self._ordered for p in a._parameters.values())
        layout = self._layouts.get(needed)
        if layout is None:
            layout = self._layouts[needed] = self._make_layout()
        return layout

    def _make_layout(self) -> GradientLayout:
        offsets, end = [], 0
        table = torch.full((self.slots.capacity + 1, 1 + len(self.slice_widths)), -1)
        for adapter in self._ordered:
            pairs = [pair or (None, None) for pair in adapter.factors()]
            needs = [any(a is not None and a.requires_grad for a, _ in pairs)]
            needs += [b is not None and b.requires_grad for _, b in pairs]
            sizes = [factor.numel() for factor in self._whole_factors(adapter)]
            row = []
            for need, size in zip(needs, sizes, strict=True):
                row.append(end if need else -1)
                end += _aligned(size) if need else 0
            table[adapter.slot] = torch.tensor(row)
            offsets += row
        return GradientLayout(offsets, end, table.to(self.device))

    def parameters_for(
        self, layout: GradientLayout
    ) -> tuple[list[nn.Parameter], list[int], list[int]]:
        """Every parameter, where its gradient begins in the flat tensor (or -1), and its slot."""
        parameters, offsets, slots = [], [], []
        count = 1 + len(self.slice_widths)
        for index, adapter in enumerate(self._ordered):
            a_offset, *b_offsets = layout.offsets[index * count : (index + 1) * count]
            for pair, b_offset in zip(adapter.factors(), b_offsets, strict=True):
                if pair is None:
                    continue
                a, b = pair
                parameters += pair
                offsets += [a_offset if a.requires_grad else -1, b_offset]
                slots += [adapter.slot] * 2
                if a_offset >= 0:
                    a_offset += a.numel()
        return parameters, offsets, slots

    def _check_bound(self) -> None:
        lost = False
        for adapter in self._ordered:
            for parameter, slab in self._bound_pairs(adapter):
                lost = lost or parameter.data_ptr() != slab
        if lost:
            self.rebind()
            self._ordered = sorted(self.adapters.values(), key=lambda adapter: adapter.slot)

    def _bound_pairs(self, adapter: Adapter) -> list[tuple[nn.Parameter, int]]:
        """Each parameter of the adapter and the address it should have; raises for foreign ones."""
        found = []
        size, base = self._storage.element_size(), self._storage.data_ptr()
        a_start, *b_starts = self._factor_offsets(adapter)
        for pair, b_start in zip(adapter.factors(), b_starts, strict=True):
            if pair is None:
                continue
            a, b = pair
            for parameter in pair:
                if type(parameter) is not nn.Parameter or hasattr(parameter, "ds_id"):
                    _refuse(parameter)
            found += [(a, base + a_start * size), (b, base + b_start * size)]
            a_start += a.numel()
        return found

    # --- what moves or copies a module --------------------------------------------------------

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if not len(self.adapters):
            kind = fn(torch.empty(0, dtype=self.dtype, device=self.device))
            if (kind.dtype, kind.device) != (self.dtype, self.device):
                self._storage = torch.empty(
                    self._storage.shape, dtype=kind.dtype, device=kind.device
                )
                self._move_tables(kind.device)
        self.rebind()
        return self

    def __getstate__(self) -> dict:
        left_out = ("_storage", "_tensors", "_layouts", "_ordered")
        state = {name: value for name, value in self.__dict__.items() if name not in left_out}
        state["_kind"] = (self.dtype, self.device)
        return state

    def __setstate__(self, state: dict) -> None:
        dtype, device = state.pop("_kind")
        super().__setstate__(state)
        self._storage = torch.empty(self._space.size, dtype=dtype, device=device)
        self._forget()
        for adapter in self.adapters.values():
            adapter.__dict__["_bank"] = weakref.ref(self)
        self.slots.join(self)
        self.rebind()

    def extra_repr(self) -> str:
        widths = self.slice_widths[0] if len(self.slice_widths) == 1 else list(self.slice_widths)
        return f"in_features={self.in_features}, out_features={widths}, dtype={self.dtype}"

    # --- checks -------------------------------------------------------------------------------

    def _check_factors(self, lora_a, lora_b) -> list[tuple[Tensor, Tensor] | None]:
        slices = len(self.slice_widths)
        if slices == 1 and isinstance(lora_a, Tensor):
            lora_a, lora_b = [lora_a], [lora_b]
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
                if not isinstance(factor, Tensor) or factor.dtype not in _DTYPES:
                    came = factor.dtype if isinstance(factor, Tensor) else type(factor).__name__
                    raise TypeError(f"{name}: expected a tensor of floating point, got {came}")
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


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _name(role: str, s: int, one: bool) -> str:
    return role if one else f"{role}_{s}"


def _check_name(name: str, bank: AdapterBank) -> None:
    if not isinstance(name, str):
        raise TypeError(f"name: expected a string, got {type(name).__name__}")
    if not name or "." in name or name == BASE or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"name: expected one without dots that is not {BASE!r} or a method of ModuleDict, "
            f"got {name!r}"
        )
    if name in bank:
        raise ValueError(f"name: there is an adapter {name!r} already; remove it first")


def _check_size(name: str, size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{name}: expected an integer, got {type(size).__name__}")
    if size < 1:
        raise ValueError(f"{name}: expected at least 1, got {size}")


def _check_scaling(scaling: float | Tensor) -> None:
    if isinstance(scaling, Tensor):
        if scaling.ndim != 0 or scaling.is_complex() or scaling.requires_grad:
            raise ValueError(
                "scaling: expected a number or a real 0-d tensor without gradient, got a tensor of "
                f"shape {list(scaling.shape)}, {scaling.dtype}, "
                f"requires_grad={scaling.requires_grad}"
            )
    elif isinstance(scaling, bool) or not isinstance(scaling, Real):
        raise TypeError(f"scaling: expected a number or a 0-d tensor, got {type(scaling).__name__}")


def _check_dropout(dropout_p: float) -> None:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, Real):
        raise TypeError(f"dropout_p: expected a number, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")


def _check_parameter(name: str, parameter: Tensor, slab: Tensor) -> None:
    if type(parameter) is not nn.Parameter:
        _refuse(parameter)
    if parameter.shape != slab.shape:
        raise RuntimeError(
            f"a parameter of adapter {name!r} has become {list(parameter.shape)}, its slab is "
            f"{list(slab.shape)}: remove and add the adapter to change its rank; FSDP and ZeRO-3 "
            "must be told to ignore the bank"
        )


def _refuse(parameter: object) -> None:
    raise RuntimeError(
        f"an adapter's parameter has become a {type(parameter).__name__}"
        f"{' partitioned by ZeRO-3' if hasattr(parameter, 'ds_id') else ''}: the bank works on its "
        "own storage; tell FSDP and ZeRO-3 to ignore it, and do not use functional_call or "
        "parametrizations on it"
    )
