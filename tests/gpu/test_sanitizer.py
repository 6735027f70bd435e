"""compute-sanitizer watches small calls of each kernel."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sanitized_calls import CALLS
from targets import NEEDS_GPU

from lora_kernels.runtime import dispatch

TESTS = Path(__file__).resolve().parents[1]
SECONDS = 26  # less than the check's: what it started is ended with it
WATCHED = [("memcheck", name) for name in CALLS] + [
    (tool, "native") for tool in ("racecheck", "synccheck")
]


@pytest.mark.parametrize(
    ("tool", "name"), [pytest.param(*each, marks=NEEDS_GPU) for each in WATCHED]
)
def test_nothing_is_found(tool, name):
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).is_file():
        pytest.skip("compute-sanitizer is not installed")
    device = torch.device("cuda", 0)
    if name == "native" and (reason := dispatch.unavailable("native", device, torch.bfloat16)):
        pytest.skip(reason)
    watch(sanitizer, tool, name)


def watch(sanitizer: str, tool: str, name: str) -> None:
    command = [sanitizer, f"--tool={tool}", "--error-exitcode=97", sys.executable]
    command += [str(TESTS / "gpu" / "sanitized_calls.py"), name]
    # Every tensor its own allocation: past its end is past the allocation's.
    paths = [str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    output = done.stdout + done.stderr
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not support this device")
    # racecheck has a summary of its own, "0 hazards displayed (0 errors, 0 warnings)".
    clean = "ERROR SUMMARY: 0 errors" in output or "(0 errors, 0 warnings)" in output
    assert not done.returncode and clean, " | ".join(output.strip().splitlines()[:12])


@pytest.mark.parametrize(
    ("says", "status", "verdict"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, "clean"),
        ("RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, "clean"),
        ("========= ERROR SUMMARY: 2 errors", 97, "found"),
        ("RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", 0, "found"),
        ("========= ERROR SUMMARY: 0 errors", 1, "found"),
        ("", 0, "found"),
        ("Error: Device not supported", 1, "skipped"),
    ],
)
def test_what_the_tool_says_is_understood(tmp_path, says, status, verdict):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '{says}'\nexit {status}\n")
    tool.chmod(0o755)
    if verdict == "clean":
        watch(str(tool), "memcheck", "native")
        return
    with pytest.raises(AssertionError if verdict == "found" else pytest.skip.Exception):
        watch(str(tool), "memcheck", "native")
