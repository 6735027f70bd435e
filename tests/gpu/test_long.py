"""``lora_linear`` on a GPU, what takes longer: graphs, streams, threads, offsets, training."""

import functools
import threading
from collections.abc import Callable

import pytest
import torch
from targets import on
from torch import Tensor

from lora_kernels import lora_linear
from lora_kernels.ops.linear.reference import lora_linear_reference
from lora_kernels.runtime.dropout import _pack_lanes, _philox_words, drop_threshold
from lora_kernels.testing import (
    LoRAProblem,
    assert_within_policy,
    oracle_results,
    run_forward_backward,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_LEAVES = ("x", "lora_a", "lora_b", "bias")


@pytest.mark.parametrize(
    "sizes", [(300, 520, 264, 16), (16, 4096, 1024, 16), (2048, 1024, 1024, 64)], ids=str
)
@on("composed", "fused", "native")
def test_determinism(target, sizes):
    rows, *others = sizes
    problem = target.problem((rows,), *others, dtype=BF16, dropout_p=0.1, with_output_scale=True)
    first = run_forward_backward(target.call, problem)
    for run in range(1, 50):
        for name, result in run_forward_backward(target.call, problem).items():
            assert torch.equal(result, first[name]), f"{name} of run {run} differs"


@on("composed", "fused", "hybrid", "native")
def test_graph_replay(target):
    """Captured once, replayed over other values in the same memory, the seed's too."""
    static = target.problem((300,), 520, 264, 16, dtype=BF16, dropout_p=0.2)
    captured = _capture(target.call, static)
    for draw in (1, 2):
        other = target.problem((300,), 520, 264, 16, dtype=BF16, dropout_p=0.2, generator_seed=draw)
        other = other.with_(seed=torch.tensor(draw * 2**40, device=target.device))
        for name in ("x", "weight", "lora_a", "lora_b", "bias", "dy", "seed"):
            getattr(static, name).copy_(getattr(other, name))
        captured.replay()
        torch.cuda.synchronize()
        eager = run_forward_backward(lora_linear_reference, other)
        oracle = oracle_results(other)
        for name, result in captured.results.items():
            assert_within_policy(name, result, eager[name], oracle[name], BF16)


@on("composed", "fused", "native")
def test_graph_draws_a_new_mask(target):
    problem = target.problem((300,), 520, 264, 16, dtype=BF16, dropout_p=0.5).with_(seed=None)
    captured = _capture(target.call, problem)
    draws = []
    for _ in range(3):
        captured.replay()
        torch.cuda.synchronize()
        draws.append({name: result.clone() for name, result in captured.results.items()})
    for name in ("y", "x", "lora_a"):
        assert not torch.equal(draws[0][name], draws[1][name]), f"{name}: the same mask twice"
        assert torch.isfinite(draws[2][name]).all()


class _capture:
    """A forward and a backward in one CUDA graph; ``results`` are overwritten by ``replay``."""

    def __init__(self, call: Callable[..., Tensor], problem: LoRAProblem) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run_forward_backward(call, problem)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.results = run_forward_backward(call, problem)

    def replay(self) -> None:
        self._graph.replay()


@on("composed", "fused", "hybrid", "native")
def test_side_stream(target):
    """Kernels run on the current stream: x is NaN until that stream has waited and copied."""
    problem = target.problem((300,), 520, 264, 16, dtype=BF16, dropout_p=0.2)
    expected = run_forward_backward(target.call, problem)
    late = problem.with_(x=torch.full_like(problem.x, float("nan")))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        late.x.copy_(problem.x)
        found = run_forward_backward(target.call, late)
    side.synchronize()
    for name, result in found.items():
        assert torch.equal(result, expected[name]), name


@on("composed", "fused", "hybrid", "native")
def test_threads(target):
    """Several Python threads at once, each on its stream; backward in autograd's own threads."""
    problems = [
        target.problem((300,), 520, 264, 16, dtype=BF16, dropout_p=0.2, generator_seed=i)
        for i in range(4)
    ]
    expected = [run_forward_backward(target.call, problem) for problem in problems]
    failures: list[str] = []

    def work(problem: LoRAProblem, wanted: dict[str, Tensor]) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream() if target.device == "cuda" else None):
                for _ in range(5):
                    found = run_forward_backward(target.call, problem)
                if target.device == "cuda":
                    torch.cuda.current_stream().synchronize()
            failures.extend(n for n in found if not torch.equal(found[n], wanted[n]))
        except Exception as error:  # a thread's exception would be lost
            failures.append(f"{type(error).__name__}: {error}")

    if target.device == "cuda":
        torch.cuda.synchronize()
    started = [
        threading.Thread(target=work, args=pair) for pair in zip(problems, expected, strict=True)
    ]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert not failures, failures


