"""lora_linear on the Triton kernels, interpreted: the public call against the definition."""

import itertools

import pytest
import torch
from gaps import vendor_gap
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from linear_calls import BACKWARD, FORWARD, OP, backward_operands, forward_operands

from lora_kernels import explain, lora_linear
from lora_kernels.ops.linear.reference import lora_linear_reference
from lora_kernels.ops.linear.triton import tiles
from lora_kernels.runtime.device_limits import precision
from lora_kernels.testing import (
    LoRAProblem,
    assert_draws_within_policy,
    assert_within_policy,
    check_linear,
    oracle_results,
    run_forward_backward,
)
from lora_kernels.testing.inputs import DIFFERENTIABLE

DTYPES = [torch.float32, torch.float16]
STRATEGIES = ["fused", "hybrid"]


def triton(**inputs):
    return lora_linear(**inputs, backend="triton")


def check(problem: LoRAProblem, **options) -> None:
    """Against fp64, by the error of the eager formula in x's dtype."""
    check_linear(triton, problem, **options)


@pytest.fixture(params=STRATEGIES)
def strategy(request):
    with tiles.use_cells({"*": {"strategy": request.param}}):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    "shape",  # M, K, N, R
    [
        (57, 101, 67, 3),  # odd everything: pointers
        (128, 64, 256, 16),  # aligned: TMA in half precision
        (33, 255, 123, 24),
        (7, 9, 5, 1),
        (140, 64, 136, 100),
        (65, 136, 72, 160),
    ],
    ids=str,
)
def test_shapes(shape, dropout_p, dtype, strategy, poisoned_memory):
    rows, *sizes = shape
    check(LoRAProblem.random((rows,), *sizes, dtype=dtype, dropout_p=dropout_p))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("with_weight", [True, False], ids=["weight", "adapter_alone"])
@pytest.mark.parametrize(
    "with_bias, with_output_scale", [(True, True), (True, False), (False, True)]
)
def test_operands(with_weight, with_bias, with_output_scale, dropout_p, strategy, poisoned_memory):
    check(LoRAProblem.random(
        (3, 23), 72, 56, 5, dtype=torch.float16, with_weight=with_weight, with_bias=with_bias,
        with_output_scale=with_output_scale, dropout_p=dropout_p,
    ))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_adapters_of_another_dtype(adapter_dtype, dtype, strategy, poisoned_memory):
    check(LoRAProblem.random(
        (70,), 72, 104, 8, dtype=dtype, adapter_dtype=adapter_dtype, with_output_scale=True,
        dropout_p=0.2,
    ))  # fmt: skip


