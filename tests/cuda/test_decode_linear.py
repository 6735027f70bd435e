"""The linear layer for few tokens, thread by thread on the CPU, against fp64."""

import pytest
import torch
from guarded import guarded, survives
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.ops.linear.reference import lora_linear_reference
from lora_kernels.runtime import cuda_extension as native_cuda
from lora_kernels.testing import LoRAProblem, assert_within_policy

DTYPES = [torch.bfloat16, torch.float16]

pytestmark = pytest.mark.usefixtures("emulated", "poisoned_memory")


def run(problem: LoRAProblem, **changes) -> tuple[Tensor, Tensor]:
    p = problem.with_(**changes)
    h = torch.empty(p.x.shape[:-1].numel(), p.lora_a.shape[0])
    y = native_cuda.decode_linear(p.x, p.weight, p.lora_a, p.lora_b, p.scaling, p.bias, h)
    return y, h


def formula(problem: LoRAProblem) -> tuple[Tensor, Tensor]:
    """y and h with the roundings of eager torch."""
    p = problem
    y = lora_linear_reference(p.x, p.weight, p.lora_a, p.lora_b, p.scaling, p.bias)
    return y, F.linear(p.x, p.lora_a.to(p.x.dtype))


def check(problem: LoRAProblem) -> None:
    y, h = run(problem)
    (eager, eager_h), (oracle, oracle_h) = formula(problem), formula(problem.double())
    assert_within_policy("y", y, eager, oracle)
    # Kept in fp32; of fp32 factors the products are those of x's dtype all the same.
    same = problem.lora_a.dtype == problem.x.dtype
    exact = F.linear(problem.x.float(), problem.lora_a.float())
    in_fp32 = exact if same else eager_h.float()
    assert_within_policy("h", h, in_fp32, oracle_h, None if same else problem.x.dtype)


def padded(matrix: Tensor, multiple: int, offset: int) -> Tensor:
    """The same rows, a multiple of some elements apart, with NaN between them."""
    rows, columns = matrix.shape
    pitch = (columns + offset + multiple) // multiple * multiple
    storage = torch.full((rows, pitch), torch.nan, dtype=matrix.dtype)
    view = storage[:, offset : offset + columns]
    return view.copy_(matrix)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=["same", "fp32_adapters"])
@pytest.mark.parametrize(
    "m, k, n, r",
    [
        (1, 40, 24, 3),
        (1, 256, 100, 16),
        (3, 37, 1, 8),
        (8, 1000, 100, 24),
        (9, 256, 520, 1),
        (17, 40, 100, 64),
        (17, 37, 24, 100),
        (33, 1000, 24, 8),
        (64, 256, 24, 136),
        (65, 40, 100, 16),
        (65, 1, 3, 1),
    ],
)
def test_sizes(m, k, n, r, adapter_dtype, dtype):
    check(LoRAProblem.random((m,), k, n, r, dtype=dtype, adapter_dtype=adapter_dtype))


@pytest.mark.parametrize("multiprocessors, n", [(8, 200), (8, 520), (132, 520), (132, 100)])
def test_every_number_of_rows(emulated_device, multiprocessors, n):
    """256, 128, 64 and 32 per cluster: the warps split rows, or the depth."""
    emulated_device(multiprocessors=multiprocessors)
    check(LoRAProblem.random((9,), 1000, n, 16, dtype=torch.bfloat16))


@pytest.mark.parametrize("m, k, r", [(1, 3304, 8), (9, 1704, 40), (40, 1000, 136), (3, 1001, 24)])
def test_without_clusters(emulated_device, m, k, r):
    """Compute capability 8.0: a block has all of K, and x comes in passes."""
    emulated_device(capability=80)
    check(LoRAProblem.random((m,), k, 100, r, dtype=torch.float16))


def test_x_in_passes():
    check(LoRAProblem.random((33,), 7000, 24, 16, dtype=torch.bfloat16))


@pytest.mark.parametrize("rank, m", [(500, 64), (1000, 9)])
def test_large_ranks(rank, m):
    """h would not fit for all tokens at once."""
    check(LoRAProblem.random((m,), 64, 40, rank, dtype=torch.bfloat16))


@pytest.mark.parametrize("m, k", [(9, 3200), (9, 1001)])
def test_the_largest_rank_on_the_smallest_device(emulated_device, m, k):
    """With the 99 KB of compute capability 8.6."""
    emulated_device(capability=86)
    rank = native_cuda.MAX_DECODE_RANK
    check(LoRAProblem.random((m,), k, 24, rank, dtype=torch.bfloat16))


def test_too_large_a_rank_is_an_error():
    problem = LoRAProblem.random((1,), 8, 8, 20_000, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="rank 20000"):
        run(problem)


