"""How training code uses lora_linear's second derivatives: checkpoints, hooks, Hessians, forces."""

from functools import partial

import pytest
import torch
from linear_calls import BACKWARD, FORWARD, backward_operands, forward_operands
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_kernels import lora_linear
from lora_kernels.ops.linear.reference import lora_linear_reference
from lora_kernels.testing import LoRAProblem, assert_draws_within_policy, assert_within_policy


def tanh_problem(**changes):
    problem = LoRAProblem.random((2, 9), 21, 13, 3, dtype=torch.float64, **changes)
    leaves = {name: getattr(problem, name).requires_grad_() for name in ("x", "lora_a", "lora_b")}
    operands = problem.weight, problem.bias

    def energy(function, x, lora_a, lora_b, **rest):
        weight, bias = operands
        y = function(
            x, weight, lora_a, lora_b, problem.scaling, bias, dropout_p=problem.dropout_p,
            seed=problem.seed, **rest,
        )  # fmt: skip
        return y.tanh().sum()

    return leaves, energy


def penalty(energy_of, leaves: dict[str, Tensor]) -> Tensor:
    (force,) = torch.autograd.grad(energy_of(**leaves), leaves["x"], create_graph=True)
    return force.square().sum()


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_checkpointing(dropout_p):
    leaves, energy = tanh_problem(dropout_p=dropout_p)
    plain = penalty(partial(energy, lora_linear_reference), leaves)
    expected = torch.autograd.grad(plain, list(leaves.values()))

    def replayed(x, lora_a, lora_b):
        function = partial(energy, lora_linear)
        return checkpoint(function, x, lora_a, lora_b, use_reentrant=False)

    actual = torch.autograd.grad(penalty(replayed, leaves), list(leaves.values()))
    for name, ours, theirs in zip(leaves, actual, expected, strict=True):
        assert_within_policy(name, ours, theirs, theirs)


def test_reentrant_checkpointing_is_refused_by_torch():
    leaves, energy = tanh_problem()

    def replayed(x, lora_a, lora_b):
        return checkpoint(partial(energy, lora_linear), x, lora_a, lora_b, use_reentrant=True)

    with pytest.raises(RuntimeError, match=r"use_reentrant=True.*\.grad\(\)"):
        penalty(replayed, leaves)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_hooks_anomaly_mode_and_a_retained_graph():
    leaves, energy = tanh_problem()
    seen = []
    handle = leaves["lora_b"].register_hook(lambda gradient: seen.append(gradient) or 2 * gradient)
    with torch.autograd.detect_anomaly(check_nan=True):
        loss = penalty(partial(energy, lora_linear), leaves)
        first = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
        second = torch.autograd.grad(loss, list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    handle.remove()
    loss = penalty(partial(energy, lora_linear_reference), leaves)
    expected = torch.autograd.grad(loss, list(leaves.values()))
    assert_within_policy("lora_b", first[-1], 2 * expected[-1], 2 * expected[-1])
    assert_within_policy("the hook's", seen[-1], expected[-1], expected[-1])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves["x"])


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_create_graph_of_backward_and_a_graph_that_is_gone():
    leaves, energy = tanh_problem()
    value = energy(lora_linear, **leaves)
    value.backward(create_graph=True)
    assert all(leaf.grad.requires_grad for leaf in leaves.values())
    gradients = [leaf.grad for leaf in leaves.values()]
    for leaf in leaves.values():
        leaf.grad = None  # the cycle that torch warns of
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    value = energy(lora_linear, **leaves)
    value.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(value, leaves["x"], create_graph=True)


def test_a_factor_freed_since_the_forward_is_an_error():
    leaves, energy = tanh_problem()
    value = energy(lora_linear, **leaves)
    leaves["lora_b"].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"lora_b: .* storage was freed"):
        torch.autograd.grad(value, leaves["x"], create_graph=True)


