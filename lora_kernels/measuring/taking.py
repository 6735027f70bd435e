"""Whether a kernel is taken: the rule, a pure function of measured seconds.

Candidates are timed in three rounds of interleaved repetitions. One is taken in place of composed
if it gains 3 % in the median of all samples and in two of the three rounds, and that by the wall
clock of eager calls as well as by the replay of CUDA graphs, where composed could be captured.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from lora_kernels.measuring.timing import Spread

GAIN = 0.97  # of composed's time, or less
ROUNDS, ROUNDS_WON = 3, 2

Rounds = list[list[float]]  # seconds of every sample, by round


@dataclass(frozen=True)
class Times:
    """Of one candidate: eager calls by the wall clock, and replayed graphs where they exist."""

    eager: Rounds
    graph: Rounds | None = None

    @property
    def seconds(self) -> float:
        return _median(self.eager)

    @property
    def graph_seconds(self) -> float | None:
        return None if self.graph is None else _median(self.graph)

    @property
    def slower(self) -> float:
        """Of eager calls and graphs: what the candidate is ranked by."""
        return max(self.seconds, self.graph_seconds or 0.0)

    @property
    def spread(self) -> float:
        """Between the quartiles of the eager samples."""
        of_all = Spread.of(_flat(self.eager))
        return of_all.q3 - of_all.q1


def taken(times: Mapping[str, Times]) -> str:
    """The candidate that is taken: the fastest of those that gain enough, else composed.

    Args:
        times: of every candidate that ran, ``composed`` among them.
    """
    composed = times["composed"]
    passed = [name for name, each in times.items() if name != "composed" and wins(each, composed)]
    return min(passed, key=lambda name: times[name].slower, default="composed")


def wins(candidate: Times, composed: Times) -> bool:
    """Whether it gains enough by both clocks."""
    if not _gains(candidate.eager, composed.eager):
        return False
    if composed.graph is None:  # it reads sizes on the host, say: no graph is lost to
        return True
    return candidate.graph is not None and _gains(candidate.graph, composed.graph)


def _gains(candidate: Rounds, composed: Rounds) -> bool:
    won = sum(
        statistics.median(ours) <= GAIN * statistics.median(theirs)
        for ours, theirs in zip(candidate, composed, strict=True)
    )
    return won >= ROUNDS_WON and _median(candidate) <= GAIN * _median(composed)


def _median(rounds: Rounds) -> float:
    return statistics.median(_flat(rounds))


def _flat(rounds: Rounds) -> list[float]:
    return [seconds for each in rounds for seconds in each]
