"""Importing the package: what it needs, what it costs, what it leaves alone."""

import subprocess
import sys

import pytest


def run(program: str) -> str:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_torch_is_enough():
    """A forward and a backward with every optional package refused."""
    program = """
import sys
OPTIONAL = "triton peft transformers numpy rich matplotlib pybind11 safetensors".split()
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in OPTIONAL or name == "lora_kernels._native":
            raise ModuleNotFoundError(f"{name} is absent")
sys.meta_path.insert(0, Refuse())
import torch, lora_kernels
layer = lora_kernels.LoRALinear.from_linear(torch.nn.Linear(8, 6), rank=2, alpha=4)
layer(torch.randn(3, 8)).sum().backward()
print(layer.lora_B.weight.grad.abs().sum() > 0)
try:
    lora_kernels.accelerate(layer)
except ImportError as error:
    print(error)
"""
    first, second = run(program).splitlines()
    assert "True" in first
    assert "peft" in second


def test_import_loads_nothing_optional():
    program = """
import sys, torch
before = set(sys.modules)
import lora_kernels
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"triton", "peft", "transformers", "accelerate", "rich", "matplotlib", "numpy"}))
print(any(name in sys.modules for name in ("lora_kernels.measuring", "lora_kernels.testing")))
"""
    assert run(program).split() == ["[]", "False"]


def test_import_is_quick():
    """Less than half a second on top of torch; the quickest of three, the machine may be busy."""
    program = (
        "import torch, time; start = time.perf_counter(); import lora_kernels; "
        "print(time.perf_counter() - start)"
    )
    assert min(float(run(program)) for _ in range(3)) < 0.5


def test_unknown_name_is_an_attribute_error():
    import lora_kernels

    with pytest.raises(AttributeError, match=r"lora_kernels.*no attribute 'acelerate'"):
        lora_kernels.acelerate  # noqa: B018
