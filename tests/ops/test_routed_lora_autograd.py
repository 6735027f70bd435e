"""routed_lora as torch sees it: op registration, checkpointing, what is saved."""

import itertools
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from routed_calls import OPS, call_of, op, operands
from routed_results import BACKENDS, call_routed, run_routed
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels.ops.routed import (
    AdapterBank,
    Routing,
    explain,
    routed_expand,
    routed_lora_linear,
    routed_shrink,
)
from lora_kernels.ops.routed.call import Needs
from lora_kernels.runtime.dropout import MaskPlace
from lora_kernels.testing.routed_inputs import RoutedProblem

IDS = [[2, 0], [0, -1], [1, 1], [-1, -1], [0, 2], [2, 2], [-1, 1]]


def problem_of(dropout: float = 0.0, sliced: bool = False, **options) -> RoutedProblem:
    ranks = [(3, 0), (0, 5), (1, 2)] if sliced else [3, 5, 1]
    options = {"weighted": True, **options}
    widths = (6, 7) if sliced else 13
    return RoutedProblem.random(IDS, ranks, 21, widths, dropout=dropout, **options)


def differentiable_call(p: RoutedProblem, backend: str, requires_grad: bool, **changes):
    bank = p.bank().requires_grad_(requires_grad)
    for tensor in (p.x, p.bias, p.weights):
        if tensor is not None:
            tensor.requires_grad_(requires_grad)
    return call_of(p, bank, backend, **changes)


def opcheck(name: str, call, **options) -> None:
    torch.library.opcheck(op(name), operands(name, call), **options)


# The part is of an activation whose width is no multiple of 8 either.
PLACES = {"whole": MaskPlace(), "part": MaskPlace(5, 16, 77)}
each_place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("dropout, sliced, whole", [(0.0, False, True), (0.3, True, False)])
@each_place
def test_opcheck_of_routed_lora(backend, requires_grad, dropout, sliced, whole, place):
    p = problem_of(dropout, sliced, with_weight=whole)
    opcheck("routed_lora", differentiable_call(p, backend, requires_grad, place=place))


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no_grad"])
@each_place
def test_opcheck_of_the_halves(backend, requires_grad, place):
    p = problem_of(0.3, sliced=True)
    call = differentiable_call(p, backend, requires_grad, place=place)
    opcheck("routed_shrink", call)
    call.h = torch.randn(14, call.bank.max_total_rank, requires_grad=requires_grad)
    call.rows, call.dtype = 7, torch.float32
    opcheck("routed_expand", call)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@each_place
