"""routed_lora: numbers. Every backend against a loop over tokens in fp64; same bits."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routed_results import (
    BACKENDS,
    call_routed,
    check_routed,
    routed_eager,
    routed_oracle,
    run_routed,
)
from torch.nn import functional as F

from lora_kernels.ops.routed import Routing
from lora_kernels.testing import assert_within_policy
from lora_kernels.testing.routed_inputs import RoutedProblem

RANKS = (1, 3, 8, 24, 64, 160)
SLICED_RANKS = ((3, 0, 8), (0, 5, 0), (1, 1, 1), (8, 24, 3), (0, 0, 2))
SLICES = (70, 41, 66)
KINDS = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "fp64": (torch.float64, None),
    "bf16_fp32_adapters": (torch.bfloat16, torch.float32),
    "fp16_fp32_adapters": (torch.float16, torch.float32),
    "fp32_bf16_adapters": (torch.float32, torch.bfloat16),
}


def ids_of(kind: str, adapters: int, rows: int = 460) -> torch.Tensor:
    """``[M, k]``; every adapter occurs, the last one too, unless the kind says otherwise."""
    ids = torch.arange(rows) % (adapters + 1) - 1
    shuffled = ids[torch.randperm(rows, generator=torch.Generator().manual_seed(5))]
    if kind == "sorted":
        return ids.sort().values.unsqueeze(1)
    if kind == "descending":
        return ids.sort(descending=True).values.unsqueeze(1)
    if kind == "pairs":  # the second is often the first again, or none
        return torch.stack([shuffled, torch.where(ids % 3 == 0, shuffled, ids), ids.flip(0)], 1)
    if kind == "one_adapter":
        return torch.full((rows, 1), adapters - 1)
    assert kind == "unsorted"
    return shuffled.unsqueeze(1)


@functools.cache
def case(kind: str, routing: str, sliced: bool, dropout: bool, whole: bool):
    """The problem, eager's results and the oracle's."""
    dtype, adapter_dtype = KINDS[kind]
    ranks = SLICED_RANKS if sliced else RANKS
    p = RoutedProblem.random(
        ids_of(routing, len(ranks)), ranks, 101, SLICES if sliced else 67, dtype=dtype,
        adapter_dtype=adapter_dtype, with_weight=whole, with_out=not whole,
        weighted=routing == "pairs",
        dropout=[0.0, 0.3, 0.1, 0.5, 0.2, 0.25][: len(ranks)] if dropout else 0.0,
    )  # fmt: skip
    if dropout:
        p = p.with_adapter("a2", training=False)
    return p, routed_eager(p), routed_oracle(p)


EVERY_KIND = [("unsorted", True), ("pairs", False), ("sorted", True)]
SOME_KINDS = [("pairs", True), ("descending", False), ("one_adapter", True)]
CASES = [(kind, *rest) for rest in EVERY_KIND for kind in KINDS]
CASES += [(kind, *rest) for rest in SOME_KINDS for kind in ("fp32", "fp16_fp32_adapters")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("sliced", [False, True], ids=["", "sliced"])
@pytest.mark.parametrize("kind, routing, whole", CASES)
def test_numbers(backend, kind, routing, sliced, dropout, whole, poisoned_memory):
    problem, eager, oracle = case(kind, routing, sliced, dropout, whole)
    check_routed(problem, backend, known=(eager, oracle))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("whole", [True, False])
def test_fp64_is_the_formula(backend, dropout, whole):
    problem = RoutedProblem.random(
        ids_of("pairs", 5, 23), SLICED_RANKS, 29, (7, 5, 11), dtype=torch.float64,
        with_weight=whole, with_out=not whole, weighted=True, dropout=dropout,
    )  # fmt: skip
    ours, oracle = run_routed(problem, backend), routed_oracle(problem)
    assert ours.keys() == oracle.keys()
    for name in ours:
        # The weights are fp32, and so is their gradient.
        close = (
            {"rtol": 1e-6, "atol": 1e-6} if name == "weights" else {"rtol": 1e-12, "atol": 1e-12}
        )
        torch.testing.assert_close(ours[name].double(), oracle[name], **close)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("whole", [True, False])
def test_gradcheck(backend, dropout, whole):
    problem = RoutedProblem.random(
        [[0, 2], [-1, 1], [1, 1], [2, 0]], [1, 3, 2], 5, 4, dtype=torch.float64,
        with_weight=whole, dropout=dropout,
    )  # fmt: skip
    bank = problem.bank()
    weights = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    leaves = [t.requires_grad_() for t in (problem.x, problem.bias) if t is not None]
    # The values of the bank's parameters are changed in place, where the bank sees them.
    parameters = list(bank.parameters())

    def function(weights, x, *_):
        return call_routed(
            problem, bank, backend, x=x, routing=Routing.from_weighted(problem.ids, weights, bank)
        )

    assert torch.autograd.gradcheck(function, (weights, *leaves, *parameters))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ids", [[], [-1] * 7, [2], [-1], [0] * 9, [[]] * 0], ids=str)
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_small_and_empty_batches(backend, ids, whole, dropout, poisoned_memory):
    problem = RoutedProblem.random(ids, [2, 5, 3], 19, 11, with_weight=whole, dropout=dropout)
    ours = check_routed(problem, backend)
    for slot in (0, 1, 2):
        assert (f"a{slot}.lora_a" in ours) == (f"a{slot}.lora_b" in ours) == (slot in ids)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_bank(backend):
    problem = RoutedProblem.random([-1, -1, -1], [], 19, 11)
    ours = check_routed(problem, backend)
    assert torch.equal(ours["y"], F.linear(problem.x, problem.weight, problem.bias))
    alone = run_routed(problem.with_(weight=None, bias=None), backend)
    assert not alone["y"].any() and not alone["x"].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", [(2, 3, 4), (1, 24), (24, 1), (2, 12)], ids=str)
def test_leading_dimensions(backend, leading):
    problem = RoutedProblem.random(ids_of("unsorted", 3, 24), [2, 5, 3], 19, 11)
    bank = problem.bank()
    flat = call_routed(problem, bank, backend)
    shaped = call_routed(problem, bank, backend, x=problem.x.view(*leading, 19))
    assert shaped.shape == (*leading, 11)
    assert torch.equal(shaped.view(24, 11), flat)


def rearranged(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """The same values behind other strides."""
    if kind == "transposed":
        return tensor.mT.contiguous().mT
    if kind == "every_second":
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    return tensor


@settings(max_examples=80)
@given(data=st.data(), rows=st.integers(0, 24), k=st.integers(1, 3), count=st.integers(1, 5))
def test_any_shape_stride_and_routing(data, rows, k, count):
    draw = data.draw
    ids = draw(
        st.lists(
            st.lists(st.integers(-1, count - 1), min_size=k, max_size=k),
            min_size=rows, max_size=rows,
        )
    )  # fmt: skip
    slices = draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    ranks = [
        [draw(st.integers(1 if s == 0 else 0, 9)) for s in range(len(slices))] for _ in range(count)
    ]
    whole = draw(st.booleans())
    problem = RoutedProblem.random(
        torch.tensor(ids).reshape(rows, k), ranks, draw(st.integers(1, 30)), slices,
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        adapter_dtype=draw(st.sampled_from([None, torch.float32, torch.float64])),
        with_weight=whole, with_out=draw(st.booleans()) and not whole,
        weighted=k > 1 or draw(st.booleans()), dropout=draw(st.sampled_from([0.0, 0.3, 0.9])),
    )  # fmt: skip
    strides = st.sampled_from(["as_is", "transposed", "every_second"])
    changes = {
        name: rearranged(getattr(problem, name), draw(strides))
        for name in ("x", "dy", "weight")
        if getattr(problem, name) is not None
    }
    for backend in BACKENDS:
        check_routed(problem.with_(**changes), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("whole", [True, False])
def test_every_subset_of_gradients_has_the_same_bits(backend, dropout, whole, poisoned_memory):
    problem = RoutedProblem.random(
        ids_of("pairs", 5, 40), SLICED_RANKS, 29, (7, 5, 11), with_weight=whole,
        with_out=not whole, weighted=True, dropout=dropout,
    )  # fmt: skip
    names = problem.names()
    everything = run_routed(problem, backend)
    subsets = [[name] for name in names] + [[n for n in names if n != name] for name in names]
    subsets += [[n for n in names if "lora_a" in n], [n for n in names if "lora_b" in n], []]
    for needs in subsets:
        some = run_routed(problem, backend, needs)
        assert set(some) == {"y", *needs}
        if problem.out is not None and not needs:
            del some["y"]  # without gradients the pairs are added to ``out`` one after the other
        for name, result in some.items():
            assert torch.equal(result, everything[name]), (name, needs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_from_run_to_run(backend, kind):
    problem, *_ = case(kind, "pairs", False, True, False)
    first = run_routed(problem, backend)
    for _ in range(2):
        again = run_routed(problem, backend)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("elements", [64, 7], ids=["two_rows_or_one", "less_than_a_row"])
def test_rows_in_several_chunks(dropout, elements, monkeypatch, poisoned_memory):
    monkeypatch.setattr("lora_kernels.ops.narrow.products._CHUNK_ELEMENTS", elements)
    for dtype in (torch.float32, torch.float16):
        problem = RoutedProblem.random(
            ids_of("unsorted", 2, 200), [5, 3], 33, 70, dtype=dtype, dropout=dropout
        )
        check_routed(problem, "composed")


def test_fp16_tiny_b_and_tiny_gradients_do_not_underflow():
    """B and dy near 1e-5: t is about 1e-9, below fp16's smallest number, and feeds dA."""
    problem = RoutedProblem.random(
        ids_of("unsorted", 3, 300), [8, 1, 24], 64, 96, dtype=torch.float16,
        adapter_dtype=torch.float32, with_bias=False,
    )  # fmt: skip
    adapters = problem.adapters.values()
    for adapter in adapters:
        adapter.pairs[0][1].copy_(adapter.pairs[0][1].half() * 1e-5)
    problem = problem.with_(dy=problem.dy * 1e-5)
    ours, oracle = run_routed(problem, "composed"), routed_oracle(problem)
    in_fp32 = {n: getattr(problem, n).float() for n in ("x", "weight", "dy")}
    eager = routed_eager(problem.with_(**in_fp32))
    for name in ("a0.lora_a", "a1.lora_a", "a2.lora_a"):
        largest = oracle[name].abs().max()
        assert largest > 1e-9 and ours[name].dtype == torch.float32
        error = (ours[name] - oracle[name]).abs().max() / largest
        # What is left when nothing but the operands are rounded: a few epsilons of fp16.
        floor = (eager[name] - oracle[name]).abs().max() / largest
        assert error <= 2 * floor + torch.finfo(torch.float16).eps, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_autocast_of_an_fp32_layer(backend, dtype, dropout):
    problem = RoutedProblem.random(
        ids_of("pairs", 3, 240), [8, 3, 24], 70, 80, weighted=True, dropout=dropout
    )
    given = problem.with_(dy=problem.dy.to(dtype))
    ours = run_routed(given, backend, autocast=dtype)
    rounded = {n: getattr(problem, n).to(dtype) for n in ("x", "weight", "bias", "dy")}
    eager, oracle = routed_eager(problem.with_(**rounded)), routed_oracle(given)
    assert ours["y"].dtype == dtype
    for name, result in ours.items():
        if name in ("x", "bias"):
            assert result.dtype == torch.float32
            result = result.to(dtype)
        assert_within_policy(name, result, eager[name], oracle[name], dtype)
