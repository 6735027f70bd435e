"""A problem of ``lora_linear`` as its backends take it, and as its ops do."""

from dataclasses import replace

import torch

from lora_kernels.adapters.factors import LoRAFactors
from lora_kernels.base_weights import base_of
from lora_kernels.ops.linear.call import LinearBackward, LinearCall, Needs
from lora_kernels.runtime.dropout import ActiveDropout, MaskPlace, drop_threshold
from lora_kernels.testing import LoRAProblem

FORWARD = torch.ops.lora_kernels.lora_linear_forward.default
BACKWARD = torch.ops.lora_kernels.lora_linear_backward.default
OP = torch.ops.lora_kernels.lora_linear.default
WHOLE = MaskPlace()


def call_of(problem: LoRAProblem, place: MaskPlace = WHOLE, **changes) -> LinearCall:
    """A forward."""
    p, drops = problem, drop_threshold(problem.dropout_p) > 0
    call = LinearCall(
        x=p.x,
        base=base_of(p.weight),
        factors=LoRAFactors(p.lora_a, p.lora_b, p.scaling, p.output_scale),
        bias=p.bias,
        dropout=ActiveDropout(p.dropout_p, p.seed, place) if drops else None,
    )
    return replace(call, **changes)


def backward_of(
    problem: LoRAProblem, needs: Needs, place: MaskPlace = WHOLE, **saved
) -> LinearBackward:
    """A backward; ``saved`` is what it reads of a forward's results."""
    call = call_of(problem, place)
    x = problem.x if needs.lora_a else None
    return LinearBackward(problem.dy, call.base, call.factors, call.dropout, needs, x, **saved)


def base_operands(weight: torch.Tensor | None) -> tuple:
    return ([], "", []) if weight is None else ([weight], "dense", [])


def place_operands(problem: LoRAProblem, place: MaskPlace = WHOLE) -> tuple:
    columns = problem.x.shape[-1]
    return place.row_offset, place.column_offset, columns if place.pitch is None else place.pitch


def forward_operands(problem: LoRAProblem, place: MaskPlace = WHOLE) -> tuple:
    """Those of ``lora_linear`` and ``lora_linear_forward`` before their last ones."""
    p = problem
    return (
        p.x, *base_operands(p.weight), p.lora_a, p.lora_b, p.scaling, p.bias, p.output_scale,
        p.dropout_p, p.seed, *place_operands(p, place),
    )  # fmt: skip


def backward_operands(
    problem: LoRAProblem, h, unscaled, mask, needs, place: MaskPlace = WHOLE
) -> tuple:
    """Those of ``lora_linear_backward`` but the backend."""
    p = problem
    return (
        p.dy, p.x, *base_operands(p.weight), p.lora_a, p.lora_b, p.scaling, h, p.output_scale,
        unscaled, mask, p.dropout_p, p.seed, *place_operands(p, place), needs,
    )  # fmt: skip
