"""``routed_lora``: many adapters in one batch, forward and backward."""

from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.base_weights import BaseWeight, DenseWeight
from lora_kernels.ops.routed import op, reference
from lora_kernels.ops.routed.bank.bank import Adapter, AdapterBank
from lora_kernels.ops.routed.bank.slots import AdapterSlots
from lora_kernels.ops.routed.bank.versions import BankVersion
from lora_kernels.ops.routed.call import NOTHING_TRAINED, ExpandCall, ForwardCall, RoutedCall
from lora_kernels.ops.routed.cells import TableCell
from lora_kernels.ops.routed.checks import (
    check_base,
    check_h,
    check_input,
    check_out,
    check_out_type,
    check_rows,
    check_seed,
)
from lora_kernels.ops.routed.choice import choose
from lora_kernels.ops.routed.plan import RoutedPlan, make_plan
from lora_kernels.ops.routed.routing import Routing
from lora_kernels.ops.routed.tensors import (
    BankTensors,
    GradientLayout,
    RoutingTensors,
    TrainableFactors,
)
from lora_kernels.runtime import cuda_extension, dispatch, tables
from lora_kernels.runtime.capture import is_captured
from lora_kernels.runtime.device_limits import next_power_of_two, precision
from lora_kernels.runtime.dispatch import Choice
from lora_kernels.runtime.dropout import MaskPlace, check_place, draw_seed
from lora_kernels.runtime.dtypes import FLOATING, autocast_dtype, cast_for_autocast
from lora_kernels.runtime.eager import is_plain_eager, requires_grad
from lora_kernels.runtime.plan import metadata_of, state_of_process

__all__ = [
    "Adapter",
    "AdapterBank",
    "AdapterSlots",
    "Routing",
    "explain",
    "routed_expand",
    "routed_lora",
    "routed_lora_linear",
    "routed_shrink",
]


_autocasts = torch._C._is_any_autocast_enabled
_WHOLE = MaskPlace()


