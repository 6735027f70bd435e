"""The dropout generator: its definition in torch, and the seed.

The keep-mask of an ``[M, K]`` activation is a pure function of ``(seed, p, M, K, stream, place)``.
No kernel has to store it: forward and backward regenerate the same bits, on a CPU and on a GPU.

Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) is
called once per group of eight neighbouring columns, which get 16 bits each:

    g       = (m + row_offset) * ceil(pitch / 8) + (k + column_offset) // 8
                                                            64 bits, row-major over the groups
    counter = (g mod 2**32, g >> 32, stream, 0)
    key     = (low, high) 32 bits of the seed
    lane    = k mod 8, in the order word 0 low, word 0 high, word 1 low, ... word 3 high
    keep    = lane >= q        with q = min(round(p * 65536), 65535)
    scale   = 65536 / (65536 - q)                           so that the mean is exact

q = 0 draws nothing and keeps everything. ``stream`` tells the masks of one call apart: 0 for a
single adapter, the adapter's slot in routed operations. ``row_offset``, ``column_offset`` and
``pitch`` say where the activation stands in the whole one, which is ``pitch`` columns wide: so a
sequence or tensor parallel slice, or one of a packed batch, draws the whole one's bits. They are 0,
0 and K for an activation that is whole.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.runtime.capture import kept_per_device
from lora_kernels.runtime.dtypes import computes_in_64_bits

ROUNDS = 7
GROUP = 8  # columns served by one Philox call

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW_32 = 0xFFFFFFFF

# Groups per chunk. On a CPU the six int64 temporaries of a chunk stay in the second-level cache
# (128 KiB each); on a device each of the some sixty operations of a chunk is a launch. Chunks end
# at multiples of a power of two: none crosses a multiple of 2**32, and the high counter word is one
# number.
_CPU_CHUNK, _DEVICE_CHUNK = 1 << 14, 1 << 22

_MOST_GROUPS = 1 << 62  # before an activation: what follows still fits the counter

_BITS_OF = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class MaskPlace(NamedTuple):
    """Where an activation's mask stands in that of the whole activation."""

    row_offset: int = 0
    column_offset: int = 0  # a multiple of GROUP
    pitch: int | None = None  # columns of the whole; None: as many as the activation has

    def groups_per_row(self, columns: int) -> int:
        """By how much the group's number grows from row to row of an activation so wide."""
        return self.groups(columns)[1]

    def first_group(self, columns: int) -> int:
        """The number of the activation's first group."""
        return self.groups(columns)[0]

    def groups(self, columns: int) -> tuple[int, int]:
        """:meth:`first_group` and :meth:`groups_per_row`."""
        row_offset, column_offset, pitch = self
        per_row = -(-(columns if pitch is None else pitch) // GROUP)
        return row_offset * per_row + column_offset // GROUP, per_row

    def needs_long_counter(self, rows: int, columns: int) -> bool:
        """Whether 32 signed bits do not count the groups of an activation of that size."""
        return self.first_group(columns) + rows * self.groups_per_row(columns) >= 2**31


def check_place(row_offset: int, column_offset: int, pitch: int | None, columns: int) -> None:
    """Raise unless they place an activation of so many columns.

    Raises:
        TypeError: one is not an integer.
        ValueError: an offset is negative, column_offset cuts a group, or the pitch is too small.
    """
    for name, value in (
        ("row_offset", row_offset), ("column_offset", column_offset), ("pitch", pitch),
    ):  # fmt: skip
        if value is None and name == "pitch":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{name}: expected an integer, got {value!r}")
    if row_offset < 0:
        raise ValueError(f"row_offset: expected 0 or more, got {row_offset}")
    if column_offset < 0 or column_offset % GROUP:
        raise ValueError(
            f"column_offset: expected a multiple of {GROUP}, 0 or more, got {column_offset}"
        )
    if column_offset + columns > (columns if pitch is None else pitch):
        raise ValueError(
            f"pitch: expected the columns of the whole activation, at least {column_offset} + "
            f"{columns}, got {pitch}"
        )
    if MaskPlace(row_offset, column_offset, pitch).first_group(columns) >= _MOST_GROUPS:
        raise ValueError(
            f"row_offset: expected fewer than 2**62 groups of {GROUP} columns before the "
            f"activation, got {row_offset} rows"
        )


def drop_threshold(p: float) -> int:
    """The 16-bit threshold q below which a lane is dropped; P(drop) = q / 65536."""
    return min(round(p * 65536), 65535)


def keep_scale(p: float) -> float:
    """What a kept element is multiplied by: 65536 / (65536 - q), about 1 / (1 - p)."""
    return 65536 / (65536 - drop_threshold(p))


class ActiveDropout:
    """A dropout that drops, of one call: what its mask is a function of beside the sizes.

    Attributes:
        p: as it was asked for.
        seed: [] int64.
        place: of the activation in the whole one.
        threshold, scale: :func:`drop_threshold` and :func:`keep_scale` of p.
    """

    __slots__ = ("p", "place", "scale", "seed", "threshold")

    def __init__(self, p: float, seed: Tensor, place: MaskPlace = MaskPlace()) -> None:
        self.p, self.seed, self.place = p, seed, place
        self.threshold, self.scale = _threshold_and_scale(p)


@lru_cache(maxsize=256)
def _threshold_and_scale(p: float) -> tuple[int, float]:
    return drop_threshold(p), keep_scale(p)


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed: a 0-d int64 tensor on ``device`` from torch's default generator there.

    ``torch.manual_seed`` reproduces it, ``torch.utils.checkpoint`` replays it and a CUDA graph
    captures the draw, so that every replay has a new mask. On devices other than a CPU or a CUDA
    one it is put together from two numbers of 31 bits.
    """
    if not computes_in_64_bits(device):
        low, high = torch.randint(0, 2**31 - 1, (2,), dtype=torch.int64, device=device)
        return torch.add(low, high, alpha=1 << 32)
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def packed_keep_mask(
    seed: Tensor,
    p: float,
    rows: int,
    columns: int,
    stream: int = 0,
    place: MaskPlace = MaskPlace(),
) -> Tensor:
    """The keep-mask as bits: uint8 ``[rows, ceil(columns / 8)]``.

    Bit j of byte ``[m, i]`` is set when element ``[m, 8 i + j]`` is kept; bits past ``columns`` are
    drawn like the others and mean nothing.
    """
    groups = -(-columns // GROUP)
    threshold = drop_threshold(p)
    if threshold > 0 and place.groups_per_row(columns) != groups:  # rows are not neighbours
        every = torch.arange(rows, device=seed.device)
        return packed_keep_mask_of_rows(seed, p, every, columns, stream, place)
    total = rows * groups
    packed = torch.empty(total, dtype=torch.uint8, device=seed.device)
    if threshold == 0:
        return packed.fill_(255).view(rows, groups)
    key, chunk = _key_and_chunk(seed)
    first, start = place.first_group(columns), 0
    while start < total:
        count = min(chunk - (first + start) % chunk, total - start)
        random_words = _philox_words(first + start, count, key, stream, seed.device)
        packed[start : start + count] = _pack_lanes(random_words, threshold)
        start += count
    return packed.view(rows, groups)


def packed_keep_mask_of_rows(
    seed: Tensor,
    p: float,
    rows: Tensor,
    columns: int,
    stream: int = 0,
    place: MaskPlace = MaskPlace(),
) -> Tensor:
    """The rows ``rows`` (int ``[P]``, any order) of :func:`packed_keep_mask`: ``[P, ceil(K/8)]``.

    They do not depend on how many rows the whole mask has.
    """
    groups = -(-columns // GROUP)
    packed = torch.empty((rows.shape[0], groups), dtype=torch.uint8, device=seed.device)
    threshold = drop_threshold(p)
    if threshold == 0:
        return packed.fill_(255)
    key, chunk = _key_and_chunk(seed)
    step, pitch = max(1, chunk // max(1, groups)), place.groups_per_row(columns)
    first_row = torch.arange(groups, dtype=torch.int64, device=seed.device)
    first_row += place.first_group(columns)
    for start in range(0, rows.shape[0], step):
        some = rows[start : start + step]
        counter = (some.long().unsqueeze(1) * pitch + first_row).flatten()
        random_words = _philox((counter & _LOW_32, counter >> 32, stream, 0), key)
        packed[start : start + step] = _pack_lanes(random_words, threshold).view(-1, groups)
    return packed


def _key_and_chunk(seed: Tensor) -> tuple[tuple, int]:
    """The two words of the key, and how many groups to draw at once.

    On a CPU the key is read once; on a device it stays a tensor, which needs no synchronisation.
    Except on MPS, whose bitwise operations on 0-d tensors wait for the device each.
    """
    kind = seed.device.type
    value = int(seed.item()) if kind in ("cpu", "mps") else seed
    chunk = _CPU_CHUNK if kind == "cpu" else _DEVICE_CHUNK
    return (value & _LOW_32, (value >> 32) & _LOW_32), chunk


def keep_mask(
    seed: Tensor,
    p: float,
    rows: int,
    columns: int,
    stream: int = 0,
    place: MaskPlace = MaskPlace(),
) -> Tensor:
    """The keep-mask as booleans ``[rows, columns]``: the definition every kernel is tested on."""
    return unpacked_keep_mask(packed_keep_mask(seed, p, rows, columns, stream, place), columns)


def unpacked_keep_mask(packed: Tensor, columns: int) -> Tensor:
    """The bits of :func:`packed_keep_mask` as booleans ``[rows, columns]``."""
    bit = torch.arange(GROUP, dtype=torch.uint8, device=packed.device)
    lanes = (packed.unsqueeze(-1) >> bit) & 1  # [rows, groups, GROUP]
    return lanes.flatten(-2)[:, :columns].bool()


def zero_dropped(x: Tensor, packed: Tensor) -> Tensor:
    """``x`` ``[M, K]`` with the dropped elements set to zero, unscaled.

    ``packed`` is the ``[M, ceil(K/8)]`` mask. The scale belongs on the narrow side of the product
    that follows: there it costs M*R multiplications instead of M*K and rounds nothing.
    """
    bits = _BITS_OF[x.element_size()]
    table = _select_table(bits, x.device)
    select = torch.nn.functional.embedding(packed.int(), table)  # [M, groups, GROUP] of 0 or ~0
    return (x.view(bits) & select.flatten(-2)[:, : x.shape[1]]).view(x.dtype)


@kept_per_device
def _select_table(bits: torch.dtype, device: torch.device) -> Tensor:
    """``[256, GROUP]``: for every byte of a packed mask its eight lanes as all-ones or zero."""
    byte = torch.arange(256, dtype=torch.int64, device=device)
    lane = torch.arange(GROUP, dtype=torch.int64, device=device)
    return (-((byte.unsqueeze(-1) >> lane) & 1)).to(bits)


def _philox_words(
    first: int, count: int, key: tuple, stream: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output words of groups ``first .. first + count - 1``."""
    low = first & _LOW_32
    group = torch.arange(low, low + count, dtype=torch.int64, device=device)
    return _philox((group, first >> 32, stream, 0), key)


def _philox(counter: tuple, key: tuple) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output words of some counters, as int64 with 32 bits used.

    Counter words that are the same for the whole chunk are Python numbers, so the first two
    rounds cost half. The unsigned 64-bit products wrap in int64; shift and mask recover them.
    """
    k0, k1 = key
    for _ in range(ROUNDS):
        counter = _philox_round(counter, k0, k1)
        k0 = (k0 + _WEYL_0) & _LOW_32
        k1 = (k1 + _WEYL_1) & _LOW_32
    c0, c1, c2, c3 = counter
    return c0, c1 & _LOW_32, c2, c3 & _LOW_32


def _philox_round(counter: tuple, k0, k1) -> tuple:
    """One round. The odd words may carry more than 32 bits: they only meet XOR and a mask."""
    c0, c1, c2, c3 = counter
    product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
    return (
        _xor_low_32(product_1 >> 32, c1, k0),
        product_1 & _LOW_32 if isinstance(product_1, int) else product_1,
        _xor_low_32(product_0 >> 32, c3, k1),
        product_0 & _LOW_32 if isinstance(product_0, int) else product_0,
    )


def _xor_low_32(word, other, key):
    """``(word ^ other ^ key) mod 2**32``, in place where ``word`` is a tensor of its own."""
    if isinstance(word, Tensor) and word.ndim:
        word ^= other
        word ^= key
        word &= _LOW_32
        return word
    return (word ^ other ^ key) & _LOW_32


def _pack_lanes(random_words: tuple[Tensor, Tensor, Tensor, Tensor], threshold: int) -> Tensor:
    """One byte per group: bit j says whether 16-bit lane j reaches the threshold.

    Two words ride in one int64, so four lanes are compared at once: adding 65536 - q to a 16-bit
    field that has 16 free bits above it carries into the next bit exactly when lane >= q.
    """
    every_other_lane = 0x0000FFFF0000FFFF
    complement = (65536 - threshold) * (1 + (1 << 32))
    carries = (1 << 16) | (1 << 48)

    def kept(lanes: Tensor) -> Tensor:
        lanes &= every_other_lane
        lanes += complement
        lanes &= carries
        return lanes

    quads = []
    for low_word, high_word in (random_words[:2], random_words[2:]):
        both = torch.add(low_word, high_word, alpha=1 << 32)
        odd = kept(both >> 16)
        quads.append(kept(both).add_(odd, alpha=2))  # lanes 0, 1 at bits 16, 17; 2, 3 at 48, 49
    bits = quads[0].add_(quads[1], alpha=16)
    bits >>= 16  # lanes 0, 1, 4, 5 in place; lanes 2, 3, 6, 7 thirty bits too high
    bits |= bits >> 30
    return bits.to(torch.uint8)
