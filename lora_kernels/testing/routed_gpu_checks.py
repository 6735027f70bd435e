"""What ``routed_lora`` must get right on a GPU, as plain functions that need no pytest.

Like :mod:`gpu_checks`, whose runner takes them: the same bodies run on a CPU over ``composed``.
The oracle and the eager formula are computed on the CPU from the same values.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import fields, replace

import torch
from gaps import vendor_gap
from routed_results import call_routed, routed_eager, routed_oracle, run_routed
from torch import Tensor

from lora_kernels.ops.routed import AdapterSlots, Routing, routed_lora, routed_lora_linear
from lora_kernels.ops.routed.triton import tiles
from lora_kernels.testing.gpu_checks import Check, Skip, Target, poisoned_memory
from lora_kernels.testing.policy import Draw, assert_draws_within_policy
from lora_kernels.testing.routed_inputs import RoutedProblem

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
RANKS = (1, 3, 8, 24, 64, 160)  # the last is never the only one used


def moved(problem: RoutedProblem, device: str) -> RoutedProblem:
    """The same problem with its tensors, but for the ids, on another device."""
    changes = {
        field.name: value.to(device)
        for field in fields(problem)
        if field.name != "ids" and isinstance(value := getattr(problem, field.name), Tensor)
    }
    adapters = {
        name: replace(
            adapter,
            pairs=tuple(
                pair and tuple(factor.to(device) for factor in pair) for pair in adapter.pairs
            ),
        )
        for name, adapter in problem.adapters.items()
    }
    return replace(problem, adapters=adapters, **changes)


def some_ids(tokens: int, adapters: int, per_token: int = 1, seed: int = 0) -> Tensor:
    """Random slots, -1 among them; the last adapter is used, the first is not."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, adapters, (tokens, per_token), generator=generator)
    ids[ids == 0] = -1
    if tokens:
        ids[tokens // 2, 0] = adapters - 1
    return ids


def check_policy(target: Target, problem: RoutedProblem) -> dict[str, Tensor]:
    """Our result and gradients, after holding each against fp64."""

    def draw(number: int) -> Draw:
        drawn = problem.redrawn(number)
        with poisoned_memory():
            ours = run_routed(moved(drawn, target.device), target.backend)
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


def shape(label: str, dtype: torch.dtype, dropout: bool, target: Target) -> None:
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


def fused(label: str, dtype: torch.dtype, dropout: bool, target: Target) -> None:
    """The base GEMM with the routed tail in one kernel."""
    with tiles.use_strategy("fused"):
        shape(label, dtype, dropout, target)


def fp32_adapters(target: Target) -> None:
    for dtype in (BF16, FP16):
        problem = RoutedProblem.random(
            some_ids(300, 6), RANKS, 136, 264, dtype=dtype, adapter_dtype=FP32, dropout=0.2
        )
        check_policy(target, problem)


def alone_and_into_out(target: Target) -> None:
    for with_out in (False, True):
        problem = RoutedProblem.random(
            some_ids(60, 6), RANKS, 136, 264, dtype=BF16, with_weight=False, with_out=with_out
        )
        check_policy(target, problem)


def rows_without_an_adapter_stay(target: Target) -> None:
    for tokens in (20, 400):
        problem = moved(
            RoutedProblem.random(
                some_ids(tokens, 6), RANKS, 136, 264, dtype=BF16, with_weight=False, with_out=True
            ),
            target.device,
        )
        bank = problem.bank().requires_grad_(False)
        out = problem.out.clone()
        with torch.no_grad():
            call_routed(problem, bank, target.backend, out=out)
        none = problem.ids[:, 0] < 0
        assert torch.equal(out[none], problem.out[none]), "a row without an adapter has changed"
        assert not torch.equal(out[~none], problem.out[~none])


def nan_stays_where_it_is(target: Target) -> None:
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
        good = run_routed(moved(clean, target.device), target.backend)
        bad = run_routed(moved(poisoned, target.device), target.backend)
        rows = clean.ids[:, 0] != 5
        assert torch.equal(bad["y"][rows], good["y"][rows])
        assert torch.equal(bad["x"][rows], good["x"][rows])
        for slot in range(1, 5):
            for role in ("lora_a", "lora_b"):
                name = f"a{slot}.{role}"
                assert torch.equal(bad[name], good[name]), f"NaN has reached {name}"
        assert not any(name.startswith("a0.") for name in bad), "nobody uses it"


def rows_do_not_depend_on_the_batch(target: Target) -> None:
    """The adapters' part of a row has the same bits wherever it stands and whoever is beside it."""
    for tokens in (24, 500):
        problem = moved(
            RoutedProblem.random(
                some_ids(tokens, 6), RANKS, 136, 264, dtype=BF16, with_weight=False
            ),
            target.device,
        )
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


def same_bits_every_time(target: Target) -> None:
    for tokens, per_token in ((40, 2), (700, 1)):
        problem = moved(
            RoutedProblem.random(
                some_ids(tokens, 6, per_token), RANKS, 264, 136, dtype=BF16,
                weighted=per_token > 1, dropout=0.2,
            ),
            target.device,
        )  # fmt: skip
        first = run_routed(problem, target.backend)
        for _ in range(50 if target.device == "cuda" else 3):
            for name, result in run_routed(problem, target.backend).items():
                assert torch.equal(result, first[name]), f"{name} differs from the first run"


def empty_batches(target: Target) -> None:
    for ids in (torch.full((40, 1), -1), torch.full((0, 1), -1)):
        problem = RoutedProblem.random(ids, RANKS, 136, 264, dtype=BF16)
        ours = run_routed(moved(problem, target.device), target.backend)
        assert ours.keys() == {"y", "x", "bias"}, "an adapter has a gradient"
    bank = problem.bank(AdapterSlots())
    x = torch.randn(9, 136, dtype=BF16, device=target.device)
    for name in list(bank):
        bank.remove(name)
    bank.to(target.device)
    routing = Routing.from_tokens([-1] * 9, bank)
    assert (routed_lora(x, bank, routing, backend=target.backend) == 0).all()


def captured_graph_replays_other_routings(target: Target) -> None:
    """One graph, three fillings of its routing, inference and training; also on a side stream.

    Of composed there is none: it would replay the groups that it was captured with.
    """
    if target.device != "cuda":
        raise Skip("there are no CUDA graphs on a CPU")
    for tokens in (32, 400):
        problem = moved(
            RoutedProblem.random(some_ids(tokens, 6), RANKS, 264, 136, dtype=BF16), "cuda"
        )
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


def checks() -> list[Check]:
    """In order of worth."""
    found = []

    def add(name: str, run: Callable[[Target], None], on_cpu: bool = True, half=True) -> None:
        found.append(Check(f"routed {name}", run, on_cpu=on_cpu, half=half))

    for dtype, dropout in itertools.product((BF16, FP16, FP32), (False, True)):
        for label in SHAPES:
            kind = str(dtype).removeprefix("torch.")
            drops = " with dropout" if dropout else ""
            run = functools.partial(shape, label, dtype, dropout)
            add(f"{kind} {label}{drops}", run, half=dtype != FP32)
    for dtype, dropout in itertools.product((BF16, FP16, FP32), (False, True)):
        kind = f"{str(dtype).removeprefix('torch.')}{' with dropout' if dropout else ''}"
        run = functools.partial(fused, "training", dtype, dropout)
        add(f"fused GEMM {kind}", run, on_cpu=False, half=dtype != FP32)
    for run in (
        fp32_adapters,
        nan_stays_where_it_is,
        rows_without_an_adapter_stay,
        captured_graph_replays_other_routings,
        same_bits_every_time,
        alone_and_into_out,
        empty_batches,
    ):
        add(run.__name__.replace("_", " "), run)
    # Promised for triton and native only: the vendor's GEMMs do not have it.
    add("rows do not depend on the batch", rows_do_not_depend_on_the_batch, on_cpu=False)
    return found
