"""Backend native on a GPU: what it says of itself, what it takes, and what it leaves to Triton.

The operations' modules run on CPU tensors over the emulated kernels as on a GPU over the real.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from linear_calls import call_of
from routed_calls import call_of as routed_call_of
from routed_results import routed_eager, routed_oracle
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_kernels import explain, lora_linear
from lora_kernels.__main__ import doctor
from lora_kernels.adapters.factors import LoRAFactors
from lora_kernels.base_weights import DenseWeight
from lora_kernels.ops.linear import choice as measured
from lora_kernels.ops.linear import op as autograd
from lora_kernels.ops.linear.plan import make_plan
from lora_kernels.ops.linear.reference import lora_linear_reference
from lora_kernels.ops.linear.triton import tiles
from lora_kernels.ops.routed import call as routed_call
from lora_kernels.ops.routed import plan as routed_plan
from lora_kernels.runtime import cpu_extension as native
from lora_kernels.runtime import cuda_extension as native_cuda
from lora_kernels.runtime import dispatch, machine_files
from lora_kernels.runtime.device_limits import DeviceLimits
from lora_kernels.runtime.dropout import ActiveDropout
from lora_kernels.runtime.plan import forget_plans
from lora_kernels.testing import (
    LoRAProblem,
    assert_within_policy,
    oracle_results,
    run_forward_backward,
)
from lora_kernels.testing.routed_inputs import RoutedProblem, some_ids

ROOT = Path(__file__).resolve().parents[2]
CUDA = torch.device("cuda", 0)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BUILT = "cuda_13.0 sm_80 sm_90a sm_100 compute_100"

pytest.importorskip("triton", reason="what has no CUDA kernel goes to Triton's")


@pytest.fixture
def built(monkeypatch, plans_forgotten):
    """``built(targets, capability)``: an extension and a device that are not there."""

    unavailable = dispatch._native_unavailable_on_cuda.__wrapped__
    monkeypatch.setattr(dispatch, "_native_unavailable_on_cuda", unavailable)
    monkeypatch.setattr(dispatch, "_on_a_cpu", dispatch._on_a_cpu.__wrapped__)

    def pretend(targets: str = BUILT, capability: int = 90) -> None:
        extension = SimpleNamespace(cuda_built_for=targets, level=lambda: 0)
        limits = DeviceLimits("NVIDIA X", capability, 132, 232_448)
        monkeypatch.setattr(native, "_found", lambda: (extension, "built"))
        for module in (native_cuda, measured, machine_files):
            monkeypatch.setattr(module, "limits_of", lambda device: limits)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(dispatch, "_triton_unavailable", lambda device, dtype: None)
        forget_plans()

    yield pretend
    forget_plans()


# ---- what it says of itself


@pytest.mark.parametrize(
    ("targets", "capability", "driver", "reason"),
    [
        (BUILT, 80, 13000, None),
        (BUILT, 86, 13010, None),  # sm_80's machine code
        (BUILT, 89, None, None),
        (BUILT, 90, 13000, None),
        (BUILT, 100, 13000, None),
        (BUILT, 103, 13000, None),
        (BUILT, 120, 13000, None),  # from PTX
        (BUILT, 90, 12080, "built with CUDA 13.0, which the driver of this machine (CUDA 12.8)"),
        ("cuda_12.8 sm_90a compute_90", 90, 12040, None),
        ("cuda_12.8 sm_90a compute_90", 100, 12040, "CUDA 12.8, which the driver of this machine"),
        ("cuda_12.8 sm_90a compute_90", 80, 12080, "built for sm_90a, compute_90"),
        ("cuda_12.8 sm_90a compute_90", 100, 12080, None),
        ("cuda_12.8 sm_86 compute_86", 80, 12080, "this device is sm_80"),
        ("cuda_12.8 sm_90a", 100, 12080, "this device is sm_100"),
    ],
)
def test_which_devices_an_extension_serves(targets, capability, driver, reason):
    found = native_cuda.unserved(tuple(targets.split()), capability, driver)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("targets", "capability", "reason"),
    [
        (BUILT, 90, None),
        (BUILT, 75, "compute capability 8.0 or newer is needed, this device has 7.5"),
        ("", 90, "built without its CUDA part"),
        ("cuda_13.0 sm_80", 90, "built for sm_80"),
    ],
)
def test_what_is_missing(targets, capability, reason, built):
    built(targets, capability)
    for found in (native_cuda.missing(CUDA), dispatch.unavailable("native", CUDA, BF16)):
        assert found is None if reason is None else reason in found
    assert native_cuda.missing(torch.device("cpu")) is not None


@pytest.mark.parametrize(
    ("targets", "capability", "reason"),
    [
        (BUILT, 90, None),
        (BUILT, 80, "compute capability 9.0"),
        (BUILT, 100, "compute capability 9.0"),
        ("cuda_13.0 sm_80 compute_80", 90, "not built for sm_90a"),
    ],
)
def test_where_the_gemm_is_missing(targets, capability, reason, built):
    built(targets, capability)
    found = native_cuda.missing_gemm_tail(CUDA)
    assert found is None if reason is None else reason in found


def test_dtypes_and_triton_are_part_of_the_answer(built, monkeypatch):
    built()
    for dtype in (FP32, torch.float64):
        reason = dispatch.unavailable("native", CUDA, dtype)
        assert "take bfloat16 and float16" in reason and str(dtype)[6:] in reason
        with pytest.raises(ValueError, match="backend='native' cannot serve this call"):
            dispatch.choose("native", CUDA, dtype)
    assert dispatch.choose("native", CUDA, FP16).backend == "native"
    assert dispatch.choose("auto", CUDA, FP16).backend == "composed"
    monkeypatch.setattr(dispatch, "_triton_unavailable", lambda *args: "no package triton")
    assert "no package triton" in dispatch.unavailable("native", CUDA, BF16)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "no native kernel" in dispatch.unavailable("native", CUDA, BF16)
    assert "no native kernel" in dispatch.unavailable("native", torch.device("mps"), BF16)


def test_doctor_says_what_was_built(built, monkeypatch, tmp_path):
    def line() -> str:
        text = "\n".join(doctor())
        return text[text.index("CUDA kernels") : text.index("LORA_KERNELS_BACKEND")].rstrip()

    built()
    expected = "built for sm_80, sm_90a, sm_100 and, as PTX, for what is newer than sm_100"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert line().split("  ", 1)[1] == f"{expected}, with CUDA 13.0; no driver or no device here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert line().endswith(f"{expected}, with CUDA 13.0")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert line().endswith("with CUDA 13.0; this torch is built without CUDA")

    built("")
    reason = tmp_path / "reason.txt"
    reason.write_text("nvcc failed:\nerror: no such thing\n")
    monkeypatch.setattr(native_cuda, "_ERROR_FILE", reason)
    assert line().split("\n") == [
        "CUDA kernels  not built: nvcc failed:",
        " " * 14 + "error: no such thing",
    ]
    assert native_cuda.missing(CUDA).endswith(
        "nvcc failed: (`python -m lora_kernels doctor` shows more)"
    )


@pytest.mark.parametrize("value", ["0", "1"])
def test_doctor_and_a_call_with_and_without_the_extension(value):
    """In a process of their own: whatever is installed here, there is no driver for it."""
    code = (
        "import torch, lora_kernels; from lora_kernels.__main__ import doctor;"
        "print('\\n'.join(doctor()));"
        "layer = lora_kernels.LoRALinear.from_linear(torch.nn.Linear(8, 6), rank=2, alpha=4);"
        "layer(torch.randn(3, 8)).sum().backward()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"LORA_KERNELS_NATIVE": value, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("CUDA kernels"))
    if value == "0":
        assert "switched off by LORA_KERNELS_NATIVE=0" in line
    else:
        assert native_cuda.status().splitlines()[0] in line


# ---- what the operations take


def fake(*shape: int, dtype: torch.dtype = BF16, device: str = "cuda") -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device=device)


def factors(lora_a, lora_b) -> LoRAFactors:
    return LoRAFactors(lora_a, lora_b, 1.0)


def test_the_modules_that_serve(built):
    from lora_kernels.ops.linear import cpu as compiled
    from lora_kernels.ops.linear import cuda
    from lora_kernels.ops.routed import cpu as routed_compiled
    from lora_kernels.ops.routed import cuda as routed_cuda

    built()
    x = fake(3, 8)
    plan = make_plan("native", x, DenseWeight(fake(6, 8)), factors(fake(2, 8), fake(6, 2)), 0.0)
    assert plan.forward is plan.backward is plan.strided_backward is cuda
    on_cpu, weight, a, b = (torch.randn(shape) for shape in ((3, 8), (6, 8), (2, 8), (6, 2)))
    plan = make_plan("native", on_cpu, DenseWeight(weight), factors(a, b), 0.0)
    assert plan.forward is plan.backward is plan.strided_backward is compiled
    assert routed_plan.module_of("native", x) is routed_cuda
    assert routed_plan.module_of("native", on_cpu) is routed_compiled


def test_the_second_half_takes_what_the_first_returns(built, monkeypatch):
    """h is fp32, which no CUDA kernel takes as x; what counts is the result's dtype."""
    from lora_kernels.ops import routed as module

    built()
    problem = RoutedProblem.random(some_ids(9, 2), (3, 16), 72, 40, dtype=BF16, with_weight=False)
    bank = problem.bank().requires_grad_(False)
    routing = problem.routing(bank)
    monkeypatch.setattr(module, "check_h", lambda *_: None)  # the device: bank is on the CPU
    monkeypatch.setattr(module.op, "run", lambda name, call: call.backend)
    for h_dtype in (FP32, BF16):
        h = fake(9, 16, dtype=h_dtype)
        assert module.routed_expand(h, bank, routing, backend="native") == "native"
    with pytest.raises(ValueError, match="take bfloat16 and float16, not float32"):
        module.routed_expand(fake(9, 16, dtype=FP32), bank, routing, dtype=FP32, backend="native")


