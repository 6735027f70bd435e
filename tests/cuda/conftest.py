"""The CUDA kernels on a CPU: compiled with the emulator in tests/cuda/emulator."""

import ctypes
import importlib.util
import sysconfig

import pytest
from emulator.build import ROOT, build, compiler

from lora_kernels.runtime import cpu_extension as native


@pytest.fixture(scope="session")
def emulated_library():
    """The path of the extension in which CUDA kernels are emulated; built where that is needed."""
    if compiler() is None:
        pytest.skip("there is no C++ compiler to build the emulated kernels with")
    pybind11 = pytest.importorskip("pybind11")
    csrc = ROOT / "csrc"
    sources = [
        *sorted(csrc.glob("*.cpp")),
        *sorted((csrc / "cpu").glob("*.cpp")),
        *sorted((csrc / "cuda").glob("*.cu")),
    ]
    flags = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    return build(f"_native{sysconfig.get_config_var('EXT_SUFFIX')}", sources, flags)


@pytest.fixture(scope="session")
def emulated_module(emulated_library):
    # Not the extension's own name: where that was imported before, pybind11 would return it again.
    spec = importlib.util.spec_from_file_location("emulated._native", emulated_library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def emulated(emulated_module, monkeypatch):
    """The extension is one whose CUDA kernels are emulated and take tensors of the CPU."""
    monkeypatch.setattr(native, "_found", lambda: (emulated_module, "emulated in a test"))
    return emulated_module


@pytest.fixture
def emulated_device(emulated_library):
    """``emulated_device(multiprocessors=4, capability=90)`` chooses another device for a test."""
    configure = ctypes.CDLL(str(emulated_library)).lora_emulator_configure

    def choose(multiprocessors: int = 0, capability: int = 0) -> None:
        configure(multiprocessors, capability)

    yield choose
    choose()
