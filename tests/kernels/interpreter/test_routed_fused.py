"""The base GEMM with each row's adapter as its tail, interpreted; few tokens stay out of it."""

import pytest
import torch
from routed_results import call_routed, check_routed, run_routed

from lora_kernels.ops.routed.triton import launch as grids
from lora_kernels.ops.routed.triton import tiles
from lora_kernels.testing.routed_inputs import RoutedProblem

ROWS = 270  # more than 256: tiles of 64 pairs
KINDS = [(torch.float32, None), (torch.float16, torch.float32), (torch.float16, None)]


@pytest.fixture(autouse=True)
def fused():
    with tiles.use_strategy("fused"):
        yield


@pytest.fixture
def launched(monkeypatch):
    """How often the fused GEMM was launched."""
    calls = []
    gemm = grids.RoutedLaunch.gemm
    monkeypatch.setattr(
        grids.RoutedLaunch, "gemm", lambda *args, **kw: calls.append(kw) or gemm(*args, **kw)
    )
    return calls


def mixed_ids(adapters: int, rows: int = ROWS) -> torch.Tensor:
    ids = torch.arange(rows) % (adapters + 1) - 1
    return ids[torch.randperm(rows, generator=torch.Generator().manual_seed(3))]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("sliced", [False, True], ids=["", "sliced"])
def test_numbers(kind, dropout, sliced, poisoned_memory, launched):
    ranks = [(3, 0), (0, 5), (8, 16), (24, 24), (0, 2)] if sliced else [1, 3, 8, 24, 70]
    problem = RoutedProblem.random(
        mixed_ids(5), ranks, 101, (70, 41) if sliced else 141, dtype=kind[0],
        adapter_dtype=kind[1], dropout=dropout, weighted=not sliced, with_bias=sliced,
    )  # fmt: skip
    check_routed(problem, "triton")
    assert [call["to_b"] for call in launched] == [True, False]


@pytest.mark.parametrize("ids", [-1, 1], ids=["all_base", "one_adapter"])
def test_uniform_batches(ids, poisoned_memory, launched):
    problem = RoutedProblem.random(torch.full((ROWS,), ids), [2, 5], 64, 48)
    check_routed(problem, "triton")
    assert len(launched) == 2


def test_few_tokens_and_several_adapters_per_token_take_the_vendors_gemm(launched):
    few = RoutedProblem.random(mixed_ids(2, 40), [2, 5], 30, 20)
    several = RoutedProblem.random(mixed_ids(2, 300).view(150, 2), [2, 5], 30, 20)
    for problem in (few, several):
        run_routed(problem, "triton")
    assert not launched


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_padding_rows_and_strides(dropout, poisoned_memory, launched):
    """Routed tokens are fewer than x's rows, or x has fewer rows than there is room for."""
    problem = RoutedProblem.random(mixed_ids(3), [3, 5, 8], 40, 48, dropout=dropout)
    bank = problem.bank()
    routing = problem.routing(bank, max_tokens=ROWS + 20)
    wide = torch.full((ROWS, 80), float("nan"))
    wide[:, ::2] = problem.x
    x = wide[:, ::2].requires_grad_()
    weight = problem.weight.mT.contiguous().mT
    y = call_routed(problem, bank, "triton", routing=routing, x=x, weight=weight)
    parameters = list(bank.parameters())
    expected = torch.autograd.grad(y, [x, *parameters], problem.dy)
    padded = torch.full((ROWS + 20, 40), float("nan"))
    padded[:ROWS] = problem.x
    padded.requires_grad_()
    dy = torch.full((ROWS + 20, 48), float("nan"))
    dy[:ROWS] = problem.dy
    y_padded = call_routed(problem, bank, "triton", routing=routing, x=padded)
    gradients = torch.autograd.grad(y_padded, [padded, *parameters], dy)
    assert len(launched) == 4
    assert torch.equal(y_padded[:ROWS], y) and torch.equal(gradients[0][:ROWS], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(gradients[1:], expected[1:], strict=True))


@pytest.mark.parametrize("what", ["adapter", "x", "dy"])
def test_nan_stays_with_its_adapter(what, poisoned_memory, launched):
    problem = RoutedProblem.random(mixed_ids(4), [3, 5, 8, 2], 21, 17, dropout=0.2)
    expected = run_routed(problem, "triton", ["x"])
    hit = problem.ids[:, 0] == 1
    if what == "adapter":
        for factor in problem.adapters["a1"].pairs[0]:
            factor.fill_(float("nan"))
    else:
        getattr(problem, what)[hit] = float("nan")
    ours = run_routed(problem, "triton", ["x"])
    assert len(launched) == 4
    for name in ours:
        assert torch.equal(ours[name][~hit], expected[name][~hit]), name
    assert any(torch.isnan(ours[name][hit]).any() for name in ours)
