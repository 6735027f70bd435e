"""The operations' typical error over many draws is at most eager's: no slack, and no luck."""

import pytest
import torch
from routed_results import routed_eager, routed_oracle, run_routed

from lora_kernels import lora_linear
from lora_kernels.ops.linear.reference import lora_linear_reference
from lora_kernels.runtime import cpu_extension as native
from lora_kernels.testing import (
    LoRAProblem,
    assert_as_accurate,
    oracle_results,
    run_forward_backward,
)
from lora_kernels.testing.routed_inputs import RoutedProblem

BACKENDS = ["composed", *([] if native.missing() else ["native"])]
pytestmark = [
    pytest.mark.parametrize("backend", BACKENDS),
    pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str),
    pytest.mark.parametrize("dropout_p", [0.0, 0.25]),
]


@pytest.mark.parametrize("shape", [(80, 72, 88, 8), (45, 101, 67, 3)], ids=str)  # M, K, N, R
def test_lora_linear(backend, dtype, dropout_p, shape):
    rows, *sizes = shape
    needs = ("x", "lora_a", "lora_b")

    def ours(**inputs):
        return lora_linear(**inputs, backend=backend)

    def draw(number):
        problem = LoRAProblem.random(
            (rows,), *sizes, dtype=dtype, dropout_p=dropout_p, generator_seed=number
        )
        return (
            run_forward_backward(ours, problem, needs),
            run_forward_backward(lora_linear_reference, problem, needs),
            oracle_results(problem, needs),
        )

    assert_as_accurate(draw)


def test_routed_lora(backend, dtype, dropout_p):
    def draw(number):
        ids = torch.arange(60) % 4 - 1
        problem = RoutedProblem.random(
            ids, (4, 16, 7), 45, 52, dtype=dtype, dropout=dropout_p, generator_seed=number
        )
        ours = run_routed(problem, backend)
        del ours["bias"]  # a sum that is torch's own
        return ours, routed_eager(problem), routed_oracle(problem)

    assert_as_accurate(draw)
