"""``@on(...)`` names the targets of a check: a GPU's backends, and a CPU, which proves the body."""

import os

import pytest
import torch
from linear_target import Target

# Read when the first CUDA context is made: poisoned memory switches deterministic algorithms on.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# On a GPU in order of worth: hybrid shares most kernels with fused, which has compiled them.
TARGETS = {
    "cpu": Target("cpu", "composed"),
    "cpu-native": Target("cpu", "native"),
    "composed": Target("cuda", "composed"),
    "fused": Target("cuda", "triton", "fused"),
    "hybrid": Target("cuda", "triton", "hybrid"),
    "native": Target("cuda", "native"),
}
# What only a GPU can do: `-m cuda` chooses it, `-m "not cuda"` is the rest.
NEEDS_GPU = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def on(*names: str) -> pytest.MarkDecorator:
    """Parametrises a test's ``target``; its name comes first in the test's id if this is lowest."""
    params = [
        pytest.param(
            TARGETS[name], id=name, marks=NEEDS_GPU if TARGETS[name].device == "cuda" else ()
        )
        for name in names
    ]
    return pytest.mark.parametrize("target", params, indirect=True)
