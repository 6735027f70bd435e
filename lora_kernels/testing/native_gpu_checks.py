"""What the compiled extension's CUDA kernels must get right on a GPU; no pytest needed.

The grids of :mod:`gpu_checks`, :mod:`routed_gpu_checks` and :mod:`gpu_long_checks` run over
``native`` too. Here is what they do not reach: the sizes of decoding, every tile of the GEMM with a
tail, and small calls of each kernel for compute-sanitizer. Bodies that ask for a backend by name
run on a CPU over ``composed`` as well.
"""

import functools
import itertools

import torch
from gaps import vendor_gap
from routed_results import call_routed, routed_eager, routed_oracle
from torch import Tensor

from lora_kernels import lora_linear
from lora_kernels.ops.linear.triton.operands import Dropout
from lora_kernels.ops.routed import Routing, routed_lora
from lora_kernels.runtime import cuda_extension
from lora_kernels.runtime.device_limits import padded_rows
from lora_kernels.runtime.dropout import ActiveDropout, keep_mask
from lora_kernels.testing import gpu_checks
from lora_kernels.testing.gpu_checks import BF16, FP16, FP32, Check, Skip, Target, poisoned_memory
from lora_kernels.testing.inputs import oracle_results, run_forward_backward
from lora_kernels.testing.policy import Draw, assert_draws_within_policy, assert_within_policy
from lora_kernels.testing.routed_gpu_checks import moved, some_ids
from lora_kernels.testing.routed_inputs import RoutedProblem

TOKENS = (1, 2, 7, 8, 9, 16, 33, 64)
# K, N, R, dtype of the adapters (None: x's)
DECODE = {
    "aligned": (512, 264, 16, None),
    "odd": (101, 1003, 3, None),
    "rank 64": (1024, 520, 64, None),
    "rank 100, fp32 adapters": (320, 136, 100, FP32),
    "fp32 adapters, odd": (255, 523, 5, FP32),
    "large": (4096, 4096, 16, None),
}


def decode(label: str, dtype: torch.dtype, target: Target) -> None:
    """Forward without gradients: the decode kernel, with and without bias; the same bits twice."""
    k, n, rank, adapter_dtype = DECODE[label]
    for tokens, bias in itertools.product(TOKENS, (True, False)):
        problem = target.problem(
            (tokens,), k, n, rank, dtype=dtype, adapter_dtype=adapter_dtype, with_bias=bias,
            generator_seed=tokens,
        )  # fmt: skip
        first = gpu_checks.check_policy(target, problem, needs=())["y"]
        again = run_forward_backward(target.call, problem, needs=())["y"]
        assert torch.equal(again, first), f"{tokens} tokens: other bits in the second run"


def decode_and_backward(target: Target) -> None:
    """h of the decode kernel feeds the backward."""
    for tokens in (1, 9, 64):
        for adapter_dtype in (None, FP32):
            problem = target.problem((tokens,), 264, 136, 24, dtype=BF16,
                                     adapter_dtype=adapter_dtype)  # fmt: skip
            gpu_checks.check_policy(target, problem)


def decode_strides(target: Target) -> None:
    """x as a slice, transposed and expanded; factors transposed; a scaling on the device."""
    m, k, n = 12, 136, 264
    problem = target.problem((m,), k, n, 16, dtype=BF16)
    x = problem.x
    for changes in (
        {"x": x.t().contiguous().t()},
        {"x": gpu_checks.amid(x, vendor_gap(BF16, x.device))},
        {"x": x[:1].expand(m, k)},
        {"x": x.view(2, 6, k)},
        {"weight": problem.weight.t().contiguous().t()},
        {"lora_a": problem.lora_a.t().contiguous().t()},
        {"lora_b": problem.lora_b.t().contiguous().t()},
        {"scaling": problem.scaling.to(target.device, FP32)},
    ):
        if "x" in changes and changes["x"].ndim == 3:
            changes["dy"] = problem.dy.view(2, 6, n)
        gpu_checks.check_policy(target, problem.with_(**changes), needs=())


def decode_graph(target: Target) -> None:
    """Captured once, replayed over other values in the same memory."""
    if target.device != "cuda":
        raise Skip("there are no CUDA graphs on a CPU")
    static = target.problem((8,), 1024, 520, 16, dtype=BF16)
    names = ("x", "weight", "lora_a", "lora_b", "bias")

    def call() -> Tensor:
        with torch.no_grad():
            return target.call(scaling=0.7, **{name: getattr(static, name) for name in names})

    captured, y = _capture(call)
    for seed in (1, 2):
        other = target.problem((8,), 1024, 520, 16, dtype=BF16, generator_seed=seed)
        for name in names:
            getattr(static, name).copy_(getattr(other, name))
        captured.replay()
        torch.cuda.synchronize()
        eager = run_forward_backward(_reference, other, needs=())["y"]
        oracle = oracle_results(other, needs=())["y"]
        assert_within_policy("y", y, eager, oracle, BF16)


