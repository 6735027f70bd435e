"""What ``lora_linear`` must get right on a GPU, as plain functions that need no pytest.

`make gpu-check` runs them on a bare machine, ``tests/gpu`` under pytest; the same bodies run on a
CPU over ``composed``, which proves the bodies. Every result is held against fp64 by the error
policy, in poisoned memory.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from gaps import vendor_gap
from torch import Tensor

from lora_kernels import lora_linear
from lora_kernels.ops.linear.triton import tiles
from lora_kernels.runtime.dropout import keep_mask
from lora_kernels.testing.inputs import (
    DIFFERENTIABLE,
    LoRAProblem,
    oracle_results,
    run_forward_backward,
)
from lora_kernels.testing.policy import Draw, assert_draws_within_policy


class Skip(Exception):
    """This check cannot run here; the message says why."""


@dataclass(frozen=True)
class Target:
    """What is checked."""

    device: str = "cuda"
    backend: str = "triton"
    strategy: str = "fused"

    def call(self, **inputs) -> Tensor:
        return lora_linear(**inputs, backend=self.backend)

    def problem(self, *args, **options) -> LoRAProblem:
        return LoRAProblem.random(*args, device=self.device, **options)


@dataclass(frozen=True)
class Check:
    name: str
    run: Callable[[Target], None]
    strategy: str = "fused"
    on_cpu: bool = True  # small enough, and meaningful there
    half: bool = True  # in half precision, which is all that CUDA kernels take

    def __call__(self, device: str, backend: str) -> None:
        if backend == "native" and device == "cuda" and not self.half:
            raise Skip("the CUDA kernels take bfloat16 and float16")
        with tiles.use_cells({"*": {"strategy": self.strategy}}):
            self.run(Target(device, backend, self.strategy))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` and its kin give NaN. On CUDA needs CUBLAS_WORKSPACE_CONFIG (see torch)."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before)


def check_policy(
    target: Target,
    problem: LoRAProblem,
    needs: tuple[str, ...] = DIFFERENTIABLE,
    autocast: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Our result and gradients, after holding each against fp64."""
    definition = functools.partial(lora_linear, backend="reference")

    def draw(number: int) -> Draw:
        drawn = problem.redrawn(number)
        with poisoned_memory():
            ours = run_forward_backward(target.call, drawn, needs, autocast)
        eager = run_forward_backward(definition, drawn.tight(), needs, autocast)
        return ours, eager, oracle_results(drawn, needs)

    return assert_draws_within_policy(draw, autocast or problem.x.dtype)


# ---- shapes and dtypes

# M, K, N, R
SHAPES = {
    "aligned": (200, 136, 264, 16),
    "odd": (57, 101, 67, 3),
    "rank 64": (300, 512, 512, 64),
    "rank 100": (140, 320, 384, 100),
    "decode": (1, 4096, 1024, 16),
    "rank 160": (257, 264, 520, 160),
    "tiny": (7, 9, 5, 1),
}
# More tiles than SMs, M > 128 and BLOCK_C of 256, edges in M and N: where ptxas before 13.3 made
# NaN, as it overwrote what a pipelined product on sm_90 still read from registers (triton#9433).
NAN_HUNT = (2176, 1032, 4104, 24)


def shape(sizes: tuple[int, int, int, int], dtype: torch.dtype, dropout_p: float, target) -> None:
    rows, *others = sizes
    check_policy(target, target.problem((rows,), *others, dtype=dtype, dropout_p=dropout_p))


def nan_hunt(dtype: torch.dtype, dropout_p: float, target: Target) -> None:
    rows, *sizes = NAN_HUNT
    problem = target.problem((rows,), *sizes, dtype=dtype, dropout_p=dropout_p)
    first = check_policy(target, problem)
    for _ in range(10):
        for name, again in run_forward_backward(target.call, problem).items():
            assert torch.isfinite(again).all(), f"{name} is not finite"
            assert torch.equal(again, first[name]), f"{name} differs from the first run"


def tf32(target: Target) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        check_policy(target, target.problem((200,), 136, 264, 16, dropout_p=0.3))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


# ---- operands

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def fp32_adapters(dtype: torch.dtype, dropout_p: float, target: Target) -> None:
    check_policy(
        target,
        target.problem(
            (150,), 136, 264, 24, dtype=dtype, adapter_dtype=FP32, dropout_p=dropout_p,
            with_output_scale=True,
        ),
    )  # fmt: skip


