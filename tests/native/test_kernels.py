"""Each compiled kernel against its formula in fp64, and what must be exact."""

import pytest
import torch

from lora_kernels.runtime import cpu_extension as native
from lora_kernels.runtime import dropout

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
        pytest.mark.parametrize("turned", [False, True], ids=["", "turned"]),
        pytest.mark.parametrize("adapter_dtype", DTYPES, ids=str),
        pytest.mark.parametrize("dtype", DTYPES, ids=str),
    ):
        function = mark(function)
    return function


def as_given(factor: torch.Tensor, turned: bool) -> torch.Tensor:
    """The factor, or one of the same values that lies transposed in memory."""
    return factor.t().contiguous().t() if turned else factor


def dropped_with(p: float) -> dropout.ActiveDropout | None:
    return dropout.ActiveDropout(p, SEED) if p else None


def forward(y, x, a, b, scaling: float = 1.0, p: float = 0.0, *, add: bool = True):
    """``y (+)= s h B^T``; h and the packed mask."""
    drops = dropped_with(p)
    h, packed = native.allocate_saved(x, a.shape[0], drops)
    native.adapter_forward(y, x, a, b, h, packed, scaling, drops, add=add)
    return h, packed


def backward(dx, dy, x, a, b, h, packed, scaling: float = 1.0, p: float = 0.0, *, add: bool = True):
    """``dx (+)= keep * (t A)``; the gradients of A and B where there is an x and an h."""
    grad_a = None if x is None else torch.empty_like(a)
    grad_b = None if h is None else torch.empty_like(b)
    drops = dropped_with(p)
    native.adapter_backward(dx, grad_a, grad_b, dy, x, a, b, h, packed, scaling, drops, add=add)
    return grad_a, grad_b


def shrink(x, factor, p: float = 0.0):
    """``D(x) A^T`` and the mask."""
    rows, rank = x.numel() // x.shape[-1], factor.shape[0]
    return forward(torch.zeros((rows, 1), dtype=x.dtype), x, factor, torch.ones(1, rank), p=p)


def from_t(x, out, t, factor, packed=None, *, add=True):
    """What follows from t, which B = 1 makes of dy = t: the gradient of A, and ``out (+)= t A``."""
    ones = torch.eye(t.shape[1])
    return backward(out, t, x, factor, ones, None, packed, add=add)[0]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("rows", [1, 16, 300])
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_h_need_not_be_kept(dtype, rows, p):
    """The result's bits and the mask are the same; nothing was allocated for h."""
    x = torch.randn(rows, 100).to(dtype)
    a, b = torch.randn(12, 100), torch.randn(70, 12)
    kept, scratch = torch.randn(rows, 70).to(dtype).repeat(2, 1, 1)
    _, packed = forward(kept, x, a, b, 0.5, p)
    again = None if packed is None else torch.empty_like(packed)
    native.adapter_forward(scratch, x, a, b, None, again, 0.5, dropped_with(p), add=True)
    assert torch.equal(kept, scratch)
    assert packed is None or torch.equal(packed, again)


@each_operand
@pytest.mark.parametrize("add", [False, True], ids=["write", "add"])
def test_forward(level, dtype, adapter_dtype, turned, dropped, add, poisoned_memory):
    for (rows, columns), rank, (_, out_columns) in zip(SIZES, RANKS, SIZES[::-1], strict=True):
        x, y = wide(rows, columns, dtype), wide(rows, out_columns, dtype)
        a = draw(rank, columns, dtype=adapter_dtype)
        b = draw(out_columns, rank, dtype=adapter_dtype)
        around, before = y._base.clone(), y.double() if add else torch.zeros_like(y).double()
        p = 0.3 if dropped else 0.0
        h, packed = forward(y, x, as_given(a, turned), as_given(b, turned), -0.7, p, add=add)
        expected, keep = masks(rows, columns, dropped)
        assert packed is None if not dropped else torch.equal(packed, expected)
        kept = dropout.keep_scale(p) * keep * x.double()
        right = operand(a, x, level).double().t()
        assert_close(h, kept @ right, kept.abs() @ right.abs(), columns)
        left = operand(h, y, level).double()
        right = operand(b.float() * -0.7, y, level).double().t()
        size = before.abs() + left.abs() @ right.abs()
        assert_close(y, before + left @ right, size, rank)
        y.fill_(0)  # nothing beside the rows was written
        around[:, 3 : 3 + out_columns] = 0
        assert torch.equal(y._base.isnan(), around.isnan())