def _reference(**inputs) -> Tensor:
    return lora_linear(**inputs, backend="reference")


def _capture(call) -> tuple["torch.cuda.CUDAGraph", Tensor]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


# ---- many adapters

# slices: out_features of each
ROUTED = {
    "one slice": ((264,), (1, 3, 8, 24, 64, 160)),
    "odd": ((67, 5), (1, 3, 8, 24, 64, 160)),
    "q k v": ((512, 136, 136), (16, 8, 64, 33)),
    "eight slices": ((24, 16, 40, 8, 24, 16, 40, 8), (4, 16, 3)),
    "large": ((4096,), (16, 64, 32, 8)),
}


def routed(label: str, dtype: torch.dtype, adapter_dtype: torch.dtype | None, target) -> None:
    """Without gradients: shrink and expand in one launch, over base, alone, and into ``out``."""
    widths, ranks = ROUTED[label]
    columns = {"odd": 101, "large": 4096}.get(label, 520)
    if len(widths) > 1:  # another rank in each slice, and none in some
        ranks = [
            tuple((rank + 5 * s) * ((i + s) % 4 != 1) for s in range(len(widths)))
            for i, rank in enumerate(ranks)
        ]
    modes = ({}, {"with_weight": False}, {"with_weight": False, "with_out": True})
    for tokens, mode in itertools.product((1, 5, 32, 64, 200, 256), modes):
        problem = RoutedProblem.random(
            some_ids(tokens, len(ranks)), ranks, columns, widths, dtype=dtype,
            adapter_dtype=adapter_dtype, generator_seed=tokens, **mode,
        )  # fmt: skip
        y = _routed_forward(problem, target)
        if problem.weight is None:
            none = problem.ids[:, 0] < 0
            before = torch.zeros_like(y) if problem.out is None else problem.out
            assert torch.equal(y[none], before[none]), "a row without an adapter has changed"


def _routed_forward(problem: RoutedProblem, target: Target) -> Tensor:
    """y without gradients, on the CPU, after holding it against fp64."""

    def draw(number: int) -> Draw:
        drawn = problem.redrawn(number)
        there = moved(drawn, target.device)
        bank = there.bank().requires_grad_(False)
        out = None if there.out is None else there.out.clone()
        with torch.no_grad(), poisoned_memory():
            y = call_routed(there, bank, target.backend, out=out).cpu()
        return {"y": y}, routed_eager(drawn), routed_oracle(drawn)

    return assert_draws_within_policy(draw, problem.x.dtype)["y"]


def routed_graph(target: Target) -> None:
    """One graph of an inference, three fillings of its routing."""
    if target.device != "cuda":
        raise Skip("there are no CUDA graphs on a CPU")
    problem = moved(
        RoutedProblem.random(some_ids(48, 6), (1, 3, 8, 24, 64, 160), 520, (264, 72), dtype=BF16,
                             with_weight=False), "cuda",
    )  # fmt: skip
    bank = problem.bank().requires_grad_(False)
    bank.reserve()
    routing = Routing.empty(48, bank).set_tokens_(problem.ids[:, 0])
    out = torch.empty_like(problem.dy)

    def call() -> Tensor:
        with torch.no_grad():
            return routed_lora(problem.x, bank, routing, out.zero_(), backend=target.backend)

    captured, y = _capture(call)
    for seed in (0, 1, 2):
        ids = some_ids(48 - 3 * seed, 6, seed=seed)[:, 0]
        routing.set_tokens_(ids.cuda())
        captured.replay()
        replayed = y.clone()
        fresh = Routing.empty(48, bank).set_tokens_(ids)
        with torch.no_grad():
            expected = routed_lora(problem.x, bank, fresh, backend=target.backend)
        assert torch.equal(replayed, expected), f"filling {seed}"


# ---- the GEMM with a tail

# M, D, C, R
GEMM = {
    "small": (64, 64, 128, 16),
    "edges": (200, 136, 264, 24),
    "deep": (300, 4096, 520, 64),
    "many tiles": (2176, 1032, 4104, 160),
}


def gemm_tail(label: str, dtype: torch.dtype, transposed: bool, p: float, target: Target) -> None:
    """Every tile, with bias and output scale and without, against fp64; the same bits twice."""
    for with_vectors in (False, True):
        draw = functools.partial(_gemm_tail, label, dtype, transposed, p, with_vectors, target)
        assert_draws_within_policy(draw, dtype)


