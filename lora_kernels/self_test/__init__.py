"""Kernels prove themselves on the user's machine, in a process of their own.

:func:`ensure` looks the verdicts of this machine's state up, or has them made: once per state,
however many processes ask (a lock lets one test; the others wait for it, and go on with what needs
no proof when they waited too long). ``families.py`` says what is checked, ``child.py`` is the
process that does it, ``lora_kernels/runtime/verdicts.py`` keeps the results.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from lora_kernels.runtime import machine_files, verdicts
from lora_kernels.runtime.child_process import OUT_OF_TIME, Lines, run_child
from lora_kernels.runtime.verdicts import BROKEN, UNPROVEN, Verdict, Verdicts
from lora_kernels.self_test.families import FAMILIES

SECONDS = 60.0  # for everything that is tried
HUNG = 30.0  # that one check may take; with all it compiles it takes a few
PATIENCE = 90.0  # that one process waits for another's test

Say = Callable[[str], None]
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
    path = verdicts.file_of(machine_files.machine_state())
    verdicts.forget()  # another process may have tested since they were read
    found = verdicts.load(path)
    if _complete(found, names) and not again:
        return found
    with machine_files.held(path, patience) as mine:
        found = verdicts.load(path)  # another process may have been quicker
        if _complete(found, names) and not again:
            return found
        if mine:
            return _test(path, {} if again else found, names, seconds, say, runner or _run_child)
    say(
        f"lora_kernels: another process has been testing kernels for {patience:.0f} s; "
        "this one goes on without them"
    )
    return found


def _complete(found: Verdicts, dtypes: tuple[str, ...]) -> bool:
    every = [verdict for families in found.values() for verdict in families.values()]
    whole = bool(every) and all(set(FAMILIES) <= set(families) for families in found.values())
    return whole and all(verdict.stands_for(dtypes) for verdict in every)


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
    kept = verdicts.store(path, machine_files.machine_state(), found)
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
        if kind != verdicts.ANY
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


def _run_child(arguments: list[str], seconds: float) -> Lines:
    return run_child("lora_kernels.self_test.child", arguments, seconds, HUNG)


def _summary(found: Verdicts, seconds: float, path: Path | None) -> str:
    counts: dict[str, int] = {}
    for families in found.values():
        for verdict in families.values():
            counts[verdict.state] = counts.get(verdict.state, 0) + 1
    told = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    where = f"kept in {path}" if path else "not kept: the cache directory cannot be written to"
    return f"lora_kernels: kernels tested in {seconds:.0f} s: {told} ({where})"


def _print(line: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or there is none
        print(line, file=sys.stderr, flush=True)
