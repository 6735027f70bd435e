"""The self-test's checks find wrong kernels: each family passes as it is, and not with a fault."""

import pytest
import torch

from lora_kernels.ops.linear import triton as linear
from lora_kernels.ops.routed import triton as routed
from lora_kernels.ops.routed.call import RoutedCall
from lora_kernels.runtime.dropout import ActiveDropout, MaskPlace
from lora_kernels.runtime.verdicts import BROKEN, PROVEN
from lora_kernels.self_test import child, families
from lora_kernels.self_test.families import FAMILIES
from lora_kernels.testing import policy

CPU, DTYPES = torch.device("cpu"), (torch.float32,)


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    """The interpreter takes seconds for what a GPU does in microseconds."""
    monkeypatch.setattr(families, "SHAPES", {"small": (33, 40, 24, 3)})
    monkeypatch.setattr(families, "DROPOUTS", (0.1,))
    monkeypatch.setattr(policy, "_DRAWS", 1)  # after a result that is wrong, instead of 16


def judged(family):
    return child.judge(FAMILIES[family], CPU, DTYPES, lambda **line: None)


@pytest.mark.parametrize("family", ["linear/triton hybrid", "linear/triton fused", "routed/triton"])
def test_a_right_kernel_is_proven(family):
    verdict = judged(family)
    assert verdict["state"] == PROVEN, verdict


def drop_a_tile(result):
    result[0][16:32, :16] = 0
    return result


def forget_the_scale(result):
    """Of the gradient of B."""
    result.lora_b.mul_(0.5)
    return result


def swap_rows(result):
    result[0].copy_(result[0].flip(0))
    return result


def with_the_mask_shifted(call):
    place = MaskPlace(row_offset=1)
    if isinstance(call, RoutedCall):
        call.place = place
    elif call.dropout is not None:
        call.dropout = ActiveDropout(call.dropout.p, call.dropout.seed, place)
    return call


def without_the_scale(call):
    if isinstance(call, RoutedCall):
        call.bank = call.bank._replace(scaling=torch.ones_like(call.bank.scaling))
    else:
        call.factors = call.factors._replace(scaling=1.0)
    return call


@pytest.mark.parametrize(
    "family, module, step, fault",
    [
        ("linear/triton hybrid", linear, "forward", with_the_mask_shifted),
        ("linear/triton hybrid", linear, "backward", with_the_mask_shifted),
        ("linear/triton hybrid", linear, "backward", without_the_scale),
        ("routed/triton", routed, "forward", without_the_scale),
        ("routed/triton", routed, "backward", with_the_mask_shifted),
    ],
)
def test_a_kernel_with_a_wrong_operand_is_broken(family, module, step, fault, monkeypatch):
    right = getattr(module, step)
    monkeypatch.setattr(module, step, lambda call: right(fault(call)))
    verdict = judged(family)
    assert verdict["state"] == BROKEN and "AssertionError" in verdict["detail"], verdict


@pytest.mark.parametrize("family, module", [("linear/triton hybrid", linear)])
@pytest.mark.parametrize(
    "step, fault",
    [
        ("forward", drop_a_tile),
        ("forward", swap_rows),
        ("backward", drop_a_tile),
        ("backward", forget_the_scale),
    ],
)
def test_a_wrong_kernel_is_broken(family, module, step, fault, monkeypatch):
    right = getattr(module, step)
    monkeypatch.setattr(module, step, lambda call: fault(right(call)))
    verdict = judged(family)
    assert verdict["state"] == BROKEN and "AssertionError" in verdict["detail"], verdict
