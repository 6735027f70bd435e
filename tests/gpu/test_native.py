"""What the compiled extension's CUDA kernels must get right on a GPU, beside the other checks.

Here is what they do not reach: the sizes of decoding, and every tile of the GEMM with a tail.
Bodies that ask for a backend by name run on a CPU over ``composed`` as well.
"""

import itertools

import pytest
import torch
from gaps import vendor_gap
from gemm_tail import GEMM, check_gemm_tail
from linear_target import Target, amid, check_policy, poisoned_memory
from routed_results import call_routed, routed_eager, routed_oracle
from targets import on
from torch import Tensor

from lora_kernels import lora_linear
from lora_kernels.ops.routed import Routing, routed_lora
from lora_kernels.runtime import cuda_extension
from lora_kernels.testing import (
    assert_draws_within_policy,
    assert_within_policy,
    oracle_results,
    run_forward_backward,
)
from lora_kernels.testing.policy import Draw
from lora_kernels.testing.routed_inputs import RoutedProblem, some_ids

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOKENS = (1, 2, 7, 8, 9, 16, 33, 64)
# K, N, R, dtype of the adapters (None: x's)
DECODE = {
    "aligned": (512, 264, 16, None),
    "odd": (101, 1003, 3, None),
    "rank 64": (1024, 520, 64, None),
    "rank 100, fp32 adapters": (320, 136, 100, FP32),
    "fp32 adapters, odd": (255, 523, 5, FP32),
    "large": (4096, 4096, 16, None),
}


@pytest.mark.parametrize("label", [label for label in DECODE if label != "large"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@on("cpu", "native")
def test_decode(target, dtype, label):
    check_decode(target, dtype, label)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@on("native")
def test_large_decode(target, dtype):
    check_decode(target, dtype, "large")


def check_decode(target: Target, dtype: torch.dtype, label: str) -> None:
    """Forward without gradients: the decode kernel, with and without bias; the same bits twice."""
    k, n, rank, adapter_dtype = DECODE[label]
    for tokens, bias in itertools.product(TOKENS, (True, False)):
        problem = target.problem(
            (tokens,), k, n, rank, dtype=dtype, adapter_dtype=adapter_dtype, with_bias=bias,
            generator_seed=tokens,
        )  # fmt: skip
        first = check_policy(target, problem, needs=())["y"]
        again = run_forward_backward(target.call, problem, needs=())["y"]
        assert torch.equal(again, first), f"{tokens} tokens: other bits in the second run"


@on("cpu", "native")
def test_decode_and_backward(target):
    """h of the decode kernel feeds the backward."""
    for tokens in (1, 9, 64):
        for adapter_dtype in (None, FP32):
            problem = target.problem((tokens,), 264, 136, 24, dtype=BF16,
                                     adapter_dtype=adapter_dtype)  # fmt: skip
            check_policy(target, problem)


@on("native")
def test_decode_strides(target):
    check_decode_strides(target)


@on("cpu", "cpu-native")
def test_decode_strides_beside_both_gemms(target, both_gemms):
    check_decode_strides(target)


def check_decode_strides(target: Target) -> None:
    """x as a slice, transposed and expanded; factors transposed; a scaling on the device."""
    m, k, n = 12, 136, 264
    problem = target.problem((m,), k, n, 16, dtype=BF16)
    x = problem.x
    for changes in (
        {"x": x.t().contiguous().t()},
        {"x": amid(x, vendor_gap(BF16, x.device))},
        {"x": x[:1].expand(m, k)},
        {"x": x.view(2, 6, k)},
        {"weight": problem.weight.t().contiguous().t()},
        {"lora_a": problem.lora_a.t().contiguous().t()},
        {"lora_b": problem.lora_b.t().contiguous().t()},
        {"scaling": problem.scaling.to(target.device, FP32)},
    ):
        if "x" in changes and changes["x"].ndim == 3:
            changes["dy"] = problem.dy.view(2, 6, n)
        check_policy(target, problem.with_(**changes), needs=())


@on("native")
def test_decode_graph(target):
    """Captured once, replayed over other values in the same memory."""
    static = target.problem((8,), 1024, 520, 16, dtype=BF16)
    names = ("x", "weight", "lora_a", "lora_b", "bias")

    def call() -> Tensor:
        with torch.no_grad():
            return target.call(scaling=0.7, **{name: getattr(static, name) for name in names})

    captured, y = _capture(call)
    for seed in (1, 2):
        other = target.problem((8,), 1024, 520, 16, dtype=BF16, generator_seed=seed)
        for name in names:
            getattr(static, name).copy_(getattr(other, name))
        captured.replay()
        torch.cuda.synchronize()
        eager = run_forward_backward(_reference, other, needs=())["y"]
        oracle = oracle_results(other, needs=())["y"]
        assert_within_policy("y", y, eager, oracle, BF16)


def _reference(**inputs) -> Tensor:
    return lora_linear(**inputs, backend="reference")


def _capture(call) -> tuple["torch.cuda.CUDAGraph", Tensor]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


# ---- many adapters

# slices: out_features of each
ROUTED = {
    "one slice": ((264,), (1, 3, 8, 24, 64, 160)),
    "odd": ((67, 5), (1, 3, 8, 24, 64, 160)),
    "q k v": ((512, 136, 136), (16, 8, 64, 33)),
    "eight slices": ((24, 16, 40, 8, 24, 16, 40, 8), (4, 16, 3)),
    "large": ((4096,), (16, 64, 32, 8)),
}


ADAPTERS = pytest.mark.parametrize(
    "adapter_dtype", [None, FP32], ids=["half adapters", "fp32 adapters"]
)


@pytest.mark.parametrize("label", [label for label in ROUTED if label not in ("large", "q k v")])
@ADAPTERS
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@on("cpu", "native")
def test_routed_decode(target, dtype, adapter_dtype, label):
    check_routed_decode(target, dtype, adapter_dtype, label)


@pytest.mark.parametrize("label", ["large", "q k v"])
@ADAPTERS
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@on("native")
def test_large_routed_decode(target, dtype, adapter_dtype, label):
    check_routed_decode(target, dtype, adapter_dtype, label)


def check_routed_decode(
    target: Target, dtype: torch.dtype, adapter_dtype: torch.dtype | None, label: str
) -> None:
    """Without gradients: shrink and expand in one launch, over base, alone, and into ``out``."""
    widths, ranks = ROUTED[label]
    columns = {"odd": 101, "large": 4096}.get(label, 520)
    if len(widths) > 1:  # another rank in each slice, and none in some
        ranks = [
            tuple((rank + 5 * s) * ((i + s) % 4 != 1) for s in range(len(widths)))
            for i, rank in enumerate(ranks)
        ]
    modes = ({}, {"with_weight": False}, {"with_weight": False, "with_out": True})
    for tokens, mode in itertools.product((1, 5, 32, 64, 200, 256), modes):
        problem = RoutedProblem.random(
            some_ids(tokens, len(ranks)), ranks, columns, widths, dtype=dtype,
            adapter_dtype=adapter_dtype, generator_seed=tokens, **mode,
        )  # fmt: skip
        y = _routed_forward(problem, target)
        if problem.weight is None:
            none = problem.ids[:, 0] < 0
            before = torch.zeros_like(y) if problem.out is None else problem.out
            assert torch.equal(y[none], before[none]), "a row without an adapter has changed"


def _routed_forward(problem: RoutedProblem, target: Target) -> Tensor:
    """y without gradients, on the CPU, after holding it against fp64."""

    def draw(number: int) -> Draw:
        drawn = problem.redrawn(number)
        there = drawn.to(target.device)
        bank = there.bank().requires_grad_(False)
        out = None if there.out is None else there.out.clone()
        with torch.no_grad(), poisoned_memory():
            y = call_routed(there, bank, target.backend, out=out).cpu()
        return {"y": y}, routed_eager(drawn), routed_oracle(drawn)

    return assert_draws_within_policy(draw, problem.x.dtype)["y"]


@on("native")
def test_routed_graph(target):
    """One graph of an inference, three fillings of its routing."""
    problem = RoutedProblem.random(
        some_ids(48, 6), (1, 3, 8, 24, 64, 160), 520, (264, 72), dtype=BF16, with_weight=False
    ).to("cuda")
    bank = problem.bank().requires_grad_(False)
    bank.reserve()
    routing = Routing.empty(48, bank).set_tokens_(problem.ids[:, 0])
    out = torch.empty_like(problem.dy)

    def call() -> Tensor:
        with torch.no_grad():
            return routed_lora(problem.x, bank, routing, out.zero_(), backend=target.backend)

    captured, y = _capture(call)
    for seed in (0, 1, 2):
        ids = some_ids(48 - 3 * seed, 6, seed=seed)[:, 0]
        routing.set_tokens_(ids.cuda())
        captured.replay()
        replayed = y.clone()
        fresh = Routing.empty(48, bank).set_tokens_(ids)
        with torch.no_grad():
            expected = routed_lora(problem.x, bank, fresh, backend=target.backend)
        assert torch.equal(replayed, expected), f"filling {seed}"


# ---- the GEMM with a tail


@pytest.mark.parametrize(
    ("transposed", "dropout_p"), [(True, 0.0), (False, 0.0), (False, 0.3)], ids=str
)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("label", GEMM)
@on("native")
def test_gemm_tail(target, label, dtype, transposed, dropout_p):
    if reason := cuda_extension.missing_gemm_tail(torch.device(target.device, 0)):
        pytest.skip(reason)
    check_gemm_tail(label, dtype, transposed, dropout_p, target.device)
