"""What `auto` takes on a CPU: what was measured faster there, by instruction set and dtype."""

import pytest
import torch

from lora_kernels.runtime import cpu_extension as native
from lora_kernels.runtime import dispatch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("level", range(len(native.LEVELS)), ids=native.LEVELS)
def test_auto_takes_the_compiled_kernels_where_they_were_measured_faster(level, dtype, monkeypatch):
    monkeypatch.setattr(native, "missing", lambda: None)
    monkeypatch.setattr(native, "level", lambda: level)
    least = {torch.float32: 1, torch.float16: 1, torch.bfloat16: 3, torch.float64: 4}[dtype]
    choice = dispatch._on_a_cpu.__wrapped__(dtype)
    assert choice.backend == ("native" if level >= least else "composed")
    assert native.LEVELS[level] in choice.reason or dtype == torch.float64


def test_without_the_extension_the_reason_is_its_own(monkeypatch):
    monkeypatch.setattr(native, "missing", lambda: "it was not built: no compiler")
    assert dispatch._on_a_cpu.__wrapped__(torch.float32) == (
        "composed",
        "it was not built: no compiler",
    )
