"""Measures what a GPU should show, in order of worth, until the time is over.

    python -m benchmarks gpu --out FILE [--seconds N] [--only core,decode,...] [--dry-run]

Rows are written when their case is measured, and cases that are in the file are skipped: the same
command goes on where it stopped. Cases run in a child process. One that hangs or breaks the CUDA
context costs itself: it is recorded, and another child goes on behind it. A provider whose result
breaks the error policy is not timed. --dry-run does all that at tiny sizes on a CPU.
"""

import argparse
import faulthandler
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import provenance, report
from benchmarks.cells import Cell, sections
from benchmarks.driver import environment, measure_case, say

# How a child ends that wants a fresh process: its case is recorded, its CUDA context is broken.
AGAIN = 75
SHRINK = 64  # of a dry run; it takes the first two cases of each section


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="result file, JSON lines")
    add("--seconds", type=float, default=240, help="start no case after these (%(default)s)")
    add("--case-seconds", type=float, default=40, help="for one case (%(default)s)")
    add("--only", help=f"comma-separated, of: {', '.join(sections('cpu'))}")
    add("--reps", type=int, default=9, help="interleaved repetitions (%(default)s)")
    add("--dry-run", action="store_true", help="at tiny sizes on a CPU")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    known = list(sections("cpu"))
    chosen = args.only.split(",") if args.only else known
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"--only: expected names of {', '.join(known)}; got {', '.join(unknown)}")
    if not args.dry_run and not torch.cuda.is_available():
        say("benchmarks gpu: torch sees no CUDA device here; --dry-run shows what would run")
        return 2
    cells = cells_of(chosen, args.dry_run)
    command = command_of(args)
    if args.child:
        return measure(cells, args, command)
    return run(cells, args, argv, command)


def cells_of(chosen: list[str], dry_run: bool) -> list[Cell]:
    if not dry_run:
        found = sections()
        return [cell for name in chosen for cell in found[name]]
    found = sections("cpu", SHRINK)
    return [cell for name in chosen for cell in found[name][:2]]


def command_of(args: argparse.Namespace) -> str:
    options = ["--dry-run"] * args.dry_run + [f"--only={args.only}"] * bool(args.only)
    return shlex.join(["python", "-m", "benchmarks", "gpu", *options])


def rows_in(out: Path) -> list[dict]:
    return report.read_rows(out) if out.is_file() else []


def left_of(cells: list[Cell], out: Path) -> list[Cell]:
    known = {(row["kind"], report.key_of(row["case"])) for row in rows_in(out)}
    return [c for c in cells if (c.kind, report.key_of(asdict(c.case))) not in known]


# ---- the parent


def run(cells: list[Cell], args: argparse.Namespace, argv: list[str], command: str) -> int:
    """Children, one behind the other, until nothing is left or the time is over."""
    deadline, lost = time.monotonic() + args.seconds, []
    todo = left_of(cells, args.out)
    say(f"{len(cells)} cases, {len(cells) - len(todo)} of them in {args.out} already")
    while todo and (seconds := deadline - time.monotonic()) > 0:
        words = [sys.executable, "-m", "benchmarks", "gpu", *argv, "--child"]
        words += [f"--seconds={seconds}"]
        limit = seconds + 1.5 * args.case_seconds
        try:
            code = subprocess.run(words, env=environment(), timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = f"nothing within {limit:.0f} s"
        todo = left_of(cells, args.out)
        if code == 0:
            break
        if code != AGAIN and todo:
            lost.append(todo[0])
            record(todo[0], args.out, command, f"its process ended with {code}")
            todo = todo[1:]
    wrong = [f"{row['provider']}: {row['title']}" for row in rows_in(args.out) if is_wrong(row)]
    for line in (*(f"{cell.case.title}: lost" for cell in lost), *(f"wrong: {w}" for w in wrong)):
        say(line)
    say(f"{len(todo)} cases left; the same command goes on with them" if todo else "all measured")
    return int(bool(lost or wrong))


def record(cell: Cell, out: Path, command: str, reason: str) -> None:
    """A row for each provider that says why there is no time."""
    meta = provenance.meta(torch.device(cell.case.device), command)
    skipped = dict.fromkeys(cell.names, reason)
    rows = report.rows_of(cell.kind, cell.case, meta, {}, skipped, {})
    report.write_rows(out, [*rows_in(out), *rows])


def is_wrong(row: dict) -> bool:
    return bool(row["skipped"]) and "its result is wrong" in row["skipped"]


# ---- a child


def measure(cells: list[Cell], args: argparse.Namespace, command: str) -> int:
    """0 where the cases or the time are over."""
    if args.dry_run:
        torch.set_num_threads(1)  # tiny sizes, and maybe neighbours
    deadline, todo = time.monotonic() + args.seconds, left_of(cells, args.out)
    for index, cell in enumerate(todo):
        if time.monotonic() > deadline:
            return 0
        say(f"[{index + 1}/{len(todo)}] {cell.case.title}")
        # A C thread: it also ends a process that hangs inside a CUDA call.
        faulthandler.dump_traceback_later(args.case_seconds, exit=True)
        meta = provenance.meta(torch.device(cell.case.device), command)
        on_cuda = cell.case.device == "cuda"
        reps = 2 if args.dry_run else args.reps
        try:
            rows = measure_case(cell.kind, cell.case, list(cell.names), meta, reps, on_cuda)
        except Exception as error:  # the oracle's memory, say: this case's trouble
            record(cell, args.out, command, f"{type(error).__name__}: {error}")
        else:
            report.write_rows(args.out, [*rows_in(args.out), *rows])
            report.print_case(rows)
        faulthandler.cancel_dump_traceback_later()
        if not context_works():
            return AGAIN
    return 0


def context_works() -> bool:
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
