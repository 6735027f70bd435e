"""The sm_90a GEMM with a tail, thread by thread on the CPU, against fp64."""

import pytest
import torch
from torch import Tensor

from lora_kernels.ops.linear.triton.operands import Dropout
from lora_kernels.runtime import cuda_extension as native_cuda
from lora_kernels.runtime.dropout import ActiveDropout, MaskPlace, keep_mask
from lora_kernels.testing import assert_within_policy
from lora_kernels.testing.inputs import without_gaps

DTYPES = [torch.bfloat16, torch.float16]


def matrix(rows: int, columns: int, dtype: torch.dtype, generator, scale: float = 1.0) -> Tensor:
    """Rows that begin at multiples of 16 bytes, with NaN between them."""
    pitch = -(-columns // 8) * 8 + 8
    storage = torch.full((rows, pitch), torch.nan, dtype=dtype)
    view = storage[:, :columns]
    view.copy_(torch.randn(rows, columns, generator=generator) * scale)
    return view


def check(
    m: int, d: int, c: int, r: int, dtype: torch.dtype, *, transposed: bool, p: float = 0.0,
    vectors: bool = False, tile_columns: int = 0, cluster: int = 0,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(m + 7 * d + 13 * c + r)
    left, tail_left = matrix(m, d, dtype, generator), matrix(m, r, dtype, generator)
    shape = (c, d) if transposed else (d, c)
    right = matrix(*shape, dtype, generator, d**-0.5)
    tail_right = matrix(*((c, r) if transposed else (r, c)), dtype, generator)
    if transposed:
        right, tail_right = right.t(), tail_right.t()
    bias = torch.randn(c, generator=generator).to(dtype) if vectors else None
    output_scale = torch.randn(c, generator=generator).to(dtype) if vectors else None
    seed = torch.tensor(-(2**62) + 5)
    drop = Dropout(ActiveDropout(p, seed), m, c) if p else None
    keep = keep_mask(seed, p, m, c) if p else torch.ones(m, c, dtype=torch.bool)

    def formula(precision: torch.dtype) -> Tensor:
        operands = (left, right, tail_left, tail_right)  # copied: torch's GEMM may read the NaN
        a, b, e, f = (without_gaps(operand).to(precision) for operand in operands)
        y = a @ b + torch.where(keep, e @ f, 0)
        if vectors:
            y = y * output_scale.to(precision) + bias.to(precision)
        return y

    storage = torch.full((m + 2, -(-c // 8) * 8 + 16), torch.nan, dtype=dtype)
    out = storage[1 : m + 1, 8 : 8 + c]
    native_cuda.gemm_tail(
        left, right, tail_left, tail_right, out, bias=bias, output_scale=output_scale, drop=drop,
        tile_columns=tile_columns, cluster=cluster,
    )  # fmt: skip
    assert_within_policy("out", out, formula(dtype), formula(torch.float64))
    out.fill_(torch.nan)
    assert storage.isnan().all(), "something outside of the result was written"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [True, False], ids=["forward", "dx"])
@pytest.mark.parametrize(
    "m, d, c, r",
    [
        (1, 8, 8, 1),
        (5, 40, 24, 3),
        (64, 64, 64, 16),
        (127, 100, 130, 24),
        (128, 128, 256, 64),
        (130, 200, 264, 100),
        (300, 72, 520, 8),  # more tiles than blocks
    ],
)
def test_sizes(emulated, both_gemms, m, d, c, r, transposed, dtype):
    check(m, d, c, r, dtype, transposed=transposed)


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("tile_columns", [128, 256])
@pytest.mark.parametrize("transposed, p", [(True, 0.0), (False, 0.0), (False, 0.3)])
def test_variants(emulated, transposed, p, tile_columns, cluster):
    """Every variant walks several tiles, the last of them partly outside, and wraps its ring."""
    options = {"tile_columns": tile_columns, "cluster": cluster}
    check(300, 472, 392, 20, torch.bfloat16, transposed=transposed, p=p, **options)


@pytest.mark.parametrize("seed", range(8))
def test_no_block_ends_while_another_tells_it_something(emulated, monkeypatch, seed):
    """Whatever the order of the threads, and however late the messages."""
    monkeypatch.setenv("LORA_EMULATOR_SEED", str(seed))
    for depth in (64, 200, 500):
        check(200, depth, 24, 8, torch.bfloat16, transposed=True, tile_columns=128, cluster=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, c, p", [(70, 100, 0.5), (9, 257, 0.05), (130, 24, 0.9)])
def test_the_tail_is_masked(emulated, m, c, p, dtype):
    check(m, 64, c, 40, dtype, transposed=False, p=p)


@pytest.mark.parametrize("transposed", [True, False], ids=["forward", "dx"])
@pytest.mark.parametrize("c", [33, 256])
def test_bias_and_output_scale(emulated, c, transposed):
    check(70, 48, c, 16, torch.float16, transposed=transposed, vectors=True)


@pytest.mark.parametrize("tile_columns", [128, 256])
@pytest.mark.parametrize(
    "rows, columns, before",
    [
        pytest.param(slice(0, 150), slice(0, 300), 0, id="whole"),
        pytest.param(slice(7, 140), slice(0, 300), 3, id="rows"),
        pytest.param(slice(0, 150), slice(64, 208), 0, id="columns"),
        pytest.param(slice(7, 140), slice(24, 277), 2**31 // 38 - 60, id="both, across 2^31"),
        pytest.param(slice(0, 150), slice(0, 300), 2**32 // 38 - 60, id="whole, across 2^32"),
        pytest.param(slice(7, 140), slice(24, 277), 2**40 + 3, id="both, far"),
    ],
)
def test_the_mask_of_a_slice_is_the_wholes(emulated, rows, columns, before, tile_columns):
    """Of an activation [150, 300] that begins at row ``before``."""
    seed, dtype = torch.tensor(-(2**62) + 5), torch.bfloat16
    mask = keep_mask(seed, 0.4, 150, 300, 0, MaskPlace(before))[rows, columns]
    m, c = mask.shape
    pitch = -(-c // 8) * 8
    left, tail_left = torch.zeros(m, 64, dtype=dtype), torch.ones(m, 8, dtype=dtype)
    right, tail_right = torch.zeros(64, pitch, dtype=dtype), torch.ones(8, pitch, dtype=dtype)
    out = torch.empty(m, pitch, dtype=dtype)[:, :c]
    place = MaskPlace(before + rows.start, columns.start, 300)
    drop = Dropout(ActiveDropout(0.4, seed, place), m, c)
    native_cuda.gemm_tail(
        left, right[:, :c], tail_left, tail_right[:, :c], out, drop=drop, tile_columns=tile_columns
    )
    assert torch.equal(out != 0, mask)


def test_a_dropped_nan_does_not_reach_the_result(emulated):
    """As the definition has it: what is dropped is zero, not zero times what was there."""
    m, c, dtype = 16, 64, torch.bfloat16
    left, right = torch.ones(m, 64, dtype=dtype), torch.ones(64, c, dtype=dtype)
    tail_left = torch.ones(m, 8, dtype=dtype)
    tail_right = torch.full((8, c), torch.nan, dtype=dtype)
    drop = Dropout(ActiveDropout(0.5, torch.tensor(3)), m, c)
    out = torch.empty(m, c, dtype=dtype)
    native_cuda.gemm_tail(left, right, tail_left, tail_right, out, drop=drop)
    assert torch.equal(out.isnan(), keep_mask(drop.seed, 0.5, m, c))
    assert (out[~out.isnan()] == 64).all()
