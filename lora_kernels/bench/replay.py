"""Several calls timed as one, by the replay of a CUDA graph where they can be captured."""

from collections.abc import Callable

import torch

from lora_kernels.measuring import timing


class Replayed:
    """``calls()`` makes ``count`` calls; their laps are called ``lap``.

    Attributes:
        timing: how seconds are taken; known after :meth:`warm_up`.
    """

    def __init__(
        self, device: torch.device, calls: Callable[[], None], count: int, lap: str
    ) -> None:
        self.device = device
        self.timing = "events" if device.type == "cuda" else "wall clock"
        self._calls, self._count, self._lap = calls, count, lap
        self._graph: torch.cuda.CUDAGraph | None = None

    def warm_up(self) -> None:
        self._calls()
        if self.device.type == "cuda":
            self._capture()

    def run(self) -> timing.Laps:
        """Seconds per call."""
        clock = timing.Clock(self.device)
        clock.start()
        if self._graph:
            self._graph.replay()
        else:
            self._calls()
        clock.lap(self._lap)
        return {name: took / self._count for name, took in clock.seconds().items()}

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._calls()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._calls()
        except RuntimeError:  # a provider that synchronises: events then, and the row says so
            torch.cuda.synchronize()
            return
        self._graph = graph
        self.timing = "cuda graph"
