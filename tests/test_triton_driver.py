"""Why our Triton kernels cannot run on a device, down to a driver that does not start."""

import builtins
import types
from contextlib import nullcontext

import pytest
import torch

from lora_kernels.ops.narrow.triton.driver import missing
from lora_kernels.runtime import dispatch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nothing_remembered():
    def forget():
        missing.cache_clear()
        dispatch._triton_unavailable.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of compute capability 9.0 with a Triton; returns what decides about both."""
    module = types.ModuleType("triton")
    machine = types.SimpleNamespace(capability=(9, 0), start=lambda: None, triton=module)
    machine.triton.__version__ = "3.6.0"
    active = types.SimpleNamespace(get_current_target=lambda: machine.start())
    machine.triton.runtime = types.SimpleNamespace(driver=types.SimpleNamespace(active=active))
    real_import = builtins.__import__

    def import_module(name, *args, **kwargs):
        if name != "triton":
            return real_import(name, *args, **kwargs)
        if machine.triton is None:
            raise ImportError
        return machine.triton

    monkeypatch.setattr(builtins, "__import__", import_module)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: machine.capability)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return machine


def test_a_gpu_that_can(gpu):
    started = []
    gpu.start = lambda: started.append(1)
    assert missing(GPU) is None and missing(GPU) is None
    assert len(started) == 1, "the driver is asked once per device"


def test_reasons_of_a_gpu(gpu, monkeypatch):
    def reason(**changes):
        missing.cache_clear()
        dispatch._triton_unavailable.cache_clear()
        before = dict(vars(gpu))
        vars(gpu).update(changes)
        answer = missing(GPU)
        vars(gpu).update(before)
        return answer

    def raises(error):
        def start():
            raise error

        return start

    assert reason() is None
    assert reason(triton=None) == "the package triton is not installed"
    old = types.ModuleType("triton")
    old.__version__ = "3.5.1"
    assert reason(triton=old) == "triton 3.6 or newer is needed, 3.5.1 is installed"
    assert "compute capability 8.0 or newer" in reason(capability=(7, 5))
    no_compiler = RuntimeError("Failed to find C compiler.\nPlease specify one by CC")
    assert reason(start=raises(no_compiler)) == (
        "Triton's driver does not start: Failed to find C compiler."
    )
    assert reason(start=raises(OSError())) == "Triton's driver does not start: OSError"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason() == "torch finds no CUDA device"


def test_reasons_of_other_devices(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in missing(CPU)
    assert "'mps'" in missing(torch.device("mps"))
    missing.cache_clear()
    dispatch._triton_unavailable.cache_clear()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "triton_missing", lambda: None)
    assert missing(CPU) is None
