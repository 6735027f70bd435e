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


# The working directory is no place to import from: a file of the user's may have any name. Nor may
# what lies beside the package go before the standard library.
_START = """
import sys
root, module = sys.argv[1:3]
sys.path[:] = [each for each in sys.path if each]
import importlib.util, os
spec = importlib.util.find_spec("lora_kernels")
if spec is None or os.path.dirname(os.path.dirname(os.path.realpath(spec.origin))) != root:
    sys.path.insert(0, root)
sys.argv[:] = [module, *sys.argv[3:]]
import runpy
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def run_child(module: str, arguments: list[str], seconds: float, hung: float) -> Lines:
    """The JSON objects that a module of ours prints when it is run, and one ``{"ended": why}`` if
    it did not end well.

    seconds: that it may take. hung: seconds without a line after which it is taken for hung.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_LAUNCHERS and not name.startswith("TORCHELASTIC_")
    }
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", _START, root, module, *arguments]
    with contextlib.ExitStack() as stack:
        try:
            complaints = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=complaints, encoding="utf-8", errors="replace", start_new_session=True,
            )  # fmt: skip
        except (OSError, TypeError) as error:  # of an interpreter that has no executable, too
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
                if (found := _object_in(line)) is not None:
                    yield found
            if ended is None:
                process.wait(timeout=max(1.0, min(deadline - time.monotonic(), hung)))
        except subprocess.TimeoutExpired:
            ended = "closed its output and went on"
        finally:
            if process.poll() is None:
                _end(process)
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that not even a kill ends
                process.wait(timeout=10)
        if ended is not None:
            yield {"ended": ended}
        elif code := process.returncode:
            complaints.seek(0)
            said = [line.strip() for line in complaints if line.strip()]
            how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
            yield {"ended": f"{how}: {said[-1][:300]}" if said else how}


def _object_in(line: str) -> dict | None:
    """None for what somebody else has printed."""
    try:
        found = loads(line) if line.startswith("{") else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


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
