"""`make gpu-check`: everything a GPU must show, in one command, on a machine with torch and Triton.

Sections run one after another in order of worth, each in processes of its own and within its own
time, so that a hang or a broken CUDA context loses one unit of work and no more: the unit is
recorded as failed, and a fresh process goes on behind it. What is finished is on disk at once; the
result file and the report are rewritten after every section.

    gpu-check.jsonl   rows of kind "check", and the rows of the benchmarks
    REPORT.md         the same for people
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_kernels.bench import gpu_report, report

ROOT = Path(__file__).resolve().parents[2]
POLL = 0.05  # seconds
# How a worker ends that wants a fresh process: its unit is recorded, its CUDA context is broken.
AGAIN = 75


@dataclass(frozen=True)
class Section:
    name: str
    title: str
    seconds: float  # for all of it
    unit_seconds: float  # for one unit of work, a hanging one say
    workers: int = 1  # processes at once; 1 where time is measured


# In order of worth, but for the extension, which the rest asks for. Less than eight minutes in all.
SECTIONS = (
    Section("environment", "The machine and its ceilings", 20, 18),
    Section("build", "The compiled extension", 60, 58),
    Section("quick", "Correctness: every Triton kernel, dtype and shape", 85, 60, workers=12),
    Section("routed", "Correctness: many adapters in one batch", 30, 30, workers=12),
    Section("native", "Correctness: CUDA kernels", 35, 30, workers=12),
    Section("shapes", "Correctness at the benchmark's sizes", 35, 34, workers=8),
    Section("core", "Benchmark: the core cells", 65, 40),
    Section("decode", "Benchmark: decoding with one adapter", 20, 18),
    Section("routed-core", "Benchmark: many adapters in one batch", 25, 20),
    Section("gemm", "Benchmark: the GEMMs with a tail alone", 25, 20),
    Section("long", "Correctness: graphs, streams, threads, offsets", 30, 28, workers=4),
    Section("layer", "Benchmark: a decoder layer", 20, 18),
    Section("sanitizer", "compute-sanitizer", 30, 28, workers=6),
)


def command_of(section: Section, part: Path, worker: int, workers: int, options: list[str]):
    """The command of one worker; it appends to ``part`` and skips what is finished there."""
    return [
        sys.executable, "-m", "lora_kernels.bench.gpu_units", section.name, f"--part={part}",
        f"--worker={worker}", f"--workers={workers}", f"--unit-seconds={section.unit_seconds}",
        *options,
    ]  # fmt: skip


class Worker:
    """One process of a section, started again behind a unit that killed it."""

    def __init__(self, command: list[str], part: Path, section: Section, deadline: float) -> None:
        self._command, self.part, self._section = command, part, section
        self._deadline = deadline
        self.trouble: str | None = None  # why it stopped before its last unit
        self.done = False
        self._start()

    def _start(self) -> None:
        self._log = self.part.with_suffix(".log")
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def poll(self) -> None:
        code = self._process.poll()
        if code is None and time.monotonic() < self._deadline:
            return
        self.done = True
        if code is None:
            self.stop()
            self._fail_unfinished("still running when the section's time was over")
            self.trouble = "the section's time was over"
        elif code:
            lines = self._log.read_text(errors="replace").strip().splitlines()
            reason = f"the process ended with {code}: " + " | ".join(lines[-6:])
            goes_on = self._fail_unfinished(reason) or code == AGAIN
            if goes_on and time.monotonic() < self._deadline:
                self.done = False
                self._start()
            else:
                self.trouble = reason

    def stop(self) -> None:
        """Ends the process and what it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _fail_unfinished(self, reason: str) -> bool:
        """Records the unit that was running as failed; whether there was one."""
        unfinished = [line for line in read_part(self.part) if line["state"] == "started"]
        for line in unfinished:
            append(self.part, {"unit": line["unit"], "state": "failed", "detail": reason})
        return bool(unfinished)


def append(part: Path, line: dict) -> None:
    with open(part, "a") as file:
        file.write(json.dumps(line) + "\n")


def read_part(part: Path) -> list[dict]:
    """The last line of each unit, in the order of their first."""
    units: dict[str, dict] = {}
    text = part.read_text() if part.is_file() else ""
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:  # half a line of a process that was killed
            continue
        units[found["unit"]] = found
    return list(units.values())