def test_in_place_changes_between_the_derivatives_are_noticed():
    leaves, energy = tanh_problem()
    loss = penalty(partial(energy, lora_linear), leaves)
    with torch.no_grad():
        leaves["lora_a"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_hessians(dropout_p):
    """One column after the other, and with is_grads_batched over a graph that is created."""
    leaves, energy = tanh_problem(dropout_p=dropout_p)
    others = leaves["lora_a"], leaves["lora_b"]

    def hessian(function, vectorize):
        return torch.autograd.functional.hessian(
            lambda x: energy(function, x, *others), leaves["x"].detach()[0, :3],
            vectorize=vectorize,
        )  # fmt: skip

    expected = hessian(lora_linear_reference, False)
    for vectorize in (False, True):
        ours = hessian(lora_linear, vectorize)
        assert_within_policy(f"vectorize={vectorize}", ours, expected, expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("frozen", ["lora_a", None])
def test_batched_gradients_with_a_graph(frozen):
    leaves, energy = tanh_problem()
    if frozen:
        leaves[frozen].requires_grad_(False)
    trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}

    def run(function):
        value = energy(function, **leaves)
        batched = torch.autograd.grad(
            value, list(trained.values()), torch.tensor([0.5, -2.0], dtype=torch.float64),
            is_grads_batched=True, create_graph=True,
        )  # fmt: skip
        return [*batched, *torch.autograd.grad(batched[0].square().sum(), list(trained.values()))]

    for ours, theirs in zip(run(lora_linear), run(lora_linear_reference), strict=True):
        assert_within_policy("", ours, theirs, theirs)


def test_autocast_around_a_backward_with_a_graph_changes_nothing():
    problem = LoRAProblem.random((9,), 21, 13, 3, with_output_scale=True, dropout_p=0.3)
    operands = {name: value for name, value in vars(problem).items() if name != "dy"}
    leaves = [operands[n].requires_grad_() for n in ("x", "lora_a", "lora_b", "output_scale")]
    y = lora_linear(**operands)
    plain = torch.autograd.grad(y, leaves, problem.dy, create_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = torch.autograd.grad(y, leaves, problem.dy, create_graph=True)
    for ours, theirs in zip(under_autocast, plain, strict=True):
        assert ours.requires_grad and torch.equal(ours, theirs)


def test_the_ordinary_backward_is_left_to_its_kernels(monkeypatch):
    from lora_kernels.ops.linear import op as autograd

    problem = LoRAProblem.random((9,), 21, 13, 3)
    monkeypatch.setattr(autograd, "differentiable_backward", None)
    problem.x.requires_grad_()
    y = lora_linear(problem.x, problem.weight, problem.lora_a, problem.lora_b, 0.7)
    y.backward(problem.dy)
    assert problem.x.grad is not None and not problem.x.grad.requires_grad


def test_inner_ops_refuse_gradients():
    problem = LoRAProblem.random((8,), 16, 12, 3)
    h, no_mask = problem.x @ problem.lora_a.t(), torch.empty(0, dtype=torch.uint8)
    problem.dy.requires_grad_()
    with pytest.raises(RuntimeError, match="lora_linear_backward is not differentiable"):
        BACKWARD(*backward_operands(problem, h, None, no_mask, [True] * 5), "auto")
    problem.dy.requires_grad_(False)
    problem.x.requires_grad_()
    with pytest.raises(RuntimeError, match="lora_linear_forward is not differentiable"):
        FORWARD(*forward_operands(problem), False, "auto")


# --- what it is for --------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", ["", "a"], ids=["", "frozen_a"])
@pytest.mark.parametrize("scaling", [1.3, torch.tensor(1.3)], ids=["number", "tensor"])
def test_a_loss_on_forces(scaling, frozen):
    """Two adapted layers and a tanh are an energy; the loss compares its gradient to x."""
    sizes = [(16, 24, 3), (24, 1, 2)]

    def gradients(function, dtype, number):
        problems = [
            LoRAProblem.random((), k, n, r, generator_seed=k + 100 * number) for k, n, r in sizes
        ]
        generator = torch.Generator().manual_seed(number)
        x, wanted = (torch.randn(33, 16, generator=generator) for _ in range(2))
        layers = [
            [t.detach().to(dtype) for t in (p.weight, p.lora_a, p.lora_b, p.bias)] for p in problems
        ]
        trained = [t for _, a, b, _ in layers for t in ((b,) if frozen else (a, b))]
        for tensor in trained:
            tensor.requires_grad_()
        at = x.to(dtype, copy=True).requires_grad_()
        first, second = (partial(function, *layer) for layer in layers)
        (force,) = torch.autograd.grad(second(first(at).tanh()).sum(), at, create_graph=True)
        loss = F.mse_loss(force, wanted.to(dtype))
        gradients = torch.autograd.grad(loss, trained)
        assert all(gradient.abs().max() > 0 for gradient in gradients)
        return {f"parameter {place}": gradient for place, gradient in enumerate(gradients)}

    def ours(weight, a, b, bias, x):
        return lora_linear(x, weight, a, b, scaling, bias)

    def plain(weight, a, b, bias, x):
        return F.linear(x, weight, bias) + scaling * F.linear(F.linear(x, a), b)

    assert_draws_within_policy(
        lambda number: (
            gradients(ours, torch.float32, number),
            gradients(plain, torch.float32, number),
            gradients(plain, torch.float64, number),
        )
    )
