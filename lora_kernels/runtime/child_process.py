"""Work in a process of its own, so that a hang, a signal or a broken CUDA context costs that one.

A fresh interpreter, never a fork: this process need not have started CUDA, nor be able to fork.
"""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from json import loads
from pathlib import Path
from typing import IO

# What a launcher sets for its workers. The child is none of them.
_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK",
                 "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME",
                 "MASTER_ADDR", "MASTER_PORT")  # fmt: skip

Lines = Iterator[dict]

OUT_OF_TIME = "is out of time"


def run_child(module: str, arguments: list[str], seconds: float, hung: float) -> Lines:
    """The JSON objects that ``python -m module`` prints, and one ``{"ended": why}`` if it did not
    end well.

    seconds: that it may take. hung: seconds without a line after which it is taken for hung.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_LAUNCHERS and not name.startswith("TORCHELASTIC_")
    }
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-m", module, *arguments]
    with tempfile.TemporaryFile("w+") as complaints:
        try:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=complaints, text=True, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            yield {"ended": f"{type(error).__name__}: {error}"}
            return
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pass_on, args=(process.stdout, lines), daemon=True).start()
        deadline = time.monotonic() + seconds
        ended = None
        try:
            while True:
                left = deadline - time.monotonic()
                try:
                    line = lines.get(timeout=max(0.0, min(left, hung)))
                except queue.Empty:
                    ended = OUT_OF_TIME if left <= hung else f"did nothing for {hung:.0f} s"
                    break
                if line is None:
                    break
                if line.startswith("{"):
                    yield loads(line)
        except BaseException:
            _end(process)
            raise
        finally:
            if ended is not None:
                _end(process)
            code = process.wait()
        if ended is not None:
            yield {"ended": ended}
        elif code:
            complaints.seek(0)
            said = [line.strip() for line in complaints if line.strip()]
            how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
            yield {"ended": f"{how}: {said[-1][:300]}" if said else how}


def _end(process: subprocess.Popen) -> None:
    """With what it has started: an assembler goes on otherwise."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _pass_on(source: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in source:
        lines.put(line)
    lines.put(None)
