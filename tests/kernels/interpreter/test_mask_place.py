"""What each kernel drops of a slice is what it drops there of the whole activation.

Read off results that are zero exactly where the mask drops: the other operands are ones.
"""

import pytest
import torch
from torch import Tensor

from lora_kernels.ops.linear.triton import gemm, launch, operands, tiles
from lora_kernels.ops.routed import AdapterBank, Routing
from lora_kernels.ops.routed.call import RoutedCall
from lora_kernels.ops.routed.triton import tiles as routed_tiles
from lora_kernels.ops.routed.triton.launch import RoutedLaunch, Tail
from lora_kernels.runtime.device_limits import limits_of
from lora_kernels.runtime.dropout import ActiveDropout, MaskPlace, keep_mask

SEED = torch.tensor(0x1234_5678_9ABC_DEF1)
P, ROWS, PITCH = 0.4, 96, 130
DTYPE = torch.float16
# The slice, and the row where the whole one begins. From 2^31 groups on the counter has two words.
each_place = pytest.mark.parametrize(
    "rows, columns, before",
    [
        pytest.param(slice(0, 96), slice(0, 130), 0, id="whole"),
        pytest.param(slice(5, 75), slice(0, 130), 7, id="rows"),
        pytest.param(slice(0, 96), slice(64, 128), 0, id="columns"),
        pytest.param(slice(21, 91), slice(24, 69), 2**31 // 17 - 50, id="both, across 2^31"),
        pytest.param(slice(0, 96), slice(0, 130), 2**32 // 17 - 50, id="whole, across 2^32"),
        pytest.param(slice(21, 91), slice(24, 69), 2**40 + 3, id="both, far"),
    ],
)


def mask_of(rows: slice, columns: slice, before: int, stream: int = 0) -> Tensor:
    whole = keep_mask(SEED, P, ROWS, PITCH, stream, MaskPlace(before))
    return whole[rows, columns]


def dropout_of(mask: Tensor, rows: slice, columns: slice, before: int) -> operands.Dropout:
    place = MaskPlace(before + rows.start, columns.start, PITCH)
    return operands.Dropout(ActiveDropout(P, SEED, place), *mask.shape)


def cell_of(tokens: int, columns: int, rank: int) -> tiles.LinearCell:
    return tiles.LinearCell(
        "forward", "float16", 2, tokens, columns, columns, rank, True, ieee=False
    )


@each_place
def test_shrink(rows, columns, before, poisoned_memory):
    mask = mask_of(rows, columns, before)
    tokens, depth = mask.shape
    x, h = torch.ones(tokens, depth, dtype=DTYPE), torch.empty(tokens, depth)
    drop = dropout_of(mask, rows, columns, before)
    launch._shrink(cell_of(tokens, depth, depth), x, torch.eye(depth), h, drop, 1.0)
    assert torch.equal(h != 0, mask)


@each_place
def test_rank_gradient(rows, columns, before, poisoned_memory):
    mask = mask_of(rows, columns, before)
    tokens, depth = mask.shape
    wide = torch.ones(tokens, depth, dtype=DTYPE)
    tile = tiles.rank_gradient_tile(
        cell_of(tokens, depth, tokens), depth, limits_of(wide.device), aligned=False
    )
    drop = dropout_of(mask, rows, columns, before)
    eye = torch.eye(tokens)
    partials, _ = launch._rank_gradient(tile, wide, eye, None, drop, rank_first=True)
    assert torch.equal(partials.sum(0) != 0, mask)


@pytest.mark.parametrize("run", ["pointers", "tail alone", "tma"])
@each_place
def test_gemm_with_tail(rows, columns, before, run, poisoned_memory):
    if run == "tma":  # which addresses rows of whole vectors
        columns = slice(columns.start, columns.stop // 8 * 8)
    mask = mask_of(rows, columns, before)
    tokens, width = mask.shape
    left, right = torch.zeros(tokens, 64, dtype=DTYPE), torch.zeros(64, width, dtype=DTYPE)
    tail_left = torch.ones(tokens, 8, dtype=DTYPE)
    tail_right, out = torch.ones(8, width, dtype=DTYPE), left.new_empty(tokens, width)
    tile = tiles.gemm_tile(
        cell_of(tokens, width, 8), width, limits_of(left.device),
        aligned=run == "tma", row_major=True, has_main=run != "tail alone", two_results=False,
    )  # fmt: skip
    assert tile.tma == (run == "tma")
    drop = dropout_of(mask, rows, columns, before)
    right = None if run == "tail alone" else right
    start = gemm._launch_tma if tile.tma else gemm._launch_pointers
    start(tile, left, right, tail_left, tail_right, out, None, None, None, drop)
    assert torch.equal(out != 0, mask)


@pytest.mark.parametrize("tokens", [96, 300], ids=["few", "many"])  # in tiles of 16 pairs, or of 64
@each_place
def test_routed(rows, columns, before, tokens, poisoned_memory):
    """Every kernel of many adapters, all of which drop, each with a mask of its own."""
    repeated = -(-tokens // ROWS)  # the whole activation, so many times one below the other
    place = MaskPlace(before + rows.start, columns.start, PITCH)
    tokens = (repeated - 1) * ROWS + rows.stop - rows.start
    features = columns.stop - columns.start
    bank = bank_of(torch.eye(features, dtype=DTYPE))
    slots = torch.arange(tokens) % 2
    routing = Routing.from_tokens(slots.tolist(), bank)
    masks = [keep_mask(SEED, P, repeated * ROWS, PITCH, s, MaskPlace(before)) for s in (0, 1)]
    masks = [mask[rows.start : rows.start + tokens, columns] for mask in masks]
    mask = torch.where((slots == 0)[:, None], *masks)  # [tokens, features]
    tensors = routing.tensors(with_plan=False)
    of_pairs = mask[tensors.tokens.long()]

    x = torch.ones(tokens, features, dtype=DTYPE)
    call = RoutedCall(bank.tensors(), tensors, "triton", seed=SEED, place=place)
    run = RoutedLaunch(x, call)
    h = torch.empty(len(tensors.tokens), features)
    tail = run.shrink(x, h)
    assert isinstance(tail, Tail) and torch.equal(h != 0, of_pairs), "shrink"

    t = torch.zeros_like(h, dtype=DTYPE)
    t[:] = 1
    dx = torch.empty_like(x)
    run.expand(dx, Tail(t), to_b=False, overwrite=True)
    assert torch.equal(dx != 0, mask), "expand"

    with routed_tiles.use_strategy("fused"):
        assert run.fuses == (call.routing.block > 16)
        left, right = x.new_zeros(tokens, 9), x.new_zeros(9, features)
        dx = run.gemm(left, right, None, t, to_b=False)
    assert torch.equal(dx != 0, mask), "gemm"

    # Of three tokens, each in a row of its adapter's A.
    bank = bank_of(torch.zeros(3, features, dtype=DTYPE))
    layout, _ = bank.gradients((0, 1))
    grad, t = torch.zeros(layout.numel), torch.zeros(len(tensors.tokens), 3)
    looked_at = (0, tokens // 2 + 1, tokens - 1)
    assert {int(slots[token]) for token in looked_at} == {0, 1}
    for row, token in enumerate(looked_at):
        t[tensors.tokens == token, row] = 1
    run = RoutedLaunch(x, RoutedCall(bank.tensors(), tensors, "triton", seed=SEED, place=place))
    run.gradient(x, t, layout, grad, of_a=True)
    for row, token in enumerate(looked_at):
        offset = int(layout.table[slots[token], 0]) + row * features
        assert torch.equal(grad[offset : offset + features] != 0, mask[token]), "gradient of A"


def bank_of(lora_a: Tensor) -> AdapterBank:
    """Two adapters that drop; nothing of B is ever zero."""
    rank, features = lora_a.shape
    bank = AdapterBank(features, 9)
    for name in "ab":
        bank.add(name, lora_a, torch.ones(9, rank), 1.0, P)
    return bank


def test_one_word_counts_up_to_two_to_the_31_groups():
    """LONG_COUNTER is on as soon as the last group needs it, wherever the slice begins."""
    assert 17 * (2**31 // 17 - 96 + ROWS) + 9 == 2**31
    for place, expected in (
        (MaskPlace(), False),
        (MaskPlace(2**31 // 17 - 96, 64, PITCH), False),
        (MaskPlace(2**31 // 17 - 96, 72, PITCH), True),
        (MaskPlace(2**31 // 17, 0, PITCH), True),
        (MaskPlace(0, 0, 2**33), True),
    ):
        drop = operands.Dropout(ActiveDropout(P, SEED, place), ROWS, 8)
        assert drop.long_counter == expected, place
