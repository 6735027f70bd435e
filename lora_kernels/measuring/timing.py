"""Timing by interleaved repetitions.

A shared machine drifts by tens of per cent within a minute, so a provider is never timed in one
block: every repetition runs every provider once, and ratios are taken inside a repetition.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

Sample = dict[str, float]  # of one run: seconds by the name of what was timed


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some values."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        if not values:
            raise ValueError("no values to summarise")
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3)


class Clock:
    """Times the parts of one run: the wall clock on a CPU, events on the current stream on CUDA.

    Parts of the same name add up, so that a run may loop over several calls.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str | None, Any]] = []  # seconds, or events

    def start(self) -> None:
        """Start timing: what happened since the last mark belongs to no part."""
        if self._cuda and not self._marks:
            torch.cuda.synchronize()
        self._marks.append((None, self._now()))

    def mark(self, name: str) -> None:
        """What happened since the last mark is the part of that name."""
        self._marks.append((name, self._now()))

    def seconds(self) -> Sample:
        if self._cuda:
            torch.cuda.synchronize()
        sample: Sample = {}
        for (_, before), (name, after) in zip(self._marks, self._marks[1:], strict=False):
            if name is None:
                continue
            took = before.elapsed_time(after) * 1e-3 if self._cuda else after - before
            sample[name] = sample.get(name, 0.0) + took
        return sample

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def rounds(names: list[str], reps: int) -> Iterator[list[str]]:
    """The order of each repetition: rotated, and turned round every second time.

    Rotation gives each provider every place; turning round changes who ran before it, whose heat,
    cache lines and malloc state it inherits.
    """
    for rep in range(reps):
        cut = (rep // 2) % len(names) if names else 0
        order = names[cut:] + names[:cut]
        yield order if rep % 2 == 0 else order[::-1]


def interleave(
    runs: dict[str, Callable[[], Sample]],
    reps: int,
    on_run: Callable[[int, str, Sample], None] | None = None,
) -> dict[str, list[Sample]]:
    """Every run once per repetition; returns the samples of each, in order of repetition."""
    samples: dict[str, list[Sample]] = {name: [] for name in runs}
    for rep, order in enumerate(rounds(list(runs), reps)):
        for name in order:
            took = runs[name]()
            samples[name].append(took)
            if on_run:
                on_run(rep, name, took)
    return samples


def ratios(numerator: list[Sample], denominator: list[Sample]) -> dict[str, Spread]:
    """Spread of the quotients taken repetition by repetition, for the quantities both have."""
    shared = [quantity for quantity in numerator[0] if quantity in denominator[0]]
    return {
        quantity: Spread.of(
            [a[quantity] / b[quantity] for a, b in zip(numerator, denominator, strict=True)]
        )
        for quantity in shared
    }
