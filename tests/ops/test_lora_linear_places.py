"""Where x stands in a whole activation: a slice drops what the whole one drops, and all follows."""

from contextlib import nullcontext

import pytest
import torch
import torch._dynamo.testing
from linear_calls import (
    BACKWARD,
    FORWARD,
    OP,
    backward_of,
    backward_operands,
    call_of,
    forward_operands,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import explain, lora_linear
from lora_kernels.ops.linear import composed, cpu, op
from lora_kernels.ops.linear.plan import PLANS
from lora_kernels.ops.narrow import masks
from lora_kernels.runtime import cpu_extension as native
from lora_kernels.runtime import dropout
from lora_kernels.runtime.dropout import MaskPlace, keep_mask
from lora_kernels.testing import LoRAProblem, run_forward_backward

BACKENDS = ["reference", "composed", *([] if native.missing() else ["native"])]
M, K, N, R, P = 40, 88, 24, 3, 0.5
SEED = torch.tensor(-0x1234_5678_9ABC_DEF1)
SLICES = {
    "whole": (slice(0, M), slice(0, K)),
    "rows": (slice(7, 29), slice(0, K)),
    "one row": (slice(M - 1, M), slice(0, K)),
    "columns": (slice(0, M), slice(16, 56)),
    "last columns": (slice(0, M), slice(80, 88)),
    "columns that end within a group": (slice(0, M), slice(8, 45)),
    "both": (slice(5, 31), slice(24, 75)),
}
# Rows before the whole one: none, few, and so many that its groups cross 2**32.
BEFORE = {"": 0, "few": 13, "past 2**32": 2**32 // 11 - 20}


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def whole_numbers(p: float = P) -> LoRAProblem:
    """Whole numbers so small that every product and sum is exact in fp32, in any order."""
    generator = torch.Generator().manual_seed(9)

    def small(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).float()

    return LoRAProblem(
        x=small(M, K), weight=small(N, K), lora_a=small(R, K), lora_b=small(N, R),
        scaling=torch.tensor(0.5, dtype=torch.float64), bias=small(N), output_scale=small(N),
        dropout_p=p, seed=SEED if p else None, dy=small(M, N),
    )  # fmt: skip


def of_slice(problem: LoRAProblem, rows: slice, columns: slice) -> LoRAProblem:
    return problem.with_(
        x=problem.x[rows, columns], weight=problem.weight[:, columns],
        lora_a=problem.lora_a[:, columns], dy=problem.dy[rows],
    )  # fmt: skip


def placed(backend: str, place: MaskPlace):
    def function(**inputs):
        return lora_linear(**inputs, **place._asdict(), backend=backend)

    return function


def by_hand(problem: LoRAProblem, keep: Tensor) -> dict[str, Tensor]:
    """The formula in fp64 with a mask that is given."""
    p = problem.double()
    names = ("x", "lora_a", "lora_b", "bias", "output_scale")
    leaves = {name: getattr(p, name).requires_grad_() for name in names}
    kept = torch.where(keep, p.x * 2, 0)
    y = p.x @ p.weight.t() + p.scaling * (kept @ p.lora_a.t() @ p.lora_b.t())
    y = p.output_scale * y + p.bias
    grads = torch.autograd.grad(y, list(leaves.values()), p.dy)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize("way", ["eager", "op", "op backward", "compiled", "again"])
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("place", SLICES)
def test_a_slice_drops_what_the_whole_one_drops(place, before, way, backend):
    rows, columns = SLICES[place]
    whole_mask = keep_mask(SEED, P, M, K, place=MaskPlace(BEFORE[before]))
    assert 0.4 < whole_mask.double().mean() < 0.6
    problem = of_slice(whole_numbers(), rows, columns)
    at = MaskPlace(BEFORE[before] + rows.start, columns.start, K)
    function = placed(backend, at)
    if way == "compiled":
        if before or place not in ("rows", "both"):
            return
        torch._dynamo.reset()
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    if way == "op backward":
        function = in_a_mode(function)
    with FlopCounterMode(display=False) if way == "op" else nullcontext():
        for _ in range(2 if way == "again" else 1):
            ours = run_forward_backward(function, problem)
    expected = by_hand(problem, whole_mask[rows, columns])
    assert ours.keys() == expected.keys()
    for name, result in ours.items():
        assert torch.equal(result.double(), expected[name]), name


def in_a_mode(function):
    def forward(**inputs):
        with FlopCounterMode(display=False):
            return function(**inputs)

    return forward


def test_parts_of_rows_and_of_columns_make_the_whole(backend):
    """As of a sequence and a tensor parallel layer: their sums and joins are exact."""
    problem = whole_numbers().with_(bias=None, output_scale=None)
    whole = run_forward_backward(placed(backend, MaskPlace()), problem)
    by_rows = [
        run_forward_backward(
            placed(backend, MaskPlace(start)), of_slice(problem, slice(start, stop), slice(0, K))
        )
        for start, stop in ((0, 9), (9, 10), (10, M))
    ]
    by_columns = [
        run_forward_backward(
            placed(backend, MaskPlace(0, start, K)),
            of_slice(problem, slice(0, M), slice(start, stop)),
        )
        for start, stop in ((0, 16), (16, 72), (72, K))
    ]
    for name in ("y", "x"):
        assert torch.equal(torch.cat([part[name] for part in by_rows]), whole[name])
    for name in ("lora_a", "lora_b"):
        assert torch.equal(sum(part[name] for part in by_rows), whole[name])
    for name in ("x", "lora_a"):
        assert torch.equal(torch.cat([part[name] for part in by_columns], 1), whole[name])
    for name in ("y", "lora_b"):
        assert torch.equal(sum(part[name] for part in by_columns), whole[name])


@pytest.mark.parametrize("leading", [(5, 8), (2, 4, 5)], ids=str)
def test_rows_are_counted_over_all_leading_dimensions(leading, backend):
    problem, at = whole_numbers(), MaskPlace(6, 0, None)
    flat = run_forward_backward(placed(backend, at), problem)
    shaped = problem.with_(x=problem.x.view(*leading, K), dy=problem.dy.view(*leading, N))
    ours = run_forward_backward(placed(backend, at), shaped)
    for name in flat:
        assert torch.equal(ours[name].view(flat[name].shape), flat[name]), name


def test_the_place_of_the_whole_is_none(backend):
    """0, 0 and K, said or not: the same bits; and without dropout no place makes a difference."""
    problem = LoRAProblem.random((9,), 21, 13, 3, dropout_p=0.3)
    expected = run_forward_backward(placed(backend, MaskPlace()), problem)
    for place in (MaskPlace(0, 0, 21), MaskPlace(pitch=24)):  # as many groups of 8
        found = run_forward_backward(placed(backend, place), problem)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    other = run_forward_backward(placed(backend, MaskPlace(1)), problem)
    assert not torch.equal(other["y"], expected["y"])
    problem = problem.with_(dropout_p=0.0)
    expected = run_forward_backward(placed(backend, MaskPlace()), problem)
    found = run_forward_backward(placed(backend, MaskPlace(3, 8, 64)), problem)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("before", BEFORE)
def test_second_derivatives(before):
    """With the mask that was stored, and with one that is drawn again."""
    rows, columns = SLICES["both"]
    at = MaskPlace(BEFORE[before] + rows.start, columns.start, K)
    problem = of_slice(whole_numbers(), rows, columns)
    keep = keep_mask(SEED, P, M, K, place=MaskPlace(BEFORE[before]))[rows, columns]
    p = problem.double()

    def penalty(function) -> list[Tensor]:
        leaves = [getattr(p, name).detach().requires_grad_() for name in ("x", "lora_a", "lora_b")]
        first = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    def ours(x, a, b):
        return lora_linear(x, p.weight, a, b, 0.5, dropout_p=P, seed=SEED, **at._asdict())

    def expected(x, a, b):
        return x @ p.weight.t() + 0.5 * (torch.where(keep, 2 * x, 0) @ a.t() @ b.t())

    for found, exact in zip(penalty(ours), penalty(expected), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize("backend", ["auto", "composed"])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck(requires_grad, backend):
    at = MaskPlace(7, 16, 64)
    p = LoRAProblem.random((2, 9), 21, 13, 3, with_output_scale=True, dropout_p=0.3)
    for tensor in (p.x, p.lora_a, p.lora_b, p.bias, p.output_scale):
        tensor.requires_grad_(requires_grad)
    torch.library.opcheck(OP, (*forward_operands(p, at), backend))
    if requires_grad:
        return
    operands = (*forward_operands(p, at), True, backend)
    torch.library.opcheck(FORWARD, operands)
    _, h, mask, unscaled = FORWARD(*operands)
    packed = dropout.packed_keep_mask(p.seed, 0.3, 18, 21, place=at)
    assert torch.equal(mask, packed)
    of_backward = backward_operands(p, h, unscaled, mask, [True] * 5, at)
    torch.library.opcheck(BACKWARD, (*of_backward, backend))
    drawn = BACKWARD(*backward_operands(p, h, unscaled, mask[:0], [True] * 5, at), backend)
    for again, stored in zip(drawn, BACKWARD(*of_backward, backend), strict=True):
        assert torch.equal(again, stored)


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
@pytest.mark.parametrize("argument", ["row_offset", "column_offset", "pitch"])
def test_no_graph_for_every_place(argument, dynamic):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    problem = whole_numbers()
    x, a = problem.x[:, :40], problem.lora_a[:, :40].clone().requires_grad_()

    @torch.compile(backend=counter, fullgraph=True, dynamic=dynamic)
    def function(row_offset, column_offset, pitch):
        return lora_linear(
            x, None, a, problem.lora_b, 0.5, dropout_p=P, seed=SEED, row_offset=row_offset,
            column_offset=column_offset, pitch=pitch,
        ).relu()  # fmt: skip

    settled, graphs = 1 if dynamic else 2, 0  # the second value makes it symbolic
    for step in range(10):
        place = {"row_offset": 3, "column_offset": 16, "pitch": 1000}
        place[argument] += 8 * step
        with torch.compiler.set_stance("default" if step < settled else "fail_on_recompile"):
            y = function(**place)
        graphs = counter.frame_count if step < settled else graphs
        keep = keep_mask(SEED, P, M, 40, place=MaskPlace(**place))
        exact = 0.5 * (torch.where(keep, 2 * x, 0) @ a.t() @ problem.lora_b.t()).relu()
        assert torch.equal(y, exact)
        (grad,) = torch.autograd.grad(y, a, (y > 0).float())
        (expected,) = torch.autograd.grad(exact, a, (y > 0).float())
        assert torch.equal(grad, expected)
    assert counter.frame_count == graphs


def test_explain_takes_a_place(backend):
    p = LoRAProblem.random((9,), 21, 13, 3)
    call = (p.x, p.weight, p.lora_a, p.lora_b, 0.7)
    expected = explain(*call, dropout_p=0.3, backend=backend)
    place = {"row_offset": 3, "column_offset": 8, "pitch": 64}
    assert explain(*call, dropout_p=0.3, backend=backend, **place) == expected
    with pytest.raises(ValueError, match=r"^pitch: expected .* at least 8 \+ 21, got 28"):
        explain(*call, backend=backend, column_offset=8, pitch=28)


def test_a_place_is_in_no_plan(plans_forgotten):
    """A call that is placed is checked each time, and never takes another's plan."""
    p = LoRAProblem.random((9,), 21, 13, 3, dropout_p=0.3)
    call = {name: value for name, value in vars(p).items() if name != "dy"}
    lora_linear(**call, row_offset=8)
    assert not PLANS
    lora_linear(**call)
    assert len(PLANS) == 1
    with pytest.raises(ValueError, match=r"^row_offset: expected 0 or more"):
        lora_linear(**call, row_offset=-8)


# --- the stored mask -------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["plan", "op"])
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_the_mask_is_drawn_once_and_handed_to_the_backward(backend, way, monkeypatch):
    module = cpu if backend == "native" else composed
    given, made, drawn = [], [], []
    forward, backward = module.forward, module.backward
    monkeypatch.setattr(module, "forward", lambda c: made.append(r := forward(c)) or r)
    monkeypatch.setattr(module, "backward", lambda c: given.append(c.mask) or backward(c))
    for where in (masks, native):
        draw = where.packed_keep_mask
        monkeypatch.setattr(
            where, "packed_keep_mask", lambda *a, _d=draw, **o: drawn.append(a) or _d(*a, **o)
        )
    problem = LoRAProblem.random((9,), 21, 13, 3, dropout_p=0.3)
    with FlopCounterMode(display=False) if way == "op" else nullcontext():
        run_forward_backward(placed(backend, MaskPlace(5, 8, 64)), problem)
    assert made[0].mask.data_ptr() == given[0].data_ptr()
    assert torch.equal(
        given[0], dropout.packed_keep_mask(problem.seed, 0.3, 9, 21, place=MaskPlace(5, 8, 64))
    )
    assert len(drawn) == (backend == "composed")  # the compiled forward writes it on its walk


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "xpu"])
def test_where_a_mask_is_stored(device):
    """As fake tensors have to know it, from the arguments alone."""
    stored = {
        backend: op.stores_mask(torch.device(device), True, backend)
        for backend in ("auto", "composed", "native", "triton")
    }
    on_cuda = device == "cuda"
    assert stored == {
        "auto": True, "composed": True, "native": not on_cuda, "triton": False,
    }  # fmt: skip
    assert not any(
        op.stores_mask(torch.device(device), False, backend) for backend in ("auto", "composed")
    )


def test_a_mask_that_another_place_has_drawn_is_the_one_that_is_read(backend):
    """What is stored is read, whatever the place says by then."""
    if backend == "reference":
        return
    module = cpu if backend == "native" else composed
    problem = whole_numbers().with_(output_scale=None)
    place = MaskPlace(11, 16, 400)
    call = call_of(problem, place)
    _, h, mask, *_ = module.forward(call)
    needs = op.Needs(True, True, True, True, False)
    first = module.backward(backward_of(problem, needs, place, h=h, mask=mask))
    elsewhere = module.backward(backward_of(problem, needs, MaskPlace(2), h=h, mask=mask))
    drawn = module.backward(backward_of(problem, needs, place, h=h))
    for one, two, three in zip(first[:4], elsewhere[:4], drawn[:4], strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
