"""Kernels prove themselves on the user's machine, in a process of their own.

:func:`ensure` looks the verdicts of this machine's state up, or has them made: once per state,
however many processes ask (a lock lets one test; the others wait for it, and go on with what needs
no proof when they waited too long). ``families.py`` says what is checked, ``child.py`` is the
process that does it, ``lora_kernels/runtime/verdicts.py`` keeps the results.
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
from collections.abc import Callable, Iterable, Iterator
from json import loads
from pathlib import Path
from typing import IO

import filelock
import torch

from lora_kernels.runtime import verdicts
from lora_kernels.runtime.verdicts import BROKEN, UNPROVEN, Verdict, Verdicts
from lora_kernels.self_test.families import FAMILIES

SECONDS = 60.0  # for everything that is tried
HUNG = 30.0  # that one check may take; with all it compiles it takes a few
PATIENCE = 90.0  # that one process waits for another's test

# What a launcher sets for its workers. The child is none of them.
_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK",
                 "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME",
                 "MASTER_ADDR", "MASTER_PORT")  # fmt: skip

Say = Callable[[str], None]
Lines = Iterator[dict]
Runner = Callable[[list[str], float], Lines]


def ensure(
    dtypes: Iterable[torch.dtype] = (torch.bfloat16, torch.float16, torch.float32),
    *,
    again: bool = False,
    seconds: float = SECONDS,
    patience: float = PATIENCE,
    say: Say | None = None,
    runner: Runner | None = None,
) -> Verdicts:
    """The verdicts of this machine's state, by kind of device and family.

    Args:
        dtypes: of activations that are tried.
        again: test also what has a verdict that stands.
        seconds: for the test; families that it does not reach stay unproven.
        patience: seconds to wait for another process that is testing.
        say: is given a line before and after a test; None prints to standard error.
        runner: starts the process that tries kernels (tests bring their own).
    """
    say = say or _print
    names = tuple(str(dtype).removeprefix("torch.") for dtype in dtypes)
    path = verdicts.file_of(verdicts.machine_state())
    found = verdicts.load(path)
    if _complete(found, names) and not again:
        return found
    lock = _lock_beside(path)
    try:
        with lock.acquire(timeout=patience):
            found = verdicts.load(path)  # another process may have been quicker
            if _complete(found, names) and not again:
                return found
            return _test(path, {} if again else found, names, seconds, say, runner or run_child)
    except filelock.Timeout:
        say(
            f"lora_kernels: another process has been testing kernels for {patience:.0f} s; "
            "this one goes on without them"
        )
        return found


def _complete(found: Verdicts, dtypes: tuple[str, ...]) -> bool:
    every = [verdict for families in found.values() for verdict in families.values()]
    return bool(every) and all(verdict.stands_for(dtypes) for verdict in every)


class _NoLock:
    """Where no file can be made, no other process can be waited for."""

    def acquire(self, timeout: float) -> "_NoLock":
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _lock_beside(path: Path) -> filelock.BaseFileLock | _NoLock:
    lock = path.with_suffix(".lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with open(lock, "a"):
            return filelock.FileLock(lock)
    except OSError:
        return _NoLock()


def _test(
    path: Path,
    found: Verdicts,
    dtypes: tuple[str, ...],
    seconds: float,
    say: Say,
    runner: Runner,
) -> Verdicts:
    say(f"lora_kernels: testing kernels on this machine, once (at most {seconds:.0f} s) ...")
    began = time.monotonic()
    found = judge_all(found, dtypes, seconds, runner)
    kept = verdicts.store(path, verdicts.machine_state(), found)
    verdicts.forget()
    say(_summary(found, time.monotonic() - began, path if kept else None))
    return found


def judge_all(found: Verdicts, dtypes: tuple[str, ...], seconds: float, runner: Runner) -> Verdicts:
    """Have children try every family without a standing verdict, until the time is over.

    What was tried before is tried again with the dtypes that are new, so that one verdict holds for
    all. A child that ends in the middle of a family has proven it broken; the next goes on behind.
    """
    before = [verdict.dtypes for families in found.values() for verdict in families.values()]
    dtypes = tuple(dict.fromkeys([*dtypes, *(name for each in before for name in each)]))
    found = {
        kind: {name: each for name, each in families.items() if each.stands_for(dtypes)}
        for kind, families in found.items()
    }
    deadline = time.monotonic() + seconds
    while True:
        judged = [f"{kind}/{name}" for kind, families in found.items() for name in families]
        arguments = [
            "--dtypes",
            ",".join(dtypes),
            *(word for each in judged for word in ("--skip", each)),
        ]
        begun, check, ready, ended = None, "", False, None
        for line in runner(arguments, deadline - time.monotonic()):
            if "ready" in line:
                ready = True
                found |= {kind: found.get(kind, {}) for kind in line["ready"]}
            elif "begins" in line:
                begun = (line["kind"], line["family"])
            elif "check" in line:
                check = line["check"]
            elif "ended" in line:
                ended = line["ended"]
            else:
                begun = None
                found[line["kind"]][line["family"]] = Verdict(
                    line["state"], line["detail"], line["seconds"], time.time(), dtypes
                )
        if ended == OUT_OF_TIME:
            return _unproven(found, dtypes, "there was no time left to test it")
        if not ready:
            return _unproven(found, dtypes, f"the test could not start: {ended}")
        if begun is None:
            return found if ended is None else _unproven(found, dtypes, f"the test {ended}")
        kind, family = begun
        found[kind][family] = Verdict(
            BROKEN, f"{check}: the process {ended}", 0.0, time.time(), dtypes
        )


def _unproven(found: Verdicts, dtypes: tuple[str, ...], reason: str) -> Verdicts:
    """Every family that was not reached, as unproven for this reason."""
    verdict = Verdict(UNPROVEN, reason, 0.0, time.time(), dtypes)
    return {
        kind: dict.fromkeys(FAMILIES, verdict) | families
        for kind, families in (found or {verdicts.ANY: {}}).items()
    }


OUT_OF_TIME = "is out of time"


def run_child(arguments: list[str], seconds: float, hung: float = HUNG) -> Lines:
    """The child's lines, and one that says how it ended where it did not end well."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_LAUNCHERS and not name.startswith("TORCHELASTIC_")
    }
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-m", "lora_kernels.self_test.child", *arguments]
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


def _summary(found: Verdicts, seconds: float, path: Path | None) -> str:
    counts: dict[str, int] = {}
    for families in found.values():
        for verdict in families.values():
            counts[verdict.state] = counts.get(verdict.state, 0) + 1
    told = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    where = f"kept in {path}" if path else "not kept: the cache directory cannot be written to"
    return f"lora_kernels: kernels tested in {seconds:.0f} s: {told} ({where})"


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
