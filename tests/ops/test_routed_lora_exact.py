"""routed_lora: what must be exact. Who may reach whom, ``out``, the halves, dropout, memory."""

import math

import pytest
import torch
from routed_calls import call_of
from routed_results import (
    BACKENDS,
    call_routed,
    keep_factor,
    routed_eager,
    routed_oracle,
    run_routed,
)
from torch.nn import functional as F

from lora_kernels.ops.routed import (
    Routing,
    composed,
    routed_expand,
    routed_lora,
    routed_lora_linear,
    routed_shrink,
)
from lora_kernels.testing import assert_within_policy
from lora_kernels.testing.routed_inputs import RoutedProblem

KINDS = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "fp64": (torch.float64, None),
    "bf16_fp32_adapters": (torch.bfloat16, torch.float32),
    "fp16_fp32_adapters": (torch.float16, torch.float32),
    "fp32_bf16_adapters": (torch.float32, torch.bfloat16),
}
RANKS = (1, 3, 8, 24, 64, 160)
SLICED_RANKS = ((3, 0, 8), (0, 5, 0), (1, 1, 1), (8, 24, 3), (0, 0, 2))


def ids_of(kind: str, adapters: int, rows: int) -> torch.Tensor:
    """``[M, k]`` in which every adapter occurs, the last one too."""
    ids = torch.arange(rows) % (adapters + 1) - 1
    shuffled = ids[torch.randperm(rows, generator=torch.Generator().manual_seed(5))]
    if kind == "sorted":
        return ids.sort().values.unsqueeze(1)
    if kind == "pairs":  # the second is often the first again, or none
        return torch.stack([shuffled, torch.where(ids % 3 == 0, shuffled, ids), ids.flip(0)], 1)
    return shuffled.unsqueeze(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_without_an_adapter_have_the_frozen_layers_bits(backend, kind):
    dtype, adapter_dtype = KINDS[kind]
    problem = RoutedProblem.random(
        ids_of("unsorted", 6, 60), RANKS, 33, 29, dtype=dtype, adapter_dtype=adapter_dtype
    )
    base = problem.ids[:, 0] < 0
    y = run_routed(problem, backend)["y"]
    assert torch.equal(y[base], F.linear(problem.x, problem.weight, problem.bias)[base])
    alone = run_routed(problem.with_(weight=None, bias=None), backend)
    assert not alone["y"][base].any() and not alone["x"][base].any()
    assert alone["y"][~base].any(1).all() and alone["x"][~base].any(1).all()


def is_nan(results: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, result in results.items() if not torch.isfinite(result).all()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_in_an_adapter_that_no_token_uses(backend, dropout, whole, poison, poisoned_memory):
    ids = ids_of("pairs", 4, 40)
    problem = RoutedProblem.random(
        torch.where(ids == 1, 2, ids), [3, 5, 8, 2], 21, 17, with_weight=whole, weighted=True,
        dropout=dropout,
    )  # fmt: skip
    expected = run_routed(problem, backend)
    for factor in problem.adapters["a1"].pairs[0]:
        factor.fill_(poison)
    ours = run_routed(problem, backend)
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    assert "a2.lora_a" in ours and "a1.lora_a" not in ours and "a1.lora_b" not in ours


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["adapter", "x", "dy"])
@pytest.mark.parametrize("kind", ["fp32", "fp16_fp32_adapters", "bf16"])
def test_nan_stays_with_its_adapter(backend, what, kind):
    dtype, adapter_dtype = KINDS[kind]
    problem = RoutedProblem.random(
        ids_of("unsorted", 4, 60), [3, 5, 8, 2], 21, 17, dtype=dtype, adapter_dtype=adapter_dtype,
        with_weight=False, dropout=[0.0, 0.3, 0.2, 0.0],
    )  # fmt: skip
    expected = run_routed(problem, backend)
    rows = problem.ids[:, 0] == 1
    if what == "adapter":
        for factor in problem.adapters["a1"].pairs[0]:
            factor.fill_(float("nan"))
    else:
        getattr(problem, what)[rows] = float("nan")
    ours = run_routed(problem, backend)
    assert is_nan(ours) >= {"a1.lora_a"}
    for name in set(ours) - {"a1.lora_a", "a1.lora_b"}:
        if name in ("x", "y"):
            ours[name], expected[name] = ours[name][~rows], expected[name][~rows]
        assert torch.equal(ours[name], expected[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_padding_rows_reach_nobody(backend, whole, dropout):
    """x has ``max_tokens`` rows of which the routing uses the first."""
    problem = RoutedProblem.random(
        ids_of("pairs", 3, 20), [3, 5, 8], 21, 17, with_weight=whole, weighted=True, dropout=dropout
    )
    bank = problem.bank()
    routing = problem.routing(bank, max_tokens=27)
    parameters = list(bank.parameters())
    y = call_routed(problem, bank, backend, routing=routing)
    expected = torch.autograd.grad(y, parameters, problem.dy)
    padded = torch.full((27, 21), float("nan"))
    padded[:20] = problem.x
    y_padded = call_routed(problem, bank, backend, x=padded, routing=routing)
    dy = torch.full((27, 17), float("nan"))
    dy[:20] = problem.dy
    gradients = torch.autograd.grad(y_padded, parameters, dy)
    torch.testing.assert_close(y_padded[:20], y)
    assert whole or not y_padded[20:].any()
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


# --- memory -----------------------------------------------------------------------------------


def peak_bytes(function) -> int:
    """The most memory that torch held at once beyond what it held before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        result = function()
    del result
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["unsorted", "sorted"])
def test_memory_does_not_grow_with_the_number_of_adapters(dropout, kind):
    """Beyond the gradients of the adapters themselves; and nothing but x, y and h has M rows."""
    rows, columns = 512, 256

    def measure(count: int) -> int:
        ranks = [4] * count
        problem = RoutedProblem.random(ids_of(kind, count, rows), ranks, columns, columns,
                                       dropout=dropout)  # fmt: skip
        bank = problem.bank()
        routing = problem.routing(bank)
        x = problem.x.requires_grad_()
        parameters = list(bank.parameters())

        def step():
            y = routed_lora_linear(x, problem.weight, bank, routing, seed=problem.seed)
            return torch.autograd.grad(y, [x, *parameters], problem.dy)

        step()
        gradients = 4 * sum(p.numel() for p in parameters)
        return peak_bytes(step) - gradients

    few, many = measure(2), measure(64)
    assert many <= few + 4 * rows * 8
    assert few < 4 * rows * columns * (2 + 2)  # y, dx, and a group's rows of x and of a product


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_forward_alone_holds_one_group(dropout):
    rows, columns = 512, 256
    problem = RoutedProblem.random(ids_of("unsorted", 32, rows), [4] * 32, columns, columns,
                                   dropout=dropout)  # fmt: skip
    call = call_of(problem, problem.bank(), "composed")

    def step():
        return composed.forward(call)

    step()
    # A group has a 33rd of the rows: y itself, and some copies of so many rows.
    assert peak_bytes(step) < 1.5 * 4 * rows * columns


# --- out --------------------------------------------------------------------------------------


def placed(values: torch.Tensor, kind: str) -> torch.Tensor:
    """The same values in a tensor of other strides, of which nothing else is finite."""
    rows, columns = values.shape
    if kind == "columns_of_a_wider_one":
        wide = values.new_full((rows, columns + 5), torch.nan)
        view = wide[:, 2:-3]
    elif kind == "every_second_row":
        view = values.new_full((2 * rows, columns), torch.nan)[::2]
    elif kind == "transposed":
        view = values.new_empty(columns, rows).t()
    else:
        view = torch.empty_like(values)
    return view.copy_(values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16_fp32_adapters"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(
    "strides", ["contiguous", "columns_of_a_wider_one", "every_second_row", "transposed"]
)
@pytest.mark.parametrize("routing", ["unsorted", "sorted", "pairs"])
@pytest.mark.parametrize("sliced", [False, True], ids=["", "sliced"])
def test_out_in_place(backend, kind, grad, strides, routing, sliced):
    dtype, adapter_dtype = KINDS[kind]
    ranks = SLICED_RANKS if sliced else (3, 5, 24)
    p = RoutedProblem.random(
        ids_of(routing, len(ranks), 120), ranks, 21, (7, 50, 23) if sliced else 80, dtype=dtype,
        adapter_dtype=adapter_dtype, with_weight=False, with_out=True, weighted=routing == "pairs",
    )  # fmt: skip
    p.ids[::11] = -1
    base = (p.ids < 0).all(1)
    out = placed(p.out, strides)
    bank = p.bank()
    with torch.set_grad_enabled(grad):
        returned = routed_lora(p.x, bank, p.routing(bank), out, backend=backend)
    assert returned is out
    assert_within_policy("y", out.detach(), routed_eager(p)["y"], routed_oracle(p)["y"], dtype)
    assert torch.equal(out.detach()[base], p.out[base])
    if not grad:  # what out is a view of holds out's values and nothing else
        assert (out if out._base is None else out._base).isfinite().sum() == p.out.numel()


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_rows_of_out_without_an_adapter_keep_their_bits(grad):
    """A negative zero too, which adding zero would turn into a positive one."""
    p = RoutedProblem.random([-1, 0, -1], (3,), 21, 17, with_weight=False)
    bank, out = p.bank(), torch.full((3, 17), -0.0)
    with torch.set_grad_enabled(grad):
        routed_lora(p.x, bank, p.routing(bank), out, backend="composed")
    assert out.detach()[[0, 2]].signbit().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_with_leading_dimensions(backend):
    p = RoutedProblem.random(
        ids_of("unsorted", 3, 24), (3, 5, 8), 21, 17, with_weight=False, with_out=True
    )
    bank = p.bank()
    routing = p.routing(bank)
    expected = routed_lora(p.x, bank, routing, p.out.clone(), backend=backend)
    x, out = p.x.view(2, 12, 21), torch.full((2, 12, 20), torch.nan)[..., :17]
    out.copy_(p.out.view(2, 12, 17))
    assert routed_lora(x, bank, routing, out, backend=backend) is out
    assert torch.equal(out.reshape(24, 17), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_through_out(backend):
    """Into a layer's output, as an engine does it; a leaf that requires grad is refused."""
    p = RoutedProblem.random(
        ids_of("unsorted", 3, 24), (3, 5, 8), 21, 17, with_weight=False, with_out=True
    )
    bank = p.bank()
    routing = p.routing(bank)
    x, out = p.x.requires_grad_(), p.out.requires_grad_()
    y = routed_lora(x, bank, routing, out.sin(), backend=backend)
    gradients = torch.autograd.grad(y, [x, out, *bank.parameters()], p.dy)
    alone = routed_lora(x, bank, routing, backend=backend)
    expected = torch.autograd.grad(alone, [x, *bank.parameters()], p.dy)
    assert torch.equal(gradients[1], p.dy * out.detach().cos())
    rest = (gradients[0], *gradients[2:])
    assert all(torch.equal(a, b) for a, b in zip(rest, expected, strict=True))
    with pytest.raises(RuntimeError, match="leaf Variable"):
        routed_lora(x, bank, routing, out, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("half", [False, True], ids=["routed_lora", "routed_expand"])
def test_autograd_knows_that_out_has_changed(backend, half):
    p = RoutedProblem.random([0, -1, 0], (3,), 21, 17, with_weight=False)
    bank = p.bank()
    routing = p.routing(bank)
    out = torch.ones(3, 17)
    saved = (out * torch.ones(3, 17, requires_grad=True)).sum()
    with torch.no_grad():
        if half:
            h = routed_shrink(p.x, bank, routing, backend=backend)
            routed_expand(h, bank, routing, out, backend=backend)
        else:
            routed_lora(p.x, bank, routing, out, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


# --- the halves -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sliced", [False, True], ids=["", "sliced"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_halves_are_the_whole(backend, kind, sliced, dropout, poisoned_memory):
    if backend == "native" and kind == "fp64":
        pytest.skip("the compiled kernels do not take fp64")
    dtype, adapter_dtype = KINDS[kind]
    ranks = SLICED_RANKS if sliced else (3, 5, 24, 64)
    p = RoutedProblem.random(
        ids_of("pairs", len(ranks), 200), ranks, 91, (66, 71, 90) if sliced else 80, dtype=dtype,
        adapter_dtype=adapter_dtype, with_weight=False, weighted=True, dropout=dropout,
    )  # fmt: skip
    bank = p.bank()
    x, weights = p.x.requires_grad_(), p.weights.requires_grad_()
    routing = Routing.from_weighted(p.ids, weights, bank)
    h = routed_shrink(x, bank, routing, seed=p.seed, backend=backend)
    y = routed_expand(h, bank, routing, dtype=dtype, backend=backend)
    named = {n.removeprefix("adapters."): q for n, q in bank.named_parameters()}
    leaves = {"x": x, "weights": weights, **named}
    gradients = torch.autograd.grad(y, list(leaves.values()), p.dy)
    plain = p.with_(x=x.detach(), weights=weights.detach())
    eager, oracle = routed_eager(plain), routed_oracle(plain)
    ours = {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}
    assert ours.keys() == oracle.keys()
    for name, result in ours.items():
        assert_within_policy(name, result, eager[name], oracle[name], dtype)
    with torch.no_grad():
        h = routed_shrink(x, bank, routing, seed=p.seed, backend=backend)
        assert torch.equal(routed_expand(h, bank, routing, dtype=dtype, backend=backend), y)
        out = torch.zeros_like(y)
        assert routed_expand(h, bank, routing, out, backend=backend) is out
    assert_within_policy("out", out, eager["y"], oracle["y"], dtype)


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("sliced", [False, True], ids=["", "sliced"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_h_is_what_it_says(backend, sliced, dropout, poisoned_memory):
    """Found through the inverse map: the pairs of a token, zero beyond the rank and for none."""
    ranks = SLICED_RANKS if sliced else (3, 5, 24)
    p = RoutedProblem.random(
        ids_of("pairs", len(ranks), 40), ranks, 21, (7, 5, 9) if sliced else 17,
        dtype=torch.float64, dropout=dropout,
    )  # fmt: skip
    bank = p.bank()
    routing = p.routing(bank, max_tokens=44)
    h = routed_shrink(p.x, bank, routing, seed=p.seed, backend=backend)
    widest = max(sum(r) if sliced else r for r in ranks)
    assert h.shape == (44 * 3, widest) and h.dtype == torch.float64
    inverse = routing.tensors(with_plan=False).inverse.view(44, 3)
    by_slot = {a.slot: a for a in p.adapters.values()}
    for m in range(44):
        for j in range(3):
            expected = torch.zeros(widest, dtype=torch.float64)
            adapter = by_slot.get(p.ids[m, j].item() if m < 40 else -1)
            if adapter is not None:
                row = p.x[m] * keep_factor(adapter, p.seed, *p.x.shape)[m]
                narrow = torch.cat([pair[0] @ row for pair in adapter.pairs if pair])
                expected[: len(narrow)] = narrow
                assert expected[len(narrow) :].any().logical_not()
            actual = h[inverse[m, j]].detach()
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
            assert adapter is not None or not actual.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_of_h_beyond_the_rank_are_not_read(backend):
    """The widest rank may be another adapter's; its columns may hold anything."""
    p = RoutedProblem.random(ids_of("unsorted", 2, 12), (3, 9), 21, 17, with_weight=False)
    bank = p.bank()
    routing = p.routing(bank)
    h = routed_shrink(p.x, bank, routing, backend=backend).detach()
    expected = routed_expand(h, bank, routing, backend=backend)
    tensors = routing.tensors(with_plan=False)
    start, end, none = tensors.offsets[0], tensors.offsets[1], tensors.offsets[-2]
    h[start:end, 3:] = float("nan")
    h[none:] = float("nan")
    h.requires_grad_()
    actual = routed_expand(h, bank, routing, backend=backend)
    assert torch.equal(actual, expected)
    (t,) = torch.autograd.grad(actual, h, p.dy)
    assert torch.isfinite(t).all()
    assert not t[start:end, 3:].any() and not t[none:].any() and t[start:end, :3].all()


# --- dropout ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [False, True], ids=["bank_eval", "adapters_eval"])
def test_evaluation_draws_nothing_and_drops_nothing(backend, training):
    p = RoutedProblem.random(ids_of("unsorted", 3, 24), (3, 5, 8), 21, 17, dropout=0.5)
    bank = p.bank()
    if training:
        for name in bank:
            bank[name].eval()
    else:
        bank.eval()
    routing = p.routing(bank)
    state = torch.get_rng_state()
    y = call_routed(p.with_(seed=None), bank, backend, routing=routing)
    h = routed_shrink(p.x, bank, routing, backend=backend)
    assert torch.equal(torch.get_rng_state(), state)
    for name in p.adapters:
        p = p.with_adapter(name, dropout_p=0.0)
    bank = p.bank()
    assert torch.equal(y, call_routed(p, bank, backend))
    assert torch.equal(h, routed_shrink(p.x, bank, p.routing(bank), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_manual_seed_reproduces_and_calls_differ(backend):
    p = RoutedProblem.random(ids_of("unsorted", 3, 24), (3, 5, 8), 21, 17, dropout=[0, 0.5, 0.5])
    bank, p = p.bank(), p.with_(seed=None)
    torch.manual_seed(1)
    first, second = call_routed(p, bank, backend), call_routed(p, bank, backend)
    torch.manual_seed(1)
    assert torch.equal(call_routed(p, bank, backend), first)
    rows = (p.ids[:, 0] == 1) | (p.ids[:, 0] == 2)
    assert torch.equal(first[~rows], second[~rows]), "p is 0 there"
    assert (first[rows] != second[rows]).any(1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_adapter_of_a_token_has_a_mask_of_its_own(backend):
    """The same values under two names: only the slot tells their masks apart."""
    p = RoutedProblem.random([[0, 1]] * 6, (64, 64), 64, 64, with_weight=False, dropout=0.5)
    p = p.with_adapter("a1", pairs=p.adapters["a0"].pairs, scaling=p.adapters["a0"].scaling)
    bank = p.bank()
    one, other = (
        routed_lora(p.x, bank, Routing.from_tokens([slot] * 6, bank), seed=p.seed, backend=backend)
        for slot in (0, 1)
    )
    assert (one != other).any(1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_train_eval_and_p_change_between_calls(backend):
    p = RoutedProblem.random(ids_of("unsorted", 2, 24), (3, 5), 21, 17, dropout=[0.5, 0.25])
    bank = p.bank()
    routing = p.routing(bank)

    def call():
        return call_routed(p, bank, backend, routing=routing).detach()

    def expected(**of_a1):
        changed = p.with_adapter("a1", **of_a1)
        return run_routed(changed, backend, ())["y"]

    assert torch.equal(call(), expected())
    bank["a1"].eval()
    assert torch.equal(call(), expected(training=False))
    bank["a1"].train()
    bank["a1"].dropout_p = 0.75
    assert torch.equal(call(), expected(dropout_p=0.75))
    bank["a1"].dropout_p = 0.0
    assert torch.equal(call(), expected(dropout_p=0.0))
    bank["a1"].dropout_p = math.nextafter(1.0, 0.0)
    assert torch.equal(call(), expected(dropout_p=math.nextafter(1.0, 0.0)))
    bank["a1"].scaling = -2.5
    bank["a1"].dropout_p = 0.25
    assert torch.equal(call(), expected(scaling=-2.5))
    bank["a1"].scaling = torch.tensor(0.375)
    assert torch.equal(call(), expected(scaling=0.375))