@pytest.mark.parametrize("leading", [(), (1,), (0,), (3, 0, 2), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_leading_dimensions(leading, dropout_p, strategy, poisoned_memory):
    problem = LoRAProblem.random(leading, 19, 11, 4, with_output_scale=True, dropout_p=dropout_p)
    check(problem)
    if problem.x.numel() == 0:
        gradients = run_forward_backward(triton, problem)
        for name in ("lora_a", "lora_b", "bias", "output_scale"):
            assert not gradients[name].any()


@pytest.mark.parametrize("needs", [
    needs for size in range(6)
    for needs in itertools.combinations(("x", "lora_a", "lora_b", "bias", "output_scale"), size)
], ids=lambda needs: "+".join(needs) or "none")  # fmt: skip
def test_every_subset_of_gradients(needs, poisoned_memory):
    problem = LoRAProblem.random((31,), 37, 29, 6, with_output_scale=True, dropout_p=0.3)
    ours = run_forward_backward(triton, problem, needs)
    assert set(ours) == {"y", *needs}
    check(problem, needs=needs)


def rearranged(tensor: torch.Tensor, kind: str, gap: float) -> torch.Tensor:
    """The same values behind other strides, with ``gap`` wherever nothing should be read."""
    *leading, columns = tensor.shape
    if kind == "transposed":
        return tensor.mT.contiguous().mT
    if kind == "padded_rows":  # still aligned, when the columns are
        return tensor.new_full((*leading, columns + 8), gap)[..., :columns].copy_(tensor)
    if kind == "every_second":
        return tensor.new_full((*leading, 2 * columns), gap)[..., ::2].copy_(tensor)
    if kind == "expanded":  # one row's values for all rows, stride 0
        return tensor[..., :1, :].expand(tensor.shape)
    return tensor


STRIDES = ["as_is", "transposed", "padded_rows", "every_second", "expanded"]


@settings(
    max_examples=30,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking is slow in the interpreter
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    leading=st.sampled_from([(64,), (65, 2), (3, 43)]),
    in_features=st.one_of(st.integers(24, 90), st.sampled_from([32, 64, 80])),
    out_features=st.one_of(st.integers(24, 90), st.sampled_from([32, 64, 80])),
    rank=st.integers(1, 140),
    dtype=st.sampled_from(DTYPES),
    adapter_dtype=st.sampled_from([None, torch.float32]),
    dropout_p=st.sampled_from([0.0, 1e-6, 0.1]),
    strategy=st.sampled_from(STRATEGIES),
    strides=st.fixed_dictionaries(
        {n: st.sampled_from(STRIDES) for n in ("x", "weight", "lora_a", "lora_b", "dy")}
    ),
)
def test_shapes_strides_and_dtypes(
    leading, in_features, out_features, rank, dtype, adapter_dtype, dropout_p, strategy, strides,
    poisoned_memory,
):  # fmt: skip
    problem = LoRAProblem.random(
        leading, in_features, out_features, rank, dtype=dtype, adapter_dtype=adapter_dtype,
        dropout_p=dropout_p, with_output_scale=rank % 2 == 0,
    )  # fmt: skip
    # What the base GEMM of hybrid is given as well.
    shared = ("x", "weight", "dy") if strategy == "hybrid" else ()
    gaps = {name: vendor_gap(dtype) if name in shared else torch.nan for name in strides}
    views = {n: rearranged(getattr(problem, n), kind, gaps[n]) for n, kind in strides.items()}
    with tiles.use_cells({"*": {"strategy": strategy}}):
        check(problem.with_(**views))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_from_run_to_run(dtype, dropout_p, strategy, poisoned_memory):
    problem = LoRAProblem.random((65,), 128, 72, 7, dtype=dtype, dropout_p=dropout_p)
    first = run_forward_backward(triton, problem)
    again = run_forward_backward(triton, problem)
    assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("rank", [8, 160])
def test_fp16_tiny_b_and_tiny_gradients_do_not_underflow(rank, strategy, poisoned_memory):
    """B and dy near 1e-5: t is about 1e-9, below fp16's smallest number, and feeds dA."""
    problem = LoRAProblem.random((256,), 64, 96, rank, dtype=torch.float16, with_bias=False)
    problem = problem.with_(
        lora_a=problem.lora_a.float(),
        lora_b=problem.lora_b.float() * 1e-5,
        dy=problem.dy * 1e-5,
    )
    ours = run_forward_backward(triton, problem, ("lora_a", "lora_b"))
    oracle = oracle_results(problem)
    # Eager fp16 underflows here, so the bound is that of a computation with fp16's precision and
    # fp32's range: the formulas on values rounded to 11 bits.
    p = problem.double()
    h = p.x @ p.lora_a.half().double().t()
    t = p.dy @ rounded_to_11_bits(p.lora_b) * p.scaling
    eager = {
        "lora_a": rounded_to_11_bits(t).t() @ p.x,
        "lora_b": p.dy.t() @ rounded_to_11_bits(h) * p.scaling,
    }
    for name, result in eager.items():
        assert_within_policy(name, ours[name], result.float(), oracle[name], torch.float16)


def rounded_to_11_bits(values: torch.Tensor) -> torch.Tensor:
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp(torch.round(mantissa * 2048) / 2048, exponent)


def test_offsets_past_31_bits(strategy):
    """Rows so far apart that their offsets pass 2^31; the memory between them is never touched."""
    problem = LoRAProblem.random((3,), 40, 24, 4, dtype=torch.float16, dropout_p=0.3)
    far = {}
    for name, columns in (("x", 40), ("dy", 24), ("weight", 40)):
        rows = getattr(problem, name).shape[0]
        stride = 2**31 // (rows - 1) // 8 * 8 + 16
        memory = torch.empty(stride * (rows - 1) + columns, dtype=torch.float16)
        far[name] = memory.as_strided((rows, columns), (stride, 1)).copy_(getattr(problem, name))
    there = run_forward_backward(triton, problem.with_(**far))
    here = run_forward_backward(triton, problem)
    assert all(torch.equal(there[name], here[name]) for name in here)


@pytest.mark.parametrize("leading", [(5,), (2, 3), (0, 3)], ids=str)
def test_result_may_be_changed_in_place(leading):
    problem = LoRAProblem.random(leading, 24, 16, 3)
    lora_b = problem.lora_b.requires_grad_()
    y = lora_linear(problem.x, problem.weight, problem.lora_a, lora_b, 1.0, backend="triton")
    y += 1
    y.sum().backward()
    assert lora_b.grad.shape == lora_b.shape


def test_nothing_but_x_and_h_is_kept(strategy):
    problem = LoRAProblem.random((16,), 64, 48, 4, dtype=torch.float16, dropout_p=0.3)
    kept = []
    lora_a = problem.lora_a.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        triton(
            x=problem.x, weight=problem.weight, lora_a=lora_a,
            lora_b=problem.lora_b.requires_grad_(), scaling=problem.scaling,
            bias=problem.bias, dropout_p=0.3, seed=problem.seed,
        )  # fmt: skip
    inputs = [problem.x, problem.weight, lora_a, problem.lora_b, problem.scaling, problem.seed]
    pointers = {t.data_ptr() for t in inputs}
    new = [t for t in kept if t.numel() and t.data_ptr() not in pointers]
    assert [(t.shape, t.dtype) for t in new] == [((16, 4), torch.float32)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_second_derivatives(dropout_p):
    """By torch's operations from what these kernels saved: the mask is drawn again."""
    problem = LoRAProblem.random((2, 9), 21, 13, 3, with_output_scale=True, dropout_p=dropout_p)

    def penalty(function, problem):
        inputs = {name: value for name, value in vars(problem).items() if name != "dy"}
        leaves = {name: inputs[name].detach().requires_grad_() for name in DIFFERENTIABLE}
        y = function(**{**inputs, **leaves})
        first = torch.autograd.grad(y.sin().sum(), list(leaves.values()), create_graph=True)
        loss = sum(gradient.square().sum() for gradient in first)
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    def draw(number):
        drawn = problem.redrawn(number)
        return (
            penalty(triton, drawn),
            penalty(lora_linear_reference, drawn),
            penalty(lora_linear_reference, drawn.double()),
        )

    assert_draws_within_policy(draw)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(dropout_p, requires_grad):
    """Schema, fake implementation (no mask here) and autograd registration."""
    p = LoRAProblem.random((5,), 24, 16, 3, with_output_scale=True, dropout_p=dropout_p)
    for tensor in (p.x, p.lora_a, p.lora_b):
        tensor.requires_grad_(requires_grad)
    operands = forward_operands(p)
    torch.library.opcheck(OP, (*operands, "triton"))
    if not requires_grad:
        torch.library.opcheck(FORWARD, (*operands, True, "triton"))
        _, h, mask, unscaled = FORWARD(*operands, True, "triton")
        assert mask.numel() == 0
        of_backward = backward_operands(p, h, unscaled, mask, [True] * 5)
        torch.library.opcheck(BACKWARD, (*of_backward, "triton"))


def test_messages():
    problem = LoRAProblem.random((4,), 8, 8, 2)
    arguments = (problem.weight, problem.lora_a, problem.lora_b)
    assert explain(problem.x, *arguments, backend="triton").backend == "triton"
    assert explain(problem.x, *arguments).backend in ("composed", "native")
    doubles = [t.double() for t in (problem.x, *arguments)]
    with pytest.raises(ValueError, match="float64"):
        lora_linear(*doubles, 1.0, backend="triton")
    with pytest.raises(ValueError, match="bfloat16"):
        lora_linear(*[t.bfloat16() for t in doubles], 1.0, backend="triton")


def test_tf32_switch_is_torchs():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for setting, expected in (("ieee", "ieee"), ("tf32", "tf32"), ("none", "ieee")):
            matmul.fp32_precision = setting
            assert precision(torch.float32) == expected
            assert precision(torch.float16) == "ieee"
    finally:
        matmul.fp32_precision = before
