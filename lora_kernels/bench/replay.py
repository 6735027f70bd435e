"""Several calls timed as one, by the replay of a CUDA graph where they can be captured."""

from collections.abc import Callable

import torch

from lora_kernels.measuring import timing


class GraphReplay:
    """``calls()`` makes ``count`` calls, whose time is the quantity of that name.

    Attributes:
        timing: how seconds are taken; known after :meth:`warm_up`.
    """

    def __init__(
        self, device: torch.device, calls: Callable[[], None], count: int, quantity: str
    ) -> None:
        self.device = device
        self.timing = "events" if device.type == "cuda" else "wall clock"
        self._make_calls, self._count, self._quantity = calls, count, quantity
        self._graph: torch.cuda.CUDAGraph | None = None

    def warm_up(self) -> None:
        self._make_calls()
        if self.device.type == "cuda":
            self._capture()

    def run(self) -> timing.Sample:
        """Seconds per call."""
        clock = timing.Clock(self.device)
        clock.start()
        if self._graph:
            self._graph.replay()
        else:
            self._make_calls()
        clock.mark(self._quantity)
        return {name: took / self._count for name, took in clock.seconds().items()}

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._make_calls()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._make_calls()
        except RuntimeError:  # a provider that synchronises: events then, and the row says so
            torch.cuda.synchronize()
            return
        self._graph = graph
        self.timing = "cuda graph"
