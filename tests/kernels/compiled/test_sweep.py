"""All variants of the kernels over ranks, dtypes and operands: they fit and none spills.

The better part of an hour, so on demand: `make triton-matrix`, or

COMPILE_SWEEP=1 pytest tests/kernels/compiled/test_sweep.py
"""

import itertools

import pytest
from compile_cases import (
    BF16,
    DEVICES,
    FP16,
    FP32,
    SWEEP,
    LinearCase,
    RoutedCase,
    compile_key,
    launches_of,
)
from compile_only import compile_launch

pytestmark = pytest.mark.skipif(not SWEEP, reason="an hour of compiling: set COMPILE_SWEEP=1")


@pytest.mark.parametrize("capability", DEVICES)
@pytest.mark.parametrize("tokens", [200, 8192])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, FP32), (FP16, FP32)], ids=str)
def test_no_variant_spills(dtypes, tokens, capability):
    operands = [(0.1, False), (0.0, True)]  # dropout_p, with_output_scale
    calls = [
        LinearCase(tokens, 4096, 14_336, rank, *dtypes, dropout_p, scaled, strategy)
        for rank, (dropout_p, scaled), strategy in itertools.product(
            (8, 32, 64, 128, 256), operands, ("fused", "hybrid")
        )
    ]
    check(calls, capability)


@pytest.mark.parametrize("capability", DEVICES)
@pytest.mark.parametrize("tokens", [32, 8192])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, FP32), (FP16, FP32)], ids=str)
def test_no_routed_variant_spills(dtypes, tokens, capability):
    calls = [
        RoutedCase(tokens, 4096, slices, rank * len(slices), *dtypes, dropout, strategy=strategy)
        for rank, slices, dropout, strategy in itertools.product(
            (8, 32, 64, 128), ((4096,), (4096, 1024, 1024)), (False, True), ("fused", "hybrid")
        )
    ]
    check(calls, capability)


def check(calls: list, capability: int) -> None:
    """Every kernel of these calls fits, and none spills."""
    distinct = {}
    for call in calls:
        for launch in launches_of(call, capability):
            distinct.setdefault(compile_key(launch), launch)
    spilling = []
    for key, launch in distinct.items():
        used = compile_launch(launch, capability)
        assert used.shared <= DEVICES[capability].shared_memory, key
        if used.spills:
            spilling.append((key, used.registers, used.stack))
    assert not spilling
