"""Everything that is measured of one case, as rows."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from lora_kernels.bench import kernel, layer, op, report, routed, step
from lora_kernels.bench.memory import STABLE_MALLOC
from lora_kernels.measuring import machine, timing

CASES = {"op": op, "step": step, "layer": layer, "routed": routed, "kernel": kernel}


def measure_case(
    kind: str,
    case,
    names: list[str],
    meta: dict,
    reps: int,
    memory: bool,
    threads: int | None = None,
) -> list[dict]:
    """Times, saved bytes and peak memory of every provider in one case, as rows."""
    say("  preparing and warming up: " + ", ".join(names))
    device = torch.device(case.device)
    prepared, skipped = CASES[kind].prepare(case, names)
    for name, reason in skipped.items():
        say(f"  {name} skipped: {reason}")

    details: dict[str, dict] = {}
    for name, timed in prepared.items():
        saved = timed.saved()
        details[name] = {
            "timing": timed.timing,
            "saved_bytes": sum(storage.bytes for storage in saved),
        }
        if kind == "op":
            details[name]["saved"] = [asdict(storage) for storage in saved]
        else:
            details[name]["loss"] = timed.first_loss
        if memory and device.type == "cuda":
            # The allocator counts exactly, whatever else lives in the process.
            details[name]["memory"] = asdict(timed.peak())

    floor = None
    if kind == "op":
        limits = machine.ceilings(device, case.torch_dtype)
        meta = meta | {"ceilings": limits}
        floor = op.floor(case, limits)

    progress = Progress(reps, len(prepared))
    runs = {name: timed.run for name, timed in prepared.items()}
    samples = timing.interleave(runs, reps, progress.ran) if runs else {}
    del runs, prepared

    if kind == "routed":
        routed.with_parts(case, samples)

    if memory and device.type != "cuda" and kind in ("op", "step"):
        for name in samples:
            say(f"  peak memory of {name}, in its own process")
            details[name]["memory"] = memory_in_own_process(case, name, threads)
    return report.rows_of(kind, case, meta, samples, skipped, details, floor)


def memory_in_own_process(case, name: str, threads: int | None) -> dict | None:
    """Runs this command again with --only-memory; None, and a line saying so, if that fails."""
    command = [sys.executable, "-m", "lora_kernels", "bench", *case.argv()]
    command += [f"--only-memory={name}", *([f"--threads={threads}"] if threads else [])]
    # The package that is running, also where it was found through the current directory.
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | STABLE_MALLOC | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        say(f"  no peak memory of {name}: {last}")
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


class Progress:
    """A line per repetition, with what is left."""

    def __init__(self, reps: int, runs_per_rep: int) -> None:
        self._reps, self._runs_per_rep = reps, runs_per_rep
        self._done = 0
        self._began = time.perf_counter()

    def ran(self, rep: int, name: str, sample: timing.Sample) -> None:
        self._done += 1
        if self._done % self._runs_per_rep:
            return
        elapsed = time.perf_counter() - self._began
        left = elapsed / (rep + 1) * (self._reps - rep - 1)
        say(f"  repetition {rep + 1}/{self._reps}, {elapsed:.0f} s so far, about {left:.0f} s left")


def say(line: str) -> None:
    """Progress goes to stderr: stdout is the result."""
    print(line, file=sys.stderr, flush=True)
