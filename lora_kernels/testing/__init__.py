"""Error policy and input generators, used by the tests and the benchmarks alike."""

from lora_kernels.testing.inputs import LoRAProblem, oracle_results, run_forward_backward
from lora_kernels.testing.policy import assert_within_policy, error_bound

__all__ = [
    "LoRAProblem",
    "assert_within_policy",
    "error_bound",
    "oracle_results",
    "run_forward_backward",
]
