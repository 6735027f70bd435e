"""What ``routed_lora`` must get right on a GPU; the same bodies run on a CPU over ``composed``.

The oracle and the eager formula are computed on the CPU from the same values.
"""

import itertools

import pytest
import torch
from gaps import vendor_gap
from linear_target import Target, poisoned_memory
from routed_results import call_routed, routed_eager, routed_oracle, run_routed
from targets import on
from torch import Tensor

from lora_kernels.ops.routed import AdapterSlots, Routing, routed_lora, routed_lora_linear
from lora_kernels.ops.routed.triton import tiles
from lora_kernels.testing.policy import Draw, assert_draws_within_policy
from lora_kernels.testing.routed_inputs import RoutedProblem, some_ids

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
RANKS = (1, 3, 8, 24, 64, 160)  # the last is never the only one used


def check_policy(target: Target, problem: RoutedProblem) -> dict[str, Tensor]:
    """Our result and gradients, after holding each against fp64."""

    def draw(number: int) -> Draw:
        drawn = problem.redrawn(number)
        with poisoned_memory():
            ours = run_routed(drawn.to(target.device), target.backend)
        ours = {name: result.cpu() for name, result in ours.items()}
        return ours, routed_eager(drawn), routed_oracle(drawn)

    return assert_draws_within_policy(draw, problem.x.dtype)


# tokens, adapters per token, K, N of each slice; up to 256 pairs are the kernels' small blocks
SHAPES = {
    "decode": (5, 1, 512, (264,)),
    "decode qkv": (33, 1, 512, (264, 72, 72)),
    "mixed": (190, 1, 520, (136,)),
    "odd": (57, 1, 101, (67, 5)),
    "several per token": (45, 3, 264, (136,)),
    "training": (700, 1, 264, (136,)),
    "training, several": (333, 2, 264, (72, 64)),
}


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "with dropout"])
@pytest.mark.parametrize("label", SHAPES)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@on("cpu", "composed", "fused", "native")
def test_half_precision(target, dtype, label, dropout):
    check_shape(target, label, dtype, dropout)


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "with dropout"])
@pytest.mark.parametrize("label", SHAPES)
@on("cpu", "composed", "fused")
def test_float32(target, label, dropout):
    check_shape(target, label, FP32, dropout)


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "with dropout"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@on("fused")
def test_fused_gemm(target, dtype, dropout):
    """The base GEMM with the routed tail in one kernel."""
    with tiles.use_strategy("fused"):
        check_shape(target, "training", dtype, dropout)


def check_shape(target: Target, label: str, dtype: torch.dtype, dropout: bool) -> None:
    tokens, per_token, columns, widths = SHAPES[label]
    ranks: list = list(RANKS)
    if len(widths) > 1:  # another rank in each slice, and none in some
        ranks = [tuple((rank + 5 * s) * ((i + s) % 4 != 1) for s in range(len(widths)))
                 for i, rank in enumerate(RANKS)]  # fmt: skip
    problem = RoutedProblem.random(
        some_ids(tokens, len(RANKS), per_token),
        ranks,
        columns,
        widths,
        dtype=dtype,
        weighted=per_token > 1,
        dropout=[0.3 * (i % 3 == 2) for i in range(len(RANKS))] if dropout else 0.0,
    )
    check_policy(target, problem)


@on("cpu", "composed", "fused", "native")
def test_fp32_adapters(target):
    for dtype in (BF16, FP16):
        problem = RoutedProblem.random(
            some_ids(300, 6), RANKS, 136, 264, dtype=dtype, adapter_dtype=FP32, dropout=0.2
        )
        check_policy(target, problem)


@on("cpu", "composed", "fused", "native")
def test_alone_and_into_out(target):
    for with_out in (False, True):
        problem = RoutedProblem.random(
            some_ids(60, 6), RANKS, 136, 264, dtype=BF16, with_weight=False, with_out=with_out
        )
        check_policy(target, problem)


@on("cpu", "composed", "fused", "native")
def test_rows_without_an_adapter_stay(target):
    for tokens in (20, 400):
        problem = RoutedProblem.random(
            some_ids(tokens, 6), RANKS, 136, 264, dtype=BF16, with_weight=False, with_out=True
        ).to(target.device)
        bank = problem.bank().requires_grad_(False)
        out = problem.out.clone()
        with torch.no_grad():
            call_routed(problem, bank, target.backend, out=out)
        none = problem.ids[:, 0] < 0
        assert torch.equal(out[none], problem.out[none]), "a row without an adapter has changed"
        assert not torch.equal(out[~none], problem.out[~none])


@on("composed", "fused", "native")
def test_nan_stays_where_it_is(target):
    check_where_nan_stays(target)


@on("cpu", "cpu-native")
def test_nan_stays_where_it_is_beside_both_gemms(target, both_gemms):
    check_where_nan_stays(target)


def check_where_nan_stays(target: Target) -> None:
    """In an adapter that nobody uses and in another adapter's rows."""
    for tokens, whole in itertools.product((30, 400), (True, False)):
        clean = RoutedProblem.random(
            some_ids(tokens, 6), RANKS, 136, 264, dtype=BF16, with_weight=whole
        )
        by_vendor = whole or target.backend == "composed"
        poisoned_x = clean.x.clone()
        poisoned_x[clean.ids[:, 0] == 5] = (
            vendor_gap(BF16, target.device) if by_vendor else float("nan")
        )
        unused = tuple((a * float("nan"), b * float("nan")) for a, b in clean.adapters["a0"].pairs)
        poisoned = clean.with_(x=poisoned_x).with_adapter("a0", pairs=unused)
        good = run_routed(clean.to(target.device), target.backend)
        bad = run_routed(poisoned.to(target.device), target.backend)
        rows = clean.ids[:, 0] != 5
        assert torch.equal(bad["y"][rows], good["y"][rows])
        assert torch.equal(bad["x"][rows], good["x"][rows])
        for slot in range(1, 5):
            for role in ("lora_a", "lora_b"):
                name = f"a{slot}.{role}"
                assert torch.equal(bad[name], good[name]), f"NaN has reached {name}"
        assert not any(name.startswith("a0.") for name in bad), "nobody uses it"


# Promised for triton and native only: the vendor's GEMMs do not have it.
@on("fused", "native")
def test_rows_do_not_depend_on_the_batch(target):
    """The adapters' part of a row has the same bits wherever it stands and whoever is beside it."""
    for tokens in (24, 500):
        problem = RoutedProblem.random(
            some_ids(tokens, 6), RANKS, 136, 264, dtype=BF16, with_weight=False
        ).to(target.device)
        bank = problem.bank().requires_grad_(False)

        def run(x: Tensor, ids: Tensor, bank=bank) -> Tensor:
            with torch.no_grad():
                return routed_lora(x, bank, Routing.from_tokens(ids, bank), backend=target.backend)

        ids = problem.ids[:, 0]
        whole = run(problem.x, ids)
        order = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
        assert torch.equal(
            run(problem.x[order.to(target.device)], ids[order]).cpu(), whole.cpu()[order]
        )
        others = problem.x.clone()
        others[tokens // 2 :] = torch.randn_like(others[tokens // 2 :])
        changed = ids.roll(3)
        changed[: tokens // 2] = ids[: tokens // 2]
        again = run(others, changed)
        assert torch.equal(again[: tokens // 2], whole[: tokens // 2])


@on("cpu", "composed", "fused", "native")
def test_same_bits_every_time(target):
    for tokens, per_token in ((40, 2), (700, 1)):
        problem = RoutedProblem.random(
                some_ids(tokens, 6, per_token), RANKS, 264, 136, dtype=BF16,
                weighted=per_token > 1, dropout=0.2,
            ).to(target.device)  # fmt: skip
        first = run_routed(problem, target.backend)
        for _ in range(50 if target.device == "cuda" else 3):
            for name, result in run_routed(problem, target.backend).items():
                assert torch.equal(result, first[name]), f"{name} differs from the first run"


@on("cpu", "composed", "fused", "native")
def test_empty_batches(target):
    for ids in (torch.full((40, 1), -1), torch.full((0, 1), -1)):
        problem = RoutedProblem.random(ids, RANKS, 136, 264, dtype=BF16)
        ours = run_routed(problem.to(target.device), target.backend)
        assert ours.keys() == {"y", "x", "bias"}, "an adapter has a gradient"
    bank = problem.bank(AdapterSlots())
    x = torch.randn(9, 136, dtype=BF16, device=target.device)
    for name in list(bank):
        bank.remove(name)
    bank.to(target.device)
    routing = Routing.from_tokens([-1] * 9, bank)
    assert (routed_lora(x, bank, routing, backend=target.backend) == 0).all()


@on("composed", "fused", "native")
def test_captured_graph_replays_other_routings(target):
    """One graph, three fillings of its routing, inference and training; also on a side stream.

    Of composed there is none: it would replay the groups that it was captured with.
    """
    for tokens in (32, 400):
        problem = RoutedProblem.random(some_ids(tokens, 6), RANKS, 264, 136, dtype=BF16).to("cuda")
        bank = problem.bank()
        bank.reserve()
        routing = Routing.empty(tokens, bank).set_tokens_(problem.ids[:, 0].cuda())
        x = problem.x.clone().requires_grad_()
        leaves = [x, *bank.parameters()]

        def step(routing: Routing, x=x, bank=bank, problem=problem, leaves=leaves) -> list[Tensor]:
            y = routed_lora_linear(
                x, problem.weight, bank, routing, problem.bias, backend=target.backend
            )
            return [y, *torch.autograd.grad(y, leaves, problem.dy, allow_unused=True)]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(routing)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                results = step(routing)
        except RuntimeError as error:
            if target.backend == "composed" and "cannot be captured in a CUDA graph" in str(error):
                continue
            raise
        assert target.backend != "composed"
        for seed in (0, 1, 2):
            ids = some_ids(tokens - 3 * seed, 6, seed=seed)[:, 0]
            routing.set_tokens_(ids.cuda())
            graph.replay()
            replayed = [result.clone() for result in results]
            expected = step(Routing.empty(tokens, bank).set_tokens_(ids))
            for got, wanted in zip(replayed, expected, strict=True):
                wanted = torch.zeros_like(got) if wanted is None else wanted
                assert torch.equal(got, wanted), f"filling {seed}"
