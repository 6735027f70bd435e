"""Each kernel of lora_linear by itself, against fp64, with every buffer poisoned."""

import pytest
import torch

from lora_kernels.ops.linear.triton import gemm, launch, operands, tiles
from lora_kernels.runtime.device_limits import limits_of, padded_rows
from lora_kernels.runtime.dropout import ActiveDropout, keep_mask, keep_scale
from lora_kernels.testing import assert_within_policy
from lora_kernels.testing.inputs import without_gaps

DTYPES = [torch.float32, torch.float16]
SEED = torch.tensor(0x1234_5678_9ABC_DEF1)
NO_DROP = (None, 0.0)


def draw(*shape, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def cell_of(dtype, tokens, in_features, out_features, rank, dropout=False):
    return tiles.LinearCell(
        "forward", str(dtype)[6:], dtype.itemsize, tokens, in_features, out_features, rank, dropout,
        ieee=dtype == torch.float32,
    )  # fmt: skip


def dropped(x, p):
    """D(x) in fp64."""
    if not p:
        return x.double()
    return torch.where(keep_mask(SEED, p, *x.shape), x.double() * keep_scale(p), 0)


def check(name, ours, eager, oracle):
    """Against fp64; ``eager`` is the same product in plain torch in the activation's dtype."""
    assert_within_policy(name, ours.to(eager.dtype), eager, oracle, eager.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("narrow_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(
    "tokens, depth, rank",
    [(1, 1024, 16), (5, 777, 3), (70, 129, 1), (33, 70, 160), (130, 256, 24), (3, 1, 100)],
)
def test_shrink(tokens, depth, rank, p, narrow_dtype, dtype, poisoned_memory):
    x = draw(tokens, depth, dtype=dtype)
    a = draw(rank, depth, dtype=narrow_dtype or dtype, scale=depth**-0.5, seed=1)
    cell = cell_of(dtype, tokens, depth, depth, rank, p > 0)
    h = torch.empty(tokens, rank)
    drop = operands.Dropout(ActiveDropout(p, SEED) if p else None, tokens, depth)
    tail = launch._shrink(cell, x, a, h, drop, keep_scale(p))
    oracle = dropped(x, p) @ a.double().t()
    check("h", h, (dropped(x, p).to(dtype) @ a.to(dtype).t()), oracle)
    assert torch.equal(tail, h.to(dtype)), "the copy is h, rounded once"


def test_split_sums_do_not_depend_on_what_was_there(poisoned_memory):
    """Small M splits the reduction; the partial sums are added in order, so bits repeat."""
    x, a = draw(3, 2048, dtype=torch.float16), draw(16, 2048)
    cell = cell_of(torch.float16, 3, 2048, 64, 16)
    limits = limits_of(x.device)
    assert tiles.shrink_tile(cell, 2048, 4, limits, aligned=True).parts > 1
    results = []
    for _ in range(3):
        h = torch.empty(3, 16)
        launch._shrink(cell, x, a, h, operands.NO_DROPOUT, 1.0)
        results.append(h)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
@pytest.mark.parametrize("transposed", [False, True], ids=["NN", "NT"])
@pytest.mark.parametrize(
    "epilogue, p",
    [("plain", 0.0), ("bias", 0.0), ("scale", 0.0), ("unscaled", 0.0), ("plain", 0.3)],
)
@pytest.mark.parametrize(
    "tokens, depth, columns, rank", [(70, 136, 136, 3), (200, 64, 264, 100), (1, 72, 8, 16)]
)
def test_gemm_with_tail(
    tokens, depth, columns, rank, p, epilogue, transposed, tma, poisoned_memory
):
    dtype = torch.float16
    left = draw(tokens, depth, dtype=dtype)
    right = draw(depth, columns, dtype=dtype, scale=depth**-0.5, seed=1)
    tail_left = draw(tokens, rank, dtype=dtype, seed=2)
    tail_right = draw(rank, columns, dtype=dtype, scale=rank**-0.5, seed=3)
    if transposed:
        right = right.t().contiguous().t()
        tail_right = tail_right.t().contiguous().t()
    # Rows that TMA can address, with poison between them.
    tail_left = padded_rows(left, tail_left.shape, dtype).copy_(tail_left)
    if transposed:
        padded = padded_rows(left, (columns, rank), dtype).copy_(tail_right.t())
        tail_right = padded.t()
    bias = draw(columns, dtype=dtype, seed=4) if epilogue != "plain" else None
    scale = 1 + 0.3 * draw(columns, seed=5) if epilogue in ("scale", "unscaled") else None
    out = left.new_empty(tokens, columns)
    unscaled = torch.empty_like(out) if epilogue == "unscaled" else None
    cell = cell_of(dtype, tokens, depth, columns, rank, p > 0)
    drop = operands.Dropout(ActiveDropout(p, SEED) if p else None, tokens, columns)
    tile = tiles.gemm_tile(
        cell, columns, limits_of(left.device),
        aligned=tma, row_major=True, has_main=True, two_results=unscaled is not None,
    )  # fmt: skip
    assert tile.tma == tma
    run = gemm._launch_tma if tma else gemm._launch_pointers
    run(tile, left, right, tail_left, tail_right, out, unscaled, bias, scale, drop)

    def formula(of):
        tail = of(tail_left) @ of(tail_right)
        if p:
            tail = torch.where(keep_mask(SEED, p, tokens, columns), tail, 0)
        before = of(left) @ of(right) + tail
        scaled = before if scale is None else before * of(scale)
        return before, scaled if bias is None else scaled + of(bias)

    eager, oracle = formula(lambda t: without_gaps(t).to(dtype)), formula(lambda t: t.double())
    check("out", out, eager[1], oracle[1])
    if unscaled is not None:
        check("unscaled", unscaled, eager[0], oracle[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("projection, p", [(False, 0.0), (False, 0.3), (True, 0.0)])
@pytest.mark.parametrize("rank_first", [False, True], ids=["DR", "RD"])
@pytest.mark.parametrize("tokens, depth, rank", [(300, 136, 3), (70, 61, 160), (1, 300, 16)])
def test_rank_gradient(tokens, depth, rank, p, rank_first, projection, dtype, poisoned_memory):
    wide, narrow = draw(tokens, depth, dtype=dtype), draw(tokens, rank, seed=1)
    factor = draw(depth, rank, scale=depth**-0.5, seed=2)
    cell = cell_of(dtype, tokens, depth, depth, rank, p > 0)
    tile = tiles.rank_gradient_tile(cell, depth, limits_of(wide.device), aligned=False)
    drop = operands.Dropout(ActiveDropout(p, SEED) if p else None, tokens, depth)
    parts, projections = launch._rank_gradient(
        tile, wide, narrow, factor if projection else None, drop, rank_first=rank_first
    )
    assert tokens < 300 or parts.shape[0] > 1
    # The scale of the dropout is not the kernel's: it rides on the narrow side.
    masked = dropped(wide, p) / keep_scale(p)
    oracle = masked.t() @ narrow.double()
    eager = masked.to(dtype).t() @ narrow.to(dtype)
    gradient = torch.empty((rank, depth) if rank_first else (depth, rank))
    launch._reduce(parts, gradient)
    check("gradient", gradient.t() if rank_first else gradient, eager, oracle)
    if projection:
        t = torch.empty(tokens, rank)
        launch._reduce(projections, t)
        check("t", t, wide @ factor.to(dtype), wide.double() @ factor.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_gradients(dtype, poisoned_memory):
    dy, unscaled = draw(301, 133, dtype=dtype), draw(301, 133, dtype=dtype, seed=1)
    scale = draw(133, seed=2)
    grad_bias, grad_scale = dy.new_empty(133), torch.empty_like(scale)
    scaled = launch._output_gradients(dy, unscaled, scale, grad_bias, grad_scale)
    assert torch.equal(scaled, (dy.float() * scale).to(dtype))
    check("bias", grad_bias, dy.sum(0), dy.double().sum(0))
    eager = (dy * unscaled).sum(0)
    check("output_scale", grad_scale, eager, (dy.double() * unscaled.double()).sum(0))


@pytest.mark.parametrize("kind", ["number", "pointer"])
@pytest.mark.parametrize("scaling_dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_scaling_is_a_number_or_a_pointer(kind, scaling_dtype, poisoned_memory):
    """A tensor on the device reaches the kernels as a pointer."""
    scaling = torch.tensor(0.7, dtype=scaling_dtype)
    if kind == "number":
        scaling = operands.scaling_argument(scaling)
        assert isinstance(scaling, float)
    b = draw(37, 5, seed=1).t()
    out = launch._scale_cast(b, scaling, torch.float16)
    assert torch.equal(out, (b * float(scaling)).half())
    assert out.stride(0) * out.element_size() % 16 == 0


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_unscaled", [False, True])
def test_hybrid_rounds_an_output_scale_once(with_unscaled, with_bias, poisoned_memory):
    """c is a little more than fp16 holds, and so is c times the result: exact in fp32."""
    tokens, columns, half = 37, 52, torch.float16
    x, weight = draw(tokens, 24, dtype=half), draw(24, columns, dtype=half, seed=1)
    tail, tail_right = draw(tokens, 8, dtype=half, seed=2), draw(8, columns, dtype=half, seed=3)
    scale = 1.0 + torch.arange(1, columns + 1) * 2.0**-13
    bias = draw(columns, dtype=half, seed=4) if with_bias else None
    out, product = torch.empty(tokens, columns, dtype=half), torch.empty(tokens, columns).half()
    cell = cell_of(half, tokens, 24, columns, 8)
    with tiles.use_cells({"*": {"strategy": "hybrid"}}):
        gemm.gemm_with_tail(cell, x, weight, tail, tail_right, product)
        unscaled = torch.empty_like(out) if with_unscaled else None
        gemm.gemm_with_tail(
            cell, x, weight, tail, tail_right, out, unscaled=unscaled, bias=bias,
            output_scale=scale,
        )  # fmt: skip
    assert unscaled is None or torch.equal(unscaled, product)
    assert not torch.equal(scale.half().float(), scale)
    expected = product.double() * scale.double() + (bias.double() if with_bias else 0.0)
    assert torch.equal(out, expected.half())
