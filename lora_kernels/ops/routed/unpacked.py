"""``routed_lora`` over adapters that lie anywhere in memory: those of another library, in no bank.

Dimensions: M tokens, K in_features, N out_features, R rank, L adapters that the batch names.

For inference: nothing is copied and nothing recorded. What a batch needs beside the adapters
themselves is kept in small caches keyed by values, never by identity: routings by who uses which
adapter, scalings and offsets as numbers.
"""

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_kernels.adapters.factors import LoRAFactors
from lora_kernels.base_weights import DenseWeight
from lora_kernels.ops.routed.bank.slots import BASE, AdapterSlots
from lora_kernels.ops.routed.bank.storage import ALIGNMENT, anchor
from lora_kernels.ops.routed.bank.tables import SlotTables, scaling_dtype
from lora_kernels.ops.routed.call import ForwardCall
from lora_kernels.ops.routed.cells import TableCell
from lora_kernels.ops.routed.choice import choose
from lora_kernels.ops.routed.op import run
from lora_kernels.ops.routed.plan import make_plan, reads_groups
from lora_kernels.ops.routed.routing import Routing
from lora_kernels.ops.routed.tensors import BankTensors, GradientLayout
from lora_kernels.runtime import dispatch
from lora_kernels.runtime.capture import is_captured, kept_per_device, stream_of
from lora_kernels.runtime.dtypes import autocast_dtype
from lora_kernels.runtime.eager import is_plain_eager


def routed_linear_unpacked(
    x: Tensor,
    base: DenseWeight,
    bias: Tensor | None,
    adapters: Mapping[str, LoRAFactors],
    names: Sequence[str],
    backend: str = "auto",
) -> Tensor:
    r"""A frozen linear layer in which every sequence has an adapter of its own, without gradients.

    .. math::
        y_m = x_m W^T + b + s_i \cdot x_m A_i^T B_i^T \quad i = \text{the adapter of m's sequence}

    The caller has seen to it that shapes, dtypes and devices fit and that no gradient is needed.

    Args:
        x: ``[S, ..., K]``, a row per sequence.
        base: W ``[N, K]`` in x's dtype (or autocast's).
        bias: ``[N]`` or None.
        adapters: by name.
        names: S of them; ``"__base__"`` and names that are not in ``adapters`` use none.
        backend: as for ``routed_lora``.

    Returns:
        ``[S, ..., N]`` in x's dtype, or autocast's.

    Raises:
        RuntimeError: a CUDA graph is captured. It would hold addresses in the caches below.
    """
    if (dtype := autocast_dtype(x)) is not None:
        x, base, bias = x.to(dtype), base.to(dtype), None if bias is None else bias.to(dtype)
    named = dict.fromkeys(name for name in names if name != BASE)
    slots = {name: slot for slot, name in enumerate(named)}
    with torch.no_grad():
        present = [(slot, adapters[name]) for name, slot in slots.items() if name in adapters]
        if not present:
            return base.matmul(x, bias)
        if is_captured(x.device):
            raise RuntimeError(
                "adapters that are named for each sequence are looked up on the host, and cannot "
                "be captured in a CUDA graph; use lora_kernels.route(model) and a Routing, or "
                "leave the call out of the graph"
            )
        ids = tuple(slots.get(name, -1) for name in names)
        capacity = len(slots)
        bank, backend = _bank(present, capacity, x, base.shape[0], backend)
        length = x.shape[1:-1].numel()
        routing = _routing(ids, length, capacity, x.device, stream_of(x.device))
        tensors = routing.tensors(with_plan=reads_groups(backend, x))
        alone, layout = is_plain_eager(x), GradientLayout([], [], 0, bank.slot_table)
        call = ForwardCall(
            bank, tensors, backend, alone=alone, layout=layout, x=x, base=base, bias=bias
        )
        return run("routed_lora", call)