def adapter_alone(target: Target) -> None:
    for bias, scale in itertools.product((True, False), repeat=2):
        check_policy(
            target,
            target.problem(
                (3, 50), 136, 264, 16, dtype=BF16, with_weight=False, with_bias=bias,
                with_output_scale=scale, dropout_p=0.2,
            ),
        )  # fmt: skip


def amid(x: Tensor, gap: float) -> Tensor:
    """The same rows at odd elements of wider ones."""
    wide = x.new_full((x.shape[0], x.shape[1] + 9), gap)
    return wide[:, 1 : x.shape[1] + 1].copy_(x)


def strides(target: Target) -> None:
    """Transposed, sliced, expanded, starting at an odd element, and a transposed weight."""
    m, k, n = 150, 136, 264
    problem = target.problem((m,), k, n, 16, dtype=BF16, dropout_p=0.2)
    x, dy, weight = problem.x, problem.dy, problem.weight
    if target.backend != "composed":  # nobody but our kernels reads x
        alone = problem.with_(weight=None, x=amid(x, float("nan")))
        check_policy(target, alone)
    for changes in (
        {"x": x.t().contiguous().t()},
        {"x": amid(x, vendor_gap(BF16, x.device))},
        {"x": x[:1].expand(m, k)},
        {"dy": dy.t().contiguous().t()},
        {"dy": dy[:1].expand(m, n)},
        {"dy": dy.new_ones(()).expand(m, n)},
        {"weight": weight.t().contiguous().t()},
        {"lora_a": problem.lora_a.t().contiguous().t()},
        {"lora_b": problem.lora_b.t().contiguous().t()},
    ):
        check_policy(target, problem.with_(**changes))


def subsets_of_gradients(target: Target) -> None:
    problem = target.problem(
        (150,), 136, 264, 16, dtype=BF16, dropout_p=0.2, with_output_scale=True
    )
    whole = run_forward_backward(target.call, problem)
    for needs in (("x",), ("lora_a",), ("lora_b",), ("bias",), ("output_scale",), ("x", "lora_a")):
        for name, result in check_policy(target, problem, needs).items():
            assert name == "y" or torch.isfinite(result).all()
            if name == "y":
                assert torch.equal(result, whole[name])
    y = run_forward_backward(target.call, problem, ())["y"]
    assert torch.equal(y, whole["y"]), "without gradients the result differs"


def scaling_on_the_device(target: Target) -> None:
    problem = target.problem((150,), 136, 264, 16, dtype=BF16)
    on_device = problem.with_(scaling=problem.scaling.to(target.device, FP32))
    check_policy(target, on_device)


def no_tokens(target: Target) -> None:
    for leading in ((0,), (2, 0)):
        problem = target.problem(leading, 40, 56, 4, dtype=BF16, dropout_p=0.2)
        for name, result in run_forward_backward(target.call, problem).items():
            assert (result == 0).all(), f"{name} is not zero"


def autocast_of_an_fp32_layer(target: Target) -> None:
    check_policy(target, target.problem((150,), 136, 264, 16, dropout_p=0.2), autocast=BF16)


def fp16_does_not_underflow(target: Target) -> None:
    """B and dy near 1e-5: t is below fp16's smallest number and feeds dA.

    On a GPU the vendor's products take B as fp16, so that composed is held to the result with B as
    that: numbers near 1e-6 have few of fp16's bits left.
    """
    problem = target.problem((150,), 136, 264, 16, dtype=FP16, adapter_dtype=FP32, dropout_p=0.2)
    tiny = problem.with_(lora_b=problem.lora_b * 1e-5, dy=problem.dy * 1e-5)
    ours = run_forward_backward(target.call, tiny)
    if target.backend == "composed" and target.device == "cuda":
        scaled = (tiny.lora_b * tiny.scaling).half()
        tiny = tiny.with_(lora_b=scaled.float() / tiny.scaling)
    exact = oracle_results(tiny)
    for name in ("lora_a", "lora_b"):
        error = (ours[name].double() - exact[name]).norm() / exact[name].norm()
        # Of tf32 products: ten bits of mantissa in each factor.
        assert error < 2**-9, f"{name}: relative error {error:.1e}"


# ---- dropout


def definition_on_the_device(target: Target) -> None:
    for seed, p in ((0, 0.1), (-1, 0.5), (2**62 + 3, 0.999), (2**32, 0.0)):
        there = keep_mask(torch.tensor(seed, device=target.device), p, 77, 1001)
        assert torch.equal(there.cpu(), keep_mask(torch.tensor(seed), p, 77, 1001))


