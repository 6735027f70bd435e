"""The operations on a GPU; and the bodies of these checks, over `composed`, on a CPU.

`make gpu-check` runs the same list without pytest.
"""

import os

import pytest
import torch

from lora_kernels.runtime import cpu_extension as native
from lora_kernels.runtime import dispatch
from lora_kernels.testing import gpu_checks, gpu_long_checks, native_gpu_checks, routed_gpu_checks

# Read when the first CUDA context is made: poisoned memory switches deterministic algorithms on.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

CHECKS = gpu_checks.quick() + routed_gpu_checks.checks() + gpu_long_checks.long()
NATIVE = native_gpu_checks.checks()
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


def by_name(checks):
    return pytest.mark.parametrize("check", checks, ids=lambda check: check.name)


@needs_gpu
@by_name(CHECKS)
def test_triton(check):
    try:
        check("cuda", "triton")
    except gpu_checks.Skip as reason:
        pytest.skip(str(reason))


@needs_gpu
@by_name(NATIVE + native_gpu_checks.of_native(CHECKS))
def test_native(check):
    if reason := dispatch.unavailable("native", torch.device("cuda", 0), torch.bfloat16):
        pytest.skip(reason)
    try:
        check("cuda", "native")
    except gpu_checks.Skip as reason:
        pytest.skip(str(reason))


@needs_gpu
@by_name([check for check in CHECKS if check.strategy == "fused"])
def test_composed(check):
    try:
        check("cuda", "composed")
    except gpu_checks.Skip as reason:
        pytest.skip(str(reason))


@by_name([check for check in CHECKS + NATIVE if check.on_cpu])
def test_body_on_a_cpu(check):
    try:
        check("cpu", "composed")
    except gpu_checks.Skip as reason:
        pytest.skip(str(reason))


@by_name([
    check for check in CHECKS + NATIVE
    if check.on_cpu and ("strides" in check.name or "nan stays" in check.name)
])  # fmt: skip
@pytest.mark.parametrize("backend", ["composed", *([] if native.missing() else ["native"])])
def test_what_lies_between_the_rows_reaches_nobody(backend, check, both_gemms):
    check("cpu", backend)
