"""Derivatives of routed_lora's derivatives: gradient penalties, forces, Hessians."""

import itertools
from functools import partial

import pytest
import torch
from routed_results import BACKENDS, AsOnADevice, call_routed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_kernels import route
from lora_kernels.ops.routed import (
    AdapterBank,
    Routing,
    routed_expand,
    routed_lora,
    routed_lora_linear,
    routed_shrink,
)
from lora_kernels.testing import assert_within_policy
from lora_kernels.testing.routed_inputs import RoutedProblem

NOT_SAVED = "x, which was not saved because every lora_a is frozen"
ALL = ("x", "weights", "bias", "lora_a", "lora_b")
SUBSETS = [subset for size in range(1, 6) for subset in itertools.combinations(ALL, size)]
KINDS = {
    "plain": {"ids": [2, 0, -1, 1, 0, 0, 2], "ranks": [1, 3, 2], "widths": 5},
    "weighted": {"ids": [[0, 2], [-1, 1], [1, 1], [2, 0], [0, -1]], "ranks": [1, 3, 2],
                 "widths": 4, "weighted": True},
    "sliced": {"ids": [2, 0, -1, 1, 0, 0, 2], "ranks": [(1, 0), (2, 1), (0, 3)], "widths": (3, 4)},
}  # fmt: skip


def problem_of(kind: str, in_features: int = 6, **options) -> RoutedProblem:
    given = dict(KINDS[kind])
    ids, ranks, widths = given.pop("ids"), given.pop("ranks"), given.pop("widths")
    return RoutedProblem.random(ids, ranks, in_features, widths, **given, **options)


def leaves_of(problem: RoutedProblem, bank: AdapterBank, needs) -> dict[str, Tensor]:
    """Those of the problem's own tensors, and of the bank's parameters by role or by name."""
    found = {}
    for name in ("x", "weights", "bias", "out"):
        tensor = getattr(problem, name)
        if tensor is not None:
            tensor.requires_grad_(name in needs)
            found |= {name: tensor} if name in needs else {}
    for name, parameter in bank.named_parameters():
        name = name.removeprefix("adapters.")
        needed = name in needs or name.split(".")[1][:6] in needs
        parameter.requires_grad_(needed)
        found |= {name: parameter} if needed else {}
    return found


def derivatives(function, problem, needs, *, of=None, wrt=None, autocast=None) -> dict[str, Tensor]:
    """The gradients named in ``needs``, and the gradients of a signed sum over those of ``of``.

    The latter are of the leaves ``wrt`` (default: the needed ones and dy), and zero where there is
    no dependence.
    """
    changes = {
        name: None if value is None else value.detach().clone()
        for name in ("x", "weights", "bias", "out", "dy")
        for value in [getattr(problem, name)]
    }
    problem = problem.with_(**changes)
    dy, bank = problem.dy.requires_grad_(), problem.bank()
    leaves = leaves_of(problem, bank, needs)
    of, wrt = of or tuple(leaves), wrt or (*leaves, "dy")
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = function(problem, bank)
    first = torch.autograd.grad(y, list(leaves.values()), dy, create_graph=True)
    first = dict(zip(leaves, first, strict=True))
    generator = torch.Generator().manual_seed(5)
    drawn = {
        name: torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        for name, gradient in first.items()
    }
    second = torch.autograd.grad(
        [first[name] for name in of],
        [{**leaves, "dy": dy}[name] for name in wrt],
        [drawn[name].to(first[name].dtype) for name in of],
        allow_unused=True,
        materialize_grads=True,
    )
    named = {f"second of {name}": tensor for name, tensor in zip(wrt, second, strict=True)}
    return {**{name: tensor.detach() for name, tensor in first.items()}, **named}


def whole(backend: str):
    return lambda problem, bank: call_routed(problem, bank, backend)


def assert_like_reference(problem, needs, function, reference=None, **how) -> None:
    """``function``'s derivatives by the error policy against those of the definition."""
    reference = reference or whole("reference")
    eager = derivatives(reference, problem, needs, **how)
    oracle = derivatives(reference, problem.double(), needs, **how)
    ours = derivatives(function, problem, needs, **how)
    for name, tensor in ours.items():
        assert_within_policy(name, tensor, eager[name], oracle[name], problem.x.dtype)


