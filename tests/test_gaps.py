"""Whether torch's GEMM reads between the rows of its operands is found out, and only if it does."""

import math

import pytest
import torch
from gaps import vendor_gap, vendor_reads_gaps
from gemm_that_reads_gaps import gemm_that_reads_gaps
from torch.nn import functional as F

HALVES = [torch.bfloat16, torch.float16]
# The ways in which a GEMM may have the fault: a left operand's columns, and the pitch of its rows.
FAULTS = {
    "everywhere": lambda left: True,
    "rows with gaps": lambda left: left.stride(0) > left.shape[1],
    "rows without gaps": lambda left: left.stride(0) == left.shape[1],
    "short rows": lambda left: left.shape[1] < 32,
    "long rows": lambda left: left.shape[1] > 32,
    "even sizes": lambda left: left.shape[1] % 2 == 0,
    "many rows": lambda left: left.shape[0] > 128,
}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_gemm_that_reads_gaps_is_found_out(fault, dtype):
    with gemm_that_reads_gaps(FAULTS[fault]):
        assert vendor_reads_gaps(dtype)
        assert vendor_gap(dtype) == torch.finfo(dtype).max
        assert math.isnan(vendor_gap(dtype, "cuda"))  # another vendor's
        assert not vendor_reads_gaps(torch.float32) and math.isnan(vendor_gap(torch.float32))


def test_a_gemm_that_does_not_is_not():
    with gemm_that_reads_gaps(lambda left: False):
        for dtype in HALVES:
            assert not vendor_reads_gaps(dtype) and math.isnan(vendor_gap(dtype))


@pytest.mark.parametrize("depth", [7, 33])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_planted_fault(dtype, depth):
    """NaN in a gap reaches its row and no other; the largest number does not; no gap, no fault."""
    x, weight = torch.randn(5, depth).to(dtype), torch.randn(4, depth).to(dtype)
    bias = torch.randn(4).to(dtype)
    expected = F.linear(x, weight, bias)
    wide = torch.zeros(5, depth + 3, dtype=dtype)
    wide[:, :depth], wide[2, depth] = x, torch.nan
    with gemm_that_reads_gaps():
        y = F.linear(wide[:, :depth], weight, bias)
        assert y[2].isnan().all() and torch.equal(y[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])
        wide[2, depth] = vendor_gap(dtype)
        for left in (wide[:, :depth], x, x.t().contiguous().t()):
            assert torch.equal(F.linear(left, weight, bias), expected)
            assert torch.equal(bias.expand(5, 4).clone().addmm_(left, weight.t()), expected)
            assert (left @ weight.t()).isfinite().all()
    wide[2, depth] = torch.nan
    assert vendor_reads_gaps(dtype) or torch.equal(
        F.linear(wide[:, :depth], weight, bias), expected
    )
