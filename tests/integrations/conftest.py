"""PEFT's files of the adapters in routed_models.py, written once per module of tests."""

import pytest
from routed_models import CONFIGS, llama, peft_alone


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapters")
    for name in CONFIGS:
        peft_alone(name, llama()).save_pretrained(directory / name)
    return directory