def is_incomplete(needs) -> bool:
    """Whether x needs a gradient that only a saved x could give."""
    return "x" in needs and "lora_a" not in needs and bool({"lora_b", "weights"} & set(needs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("needs", SUBSETS, ids=" ".join)
def test_gradgradcheck_and_values_for_every_subset(needs, dropout, kind):
    if kind != "weighted" and "weights" in needs:
        return  # there are none
    problem = problem_of(kind, dtype=torch.float64, dropout=dropout)
    if problem.weights is not None:
        problem = problem.with_(weights=problem.weights.double())
    composed = whole("composed")
    if is_incomplete(needs):
        others = tuple(n for n in leaves_of(problem, problem.bank(), needs) if n != "x")
        assert_like_reference(problem, needs, composed, of=("x",))
        assert_like_reference(problem, needs, composed, wrt=(*others, "dy"))
        for name in others:
            if name != "bias":
                with pytest.raises(RuntimeError, match=NOT_SAVED):
                    derivatives(composed, problem, needs, of=(name,), wrt=("x",))
        return
    assert_like_reference(problem, needs, composed)
    if needs == ("bias",):  # its gradient depends on nothing but dy
        return
    # The values of the bank's parameters are changed in place, where the bank sees them.
    bank = problem.bank()
    leaves = leaves_of(problem, bank, needs)
    dy = problem.dy.requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda *_: composed(problem, bank), tuple(leaves.values()), dy, fast_mode=True
    )


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=["", "fp32_adapters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_forward_by_the_error_policy(dtype, adapter_dtype, kind, dropout, backend):
    generator = torch.Generator().manual_seed(3)
    count = 2 if kind == "weighted" else 1
    problem = RoutedProblem.random(
        torch.randint(-1, 3, (60, count), generator=generator),
        [(3, 0), (5, 2), (0, 4)] if kind == "sliced" else [3, 5, 4],
        43, (16, 21) if kind == "sliced" else 37, dtype=dtype, adapter_dtype=adapter_dtype,
        weighted=kind == "weighted", dropout=dropout,
    )  # fmt: skip
    assert_like_reference(problem, ALL, whole(backend))
    assert_like_reference(problem, ("x", "lora_a", "lora_b"), whole(backend), of=("x",))
    assert_like_reference(problem, ("x", "bias", "lora_b"), whole(backend), of=("x",))


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("with_out", [False, True], ids=["", "out"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_adapters_alone(backend, with_out, dropout):
    problem = problem_of("weighted", with_weight=False, with_out=with_out, dropout=dropout)

    def function(problem, bank, backend=backend):
        out = problem.out.clone() if with_out else None
        return call_routed(problem, bank, backend, out=out)

    needs = ("x", "out", "weights", "lora_a", "lora_b")
    assert_like_reference(problem, needs, function, partial(function, backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_halves(backend, kind, dropout):
    problem = problem_of(kind, dropout=dropout)

    def halves(problem, bank, backend=backend):
        routing = problem.routing(bank)
        h = routed_shrink(problem.x, bank, routing, seed=problem.seed, backend=backend)
        return routed_expand(h.sin(), bank, routing, dtype=problem.x.dtype, backend=backend)

    needs = ("x", "weights", "lora_a", "lora_b")
    assert_like_reference(problem, needs, halves, partial(halves, backend="reference"))
    # B's gradient needs h, which is its input and always saved.
    some = ("x", "lora_b")
    assert_like_reference(problem, some, halves, partial(halves, backend="reference"))


@pytest.mark.parametrize("ids", [[], [-1] * 4, [2], [1, 1, 1]], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_small_and_empty_batches(ids, dropout):
    problem = RoutedProblem.random(ids, [2, 5, 3], 9, 7, dtype=torch.float64, dropout=dropout)
    needs = tuple(problem.names())
    assert_like_reference(problem, needs, whole("composed"))


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_padding_rows_and_leading_dimensions(backend):
    """x has more rows than tokens were set."""
    problem = problem_of("plain", dropout=0.3)
    x = torch.cat([problem.x, torch.full((5, 6), 3.0)]).view(2, 6, 6)
    problem = problem.with_(x=x, dy=torch.randn(2, 6, 5))

    def function(problem, bank, backend=backend):
        routing = problem.routing(bank, max_tokens=12)
        return routed_lora_linear(
            problem.x, problem.weight, bank, routing, seed=problem.seed, backend=backend
        )

    needs = ("x", "lora_a", "lora_b")
    assert_like_reference(problem, needs, function, partial(function, backend="reference"))


@pytest.mark.parametrize("order", [3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_higher_orders(kind, order):
    """Derivatives in random directions of a function that has them all."""
    problem = problem_of(kind, dtype=torch.float64, dropout=0.25)
    if problem.weights is not None:
        problem = problem.with_(weights=problem.weights.double())

    def derivative(backend):
        bank = problem.bank()
        leaves = leaves_of(problem, bank, ALL)
        value = call_routed(problem, bank, backend).sin().sum()
        generator = torch.Generator().manual_seed(2)
        for _ in range(order):
            gradients = torch.autograd.grad(value, list(leaves.values()), create_graph=True)
            value = sum(
                (g * torch.randn(g.shape, generator=generator, dtype=g.dtype)).sum()
                for g in gradients
            )
        return dict(zip(leaves, gradients, strict=True))

    ours, expected = derivative("composed"), derivative("reference")
    for name, gradient in ours.items():
        assert expected[name].abs().max() > 0
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_reach_the_parameters(backend):
    """Into their .grad, those of the batch alone; and a step changes what the next one finds."""
    problem = problem_of("plain").with_(ids=torch.tensor([[0], [2], [0], [-1], [2], [2], [0]]))
    bank, x = problem.bank(), problem.x.requires_grad_()
    optimizer = torch.optim.AdamW(bank.parameters(), lr=0.01)
    untouched = [p.clone() for p in bank["a1"].parameters()]
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        y = call_routed(problem, bank, backend).tanh().sum()
        (force,) = torch.autograd.grad(y, x, create_graph=True)
        loss = (force - 0.1).square().sum()
        loss.backward()
        x.grad = None
        assert all(p.grad is None for p in bank["a1"].parameters())
        assert all(p.grad.any() for name in ("a0", "a2") for p in bank[name].parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(map(torch.equal, untouched, bank["a1"].parameters()))


@pytest.mark.parametrize("adapters, expected", [(None, [0, 1, 2]), (["a0", "a2"], [0, 2])])
def test_ids_on_a_device(adapters, expected):
    """Zeros for adapters without tokens, to any order; none for those outside of adapters=."""
    problem = problem_of("plain", dtype=torch.float64)
    bank, x = problem.bank(), problem.x.requires_grad_()
    parameters = list(bank.parameters())
    found = []
    for on_device in (False, True):
        ids = torch.tensor([0, 0, 2, -1, 0, 2, 2])
        if on_device:
            with AsOnADevice():
                routing = Routing.from_tokens(ids, bank, adapters=adapters)
        else:
            routing = Routing.from_tokens(ids, bank)
        y = routed_lora(x, bank, routing).sin().sum()
        (force,) = torch.autograd.grad(y, x, create_graph=True)
        found.append(torch.autograd.grad(force.square().sum(), [x, *parameters], allow_unused=True))
    known, unknown = found
    torch.testing.assert_close(known[0], unknown[0])
    for index, (one, other) in enumerate(zip(known[1:], unknown[1:], strict=True)):
        assert (one is None) == (index in (2, 3)), index
        assert (other is None) or index // 2 in expected
        if one is not None:
            torch.testing.assert_close(one, other)
        elif other is not None:
            assert not other.any()


# --- what was not saved, and what has changed -------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_a_frozen_a_gives_forces_and_no_wrong_gradient(backend, weighted):
    problem = problem_of("weighted")
    problem = problem if weighted else problem.with_(weights=None)
    bank = problem.bank()
    leaf, needed = problem.x.requires_grad_(), "weights" if weighted else "lora_b"
    leaves = leaves_of(problem, bank, ("x", needed))
    x = leaf * 1.5
    y = call_routed(problem, bank, backend, x=x)
    name = next(reversed(leaves))
    dx, dn = torch.autograd.grad(y.tanh().sum(), [x, leaves[name]], create_graph=True)
    torch.autograd.grad(dx.square().sum(), [leaf, leaves[name]], retain_graph=True)
    torch.autograd.grad(dn.square().sum(), leaves[name], retain_graph=True)
    loss = dn.square().sum() + leaf.square().sum()
    for wanted in (x, leaf, [leaf, leaves[name]]):
        with pytest.raises(RuntimeError, match=NOT_SAVED):
            torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)
    with pytest.raises(RuntimeError, match=NOT_SAVED):
        loss.backward()


def test_one_trained_a_is_enough():
    """x is saved for it, and serves all adapters."""
    problem = problem_of("plain", dtype=torch.float64)
    needs = ("x", "a0.lora_a", "a1.lora_b", "a2.lora_b")
    assert_like_reference(problem, needs, whole("composed"))


def test_a_frozen_a_with_a_constant_x_lacks_nothing():
    problem = problem_of("weighted", dtype=torch.float64)
    assert_like_reference(problem, ("weights", "lora_b", "bias"), whole("composed"))


@pytest.mark.parametrize("thawed", ["x", "a0.lora_a", "a0.lora_b"])
def test_what_was_a_constant_to_the_forward_stays_one(thawed):
    """Half of a derivative would be wrong."""
    problem = problem_of("plain")
    bank = problem.bank()
    needed = {"x", "a0.lora_a", "a0.lora_b", "a1.lora_a", "a1.lora_b"} - {thawed}
    leaves = leaves_of(problem, bank, needed)
    y = call_routed(problem, bank, "composed")
    late = leaves_of(problem, bank, {thawed, *needed})[thawed]
    first = torch.autograd.grad(y, list(leaves.values()), problem.dy, create_graph=True)
    loss = sum(gradient.square().sum() for gradient in first)
    (gradient,) = torch.autograd.grad(loss, late, allow_unused=True)
    assert gradient is None


@pytest.mark.parametrize("changed, raises", [("a0", True), ("a1", False)])
@pytest.mark.parametrize("between", ["forward", "backward"])
def test_steps_between_the_derivatives(changed, raises, between):
    problem = problem_of("plain").with_(ids=torch.tensor([[0], [2], [0], [-1], [2], [2], [0]]))
    bank, x = problem.bank(), problem.x.requires_grad_()

    def step(when: str) -> None:
        if between == when:
            with torch.no_grad():
                bank[changed].lora_b.add_(1)

    def penalty() -> None:
        y = call_routed(problem, bank, "composed").sin().sum()
        step("forward")
        (force,) = torch.autograd.grad(y, x, create_graph=True)
        step("backward")
        force.square().sum().backward()

    if raises:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            penalty()
    else:
        penalty()


def test_later_scalings_and_dropout_are_not_used():
    problem = problem_of("plain", dropout=0.3)
    found = []
    for change in (False, True):
        bank = problem.bank()
        leaves = list(leaves_of(problem, bank, ("x", "lora_a", "lora_b")).values())
        y = call_routed(problem, bank, "composed").sin().sum()
        if change:
            bank["a0"].scaling = 17.0
            bank["a2"].dropout_p = 0.9
            bank.tensors()
        (force,) = torch.autograd.grad(y, leaves[0], create_graph=True)
        found.append(torch.autograd.grad(force.square().sum(), leaves))
    assert all(map(torch.equal, *found))


# --- how autograd is used ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing(backend, dropout):
    problem = problem_of("plain", dropout=dropout)
    bank, x = problem.bank(), problem.x.requires_grad_()

    def penalty(energy):
        (force,) = torch.autograd.grad(energy(x), x, create_graph=True)
        return torch.autograd.grad(force.square().sum(), [x, *bank.parameters()])

    def energy(x):
        return call_routed(problem, bank, backend, x=x).tanh().sum()

    replayed = penalty(lambda x: checkpoint(energy, x, use_reentrant=False))
    for ours, expected in zip(replayed, penalty(energy), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_backward_under_autocast_is_not_rounded(dropout):
    problem = problem_of("plain", dropout=dropout)

    def forces(enabled: bool):
        bank = problem.bank()
        leaves = list(leaves_of(problem, bank, ("x", "lora_a", "lora_b")).values())
        y = call_routed(problem, bank, "composed")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return torch.autograd.grad(y, leaves, problem.dy, create_graph=True)

    assert all(map(torch.equal, forces(True), forces(False)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_forward_under_autocast(dtype):
    problem = problem_of("plain", in_features=40)
    rounded = {
        name: getattr(problem, name).to(dtype).float() for name in ("x", "weight", "bias", "dy")
    }
    problem = problem.with_(**rounded)
    needs = ("x", "lora_a", "lora_b")
    given = problem.with_(dy=problem.dy.to(dtype))
    ours = derivatives(whole("composed"), given, needs, autocast=dtype)
    eager = derivatives(whole("reference"), given, needs, autocast=dtype)
    oracle = derivatives(whole("reference"), problem.double(), needs)
    for name, tensor in ours.items():
        assert_within_policy(name, tensor.to(dtype), eager[name].to(dtype), oracle[name], dtype)


def test_hessian_vector_products_and_a_second_use_of_the_graph():
    problem = problem_of("sliced", dtype=torch.float64)
    results = []
    for backend in ("composed", "reference"):
        bank = problem.bank()
        leaves = list(leaves_of(problem, bank, ("x", "lora_a", "lora_b")).values())
        y = call_routed(problem, bank, backend).sin().sum()
        first = torch.autograd.grad(y, leaves, create_graph=True)
        once = torch.autograd.grad(first, leaves, first, retain_graph=True)
        again = torch.autograd.grad(first, leaves, first, retain_graph=True)
        plain = torch.autograd.grad(y, leaves)  # the kernels, after the differentiable one
        assert all(map(torch.equal, once, again))
        for ours, theirs in zip(first, plain, strict=True):
            torch.testing.assert_close(ours, theirs)
        results.append(once)
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_many_gradients_at_once(kind, backend):
    """is_grads_batched, and Jacobians and Hessians by it."""
    problem = problem_of(kind, dropout=0.3)
    bank = problem.bank()
    leaves = list(leaves_of(problem, bank, ALL).values())

    def call(x: Tensor) -> Tensor:
        y = call_routed(problem, bank, backend, x=x)
        h = routed_shrink(x, bank, problem.routing(bank), seed=problem.seed, backend=backend)
        return y + routed_expand(h, bank, problem.routing(bank), backend=backend)

    y = call(problem.x)
    many = torch.randn(4, *y.shape)
    together = torch.autograd.grad(y, leaves, many, is_grads_batched=True, retain_graph=True)
    for index in range(4):
        alone = torch.autograd.grad(y, leaves, many[index], retain_graph=True)
        for ours, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[index], expected, rtol=1e-4, atol=1e-5)
    for function, of in (
        (torch.autograd.functional.jacobian, call),
        (torch.autograd.functional.hessian, lambda x: call(x).sin().sum()),
    ):
        x = problem.x.detach()
        at_once, in_turn = (function(of, x, vectorize=vectorize) for vectorize in (True, False))
        torch.testing.assert_close(at_once, in_turn, rtol=1e-4, atol=1e-5)


def test_forces_of_a_routed_model():
    """An energy of many molecules, each with its own adapter, trained on its forces."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 1))
    routed = route(model.double())
    for name, rank in (("water", 2), ("salt", 3), ("other", 1)):
        routed.add(name, rank=rank, alpha=3, target_modules=["0", "2", "4"],
                   init_lora_weights=False)  # fmt: skip
    names = ["salt", "water", "__base__", "salt"]
    x = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)  # [molecules, atoms, 6]
    target = torch.randn_like(x)

    def loss_of(energy: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return (-gradient - target).square().mean() + energy.square().mean()

    def plain() -> Tensor:
        rows = []
        for row, name in zip(x, names, strict=True):
            for layer in model:
                if isinstance(layer, nn.Tanh):
                    row = layer(row)
                    continue
                y = F.linear(row, layer.weight, layer.bias)
                if name in layer.bank:
                    adapter = layer.bank[name]
                    y = y + adapter.scaling * (row @ adapter.lora_a.t() @ adapter.lora_b.t())
                row = y
            rows.append(row)
        return torch.stack(rows)

    wanted = [x, *routed.parameters_of("water"), *routed.parameters_of("salt")]
    expected = torch.autograd.grad(loss_of(plain()), wanted)
    with routed.adapters(names):
        loss = loss_of(model(x))
    found = torch.autograd.grad(loss, wanted, retain_graph=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    loss.backward()
    assert all(p.grad is None for p in routed.parameters_of("other"))
