"""A server under load: threads that answer, beside threads that load, replace and remove adapters.

Every answer must be that of one version of its adapter which was current at some time during the
call. Who changes an adapter notes when it began and when it ended; an answer is compared with what
each file of adapters gives alone.
"""

import gc
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch import nn

from lora_kernels import route
from lora_kernels.files.adapters import ModuleAdapter, write_adapter

LAYERS, WIDTH, RANK, FILES = 12, 256, 8, 4
LOADS_PER_SECOND = 22.0  # of which 20 must come to an end


class Net(nn.Module):
    def __init__(self, layers: int = LAYERS, width: int = WIDTH) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        for parameter in self.parameters():
            parameter.data.normal_(0, width**-0.5, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


def write_files(folder: Path, layers: int = LAYERS, width: int = WIDTH) -> list[Path]:
    """Adapters of other ranks and scalings, far from each other."""
    paths = []
    for index in range(FILES):
        generator = torch.Generator().manual_seed(1 + index)
        rank = RANK if index else 2 * RANK  # one is wider than the others
        modules = {
            f"layers.{layer}": ModuleAdapter(
                torch.randn(rank, width, generator=generator) * width**-0.5,
                torch.randn(width, rank, generator=generator),
                0.5 + index,
            )
            for layer in range(layers)
        }
        paths.append(folder / str(index))
        write_adapter(paths[-1], modules)
    return paths


@dataclass
class Report:
    seconds: float
    answers: int = 0
    loads: int = 0
    replaced: int = 0
    removed: int = 0
    wrong: list[str] = field(default_factory=list)
    memory: int = 0  # bytes by which the process has grown from half time on

    @property
    def rate(self) -> float:
        return self.answers / self.seconds


class History:
    """Which file a name stood for, and from when to when it may have: (file, begin, end)."""

    def __init__(self, file: int) -> None:
        self.spans: list[list[float]] = [[file, 0.0, float("inf")]]

    def change(self, file: int, replace: Callable[[], None]) -> None:
        self.spans = [*self.spans[-8:], [file, time.perf_counter(), float("inf")]]
        replace()
        self.spans[-2][2] = time.perf_counter()

    def within(self, begin: float, end: float) -> set[int]:
        return {file for file, first, last in list(self.spans) if first <= end and begin <= last}


class Server:
    """The net, its adapters, and the threads around it."""

    def __init__(self, folder: Path, servers: int = 2) -> None:
        self.files, self.servers = write_files(folder), servers
        self.x = torch.randn(4, 3, WIDTH, generator=torch.Generator().manual_seed(2))
        self.expected = []
        for path in self.files:
            routed = route(Net())
            routed.load("alone", path)
            with torch.no_grad():
                self.expected.append(routed.batch("alone")(self.x))
        with torch.no_grad():
            self.base = Net()(self.x)
        self.routed = route(Net())
        self.names = ["s0", "s1", "s2"]
        for index, name in enumerate(self.names):
            self.routed.load(name, self.files[index])
        self.history = {name: History(index) for index, name in enumerate(self.names)}

    def run(self, seconds: float, *, changes: bool = True, until_wrong: bool = False) -> Report:
        self.report = report = Report(seconds)
        self._lock, self._stop = threading.Lock(), threading.Event()
        targets = [self._answer, self._answer_in_streams][: self.servers]
        if changes:
            targets += [self._load_and_remove, self._replace]
        threads = [threading.Thread(target=self._guarded, args=(target,)) for target in targets]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        memory = None
        while (passed := time.perf_counter() - began) < seconds and not self._stop.is_set():
            time.sleep(0.05)
            if memory is None and passed > seconds / 2:
                memory = _memory()
            if until_wrong and report.wrong:
                break
        self._stop.set()
        for thread in threads:
            thread.join()
        report.seconds = time.perf_counter() - began
        report.memory = _memory() - (memory or _memory())
        return report

    def _guarded(self, target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as error:
            self._wrong(f"{target.__name__}: {type(error).__name__}: {error}")
            self._stop.set()

    def _wrong(self, text: str) -> None:
        with self._lock:
            self.report.wrong.append(text)

    # --- answers ------------------------------------------------------------------------------

    @torch.no_grad()
    def _answer(self) -> None:
        handle = self.routed.batch([*self.names, "__base__"])
        while not self._stop.is_set():
            begin = time.perf_counter()
            y = handle(self.x)
            self._check(y, [*self.names, "__base__"], begin)

    @torch.no_grad()
    def _answer_in_streams(self) -> None:
        def stream(names):
            with self.routed.adapters(names):
                for _ in range(5):
                    begin = time.perf_counter()
                    yield self.routed.model(self.x), names, begin

        while not self._stop.is_set():
            streams = [stream([*self.names, "__base__"]), stream(["s2", "s2", "s0", "s1"])]
            for (y, names, begin), (other, other_names, later) in zip(*streams, strict=True):
                self._check(y, names, begin)
                self._check(other, other_names, later)

    def _check(self, y: torch.Tensor, names: list[str], begin: float) -> None:
        end = time.perf_counter()
        with self._lock:
            self.report.answers += 1
        for row, name in enumerate(names):
            if name == "__base__":
                possible = {"the base": self.base[row]}
            else:
                files = self.history[name].within(begin, end)
                possible = {f"file {file}": self.expected[file][row] for file in files}
            if not any(_same(y[row], each) for each in possible.values()):
                every = {f"file {file}": each[row] for file, each in enumerate(self.expected)}
                every["the base"] = self.base[row]
                found = [what for what, each in every.items() if _same(y[row], each)]
                self._wrong(f"{name}: {found or 'a mixture'}, expected {list(possible)}")

    # --- changes ------------------------------------------------------------------------------

    def _load_and_remove(self) -> None:
        """New names, each of which is asked once, and then taken out."""
        rest = threading.Event()
        began = time.perf_counter()
        for index in itertools.count():
            if self._stop.is_set():
                return
            name, file = f"t{index}", index % FILES
            self.routed.load(name, self.files[file])
            self.report.loads += 1
            with torch.no_grad():
                y = self.routed.batch(name)(self.x)
            with self._lock:
                self.report.answers += 1
            if not _same(y, self.expected[file]):
                self._wrong(f"{name}: not file {file}, right after it was loaded")
            if index >= 5:
                self.routed.remove(f"t{index - 5}")
                self.report.removed += 1
            rest.wait(max(0.0, began + (index + 1) / LOADS_PER_SECOND - time.perf_counter()))

    def _replace(self) -> None:
        generator, rest = torch.Generator().manual_seed(3), threading.Event()
        while not self._stop.is_set():
            name = self.names[int(torch.randint(len(self.names), (), generator=generator))]
            file = int(torch.randint(FILES, (), generator=generator))
            self.history[name].change(
                file, lambda n=name, f=file: self.routed.replace(n, self.files[f])
            )
            self.report.replaced += 1
            rest.wait(0.25)


def _same(y: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(y, expected, rtol=1e-3, atol=1e-3)


def _memory() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss
