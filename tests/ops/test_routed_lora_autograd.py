"""routed_lora as torch sees it: op registration, checkpointing, what is saved."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lora_kernels.ops.routed import (
    AdapterBank,
    Routing,
    explain,
    routed_expand,
    routed_lora_linear,
    routed_shrink,
)
from lora_kernels.testing.routed_inputs import BACKENDS, RoutedProblem, call_routed, run_routed

OPS = torch.ops.lora_kernels
IDS = [[2, 0], [0, -1], [1, 1], [-1, -1], [0, 2], [2, 2], [-1, 1]]


def problem_of(dropout: float = 0.0, sliced: bool = False, **options) -> RoutedProblem:
    ranks = [(3, 0), (0, 5), (1, 2)] if sliced else [3, 5, 1]
    options = {"weighted": True, **options}
    widths = (6, 7) if sliced else 13
    return RoutedProblem.random(IDS, ranks, 21, widths, dropout=dropout, **options)


def parts_of(p: RoutedProblem, requires_grad: bool):
    """The bank and the routing as an op takes them, and the parameters."""
    bank = p.bank().requires_grad_(requires_grad)
    for tensor in (p.x, p.bias, p.weights):
        if tensor is not None:
            tensor.requires_grad_(requires_grad)
    routing = p.routing(bank)
    tensors, fields = bank.tensors(), routing.tensors(with_plan=True)
    return bank, (*tensors, *fields), *bank.gradients(routing.trained_slots())


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("dropout, sliced, whole", [(0.0, False, True), (0.3, True, False)])
def test_opcheck_of_routed_lora(backend, requires_grad, dropout, sliced, whole):
    p = problem_of(dropout, sliced, with_weight=whole)
    _, context, layout, parameters = parts_of(p, requires_grad)
    torch.library.opcheck(
        OPS.routed_lora.default,
        (*context, *layout, p.x, p.weight, p.bias, p.seed, backend, *parameters),
    )


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no_grad"])
def test_opcheck_of_the_halves(backend, requires_grad):
    p = problem_of(0.3, sliced=True)
    bank, context, layout, parameters = parts_of(p, requires_grad)
    torch.library.opcheck(
        OPS.routed_shrink.default, (*context, *layout, p.x, p.seed, backend, *parameters)
    )
    h = torch.randn(14, bank.tensors().max_total_rank, requires_grad=requires_grad)
    torch.library.opcheck(
        OPS.routed_expand.default,
        (*context, *layout, h, 7, torch.float32, backend, *parameters),
    )


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_opcheck_of_the_inner_ops(backend):
    p = problem_of(0.3, sliced=True, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    bank = p.bank()
    context = (*bank.tensors(), *p.routing(bank).tensors(with_plan=True))
    layout, _ = bank.gradients(None)

    def check(name: str, *arguments):
        # They are not differentiated: what is left is the schema and the fake kernel.
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(getattr(OPS, name).default, (*context, *arguments), test_utils=tests)

    check("routed_lora_forward", p.x, p.weight, p.bias, p.seed, backend)
    check("routed_shrink_forward", p.x, p.seed, backend)
    _, h, mask = OPS.routed_lora_forward(*context, p.x, p.weight, p.bias, p.seed, backend)
    for needs in ([True] * 3, [False] * 3, [False, True, True], [True, False, False]):
        operands = (p.dy, p.x, p.weight, h, mask, p.seed, 21, needs)
        check("routed_lora_backward", *layout, *operands, backend)
    for needs in ([True, True], [False, False], [True, False], [False, True]):
        check("routed_expand_backward", *layout, p.dy, h, needs, backend)
        check("routed_shrink_backward", *layout, h, p.x, mask, p.seed, needs[0], backend)
    out = torch.zeros_like(p.dy)
    check("routed_lora_", out, p.x, p.seed, backend)
    check("routed_expand_", out, h, backend)


@pytest.mark.parametrize("half", [False, True], ids=["whole", "shrink"])
def test_no_result_of_an_op_holds_uninitialised_memory(half, poisoned_memory, monkeypatch):
    """Rows of the mask that nobody reads neither: results would differ from run to run."""
    p = problem_of(0.3)
    bank = p.bank()
    context = (*bank.tensors(), *p.routing(bank).tensors(with_plan=True))

    def run():
        if half:
            return OPS.routed_shrink_forward(*context, p.x, p.seed, "composed")
        return OPS.routed_lora_forward(*context, p.x, None, None, p.seed, "composed")

    poisoned = run()
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    assert all(torch.equal(a, b) for a, b in zip(poisoned, run(), strict=True))


# --- checkpointing and seeds ------------------------------------------------------------------


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
    bank = p.bank()
    context = (*bank.tensors(), *p.routing(bank).tensors(with_plan=True))
    with pytest.raises(RuntimeError, match="routed_lora_forward is not differentiable; routed_lo"):
        OPS.routed_lora_forward(*context, p.x.requires_grad_(), None, None, None, "composed")
    with pytest.raises(RuntimeError, match="routed_lora_ is not differentiable"):
        OPS.routed_lora_(*context, torch.zeros(7, 13), p.x, None, "composed")


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
