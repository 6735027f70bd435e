"""routed_lora on the Triton kernels, interpreted: what must be exact, bit for bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from routed_calls import call_of
from routed_results import call_routed, run_routed
from torch.nn import functional as F

from lora_kernels.ops.routed import (
    AdapterBank,
    Routing,
    routed_expand,
    routed_lora,
    routed_lora_linear,
    routed_shrink,
)
from lora_kernels.ops.routed import triton as launch
from lora_kernels.ops.routed.tensors import in_one_piece
from lora_kernels.ops.routed.triton import tiles
from lora_kernels.runtime.dropout import keep_mask, keep_scale
from lora_kernels.testing.routed_inputs import RoutedProblem

BACKEND = "triton"
SEED = torch.tensor(0x1234_5678_9ABC_DEF1)


def mixed_ids(adapters: int, rows: int, k: int = 1) -> torch.Tensor:
    ids = torch.arange(rows * k) % (adapters + 1) - 1
    generator = torch.Generator().manual_seed(3)
    return ids[torch.randperm(rows * k, generator=generator)].view(rows, k)


def product_row_by_row(left, right, dtype=None):
    return np.einsum("ij,jk->ik", left.astype(dtype), right.astype(dtype))


def unequal(ours: dict, expected: dict) -> list[str]:
    return [name for name in ours if not torch.equal(ours[name], expected[name])]


@pytest.mark.parametrize("rows", [40, 300])
@pytest.mark.parametrize("p", [0.25, 0.9])
def test_the_masks_are_the_definitions(rows, p, poisoned_memory):
    """With A the identity h is D(x); and dx = keep * (t A) is zero exactly where it is not."""
    features = 21
    ids = mixed_ids(3, rows)
    problem = RoutedProblem.random(ids, [features, 2, features], features, 9, with_weight=False)
    bank = AdapterBank(features, 9, slots=problem.bank().slots)
    for name, adapter in problem.adapters.items():
        a, b = adapter.pairs[0]
        a = torch.eye(features) if a.shape[0] == features else a
        bank.add(name, a, b, 1.0, 0.0 if name == "a1" else p)
    routing = problem.routing(bank)
    x = (torch.rand(rows, features) + 0.5).requires_grad_()
    h = routed_shrink(x, bank, routing, seed=SEED, backend=BACKEND)
    y = routed_lora(x, bank, routing, seed=SEED, backend=BACKEND)
    (dx,) = torch.autograd.grad(y, x, torch.rand(rows, 9) + 0.5)
    tokens, offsets = routing.tensors(with_plan=False)[:2]
    for slot in (0, 2):
        pairs = slice(offsets[slot], offsets[slot + 1])
        rows_of_slot = tokens[pairs].long()
        keep = keep_mask(SEED, p, rows, features, slot)[rows_of_slot]
        expected = torch.where(keep, x[rows_of_slot] * keep_scale(p), 0)
        assert torch.equal(h[pairs], expected)
        assert torch.equal(dx[rows_of_slot] != 0, keep)


@pytest.mark.parametrize("strategy", tiles.STRATEGIES)
@pytest.mark.parametrize("whole", [True, False], ids=["base", "alone"])
@pytest.mark.parametrize("first", [0, 2**40 + 3])
def test_a_part_of_the_rows_is_that_part_of_the_whole(first, whole, strategy, poisoned_memory):
    """Forward, backward and its derivative: masks go by where rows stand in the whole activation,
    and no backend here stores them."""
    problem = RoutedProblem.random(
        mixed_ids(3, 400), [3, 5, 8], 27, 17, with_weight=whole, dropout=[0.3, 0.0, 0.5]
    )

    def run(rows: slice) -> dict:
        p = problem.with_(x=problem.x[rows].clone().requires_grad_(), ids=problem.ids[rows])
        bank = p.bank()
        given = (p.x, p.weight, bank, p.routing(bank)) if whole else (p.x, bank, p.routing(bank))
        function = routed_lora_linear if whole else routed_lora
        place = {"row_offset": first + rows.start, "pitch": 27}
        y = function(*given, seed=p.seed, backend=BACKEND, **place)
        leaves = {"x": p.x, **dict(bank.named_parameters())}
        found = torch.autograd.grad(y, leaves.values(), problem.dy[rows], retain_graph=True)
        (dx,) = torch.autograd.grad(y, p.x, problem.dy[rows], create_graph=True)
        second = torch.autograd.grad(dx.square().sum(), [bank["a0"].lora_a, bank["a2"].lora_b])
        results = {"y": y.detach(), **dict(zip(leaves, found, strict=True))}
        return results | dict(zip(("of A", "of B"), second, strict=True))

    with tiles.use_strategy(strategy):
        expected, parts = run(slice(0, 400)), [run(slice(0, 290)), run(slice(290, 400))]
    for name, result in expected.items():
        found = [part[name] for part in parts]
        found = torch.cat(found) if name in ("x", "y") else sum(found)
        torch.testing.assert_close(found, result, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows, k", [(40, 1), (300, 1), (100, 3)])
def test_tokens_without_an_adapter_have_the_frozen_layers_bits(kind, rows, k, poisoned_memory):
    ids = mixed_ids(3, rows, k)
    ids[::4] = -1
    problem = RoutedProblem.random(ids, [(3, 0), (0, 9), (8, 2)], 33, (29, 30), dtype=kind)
    base = (problem.ids < 0).all(1)
    y = run_routed(problem, BACKEND, [])["y"]
    frozen = F.linear(problem.x, problem.weight, problem.bias)
    assert base.any() and torch.equal(y[base], frozen[base])
    alone = run_routed(problem.with_(weight=None, bias=None), BACKEND, ["x"])
    assert not alone["y"][base].any() and not alone["x"][base].any()
    assert alone["y"][~base].any(1).all() and alone["x"][~base].any(1).all()
    # Signed zeros and NaN stay as they are, and so do the columns of slices without a rank.
    out = torch.where(torch.rand(rows, 59) < 0.5, -0.0, float("nan")).to(kind)
    before = out.clone()
    bank = problem.bank()
    with torch.no_grad():
        routed_lora(problem.x, bank, problem.routing(bank), out, backend=BACKEND)
    untouched = torch.zeros(rows, 59, dtype=torch.bool)
    untouched[:, :29] = ((problem.ids < 0) | (problem.ids == 1)).all(1, keepdim=True)
    untouched[:, 29:] = ((problem.ids < 0) | (problem.ids == 0)).all(1, keepdim=True)
    bits = {2: torch.int16, 4: torch.int32}[kind.itemsize]
    assert torch.equal(out.view(bits)[untouched], before.view(bits)[untouched])
    assert untouched[~base].any()


@pytest.mark.parametrize("rows, k", [(40, 1), (260, 1), (14, 3)])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_in_an_adapter_that_no_token_uses(rows, k, poison, poisoned_memory):
    ids = mixed_ids(4, rows, k)
    problem = RoutedProblem.random(
        torch.where(ids == 1, 2, ids), [3, 5, 8, 2], 21, 17, with_weight=False, weighted=True,
        dropout=0.3,
    )  # fmt: skip
    expected = run_routed(problem, BACKEND)
    for factor in problem.adapters["a1"].pairs[0]:
        factor.fill_(poison)
    problem = problem.with_adapter("a1", scaling=poison)
    ours = run_routed(problem, BACKEND)
    assert not unequal(ours, expected)
    assert "a2.lora_a" in ours and "a1.lora_a" not in ours and "a1.lora_b" not in ours


@pytest.mark.parametrize("rows", [30, 260])
@pytest.mark.parametrize("what", ["adapter", "x", "dy", "weights", "scaling"])
@pytest.mark.parametrize("kind", [(torch.float32, None), (torch.float16, torch.float32)], ids=str)
def test_nan_stays_with_its_adapter(rows, what, kind, poisoned_memory):
    problem = RoutedProblem.random(
        mixed_ids(4, rows), [3, 5, 8, 2], 21, 17, dtype=kind[0], adapter_dtype=kind[1],
        with_weight=False, weighted=True, dropout=[0.0, 0.3, 0.2, 0.0],
    )  # fmt: skip
    expected = run_routed(problem, BACKEND)
    hit = problem.ids[:, 0] == 1
    if what == "adapter":
        for factor in problem.adapters["a1"].pairs[0]:
            factor.fill_(float("nan"))
    elif what == "scaling":
        problem = problem.with_adapter("a1", scaling=float("nan"))
    else:
        getattr(problem, what)[hit] = float("nan")
    ours = run_routed(problem, BACKEND)
    for name in ours:
        if name in ("x", "y", "weights"):
            ours[name], expected[name] = ours[name][~hit], expected[name][~hit]
    changed = unequal(ours, expected)
    assert changed and set(changed) <= {"a1.lora_a", "a1.lora_b"}


@pytest.mark.parametrize("rows", [30, 260])
@pytest.mark.parametrize("what", ["x", "dy", "weights"])
def test_nan_in_one_row_reaches_no_other_row(rows, what, poisoned_memory):
    problem = RoutedProblem.random(
        mixed_ids(2, rows), [3, 24], 21, 17, with_weight=False, weighted=True
    )
    needs = ["x", "weights"]
    expected = run_routed(problem, BACKEND, needs)
    row = torch.nonzero(problem.ids[:, 0] == 1)[1].item()
    getattr(problem, what)[row] = float("nan")
    ours = run_routed(problem, BACKEND, needs)
    others = torch.arange(rows) != row
    for name in ours:
        assert torch.equal(ours[name][others], expected[name][others]), name
    assert any(torch.isnan(ours[name][row]).any() for name in ours)


@pytest.mark.parametrize("rows, k", [(40, 1), (270, 1), (30, 2)])
@pytest.mark.parametrize("kind", [(torch.float32, None), (torch.float16, torch.float32)], ids=str)
def test_a_row_does_not_depend_on_the_others(rows, k, kind, poisoned_memory, monkeypatch):
    """Neither on their order nor on what they are, also where the depth is split."""
    shrink_tile = tiles.shrink_tile
    monkeypatch.setattr(
        tiles, "shrink_tile", lambda *args, **kw: replace(shrink_tile(*args, **kw), parts=2)
    )
    # The interpreter's own product, on a CPU's BLAS, depends on a row's place in the tile.
    monkeypatch.setattr("numpy.matmul", product_row_by_row)
    problem = RoutedProblem.random(
        mixed_ids(3, rows, k), [(3, 5), (0, 24), (64, 1)], 140, (37, 20), dtype=kind[0],
        adapter_dtype=kind[1], with_weight=False, weighted=True,
    )  # fmt: skip
    needs = ["x", "weights"]
    expected = run_routed(problem, BACKEND, needs)
    order = torch.randperm(rows)
    shuffled = {name: getattr(problem, name)[order] for name in ("x", "ids", "weights", "dy")}
    ours = run_routed(problem.with_(**shuffled), BACKEND, needs)
    for name in ours:
        assert torch.equal(ours[name], expected[name][order]), name

    kept = torch.arange(rows) % 3 == 0
    changes = {name: getattr(problem, name).clone() for name in ("x", "weights", "dy", "ids")}
    for name in ("x", "weights", "dy"):
        changes[name][~kept] = torch.randn_like(changes[name][~kept])
    changes["ids"][~kept] = torch.randint(-1, 3, changes["ids"][~kept].shape)
    ours = run_routed(problem.with_(**changes), BACKEND, needs)
    for name in ours:
        assert torch.equal(ours[name][kept], expected[name][kept]), name


@pytest.mark.parametrize("rows, k", [(14, 3), (260, 1)])
def test_every_subset_of_gradients_has_the_same_bits(rows, k, poisoned_memory):
    problem = RoutedProblem.random(
        mixed_ids(2, rows, k), [(3, 5), (0, 24)], 29, (7, 11), with_weight=False,
        weighted=True, dropout=0.3,
    )  # fmt: skip
    names = problem.names()
    everything = run_routed(problem, BACKEND)
    assert not unequal(run_routed(problem, BACKEND), everything), "from run to run"
    subsets = [["x"], ["weights"], ["a0.lora_a_0"], [n for n in names if "lora_b" in n], []]
    subsets += [[n for n in names if n not in ("a1.lora_a_1", "weights")]]
    for needs in subsets:
        some = run_routed(problem, BACKEND, needs)
        assert set(some) == {"y", *needs}
        assert not unequal(some, everything), needs


@pytest.mark.parametrize("rows, room, k", [(20, 27, 1), (20, 27, 2), (270, 300, 1)])
@pytest.mark.parametrize("whole", [True, False])
def test_padding_rows_reach_nobody(rows, room, k, whole, poisoned_memory):
    """x has ``max_tokens`` rows of which the routing uses the first; or as many as it uses."""
    problem = RoutedProblem.random(
        mixed_ids(3, rows, k), [3, 5, 8], 21, 17, with_weight=whole, weighted=True, dropout=0.3
    )
    bank = problem.bank()
    routing = problem.routing(bank, max_tokens=room)
    leaves = [problem.x.requires_grad_(), *bank.parameters()]
    y = call_routed(problem, bank, BACKEND, routing=routing)
    expected = torch.autograd.grad(y, leaves, problem.dy)
    padded = torch.full((room, 21), float("nan"))
    padded[:rows] = problem.x.detach()
    dy = torch.full((room, 17), float("nan"))
    dy[:rows] = problem.dy
    leaves = [padded.requires_grad_(), *bank.parameters()]
    y_padded = call_routed(problem, bank, BACKEND, x=padded, routing=routing)
    gradients = torch.autograd.grad(y_padded, leaves, dy)
    torch.testing.assert_close(y_padded[:rows], y)
    torch.testing.assert_close(gradients[0][:rows], expected[0])
    if not whole:
        assert not y_padded[rows:].any() and not gradients[0][rows:].any()
    assert all(torch.equal(a, b) for a, b in zip(gradients[1:], expected[1:], strict=True))


def test_a_routing_that_is_filled_again(poisoned_memory):
    """As a CUDA graph replays it: same buffers, another content, more and fewer tokens."""
    problem = RoutedProblem.random(mixed_ids(3, 30), [3, 5, 8], 21, 17, with_weight=False)
    bank = problem.bank()
    routing = Routing.empty(30, bank)
    for ids in (problem.ids[:, 0], torch.full((30,), 2), torch.full((30,), -1), problem.ids[:, 0]):
        routing.set_tokens_(ids)
        y = routed_lora(problem.x, bank, routing, backend=BACKEND)
        again = routed_lora(problem.x, bank, Routing.from_tokens(ids, bank), backend=BACKEND)
        assert torch.equal(y, again) and y.any() == (ids >= 0).any()


def test_an_adapter_wider_than_h_reads_and_writes_nothing_beyond(poisoned_memory):
    """A captured graph may meet an adapter that is wider than those it was captured with."""
    problem = RoutedProblem.random(mixed_ids(2, 40), [3, 24], 21, 17, with_weight=False)
    bank = problem.bank()
    expected = routed_lora(problem.x, bank, problem.routing(bank), backend=BACKEND)
    call = call_of(problem, bank, BACKEND, save=True)
    y, h, _ = launch.forward(replace(call, bank=call.bank._replace(max_total_rank=3)))
    narrow = problem.ids[:, 0] == 0
    assert h.shape == (40, 3) and torch.equal(y[narrow], expected[narrow])


def test_offsets_beyond_2_31(poisoned_memory):
    """Factors and rows of x more than 2^31 elements from the start."""
    problem = RoutedProblem.random([1, 0, 1], [2, 5], 24, 16, dtype=torch.float16)
    problem = problem.with_(weight=None, bias=None)
    call, shift = call_of(problem, problem.bank(), BACKEND), 2**31
    tensors = call.bank = in_one_piece(call.bank)
    expected = launch.forward(call).y
    # Not torch.empty: what is filled with NaN is also taken from the machine.
    memory = torch.frombuffer(_reserve(2 * (shift + 2**20)), dtype=torch.float16)
    memory[shift : shift + tensors.storage.numel()] = tensors.storage
    table = tensors.slot_table.clone()
    table[:, :, 2] += shift
    far = tensors._replace(storage=memory, slot_table=table)
    assert torch.equal(launch.forward(replace(call, bank=far)).y, expected)
    x = memory.as_strided((3, 24), (2**30 + 2**16, 1))
    x.copy_(problem.x)
    assert torch.equal(launch.forward(replace(call, x=x)).y, expected)


def _reserve(size: int):
    """Memory that costs nothing until it is touched."""
    import mmap

    return mmap.mmap(-1, size)


@pytest.mark.parametrize("rows", [40, 260])
def test_the_gradient_of_h_is_zero_beyond_the_rank_whatever_the_scaling(rows, poisoned_memory):
    problem = RoutedProblem.random(mixed_ids(2, rows), [3, 24], 21, 17, with_weight=False)
    bank = problem.with_adapter("a0", scaling=float("inf")).bank()
    routing = problem.routing(bank)
    h = torch.randn(rows, 24, requires_grad=True)
    y = routed_expand(h, bank, routing, backend=BACKEND)
    (t,) = torch.autograd.grad(y, h, problem.dy)
    first, second, none = routing.tensors(with_plan=False).offsets[:3].tolist()
    assert not torch.isfinite(t[first:second, :3]).any() and not t[first:second, 3:].any()
    assert t[second:none].all() and not t[none:].any()
