"""lora_linear's rank_scale: ``D(x) A^T diag(r) B^T``, and gradients of r and of all others."""

import itertools
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import explain, lora_linear
from lora_kernels.runtime import cpu_extension as native
from lora_kernels.runtime.dropout import keep_mask, keep_scale
from lora_kernels.testing import LoRAProblem, assert_draws_within_policy, redrawn

BACKENDS = ["composed", *([] if native.missing() else ["native"])]
NAMES = ("x", "lora_a", "lora_b", "bias", "output_scale", "rank_scale")
SUBSETS = [needs for size in range(7) for needs in itertools.combinations(NAMES, size)]


def problem_of(dtype=torch.float64, rank_dtype=None, **options) -> dict:
    """Arguments of :func:`lora_linear` by name, and dy."""
    options = {"with_output_scale": True, "adapter_dtype": None} | options
    problem = LoRAProblem.random((2, 9), 21, 13, 5, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(8)
    r = 1.5 * torch.randn(5, generator=generator, dtype=torch.float64)
    return vars(problem) | {"rank_scale": r.to(rank_dtype or problem.lora_a.dtype)}


def formula(
    x, weight, lora_a, lora_b, scaling, bias, output_scale, rank_scale, dropout_p, seed
) -> Tensor:
    """In the dtype of x, in plain torch, by another order than ours."""
    dropped = x
    if dropout_p:
        keep = keep_mask(seed, dropout_p, x.shape[:-1].numel(), x.shape[-1]).view(x.shape)
        dropped = torch.where(keep, x * keep_scale(dropout_p), 0)
    h = F.linear(dropped, lora_a.to(x.dtype)) * rank_scale.to(x.dtype)
    y = F.linear(h, lora_b.to(x.dtype)) * scaling
    y = y if weight is None else F.linear(x, weight) + y
    y = y if output_scale is None else y * output_scale.to(x.dtype)
    return y if bias is None else y + bias


def run(function, problem: dict, needs=NAMES, **options) -> dict[str, Tensor]:
    given = {n: v.detach() if isinstance(v, Tensor) else v for n, v in problem.items()}
    dy = given.pop("dy")
    leaves = {n: given[n].requires_grad_() for n in needs if given[n] is not None}
    y = function(**given, **options)
    grads = torch.autograd.grad(y, list(leaves.values()), dy) if leaves else ()
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def double(problem: dict) -> dict:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in problem.items()
    }


