"""A pytest plugin for PEFT's own tests: with ``--accelerate``, every LoRA layer is ours once PEFT
has made it."""

import functools

import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner

import lora_kernels

fast_layers = 0  # of the models that the running test made


def pytest_addoption(parser):
    parser.addoption("--accelerate", action="store_true", help="accelerate what tests make")


def pytest_configure(config):
    torch.set_num_threads(1)
    if config.getoption("--accelerate"):
        BaseTuner.inject_adapter = accelerating(BaseTuner.inject_adapter)


def accelerating(inject_adapter):
    """``get_peft_model``, ``PeftModel``, ``add_adapter`` and all others make their layers there."""

    @functools.wraps(inject_adapter)
    def inject_and_accelerate(tuner, model, *args, **kwargs):
        global fast_layers
        inject_adapter(tuner, model, *args, **kwargs)
        if any(isinstance(module, LoraLayer) for module in model.modules()):
            fast_layers += len(lora_kernels.accelerate(model).fast)

    return inject_and_accelerate


@pytest.fixture(autouse=True)
def same_seed():
    """The same initial values and data in both runs."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def count_of_fast_layers(record_property):
    global fast_layers
    fast_layers = 0
    yield
    record_property("fast layers", fast_layers)
