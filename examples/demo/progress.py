"""Progress that is always seen: a bar on a terminal, a line every few seconds elsewhere."""

import logging
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance = Callable[[str], None]

SECONDS_BETWEEN_LINES = 5.0
_started = time.monotonic()
_interrupted = False


def elapsed() -> float:
    """Seconds since the demo began."""
    return time.monotonic() - _started


def say(text: str = "") -> None:
    """A line of the demo's story, with the seconds since it began."""
    print(f"[{elapsed():4.0f} s] {text}", flush=True)


def quieten() -> None:
    """Keeps the libraries' remarks about themselves off the terminal."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("transformers").setLevel(logging.ERROR)


def keep_interrupts() -> None:
    """Ctrl-C ends the demo at the next step at the latest.

    Where it strikes inside a destructor or a library's callback, Python prints the exception and
    goes on.
    """

    def interrupt(signum: int, frame) -> None:
        global _interrupted
        _interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)


@contextmanager
def progress(title: str, total: int, stream: TextIO | None = None) -> Iterator[Advance]:
    """Shows `total` steps; call what it gives once after each, with a note to stand beside it."""
    stream = stream or sys.stdout
    showing = _bar if stream.isatty() else _lines
    with showing(title, total, stream) as advance:

        def step(note: str = "") -> None:
            advance(note)
            if _interrupted:
                raise KeyboardInterrupt

        yield step


@contextmanager
def _bar(title: str, total: int, stream: TextIO) -> Iterator[Advance]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=stream)) as bar:
        task = bar.add_task(title, total=total, note="")
        yield lambda note="": bar.update(task, advance=1, note=note)


@contextmanager
def _lines(title: str, total: int, stream: TextIO) -> Iterator[Advance]:
    done, printed_at = 0, float("-inf")

    def advance(note: str = "") -> None:
        nonlocal done, printed_at
        done += 1
        now = time.monotonic()
        if done < total and now - printed_at < SECONDS_BETWEEN_LINES:
            return
        printed_at = now
        print(f"[{elapsed():4.0f} s] {title} {done}/{total}  {note}", file=stream, flush=True)

    yield advance
