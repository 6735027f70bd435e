"""A table may give the forward to one backend and the backward to another."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import lora_linear
from lora_kernels.ops import linear
from lora_kernels.ops.linear import choice as measured
from lora_kernels.ops.linear.plan import make_plan, module_of
from lora_kernels.ops.linear.reference import lora_linear_reference
from lora_kernels.runtime.dispatch import Choice
from lora_kernels.testing import (
    LoRAProblem,
    assert_within_policy,
    oracle_results,
    run_forward_backward,
)


@pytest.mark.parametrize("way", ["by the plan", "through the op"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("forward", ["composed", "triton"])
def test_what_one_backend_saves_the_other_reads(
    forward, dropout_p, way, monkeypatch, poisoned_memory, plans_forgotten
):
    backends = {"forward": forward, "backward": "triton" if forward == "composed" else "composed"}
    asked = []

    def choose(backend, direction, activation, sizes):
        asked.append(direction)
        return Choice(backends[direction], "")

    def mixed_plan(backend, x, base, factors, dropout_p):
        plan = make_plan(backend, x, base, factors, dropout_p)
        return replace(plan, backward=module_of(backends["backward"], base, x))

    monkeypatch.setattr(measured, "choose", choose)
    monkeypatch.setattr(linear, "make_plan", mixed_plan)
    problem = LoRAProblem.random((37,), 40, 56, 5, with_output_scale=True, dropout_p=dropout_p)
    with nullcontext() if way == "by the plan" else FlopCounterMode(display=False):
        ours = run_forward_backward(lora_linear, problem)
    assert asked == (["forward"] if way == "by the plan" else ["forward", "backward"])
    eager = run_forward_backward(lora_linear_reference, problem)
    oracle = oracle_results(problem)
    assert ours.keys() == oracle.keys()
    for name, result in ours.items():
        assert_within_policy(name, result, eager[name], oracle[name], torch.float32)
