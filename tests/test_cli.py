"""The command line, run as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kernels.__main__ import doctor, main

ROOT = Path(__file__).resolve().parents[1]


def test_doctor_names_versions_devices_backends_and_choices():
    import torch

    text = "\n".join(doctor())
    assert torch.__version__ in text and sys.version.split()[0] in text
    for word in ("triton", "peft", "transformers", "extension", "LORA_KERNELS_BACKEND", "cpu"):
        assert word in text
    for backend in ("reference", "composed", "triton", "native"):
        assert backend in text
    assert "M 8192, K 4096, N 4096" in text


def test_doctor_as_a_command_shows_the_override():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LORA_KERNELS_BACKEND": "reference"}
    words = [sys.executable, "-m", "lora_kernels", "doctor"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "LORA_KERNELS_BACKEND  reference" in done.stdout
    assert "      reference: " in done.stdout  # and it is what the calls take


def test_doctor_runs_without_the_optional_packages(monkeypatch):
    import importlib.metadata

    found = importlib.metadata.version

    def version(name):
        if name == "torch":
            return found(name)
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    for package in ("peft", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    text = "\n".join(doctor())
    assert "peft          not installed" in text and "triton        not installed" in text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["bench"], "python -m benchmarks\n"),
        (["bench", "step", "--reps=3"], "python -m benchmarks step"),
    ],
)
def test_bench_names_the_command_that_took_its_place(argv, said, capsys):
    assert main(argv) == 2
    assert said in capsys.readouterr().err


def test_importing_the_package_imports_nothing_that_measures():
    code = "import sys, lora_kernels; print([m for m in sys.modules if 'measuring' in m])"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
