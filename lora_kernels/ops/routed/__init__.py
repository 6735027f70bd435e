"""``routed_lora``: many adapters in one batch, forward and backward."""

import torch
from torch import Tensor

from lora_kernels.ops.routed import op, reference
from lora_kernels.ops.routed.bank.bank import Adapter, AdapterBank
from lora_kernels.ops.routed.bank.slots import AdapterSlots
from lora_kernels.ops.routed.checks import (
    check_base,
    check_h,
    check_input,
    check_out,
    check_out_type,
    check_rows,
    check_seed,
)
from lora_kernels.ops.routed.routing import Routing
from lora_kernels.ops.routed.tensors import RoutingTensors
from lora_kernels.runtime import cuda_extension, dispatch
from lora_kernels.runtime.dispatch import Choice
from lora_kernels.runtime.dropout import draw_seed
from lora_kernels.runtime.dtypes import FLOATING, cast_for_autocast

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

_OPS = torch.ops.lora_kernels


def routed_lora(
    x: Tensor,
    bank: AdapterBank,
    routing: Routing,
    out: Tensor | None = None,
    *,
    seed: Tensor | None = None,
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
    check_input(x, bank, routing)
    if out is not None:
        check_out_type(out)
        check_out(out, (*x.shape[:-1], bank.out_features), x.dtype, x)
    call = _Call(bank, routing, backend, x)
    seed = call.seed(seed)
    if out is None or call.needs_gradient(x) or (torch.is_grad_enabled() and out.requires_grad):
        if call.backend == "reference":
            y = call.reference(x, None, None, seed)
        else:
            # Negative zeros, where there is no adapter: they leave any number as it is.
            start = None if out is None else x.new_full((bank.out_features,), -0.0)
            y = call.differentiable("routed_lora", x, None, start, seed)
        return y if out is None else out.add_(y)
    if call.backend == "reference":
        return out.add_(call.reference(x, None, None, seed))
    _OPS.routed_lora_(*call.context, out, x, seed, call.backend)
    return out


def routed_lora_linear(
    x: Tensor,
    weight: Tensor,
    bank: AdapterBank,
    routing: Routing,
    bias: Tensor | None = None,
    *,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""A frozen linear layer with each token's adapters: ``x W^T + b`` plus :func:`routed_lora`.

    Args:
        x, bank, routing, seed, backend: as for :func:`routed_lora`.
        weight: ``[N, K]`` in x's dtype, frozen; N is that of all slices.
        bias: ``[N]`` in x's dtype.

    Returns:
        y ``[..., N]`` in x's dtype. A token without an adapter has exactly the frozen layer's row,
        as far as the vendor's GEMM computes it alike.

    Gradients as for :func:`routed_lora`, and of the bias. Under autocast x, weight and bias are
    cast to autocast's dtype.

    Raises:
        TypeError, ValueError, RuntimeError: as for :func:`routed_lora`.
    """
    x, weight, bias = cast_for_autocast(x, weight, bias)
    check_input(x, bank, routing)
    check_base(weight, bias, bank, x)
    call = _Call(bank, routing, backend, x)
    seed = call.seed(seed)
    if call.backend == "reference":
        return call.reference(x, weight, bias, seed)
    return call.differentiable("routed_lora", x, weight, bias, seed)


def routed_shrink(
    x: Tensor,
    bank: AdapterBank,
    routing: Routing,
    *,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The first half of :func:`routed_lora`: ``h = D(x) A^T`` of every pair.

    For tensor parallelism, which communicates between the halves: with A sharded by columns the
    ranks' results are summed.

    Returns:
        h ``[P, H]``: a row for each pair, in the routing's order (by slot); columns beyond the
        adapter's rank and rows of pairs without an adapter are zero. fp32 (fp64 for fp64; bf16 for
        bf16 on a CPU).

    Raises:
        TypeError, ValueError, RuntimeError: as for :func:`routed_lora`.
    """
    (x,) = cast_for_autocast(x)
    check_input(x, bank, routing)
    call = _Call(bank, routing, backend, x)
    seed = call.seed(seed)
    if call.backend == "reference":
        rows = x.reshape(-1, x.shape[-1])
        return reference.shrink(rows, call.version, call.slots, call.routing, seed)
    return call.differentiable("routed_shrink", x, seed)


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
    call = _Call(bank, routing, backend, h, dtype)
    expected = (call.routing.tokens.shape[0], call.bank.width)
    if tuple(h.shape) != expected:
        raise ValueError(f"h: expected {list(expected)} (pairs, widest rank), got {list(h.shape)}")
    if call.backend == "reference":
        base = h.new_zeros((rows, bank.out_features), dtype=dtype)
        y = reference.expand(h, base, call.version, call.slots, call.routing)
        return y if out is None else out.add_(y.view(out.shape))
    if out is None or call.needs_gradient(h) or (torch.is_grad_enabled() and out.requires_grad):
        y = call.differentiable("routed_expand", h, rows, dtype)
        return y if out is None else out.add_(y.view(out.shape))
    _OPS.routed_expand_(*call.context, out, h, call.backend)
    return out


def explain(x: Tensor, bank: AdapterBank, routing: Routing, *, backend: str = "auto") -> Choice:
    """The backend that :func:`routed_lora` would take for this call, and why.

    Launches nothing, and raises what the call would raise.

    Returns:
        A named tuple ``(backend, reason)``.
    """
    (x,) = cast_for_autocast(x)
    check_input(x, bank, routing)
    routing.check_current()
    choice = dispatch.choose(backend, x.device, x.dtype)
    if choice.backend == "composed" and x.device.type == "cuda":
        return Choice(
            "composed",
            f"{choice.reason}; it reads the sizes of the routing's groups once per filling, so the "
            "call cannot be captured in a CUDA graph",
        )
    if choice.backend == "native" and x.device.type == "cuda":
        tensors = bank.version_for(routing.pinned, routing.trained_slots()).tensors()
        reason = cuda_extension.why_not_decode_routed(
            x, tensors, routing.tensors(with_plan=False), any(tensors.thresholds)
        )
        kernels = f"Triton's kernels ({reason})" if reason else "one CUDA kernel for all adapters"
        return Choice("native", f"{choice.reason}; {kernels}")
    return choice


class _Call:
    """A bank and a routing as one call sees them."""

    def __init__(
        self,
        bank: AdapterBank,
        routing: Routing,
        backend: str,
        like: Tensor,
        result: torch.dtype | None = None,  # None: like's
    ) -> None:
        dtype = like.dtype
        if like.device.type == "cuda" and dtype == torch.float32 and result is not None:
            dtype = result  # h is fp32 there, whatever x was: it says nothing about the call
        self.backend = dispatch.choose(backend, like.device, dtype).backend
        slots = self.slots = routing.trained_slots()
        version = self.version = bank.version_for(routing.pinned, slots, routing.capacity)
        routing.check_current()
        self.bank = version.tensors(slots, routing.capacity)
        if version.device.type == "cuda" and not torch.compiler.is_compiling():
            version.note_stream(slots)
        # On a GPU the groups' sizes would have to be waited for; the kernels there need no plan.
        with_plan = self.backend == "composed" or (
            self.backend == "native" and like.device.type == "cpu"
        )
        self.routing: RoutingTensors = routing.tensors(with_plan=with_plan)
        self.layout, self.trained = version.gradients(slots, routing.capacity)

    @property
    def context(self) -> tuple:
        return (*self.bank, *self.routing)

    def differentiable(self, name: str, *inputs) -> Tensor:
        """Call a differentiable op with the batch's parameters, which autograd must see."""
        return op.call_differentiable(
            name,
            self.routing.tokens,
            *self.context,
            *self.layout,
            *inputs,
            self.backend,
            *self.trained,
        )

    def needs_gradient(self, x: Tensor) -> bool:
        weights = self.routing.pair_weights
        return torch.is_grad_enabled() and (
            x.requires_grad
            or (weights is not None and weights.requires_grad)
            or any(parameter.requires_grad for parameter in self.trained.parameters)
        )

    def seed(self, seed: Tensor | None) -> Tensor | None:
        """What the masks are a function of; None where no adapter drops."""
        device = self.bank.scaling.device
        if seed is not None:
            check_seed(seed, device)
        if not any(self.bank.thresholds):
            return None
        return draw_seed(device) if seed is None else seed

    def reference(self, x: Tensor, weight, bias, seed: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if weight is None:
            base = rows.new_zeros((rows.shape[0], self.bank.slice_columns[-1]))
            base = base + rows[:0].sum()  # nothing, but a function of x
        else:
            base = torch.nn.functional.linear(rows, weight, bias)
        h = reference.shrink(rows, self.version, self.slots, self.routing, seed)
        y = reference.expand(h, base, self.version, self.slots, self.routing)
        return y.view(*x.shape[:-1], y.shape[1])
