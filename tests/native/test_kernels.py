"""Each compiled kernel against its formula in fp64, and what must be exact."""

import pytest
import torch

from lora_kernels import dropout, native

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [F32, BF16, F16]
RANKS = (1, 3, 8, 16, 24, 64, 160)
# M, D: nothing, one, odd, blocks and one more.
SIZES = ((0, 33), (1, 1), (1, 200), (7, 101), (64, 64), (129, 77), (513, 270))
SEED = torch.tensor(-0x1234_5678_9ABC_DEF1)


def draw(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def wide(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows with NaN between them, so that a kernel that reads past a row shows it."""
    around = torch.full((rows, columns + 5), torch.nan, dtype=dtype)
    around[:, 3 : 3 + columns] = draw(rows, columns, dtype=dtype)
    return around[:, 3 : 3 + columns]


def masks(rows: int, columns: int, dropped: bool):
    """The packed mask, or None, and the factor 0 or 1 of each element in fp64."""
    if not dropped:
        return None, torch.ones(rows, columns, dtype=torch.float64)
    packed = native.packed_keep_mask(SEED, 0.3, rows, columns)
    return packed, dropout.keep_mask(SEED, 0.3, rows, columns).double()


def operand(values: torch.Tensor, like: torch.Tensor, level: int) -> torch.Tensor:
    """A narrow operand as its kernel multiplies it: bf16 where pairs of bf16 are multiplied."""
    return values.to(BF16) if level == 3 and like.dtype == BF16 else values


def assert_close(ours, exact, magnitude, terms: int) -> None:
    """Within the worst case of summing ``terms`` products in fp32 and rounding once.

    magnitude: the sum of the products' absolute values, fp64.
    """
    assert torch.isfinite(ours).all()
    bound = (terms + 4) * 2.0**-24 * magnitude + torch.finfo(ours.dtype).eps / 2 * exact.abs()
    smallest = 2 * torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps
    error = (ours.double() - exact).abs()
    assert (error <= bound * (1 + 1e-6) + smallest).all(), (error - bound).max()


def each_operand(function):
    for mark in (
        pytest.mark.parametrize("dropped", [False, True], ids=["", "dropout"]),
        pytest.mark.parametrize("transposed", [False, True], ids=["A", "B"]),
        pytest.mark.parametrize("adapter_dtype", DTYPES, ids=str),
        pytest.mark.parametrize("dtype", DTYPES, ids=str),
    ):
        function = mark(function)
    return function


@each_operand
def test_shrink(level, dtype, adapter_dtype, transposed, dropped, poisoned_memory):
    for (rows, columns), rank in zip(SIZES, RANKS, strict=True):
        x, factor = wide(rows, columns, dtype), draw(rank, columns, dtype=adapter_dtype)
        packed, keep = masks(rows, columns, dropped)
        given = factor.t().contiguous() if transposed else factor
        ours = native.shrink(x, given, -0.7, packed, transposed=transposed)
        right = operand(factor, x, level).double().t()
        exact, size = (-0.7 * (keep * x.double()) @ right), (keep * x.double()).abs() @ right.abs()
        assert_close(ours, exact, size, columns)


@each_operand
@pytest.mark.parametrize("add", [False, True], ids=["write", "add"])
def test_expand(level, dtype, adapter_dtype, transposed, dropped, add, poisoned_memory):
    for (rows, columns), rank in zip(SIZES, RANKS, strict=True):
        narrow, factor = draw(rows, rank), draw(rank, columns, dtype=adapter_dtype)
        packed, keep = masks(rows, columns, dropped)
        given = factor.t().contiguous() if transposed else factor
        ours = wide(rows, columns, dtype)
        around, before = ours._base.clone(), ours.double() if add else torch.zeros_like(keep)
        native.expand_(ours, narrow, given, 1.3, packed, transposed=transposed, add=add)
        left = operand(narrow, ours, level).double()
        right = operand(factor.float() * 1.3, ours, level).double()
        exact, size = before + keep * (left @ right), before.abs() + left.abs() @ right.abs()
        assert_close(ours, exact, size, rank)
        ours.fill_(0)  # nothing beside the rows was written
        around[:, 3 : 3 + columns] = 0
        assert torch.equal(ours._base.isnan(), around.isnan())


@each_operand
def test_rank_gradient(level, dtype, adapter_dtype, transposed, dropped, poisoned_memory):
    for (rows, columns), rank in zip(SIZES, RANKS, strict=True):
        x, narrow = wide(rows, columns, dtype), draw(rows, rank)
        like = torch.empty((columns, rank) if transposed else (rank, columns), dtype=adapter_dtype)
        packed, keep = masks(rows, columns, dropped)
        ours = native.rank_gradient(x, narrow, like, 0.9, packed, transposed=transposed)
        left, right = operand(narrow, x, level).double().t(), keep * x.double()
        exact, size = 0.9 * left @ right, left.abs() @ right.abs()
        assert ours.shape == like.shape and ours.dtype == adapter_dtype
        if transposed:
            exact, size = exact.t(), size.t()
        assert_close(ours, exact, size, rows)


@pytest.mark.parametrize("adapter_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, columns, rank", [(255, 33, 3), (256, 70, 16), (2177, 130, 24)])
def test_both_passes_over_dy(level, rows, columns, rank, dtype, adapter_dtype, poisoned_memory):
    """t has the bits of shrink; the gradient may be summed in parts."""
    dy, h = wide(rows, columns, dtype), draw(rows, rank + 1)[:, :rank]
    factor = draw(columns, rank, dtype=adapter_dtype)
    t, grad = native.project(dy, factor, 1.3, h, 0.9)
    assert torch.equal(t, native.shrink(dy, factor, 1.3, transposed=True))
    left, right = operand(h, dy, level).double().t(), dy.double()
    assert grad.dtype == adapter_dtype
    assert_close(grad.t(), 0.9 * left @ right, left.abs() @ right.abs(), rows)


@pytest.mark.parametrize("p", [1e-5, 0.05, 0.5, 0.9999])
def test_the_masks_bits_are_the_definition(level, p):
    for rows, columns, stream in [(1, 1, 0), (7, 13, 1), (64, 576, 0), (3, 4097, 2**31 + 5)]:
        ours = native.packed_keep_mask(SEED, p, rows, columns, stream)
        assert torch.equal(ours, dropout.packed_keep_mask(SEED, p, rows, columns, stream))


@pytest.mark.parametrize("first", [0, 2**32 // 11 - 3, 2**32 - 40, 2**40 + 5])
def test_masks_of_rows_past_two_to_the_32(level, first):
    """Groups on both sides of a multiple of 2^32, and rows that are strided."""
    columns, rows = 88, torch.arange(first, first + 30)
    ours = torch.zeros((30, 16), dtype=torch.uint8)
    native.extension().draw_mask(
        ours.data_ptr(), 16, first, 30, columns, SEED.item(), 0, dropout.drop_threshold(0.3), 1
    )
    expected = dropout.packed_keep_mask_of_rows(SEED, 0.3, rows, columns)
    assert torch.equal(ours[:, :11], expected) and not ours[:, 11:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rows_bits_do_not_depend_on_the_others(level, dtype):
    rows, columns, rank = 37, 331, 21
    x, factor, narrow = draw(rows, columns, dtype=dtype), draw(rank, columns), draw(rows, rank)
    packed, _ = masks(rows, columns, True)
    h = native.shrink(x, factor, 1.0, packed)
    y = x.clone()
    native.expand_(y, narrow, factor, 1.0, packed)
    for start, stop in [(0, 1), (3, 5), (4, 7), (30, 37), (1, 36)]:
        some = slice(start, stop)
        assert torch.equal(native.shrink(x[some], factor, 1.0, packed[some]), h[some])
        part = x[some].clone()
        native.expand_(part, narrow[some], factor, 1.0, packed[some])
        assert torch.equal(part, y[some])
    for begin, end in [(0, 1), (1, 4), (5, 21), (2, 19)]:
        assert torch.equal(native.shrink(x, factor[begin:end], 1.0, packed), h[:, begin:end])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_is_rounded_as_torch_rounds_it(level, dtype):
    """One rank of ones: what comes out is the fp32 number that went in, rounded."""
    values = torch.cat([
        torch.randn(4000), torch.randn(4000) * 1e-7, torch.randn(4000) * 1e4,
        torch.tensor([0.0, 1 + 2**-8, 1 + 3 * 2**-8, 65519.0, 65520.0, 1e-8, torch.inf]),
    ])  # fmt: skip
    if level == 3 and dtype == BF16:
        values = values[values.abs() > 1e-37]  # the instructions take smaller numbers as zero
    narrow = torch.ones(1, 1)
    out = torch.empty(1, len(values), dtype=dtype)
    native.expand_(out, narrow, values.view(1, -1), add=False)
    assert torch.equal(out[0], values.to(dtype))
    x = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(F16)
    x = x[torch.isfinite(x)].to(dtype if dtype != F32 else F16)
    x = x[torch.isfinite(x)]
    back = native.shrink(x.view(-1, 1), torch.ones(1, 1), 1.0)
    assert torch.equal(back[:, 0], x.float())


def test_nan_and_infinity_stay_where_they_are(level):
    x, factor = draw(9, 50, dtype=BF16), draw(5, 50, dtype=BF16)
    x[2, 7], x[5, 49] = torch.nan, torch.inf
    h = native.shrink(x, factor, 1.0)
    assert h[2].isnan().all() and not h[5].isfinite().any()
    assert h[[0, 1, 3, 4, 6, 7, 8]].isfinite().all()
    keep = torch.full((9, 7), 255, dtype=torch.uint8)
    keep[2, 0], keep[5, 6] = 0x7F, 0xFD
    assert native.shrink(x, factor, 1.0, keep).isfinite().all(), "what is dropped is not read"


def test_factors_behind_any_strides(level):
    x, factor = draw(6, 40), draw(10, 80)[::2, ::2]
    assert torch.equal(native.shrink(x, factor, 1.0), native.shrink(x, factor.contiguous(), 1.0))
    double = factor.double()
    assert torch.equal(native.shrink(x, double, 1.0), native.shrink(x, factor.contiguous(), 1.0))
    odd = torch.randn(1 + 40 * 6).to(BF16)[1:].view(40, 6)  # pairs off a word's boundary
    y, ours = torch.zeros(6, 40, dtype=BF16), torch.zeros(6, 40, dtype=BF16)
    native.expand_(ours, x[:, :6].contiguous(), odd, transposed=True)
    native.expand_(y, x[:, :6].contiguous(), odd.t().contiguous())
    assert torch.equal(ours, y)