def test_routed_cuda_is_a_whole_backend():
    from lora_kernels.ops.routed import cuda
    from lora_kernels.ops.routed import triton as launch

    for name in (
        "forward", "backward", "shrink", "shrink_backward", "expand_", "expand_backward",
    ):  # fmt: skip
        assert callable(getattr(cuda, name)) and callable(getattr(launch, name))


def test_fake_results_agree_with_the_kernels(built):
    """On a GPU no mask is stored, and h is fp32."""
    built()
    assert not autograd.stores_mask(CUDA, True, "native")
    assert autograd.stores_mask(torch.device("cpu"), True, "native")
    assert not routed_call.stores_mask(CUDA, torch.tensor(1), "native")
    for dtype in (BF16, FP16):
        assert autograd._dtype_of_h(fake(3, 8, dtype=dtype), "native") == FP32


def test_a_table_may_name_native(built):
    built()
    key = "forward/bfloat16/M8/K4096/N1024/R16/p0"
    seconds = {"composed": 4e-5, "hybrid": 3.5e-5, "fused": 3e-5, "native": 1e-5}
    cells = {key: {"backend": "native", "strategy": "fused", "seconds": seconds}}
    call = x, weight, a, b = fake(8, 4096), fake(1024, 4096), fake(16, 4096), fake(1024, 16)
    sizes = measured.Sizes.of(DenseWeight(weight), a, b, False)
    with tiles.use_cells(cells):
        choice = measured.choose("auto", "forward", x, sizes)
        assert choice.backend == "native" and "native was the fastest measured" in choice.reason
        said = explain(*call).reason
        assert "one CUDA kernel for base and adapter" in said and "; backward composed" in said
        built("")  # an installation without nvcc
        choice = measured.choose("auto", "forward", x, sizes)
        assert choice.backend == "triton" and "linear/triton fused was the fastest" in choice.reason
        assert "but for native: the compiled extension was built without" in choice.reason
    with tiles.use_cells({key: {"backend": "native"}}):  # and no times
        assert measured.choose("auto", "forward", x, sizes).backend == "composed"


