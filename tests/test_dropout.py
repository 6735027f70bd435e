"""The generator's definition: known answers, an independent formulation, statistics."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels.runtime.dropout import (
    MaskPlace,
    _pack_lanes,
    _philox_words,
    check_place,
    draw_seed,
    drop_threshold,
    keep_mask,
    keep_scale,
    packed_keep_mask,
    packed_keep_mask_of_rows,
    zero_dropped,
)


def philox_numpy(counter: list[int], key: list[int], rounds: int = 7) -> list[int]:
    """Philox4x32 on Python integers, as the paper writes it."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [
            (second >> 32) ^ c[1] ^ k[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ c[3] ^ k[1],
            first & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def mask_by_element(
    seed: int,
    p: float,
    rows: int,
    columns: int,
    stream: int = 0,
    row_offset: int = 0,
    column_offset: int = 0,
    pitch: int | None = None,
) -> np.ndarray:
    """The keep-mask, one element at a time from the documented formula."""
    pitch = columns if pitch is None else pitch
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    keep = np.empty((rows, columns), dtype=bool)
    for m in range(rows):
        for k in range(columns):
            g = (m + row_offset) * -(-pitch // 8) + (k + column_offset) // 8
            words = philox_numpy([g & 0xFFFFFFFF, g >> 32, stream, 0], key)
            lane = (words[k % 8 // 2] >> (16 * (k % 2))) & 0xFFFF
            keep[m, k] = lane >= drop_threshold(p)
    return keep


# The vectors for philox4x32 with 7 rounds that Random123 publishes with its generators.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
]


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    assert philox_numpy(counter, key) == expected


def test_philox_zero_counter_in_torch():
    words = _philox_words(0, 1, (0, 0), 0, torch.device("cpu"))
    assert [int(word) for word in words] == KNOWN_ANSWERS[0][2]


@pytest.mark.parametrize("seed", [0, 1, -1, 0x1234_5678_9ABC_DEF1, -(2**63)])
@pytest.mark.parametrize(
    "rows, columns, stream", [(1, 1, 0), (3, 8, 0), (5, 29, 7), (4, 64, 2**31)]
)
def test_mask_equals_elementwise_definition(seed, rows, columns, stream):
    mask = keep_mask(torch.tensor(seed), 0.3, rows, columns, stream)
    np.testing.assert_array_equal(mask.numpy(), mask_by_element(seed, 0.3, rows, columns, stream))


PLACES = {
    "whole": MaskPlace(),
    "rows": MaskPlace(row_offset=19),
    "pitch": MaskPlace(pitch=75),
    "columns": MaskPlace(0, 40, 69),
    "both": MaskPlace(3, 8, 75),
    "across 2**32": MaskPlace(2**32 // 4 - 2, 0, 29),  # rows next to each other
    "gaps across 2**32": MaskPlace(2**32 // 9 - 1, 24, 72),
    "past 2**32": MaskPlace(2**41 + 7, 32, 2**20 + 5),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("chunk", [2, 2**14])
def test_a_placed_mask_equals_the_elementwise_definition(place, chunk, monkeypatch):
    monkeypatch.setattr("lora_kernels.runtime.dropout._CPU_CHUNK", chunk)
    seed, stream = -0x1234_5678_9ABC, 3
    mask = keep_mask(torch.tensor(seed), 0.3, 5, 29, stream, place)
    np.testing.assert_array_equal(mask.numpy(), mask_by_element(seed, 0.3, 5, 29, stream, *place))


def test_a_whole_activation_has_the_bits_it_has_without_a_place():
    seed = torch.tensor(11)
    placed = packed_keep_mask(seed, 0.3, 6, 45, 2, MaskPlace(0, 0, 45))
    assert torch.equal(placed, packed_keep_mask(seed, 0.3, 6, 45, 2))


@settings(max_examples=100)
@given(data=st.data())
def test_a_slice_draws_the_bits_of_the_whole(data):
    """The whole may itself stand anywhere: past 2**32 groups, or across them."""
    rows, pitch = data.draw(st.integers(0, 12), "rows"), data.draw(st.integers(1, 90), "pitch")
    groups = -(-pitch // 8)
    before = data.draw(
        st.sampled_from([0, 5, 2**31 // groups - 3, 2**32 // groups - 3, 2**40 + 9]), "before"
    )
    first_row, end_row = sorted(data.draw(st.integers(0, rows)) for _ in range(2))
    first = 8 * data.draw(st.integers(0, groups - 1), "first group")
    end = data.draw(st.integers(first + 1, pitch), "end")
    seed, p = torch.tensor(data.draw(st.integers(-(2**63), 2**63 - 1))), 0.4
    whole = keep_mask(seed, p, rows, pitch, 7, MaskPlace(before))
    place = MaskPlace(before + first_row, first, pitch)
    check_place(*place, end - first)
    part = keep_mask(seed, p, end_row - first_row, end - first, 7, place)
    assert torch.equal(part, whole[first_row:end_row, first:end])
    order = torch.randperm(end_row - first_row)
    packed = packed_keep_mask_of_rows(seed, p, order, end - first, 7, place)
    unplaced = packed_keep_mask(seed, p, rows, pitch, 7, MaskPlace(before))
    expected = unplaced[first_row:end_row, first // 8 : -(-end // 8)][order]
    assert torch.equal(packed, expected), "bits past the slice's columns are the whole's too"


@pytest.mark.parametrize(
    "place, error, message",
    [
        ((True, 0, None), TypeError, "row_offset: expected an integer, got True"),
        ((0, 8.0, 64), TypeError, "column_offset: expected an integer, got 8.0"),
        ((0, 0, "64"), TypeError, "pitch: expected an integer, got '64'"),
        ((None, 0, 64), TypeError, "row_offset: expected an integer, got None"),
        ((-1, 0, None), ValueError, "row_offset: expected 0 or more, got -1"),
        ((0, -8, 64), ValueError, "column_offset: expected a multiple of 8, 0 or more, got -8"),
        ((0, 12, 64), ValueError, "column_offset: expected a multiple of 8, 0 or more, got 12"),
        ((0, 16, 47), ValueError, "pitch: expected .* at least 16 \\+ 32, got 47"),
        ((0, 8, None), ValueError, "pitch: expected .* at least 8 \\+ 32, got None"),
        ((0, 0, 31), ValueError, "pitch: expected .* at least 0 \\+ 32, got 31"),
        ((2**60, 0, None), ValueError, r"row_offset: expected fewer than 2\*\*62 groups"),
    ],
)
def test_a_place_that_cannot_be(place, error, message):
    with pytest.raises(error, match=message):
        check_place(*place, 32)


@pytest.mark.parametrize("place", [(0, 0, None), (0, 0, 32), (9, 16, 48), (2**40, 8, 41)])
def test_a_place_that_can_be(place):
    check_place(*place, 32)


def test_a_place_of_symbolic_sizes_compiles_once():
    """Under torch.compile the offsets and the pitch may be symbols."""
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    @torch.compile(backend=backend, dynamic=True, fullgraph=True)
    def checked(x, row_offset, column_offset, pitch):
        check_place(row_offset, column_offset, pitch, x.shape[1])
        return x + row_offset

    for rows, columns, place in ((3, 32, (2, 8, 64)), (4, 40, (3, 16, 72)), (5, 48, (6, 24, 99))):
        checked(torch.zeros(rows, columns), *place)
    assert len(compilations) == 1


def test_group_numbers_past_32_bits():
    first = 2**32 - 3
    key = (123, 456)
    before = _philox_words(first, 3, key, 0, torch.device("cpu"))
    after = _philox_words(2**32, 3, key, 0, torch.device("cpu"))
    for offset in range(6):
        g = first + offset
        words = (before, after)[offset // 3]
        expected = philox_numpy([g & 0xFFFFFFFF, g >> 32, 0, 0], list(key))
        assert [int(word[offset % 3]) for word in words] == expected


def test_chunks_join_without_a_seam():
    seed = torch.tensor(99)
    rows, columns = 5, 8 * 7001  # 35,005 groups: three chunks
    mask = keep_mask(seed, 0.5, rows, columns)
    groups = mask.view(-1, 8)
    seams = [0, 2**14, 2**15, groups.shape[0]]
    for g in (g for seam in seams for g in range(seam - 4, seam + 4) if 0 <= g < len(groups)):
        words = philox_numpy([g, 0, 0, 0], [99, 0])
        lanes = [(words[lane // 2] >> (16 * (lane % 2))) & 0xFFFF for lane in range(8)]
        assert groups[g].tolist() == [lane >= 32768 for lane in lanes]


@pytest.mark.parametrize("threshold", [1, 2, 6554, 32768, 65535])
def test_a_lane_is_kept_from_the_threshold_on(threshold):
    lanes = [threshold - 1, threshold, 0, 65535, min(threshold + 1, 65535), threshold - 1, 1, 65534]
    for turn in range(8):
        turned = lanes[turn:] + lanes[:turn]
        words = [
            torch.tensor([low | high << 16])
            for low, high in zip(turned[::2], turned[1::2], strict=True)
        ]
        (packed,) = _pack_lanes(tuple(words), threshold).tolist()
        assert [packed >> j & 1 for j in range(8)] == [lane >= threshold for lane in turned]


@settings(max_examples=25)
@given(
    rows=st.integers(0, 40),
    columns=st.integers(1, 70),
    p=st.floats(0, 0.99),
    seed=st.integers(-(2**63), 2**63 - 1),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
)
def test_packed_mask_selects_what_the_mask_says(rows, columns, p, seed, dtype):
    seed = torch.tensor(seed)
    x = torch.randn(rows, columns, dtype=torch.float64).to(dtype)
    x[:, ::3] = float("nan")  # selected or not, never multiplied
    expected = torch.where(keep_mask(seed, p, rows, columns), x, 0)
    actual = zero_dropped(x, packed_keep_mask(seed, p, rows, columns))
    assert torch.equal(actual.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_rate_and_independence(p):
    """Kept fraction, neighbours, rows and lanes within five standard deviations."""
    rows, columns = 1024, 1024
    keep = keep_mask(draw_seed(torch.device("cpu")), p, rows, columns).double()
    rate = 1 - drop_threshold(p) / 65536
    variance = rate * (1 - rate)
    assert abs(keep.mean() - rate) < 5 * (variance / keep.numel()) ** 0.5
    per_lane = keep.view(rows, -1, 8).mean((0, 1)) - rate
    assert per_lane.abs().max() < 5 * (variance / (keep.numel() / 8)) ** 0.5
    centred = keep - rate
    for neighbour in (centred.roll(1, 1), centred.roll(1, 0), centred.roll(8, 1)):
        correlation = (centred * neighbour).mean() / variance
        assert abs(correlation) < 5 / keep.numel() ** 0.5
    assert keep_scale(p) * rate == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize(
    "p, threshold", [(0.0, 0), (1e-6, 0), (1 / 65536, 1), (0.1, 6554), (0.999999, 65535)]
)
def test_threshold(p, threshold):
    assert drop_threshold(p) == threshold


def test_seeds_follow_the_default_generator():
    device = torch.device("cpu")
    torch.manual_seed(5)
    first = [int(draw_seed(device)) for _ in range(4)]
    torch.manual_seed(5)
    assert [int(draw_seed(device)) for _ in range(4)] == first
    assert len(set(first)) == 4
    assert any(seed < 0 for seed in (int(draw_seed(device)) for _ in range(64)))


def test_streams_and_seeds_give_other_masks():
    seed = torch.tensor(17)
    base = keep_mask(seed, 0.5, 64, 64)
    for other in (keep_mask(seed, 0.5, 64, 64, stream=1), keep_mask(seed + 1, 0.5, 64, 64)):
        agreement = (base == other).double().mean()
        assert abs(agreement - 0.5) < 5 * (0.25 / base.numel()) ** 0.5


@pytest.mark.parametrize("seed", [0, 1, -1, 0x0123456789ABCDEF, -(2**63)])
def test_a_key_that_stays_on_the_device_gives_the_same_words(seed):
    tensor = torch.tensor(seed)
    keys = [(value & 0xFFFFFFFF, (value >> 32) & 0xFFFFFFFF) for value in (seed, tensor)]
    on_host, on_device = (_philox_words(2**33 - 5, 40, key, 3, tensor.device) for key in keys)
    assert all(torch.equal(a, b) for a, b in zip(on_host, on_device, strict=True))


@pytest.mark.parametrize("stream", [0, 5])
def test_the_mask_of_chosen_rows_is_those_rows_of_the_mask(stream, monkeypatch):
    monkeypatch.setattr("lora_kernels.runtime.dropout._CPU_CHUNK", 16)  # several chunks
    seed = torch.tensor(-0x1234_5678_9ABC)
    rows = torch.tensor([7, 0, 7, 30, 12, 1, 2, 3, 29], dtype=torch.int32)
    whole = packed_keep_mask(seed, 0.3, 31, 51, stream)
    chosen = packed_keep_mask_of_rows(seed, 0.3, rows, 51, stream)
    assert torch.equal(chosen, whole[rows.long()])


def test_the_mask_of_chosen_rows_counts_past_32_bits():
    seed = torch.tensor(77)
    row = 2**33 + 3  # with one group a row, the group's number
    chosen = packed_keep_mask_of_rows(seed, 0.5, torch.tensor([row, 3]), 8, 2)
    assert chosen[0] != chosen[1]  # 8 bits: equal by luck for one seed in 256, not for this one
    assert torch.equal(chosen[1], packed_keep_mask(seed, 0.5, 4, 8, 2)[3])
