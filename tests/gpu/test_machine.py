"""The machine, its ceilings, and the extension built on it: before the checks, with nothing beside.

What is found is in the report, under ``found``.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from targets import NEEDS_GPU

ROOT = Path(__file__).resolve().parents[2]
SELF_TEST_SECONDS = 30.0
BUILD_SECONDS = 52  # less than the check's, so that it can say what to do

pytestmark = NEEDS_GPU


def test_device(record_property):
    properties = torch.cuda.get_device_properties(0)
    for name, value in {
        "cuda": torch.version.cuda,
        "nvcc": last_line("nvcc", "--version"),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cache_bytes": properties.L2_cache_size,
        "shared_memory_bytes": properties.shared_memory_per_block_optin,
    }.items():
        record_property(name, value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_ceilings(dtype, record_property):
    from benchmarks.ceilings import ceilings  # beside the package, as all that measures it

    for name, value in ceilings(torch.device("cuda"), dtype).items():
        assert value > 0
        record_property(name, value)


def test_extension_is_built(record_property):
    """`setup.py build_ext --inplace` with this Python; nothing is downloaded."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    try:
        built = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=BUILD_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        pytest.fail(f"not built within {BUILD_SECONDS} s: run {' '.join(command)} first")
    # This process may have looked for the extension before it was built.
    code = (
        "import torch; from lora_kernels.runtime import cuda_extension as n; print(n.status());"
        "print('missing:', n.missing(torch.device('cuda', 0)))"
    )
    asked = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    status, _, reason = asked.stdout.strip().rpartition("\nmissing: ")
    record_property("status", status)
    said = f"{reason}\n{status}\n{built.stdout}\n{asked.stderr}"
    assert not built.returncode and not asked.returncode and reason == "None", said


def test_kernels_prove_themselves(record_property):
    """As `accelerate` has them do once: what does not pass here is not taken there."""
    from lora_kernels import self_test
    from lora_kernels.runtime.verdicts import BROKEN, UNPROVEN

    found = self_test.ensure(again=True, seconds=SELF_TEST_SECONDS, say=lambda line: None)
    said = {}
    for kind, families in found.items():
        for name, verdict in families.items():
            said[f"{name} on {kind}"] = f"{verdict.state}: {verdict.detail}"
            record_property(f"{name} on {kind}", f"{verdict.state} in {verdict.seconds:.1f} s")
    wrong = {name: each for name, each in said.items() if each.startswith((BROKEN, UNPROVEN))}
    assert said and not wrong, wrong


def last_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.strip().splitlines() or [None])[-1]
