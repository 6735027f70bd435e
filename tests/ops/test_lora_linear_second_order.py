"""Derivatives of lora_linear's derivatives: their values, and what cannot be differentiated."""

import gc
import itertools
import weakref
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import lora_linear
from lora_kernels.ops.linear.reference import lora_linear_reference
from lora_kernels.testing import (
    LoRAProblem,
    assert_draws_within_policy,
    assert_within_policy,
    run_forward_backward,
)
from lora_kernels.testing.inputs import DIFFERENTIABLE

NOT_SAVED = "x, which was not saved because lora_a is frozen"
SUBSETS = {
    operands: [s for size in range(1, 6) for s in itertools.combinations(names, size)]
    for operands, names in (("whole", DIFFERENTIABLE), ("adapter_alone", DIFFERENTIABLE[:3]))
}


def derivatives(function, problem, needs, *, of=None, wrt=None, autocast=None) -> dict[str, Tensor]:
    """The gradients named in ``needs``, and the gradients of a signed sum over those of ``of``.

    The latter are of the leaves ``wrt`` (default: the needed ones and dy), and zero where there is
    no dependence.
    """
    inputs = {
        name: value.detach() if isinstance(value, Tensor) else value
        for name, value in vars(problem).items()
    }
    dy = inputs.pop("dy").requires_grad_()
    leaves = {n: inputs[n].requires_grad_() for n in needs if inputs[n] is not None}
    of, wrt = of or tuple(leaves), wrt or (*leaves, "dy")
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = function(**inputs)
    first = torch.autograd.grad(y, list(leaves.values()), dy, create_graph=True)
    first = dict(zip(leaves, first, strict=True))
    generator = torch.Generator().manual_seed(5)
    drawn = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in
             first.items()}  # fmt: skip
    second = torch.autograd.grad(
        [first[name] for name in of],
        [{**leaves, "dy": dy}[name] for name in wrt],
        [drawn[name].to(first[name].dtype) for name in of],
        allow_unused=True,
        materialize_grads=True,
    )
    named = {f"second of {name}": tensor for name, tensor in zip(wrt, second, strict=True)}
    return {**{name: tensor.detach() for name, tensor in first.items()}, **named}


def assert_like_reference(problem, needs, function=lora_linear, **how) -> None:
    """``function``'s derivatives by the error policy against those of the definition."""
    half = problem.x.dtype in (torch.bfloat16, torch.float16)
    mixed = half and problem.lora_a.dtype == torch.float32
    autocast = problem.x.dtype if mixed else None

    def draw(number: int):
        drawn = problem.redrawn(number)
        return (
            derivatives(function, drawn, needs, **how),
            derivatives(lora_linear_reference, drawn, needs, autocast=autocast, **how),
            derivatives(lora_linear_reference, drawn.double(), needs, **how),
        )

    assert_draws_within_policy(draw, problem.x.dtype)


def is_incomplete(needs) -> bool:
    """Whether x needs a gradient that only a saved x could give."""
    return "x" in needs and "lora_a" not in needs and bool({"lora_b", "output_scale"} & set(needs))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(
    "operands, needs",
    [
        pytest.param(operands, needs, id=f"{operands} {' '.join(needs)}")
        for operands, subsets in SUBSETS.items()
        for needs in subsets
    ],
)
def test_gradgradcheck_and_values_for_every_subset(operands, needs, dropout_p):
    whole = operands == "whole"
    problem = LoRAProblem.random(
        (2, 3), 11, 5, 3, dtype=torch.float64, dropout_p=dropout_p, with_weight=whole,
        with_bias=whole, with_output_scale=whole,
    )  # fmt: skip
    composed = partial(lora_linear, backend="composed")
    if not is_incomplete(needs):
        assert_like_reference(problem, needs, composed)
        inputs = {name: value for name, value in vars(problem).items() if name != "dy"}

        def of_the_needed(*tensors):
            return composed(**{**inputs, **dict(zip(needs, tensors, strict=True))})

        leaves = [inputs[name].requires_grad_() for name in needs]
        assert torch.autograd.gradgradcheck(of_the_needed, leaves, problem.dy.requires_grad_())
        return
    others = tuple(name for name in needs if name != "x")
    assert_like_reference(problem, needs, composed, of=("x",))
    assert_like_reference(problem, needs, composed, wrt=(*others, "dy"))
    for name in {"lora_b", "output_scale"} & set(needs):
        with pytest.raises(RuntimeError, match=NOT_SAVED):
            derivatives(composed, problem, needs, of=(name,), wrt=("x",))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("scaled", [True, False], ids=["output_scale", ""])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=["", "fp32_adapter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ordinary", [True, False], ids=["number", "tensor"])
