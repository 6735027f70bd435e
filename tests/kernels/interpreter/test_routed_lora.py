"""routed_lora on the Triton kernels, interpreted: numbers, against a loop over tokens in fp64."""

import contextlib
import functools
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from routed_calls import call_of, op, operands
from routed_results import (
    AsOnADevice,
    call_routed,
    check_routed,
    routed_eager,
    routed_oracle,
    run_routed,
)

from lora_kernels.ops.routed import (
    Routing,
    routed_expand,
    routed_lora,
    routed_lora_linear,
    routed_shrink,
)
from lora_kernels.ops.routed.call import Needs
from lora_kernels.ops.routed.triton import tiles
from lora_kernels.runtime.dropout import MaskPlace
from lora_kernels.testing import assert_within_policy
from lora_kernels.testing.routed_inputs import RoutedProblem

RANKS = (1, 3, 8, 24, 64, 160)
SLICED_RANKS = ((3, 0, 8), (0, 5, 0), (1, 1, 1), (8, 24, 3), (0, 0, 2), (16, 8, 8))
SLICES = (70, 41, 66)
KINDS = {
    "fp32": (torch.float32, None),
    "fp16": (torch.float16, None),
    "fp16_fp32_adapters": (torch.float16, torch.float32),
    "fp32_fp16_adapters": (torch.float32, torch.float16),
}
SMALL, LARGE = 45, 330  # tokens, for tiles of 16 and of 64 pairs


def ids_of(kind: str, adapters: int, rows: int) -> torch.Tensor:
    """``[M, k]``; every adapter occurs, the last one too, unless the kind says otherwise."""
    ids = torch.arange(rows) % (adapters + 1) - 1
    shuffled = ids[torch.randperm(rows, generator=torch.Generator().manual_seed(5))]
    if kind == "sorted":
        return ids.sort().values.unsqueeze(1)
    if kind == "pairs":  # the second is often the first again, or none
        return torch.stack([shuffled, torch.where(ids % 3 == 0, shuffled, ids), ids.flip(0)], 1)
    if kind == "one_adapter":
        return torch.full((rows, 1), adapters - 1)
    assert kind == "unsorted"
    return shuffled.unsqueeze(1)


@functools.cache
def case(kind: str, routing: str, rows: int, sliced: bool, dropout: bool, whole: bool):
    """The problem, eager's results and the oracle's."""
    dtype, adapter_dtype = KINDS[kind]
    ranks = SLICED_RANKS if sliced else RANKS
    p = RoutedProblem.random(
        ids_of(routing, len(ranks), rows), ranks, 101, SLICES if sliced else 67, dtype=dtype,
        adapter_dtype=adapter_dtype, with_weight=whole, weighted=routing == "pairs",
        with_out=not whole and routing == "pairs",
        dropout=[0.0, 0.3, 0.1, 0.5, 0.2, 0.25] if dropout else 0.0,
    )  # fmt: skip
    if dropout:
        p = p.with_adapter("a2", training=False)
    return p, routed_eager(p), routed_oracle(p)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("sliced", [False, True], ids=["", "sliced"])