def test_opcheck_of_the_inner_ops(backend, place):
    p = problem_of(0.3, sliced=True, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    call = call_of(p, p.bank(), backend, place=place, dy=p.dy)

    def check(name: str, call):
        # They are not differentiated: what is left is the schema and the fake kernel.
        opcheck(name, call, test_utils=("test_schema", "test_faketensor"))

    check("routed_lora_forward", call)
    check("routed_shrink_forward", call)
    forward = "routed_lora_forward"
    _, call.h, call.mask = op(forward)(*operands(forward, call))
    assert call.mask.numel() and call.h.any()
    call.out = torch.zeros_like(p.dy)
    check("routed_lora_", call)
    check("routed_expand_", call)
    for needs in itertools.product([True, False], repeat=3):
        call.needs = Needs(*needs)
        check("routed_lora_backward", call)
        check("routed_expand_backward", call)
        check("routed_shrink_backward", replace(call, dy=call.h))


def test_these_are_all_ops():
    """Whoever adds one checks it above."""
    registered = {
        name.removeprefix("lora_kernels::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("lora_kernels::routed_")
    }
    assert registered == set(OPS) and len(OPS) == 10


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("name", OPS[:3])
def test_an_op_that_gets_copies_of_its_arguments_trains_them(name, backend):
    """The bank's own factors lie where the offsets lead, and hold something else by then."""
    p = problem_of(0.3, sliced=True)
    bank = p.bank()
    h = torch.randn(14, bank.tensors().max_total_rank)
    call = differentiable_call(p, backend, True, h=h, rows=7, dtype=torch.float32)
    expected = results_and_gradients(name, call)
    original = call.bank
    call.bank = original._replace(
        storage=original.storage.clone(), factors=[factor.clone() for factor in original.factors]
    )
    for factor in original.factors:
        factor.detach().fill_(torch.nan)
    ours = results_and_gradients(name, call)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def results_and_gradients(name: str, call) -> list[torch.Tensor]:
    y = op(name)(*operands(name, call))
    leaves = [leaf for leaf in call.trained.parameters if leaf.requires_grad]
    gradients = torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)
    return [y.detach(), *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("half", [False, True], ids=["whole", "shrink"])
def test_no_result_of_an_op_holds_uninitialised_memory(half, poisoned_memory, monkeypatch):
    """Rows of the mask that nobody reads neither: results would differ from run to run."""
    p = problem_of(0.3, with_weight=False)
    call = call_of(p, p.bank(), "composed")
    name = "routed_shrink_forward" if half else "routed_lora_forward"

    def run():
        return op(name)(*operands(name, call))

    poisoned = run()
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    assert all(torch.equal(a, b) for a, b in zip(poisoned, run(), strict=True))


# --- checkpointing and seeds ------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "composed"])
@pytest.mark.parametrize("recomputed", [True, False], ids=["the recomputation", "the forward"])
def test_checkpointing_of_which_one_part_is_under_a_mode(recomputed, backend):
    p = RoutedProblem.random([0, 0, 1, -1, 2], (1, 3, 5), 43, 29, dropout=0.3)
    bank, x = p.bank(), p.x.requires_grad_()
    routing = p.routing(bank)

    def run(x):
        return call_routed(p, bank, backend, x=x, routing=routing)

    (expected,) = torch.autograd.grad(run(x), x, p.dy)
    with nullcontext() if recomputed else FlopCounterMode(display=False):
        y = checkpoint(run, x, use_reentrant=False)
    with FlopCounterMode(display=False) if recomputed else nullcontext():
        (found,) = torch.autograd.grad(y, x, p.dy)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_replays_the_masks(backend, use_reentrant):
    p = problem_of(0.5).with_(seed=None)
    bank = p.bank()
    leaves = [p.x.requires_grad_(), p.weights.requires_grad_(), *bank.parameters()]
    routing = Routing.from_weighted(p.ids, p.weights, bank)

    def run(wrap):
        torch.manual_seed(11)
        y = wrap(lambda x: call_routed(p, bank, backend, x=x, routing=routing).tanh(), p.x)
        y.backward(p.dy)
        gradients = [tensor.grad.clone() for tensor in leaves]
        for tensor in leaves:
            tensor.grad = None
        return y, gradients

    plain = run(lambda f, x: f(x))
    replayed = run(lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant))
    assert torch.equal(plain[0], replayed[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], replayed[1], strict=True))


# --- meta tensors, saved tensors ---------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("sliced", [False, True], ids=["", "sliced"])
def test_meta_tensors(dropout, sliced):
    p = problem_of(dropout, sliced, device="meta")
    ids = p.ids.to("meta")
    bank = p.bank()
    weights = p.weights.requires_grad_()
    routing = Routing.from_weighted(ids, weights, bank)
    named = {"x": p.x.requires_grad_(), "bias": p.bias.requires_grad_(), "weights": weights}
    named |= dict(bank.named_parameters())
    y = call_routed(p, bank, "composed", routing=routing)
    assert y.is_meta and y.shape == (7, 13)
    gradients = torch.autograd.grad(y, list(named.values()), p.dy)
    for (name, tensor), gradient in zip(named.items(), gradients, strict=True):
        assert gradient.is_meta, name
        assert (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype), name
    h = routed_shrink(p.x, bank, routing, seed=p.seed, backend="composed")
    assert h.shape == (14, bank.tensors().max_total_rank)
    assert routed_expand(h, bank, routing, backend="composed").shape == (7, 13)
    assert explain(p.x, bank, routing).backend == "composed"


def saved_tensors(function) -> list[torch.Tensor]:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function()
    return saved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_saved_tensors(dtype, dropout):
    """x itself, the weight, h, the parameters, the seed and a bit per element: nothing else."""
    rows, columns = 96, 203
    p = RoutedProblem.random(
        torch.arange(rows) % 4 - 1, [3, 9, 1], columns, 64, dtype=dtype,
        adapter_dtype=torch.float32, dropout=dropout,
    )  # fmt: skip
    bank = p.bank()
    routing = p.routing(bank)
    x, fields = p.x.requires_grad_(), routing.tensors(with_plan=True)
    saved = saved_tensors(lambda: call_routed(p, bank, "composed", routing=routing))
    given = {t.data_ptr() for t in (x, p.weight, *bank.parameters())}
    assert given <= {t.data_ptr() for t in saved}, "saved as given, not as copies"
    known = given | {
        t.data_ptr() for t in (*fields, *bank.tensors()) if isinstance(t, torch.Tensor)
    }
    own = [t for t in saved if t.data_ptr() not in known and t.numel() > 1]
    expected = [rows * 9 * dtype.itemsize]  # h; a CPU's bf16 product comes out rounded
    if dropout:
        expected.append(rows * math.ceil(columns / 8))
    assert sorted(t.numel() * t.element_size() for t in own) == sorted(expected)