@on("cpu", "composed", "fused", "native")
def test_grad_scaler(target):
    """fp16 from B = 0 as trainers do it: fp32 adapters, a scaled loss, Adam."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(target.device, dtype)

    x = draw(256, 136, dtype=FP16)
    weight = draw(72, 136, dtype=FP16) * 136**-0.5
    lora_a = (draw(8, 136, dtype=FP32) * 136**-0.5).requires_grad_()
    lora_b = torch.zeros(72, 8, device=target.device, requires_grad=True)
    wanted = x.float() @ (weight.float() + 0.3 * draw(72, 4, dtype=FP32) @ draw(4, 136, dtype=FP32)
                          * 136**-0.5).t()  # fmt: skip
    optimizer = torch.optim.Adam([lora_a, lora_b], lr=1e-2)
    scaler = torch.amp.GradScaler(target.device)
    losses = []
    for _ in range(60):
        y = lora_linear(x, weight, lora_a, lora_b, 2.0, backend=target.backend)
        loss = (y.float() - wanted).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0], f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}"


@on("composed", "fused", "native")
def test_compiled(target):
    problem = target.problem((300,), 520, 264, 16, dtype=BF16, dropout_p=0.2)
    function = torch.compile(target.call, fullgraph=True)
    for scaling in (0.7, 0.9):
        each = problem.with_(scaling=torch.tensor(scaling, dtype=torch.float64))
        ours = run_forward_backward(function, each)
        for name, result in run_forward_backward(target.call, each).items():
            assert torch.equal(ours[name], result), name


# ---- offsets past 2**31


@pytest.mark.parametrize("which", ["x", "y"])
@on("composed", "fused", "native")
def test_large_offsets(target, which):
    """x or y of more than 2**31 elements; what the last rows give, and only they count."""
    rows, last = 2**20 + 40, 64
    k, n = (2056, 16) if which == "x" else (16, 2056)
    _need_memory(4 * rows * (k + n) * 2)
    problem = target.problem((last,), k, n, 16, dtype=BF16)
    x = torch.zeros(rows, k, dtype=BF16, device=target.device)
    dy = torch.zeros(rows, n, dtype=BF16, device=target.device)
    x[-last:], dy[-last:] = problem.x, problem.dy
    ours = run_forward_backward(target.call, problem.with_(x=x, dy=dy), needs=_LEAVES)
    eager = run_forward_backward(lora_linear_reference, problem, needs=_LEAVES)
    oracle = oracle_results(problem, needs=_LEAVES)
    for name, result in ours.items():
        result = result[-last:] if name in ("y", "x") else result
        assert_within_policy(name, result, eager[name], oracle[name], BF16)


@on("composed", "fused", "native")
def test_large_dropout_counter(target):
    """More than 2**31 Philox groups: the mask of the last rows, in all three kernels."""
    groups, last, kept_columns, p = 256, 64, 128, 0.5
    rows, k, n = 2**31 // groups + 40, 8 * groups, 8
    _need_memory(3 * rows * k * 2)
    seed = torch.tensor(77, device=target.device)
    random_words = _philox_words((rows - last) * groups, last * groups, (77, 0), 0, seed.device)
    packed = _pack_lanes(random_words, drop_threshold(p)).view(last, groups)
    bit = torch.arange(8, dtype=torch.uint8, device=target.device)
    mask = ((packed.unsqueeze(-1) >> bit) & 1).flatten(-2).bool()  # [last, K]

    one = functools.partial(torch.ones, dtype=BF16, device=target.device)
    x = torch.zeros(rows, k, dtype=BF16, device=target.device)
    x[-last:, :kept_columns] = 1  # so few that bf16 holds every sum exactly
    lora_a, lora_b = one(1, k).requires_grad_(), one(n, 1).requires_grad_()
    weight = torch.zeros(n, k, dtype=BF16, device=target.device)
    dy = torch.zeros(rows, n, dtype=BF16, device=target.device)
    dy[-last:] = 1
    x.requires_grad_()
    y = target.call(
        x=x, weight=weight, lora_a=lora_a, lora_b=lora_b, scaling=1.0, dropout_p=p, seed=seed
    )
    dx, grad_a = torch.autograd.grad(y, (x, lora_a), dy)
    counts = mask[:, :kept_columns].sum(1, keepdim=True)
    assert torch.equal(y[-last:].long(), (2 * counts).expand(last, n)), "forward"
    assert torch.equal(dx[-last:] != 0, mask), "dx"
    # t is 16 in each of the last rows.
    expected = 16 * mask[:, :kept_columns].sum(0)
    assert torch.equal(grad_a[0, :kept_columns].float(), expected.to(BF16).float()), "dA"


def _need_memory(count: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < count + (2 << 30):
        pytest.skip(f"needs {count / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
