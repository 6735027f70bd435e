"""The masks that the compiled kernels draw of a slice are the whole activation's."""

import pytest
import torch

from lora_kernels import AdapterBank, Routing
from lora_kernels.runtime import cpu_extension as native
from lora_kernels.runtime.dropout import ActiveDropout, MaskPlace, packed_keep_mask

SEED = torch.tensor(-0x1234_5678_9ABC_DEF1)
P = 0.3
# Of a whole activation [., 700]: rows and columns of a slice; the last ends within a group.
SLICES = [
    pytest.param(slice(0, 300), slice(0, 700), id="whole"),
    pytest.param(slice(40, 80), slice(0, 700), id="few rows"),
    pytest.param(slice(7, 297), slice(0, 700), id="rows"),
    pytest.param(slice(0, 300), slice(64, 576), id="columns"),
    pytest.param(slice(3, 43), slice(8, 21), id="few"),
    pytest.param(slice(11, 300), slice(136, 601), id="both"),
]
# Where the whole one begins: across and past 2**32 groups.
BEFORE = [0, 2**32 // 88 - 50, 2**41 + 5]


def place_of(before: int, rows: slice, columns: slice) -> MaskPlace:
    return MaskPlace(before + rows.start, columns.start, 700)


def of_slice(packed: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
    return packed[rows, columns.start // 8 : -(-columns.stop // 8)]


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("rows, columns", SLICES)
def test_a_drawn_mask(level, rows, columns, before):
    whole = packed_keep_mask(SEED, P, 300, 700, 5, MaskPlace(before))
    size = rows.stop - rows.start, columns.stop - columns.start
    drawn = native.packed_keep_mask(SEED, P, *size, 5, place_of(before, rows, columns))
    assert torch.equal(drawn, of_slice(whole, rows, columns))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("rows, columns", SLICES)
def test_the_walk_over_an_adapters_rows(level, rows, columns, before, threads, monkeypatch):
    """h and the mask of a slice, in one walk over the rows and, where they are few, without it."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    whole = packed_keep_mask(SEED, P, 300, 700, 0, MaskPlace(before))
    x, a = torch.randn(300, 700)[rows, columns], torch.randn(4, 700)[:, columns]
    dropout = ActiveDropout(P, SEED, place_of(before, rows, columns))
    h, mask = native.allocate_saved(x, 4, dropout)
    y = torch.zeros(x.shape[0], 24)
    native.adapter_forward(y, x, a, torch.randn(24, 4), h, mask, 1.0, dropout, add=True)
    assert torch.equal(mask, of_slice(whole, rows, columns))


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("rows, columns", SLICES)
def test_the_masks_of_pairs(level, rows, columns, before):
    tokens, features = rows.stop - rows.start, columns.stop - columns.start
    bank = AdapterBank(features, 8)
    for name, p in {"a": P, "b": 0.0, "c": 0.6}.items():
        bank.add(name, torch.randn(3, features), torch.randn(8, 3), 1.0, p)
    slots = torch.randint(-1, 3, (tokens,), generator=torch.Generator().manual_seed(tokens))
    routing = Routing.from_tokens(slots.tolist(), bank).tensors(with_plan=True)
    place = place_of(before, rows, columns)
    mask = native.RoutedGroups(bank.tensors(), routing, features, SEED, place).draw_mask()
    for slot, p in ((0, P), (2, 0.6)):
        whole = packed_keep_mask(SEED, p, 300, 700, slot, MaskPlace(before))
        pairs = (slots[routing.tokens.long()] == slot).nonzero()[:, 0]
        expected = of_slice(whole, rows, columns)[routing.tokens[pairs].long()]
        assert len(pairs) and torch.equal(mask[pairs], expected)