@pytest.mark.parametrize(
    "routing, rows, whole",
    [
        ("unsorted", SMALL, True),
        ("unsorted", LARGE, False),
        ("pairs", SMALL // 2, False),
        ("pairs", LARGE // 3, True),
    ],
)
def test_numbers(kind, routing, rows, sliced, dropout, whole, poisoned_memory):
    if kind in ("fp16", "fp32_fp16_adapters") and (routing, whole) != ("pairs", False):
        pytest.skip("the other kinds cover the rest")
    problem, eager, oracle = case(kind, routing, rows, sliced, dropout, whole)
    check_routed(problem, "triton", known=(eager, oracle))


@pytest.mark.parametrize("routing", ["sorted", "one_adapter"])
def test_neighbouring_tokens(routing, poisoned_memory):
    problem, eager, oracle = case("fp32", routing, LARGE, False, False, True)
    check_routed(problem, "triton", known=(eager, oracle))


@pytest.mark.parametrize("rows", [SMALL, LARGE])
def test_bf16_adapters_are_read(rows, poisoned_memory):
    """Without their gradients: the interpreter does not round to bf16 but cuts off."""
    problem = RoutedProblem.random(
        ids_of("unsorted", 6, rows), RANKS, 101, 67, adapter_dtype=torch.bfloat16, dropout=0.2
    )
    check_routed(problem, "triton", ["x"])


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("rows, dtype", [(3, torch.float16), (300, torch.float32)], ids=str)
def test_split_depth(rows, dtype, dropout, poisoned_memory, monkeypatch):
    """A depth in parts, whose last is cut short, in slices of different depths."""
    split = []
    shrink_tile = tiles.shrink_tile

    def in_parts(*args, **kwargs):
        tile = shrink_tile(*args, **kwargs)
        blocks = -(-args[1] // tile.BLOCK_D)
        split.append(tiles.ShrinkTile(**{**vars(tile), "parts": min(3, blocks)}))
        return split[-1]

    monkeypatch.setattr(tiles, "shrink_tile", in_parts)
    problem = RoutedProblem.random(
        ids_of("unsorted", 2, rows), [(3, 20), (8, 0)], 333, (300, 130), dtype=dtype,
        dropout=dropout, with_weight=False,
    )  # fmt: skip
    ours = check_routed(problem, "triton")
    assert all(tile.parts == 3 for tile in split)
    inference = run_routed(problem, "triton", [])
    assert torch.equal(inference["y"], ours["y"]), "with and without a backward"


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("sliced", [False, True], ids=["", "sliced"])
def test_groups_across_windows(window, sliced, poisoned_memory, monkeypatch):
    """Groups that end in a window, fill several, begin in the middle of one, or end at its end."""
    gradient_tile = tiles.gradient_tile
    monkeypatch.setattr(
        tiles, "gradient_tile",
        lambda *args, **kw: tiles.GradientTile(**{**vars(gradient_tile(*args, **kw)),
                                                  "window": window}),
    )  # fmt: skip
    sizes = [100, 1, 16, 0, 17, 47, 64]  # in tiles of 16
    ids = torch.cat(
        [torch.full((n,), slot) for slot, n in enumerate(sizes)] + [torch.full((11,), -1)]
    )
    ranks = (
        [(3, 8), (0, 2), (70, 1), (1, 1), (4, 0), (16, 16), (8, 3)]
        if sliced
        else [3, 2, 70, 1, 4, 16, 8]
    )
    problem = RoutedProblem.random(
        ids[torch.randperm(len(ids))], ranks, 37, (29, 11) if sliced else 29, with_weight=False,
        dropout=0.2,
    )  # fmt: skip
    ours = check_routed(problem, "triton")
    assert not any(ours[name].any() for name in ours if name.startswith("a3."))


@pytest.mark.parametrize("ids", [[], [-1] * 7, [2], [-1], [0] * 9], ids=str)
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_small_and_empty_batches(ids, whole, dropout, poisoned_memory):
    problem = RoutedProblem.random(ids, [2, 5, 3], 19, 11, with_weight=whole, dropout=dropout)
    ours = check_routed(problem, "triton")
    for slot in (0, 1, 2):
        assert (f"a{slot}.lora_a" in ours) == (f"a{slot}.lora_b" in ours) == (slot in ids)


@pytest.mark.parametrize("whole", [True, False])
def test_an_empty_bank(whole, poisoned_memory):
    problem = RoutedProblem.random([-1, -1, -1], [], 19, 11, with_weight=whole)
    if whole:
        check_routed(problem, "triton")
    else:
        ours = run_routed(problem, "triton", ["x"])
        assert not ours["y"].any() and not ours["x"].any()


def rearranged(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """The same values behind other strides, with NaN between them."""
    if kind == "transposed":
        return tensor.mT.contiguous().mT
    if kind == "every_second":
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    return tensor


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), rows=st.integers(0, 20), k=st.integers(1, 3), count=st.integers(1, 5))
def test_any_shape_stride_and_routing(data, rows, k, count, poisoned_memory):
    draw = data.draw
    ids = draw(
        st.lists(
            st.lists(st.integers(-1, count - 1), min_size=k, max_size=k),
            min_size=rows, max_size=rows,
        )
    )  # fmt: skip
    slices = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    ranks = [
        [draw(st.integers(1 if s == 0 else 0, 20)) for s in range(len(slices))]
        for _ in range(count)
    ]
    whole = draw(st.booleans())
    problem = RoutedProblem.random(
        torch.tensor(ids).reshape(rows, k), ranks, draw(st.integers(1, 40)), slices,
        adapter_dtype=draw(st.sampled_from([None, torch.float16, torch.float64])),
        with_weight=whole, with_out=draw(st.booleans()) and not whole,
        weighted=k > 1 or draw(st.booleans()), dropout=draw(st.sampled_from([0.0, 0.3, 0.9])),
    )  # fmt: skip
    strides = st.sampled_from(["as_is", "transposed", "every_second"])
    changes = {
        name: rearranged(getattr(problem, name), draw(strides))
        for name in ("x", "dy", "weight")
        if getattr(problem, name) is not None
    }
    check_routed(problem.with_(**changes), "triton")


@pytest.mark.parametrize("rows", [20, 300])
@pytest.mark.parametrize("strides", ["as_is", "transposed", "every_second"])
@pytest.mark.parametrize("k", [1, 2])
def test_out_of_any_strides(rows, strides, k, poisoned_memory):
    problem = RoutedProblem.random(
        torch.cat([ids_of("unsorted", 3, rows)] * k, 1), [(2, 3), (5, 0), (3, 1)], 19, (11, 9),
        with_weight=False, with_out=True, weighted=True,
    )  # fmt: skip
    out = rearranged(problem.out.clone(), strides)
    bank = problem.bank()
    with torch.no_grad():
        result = routed_lora(problem.x, bank, problem.routing(bank), out, backend="triton")
    assert result is out
    assert_within_policy("out", out, routed_eager(problem)["y"], routed_oracle(problem)["y"])


def test_fp16_tiny_b_and_tiny_gradients_do_not_underflow(poisoned_memory):
    """B and dy near 1e-5: t is about 1e-9, below fp16's smallest number, and feeds dA."""
    problem = RoutedProblem.random(
        ids_of("unsorted", 3, 300), [8, 1, 24], 64, 96, dtype=torch.float16,
        adapter_dtype=torch.float32, with_bias=False,
    )  # fmt: skip
    for adapter in problem.adapters.values():
        adapter.pairs[0][1].mul_(1e-5)
    problem = problem.with_(dy=problem.dy * 1e-5)
    ours, oracle = run_routed(problem, "triton"), routed_oracle(problem)
    in_fp32 = {n: getattr(problem, n).float() for n in ("x", "weight", "dy")}
    eager = routed_eager(problem.with_(**in_fp32))
    for name in ("a0.lora_a", "a1.lora_a", "a2.lora_a"):
        largest = oracle[name].abs().max()
        assert largest > 1e-9 and ours[name].dtype == torch.float32
        error = (ours[name] - oracle[name]).abs().max() / largest
        floor = (eager[name] - oracle[name]).abs().max() / largest
        assert error <= 2 * floor + torch.finfo(torch.float16).eps, name


# --- the halves -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fp32", "fp16_fp32_adapters"])
@pytest.mark.parametrize("rows, k", [(LARGE, 1), (20, 3)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_halves_are_the_whole(kind, rows, k, dropout, poisoned_memory):
    dtype, adapter_dtype = KINDS[kind]
    ids = ids_of("pairs" if k == 3 else "unsorted", len(SLICED_RANKS), rows)
    problem = RoutedProblem.random(
        ids, SLICED_RANKS, 77, SLICES, dtype=dtype, adapter_dtype=adapter_dtype,
        with_weight=False, dropout=dropout, weighted=True,
    )  # fmt: skip
    bank = problem.bank()
    x, weights = problem.x.clone().requires_grad_(), problem.weights.clone().requires_grad_()
    routing = Routing.from_weighted(problem.ids, weights, bank)
    h = routed_shrink(x, bank, routing, seed=problem.seed, backend="triton")
    assert h.dtype == torch.float32 and h.shape == (rows * k, 35)
    offsets = routing.tensors(with_plan=False).offsets.tolist()
    for slot, ranks in [*enumerate(SLICED_RANKS), (-2, (0,))]:
        group = h[offsets[slot] : offsets[slot + 1]]
        assert len(group) and not group[:, sum(ranks) :].any() and group[:, : sum(ranks)].all()
    y = routed_expand(h, bank, routing, dtype=dtype, backend="triton")
    parameters = {n.removeprefix("adapters."): p for n, p in bank.named_parameters()}
    leaves = {"x": x, "weights": weights, **parameters}
    gradients = torch.autograd.grad(y, leaves.values(), problem.dy)
    ours = {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}
    eager, oracle = routed_eager(problem), routed_oracle(problem)
    assert ours.keys() == oracle.keys()
    for name, result in ours.items():
        assert_within_policy(name, result, eager[name], oracle[name], dtype)


@pytest.mark.parametrize("rows", [SMALL, LARGE])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_h_of_another_dtype_and_layout(rows, dtype, poisoned_memory):
    problem = RoutedProblem.random(ids_of("unsorted", 6, rows), RANKS, 20, 67, with_weight=False)
    bank = problem.bank()
    routing = problem.routing(bank)
    h = routed_shrink(problem.x, bank, routing, backend="triton").detach().to(dtype)
    expected = routed_expand(h.float(), bank, routing, dtype=torch.float32, backend="triton")
    if dtype == torch.float64:
        with pytest.raises(ValueError, match="float64"):
            routed_expand(h, bank, routing, dtype=torch.float32, backend="triton")
        return
    h = rearranged(h, "transposed").requires_grad_()
    y = routed_expand(h, bank, routing, dtype=torch.float32, backend="triton")
    assert torch.equal(y, expected)
    (t,) = torch.autograd.grad(y, h, problem.dy)
    assert t.dtype == dtype and torch.isfinite(t).all() and t.any()


def test_leading_dimensions_and_the_base(poisoned_memory):
    problem = RoutedProblem.random(ids_of("unsorted", 3, 24), [2, 5, 3], 19, 11)
    bank = problem.bank()
    routing = problem.routing(bank)

    def call(x):
        return routed_lora_linear(x, problem.weight, bank, routing, problem.bias, backend="triton")

    shaped = call(problem.x.view(2, 3, 4, 19))
    assert shaped.shape == (2, 3, 4, 11)
    assert torch.equal(shaped.view(24, 11), call(problem.x))


def test_opcheck_of_the_ops(poisoned_memory):
    """Schemas, and that fake kernels foretell what the Triton backend returns."""
    problem = RoutedProblem.random(
        ids_of("pairs", 3, 9), [(3, 0), (0, 2), (1, 5)], 21, (7, 10), dtype=torch.float16,
        adapter_dtype=torch.float32, weighted=True, dropout=0.3,
    )  # fmt: skip
    call = call_of(problem, problem.bank(), "triton", dy=problem.dy, place=MaskPlace(5, 16, 77))

    def check(name: str, call):
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(op(name), operands(name, call), test_utils=tests)

    check("routed_lora_forward", call)
    check("routed_shrink_forward", call)
    forward = "routed_lora_forward"
    _, call.h, call.mask = op(forward)(*operands(forward, call))
    assert not call.mask.numel() and torch.isfinite(call.h).all()
    call.out = torch.zeros_like(problem.dy)
    check("routed_lora_", call)
    check("routed_expand_", call)
    for needs in itertools.product([True, False], repeat=3):
        call.needs = Needs(*needs)
        check("routed_lora_backward", call)
        check("routed_expand_backward", call)
        check("routed_shrink_backward", replace(call, dy=call.h))


@pytest.mark.parametrize("per_token", [1, 2])
def test_whose_parameters_have_gradients(per_token, poisoned_memory):
    """Those of the batch where ids can be read; else also exact zeros, within adapters=."""
    problem = RoutedProblem.random(
        [[2, -1], [0, 0], [-1, 2]] * 30, [3, 5, 1, 2], 21, 13, dtype=torch.float16,
        adapter_dtype=torch.float32, weighted=per_token > 1,
    )  # fmt: skip
    problem = problem.with_(ids=problem.ids[:, :per_token])
    bank = problem.bank()

    def gradients(adapters, on_device: bool) -> dict[str, bool]:
        bank.zero_grad()
        with AsOnADevice() if on_device else contextlib.nullcontext():
            if per_token == 1:
                routing = Routing.from_tokens(problem.ids, bank, adapters=adapters)
            else:
                routing = Routing.from_weighted(
                    problem.ids, problem.weights, bank, adapters=adapters
                )
        y = routed_lora_linear(problem.x, problem.weight, bank, routing, backend="triton")
        y.backward(problem.dy)
        return {
            name: bool(bank[name].lora_a.grad.any() and bank[name].lora_b.grad.any())
            for name in bank
            if bank[name].lora_a.grad is not None
        }

    used = {"a0": True, "a2": True}
    assert gradients(None, False) == gradients(["a0", "a2", "a3"], False) == used
    assert gradients(None, True) == {"a0": True, "a1": False, "a2": True, "a3": False}
    assert gradients(["a0", "a3"], True) == {"a0": True, "a3": False}


@pytest.mark.parametrize("rows", [40, 300])
@pytest.mark.parametrize("sliced", [False, True], ids=["", "sliced"])
def test_second_derivatives(sliced, rows, poisoned_memory):
    """No mask is stored and no group is known on the host: both are found again."""
    problem = RoutedProblem.random(
        ids_of("pairs", 3, rows), [(3, 0), (0, 5), (1, 2)] if sliced else [3, 5, 1], 21,
        (7, 10) if sliced else 17, weighted=True, dropout=0.3,
    )  # fmt: skip

    def derivatives(p: RoutedProblem, backend: str) -> dict[str, torch.Tensor]:
        bank = p.bank()
        leaves = {"x": p.x, "weights": p.weights, "dy": p.dy, **dict(bank.named_parameters())}
        for leaf in leaves.values():
            leaf.requires_grad_().grad = None
        y = call_routed(p, bank, backend)
        first = torch.autograd.grad(y, [p.x, p.weights], p.dy, create_graph=True)
        (first[0].square().sum() + first[1].square().mean()).backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    ours, eager = derivatives(problem, "triton"), derivatives(problem, "reference")
    oracle = derivatives(problem.double(), "reference")
    for name, gradient in ours.items():
        assert_within_policy(name, gradient, eager[name], oracle[name])
