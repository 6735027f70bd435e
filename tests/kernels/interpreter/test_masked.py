"""Dropout in one pass against its definition in torch: bits exact, and every buffer poisoned."""

from functools import partial

import pytest
import torch
from torch import Tensor

from lora_kernels import lora_linear
from lora_kernels.ops.narrow import masks
from lora_kernels.ops.narrow.triton import masked
from lora_kernels.ops.narrow.triton.masked import draw_mask, masked_copy, masked_product
from lora_kernels.ops.routed.tensors import RoutingTensors
from lora_kernels.ops.routed.triton import masked as routed_masked
from lora_kernels.ops.routed.triton.masked import gather_masked, mask_rows_
from lora_kernels.runtime.dropout import (
    ActiveDropout,
    MaskPlace,
    drop_threshold,
    keep_scale,
    packed_keep_mask,
    packed_keep_mask_of_rows,
    unpacked_keep_mask,
)
from lora_kernels.testing import LoRAProblem, assert_within_policy, run_forward_backward

SEED = torch.tensor(0x1234_5678_9ABC_DEF1)
P = 0.4
UNUSED = torch.tensor(0)  # a seed that must not be read
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
each_size = pytest.mark.parametrize(
    "tokens, columns",
    [(1, 1), (1, 1000), (7, 8), (7, 255), (130, 13), (130, 64), (130, 255), (7, 1000), (130, 1000)],
)
# Of a whole activation of 1100 columns, 138 groups. From 2^31 groups on the counter has two words.
each_place = pytest.mark.parametrize(
    "place",
    [
        pytest.param(MaskPlace(), id="whole"),
        pytest.param(MaskPlace(12), id="rows"),
        pytest.param(MaskPlace(0, 64, 1100), id="columns"),
        pytest.param(MaskPlace(2**31 // 138 - 50, 24, 1100), id="both, across 2^31"),
        pytest.param(MaskPlace(2**32 // 138 - 50, 0, 1100), id="rows, across 2^32"),
        pytest.param(MaskPlace(2**40 + 3, 24, 1100), id="both, far"),
    ],
)


def draw(*shape, dtype, seed=0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def dropped(x: Tensor, packed: Tensor, scale: float) -> Tensor:
    """``D(x)`` as torch has it: one product in fp32, rounded once."""
    keep = unpacked_keep_mask(packed, x.shape[1])
    return torch.where(keep, (x.float() * scale).to(x.dtype), 0)


def with_gaps(x: Tensor) -> Tensor:
    """The same rows further apart, off the boundaries of vectors, with NaN around them."""
    rows, columns = x.shape
    wide = torch.full((rows + 1, columns + 5), torch.nan, dtype=x.dtype)
    wide[:rows, 3 : 3 + columns] = x
    return wide[:rows, 3 : 3 + columns]


@each_dtype
@each_place
@each_size
def test_masked_copy(tokens, columns, place, dtype, poisoned_memory):
    x, dropout = draw(tokens, columns, dtype=dtype), ActiveDropout(P, SEED, place)
    expected = packed_keep_mask(SEED, P, tokens, columns, place=place)
    kept, mask = masked_copy(x, dropout)
    assert torch.equal(mask, expected), "byte for byte"
    assert torch.equal(kept, dropped(x, expected, dropout.scale)) and kept.is_contiguous()
    again, same = masked_copy(with_gaps(x), ActiveDropout(P, UNUSED, place), mask)
    assert same is mask and torch.equal(mask, expected), "bits are read"
    assert torch.equal(again, kept)


@each_place
@each_size
def test_draw_mask(tokens, columns, place, poisoned_memory):
    expected = packed_keep_mask(SEED, P, tokens, columns, place=place)
    assert torch.equal(draw_mask(tokens, columns, ActiveDropout(P, SEED, place)), expected)


@pytest.mark.parametrize("p", [1 / 65536, 0.05, 0.5, 0.999, 0.99999])
@pytest.mark.parametrize("seed", [0, -1, -(2**63)])
def test_probabilities_and_seeds(seed, p):
    seed, x = torch.tensor(seed), draw(5, 300, dtype=torch.float32)
    expected = packed_keep_mask(seed, p, 5, 300)
    kept, mask = masked_copy(x, ActiveDropout(p, seed))
    assert torch.equal(mask, expected)
    assert torch.equal(kept, dropped(x, expected, keep_scale(p)))


@each_dtype
def test_what_is_dropped_is_zero_whatever_it_was(dtype, poisoned_memory):
    dropout = ActiveDropout(P, SEED)
    mask = packed_keep_mask(SEED, P, 9, 40)
    keep = unpacked_keep_mask(mask, 40)
    for worst in (torch.nan, torch.inf, -torch.inf):
        x = torch.full((9, 40), worst, dtype=dtype)
        x[keep] = 1
        for given in (None, mask):
            kept, _ = masked_copy(x, dropout, given)
            assert torch.equal(kept, keep * torch.tensor(dropout.scale, dtype=dtype))
        t, a = torch.full((9, 3), 1.0, dtype=dtype), torch.ones(3, 40, dtype=dtype)
        t[0] = worst
        out = masked_product(t, a, mask, dropout)
        assert (out[0][~keep[0]] == 0).all() and not out[0][keep[0]].isfinite().any()
        assert out[1:].isfinite().all()


@each_dtype
@pytest.mark.parametrize("rank", [1, 3, 16, 24, 100])
@each_size
def test_masked_product(tokens, columns, rank, dtype, poisoned_memory):
    t, a = draw(tokens, rank, dtype=dtype), draw(rank, columns, dtype=dtype, seed=1)
    dropout, alpha = ActiveDropout(P, UNUSED), -0.75
    mask = packed_keep_mask(SEED, P, tokens, columns)
    keep = unpacked_keep_mask(mask, columns)
    factor = alpha * dropout.scale
    oracle = torch.where(keep, t.double() @ a.double() * factor, 0)
    eager = torch.where(keep, t @ a * factor, 0)
    out = masked_product(t, a, mask, dropout, alpha)
    assert_within_policy("product", out, eager, oracle, dtype)
    assert torch.equal(out == 0, (oracle == 0) | (out == 0) & keep)
    # One rounding: the same sum, taken in fp32.
    if dtype != torch.float32:
        wide = masked_product(t.float(), a.float(), mask, dropout, alpha)
        assert (wide - oracle).abs().max() <= 1e-5 * oracle.abs().max()
        half_ulp = 2.0**-11 * oracle.abs().clamp_min(2**-14)
        assert ((out.double() - oracle).abs() <= 1.01 * half_ulp + 1e-5).all()
    # From rows with gaps the same bits; and a number on the device is one more factor.
    assert torch.equal(masked_product(with_gaps(t), with_gaps(a), mask, dropout, alpha), out)
    scaled = masked_product(t, a, mask, dropout, alpha / 4, torch.tensor(4.0))
    assert torch.equal(scaled, out)


def test_nothing_to_do_launches_nothing(monkeypatch):
    class Refuses:
        def __getitem__(self, grid):
            raise AssertionError("launched")

    for module in (masked, routed_masked):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Refuses())
    dropout = ActiveDropout(P, SEED)
    x = torch.empty(0, 20)
    kept, mask = masked_copy(x, dropout)
    assert kept.shape == (0, 20) and mask.shape == (0, 3)
    assert draw_mask(0, 20, dropout).shape == (0, 3)
    assert masked_product(torch.empty(0, 4), torch.empty(4, 20), mask, dropout).shape == (0, 20)
    routing, table = routing_of([], 2, 16), torch.zeros(3, dtype=torch.int32)
    z, mask = gather_masked(x, routing, table, SEED, MaskPlace())
    assert z.shape == (0, 20) and mask.shape == (0, 3)
    assert mask_rows_(z, routing, table, mask) is z
    with pytest.raises(AssertionError, match="launched"):
        draw_mask(1, 20, dropout)


def test_other_strides_are_refused():
    dropout = ActiveDropout(P, SEED)
    with pytest.raises(AssertionError, match="make it contiguous"):
        masked_copy(torch.zeros(8, 4).t(), dropout)
    mask = torch.zeros(4, 1, dtype=torch.uint8)
    with pytest.raises(AssertionError, match="make it contiguous"):
        masked_product(torch.zeros(4, 2), torch.zeros(8, 2).t(), mask, dropout)
    with pytest.raises(AssertionError, match="no gaps"):
        masked_copy(torch.zeros(4, 8), dropout, torch.zeros(4, 2, dtype=torch.uint8)[:, :1])


@pytest.mark.parametrize("of", ["x", "lora_a", "lora_b", "dy"])
def test_composed_takes_any_strides(of, monkeypatch):
    """What a GPU's kernels are handed: an operand whose rows have no neighbouring elements."""
    monkeypatch.setattr(masks, "_has_kernels", lambda device: True)
    problem = LoRAProblem.random((9,), 40, 24, 4, dropout_p=P)
    transposed = problem.with_(**{of: getattr(problem, of).t().contiguous().t()})
    served = partial(lora_linear, backend="composed")
    expected, found = (run_forward_backward(served, each) for each in (problem, transposed))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


# --- many adapters --------------------------------------------------------------------------------

DROPS = [0.4, 0.0, 0.9, 0.3, 1 / 65536]  # p of each slot; the last group has no adapter
THRESHOLDS = torch.tensor([*map(drop_threshold, DROPS), 0], dtype=torch.int32)


def routing_of(groups: list[list[int]], per_token: int, block: int) -> RoutingTensors:
    """The tokens of each slot's pairs, those without an adapter last; three tiles of none."""
    sizes = torch.tensor([0, *map(len, groups)])
    offsets = sizes.cumsum(0).int()
    tiles = [
        (slot, first)
        for slot, group in enumerate(groups)
        for first in range(int(offsets[slot]), int(offsets[slot]) + len(group), block)
    ]
    tokens = torch.tensor([token for group in groups for token in group], dtype=torch.int32)
    tiles = torch.tensor([*tiles, *[(-1, 0)] * 3], dtype=torch.int32)
    plan = torch.empty((0, 4), dtype=torch.int64)
    return RoutingTensors(tokens, offsets, tiles, tokens, None, plan, per_token, block)


def random_routing(tokens: int, per_token: int, block: int) -> RoutingTensors:
    slots = torch.randint(
        0, len(DROPS) + 1, (tokens * per_token,), generator=torch.Generator().manual_seed(1)
    )
    slots[slots == 2] = 0 if tokens < 10 else 2  # an adapter without tokens
    pairs = torch.arange(tokens * per_token) // per_token
    return routing_of(
        [pairs[slots == slot].tolist() for slot in range(len(DROPS) + 1)], per_token, block
    )


def expected_rows(x: Tensor, routing: RoutingTensors, place: MaskPlace) -> tuple[Tensor, Tensor]:
    """``D(x)`` of every pair and its bits, slot by slot."""
    pairs, columns = len(routing.tokens), x.shape[1]
    kept = torch.zeros(pairs, columns, dtype=x.dtype)
    mask = torch.zeros(pairs, -(-columns // 8), dtype=torch.uint8)
    for slot, p in enumerate(DROPS):
        group = slice(int(routing.offsets[slot]), int(routing.offsets[slot + 1]))
        tokens = routing.tokens[group].long()
        mask[group] = packed_keep_mask_of_rows(SEED, p, tokens, columns, slot, place)
        there = tokens < x.shape[0]
        mask[group][~there] = 0
        rows = x[tokens.clamp_max(x.shape[0] - 1)]
        kept[group] = dropped(rows, mask[group], keep_scale(p))
    return kept, mask


@each_dtype
@pytest.mark.parametrize("block", [16, 64])
@each_place
@pytest.mark.parametrize(
    "tokens, per_token, columns", [(1, 1, 13), (7, 2, 328), (5, 1, 272), (130, 1, 255)]
)
def test_gather_masked(tokens, per_token, columns, place, block, dtype, poisoned_memory):
    x, routing = draw(tokens, columns, dtype=dtype), random_routing(tokens, per_token, block)
    expected, bits = expected_rows(x, routing, place)
    kept, mask = gather_masked(x, routing, THRESHOLDS, SEED, place)
    assert torch.equal(mask, bits), "byte for byte"
    assert torch.equal(kept, expected) and kept.is_contiguous()
    again, same = gather_masked(with_gaps(x), routing, THRESHOLDS, None, place, mask)
    assert same is mask and torch.equal(again, kept) and torch.equal(mask, bits)

    z = draw(len(routing.tokens), columns, dtype=dtype, seed=2)
    first_without = int(routing.offsets[-2])
    z[first_without:] = torch.nan  # left by a product that has no rows for them
    for buffer in (z.clone(), with_gaps(z)):
        assert mask_rows_(buffer, routing, THRESHOLDS, mask) is buffer
        for slot, p in enumerate(DROPS):
            group = slice(int(routing.offsets[slot]), int(routing.offsets[slot + 1]))
            assert torch.equal(buffer[group], dropped(z[group], bits[group], keep_scale(p))), slot
        assert (buffer[first_without:] == 0).all()


@each_dtype
def test_gather_without_dropout(dtype, poisoned_memory):
    x, routing = draw(70, 300, dtype=dtype), random_routing(70, 2, 16)
    x[5, 7], x[6, 8] = torch.inf, torch.nan
    kept, mask = gather_masked(x, routing, THRESHOLDS, None, MaskPlace(), draws=False)
    without = int(routing.offsets[-2])
    assert mask is None and (kept[without:] == 0).all()
    expected = x[routing.tokens.long()[:without]]
    assert torch.equal(kept[:without].nan_to_num(7), expected.nan_to_num(7))


def test_a_routing_of_more_tokens_than_there_are(poisoned_memory):
    """Rows past the activation are not read: they are zero, and so are their bits."""
    x, routing = draw(50, 40, dtype=torch.float32), random_routing(70, 1, 16)
    padded = torch.cat([x, torch.full((20, 40), torch.nan)])[:50]
    expected, bits = expected_rows(x, routing, MaskPlace())
    assert (bits == 0).all(1).sum() > 20
    kept, mask = gather_masked(padded, routing, THRESHOLDS, SEED, MaskPlace())
    assert torch.equal(mask, bits) and torch.equal(kept, expected)


def test_the_scale_of_every_threshold():
    """On the device it is an fp32 quotient, here one of fp64: rounded to fp32 they are the same."""
    thresholds = torch.arange(65536)
    here = (65536 / (65536 - thresholds.double())).float()
    assert torch.equal(here, torch.full((65536,), 65536.0) / (65536 - thresholds).float())