def test_any_forward_by_the_error_policy(
    monkeypatch, ordinary, dtype, adapter_dtype, scaled, dropout_p
):
    """The kernels that ``auto`` takes (on a CPU the compiled ones) ran the forward, its seed given
    or drawn."""
    problem = LoRAProblem.random(
        (3, 29), 43, 37, 5, dtype=dtype, adapter_dtype=adapter_dtype, with_output_scale=scaled,
        dropout_p=dropout_p,
    )  # fmt: skip

    def function(scaling, seed, **rest):
        if ordinary:  # with the seed that it draws
            monkeypatch.setattr("lora_kernels.ops.linear.draw_seed", lambda _, s=seed: s)
            scaling, seed = scaling.item(), None
        return lora_linear(scaling=scaling, seed=seed, **rest)

    assert_like_reference(problem, DIFFERENTIABLE, function)
    assert_like_reference(problem, ("x", "lora_a", "lora_b"), function, of=("x",))
    assert_like_reference(problem, ("x", "bias", "lora_b"), function, of=("x",))


@pytest.mark.parametrize("shape", [(11,), (0, 11), (1, 11), (2, 0, 11)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_odd_numbers_of_rows(shape, dropout_p):
    problem = LoRAProblem.random(
        shape[:-1], 11, 5, 3, with_output_scale=True, dropout_p=dropout_p, dtype=torch.float64
    )
    assert_like_reference(problem, DIFFERENTIABLE)


def test_strides():
    problem = LoRAProblem.random((8, 12), 40, 24, 3, dtype=torch.float64, with_output_scale=True)
    problem = problem.with_(
        x=problem.x.transpose(0, 1),
        dy=torch.randn(24, 12, 8, dtype=torch.float64).permute(1, 2, 0),
        weight=problem.weight.t().contiguous().t(),
        lora_a=problem.lora_a.t().contiguous().t(),
    )
    assert_like_reference(problem, DIFFERENTIABLE)


@pytest.mark.parametrize("scaling", [0.7, torch.tensor(0.7), torch.tensor(2)], ids=str)
def test_scalings(scaling):
    problem = LoRAProblem.random((9,), 21, 13, 3, dtype=torch.float64)
    exact = problem.with_(scaling=torch.as_tensor(scaling, dtype=torch.float64))
    ours = derivatives(lambda **a: lora_linear(**{**a, "scaling": scaling}), problem,
                       DIFFERENTIABLE)  # fmt: skip
    expected = derivatives(lora_linear_reference, exact, DIFFERENTIABLE)
    for name, tensor in ours.items():
        assert_within_policy(name, tensor, expected[name], expected[name])


def test_gradients_of_fp16_do_not_underflow():
    """At the magnitudes of the first steps: B and dy near 1e-5."""
    problem = LoRAProblem.random(
        (64,), 40, 24, 4, dtype=torch.float16, adapter_dtype=torch.float32, with_bias=False
    )
    problem = problem.with_(dy=problem.dy * 1e-5, lora_b=problem.lora_b * 1e-5)
    ours = derivatives(lora_linear, problem, ("x", "lora_a"), of=("lora_a",), wrt=("x",))
    oracle = derivatives(
        lora_linear_reference, problem.double(), ("x", "lora_a"), of=("lora_a",), wrt=("x",)
    )
    error = (ours["lora_a"].double() - oracle["lora_a"]).abs().max()
    assert error < 1e-3 * oracle["lora_a"].abs().max()


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("order", [3, 4])
def test_higher_orders(order, dropout_p):
    """Derivatives in random directions of a function that has them all."""
    problem = LoRAProblem.random(
        (4,), 7, 5, 2, dtype=torch.float64, with_output_scale=True, dropout_p=dropout_p
    )

    def derivative(function):
        inputs = {n: t.detach() if isinstance(t, Tensor) else t for n, t in vars(problem).items()}
        del inputs["dy"]
        leaves = [inputs[name].requires_grad_() for name in DIFFERENTIABLE]
        value = function(**inputs).sin().sum()
        generator = torch.Generator().manual_seed(2)
        for _ in range(order):
            gradients = torch.autograd.grad(value, leaves, create_graph=True)
            value = sum(
                (g * torch.randn(g.shape, generator=generator, dtype=g.dtype)).sum()
                for g in gradients
            )
        return gradients

    ours, expected = derivative(lora_linear), derivative(lora_linear_reference)
    for name, a, b in zip(DIFFERENTIABLE, ours, expected, strict=True):
        assert b.abs().max() > 0
        assert_within_policy(name, a, b, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(dtype):
    """The forward in autocast's dtype from fp32 tensors; the derivatives come back in fp32."""
    problem = LoRAProblem.random((3, 29), 43, 37, 5, dropout_p=0.1)

    def draw(number: int):
        drawn = problem.redrawn(number)
        return (
            derivatives(lora_linear, drawn, DIFFERENTIABLE[:4], autocast=dtype),
            derivatives(lora_linear_reference, drawn, DIFFERENTIABLE[:4], autocast=dtype),
            derivatives(lora_linear_reference, drawn.double(), DIFFERENTIABLE[:4]),
        )

    assert_draws_within_policy(draw, dtype)


# --- what was not saved ----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "composed"])
@pytest.mark.parametrize("scaled", [True, False], ids=["output_scale", ""])
def test_a_frozen_a_gives_forces_and_no_wrong_gradient(scaled, backend):
    """dx needs no x. B's gradient does, for its own derivative to x: whoever asks, however x came
    about and whatever else is asked for, is told so."""
    problem = LoRAProblem.random((9,), 21, 13, 3, with_output_scale=scaled)
    leaf, b = problem.x.requires_grad_(), problem.lora_b.requires_grad_()
    c = problem.output_scale if not scaled else problem.output_scale.requires_grad_()
    x = leaf * 1.5
    y = lora_linear(x, problem.weight, problem.lora_a, b, 0.7, output_scale=c, backend=backend)
    dx, db = torch.autograd.grad(y.tanh().sum(), [x, b], create_graph=True)
    torch.autograd.grad(dx.square().sum(), [leaf, b], retain_graph=True)
    torch.autograd.grad(db.square().sum(), [b], retain_graph=True)
    loss = db.square().sum() + leaf.square().sum()
    for wanted in (x, leaf, [leaf, b]):
        with pytest.raises(RuntimeError, match=NOT_SAVED):
            torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)
    with pytest.raises(RuntimeError, match=NOT_SAVED):
        loss.backward()


@pytest.mark.parametrize("frozen", [(), ("lora_a",)], ids=["", "frozen_a"])
def test_where_a_mode_sees_the_operations(frozen):
    problem = LoRAProblem.random((9,), 21, 13, 3, dtype=torch.float64, dropout_p=0.3)
    needs = tuple(name for name in ("x", "lora_a", "lora_b") if name not in frozen)

    def function(**inputs):
        with FlopCounterMode(display=False):
            return lora_linear(**inputs)

    assert_like_reference(problem, needs, function, of=("x",))
    if frozen:
        with pytest.raises(RuntimeError, match=NOT_SAVED):
            derivatives(function, problem, needs)


def test_a_frozen_a_with_a_constant_x_lacks_nothing():
    problem = LoRAProblem.random((9,), 21, 13, 3, with_output_scale=True, dtype=torch.float64)
    assert_like_reference(problem, ("lora_b", "output_scale", "bias"))


@pytest.mark.parametrize("backend", ["auto", "composed"])
def test_what_stands_for_x_does_not_keep_it(backend):
    problem = LoRAProblem.random((9,), 21, 13, 3)
    leaf = problem.x.requires_grad_()
    x = leaf + 1
    died = weakref.ref(x)
    b = problem.lora_b.requires_grad_()
    y = lora_linear(x, problem.weight, problem.lora_a, b, 0.7, backend=backend)
    del x
    gc.collect()
    assert died() is None
    y.sum().backward()
    assert leaf.grad is not None


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_what_stands_for_x_is_no_matter_of_compiled_graphs(backend):
    torch._dynamo.reset()
    problem = LoRAProblem.random((9,), 21, 13, 3)

    def in_the_middle(function):
        return lambda x, **others: function(x=1.5 * x, **others)

    compiled = torch.compile(in_the_middle(lora_linear), backend=backend, fullgraph=True)

    def draw(number: int):
        drawn = problem.redrawn(number)
        return tuple(
            run_forward_backward(function, each, ("x", "lora_b"))
            for function, each in (
                (compiled, drawn),
                (in_the_middle(lora_linear_reference), drawn),
                (in_the_middle(lora_linear_reference), drawn.double()),
            )
        )

    assert_draws_within_policy(draw)


@pytest.mark.parametrize("thawed", ["x", "lora_a", "lora_b", "output_scale", "weight"])
def test_what_was_a_constant_to_the_forward_stays_one(thawed):
    """Half of a derivative would be wrong."""
    problem = LoRAProblem.random((9,), 21, 13, 3, with_output_scale=True)
    needed = [name for name in ("x", "lora_a", "lora_b") if name != thawed]
    leaves = [getattr(problem, name).requires_grad_() for name in needed]
    operands = {name: value for name, value in vars(problem).items() if name != "dy"}
    y = lora_linear(**operands)
    late = getattr(problem, thawed).requires_grad_()
    first = torch.autograd.grad(y, leaves, problem.dy, create_graph=True)
    loss = sum(gradient.square().sum() for gradient in first)
    (gradient,) = torch.autograd.grad(loss, late, allow_unused=True)
    assert gradient is None
