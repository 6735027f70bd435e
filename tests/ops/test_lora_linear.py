"""lora_linear: numbers. Reference against an independent fp64 formula, backends against both."""

import itertools

import pytest
import torch
from gaps import vendor_gap
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_calls import backward_of

from lora_kernels import lora_linear
from lora_kernels.ops.linear import composed
from lora_kernels.ops.linear import cpu as compiled
from lora_kernels.ops.linear.call import Needs
from lora_kernels.ops.linear.reference import lora_linear_reference
from lora_kernels.runtime import cpu_extension as native
from lora_kernels.runtime.dropout import drop_threshold, keep_mask, keep_scale, packed_keep_mask
from lora_kernels.testing import (
    LoRAProblem,
    assert_within_policy,
    check_linear,
    oracle_results,
    run_forward_backward,
)

OPERANDS = list(itertools.product([True, False], [True, False], [True, False], [0.0, 0.3]))
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Under:
    """The backend that the tests of this module run with: all of them once with each."""

    backend = "composed"


@pytest.fixture(autouse=True, scope="module", params=["composed", "native"])
def backend_under_test(request):
    if request.param == "native" and (reason := native.missing()):
        pytest.skip(reason)
    Under.backend = request.param


def ours(**inputs):
    # The compiled kernels do not take fp64: composed serves it wherever they serve the rest.
    fp64 = inputs["x"].dtype == torch.float64
    return lora_linear(**inputs, backend="composed" if fp64 else Under.backend)


def check(problem: LoRAProblem, function=ours, **options) -> None:
    """``function`` against fp64, by the error of the eager formula in x's dtype."""
    check_linear(function, problem, **options)


def loops_in_fp64(problem: LoRAProblem) -> dict[str, torch.Tensor]:
    """y and the gradients by the formulas of the design, written with einsum, without autograd."""
    p = problem.double()
    columns, rows = p.x.shape[-1], p.x.shape[:-1].numel()
    x, dy = p.x.reshape(rows, columns), p.dy.reshape(rows, -1)
    keep = torch.ones_like(x)
    if drop_threshold(p.dropout_p):
        keep = keep_mask(p.seed, p.dropout_p, rows, columns).double() * keep_scale(p.dropout_p)
    scale = torch.ones(dy.shape[1], dtype=x.dtype) if p.output_scale is None else p.output_scale
    h = torch.einsum("mk,rk->mr", keep * x, p.lora_a)
    before = p.scaling * torch.einsum("mr,nr->mn", h, p.lora_b)
    if p.weight is not None:
        before = before + torch.einsum("mk,nk->mn", x, p.weight)
    y = before * scale + (0 if p.bias is None else p.bias)
    d_before = dy * scale
    t = p.scaling * torch.einsum("mn,nr->mr", d_before, p.lora_b)
    dx = keep * torch.einsum("mr,rk->mk", t, p.lora_a)
    if p.weight is not None:
        dx = dx + torch.einsum("mn,nk->mk", d_before, p.weight)
    results = {
        "y": y.view(p.dy.shape),
        "x": dx.view(p.x.shape),
        "lora_a": torch.einsum("mr,mk->rk", t, keep * x),
        "lora_b": p.scaling * torch.einsum("mn,mr->nr", d_before, h),
    }
    if p.bias is not None:
        results["bias"] = dy.sum(0)
    if p.output_scale is not None:
        results["output_scale"] = (dy * before).sum(0)
    return results


@pytest.mark.parametrize("with_weight, with_bias, with_output_scale, dropout_p", OPERANDS)
def test_reference_is_the_formula(with_weight, with_bias, with_output_scale, dropout_p):
    problem = LoRAProblem.random(
        (2, 5), 29, 13, 3, dtype=torch.float64, with_weight=with_weight, with_bias=with_bias,
        with_output_scale=with_output_scale, dropout_p=dropout_p,
    )  # fmt: skip
    actual, expected = oracle_results(problem), loops_in_fp64(problem)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "composed"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("with_weight", [True, False])
