"""All variants of the kernels over ranks, dtypes and operands: none spills. Minutes, so on demand:

COMPILE_SWEEP=1 pytest tests/kernels/compiled/test_sweep.py
"""

import itertools
import os

import pytest

from lora_kernels.testing.compile_cases import (
    BF16,
    DEVICES,
    FP16,
    FP32,
    LinearCase,
    compile_key,
    launches_of,
)
from lora_kernels.testing.compile_only import compile_launch

pytestmark = pytest.mark.skipif(
    os.environ.get("COMPILE_SWEEP") != "1", reason="minutes of compiling: set COMPILE_SWEEP=1"
)


@pytest.mark.parametrize("capability", DEVICES)
@pytest.mark.parametrize("tokens", [200, 8192])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, FP32), (FP16, FP32)], ids=str)
def test_no_variant_spills(dtypes, tokens, capability):
    operands = [(0.1, False), (0.0, True)]  # dropout_p, with_output_scale
    seen, spilling = set(), []
    for rank, (dropout_p, scaled), strategy in itertools.product(
        (8, 32, 64, 128, 256), operands, ("fused", "hybrid")
    ):
        call = LinearCase(tokens, 4096, 14_336, rank, *dtypes, dropout_p, scaled, strategy)
        for launch in launches_of(call, capability):
            key = compile_key(launch)
            if key in seen:
                continue
            seen.add(key)
            used = compile_launch(launch, capability)
            assert used.shared <= DEVICES[capability].shared_memory, key
            # ptxas for sm_100 keeps a few bytes of stack in kernels far below the register limit;
            # a spill is stack at the limit.
            if used.stack and used.registers >= 254:
                spilling.append((key, used.registers, used.stack))
    assert not spilling
