"""What ``lora_linear`` must get right on a GPU; the same bodies run on a CPU over ``composed``.

Every result is held against fp64 by the error policy, in poisoned memory.
"""

import functools
import itertools

import pytest
import torch
from gaps import vendor_gap
from linear_target import SHAPES, Target, amid, check_policy, check_subsets_of_gradients
from targets import on
from torch.utils.checkpoint import checkpoint

from lora_kernels import lora_linear
from lora_kernels.runtime.dropout import keep_mask
from lora_kernels.testing import oracle_results, run_forward_backward

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# More tiles than SMs, M > 128 and BLOCK_C of 256, edges in M and N: where ptxas before 13.3 made
# NaN, as it overwrote what a pipelined product on sm_90 still read from registers (triton#9433).
NAN_HUNT = (2176, 1032, 4104, 24)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("label", SHAPES)
@on("cpu", "composed", "fused", "hybrid", "native")
def test_bfloat16(target, label, dropout_p):
    check_shape(target, label, BF16, dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("label", ["aligned", "odd", "rank 64", "rank 160"])
@on("cpu", "composed", "fused", "native")
def test_float16(target, label, dropout_p):
    check_shape(target, label, FP16, dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("label", ["aligned", "odd", "rank 160"])
@on("cpu", "composed", "fused")
def test_float32(target, label, dropout_p):
    check_shape(target, label, FP32, dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
@on("hybrid")
def test_other_dtypes(target, dtype, dropout_p):
    check_shape(target, "aligned", dtype, dropout_p)


def check_shape(target: Target, label: str, dtype: torch.dtype, dropout_p: float) -> None:
    rows, *others = SHAPES[label]
    check_policy(target, target.problem((rows,), *others, dtype=dtype, dropout_p=dropout_p))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@on("composed", "fused", "hybrid", "native")
def test_nan_hunt(target, dtype, dropout_p):
    rows, *sizes = NAN_HUNT
    problem = target.problem((rows,), *sizes, dtype=dtype, dropout_p=dropout_p)
    first = check_policy(target, problem)
    for _ in range(10):
        for name, again in run_forward_backward(target.call, problem).items():
            assert torch.isfinite(again).all(), f"{name} is not finite"
            assert torch.equal(again, first[name]), f"{name} differs from the first run"


@on("composed", "fused", "hybrid")
def test_tf32(target):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        check_policy(target, target.problem((200,), 136, 264, 16, dropout_p=0.3))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


# ---- operands


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@on("cpu", "composed", "fused", "hybrid", "native")
def test_fp32_adapters(target, dtype, dropout_p):
    check_policy(
        target,
        target.problem(
            (150,), 136, 264, 24, dtype=dtype, adapter_dtype=FP32, dropout_p=dropout_p,
            with_output_scale=True,
        ),
    )  # fmt: skip


@on("cpu", "composed", "fused", "native")
def test_adapter_alone(target):
    for bias, scale in itertools.product((True, False), repeat=2):
        check_policy(
            target,
            target.problem(
                (3, 50), 136, 264, 16, dtype=BF16, with_weight=False, with_bias=bias,
                with_output_scale=scale, dropout_p=0.2,
            ),
        )  # fmt: skip


@on("composed", "fused", "hybrid", "native")
def test_strides(target):
    check_strides(target)


@on("cpu", "cpu-native")
def test_strides_beside_both_gemms(target, both_gemms):
    check_strides(target)


def check_strides(target: Target) -> None:
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


@on("cpu", "composed", "fused", "hybrid", "native")
def test_subsets_of_gradients(target):
    check_subsets_of_gradients(target)


@on("cpu", "composed", "fused", "native")
def test_scaling_on_the_device(target):
    problem = target.problem((150,), 136, 264, 16, dtype=BF16)
    on_device = problem.with_(scaling=problem.scaling.to(target.device, FP32))
    check_policy(target, on_device)


@on("cpu", "composed", "fused", "native")
def test_no_tokens(target):
    for leading in ((0,), (2, 0)):
        problem = target.problem(leading, 40, 56, 4, dtype=BF16, dropout_p=0.2)
        for name, result in run_forward_backward(target.call, problem).items():
            assert (result == 0).all(), f"{name} is not zero"


@on("cpu", "composed", "fused", "native")
def test_autocast_of_an_fp32_layer(target):
    check_policy(target, target.problem((150,), 136, 264, 16, dropout_p=0.2), autocast=BF16)


@on("cpu", "composed", "fused", "native")
def test_fp16_does_not_underflow(target):
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


@on("cpu", "composed", "fused", "native")
def test_definition_on_the_device(target):
    for seed, p in ((0, 0.1), (-1, 0.5), (2**62 + 3, 0.999), (2**32, 0.0)):
        there = keep_mask(torch.tensor(seed, device=target.device), p, 77, 1001)
        assert torch.equal(there.cpu(), keep_mask(torch.tensor(seed), p, 77, 1001))


@pytest.mark.parametrize("which", ["forward", "dx", "dA"])
@on("cpu", "composed", "fused", "hybrid", "native")
def test_mask_bits(target, which):
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


@on("cpu", "composed", "fused", "native")
def test_checkpointing_replays_the_mask(target):
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
        call = functools.partial(checkpoint, forward, use_reentrant=False)
        y = (call if checkpointed else forward)(*inputs)
        results.append([y, *torch.autograd.grad(y, inputs, problem.dy)])
    for plain, replayed in zip(*results, strict=True):
        assert torch.equal(plain, replayed)