def test_saves_only_what_the_needed_gradients_read():
    p = RoutedProblem.random(torch.arange(96) % 4 - 1, [3, 9, 1], 203, 64)
    bank = p.bank().requires_grad_(False)
    x = p.x.requires_grad_()

    def shapes():
        return [
            tuple(t.shape) for t in saved_tensors(lambda: call_routed(p, bank, "composed", x=x))
        ]

    assert (96, 203) not in shapes() and (96, 9) not in shapes()
    bank["a1"].lora_b.requires_grad_()
    assert (96, 203) not in shapes() and (96, 9) in shapes()
    bank["a1"].lora_b.requires_grad_(False)
    bank["a1"].lora_a.requires_grad_()
    assert (96, 203) in shapes() and (96, 9) not in shapes()


def test_non_contiguous_x_is_saved_as_it_is():
    p = problem_of()
    bank, x = p.bank(), p.x.t().contiguous().t().requires_grad_()
    saved = saved_tensors(lambda: call_routed(p, bank, "composed", x=x))
    assert x.data_ptr() in {t.data_ptr() for t in saved}


def test_a_change_of_x_in_place_is_noticed():
    p = problem_of()
    y = call_routed(p, p.bank(), "composed")
    p.x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inner_ops_refuse_gradients():
    p = problem_of()
    p.x.requires_grad_()
    call = call_of(p, p.bank(), "composed", out=torch.zeros(7, 13))
    for name in ("routed_lora_forward", "routed_lora_"):
        with pytest.raises(RuntimeError, match=f"{name} is not differentiable; routed_lora is"):
            op(name)(*operands(name, call))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_backward_runs_twice_and_under_autocast(backend, dropout):
    p = problem_of(dropout)
    bank = p.bank()
    leaves = [p.x.requires_grad_(), *bank.parameters()]
    y = call_routed(p, bank, backend)
    first = torch.autograd.grad(y, leaves, p.dy, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        second = torch.autograd.grad(y, leaves, p.dy)
    if backend == "composed":  # eager torch itself computes a backward in autocast's dtype
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_can_be_changed_in_place(backend):
    p = problem_of()
    bank, x = p.bank(), p.x.requires_grad_()
    plain = torch.autograd.grad(call_routed(p, bank, backend), [x, *bank.parameters()], p.dy)
    y = call_routed(p, bank, backend).mul_(2)
    doubled = torch.autograd.grad(y, [x, *bank.parameters()], p.dy)
    assert all(torch.equal(a, 2 * b) for a, b in zip(doubled, plain, strict=True))


@pytest.mark.parametrize("kind", ["expanded", "transposed", "scalar_of_a_sum"])
def test_incoming_gradients_of_any_stride(kind):
    p = problem_of()
    bank, x = p.bank(), p.x.requires_grad_()
    leaves = [x, *bank.parameters()]
    dy = {
        "expanded": torch.randn(1, 13).expand(7, 13),
        "transposed": torch.randn(13, 7).t(),
        "scalar_of_a_sum": torch.ones(()).expand(7, 13),
    }[kind]
    y = call_routed(p, bank, "composed")
    actual = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    expected = torch.autograd.grad(y, leaves, dy.contiguous())
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_gradients_of_parameters_under_anomaly_detection_and_threads():
    """Anomaly detection looks for NaN in everything a backward returns, also what nobody needs."""
    p = problem_of(sliced=True)
    expected = run_routed(p, "composed")
    with torch.autograd.detect_anomaly(check_nan=True):
        actual = run_routed(p, "composed")
    assert all(torch.equal(actual[n], expected[n]) for n in expected)


def test_grad_scaler_trains_fp16_from_zero_b():
    """Two adapters learn two targets in fp16 under autocast: B leaves zero, both losses fall."""
    bank = AdapterBank(32, 24)
    for name in ("a", "b"):
        bank.add(name, torch.randn(4, 32) / 32**0.5, torch.zeros(24, 4), 2.0)
    weight, x = torch.randn(24, 32) / 32**0.5, torch.randn(64, 32)
    ids = torch.arange(64) % 2
    change = 0.3 * torch.randn(2, 24, 32) / 32**0.5
    target = torch.einsum("mk,mnk->mn", x, weight + change[ids])
    routing = Routing.from_tokens(ids, bank)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.AdamW(bank.parameters(), lr=2e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            y = routed_lora_linear(x, weight, bank, routing)
        each = (y.float() - target).square().mean(1)
        losses.append((each[ids == 0].mean().item(), each[ids == 1].mean().item()))
        scaler.scale(each.mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all(bank[name].lora_b.abs().max() > 1e-3 for name in bank)
    assert all(last < 0.6 * first for first, last in zip(losses[0], losses[-1], strict=True))