@pytest.mark.parametrize(
    ("tokens", "options", "capability", "said"),
    [
        (8, {}, 80, "one CUDA kernel for base and adapter"),
        (64, {}, 90, "one CUDA kernel for base and adapter"),
        (65, {}, 90, "(65 tokens are not 1 to 64): Triton's kernels around a CUDA GEMM"),
        (65, {}, 100, "all kernels are Triton's (the GEMM with a tail is for compute capability"),
        (8, {"dropout_p": 0.1}, 90, "there is dropout"),
        (8, {"output_scale": 1}, 90, "there is an output_scale"),
        (8, {"weight": None}, 90, "there is no base weight"),
    ],
)
def test_explain_names_the_kernels(tokens, options, capability, said, built):
    built(capability=capability)
    x, weight, a, b = fake(2, tokens // 2, 64), fake(48, 64), fake(4, 64), fake(48, 4)
    if tokens % 2:
        x = fake(tokens, 64)
    if "output_scale" in options:
        options = {"output_scale": fake(48)}
    weight = options.pop("weight", weight)
    choice = explain(x, weight, a, b, backend="native", **options)
    assert (
        choice.backend == "native"
        and choice.reason.startswith("asked for")
        and said in choice.reason
    )


# ---- lora_linear over the emulated kernels


@pytest.fixture
def no_triton(monkeypatch):
    """What would go to Triton's kernels raises, by name."""
    from lora_kernels.ops.linear.triton import gemm, launch
    from lora_kernels.ops.routed import triton as routed_launch

    def left(name):
        def refuse(*args, **kwargs):
            raise LookupError(name)

        return refuse

    for module in (launch, routed_launch):
        monkeypatch.setattr(module, "forward", left("forward"))
    monkeypatch.setattr(gemm, "gemm_with_tail", left("gemm"))


def forward(problem: LoRAProblem):
    from lora_kernels.ops.linear import cuda

    call = call_of(problem, save_unscaled=problem.output_scale is not None)
    y, h, mask, unscaled, _ = cuda.forward(call)
    assert mask is None and unscaled is None
    return y, h


def check_forward(problem: LoRAProblem) -> torch.Tensor:
    y, h = forward(problem)
    problem = problem.tight()  # for torch's own GEMMs
    eager = run_forward_backward(lora_linear_reference, problem, needs=())["y"]
    oracle = oracle_results(problem, needs=())["y"]
    assert y.shape == problem.dy.shape and y.dtype == problem.x.dtype and y.is_contiguous()
    assert_within_policy("y", y, eager, oracle, problem.x.dtype)
    rows, a = problem.x.flatten(0, -2), problem.lora_a
    assert h.dtype == FP32 and h.shape == (rows.shape[0], a.shape[0])
    exact = rows.double() @ a.double().t()
    eager_h = (rows @ a.to(rows.dtype).t()).float()
    assert_within_policy("h", h, eager_h, exact, problem.x.dtype)
    return y


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("adapter_dtype", [None, FP32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape",  # leading, K, N, R
    [((1,), 264, 136, 16), ((2, 6), 101, 67, 3), ((64,), 136, 72, 24), ((3, 1, 3), 72, 520, 100)],
    ids=str,
)
def test_decode(shape, dtype, adapter_dtype, emulated, no_triton, poisoned_memory):
    leading, *sizes = shape
    for bias in (True, False):
        check_forward(
            LoRAProblem.random(
                leading, *sizes, dtype=dtype, adapter_dtype=adapter_dtype, with_bias=bias
            )
        )


def test_decode_operands(emulated, no_triton, poisoned_memory, both_gemms):
    """Strided x, transposed factors, factors of two dtypes, a strided bias, fp32 scaling."""
    m, k, n, r = 12, 136, 264, 16
    problem = LoRAProblem.random((m,), k, n, r, dtype=BF16)
    p = problem
    wide = torch.full((m, k + 9), torch.nan, dtype=BF16)
    wide[:, 1 : k + 1] = p.x
    biases = torch.full((n, 2), torch.nan, dtype=BF16)
    biases[:, 0] = p.bias
    whole = torch.full((n, k + 24), torch.nan, dtype=BF16)
    whole[:, 3 : k + 3] = p.weight
    for changes in (
        {"x": p.x.t().contiguous().t()},
        {"x": wide[:, 1 : k + 1]},
        {"x": p.x[:1].expand(m, k)},
        {"weight": whole[:, 3 : k + 3]},
        {"lora_a": p.lora_a.t().contiguous().t()},
        {"lora_b": p.lora_b.t().contiguous().t()},
        {"lora_a": p.lora_a.float()},
        {"lora_a": p.lora_a.half(), "lora_b": p.lora_b.half()},
        {"bias": biases[:, 0]},
        {"scaling": torch.tensor(-1.7)},
    ):
        check_forward(problem.with_(**changes))


@pytest.mark.parametrize("rank", [1, 128, native_cuda.MAX_DECODE_RANK])
@pytest.mark.parametrize("capability", [80, 86, 90])
def test_decode_ranks(rank, capability, emulated, emulated_device, no_triton, poisoned_memory):
    """Up to the largest that is taken, of as many tokens as are."""
    emulated_device(4, capability)
    for dtype, columns in ((BF16, 72), (FP32, 72), (BF16, 71)):
        problem = LoRAProblem.random((64,), columns, 40, rank, dtype=BF16, adapter_dtype=dtype)
        check_forward(problem)


@pytest.mark.parametrize("capability", [80, 86, 90])
def test_routed_ranks(capability, emulated, emulated_device, no_triton, poisoned_memory):
    emulated_device(4, capability)
    width = native_cuda.MAX_DECODE_WIDTH // 8
    ranks = [(width,) * 8, (3, 0, 0, 0, 0, 0, 0, width)]
    problem = RoutedProblem.random(
        some_ids(33, 2), ranks, 72, (24,) * 8, dtype=BF16, with_weight=False
    )
    y, *_ = routed_forward(problem)
    assert_within_policy("y", y, routed_eager(problem)["y"], routed_oracle(problem)["y"], BF16)


def test_what_is_left_to_triton(emulated, no_triton):
    problem = LoRAProblem.random((12,), 40, 24, 4, dtype=BF16)
    columns = problem.weight.t().contiguous().t()
    others = {
        "65 tokens": LoRAProblem.random((13, 5), 40, 24, 4, dtype=BF16),
        "no tokens": LoRAProblem.random((0,), 40, 24, 4, dtype=BF16),
        "dropout": LoRAProblem.random((12,), 40, 24, 4, dtype=BF16, dropout_p=0.2),
        "output_scale": LoRAProblem.random((12,), 40, 24, 4, dtype=BF16, with_output_scale=True),
        "no weight": LoRAProblem.random((12,), 40, 24, 4, dtype=BF16, with_weight=False),
        "a weight by columns": problem.with_(weight=columns),
        "rank": LoRAProblem.random((12,), 40, 24, native_cuda.MAX_DECODE_RANK + 1, dtype=BF16),
    }
    check_forward(problem)
    check_forward(problem.with_(dropout_p=1e-9))  # rounds to none
    for name, other in others.items():
        with pytest.raises(LookupError, match="forward"):
            forward(other)
            raise AssertionError(name)


def matrices(m=40, d=72, c=48, r=8, *, transposed=False, dtype=FP16):
    """left, right, tail_left, tail_right, out."""
    generator = torch.Generator().manual_seed(0)

    def draw(rows, columns):
        return torch.randn(rows, columns, generator=generator).to(dtype)

    right, tail_right = draw(d, c), draw(r, c)
    if transposed:
        right, tail_right = draw(c, d).t(), draw(c, r).t()
    return draw(m, d), right, draw(m, r), tail_right, torch.full((m, c), torch.nan, dtype=dtype)


def cell(**tile) -> dict:
    return {"*": {"native": tile} if tile else {}}


def a_cell(**changes) -> tiles.LinearCell:
    options = dict(direction="forward", dtype="float16", itemsize=2, tokens=40, in_features=72,
                   out_features=48, rank=8, dropout=False, ieee=False)  # fmt: skip
    return tiles.LinearCell(**options | changes)


def test_the_gemm_takes_what_it_can_and_leaves_the_rest(emulated, no_triton):
    from lora_kernels.ops.linear import cuda
    from lora_kernels.ops.linear.triton.operands import Dropout

    drop = Dropout(ActiveDropout(0.5, torch.tensor(3)), 40, 48)
    vector = torch.ones(48, dtype=FP16)
    by_rows, by_columns = matrices(), matrices(transposed=True)
    left, _, tail_left, tail_right, out = by_rows
    for operands, options in (
        (by_rows, {}),
        (by_columns, {}),
        (by_rows, {"drop": drop}),
        (by_columns, {"drop": Dropout(None, 40, 48)}),
        (by_rows, {"bias": vector, "output_scale": 3 * vector}),
    ):
        cuda.gemm_with_tail(a_cell(), *operands, **options)
        a, b, e, f, found = operands
        keep = 1.0
        if "drop" in options and options["drop"].on:
            from lora_kernels.runtime.dropout import keep_mask

            keep = keep_mask(drop.seed, 0.5, 40, 48).double()
        exact = a.double() @ b.double() + keep * (e.double() @ f.double())
        exact = 3 * exact + 1 if "bias" in options else exact
        eager = (a @ b + keep * (e @ f)).half()
        eager = 3 * eager + 1 if "bias" in options else eager
        assert_within_policy("out", found, eager, exact)

    wide = torch.zeros(40, 73, dtype=FP16)
    for reason, operands, options in (
        ("main", (left, None, tail_left, tail_right, out), {}),
        ("unscaled", by_rows, {"unscaled": out}),
        ("dtype", by_rows, {"output_scale": vector.float()}),
        ("dtype", matrices(dtype=FP32), {}),
        ("left by columns", (left.t().contiguous().t(), *by_rows[1:]), {}),
        ("left unaligned", (wide[:, 1:], *by_rows[1:]), {}),
        ("left expanded", (left[:1].expand(40, 72), *by_rows[1:]), {}),
        ("result unaligned", matrices(c=44), {}),
        ("both", (left, by_columns[1], tail_left, tail_right, out), {}),
        ("dropout", by_columns, {"drop": drop}),
    ):
        with pytest.raises(LookupError, match="gemm"):
            cuda.gemm_with_tail(a_cell(), *operands, **options)
            pytest.fail(f"the CUDA kernel took it: {reason}")


@pytest.mark.parametrize("tile", native_cuda.TILES, ids=str)
def test_the_gemm_takes_the_tile_of_the_table(tile, emulated, no_triton, monkeypatch):
    from lora_kernels.ops.linear import cuda

    taken = []
    gemm_tail = emulated.cuda_gemm_tail
    spy = SimpleNamespace(
        cuda_built_for="emulated",
        cuda_gemm_tail=lambda *args: (taken.append(args[-2:]), gemm_tail(*args)),
    )
    monkeypatch.setattr(native, "_found", lambda: (spy, "emulated in a test"))
    with tiles.use_cells(cell(tile_columns=tile[0], cluster=tile[1])):
        operands = matrices()
        cuda.gemm_with_tail(a_cell(), *operands)
    assert taken == [tile]
    left, right, tail_left, tail_right, out = (operand.double() for operand in operands)
    torch.testing.assert_close(out, left @ right + tail_left @ tail_right, rtol=2e-3, atol=2e-2)


def test_default_tiles():
    assert native_cuda.default_tile(8192, 4096, 132) == (256, 2)
    assert native_cuda.default_tile(512, 4096, 132) == (128, 1)  # too few tiles for all
    assert native_cuda.default_tile(128, 65_536, 132) == (256, 1)  # no neighbours


# ---- routed_lora over the emulated kernels


def routed_forward(problem: RoutedProblem, save: bool = False):
    from lora_kernels.ops.routed import cuda

    out = None if problem.out is None else problem.out.clone()
    bank = problem.bank().requires_grad_(False)
    call = routed_call_of(problem, bank, "native", save=save, out=out)
    y, h, mask = cuda.forward(call)
    assert mask is None and (h is not None) == save and (out is None or y is out)
    return y, h, call.bank, call.routing


ROUTED_SHAPES = {
    # tokens, K, widths, ranks
    "mixed": (40, 136, (72,), (1, 3, 8, 24, 64)),
    "odd": (13, 101, (67,), (5, 16, 3)),
    "q k v": (33, 72, (40, 24, 24), ((8, 16, 0), (3, 0, 5), (16, 16, 16), (0, 4, 33))),
    "one token": (1, 264, (136,), (4, 16)),
    "most pairs": (256, 40, (24,), (4, 16, 8)),
}


@pytest.mark.parametrize("mode", ["base", "alone", "into out", "weighted"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("adapter_dtype", [None, FP32], ids=str)
@pytest.mark.parametrize("label", ROUTED_SHAPES)
def test_routed_decode(label, adapter_dtype, dtype, mode, emulated, no_triton, poisoned_memory):
    tokens, columns, widths, ranks = ROUTED_SHAPES[label]
    problem = RoutedProblem.random(
        some_ids(tokens, len(ranks)), ranks, columns, widths, dtype=dtype,
        adapter_dtype=adapter_dtype, with_weight=mode == "base", with_out=mode == "into out",
        weighted=mode == "weighted",
    )  # fmt: skip
    y, h, bank, routing = routed_forward(problem, save=mode != "into out")
    assert_within_policy("y", y, routed_eager(problem)["y"], routed_oracle(problem)["y"], dtype)
    none = problem.ids[:, 0] < 0
    if mode != "base":
        before = torch.zeros_like(y) if problem.out is None else problem.out
        assert torch.equal(y[none], before[none]), "a row without an adapter has changed"
    if h is None:
        return
    assert h.shape == (routing.tokens.shape[0], bank.max_total_rank) and h.dtype == FP32
    exact = torch.zeros(h.shape, dtype=torch.float64)
    eager = torch.zeros(h.shape)
    for adapter, slot in enumerate(bank.slots):
        first, last = routing.offsets[slot], routing.offsets[slot + 1]
        a = bank.factors_of(adapter)[0]
        rows = problem.x[routing.tokens[first:last].long()]
        exact[first:last, : a.shape[0]] = rows.double() @ a.double().t()
        eager[first:last, : a.shape[0]] = (rows @ a.to(dtype).t()).float()
    assert_within_policy("h", h, eager, exact, dtype)
    assert (h[exact == 0] == 0).all(), "not zero beyond the adapter's rank"


def test_what_routed_leaves_to_triton(emulated, no_triton):
    ranks, columns, width = (3, 8), 40, 24
    ids = some_ids(12, 2)
    usual = {"dtype": BF16, "with_weight": False}
    others = {
        "two adapters per token": RoutedProblem.random(
            some_ids(12, 2, 2), ranks, columns, width, **usual
        ),
        "257 tokens": RoutedProblem.random(some_ids(257, 2), ranks, columns, width, **usual),
        "dropout": RoutedProblem.random(ids, ranks, columns, width, dropout=0.5, **usual),
        "nine slices": RoutedProblem.random(ids, [(2,) * 9, (3,) * 9], columns, (8,) * 9, **usual),
        "fp16 adapters over bf16": RoutedProblem.random(
            ids, ranks, columns, width, adapter_dtype=FP16, **usual
        ),
        "ranks": RoutedProblem.random(ids, (3, 513), columns, width, **usual),
        "no tokens": RoutedProblem.random(ids[:0], ranks, columns, width, **usual),
    }
    routed_forward(RoutedProblem.random(ids, ranks, columns, width, **usual))
    routed_forward(RoutedProblem.random(ids, [(2,) * 8, (3,) * 8], columns, (8,) * 8, **usual))
    for name, other in others.items():
        with pytest.raises(LookupError, match="forward"):
            routed_forward(other)
            raise AssertionError(name)
    into = RoutedProblem.random(ids, ranks, columns, width, with_out=True, **usual)
    routed_forward(into)
    with pytest.raises(LookupError, match="forward"):
        routed_forward(into.with_(out=into.out.t().contiguous().t()))


def test_a_refilled_routing_is_read_when_the_kernel_runs(emulated, no_triton):
    """Nothing of a routing is read on the host: what a captured graph relies on."""
    from lora_kernels.ops.routed import Routing, cuda

    problem = RoutedProblem.random(some_ids(20, 3), (3, 16, 8), 40, 24, dtype=BF16,
                                   with_weight=False)  # fmt: skip
    bank = problem.bank().requires_grad_(False)
    routing = Routing.empty(20, bank)
    tensors = routing.tensors(with_plan=False)
    for seed in range(3):
        ids = some_ids(20 - 3 * seed, 3, seed=seed)
        routing.set_tokens_(ids[:, 0])
        again = routing.tensors(with_plan=False)
        assert all(a is b for a, b in zip(tensors[:4], again[:4], strict=True))
        y = cuda.forward(routed_call_of(problem, bank, "native", tensors)).y
        filled = torch.full((20, 1), -1)
        filled[: len(ids)] = ids
        expected = problem.with_(ids=filled)
        assert_within_policy(
            "y", y, routed_eager(expected)["y"], routed_oracle(expected)["y"], BF16
        )


def test_named_native_runs_on_this_cpu():
    """Not the CUDA kernels: a CPU tensor goes to the C++ ones."""
    if native.missing():
        pytest.skip(native.missing())
    p = LoRAProblem.random((5,), 8, 6, 2)
    y = lora_linear(p.x, p.weight, p.lora_a, p.lora_b, 0.7, p.bias, backend="native")
    torch.testing.assert_close(y, lora_linear_reference(
        p.x, p.weight, p.lora_a, p.lora_b, p.scaling, p.bias))  # fmt: skip


def test_a_graph_takes_the_choice_for_a_constant(built):
    """Also where a device would have to be asked: routed_lora chooses while it is traced."""
    built()

    def choose(x):
        return x + (dispatch.choose("native", CUDA, FP16).backend == "native")

    x = torch.zeros(2)
    assert torch.equal(torch.compile(choose, fullgraph=True, backend="eager")(x), x + 1)