@each_operand
@pytest.mark.parametrize("add", [False, True], ids=["write", "add"])
def test_what_follows_from_t(level, dtype, adapter_dtype, turned, dropped, add, poisoned_memory):
    for (rows, columns), rank in zip(SIZES, RANKS, strict=True):
        x, dx, t = wide(rows, columns, dtype), wide(rows, columns, dtype), wide(rows, rank, dtype)
        a = draw(rank, columns, dtype=adapter_dtype)
        packed, keep = masks(rows, columns, dropped)
        around, before = dx._base.clone(), dx.double() if add else torch.zeros_like(keep)
        grad = from_t(x, dx, t, as_given(a, turned), packed, add=add)
        left, right = t.double(), operand(a, dx, level).double()
        size = before.abs() + left.abs() @ right.abs()
        assert_close(dx, before + keep * (left @ right), size, rank)
        kept = keep * x.double()
        assert grad.shape == a.shape and grad.dtype == adapter_dtype
        assert_close(grad, left.t() @ kept, left.abs().t() @ kept.abs(), rows)
        dx.fill_(0)
        around[:, 3 : 3 + columns] = 0
        assert torch.equal(dx._base.isnan(), around.isnan())


@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize("adapter_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_b(level, dtype, adapter_dtype, turned, poisoned_memory):
    for (rows, columns), rank in zip(SIZES, RANKS, strict=True):
        dy, h = wide(rows, columns, dtype), draw(rows, rank + 1)[:, :rank]
        a, b = draw(rank, 4, dtype=adapter_dtype), draw(columns, rank, dtype=adapter_dtype)
        _, grad = backward(None, dy, None, a, as_given(b, turned), h, None, 0.9, 0.3)
        left, right = dy.double().t(), operand(h, dy, level).double()
        assert grad.shape == b.shape and grad.dtype == adapter_dtype
        assert_close(grad, 0.9 * left @ right, left.abs() @ right.abs(), rows)


@pytest.mark.parametrize("needs", ["x a b", "x a", "x b", "a b", "x", "a", "b"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows, columns, out_columns, rank",
    [(255, 33, 50, 3), (256, 70, 64, 16), (2177, 130, 77, 24), (4200, 40, 30, 5),
     (260, 2100, 65, 4), (300, 65, 1030, 7)],
)  # fmt: skip
def test_backward_of_whole_numbers(level, rows, columns, out_columns, rank, dtype, needs):
    """Every product and sum is exact, so are the results, in whatever order they were summed."""

    def small(*shape):
        return torch.randint(-1, 2, shape, dtype=dtype)

    x, dy, dx, h = small(rows, columns), small(rows, out_columns), small(rows, columns), None
    a, b = small(rank, columns).float(), small(out_columns, rank).float()
    b[torch.rand(b.shape) < 1 - 60 / out_columns] = 0  # t stays below 256: exact in bf16
    h = small(rows, rank).float()
    packed = native.packed_keep_mask(SEED, 0.5, rows, columns)
    keep = dropout.keep_mask(SEED, 0.5, rows, columns).double()
    t = 2 * 0.5 * dy.double() @ b.double()
    expected_dx = (dx.double() + keep * (t @ a.double())).to(dtype)
    ours = dx.clone() if "x" in needs else None
    grad_a, grad_b = backward(
        ours, dy, x if "a" in needs else None, a, b, h if "b" in needs else None, packed, 0.5, 0.5
    )
    assert t.abs().max() < 256
    assert ours is None or torch.equal(ours, expected_dx)
    assert ("a" in needs) == (grad_a is not None) and ("b" in needs) == (grad_b is not None)
    assert grad_a is None or torch.equal(grad_a.double(), t.t() @ (keep * x.double()))
    assert grad_b is None or torch.equal(grad_b.double(), 0.5 * dy.double().t() @ h.double())


@pytest.mark.parametrize("p", [1e-5, 0.05, 0.5, 0.9999])
def test_the_masks_bits_are_the_definition(level, p):
    for rows, columns, stream in [(1, 1, 0), (7, 13, 1), (64, 576, 0), (3, 4097, 2**31 + 5)]:
        ours = native.packed_keep_mask(SEED, p, rows, columns, stream)
        assert torch.equal(ours, dropout.packed_keep_mask(SEED, p, rows, columns, stream))


@pytest.mark.parametrize("first", [0, 2**32 // 11 - 3, 2**32 - 40, 2**40 + 5])
def test_masks_of_rows_past_two_to_the_32(level, first):
    """Groups on both sides of a multiple of 2^32, and rows that are strided."""
    columns, rows = 88, torch.arange(first, first + 30)
    ours, seed = torch.zeros((30, 16), dtype=torch.uint8), SEED.item()
    native.extension().draw_mask(
        ours.data_ptr(), 16, 11 * first, 11, 30, columns, seed, 0, dropout.drop_threshold(0.3), 1
    )
    expected = dropout.packed_keep_mask_of_rows(SEED, 0.3, rows, columns)
    assert torch.equal(ours[:, :11], expected) and not ours[:, 11:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rows_bits_do_not_depend_on_the_others(level, dtype):
    rows, columns, rank = 300, 331, 21
    x, t = draw(rows, columns, dtype=dtype), draw(rows, rank, dtype=dtype)
    factor = draw(rank, columns)
    packed, _ = masks(rows, columns, True)
    h, _ = shrink(x, factor)
    y = x.clone()
    from_t(None, y, t, factor, packed)
    for start, stop in [(0, 1), (3, 5), (4, 7), (30, 37), (1, 270), (1, 36)]:
        some = slice(start, stop)
        assert torch.equal(shrink(x[some], factor)[0], h[some])
        part = x[some].clone()
        from_t(None, part, t[some], factor, packed[some].contiguous())
        assert torch.equal(part, y[some])
    for begin, end in [(0, 1), (1, 4), (5, 21), (2, 19)]:
        assert torch.equal(shrink(x, factor[begin:end])[0], h[:, begin:end])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_is_rounded_as_torch_rounds_it(level, dtype):
    """One rank of ones: what comes out is the fp32 number that went in, rounded."""
    values = torch.cat([
        torch.randn(4000), torch.randn(4000) * 1e-7, torch.randn(4000) * 1e4,
        torch.tensor([0.0, 1 + 2**-8, 1 + 3 * 2**-8, 65519.0, 65520.0, 1e-8, torch.inf]),
    ])  # fmt: skip
    if level == 3 and dtype == BF16:
        values = values[values.abs() > 1e-37]  # the instructions take smaller numbers as zero
    out = torch.empty(1, len(values), dtype=dtype)
    from_t(None, out, torch.ones(1, 1, dtype=dtype), values.view(1, -1), add=False)
    assert torch.equal(out[0], values.to(dtype))
    x = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(F16)
    x = x[torch.isfinite(x)].to(dtype if dtype != F32 else F16)
    x = x[torch.isfinite(x)]
    back, _ = shrink(x.view(-1, 1), torch.ones(1, 1))
    assert torch.equal(back[:, 0], x.float())


def test_nan_and_infinity_stay_where_they_are(level):
    x, factor = draw(9, 50, dtype=BF16), draw(5, 50, dtype=BF16)
    x[2, 7], x[5, 49] = torch.nan, torch.inf
    h, _ = shrink(x, factor)
    assert h[2].isnan().all() and not h[5].isfinite().any()
    assert h[[0, 1, 3, 4, 6, 7, 8]].isfinite().all()
    keep = torch.full((9, 7), 255, dtype=torch.uint8)
    keep[2, 0], keep[5, 6] = 0x7F, 0xFD
    t = draw(9, 5, dtype=BF16)
    assert from_t(x, None, t, factor, keep).isfinite().all(), "what is dropped is not read"
    t[4] = torch.nan
    dx = x.clone()
    from_t(None, dx, t, factor, keep)
    assert dx[4].isnan().all() and dx[2, 7].isnan(), "what is dropped is not changed"
    assert dx[[0, 1, 3, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize("p", [0.05, 0.9])
def test_what_is_dropped_is_not_read(level, p):
    x, factor = draw(300, 50, dtype=BF16), draw(5, 50, dtype=BF16)
    clean, _ = shrink(x, factor, p)
    x[~dropout.keep_mask(SEED, p, 300, 50)] = torch.nan
    assert torch.equal(shrink(x, factor, p)[0], clean)


def test_factors_behind_any_strides(level):
    x, factor = draw(6, 40), draw(10, 80)[::2, ::2]
    expected, _ = shrink(x, factor.contiguous())
    assert torch.equal(shrink(x, factor)[0], expected)
    assert torch.equal(shrink(x, factor.double())[0], expected)
    odd = torch.randn(1 + 40 * 6).to(BF16)[1:].view(40, 6)  # pairs off a word's boundary
    y, ours = torch.zeros(6, 40, dtype=BF16), torch.zeros(6, 40, dtype=BF16)
    t = x[:, :6].to(BF16)
    from_t(None, ours, t, odd.t())
    from_t(None, y, t, odd.t().contiguous())
    assert torch.equal(ours, y)


def test_activations_behind_any_strides(level):
    """Three dimensions, one of them of size 1 with a stride that means nothing."""
    a, b = draw(5, 40), draw(30, 5)
    flat = draw(7, 40)
    expected = torch.zeros(7, 30)
    h, _ = forward(expected, flat, a, b)
    shaped = torch.as_strided(flat, (7, 1, 40), (40, 3, 1))
    y = torch.as_strided(torch.zeros(7, 30), (7, 1, 30), (30, 11, 1))
    assert shaped.is_contiguous() and y.is_contiguous()
    again, _ = forward(y, shaped, a, b)
    assert torch.equal(again, h) and torch.equal(y[:, 0], expected)


def test_a_factor_with_an_odd_pitch(level):
    """Pairs of bf16 that lie off a word's boundary in every other row."""
    a, turned = draw(4, 40, dtype=BF16), draw(40, 5, dtype=BF16)[:, :4].t()
    t, out = draw(5, 4, dtype=BF16), torch.zeros(2, 5, 40, dtype=BF16)
    from_t(None, out[0], t, turned)
    from_t(None, out[1], t, turned.contiguous())
    assert torch.equal(out[0], out[1])
    b = draw(24, 5, dtype=BF16)[:, :4]
    y = torch.zeros(2, 5, 24, dtype=BF16)
    for into, given in zip(y, (b, b.contiguous()), strict=True):
        forward(into, out[0], a, given)
    assert torch.equal(y[0], y[1]) and y.any()


def test_a_default_device_is_not_where_the_results_lie(level):
    x, dy, a, b = draw(3, 16), draw(3, 8), draw(2, 16), draw(8, 2).double()
    y = torch.zeros(3, 8)
    with torch.device("meta"):
        h, mask = forward(y, x, a, b, p=0.5)
        grad_a, grad_b = backward(None, dy, x, a, b, h, mask, p=0.5)
    assert {each.device.type for each in (h, mask, grad_a, grad_b)} == {"cpu"}
    assert y.any() and grad_a.any() and grad_b.any()
