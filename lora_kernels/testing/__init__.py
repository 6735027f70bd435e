"""Error policy and input generators, used by the tests and the benchmarks alike."""

from lora_kernels.testing.inputs import (
    LoRAProblem,
    check_linear,
    oracle_results,
    redrawn,
    redrawn_model,
    run_forward_backward,
)
from lora_kernels.testing.policy import (
    assert_as_accurate,
    assert_draws_within_policy,
    assert_within_policy,
    error_bound,
    error_ratio,
)

__all__ = [
    "LoRAProblem",
    "assert_as_accurate",
    "assert_draws_within_policy",
    "assert_within_policy",
    "check_linear",
    "error_bound",
    "error_ratio",
    "oracle_results",
    "redrawn",
    "redrawn_model",
    "run_forward_backward",
]