def mask_bits(which: str, target: Target) -> None:
    """Every kernel's mask, read through the op, is the definition's bit for bit."""
    for seed_value, p in ((5, 0.1), (-(2**63), 0.5), (2**62 + 3, 0.97)):
        m, k = (96, 1000) if which != "forward" else (150, 160)
        seed = torch.tensor(seed_value, device=target.device)
        one = functools.partial(torch.ones, dtype=BF16, device=target.device)
        eye = functools.partial(torch.eye, dtype=BF16, device=target.device)
        factors = {
            "forward": (eye(k), eye(k)),  # y = D(x)
            "dx": (one(1, k), one(8, 1)),  # dx = keep * (t A), t the same everywhere
            "dA": (one(m, k), eye(m)),  # dA = t^T D(x), t the identity
        }
        lora_a, lora_b = factors[which]
        n = lora_b.shape[0]
        inputs = {"x": one(m, k), "lora_a": lora_a.clone(), "lora_b": lora_b.clone()}
        for tensor in inputs.values():
            tensor.requires_grad_()
        weight = torch.zeros(n, k, dtype=BF16, device=target.device)
        y = target.call(**inputs, weight=weight, scaling=1.0, dropout_p=p, seed=seed)
        dy = eye(m) if which == "dA" else one(m, n)
        dx, grad_a = torch.autograd.grad(y, (inputs["x"], inputs["lora_a"]), dy)
        found = {"forward": y, "dx": dx, "dA": grad_a}[which]
        assert torch.equal(found != 0, keep_mask(seed, p, m, k)), f"seed {seed_value}, p {p}"


def checkpointing_replays_the_mask(target: Target) -> None:
    problem = target.problem((150,), 136, 264, 16, dtype=BF16)
    leaves = [problem.x, problem.lora_a, problem.lora_b]

    def forward(x, lora_a, lora_b):
        return lora_linear(
            x, problem.weight, lora_a, lora_b, 0.7, dropout_p=0.3, backend=target.backend
        )

    results = []
    for checkpointed in (False, True):
        torch.manual_seed(11)
        inputs = [leaf.detach().requires_grad_() for leaf in leaves]
        if checkpointed:
            y = torch.utils.checkpoint.checkpoint(forward, *inputs, use_reentrant=False)
        else:
            y = forward(*inputs)
        results.append([y, *torch.autograd.grad(y, inputs, problem.dy)])
    for plain, replayed in zip(*results, strict=True):
        assert torch.equal(plain, replayed)


# ---- the list


def quick() -> list[Check]:
    """In order of worth. On a CPU the strategies are the same thing, so one of them is enough."""
    checks = []

    def add(
        name: str, run: Callable[[Target], None], both: bool = False, on_cpu=True, half=True
    ) -> None:
        for strategy in ("fused", "hybrid") if both else ("fused",):
            label = f"{name} {strategy}" if both else name
            checks.append(Check(label, run, strategy, on_cpu and strategy == "fused", half))

    for dtype, labels in (
        (BF16, list(SHAPES)),
        (FP16, ["aligned", "odd", "rank 64", "rank 160"]),
        (FP32, ["aligned", "odd", "rank 160"]),
    ):
        for label, p in itertools.product(labels, (0.0, 0.3)):
            name = f"{str(dtype).removeprefix('torch.')} {label} p {p:g}"
            both = dtype is BF16 or label == "aligned"
            run = functools.partial(shape, SHAPES[label], dtype, p)
            add(name, run, both=both, half=dtype != FP32)
    for which in ("forward", "dx", "dA"):
        add(f"mask bits {which}", functools.partial(mask_bits, which), both=True)
    for dtype, p in itertools.product((BF16, FP16), (0.0, 0.1)):
        name = f"nan hunt {str(dtype).removeprefix('torch.')} p {p:g}"
        add(name, functools.partial(nan_hunt, dtype, p), both=True, on_cpu=False)
        name = f"fp32 adapters over {str(dtype).removeprefix('torch.')} p {p:g}"
        add(name, functools.partial(fp32_adapters, dtype, p), both=True)
    for run in (
        strides,
        adapter_alone,
        fp16_does_not_underflow,
        subsets_of_gradients,
        scaling_on_the_device,
        autocast_of_an_fp32_layer,
        no_tokens,
        definition_on_the_device,
        checkpointing_replays_the_mask,
    ):
        add(run.__name__.replace("_", " "), run, both=run in (strides, subsets_of_gradients))
    add("tf32", tf32, both=True, on_cpu=False, half=False)
    # Hybrid shares most kernels with fused: behind it, they are compiled already.
    return sorted(checks, key=lambda check: check.strategy == "hybrid")
