"""Many calls timed as one, by the replay of CUDA graphs where they can be captured.

The calls go through several sets of inputs, together larger than the last-level cache, so that
what they read comes from memory as it does between the layers of a model.
"""

import contextlib
import math
import time
from collections.abc import Callable

import torch

from lora_kernels.measuring import machine, timing


def sets_past_cache(bytes_of_one: int, device: torch.device, most: int = 64) -> int:
    """How many sets of inputs are three times the last-level cache; at least two."""
    cache = machine.last_level_cache_bytes(device)
    return min(most, max(2, math.ceil(3 * cache / bytes_of_one)))


class TimedCalls:
    """``count`` calls, each made of ``parts``: functions of the call's number, in their order.

    total: the name of the parts' sum. around: entered around the calls, not around the replay of a
    graph that has captured them. timing: how seconds are taken, known after :meth:`warm_up`.
    """

    def __init__(
        self,
        device: torch.device,
        parts: dict[str, Callable[[int], object]],
        count: int,
        total: str | None = None,
        around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        self.device = device
        self.timing = "events" if device.type == "cuda" else "wall clock"
        self._parts, self._count, self._total, self._around = parts, count, total, around
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self._results: list[object] = []  # the graphs' own: every call writes to another place

    def warm_up(self) -> None:
        self._call_all(timing.Clock(self.device))
        if self.device.type == "cuda":
            self._capture()

    @property
    def captured(self) -> bool:
        return bool(self._graphs)

    def run_eager(self) -> timing.Sample:
        """Seconds per call by the wall clock: the calls of a part one after the other, and the
        device waited for at their end."""
        sample = {}
        with self._around():
            for part in self._parts.values():  # what is around may have forgotten plans
                part(0)
            for name, part in self._parts.items():
                self._wait()
                began = time.perf_counter()
                for number in range(self._count):
                    part(number)
                self._wait()
                sample[name] = (time.perf_counter() - began) / self._count
        return sample

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def run(self) -> timing.Sample:
        """Seconds per call."""
        clock = timing.Clock(self.device)
        if self._graphs:
            clock.start()
            for name, graph in self._graphs.items():
                graph.replay()
                clock.mark(name)
        else:
            self._call_all(clock)
        sample = {name: took / self._count for name, took in clock.seconds().items()}
        return sample | ({self._total: sum(sample.values())} if self._total else {})

    def _call_all(self, clock: timing.Clock) -> None:
        with self._around():
            for number in range(self._count):
                clock.start()
                for name, part in self._parts.items():
                    part(number)
                    clock.mark(name)

    def _capture(self) -> None:
        """A graph for each part, in one pool: they are replayed in the order of their capture, so
        that a backward may use the memory again that it frees of its forward."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._call_all(timing.Clock(self.device))
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        pool, graphs = torch.cuda.graph_pool_handle(), {}
        try:
            with self._around():
                for name, part in self._parts.items():
                    graphs[name] = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graphs[name], pool=pool):
                        self._results += [part(number) for number in range(self._count)]
        except RuntimeError:  # a call that synchronises: events then, and the row says so
            torch.cuda.synchronize()
            self._results.clear()
            return
        self._graphs, self.timing = graphs, "cuda graph"