def routed_lora(
    x: Tensor,
    bank: AdapterBank,
    routing: Routing,
    out: Tensor | None = None,
    *,
    seed: Tensor | None = None,
    row_offset: int = 0,
    column_offset: int = 0,
    pitch: int | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""The adapters' contribution to each token of a batch.

    .. math::
        \Delta y_m = \sum_{(m, i, w)} w \, s_i \cdot D_i(x_m) A_i^T B_i^T

    over the pairs (token, adapter, weight) of the routing. Source: Chen et al., "Punica:
    Multi-Tenant LoRA Serving", 2023 (SGMV), here for any ranks and token order, with a backward.

    Args:
        x: ``[..., K]``, bf16, fp16, fp32 or fp64; its leading dimensions hold M tokens, as many as
            the routing has.
        bank: the adapters; those in training mode drop elements of x, each by a mask of its own.
        routing: which adapters each token uses; made for the bank's slots.
        out: ``[..., N]`` in x's dtype, in memory of its own; the contribution is added into it,
            and rows of tokens without an adapter stay as they are, bit for bit. None: a new tensor.
        seed: 0-d int64 on x's device for the masks; None draws one where an adapter drops.
        row_offset, column_offset, pitch: where x stands in a whole activation of ``pitch``
            columns, whose masks it draws its part of; see :func:`lora_linear`.
        backend: ``auto``, ``reference``, ``composed``, ``triton`` or ``native``; see
            :func:`explain`.

    Returns:
        ``[..., N]``: ``out``, or a new tensor in x's dtype with zeros where there is no adapter.

    Gradients reach x, ``out`` (through), the routing's weights and the parameters of the adapters
    that the batch uses, if they require them; the parameters of other adapters keep ``.grad`` None,
    and a batch that uses none of the trained ones has a result that does not require grad. Where
    the adapters are not known on the host (ids on a device, CUDA graphs, ``torch.compile``) those
    without tokens get exact zeros instead: all of them, or those of the routing's ``adapters=``.
    Where a gradient is needed ``out`` is added to in a pass of its own: prefer
    :func:`routed_lora_linear` for training. Under autocast x is cast to autocast's dtype.

    With ``create_graph=True`` a backward is computed by torch's own differentiable operations, the
    adapters in fp32 or better, so that gradients have derivatives of any order (forces, gradient
    penalties); on a device it waits for the sizes of the routing's groups. Masks and scalings are
    constants. x is saved only where some A requires grad: differentiating a gradient of B or of the
    weights with respect to an x that was not saved raises. Not in graphs of ``torch.compile``;
    ``torch.func`` transforms are not supported.

    Raises:
        TypeError: an argument is of the wrong type or dtype, or of a class that stands for other
            tensors (DTensor, a quantised weight).
        ValueError: a shape, device or value does not fit, the routing is out of date, or the named
            backend cannot serve.
        RuntimeError: the bank's parameters were replaced by what it cannot work on.
    """
    (x,) = cast_for_autocast(x)
    place = MaskPlace(row_offset, column_offset, pitch)
    if out is not None:
        check_input(x, bank, routing)
        check_out_type(out)
        check_out(out, (*x.shape[:-1], bank.out_features), x.dtype, x)
    batch = _prepared(x, bank, routing, seed, place, backend)
    call = ForwardCall(*batch.common, layout=batch.layout, x=x)
    if call.backend == "reference":
        y = _reference(call, batch)
    elif out is None or _needs_gradient(call, x, out):
        if out is not None:
            # Negative zeros, where there is no adapter: they leave any number as it is.
            call.bias = x.new_full((bank.out_features,), -0.0)
        y = op.run("routed_lora", call)
    else:
        op.run_in_place("routed_lora_", call, out)
        return out
    return y if out is None else out.add_(y)


def routed_lora_linear(
    x: Tensor,
    weight: Tensor | BaseWeight,
    bank: AdapterBank,
    routing: Routing,
    bias: Tensor | None = None,
    *,
    seed: Tensor | None = None,
    row_offset: int = 0,
    column_offset: int = 0,
    pitch: int | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""A frozen linear layer with each token's adapters: ``x W^T + b`` plus :func:`routed_lora`.

    Args:
        x, bank, routing, seed, row_offset, column_offset, pitch, backend: as for
            :func:`routed_lora`.
        weight: ``[N, K]`` in x's dtype, frozen, a tensor or a :class:`BaseWeight`; N is that of all
            slices.
        bias: ``[N]`` in x's dtype.

    Returns:
        y ``[..., N]`` in x's dtype. A token without an adapter has exactly the frozen layer's row,
        as far as the vendor's GEMM computes it alike.

    Gradients as for :func:`routed_lora`, and of the bias. Under autocast x, weight and bias are
    cast to autocast's dtype.

    Raises:
        TypeError, ValueError, RuntimeError: as for :func:`routed_lora`.
    """
    base = DenseWeight(weight) if isinstance(weight, Tensor) else weight
    if (_autocasts() or getattr(x, "is_mps", False)) and (dtype := autocast_dtype(x)) is not None:
        x, base = x.to(dtype), base.to(dtype) if isinstance(base, BaseWeight) else base
        bias = bias.to(dtype) if isinstance(bias, Tensor) else bias
    place = MaskPlace(row_offset, column_offset, pitch)
    batch = _prepared(x, bank, routing, seed, place, backend, (base, bias))
    call = ForwardCall(*batch.common, layout=batch.layout, x=x, base=base, bias=bias)
    if call.backend == "reference":
        return _reference(call, batch)
    return op.run("routed_lora", call)


def routed_shrink(
    x: Tensor,
    bank: AdapterBank,
    routing: Routing,
    *,
    seed: Tensor | None = None,
    row_offset: int = 0,
    column_offset: int = 0,
    pitch: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """The first half of :func:`routed_lora`: ``h = D(x) A^T`` of every pair.

    For tensor parallelism, which communicates between the halves: with A sharded by columns the
    ranks' results are summed.

    Args:
        x, bank, routing, seed, row_offset, column_offset, pitch, backend: as for
            :func:`routed_lora`; K is that of the bank, a part of the columns where A is sharded.

    Returns:
        h ``[P, H]``: a row for each pair, in the routing's order (by slot); columns beyond the
        adapter's rank and rows of pairs without an adapter are zero. fp32 (fp64 for fp64; bf16 for
        bf16 on a CPU).

    Raises:
        TypeError, ValueError, RuntimeError: as for :func:`routed_lora`.
    """
    (x,) = cast_for_autocast(x)
    place = MaskPlace(row_offset, column_offset, pitch)
    batch = _prepared(x, bank, routing, seed, place, backend)
    call = ForwardCall(*batch.common, layout=batch.layout, x=x)
    if call.backend == "reference":
        return _reference_shrink(call, batch, x.reshape(-1, x.shape[-1]))
    return op.run("routed_shrink", call)


def routed_expand(
    h: Tensor,
    bank: AdapterBank,
    routing: Routing,
    out: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """The second half of :func:`routed_lora`: ``sum of w s h B^T`` over each token's pairs.

    Args:
        h: ``[P, H]`` as from :func:`routed_shrink`, of a bank with the same ranks.
        bank, routing, backend: as for :func:`routed_lora`.
        out: ``[..., N]``, added to.
        dtype: of the result where ``out`` is None; None is the bank's dtype.

    Returns:
        ``out``, or a new tensor ``[M, N]`` with M the routing's ``num_tokens``.

    Gradients reach h, the parameters B and the routing's weights.

    Raises:
        TypeError, ValueError, RuntimeError: as for :func:`routed_lora`.
    """
    check_h(h, bank, routing)
    if out is not None:
        check_out_type(out)
    dtype = dtype or (bank.dtype if out is None else out.dtype)
    if dtype not in FLOATING:
        raise TypeError(f"dtype: expected a floating point dtype, got {dtype}")
    rows = routing.num_tokens
    if out is not None:
        rows = out.shape[:-1].numel()
        check_out(out, (*out.shape[:-1], bank.out_features), dtype, h)
        check_rows("out", rows, routing)
    batch = _prepared(h, bank, routing, None, _WHOLE, backend, of_h=dtype)
    call = ExpandCall(*batch.common, layout=batch.layout, h=h, rows=rows, dtype=dtype)
    expected = (call.routing.tokens.shape[0], call.bank.max_total_rank)
    if tuple(h.shape) != expected:
        raise ValueError(f"h: expected {list(expected)} (pairs, widest rank), got {list(h.shape)}")
    if call.backend == "reference":
        base = h.new_zeros((rows, bank.out_features), dtype=dtype)
        y = reference.expand(h, base, batch.version, batch.slots, call.routing)
    elif out is None or _needs_gradient(call, h, out):
        y = op.run("routed_expand", call)
    else:
        op.run_in_place("routed_expand_", call, out)
        return out
    return y if out is None else out.add_(y.view(out.shape))


def explain(x: Tensor, bank: AdapterBank, routing: Routing, *, backend: str = "auto") -> Choice:
    """The backend that :func:`routed_lora` would take for this call, and why.

    Launches nothing, and raises what the call would raise.

    Args:
        x, bank, routing, backend: as for :func:`routed_lora`.

    Returns:
        A named tuple ``(backend, reason)``.

    Raises:
        TypeError, ValueError: as :func:`routed_lora`.
    """
    (x,) = cast_for_autocast(x)
    check_input(x, bank, routing)
    routing.check_current()
    version = bank.version_for(routing.pinned, routing.trained_slots())
    choice = _plan(backend, x, bank, version, routing, x.dtype).choice
    if choice.backend == "composed" and x.device.type == "cuda":
        return Choice(
            "composed",
            f"{choice.reason}; it reads the sizes of the routing's groups once per filling, so the "
            "call cannot be captured in a CUDA graph",
        )
    if choice.backend == "native" and x.device.type == "cuda":
        tensors = version.tensors()
        reason = cuda_extension.why_not_decode_routed(
            x, tensors, routing.tensors(with_plan=False), any(tensors.thresholds)
        )
        kernels = f"Triton's kernels ({reason})" if reason else "one CUDA kernel for all adapters"
        return Choice("native", f"{choice.reason}; {kernels}")
    return choice


class _Batch(NamedTuple):
    """What every call of a bank and a routing has, and what the definition reads of the bank."""

    common: tuple[
        BankTensors,
        RoutingTensors,
        str,  # the backend
        Tensor | None,  # the seed
        MaskPlace,
        bool,  # whether nothing else has to see the call
        TrainableFactors,
    ]
    layout: GradientLayout | None
    version: BankVersion
    slots: tuple[int, ...] | None  # that the routing may use; None: all


def _prepared(
    x: Tensor,  # or h, with the dtype of the result as of_h
    bank: AdapterBank,
    routing: Routing,
    seed: Tensor | None,
    place: MaskPlace,
    backend: str,
    layer: tuple[BaseWeight | None, Tensor | None] | None = None,  # the weight and the bias
    of_h: torch.dtype | None = None,
) -> _Batch:
    """A call's batch, its plan looked up with the bank's version or made after the full check."""
    base, bias = layer or (None, None)
    plan = key = plans = None
    alone = is_plain_eager(x)
    if (
        alone
        and place == _WHOLE
        and isinstance(bank, AdapterBank)
        and isinstance(routing, Routing)
        and routing.slots is bank.slots
    ):
        slots = routing.trained_slots()
        version = bank.version_for(routing.pinned, slots, routing.capacity)
        # A batch may read an older version, and the check asks where the bank is now.
        device = None if routing.pinned is None else bank.device
        key = _key_of(x, base, bias, routing, seed, backend, layer is None, of_h, device)
        plans = version.plans
        plan = plans.get(key)
    if plan is None:
        _check(x, bank, routing, seed, place, layer, of_h)
        dtype = x.dtype
        if x.device.type == "cuda" and dtype == torch.float32 and of_h is not None:
            dtype = of_h  # h is fp32 there, whatever x was: it says nothing about the call
        slots = routing.trained_slots()
        version = bank.version_for(routing.pinned, slots, routing.capacity)
        plan = _plan(backend, x, bank, version, routing, dtype)
        # Not where another thread has made a version that the check may not have seen.
        if plans is not None and version.plans is plans:
            plans.keep(key, plan)
    routing.check_current()
    tensors = version.tensors(slots, routing.capacity)
    if version.device.type == "cuda" and not torch.compiler.is_compiling():
        version.note_stream(slots)
    if of_h is not None or not any(tensors.thresholds):
        seed = None
    elif seed is None:
        seed = draw_seed(tensors.scaling.device)
    layout, trained = None, NOTHING_TRAINED
    if torch.is_grad_enabled() or not alone:
        layout, trained = version.gradients(slots, routing.capacity)
    of_routing = routing.tensors(with_plan=plan.reads_groups)
    backend = plan.backend
    common = tensors, of_routing, backend, seed, place, alone, trained
    return _Batch(common, layout, version, slots)


def _plan(
    backend: str,
    x: Tensor,
    bank: AdapterBank,
    version: BankVersion,
    routing: Routing,
    dtype: torch.dtype,
) -> RoutedPlan:
    trains = torch.is_grad_enabled() and version.trains
    cell = TableCell(
        "training" if trains else "forward", dtype, routing.num_tokens, bank.in_features,
        bank.out_features, version.widest, len(version.by_slot), bool(version.thresholds),
    )  # fmt: skip
    choice = choose(backend, x.device, cell, is_captured=is_captured(x.device))
    return make_plan(choice, x, unasked=dispatch.requested(backend) == "auto")


def _key_of(x, base, bias, routing, seed, backend, alone, of_h, device) -> tuple | None:
    """All that the full check and the choice look at beside the version; None where only the check
    can tell."""
    weights, kind, meta = (), alone, ()
    if not isinstance(backend, str):  # it may have no hash
        return None
    if base is not None:
        if not isinstance(base, BaseWeight):
            return None
        weights, kind, meta = base.tensors(), base.format, base.meta
    found = metadata_of(x, bias, seed, *weights)
    if found is None:
        return None
    for weight in weights:
        if weight.requires_grad and torch.is_grad_enabled():
            return None
    if of_h is None and x.numel() // x.shape[-1] not in (routing.num_tokens, routing.max_tokens):
        return None
    measured = None
    if tables.FOR_CPU or not x.is_cpu:
        measured = (
            next_power_of_two(routing.num_tokens), torch.is_grad_enabled(), is_captured(x.device),
            precision(x.dtype), state_of_process(),
        )  # fmt: skip
    return (
        found, kind, meta, routing.device, backend, dispatch.PROCESS_DEFAULT, of_h, device,
        measured,
    )  # fmt: skip


def _check(x, bank, routing, seed, place, layer, of_h) -> None:
    if of_h is None:
        check_input(x, bank, routing)
    if layer is not None:
        base, bias = layer
        check_base(base, bias, bank, x)
    if seed is not None:
        check_seed(seed, bank.device)
    if place != _WHOLE:
        check_place(place.row_offset, place.column_offset, place.pitch, x.shape[-1])


def _needs_gradient(call: RoutedCall, operand: Tensor, out: Tensor) -> bool:
    return requires_grad((operand, out, call.routing.pair_weights, *call.trained.parameters))


def _reference(call: ForwardCall, batch: _Batch) -> Tensor:
    rows = call.x.reshape(-1, call.x.shape[-1])
    if call.base is None:
        start = rows.new_zeros((rows.shape[0], call.bank.slice_columns[-1]))
        start = start + rows[:0].sum()  # nothing, but a function of x
    else:
        start = torch.nn.functional.linear(rows, call.base.dequantise(), call.bias)
    h = _reference_shrink(call, batch, rows)
    y = reference.expand(h, start, batch.version, batch.slots, call.routing)
    return y.view(*call.x.shape[:-1], y.shape[1])


def _reference_shrink(call: ForwardCall, batch: _Batch, rows: Tensor) -> Tensor:
    return reference.shrink(rows, batch.version, batch.slots, call.routing, call.seed, call.place)
