"""Clocks, interleaved repetitions, ratios: on known times."""

from itertools import pairwise

import pytest
import torch

from lora_kernels.measuring import timed_calls
from lora_kernels.measuring import timing as measure
from lora_kernels.measuring.timing import Spread

# ---- time


def test_spread_is_the_median_and_the_quartiles():
    assert Spread.of([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(median=3.0, q1=2.0, q3=4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="no values"):
        Spread.of([])


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_rounds_give_every_provider_every_place_equally_often(count):
    names = [f"p{i}" for i in range(count)]
    orders = list(measure.rounds(names, reps=2 * count))
    assert all(sorted(order) == names for order in orders)
    for place in range(count):
        assert sorted(order[place] for order in orders) == sorted(names * 2)
    # Each name follows every neighbour it has, not always the same one.
    followers = {pair for order in orders for pair in pairwise(order)}
    assert all((b, a) in followers for a, b in followers)


def test_interleave_runs_everyone_once_per_repetition_and_keeps_the_order_of_repetitions():
    ran, told = [], []
    counts = {"a": 0, "b": 0, "c": 0}

    def run(name):
        ran.append(name)
        counts[name] += 1
        return {"step": float(counts[name])}

    runs = {name: lambda name=name: run(name) for name in counts}
    samples = measure.interleave(runs, 4, lambda rep, name, took: told.append((rep, name, took)))

    assert ran == [name for order in measure.rounds(["a", "b", "c"], 4) for name in order]
    assert samples == {name: [{"step": float(i)} for i in (1, 2, 3, 4)] for name in "abc"}
    assert [rep for rep, *_ in told] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3


def test_ratios_are_taken_within_a_repetition():
    # The machine becomes three times slower in the middle: the quotient does not move, while the
    # quotient of the medians (40 / 10) would.
    ours = [{"step": seconds, "optimizer": 1.0} for seconds in (10.0, 30.0, 10.0, 40.0, 40.0)]
    frozen = [{"step": sample["step"] / 2} for sample in ours]
    frozen[4]["step"] = 10.0
    assert measure.ratios(ours, frozen) == {"step": Spread(2.0, 2.0, 2.0)}
    with pytest.raises(ValueError, match="zip"):
        measure.ratios(ours, frozen[:3])


def test_clock_adds_laps_of_one_name_and_drops_what_lies_before_a_start(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 100.0, 105.0, 112.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(times))
    clock = measure.Clock(torch.device("cpu"))
    for _ in range(2):
        clock.start()
        clock.mark("forward")
        clock.mark("backward")
    assert clock.seconds() == {"forward": 1.0 + 5.0, "backward": 2.0 + 7.0}


def test_calls_are_timed_by_part_and_divided_by_their_number(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 100.0, 105.0, 112.0])
    ran = []
    parts = {name: lambda number, name=name: ran.append((name, number)) for name in ("f", "b")}
    calls = timed_calls.TimedCalls(torch.device("cpu"), parts, 2, total="both")
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(times))
    assert calls.run() == {"f": 3.0, "b": 4.5, "both": 7.5}
    assert ran == [("f", 0), ("b", 0), ("f", 1), ("b", 1)] and calls.timing == "wall clock"


def test_eager_calls_of_a_part_follow_one_another_and_the_first_are_not_timed(monkeypatch):
    times = iter([0.0, 3.0, 100.0, 105.0])
    ran = []
    parts = {name: lambda number, name=name: ran.append((name, number)) for name in ("f", "b")}
    calls = timed_calls.TimedCalls(torch.device("cpu"), parts, 2)
    monkeypatch.setattr(calls, "_wait", lambda: ran.append("wait"))
    monkeypatch.setattr(timed_calls.time, "perf_counter", lambda: next(times))
    assert calls.run_eager() == {"f": 1.5, "b": 2.5} and not calls.captured
    assert ran == [
        ("f", 0), ("b", 0),
        "wait", ("f", 0), ("f", 1), "wait", "wait", ("b", 0), ("b", 1), "wait",
    ]  # fmt: skip


def test_sets_of_inputs_are_larger_than_the_cache(monkeypatch):
    monkeypatch.setattr(timed_calls.machine, "last_level_cache_bytes", lambda device: 1000)
    cpu = torch.device("cpu")
    assert [timed_calls.sets_past_cache(n, cpu) for n in (5000, 1000, 700, 1)] == [2, 3, 5, 64]
