"""The generator's definition: known answers, an independent formulation, statistics."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels.runtime.dropout import (
    _pack_lanes,
    _philox_words,
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


def mask_by_element(seed: int, p: float, rows: int, columns: int, stream: int) -> np.ndarray:
    """The keep-mask, one element at a time from the documented formula."""
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    keep = np.empty((rows, columns), dtype=bool)
    for m in range(rows):
        for k in range(columns):
            g = m * -(-columns // 8) + k // 8
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
