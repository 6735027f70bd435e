"""What we may launch and move at most: PEFT's counts in the same state, and numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .cases import BF16, FEATURES, FP16, FP32, Launched, LinearCase
from .cost import total
from .routed_cases import RoutedCase


@dataclass(frozen=True)
class Bound:
    launches: int
    bytes: float = math.inf

    def __str__(self) -> str:
        return f"{self.launches}" + (f", {self.bytes / 1e9:.2f} GB" if self.bytes < 1e15 else "")


# Forward and backward of M 8192, K = N = 4096, R 16, by dropout and the adapters' dtype.
_TRAINING = {
    (0.05, FP32): Bound(16, 1_170_000_000),
    (0.05, BF16): Bound(14, 1_170_000_000),
    (0.0, FP32): Bound(12, 900_000_000),
    (0.0, BF16): Bound(10, 900_000_000),
}
_FP16 = Bound(20)
_ONE_TOKEN = Bound(5)
_DECODE, _DECODE_SLICES, _ROUTED_TRAINING = Bound(20), Bound(40), Bound(130)


def broken(case: object, found: dict[str, Launched]) -> list[str]:
    """A sentence for each bound that our counts of a case do not keep; ``found`` by provider."""
    ours, said = total(found["ours"]), []

    def check(what: str, count: float, most: float, whose: str) -> None:
        if count > most:
            said.append(f"{what}: {count:,} are more than {whose} {most:,}")

    if (bound := of(case)) is not None:
        check("launches", ours.launches, bound.launches, "the bound's")
        check("bytes", ours.bytes, bound.bytes, "the bound's")
    syncs = copies = 0
    if "PEFT" in found:
        peft = total(found["PEFT"])
        if not _guards_fp16(case):
            more = getattr(case, "scaling_on_device", False)
            check("launches", ours.launches, peft.launches + more, "PEFT's")
        check("bytes", ours.bytes, peft.bytes + _one_piece(case), "PEFT's")
        syncs, copies = peft.syncs, peft.copies
    elif getattr(case, "does", None) == "filling":
        syncs = copies = 1  # the ids come from the host
    check("waits of the host", ours.syncs, syncs, "the allowed")
    check("copies between host and device", ours.copies, copies, "the allowed")
    check("launches with atomic adds", ours.atomics, 0, "the allowed")
    return said


def _guards_fp16(case: object) -> bool:
    """Whether we keep h and t from underflowing, which PEFT does not."""
    return isinstance(case, LinearCase) and case.dtype == FP16


def _one_piece(case: object) -> int:
    """What decoding may move beside: its batched products want the factors of all adapters in one
    piece, written once and read once in half precision. That saves some forty launches, each of
    which takes as long as ten megabytes."""
    if not isinstance(case, RoutedCase) or case.does != "decode":
        return 0
    a = len(case.widths) * FEATURES
    return 2 * BF16.itemsize * sum(case.ranks) * (a + sum(case.widths))


def of(case: object) -> Bound | None:
    """None where PEFT's counts are the only bound."""
    if isinstance(case, RoutedCase):
        return _of_routed(case)
    if not isinstance(case, LinearCase):
        return None
    if case.dtype == FP16:
        return _FP16
    if case.tokens == 1:
        return _ONE_TOKEN
    plain = LinearCase(8192, 16, case.dtype, case.adapter_dtype, case.dropout_p)
    if replace(case, way=plain.way, scaling_on_device=False) != plain or case.dtype != BF16:
        return None
    bound = _TRAINING[case.dropout_p, case.adapter_dtype]
    # The product with a scaling that the host does not know.
    return replace(bound, launches=bound.launches + case.scaling_on_device)


def _of_routed(case: RoutedCase) -> Bound | None:
    if case.does == "decode":
        return _DECODE if len(case.widths) == 1 else _DECODE_SLICES
    return _ROUTED_TRAINING if case.does == "training" else None