@pytest.mark.parametrize("backend", ["reference", "composed"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("whole", [True, False], ids=["", "adapter_alone"])
def test_values_and_gradcheck(whole, dropout_p, backend):
    problem = problem_of(
        dropout_p=dropout_p, with_weight=whole, with_bias=whole, with_output_scale=whole
    )
    ours, expected = run(lora_linear, problem, backend=backend), run(formula, problem)
    assert ours.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-12, atol=1e-12)
    names = [name for name in NAMES if problem[name] is not None]
    del problem["dy"]

    def function(*leaves):
        return lora_linear(**problem | dict(zip(names, leaves, strict=True)), backend=backend)

    leaves = [problem[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("needs", SUBSETS, ids=lambda needs: "+".join(needs) or "none")
def test_every_subset_of_gradients(needs):
    problem = problem_of(dropout_p=0.3)
    expected, wide = run(formula, problem, needs), run(lora_linear, problem, needs)
    for name in expected:
        torch.testing.assert_close(wide[name], expected[name], rtol=1e-12, atol=1e-12)
    narrow = problem_of(torch.float32, dropout_p=0.3)
    for backend in BACKENDS:
        everything = run(lora_linear, narrow, backend=backend)
        some = run(lora_linear, narrow, needs, backend=backend)
        assert set(some) == {"y", *needs}
        assert all(torch.equal(some[name], everything[name]) for name in some)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("backend", ["composed", "auto"])
def test_second_derivatives(backend, dropout_p):
    problem = problem_of(dropout_p=dropout_p)
    dy = problem.pop("dy")

    def function(*leaves):
        return lora_linear(**problem | dict(zip(NAMES, leaves, strict=True)), backend=backend)

    leaves = [problem[name].requires_grad_() for name in NAMES]
    assert torch.autograd.gradgradcheck(function, leaves, dy.requires_grad_())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("rank_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=["same", "fp32_adapters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_dtype_by_the_error_policy(dtype, adapter_dtype, rank_dtype, dropout_p, backend):
    first = problem_of(dtype, rank_dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p)

    def draw(number: int):
        problem = first | {
            name: redrawn(value, number, name)
            for name, value in first.items()
            if isinstance(value, Tensor) and name not in ("scaling", "seed")
        }
        ours = run(lora_linear, problem, backend=backend)
        assert all(ours[name].dtype == problem[name].dtype for name in NAMES)
        return ours, run(formula, problem), run(formula, double(problem))

    assert_draws_within_policy(draw, dtype)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_it_is_multiplied_into_b(backend):
    problem = problem_of(torch.float32, dropout_p=0.3)
    del problem["dy"]
    r, b = problem.pop("rank_scale"), problem.pop("lora_b")
    with_it = lora_linear(**problem, lora_b=b, rank_scale=r, backend=backend)
    assert torch.equal(with_it, lora_linear(**problem, lora_b=b * r, backend=backend))
    ones = lora_linear(**problem, lora_b=b, rank_scale=torch.ones(5), backend=backend)
    assert torch.equal(ones, lora_linear(**problem, lora_b=b, backend=backend))
    nothing = lora_linear(**problem, lora_b=b, rank_scale=torch.zeros(5), backend=backend)
    assert torch.equal(nothing, lora_linear(**problem, lora_b=b * 0, backend=backend))


def test_a_half_precision_b_is_not_rounded_again():
    """With x and A ones the result is what s r B was rounded to: once."""
    one, b = torch.ones(1, 1, dtype=torch.bfloat16), torch.randn(500, 1).bfloat16()
    r = torch.tensor([1.2345678])
    y = lora_linear(one, None, one, b, 0.7, rank_scale=r)
    assert torch.equal(y[0], (b.double() * r.double() * 0.7).bfloat16()[:, 0])


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("way", ["op", "aot_eager", "again"])
def test_every_way_has_the_same_bits(way, dropout_p):
    problem = problem_of(torch.float32, dropout_p=dropout_p)
    expected = run(lora_linear, problem)
    torch._dynamo.reset()
    function = lora_linear
    if way == "aot_eager":
        function = torch.compile(lora_linear, backend=way, fullgraph=True)
    with FlopCounterMode(display=False) if way == "op" else nullcontext():
        found = run(function, problem)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_under_autocast():
    problem = problem_of(torch.float32)
    problem["dy"] = problem["dy"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(lora_linear, problem)
    cast = {name: problem[name].bfloat16() for name in ("x", "weight", "bias")}
    by_hand = run(lora_linear, problem | cast)
    assert ours["y"].dtype == torch.bfloat16
    for name in ("y", "lora_a", "lora_b", "output_scale", "rank_scale"):
        assert torch.equal(ours[name], by_hand[name]), name


def test_explain_takes_it():
    problem = problem_of(torch.float32)
    for name in ("dy",):
        del problem[name]
    assert explain(**problem) == explain(**problem | {"rank_scale": None})
    with pytest.raises(ValueError, match=r"^rank_scale: expected \[5\], got \[13\]"):
        explain(**problem | {"rank_scale": torch.ones(13)})


def test_an_own_dtype_of_r_widens_b():
    """An fp64 r is not rounded to B's fp32."""
    x, a = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    r = torch.tensor([1 + 2.0**-40], dtype=torch.float64)
    assert lora_linear(x, None, a, torch.ones(1, 1), 1.0, rank_scale=r).item() == r.item()
