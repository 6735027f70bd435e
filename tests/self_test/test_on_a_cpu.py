"""The self-test for real, on this CPU's compiled kernels."""

import json
import os
import subprocess
import sys

import pytest

from lora_kernels.runtime import cpu_extension


def run(cache, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "lora_kernels", *arguments],
        env=os.environ | {"LORA_KERNELS_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(cpu_extension.missing() is not None, reason="the extension is not built")
def test_compiled_kernels_are_proven_once(tmp_path):
    command = ("self-test", "--dtypes", "float32", "--seconds", "300")
    first = run(tmp_path, *command)
    assert first.returncode == 0, first.stderr
    assert "linear/native          proven    7 checks passed" in first.stdout
    assert "routed/native          proven    6 checks passed" in first.stdout
    assert "testing kernels" in first.stderr
    (file,) = tmp_path.glob("*.json")
    (families,) = json.loads(file.read_text())["verdicts"].values()
    assert {families[name]["state"] for name in ("linear/native", "routed/native")} == {"proven"}
    again = run(tmp_path, *command)
    assert "proven    7 checks passed" in again.stdout and not again.stderr
    assert "linear/native: proven" in run(tmp_path, "doctor").stdout


def test_a_dtype_that_is_none_is_refused(tmp_path):
    done = run(tmp_path, "self-test", "--dtypes", "float32,int8")
    assert done.returncode == 2 and "got int8" in done.stderr