def _gemm_tail(
    label: str, dtype: torch.dtype, transposed: bool, p: float, with_vectors: bool,
    target: Target, number: int,
) -> Draw:  # fmt: skip
    """The results of every tile, eager's and fp64's, of one draw."""
    m, d, c, r = GEMM[label]
    generator = torch.Generator(target.device).manual_seed(m + r + 1000 * number)

    def draw(rows: int, columns: int, spread: float = 1.0) -> Tensor:
        values = torch.randn(rows, columns, generator=generator, device=target.device) * spread
        out = padded_rows(values, values.shape, dtype)
        return out.copy_(values)

    left, tail_left = draw(m, d), draw(m, r)
    right, tail_right = draw(d, c, d**-0.5), draw(r, c)
    if transposed:
        right, tail_right = draw(c, d, d**-0.5).t(), draw(c, r).t()
    bias, scale = draw(1, c)[0], draw(1, c)[0]
    seed = torch.tensor(0x1234_5678_9ABC_DEF1, device=target.device)
    drop = Dropout(ActiveDropout(p, seed) if p else None, m, c)
    keep = keep_mask(seed, p, m, c) if p else torch.ones(m, c, dtype=torch.bool, device=seed.device)

    def formula(precision: torch.dtype) -> Tensor:
        matrices = (left, right, tail_left, tail_right)
        a, b, e, f = (matrix.to(precision) for matrix in matrices)
        y = a @ b + torch.where(keep, e @ f, 0)
        return y * scale.to(precision) + bias.to(precision) if with_vectors else y

    vectors = {"bias": bias, "output_scale": scale} if with_vectors else {}
    ours = {}
    for tile_columns, cluster in (*cuda_extension.TILES, (0, 0)):
        found = []
        for _ in range(2):
            with poisoned_memory():
                out = left.new_empty((m, c))
            cuda_extension.gemm_tail(
                left, right, tail_left, tail_right, out, drop=drop, tile_columns=tile_columns,
                cluster=cluster, **vectors,
            )  # fmt: skip
            found.append(out)
        name = f"{tile_columns}x{cluster}"
        assert torch.equal(*found), f"{name}: other bits in the second run"
        ours[name] = found[0]
    eager, oracle = formula(dtype), formula(torch.float64)
    return ours, dict.fromkeys(ours, eager), dict.fromkeys(ours, oracle)


# ---- small calls of each kernel, for compute-sanitizer


def small_calls() -> None:
    """Each kernel and its variants, in sizes that are multiples of nothing."""
    target = Target("cuda", "native")
    for sizes, adapter_dtype in (((9, 520, 136, 16), None), ((3, 101, 67, 3), FP32)):
        rows, *others = sizes
        problem = target.problem((rows,), *others, dtype=BF16, adapter_dtype=adapter_dtype)
        run_forward_backward(target.call, problem, needs=())
    for with_out in (False, True):
        problem = RoutedProblem.random(
            some_ids(37, 4), (3, 16, 8, 40), 264, (136, 72), dtype=BF16, with_weight=False,
            with_out=with_out,
        )  # fmt: skip
        there = moved(problem, "cuda")
        with torch.no_grad():
            call_routed(there, there.bank().requires_grad_(False), "native", out=there.out)
    if cuda_extension.missing_gemm_tail(torch.device("cuda", 0)) is None:
        for transposed, p in ((True, 0.0), (False, 0.0), (False, 0.3)):
            gemm_tail("edges", BF16, transposed, p, target)
    torch.cuda.synchronize()


# ---- the list


def checks() -> list[Check]:
    """In order of worth, before the grids that :func:`of_native` picks."""
    found = []

    def add(name: str, run, on_cpu: bool = True) -> None:
        found.append(Check(f"native {name}", run, on_cpu=on_cpu))

    for dtype, label in itertools.product((BF16, FP16), DECODE):
        kind = str(dtype).removeprefix("torch.")
        add(f"decode {kind} {label}", functools.partial(decode, label, dtype), label != "large")
    for dtype, adapter_dtype, label in itertools.product((BF16, FP16), (None, FP32), ROUTED):
        kind = str(dtype).removeprefix("torch.") + (", fp32 adapters" if adapter_dtype else "")
        run = functools.partial(routed, label, dtype, adapter_dtype)
        add(f"routed decode {kind} {label}", run, label not in ("large", "q k v"))
    for label, dtype, (transposed, p) in itertools.product(
        GEMM, (BF16, FP16), ((True, 0.0), (False, 0.0), (False, 0.3))
    ):
        kind = f"{str(dtype).removeprefix('torch.')}{' transposed' if transposed else ''} p {p:g}"
        run = functools.partial(_where_there_is_one, label, dtype, transposed, p)
        add(f"gemm_tail {kind} {label}", run, on_cpu=False)
    for run in (decode_and_backward, decode_strides, decode_graph, routed_graph):
        add(run.__name__.replace("_", " "), run)
    return found


def _where_there_is_one(label, dtype, transposed, p, target: Target) -> None:
    if reason := cuda_extension.missing_gemm_tail(torch.device(target.device, 0)):
        raise Skip(reason)
    gemm_tail(label, dtype, transposed, p, target)


def of_native(checks: list[Check]) -> list[Check]:
    """What another list has for CUDA kernels: half precision; strategies are Triton's alone."""
    return [
        check
        for check in checks
        if check.half and check.strategy == "fused" and "fused GEMM" not in check.name
    ]
