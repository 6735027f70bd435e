"""When a kernel is taken in place of composed, on made-up times."""

import pytest
import torch

from lora_kernels.measuring.taking import Times, taken, wins
from lora_kernels.ops.routed.cells import TableCell

COMPOSED = Times([[1.0, 1.02, 0.98]] * 3)
CAPTURED = Times(COMPOSED.eager, [[0.5, 0.51, 0.49]] * 3)


def rounds(*medians):
    """Three samples around each median."""
    return [[0.99 * median, median, 1.01 * median] for median in medians]


@pytest.mark.parametrize(
    ("eager", "won"),
    [
        (rounds(0.9, 0.9, 0.9), True),
        (rounds(0.97, 0.97, 0.97), True),
        (rounds(0.98, 0.98, 0.98), False),
        (rounds(0.9, 0.9, 1.1), True),
        (rounds(0.5, 1.0, 1.0), False),
        # Two rounds won by a little, one lost by as much: the median of all samples is no gain.
        ([[0.96, 0.96, 0.96], [0.96, 0.97, 1.2], [1.2, 1.2, 1.2]], True),
        ([[0.96, 0.969, 1.2], [0.96, 0.969, 1.2], [1.2, 1.2, 1.2]], False),
    ],
    ids=[
        "faster", "just 3 %", "2 % is refused", "in two rounds", "in one round is refused",
        "the median gains", "the median loses",
    ],
)  # fmt: skip
def test_a_gain_of_3_percent_in_the_median_and_in_two_rounds(eager, won):
    times = {"composed": COMPOSED, "native": Times(eager)}
    assert wins(times["native"], COMPOSED) == won
    assert taken(times) == ("native" if won else "composed")


@pytest.mark.parametrize(
    ("candidate", "won"),
    [
        (Times(rounds(0.9, 0.9, 0.9), rounds(0.4, 0.4, 0.4)), True),
        (Times(rounds(0.9, 0.9, 0.9), rounds(0.6, 0.6, 0.6)), False),
        (Times(rounds(0.9, 0.9, 0.9), rounds(0.49, 0.49, 0.49)), False),
        (Times(rounds(1.1, 1.1, 1.1), rounds(0.4, 0.4, 0.4)), False),
        (Times(rounds(0.9, 0.9, 0.9)), False),
    ],
    ids=["both", "graph slower", "graph gains 2 %", "eager slower", "not captured"],
)
def test_both_clocks_have_to_gain(candidate, won):
    assert wins(candidate, CAPTURED) == won
    assert wins(candidate, COMPOSED) == (candidate.seconds < 1), "composed has no graph to lose to"


def test_of_those_that_pass_the_lower_of_the_slower_clock():
    host_bound = Times(rounds(0.9, 0.9, 0.9), rounds(0.1, 0.1, 0.1))
    even = Times(rounds(0.8, 0.8, 0.8), rounds(0.4, 0.4, 0.4))
    refused = Times(rounds(0.5, 0.5, 0.5), rounds(0.6, 0.6, 0.6))
    times = {"composed": CAPTURED, "hybrid": host_bound, "fused": even, "native": refused}
    assert taken(times) == "fused"
    assert taken({"composed": CAPTURED, "native": refused}) == "composed"
    assert taken({"composed": CAPTURED}) == "composed"


def test_what_a_table_keeps_of_the_samples():
    times = Times([[1.0, 2.0], [3.0, 4.0], [5.0]], [[7.0]] * 3)
    assert (times.seconds, times.spread, times.graph_seconds, times.slower) == (3.0, 2.0, 7.0, 7.0)


def test_the_key_of_a_routed_call():
    cell = TableCell("training", torch.bfloat16, 100, 576, 1536, 12, 5, True)
    assert cell.key == "training/bfloat16/M128/K576/N1536/R16/A8/p1"
    assert TableCell("forward", torch.float32, 1, 8, 24, 1, 1, False).key == (
        "forward/float32/M1/K8/N24/R1/A1/p0"
    )
