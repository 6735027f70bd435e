"""A table may give the forward to one backend and the backward to another."""

import pytest
import torch

from lora_kernels import lora_linear
from lora_kernels.ops.linear import tuned as measured
from lora_kernels.ops.linear.reference import lora_linear_reference
from lora_kernels.runtime.dispatch import Choice
from lora_kernels.testing import (
    LoRAProblem,
    assert_within_policy,
    oracle_results,
    run_forward_backward,
)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("forward", ["composed", "triton"])
def test_what_one_backend_saves_the_other_reads(forward, dropout_p, monkeypatch, poisoned_memory):
    backends = {"forward": forward, "backward": "triton" if forward == "composed" else "composed"}
    monkeypatch.setattr(
        measured, "choose", lambda backend, direction, *args: Choice(backends[direction], "")
    )
    problem = LoRAProblem.random((37,), 40, 56, 5, with_output_scale=True, dropout_p=dropout_p)
    ours = run_forward_backward(lora_linear, problem)
    eager = run_forward_backward(lora_linear_reference, problem)
    oracle = oracle_results(problem)
    assert ours.keys() == oracle.keys()
    for name, result in ours.items():
        assert_within_policy(name, result, eager[name], oracle[name], torch.float32)
