"""``composed`` around the kernels that draw and apply masks, as on a GPU: results against fp64."""

from functools import partial

import pytest
import torch
from routed_results import check_routed

from lora_kernels import lora_linear
from lora_kernels.ops.narrow import masks
from lora_kernels.testing import LoRAProblem, check_linear
from lora_kernels.testing.routed_inputs import RoutedProblem, some_ids


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr(masks, "_has_kernels", lambda device: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(7, 13, 9, 3), (1, 64, 20, 16), (70, 131, 24, 24)], ids=str)
def test_lora_linear(sizes, dtype):
    rows, *others = sizes
    problem = LoRAProblem.random(
        (rows,), *others, dtype=dtype, adapter_dtype=torch.float32, dropout_p=0.3
    )
    check_linear(partial(lora_linear, backend="composed"), problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("per_token", [1, 2])
def test_routed_lora(per_token, dtype):
    problem = RoutedProblem.random(
        some_ids(45, 3, per_token), (3, 8, 5), 13, 21, dtype=dtype, dropout=(0.25, 0.0, 0.5)
    )
    check_routed(problem, "composed")