def run_section(
    section: Section,
    seconds: float,
    parts: Path,
    command: Callable[[Section, Path, int, int], list[str]],
    workers: int,
) -> list[dict]:
    """The section's rows: one per unit, one about the section itself, and the benchmarks'."""
    began = time.monotonic()
    running = [
        Worker(command(section, part, index, workers), part, section, began + seconds)
        for index in range(workers)
        for part in [parts / f"{section.name}-{index}.jsonl"]
    ]
    try:
        while not all(worker.done for worker in running):
            for worker in running:
                if not worker.done:
                    worker.poll()
            time.sleep(POLL)
    finally:
        for worker in running:
            worker.stop()
    rows = []
    states: dict[str, int] = {}
    for line in (line for worker in running for line in read_part(worker.part)):
        state = "failed" if line["state"] == "started" else line["state"]
        states[state] = states.get(state, 0) + 1
        rows.append(
            check_row(section, line["unit"], state, line.get("seconds"), line.get("detail"))
        )
        rows += line.get("rows") or []
    trouble = "; ".join(dict.fromkeys(worker.trouble for worker in running if worker.trouble))
    state = "passed" if states.get("passed") else "skipped"
    if states.get("failed") or trouble or not states:
        state = "failed"
    summary = check_row(section, None, state, time.monotonic() - began, trouble or None)
    return [summary | {"states": states, "title": section.title}, *rows]


def check_row(section: Section, unit: str | None, state: str, seconds, detail) -> dict:
    return {
        "schema": report.SCHEMA,
        "kind": "check",
        "section": section.name,
        "unit": unit,
        "state": state,
        "seconds": None if seconds is None else round(seconds, 2),
        "detail": detail,
    }


def run_sections(
    sections: list[Section],
    out: Path,
    minutes: float,
    command: Callable[[Section, Path, int, int], list[str]],
    most_workers: int,
    words: str,
) -> list[dict]:
    """Runs them within ``minutes`` altogether; writes the results after each."""
    out.mkdir(parents=True, exist_ok=True)
    parts = out / "parts"
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir()
    deadline = time.monotonic() + 60 * minutes
    rows: list[dict] = []
    for section in sections:
        seconds = min(section.seconds, deadline - time.monotonic())
        if seconds <= 1:
            rows.append(
                check_row(section, None, "skipped", 0, "no time was left")
                | {"states": {}, "title": section.title}
            )
        else:
            rows += run_section(
                section, seconds, parts, command, min(section.workers, most_workers)
            )
        say_section([row for row in rows if row.get("section") == section.name])
        report.write_rows(out / "gpu-check.jsonl", rows)
        (out / "REPORT.md").write_text(gpu_report.markdown(rows, words))
    shutil.rmtree(parts)
    return rows


def say_section(rows: list[dict]) -> None:
    """The section's line, and one for every unit that failed."""
    summary, *units = rows
    counts = ", ".join(f"{count} {state}" for state, count in summary["states"].items())
    print(f"{summary['state']:<8}{summary['title']}: {counts}, {summary['seconds']} s", flush=True)
    if summary["detail"]:
        print(f"        {summary['detail'][:1000]}", flush=True)
    for row in units:
        if row["state"] == "failed":
            print(f"        FAILED {row['unit']}: {(row['detail'] or '')[:600]}", flush=True)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [section.name for section in SECTIONS]
    add = parser.add_argument
    add("--out", type=Path, default=Path("gpu-report"), help="folder (%(default)s)")
    add("--minutes", type=float, default=7.8, help="for everything (%(default)s)")
    add("--only", help=f"comma-separated, of: {', '.join(names)}")
    add("--dry-run", action="store_true", help="the same on a CPU, over composed, at tiny sizes")
    args = parser.parse_args(argv)
    chosen = args.only.split(",") if args.only else names
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"--only: expected names of {', '.join(names)}; got {', '.join(unknown)}")
    if not args.dry_run and not sees_cuda():
        print("gpu-check: torch sees no CUDA device here; --dry-run shows what would run")
        return 2
    # A polite kill still ends the workers; what they had finished stays under parts/.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = ["--dry-run"] if args.dry_run else []
    most_workers = 1 if args.dry_run else max(1, min(12, (os.cpu_count() or 2) - 2))
    rows = run_sections(
        [section for section in SECTIONS if section.name in chosen],
        args.out,
        args.minutes,
        lambda *where: command_of(*where, options),
        most_workers,
        shlex.join(["make", "gpu-check"] if not argv else ["gpu_check.py", *_without_out(argv)]),
    )
    print(f"\n{args.out / 'REPORT.md'}\n{args.out / 'gpu-check.jsonl'}")
    return int(any(row["kind"] == "check" and row["state"] == "failed" for row in rows))


def _without_out(argv: list[str]) -> list[str]:
    """Where the output went says nothing about the measurement."""
    at = argv.index("--out") if "--out" in argv else None
    kept = argv if at is None else argv[:at] + argv[at + 2 :]
    return [word for word in kept if not word.startswith("--out=")]


def sees_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
