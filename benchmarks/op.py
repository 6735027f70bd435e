"""One `lora_linear` call, forward and backward, at one shape."""

import functools

import torch
from torch import Tensor

from benchmarks.ceilings import ceilings
from benchmarks.memory import PeakMemory, SavedStorage, describe, peak_of, saved_for_backward
from benchmarks.op_providers import PROVIDERS, around
from benchmarks.preparing import prepare_each
from lora_kernels.measuring import timing
from lora_kernels.measuring.linear_call import Call, LinearCase, parts_of, problems_of
from lora_kernels.measuring.timed_calls import TimedCalls
from lora_kernels.ops.linear.reference import lora_linear_reference
from lora_kernels.testing import (
    LoRAProblem,
    assert_within_policy,
    oracle_results,
    run_forward_backward,
)

Case = LinearCase

# On a CPU: the three kinds of linear in SmolLM2-135M, 2 x 256 tokens. On a GPU: an 8B Llama's.
SHAPES = {
    "cpu": ((512, 576, 576), (512, 576, 1536), (512, 1536, 576)),
    "cuda": ((8192, 4096, 4096), (8192, 4096, 14336), (8192, 14336, 4096), (2048, 4096, 4096)),
}


def default_cases(device: str) -> list[LinearCase]:
    return [LinearCase(*shape, device=device) for shape in SHAPES[torch.device(device).type]]


def default_providers(case: LinearCase) -> list[str]:
    # In fp32 peft-base-dtype would be the same measurement as peft.
    base_dtype = ["peft-base-dtype"] if case.dtype != "fp32" else []
    return ["frozen", "naive", "peft", *base_dtype, "ours"]


class Op(TimedCalls):
    """One provider's calls on all sets of inputs."""

    def __init__(self, case: LinearCase, name: str, problems: list[LoRAProblem]) -> None:
        self._calls, self._problems = [PROVIDERS[name](each) for each in problems], problems
        device = torch.device(case.device)
        self._in_place = functools.partial(around, name, device)
        parts = parts_of(self._calls, problems)
        super().__init__(device, parts, len(problems), "both", self._in_place)

    def saved(self) -> list[SavedStorage]:
        call, problem = self._calls[0], self._problems[0]
        # x is counted, unlike the weights: it is an activation, kept alive for backward.
        own = [problem.weight, *(leaf for leaf in call.leaves if leaf is not problem.x)]
        with self._in_place():
            return saved_for_backward(call.forward, own, functools.partial(self._name, problem))

    def peak(self) -> PeakMemory:
        """Of one more forward and backward, after :meth:`warm_up`."""
        call, problem = self._calls[0], self._problems[0]

        def step() -> None:
            torch.autograd.grad(call.forward(), call.leaves, problem.dy)

        with self._in_place():
            return peak_of(step, self.device)

    @staticmethod
    def _name(problem: LoRAProblem, saved: Tensor) -> str:
        if saved.untyped_storage().data_ptr() == problem.x.untyped_storage().data_ptr():
            return "x"
        if saved.dim() == 0:
            return "seed" if saved.dtype is torch.int64 else "scalar"
        if saved.dtype in (torch.bool, torch.uint8):
            return "mask"
        rank_sized = saved.dim() == 2 and saved.shape[1] == problem.lora_a.shape[0]
        return f"h {describe(saved)}" if rank_sized else describe(saved)


def hold_to_policy(name: str, problem: LoRAProblem, references: dict) -> None:
    """Raises an AssertionError where a result breaks the package's error policy.

    Without dropout, whose masks differ between providers. Against fp64 on the provider's own
    adapters; allowed is what the policy allows beside the plain formula in x's dtype.
    references: both by the adapters' dtype, kept between the providers of a case.
    """
    problem = problem.with_(dropout_p=0.0, seed=None)
    call = PROVIDERS[name](problem)
    if len(call.leaves) == 1:  # frozen has no adapter to get wrong
        return
    lora_a, lora_b = (leaf.detach() for leaf in call.leaves[1:])
    if lora_a.dtype not in references:
        own = problem.with_(lora_a=lora_a, lora_b=lora_b)
        eager = run_forward_backward(lora_linear_reference, own)
        references[lora_a.dtype] = eager, oracle_results(own)
    eager, oracle = references[lora_a.dtype]
    with around(name, problem.x.device):
        ours = results_of(call, problem.dy)
    for what, exact in oracle.items():
        assert_within_policy(what, ours[what], eager[what], exact, problem.x.dtype)


def results_of(call: Call, dy: Tensor) -> dict[str, Tensor]:
    y = call.forward()
    gradients = torch.autograd.grad(y, call.leaves, dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(("x", "lora_a", "lora_b"), gradients, strict=True))}


def prepare(case: LinearCase, names: list[str]) -> tuple[dict[str, Op], dict[str, str]]:
    problems, references = problems_of(case), {}

    def make(name: str) -> Op:
        hold_to_policy(name, problems[0], references)
        op = Op(case, name, problems)
        op.warm_up()
        return op

    return prepare_each(names, make)


def limits(case: LinearCase) -> dict[str, float]:
    return ceilings(torch.device(case.device), case.torch_dtype)


def floor(case: LinearCase, measured: dict[str, float]) -> timing.Sample:
    """The time nothing can beat: the frozen GEMMs at the measured ceilings, and the passes over
    x (forward), dy and x (backward) that the adapter's products need."""
    size = case.torch_dtype.itemsize
    x, weight, y = (size * count for count in (case.m * case.k, case.n * case.k, case.m * case.n))
    bytes_per_second = measured["bytes_per_second"]
    gemm = max(
        2 * case.m * case.k * case.n / measured["flops_per_second"],
        (x + weight + y) / bytes_per_second,
    )
    sample = {
        "forward": gemm + x / bytes_per_second,
        "backward": gemm + (x + y) / bytes_per_second,
    }
    return sample | {"both": sample["forward"] + sample["backward"]}