def test_gradcheck(backend, dropout_p, with_weight):
    p = LoRAProblem.random(
        (2, 3), 11, 7, 2, dtype=torch.float64, with_weight=with_weight,
        with_output_scale=True, dropout_p=dropout_p,
    )  # fmt: skip
    leaves = [t.requires_grad_() for t in (p.x, p.lora_a, p.lora_b, p.bias, p.output_scale)]

    def function(x, lora_a, lora_b, bias, output_scale):
        return lora_linear(
            x, p.weight, lora_a, lora_b, p.scaling, bias, output_scale=output_scale,
            dropout_p=dropout_p, seed=p.seed, backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=["same", "fp32_adapters"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    "shape",  # M, K, N, R
    [(57, 101, 67, 3), (128, 64, 256, 16), (33, 255, 123, 24), (7, 9, 5, 1), (40, 65, 130, 100)],
    ids=str,
)
def test_sizes(dtype, adapter_dtype, dropout_p, shape, poisoned_memory):
    rows, *sizes = shape
    problem = LoRAProblem.random(
        (rows,), *sizes, dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p
    )
    check(problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_weight, with_bias, with_output_scale, dropout_p", OPERANDS)
def test_operands(dtype, with_weight, with_bias, with_output_scale, dropout_p, poisoned_memory):
    problem = LoRAProblem.random(
        (3, 41), 77, 59, 5, dtype=dtype, with_weight=with_weight, with_bias=with_bias,
        with_output_scale=with_output_scale, dropout_p=dropout_p,
    )  # fmt: skip
    check(problem)


@pytest.mark.parametrize("leading", [(), (1,), (0,), (3, 0, 2), (2, 3, 4), (5, 1)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_leading_dimensions(leading, dropout_p, poisoned_memory):
    problem = LoRAProblem.random(leading, 19, 11, 4, with_output_scale=True, dropout_p=dropout_p)
    check(problem)
    if problem.x.numel() == 0:
        grads = run_forward_backward(ours, problem)
        assert not grads["lora_a"].any() and not grads["lora_b"].any()


def rearranged(name: str, tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """The same values behind other strides."""
    *leading, columns = tensor.shape
    by_ours_alone = Under.backend == "native" and name in ("lora_a", "lora_b")
    gap = torch.nan if by_ours_alone else vendor_gap(tensor.dtype)
    if kind == "transposed":
        return tensor.mT.contiguous().mT
    if kind == "every_second":
        return tensor.new_full((*leading, 2 * columns), gap)[..., ::2].copy_(tensor)
    if kind == "offset":
        return tensor.new_full((*leading, columns + 3), gap)[..., 3:].copy_(tensor)
    if kind == "expanded":  # one row's values for all rows, stride 0
        return tensor[..., :1, :].expand(tensor.shape)
    return tensor


@settings(max_examples=150)
@given(
    leading=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    in_features=st.integers(1, 40),
    out_features=st.integers(1, 40),
    rank=st.integers(1, 33),
    dtype=st.sampled_from(DTYPES),
    adapter_dtype=st.sampled_from([None, *DTYPES]),
    dropout_p=st.sampled_from([0.0, 1e-6, 0.1, 0.9]),
    strides=st.fixed_dictionaries({
        name: st.sampled_from(["as_is", "transposed", "every_second", "offset", "expanded"])
        for name in ("x", "weight", "lora_a", "lora_b", "dy")
    }),
)  # fmt: skip
def test_shapes_strides_and_dtypes(
    both_gemms, leading, in_features, out_features, rank, dtype, adapter_dtype, dropout_p, strides
):
    if dtype.itemsize == 2:
        # A maximum over few tokens, or over the few that survive a high p, hangs on a handful of
        # roundings: the ratio of two such maxima is luck.
        leading, dropout_p = (64, *leading), min(dropout_p, 0.1)
        in_features, out_features = in_features + 24, out_features + 24
    elif dtype == torch.float32:
        in_features, out_features = in_features + 6, out_features + 6  # nor is one number's
    problem = LoRAProblem.random(
        leading, in_features, out_features, rank, dtype=dtype, adapter_dtype=adapter_dtype,
        dropout_p=dropout_p, with_output_scale=True,
    )  # fmt: skip
    check(problem.with_(**{n: rearranged(n, getattr(problem, n), k) for n, k in strides.items()}))


@pytest.mark.parametrize("elements", [64, 7], ids=["two_rows_or_one", "less_than_a_row"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_rows_in_several_chunks(dropout_p, elements, monkeypatch, poisoned_memory):
    monkeypatch.setattr("lora_kernels.ops.narrow.products._CHUNK_ELEMENTS", elements)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check(LoRAProblem.random(
            (50,), 33, 41, 5, dtype=dtype, dropout_p=dropout_p, with_output_scale=True
        ))  # fmt: skip


@pytest.mark.parametrize("needs", [
    needs for size in range(6)
    for needs in itertools.combinations(("x", "lora_a", "lora_b", "bias", "output_scale"), size)
], ids=lambda needs: "+".join(needs) or "none")  # fmt: skip
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_every_subset_of_gradients_has_the_same_bits(needs, dropout_p, poisoned_memory):
    problem = LoRAProblem.random((31,), 37, 29, 6, with_output_scale=True, dropout_p=dropout_p)
    everything = run_forward_backward(ours, problem)
    some = run_forward_backward(ours, problem, needs)
    assert set(some) == {"y", *needs}
    for name, result in some.items():
        assert torch.equal(result, everything[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_same_bits_from_run_to_run(dtype, dropout_p):
    problem = LoRAProblem.random((65,), 129, 67, 7, dtype=dtype, dropout_p=dropout_p)
    first = run_forward_backward(ours, problem)
    for _ in range(5):
        again = run_forward_backward(ours, problem)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize(
    "scaling",
    [0.0, -1.5, 1e-4, 300.0, torch.tensor(0.3), torch.tensor(2, dtype=torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scalings(scaling, dtype):
    as_tensor = torch.as_tensor(scaling, dtype=torch.float64)
    problem = LoRAProblem.random((40,), 48, 56, 8, dtype=dtype).with_(scaling=as_tensor)

    def with_given_scaling(**inputs):
        return ours(**{**inputs, "scaling": scaling})

    check(problem, with_given_scaling)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_autocast_of_an_fp32_layer(dtype, dropout_p):
    """x, W, b in fp32 under autocast: the result and its error are those of the half dtype."""
    problem = LoRAProblem.random((33,), 70, 50, 4, dropout_p=dropout_p)
    results = run_forward_backward(ours, problem.with_(dy=problem.dy.to(dtype)), autocast=dtype)
    rounded = problem.with_(
        **{n: getattr(problem, n).to(dtype) for n in ("x", "weight", "bias", "dy")}
    )
    eager = run_forward_backward(lora_linear_reference, rounded)
    oracle = oracle_results(problem.with_(dy=problem.dy.to(dtype)))
    assert results["y"].dtype == dtype
    assert results["x"].dtype == results["bias"].dtype == torch.float32
    for name in ("y", "lora_a", "lora_b"):
        assert_within_policy(name, results[name], eager[name], oracle[name], dtype)
    for name in ("x", "bias"):
        assert_within_policy(name, results[name].to(dtype), eager[name], oracle[name])


def test_fp16_tiny_b_and_tiny_gradients_do_not_underflow():
    """B and dy near 1e-5: t is about 1e-9, below fp16's smallest number, and feeds dA."""
    problem = LoRAProblem.random((256,), 64, 96, 8, dtype=torch.float16, with_bias=False)
    problem = problem.with_(lora_b=problem.lora_b * 1e-5, dy=problem.dy * 1e-5)
    results = run_forward_backward(ours, problem.with_(lora_a=problem.lora_a.float()))
    oracle = oracle_results(problem)
    wide = problem.with_(lora_a=problem.lora_a.float())
    assert oracle["lora_a"].abs().max() > 1e-9
    assert results["lora_a"].dtype == torch.float32
    error = (results["lora_a"] - oracle["lora_a"]).abs().max() / oracle["lora_a"].abs().max()
    # What fp16 operands leave when nothing but they are rounded: a few epsilons of fp16.
    in_fp32 = {name: getattr(wide, name).float() for name in ("x", "weight", "lora_b", "dy")}
    eager_fp32 = run_forward_backward(lora_linear_reference, wide.with_(**in_fp32))
    floor = (eager_fp32["lora_a"] - oracle["lora_a"]).abs().max() / oracle["lora_a"].abs().max()
    assert error <= 2 * floor + torch.finfo(torch.float16).eps


def test_nan_and_infinity_stay_visible():
    problem = LoRAProblem.random((6,), 16, 12, 3)
    problem.x[2, 5] = float("nan")
    problem.x[4, 1] = float("inf")
    y = run_forward_backward(ours, problem, ())["y"]
    assert torch.isnan(y[2]).all() and not torch.isfinite(y[4]).any()
    assert torch.isfinite(y[[0, 1, 3, 5]]).all()


def test_a_half_layers_output_scale_is_not_rounded():
    """An error of c would be the same in every row, and dA's sum over the rows would keep it."""
    rows, columns, c = 4096, 8, 1.25 + 2**-11  # halfway between two numbers of fp16
    problem = LoRAProblem.random(
        (rows,), columns, 3, 2, dtype=torch.float16, adapter_dtype=torch.float32,
        with_weight=False, with_bias=False,
    ).with_(output_scale=torch.full((3,), c))  # fmt: skip
    oracle = oracle_results(problem)["lora_a"]
    result = run_forward_backward(ours, problem, ("lora_a",))["lora_a"]
    error = (result - oracle).abs().max() / oracle.abs().max()
    rounded = problem.output_scale.half().double()
    assert error < 0.5 * (rounded / c - 1).abs().max()


@pytest.mark.parametrize("scaled", [False, True], ids=["", "output_scale"])
@pytest.mark.parametrize("leading", [(6,), (2, 3), ()], ids=str)
def test_the_result_can_be_changed_in_place(leading, scaled):
    problem = LoRAProblem.random(leading, 16, 12, 3, with_output_scale=scaled)

    def then_in_place(**inputs):
        return ours(**inputs).mul_(2)

    doubled = run_forward_backward(then_in_place, problem)
    plain = run_forward_backward(ours, problem)
    assert all(torch.equal(doubled[name], 2 * plain[name]) for name in plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_scaling_meets_an_fp32_b_before_b_is_rounded(dtype):
    """With x and A ones the result is what s * B was rounded to: once."""
    one, lora_b = torch.ones(1, 1, dtype=dtype), torch.randn(500, 1)
    y = ours(x=one, weight=None, lora_a=one, lora_b=lora_b, scaling=0.7)
    assert torch.equal(y[0], (lora_b.double() * 0.7).to(dtype)[:, 0])


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.float64], ids=str)
def test_a_mask_that_was_not_kept_is_made_again(adapter_dtype):
    """What a device does, and what the kernels' op promises: gradients in their tensor's dtype."""
    p = LoRAProblem.random(
        (33,), 21, 13, 3, dtype=torch.bfloat16, adapter_dtype=adapter_dtype, dropout_p=0.4
    )
    h = torch.randn(33, 3, dtype=torch.bfloat16)
    backend = compiled if Under.backend == "native" else composed
    mask = packed_keep_mask(p.seed, 0.4, 33, 21)
    needs = Needs(True, True, True, False, False)
    kept, made_again = (
        backend.backward(backward_of(p, needs, h=h, mask=given))[:3] for given in (mask, None)
    )
    assert all(torch.equal(a, b) for a, b in zip(kept, made_again, strict=True))
    assert [grad.dtype for grad in kept] == [torch.bfloat16, adapter_dtype, adapter_dtype]
