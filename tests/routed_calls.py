"""A problem of ``routed_lora`` as its backends take it, and as its ops do."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_kernels.base_weights import BaseWeight, base_of
from lora_kernels.ops.routed import AdapterBank
from lora_kernels.ops.routed.call import BackwardCall, Needs, RoutedCall
from lora_kernels.ops.routed.tensors import GradientLayout, RoutingTensors
from lora_kernels.testing.routed_inputs import RoutedProblem

# The differentiable ones, then those that they call, then those that add in place.
OPS = (
    "routed_lora", "routed_shrink", "routed_expand",
    "routed_lora_forward", "routed_lora_backward",
    "routed_shrink_forward", "routed_shrink_backward", "routed_expand_backward",
    "routed_lora_", "routed_expand_",
)  # fmt: skip


@dataclass(eq=False)
class WholeCall(RoutedCall):
    """What a forward, an expand and each backward read, in one."""

    x: Tensor | None = None
    base: BaseWeight | None = None
    bias: Tensor | None = None
    out: Tensor | None = None
    save: bool = False
    layout: GradientLayout | None = None
    h: Tensor | None = None
    rows: int = 0
    dtype: torch.dtype | None = None
    dy: Tensor | None = None
    needs: Needs | None = None
    mask: Tensor | None = None
    in_features: int = 0

    new_weights = BackwardCall.new_weights
    base_gradient = BackwardCall.base_gradient


def op(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.lora_kernels, name).default


def call_of(
    problem: RoutedProblem,
    bank: AdapterBank,
    backend: str,
    routing: RoutingTensors | None = None,
    **changes,
) -> WholeCall:
    """A forward over the whole bank; ``changes`` name what a backward reads beside it."""
    p, tensors = problem, bank.tensors()
    made = p.routing(bank)
    layout, trained = bank.gradients(made.trained_slots())
    call = WholeCall(
        tensors,
        made.tensors(with_plan=backend != "triton") if routing is None else routing,
        backend,
        x=p.x,
        base=base_of(p.weight),
        bias=p.bias,
        seed=p.seed if any(tensors.thresholds) else None,
        in_features=p.x.shape[-1],
        layout=layout,
        trained=trained,
    )
    return replace(call, **changes)


def operands(name: str, call: WholeCall) -> list:
    """What the op of that name takes, by the names in its schema."""
    bank, routing, layout, trained = call.bank, call.routing, call.layout, call.trained
    base, place = call.base, call.place
    known = {
        **bank._asdict(),
        **routing._asdict(),
        "grad_slots": layout.slots,
        "grad_offsets": layout.offsets,
        "grad_numel": layout.numel,
        "grad_table": layout.table,
        "parameters": trained.parameters,
        "parameter_offsets": trained.offsets,
        "parameter_slots": trained.slots,
        "base": [] if base is None else list(base.tensors()),
        "base_format": "" if base is None else base.format,
        "base_meta": [] if base is None else list(base.meta),
        "row_offset": place.row_offset,
        "column_offset": place.column_offset,
        "pitch": call.in_features if place.pitch is None else place.pitch,
        "needs": None if call.needs is None else list(call.needs),
        "mask": routing.tokens.new_empty(0, dtype=torch.uint8) if call.mask is None else call.mask,
    }
    return [
        known[each.name] if each.name in known else getattr(call, each.name)
        for each in op(name)._schema.arguments
    ]
