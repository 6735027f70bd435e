"""A check's ``target``, made ready; what reports the checks is the plug-in gpu_report."""

import functools

import pytest
import torch

from lora_kernels.ops.linear.triton import tiles
from lora_kernels.runtime import cpu_extension, dispatch


def pytest_addoption(pluginmanager):
    pluginmanager.import_plugin("gpu_report")


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: runs on a CUDA device")


@pytest.fixture
def target(request):
    target = request.param
    if target.backend == "native" and (reason := missing_native(target.device)):
        pytest.skip(reason)
    with tiles.use_cells({"*": {"strategy": target.strategy}}):
        yield target
    if target.device == "cuda":
        torch.cuda.synchronize()  # what goes wrong until here is this check's
        torch.cuda.empty_cache()


@functools.cache
def missing_native(device: str) -> str | None:
    if device == "cpu":
        return cpu_extension.missing()
    return dispatch.unavailable("native", torch.device(device, 0), torch.bfloat16)