def _bank(
    present: list[tuple[int, LoRAFactors]],
    capacity: int,
    x: Tensor,
    out_features: int,
    backend: str,
) -> tuple[BankTensors, str]:
    """The adapters as the backends take them, and the backend that can."""
    factors = [factor for _, (a, b, *_) in present for factor in (a, b)]
    slots, rows, storage = tuple(slot for slot, _ in present), None, x.new_empty(0)
    widest = max(a.shape[0] for _, (a, *_) in present)
    cell = TableCell(
        "forward", x.dtype, x.numel() // x.shape[-1], x.shape[-1], out_features, widest,
        len(present), dropout=False,
    )  # fmt: skip
    unasked = dispatch.requested(backend) == "auto"
    backend = make_plan(choose(backend, x.device, cell), x, unasked=unasked).backend
    if backend != "composed":
        storage = _anchor(factors[0].dtype, x.device)
        # The kernels count on the bank's alignment, Triton's and CUDA's; the CPU's do not.
        on_cpu = backend == "native" and x.device.type == "cpu"
        rows = _rows(factors, storage, 1 if on_cpu else ALIGNMENT)
    if rows is None:
        backend, rows = "composed", ((0, 0, 0),) * len(slots)  # which composed does not read
    numbers, on_device = [], {}
    for slot, adapter in present:
        scaling = adapter.scaling
        if isinstance(scaling, Tensor) and scaling.device.type != "cpu":  # not to be read back
            numbers.append(0.0)
            on_device[slot] = scaling
        else:
            numbers.append(float(scaling))
    stream = stream_of(x.device)
    tables = _tables(slots, rows, tuple(numbers), capacity, x.device, stream)
    for slot, scaling in on_device.items():
        tables = tables.with_scaling(slot, scaling)
    bank = BankTensors(
        factors=factors,
        slots=list(slots),
        thresholds=[0] * len(slots),
        slice_columns=[0, out_features],
        max_total_rank=widest,
        storage=storage,
        slot_table=tables.factors,
        scaling=tables.scaling,
        threshold_table=tables.thresholds,
    )
    return bank, backend


Row = tuple[int, int, int]  # rank, and the offsets of A and B in elements of the storage


def _rows(factors: list[Tensor], storage: Tensor, alignment: int) -> tuple[Row, ...] | None:
    """A row for each adapter; None where the kernels could not: another dtype, strides, or
    addresses that are no multiples of ``alignment`` elements."""
    size, base = storage.element_size(), storage.data_ptr()
    for factor in factors:
        if factor.dtype != storage.dtype or not factor.is_contiguous():
            return None
        if (factor.data_ptr() - base) % (alignment * size):
            return None
    offsets = [(factor.data_ptr() - base) // size for factor in factors]
    ranks = [factor.shape[0] for factor in factors[::2]]
    return tuple(zip(ranks, offsets[::2], offsets[1::2], strict=True))


# --- by value --------------------------------------------------------------------------------

# A batch of a server has a prefill and its steps; a model has a table per layer and choice. What is
# dropped may still be read by work that is enqueued: each stream has its own.
_ROUTINGS, _TABLES = 32, 2048


@functools.lru_cache(maxsize=_ROUTINGS)
def _routing(
    ids: tuple[int, ...], length: int, capacity: int, device: torch.device, stream: int
) -> Routing:
    """The routing of sequences of one length, each with its slot."""
    # Plain tensors even under inference_mode: the cache outlives it.
    with torch.inference_mode(False):
        slots = AdapterSlots(capacity)
        for slot in range(capacity):
            slots.acquire(str(slot))
        tokens = torch.tensor(ids, device="cpu").repeat_interleave(length)
        return Routing.from_tokens(tokens, slots, device=device)


@kept_per_device
def _anchor(dtype: torch.dtype, device: torch.device) -> Tensor:
    return anchor(dtype, device)


@functools.lru_cache(maxsize=_TABLES)
def _tables(
    slots: tuple[int, ...],
    rows: tuple[Row, ...],
    scalings: tuple[float, ...],
    capacity: int,
    device: torch.device,
    stream: int,
) -> SlotTables:
    with torch.inference_mode(False):
        numbers = torch.tensor(scalings, dtype=scaling_dtype(device), device=device)
        return SlotTables.empty(capacity, 1, device).with_adapters(
            {
                slot: [[rank, 0, a], [rank, 0, b]]
                for slot, (rank, a, b) in zip(slots, rows, strict=True)
            },
            dict(zip(slots, numbers, strict=True)),
        )