@pytest.mark.parametrize("rank", [12, 13])
@pytest.mark.parametrize("multiple, offset", [(8, 0), (8, 8), (1, 3)])
def test_strides_and_alignment(multiple, offset, rank):
    """Rows that end, and ranks that end, in NaN; the same bits whichever way they are read."""
    problem = LoRAProblem.random((9,), 200, 40, rank, dtype=torch.bfloat16)
    matrices = ("x", "weight", "lora_a", "lora_b")
    views = {name: padded(getattr(problem, name), multiple, offset) for name in matrices}
    for ours, expected in zip(run(problem, **views), run(problem), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=["same", "fp32_adapters"])
def test_bias_and_scaling(adapter_dtype):
    problem = LoRAProblem.random(
        (5,), 72, 40, 8, dtype=torch.bfloat16, adapter_dtype=adapter_dtype, with_bias=False
    )
    check(problem)
    on_device, _ = run(problem, scaling=torch.tensor(-1.3))
    as_number, _ = run(problem, scaling=-1.3)
    assert torch.equal(on_device, as_number)
    check(problem.with_(scaling=torch.tensor(-1.3)))


def test_scaled_h_may_be_too_large_for_fp16():
    """h and y are not: h is 2560, of which 32 are infinite."""
    problem = LoRAProblem.random((3,), 64, 24, 4, dtype=torch.float16, with_bias=False)
    p = problem.with_(x=torch.ones_like(problem.x), weight=torch.zeros_like(problem.weight))
    a, b = torch.full_like(p.lora_a, 40.0), torch.full_like(p.lora_b, 1e-3)
    check(p.with_(lora_a=a, lora_b=b, scaling=torch.tensor(32.0)))


def test_h_need_not_be_saved():
    p = LoRAProblem.random((5,), 72, 40, 8, dtype=torch.bfloat16)
    y = native_cuda.decode_linear(p.x, p.weight, p.lora_a, p.lora_b, p.scaling, p.bias)
    assert torch.equal(y, run(p)[0])


@pytest.mark.parametrize("r", [16, 72])
@pytest.mark.parametrize("capability", [90, 80])
def test_a_row_has_the_same_bits_in_any_batch(emulated_device, capability, r):
    emulated_device(capability=capability)
    problem = LoRAProblem.random((65,), 904, 72, r, dtype=torch.bfloat16)
    y, h = run(problem)
    for rows in (slice(0, 1), slice(64, 65), slice(3, 11), slice(20, 37), slice(0, 64)):
        alone, h_alone = run(problem, x=problem.x[rows])
        assert torch.equal(alone, y[rows]) and torch.equal(h_alone, h[rows])


def test_nan_stays_in_its_row_and_its_column():
    problem = LoRAProblem.random((10,), 104, 40, 8, dtype=torch.bfloat16)
    y, h = run(problem)
    x, weight = problem.x.clone(), problem.weight.clone()
    x[4, 50] = torch.nan
    weight[17, 103] = torch.inf
    poisoned, h_poisoned = run(problem, x=x, weight=weight)
    assert poisoned[4].isnan().all() and h_poisoned[4].isnan().all()
    rows = torch.arange(10) != 4
    assert torch.equal(h_poisoned[rows], h[rows])
    assert not poisoned[rows][:, 17].isfinite().any()
    columns = torch.arange(40) != 17
    assert torch.equal(poisoned[rows][:, columns], y[rows][:, columns])


@pytest.mark.parametrize("m, k, n, r", [(1, 40, 24, 8), (9, 72, 20, 4), (3, 37, 27, 5)])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=["same", "fp32_adapters"])
def test_nothing_is_read_outside(m, k, n, r, adapter_dtype):
    problem = LoRAProblem.random((m,), k, n, r, dtype=torch.bfloat16, adapter_dtype=adapter_dtype)
    names = ("x", "weight", "lora_a", "lora_b", "bias")
    tight = {name: guarded(getattr(problem, name)) for name in names}
    assert survives(lambda: run(problem, **tight))


def test_nothing_is_written_outside(monkeypatch):
    """With y in the middle of something larger, at an odd place."""
    p = LoRAProblem.random((9,), 40, 27, 5, dtype=torch.bfloat16)
    expected, _ = run(p)
    storage = torch.full((11, 40), torch.nan, dtype=torch.bfloat16)
    out = storage[1:10, 5:32]
    monkeypatch.setattr(Tensor, "new_empty", lambda *_: out)
    y = native_cuda.decode_linear(p.x, p.weight, p.lora_a, p.lora_b, p.scaling, p.bias)
    assert y is out and torch.equal(out, expected)
    out.fill_(torch.nan)
    assert storage.isnan().all()
