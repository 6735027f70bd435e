"""`make gpu-check`: what a GPU must show, within minutes: first that it is right, then how fast.

    python tests/gpu/run.py [--out gpu-report] [--minutes 7.8] [--only NAMES] [--dry-run]

Nothing is installed. pytest is needed; pytest-xdist and pytest-timeout isolate what goes wrong.

    checks.jsonl   a line for each check (tests/gpu/gpu_report.py), written as it ends
    bench.jsonl    rows of the benchmarks (python -m benchmarks gpu)

Exits with 1 where a check failed or was not reached, with 2 where there is no CUDA device.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from gpu_report import SECTIONS, section_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BENCHMARKS = "benchmarks"
NAMES = [*(section.name for section in SECTIONS), BENCHMARKS]
# Of the minutes, beside the sections' seconds.
BENCHMARK_SECONDS = 155
MOST_WORKERS = 12
LONGEST = 30  # seconds that a check or a case, begun in time, may have after it
ISOLATING = {
    "xdist": "pytest-xdist is not installed: the checks run in one process, and end with it",
    "pytest_timeout": "pytest-timeout is not installed: of a check that hangs no trace is shown",
}


def main(argv: list[str] | None = None, folder: Path = HERE) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("gpu-report"), help="folder (%(default)s)")
    add("--minutes", type=float, default=7.8, help="for everything (%(default)s)")
    add("--only", help=f"comma-separated, of: {', '.join(NAMES)}")
    add("--dry-run", action="store_true", help="the same on a CPU, over composed, at tiny sizes")
    args = parser.parse_args(argv)
    chosen = args.only.split(",") if args.only else NAMES
    if unknown := [name for name in chosen if name not in NAMES]:
        parser.error(f"--only: expected names of {', '.join(NAMES)}; got {', '.join(unknown)}")
    if importlib.util.find_spec("pytest") is None:
        print("gpu-check: pytest is not installed here; the checks are its tests")
        return 2
    if not args.dry_run and not sees_cuda():
        print("gpu-check: torch sees no CUDA device here; --dry-run shows what would run")
        return 2
    for module, sentence in ISOLATING.items():
        if importlib.util.find_spec(module) is None:
            print(f"gpu-check: {sentence}")
    report = args.out.resolve() / "checks.jsonl"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    share = 60 * args.minutes / (sum(each.seconds for each in SECTIONS) + BENCHMARK_SECONDS)
    troubles = []
    # The machine's own first: what is built there, later processes find. A dry run does not build.
    for sections in (SECTIONS[1:],) if args.dry_run else (SECTIONS[:1], SECTIONS[1:]):
        names = [section.name for section in sections if section.name in chosen]
        seconds = share * sum(section.seconds for section in sections if section.name in names)
        if not names:
            continue
        command = pytest_command(folder, names, report, seconds, args.dry_run)
        status = run(command, min(seconds + LONGEST, deadline - time.monotonic()))
        if status not in (0, 1):  # 1: the report has what failed
            troubles.append(f"the checks of {', '.join(names)} ended {with_status(status)}")
    if BENCHMARKS in chosen:
        seconds = deadline - time.monotonic()
        command = [sys.executable, "-m", "benchmarks", "gpu", *["--dry-run"] * args.dry_run]
        command += [f"--out={report.with_name('bench.jsonl')}", f"--seconds={seconds - LONGEST}"]
        if (status := run(command, seconds)) != 0:  # None: ended, its time was over
            troubles.append(f"the benchmarks ended {with_status(status)}")
    lines, good = summary(report)
    print("\n".join(["", *lines, *troubles, f"{args.out}/checks.jsonl, {args.out}/bench.jsonl"]))
    return 0 if good and not troubles else 1


def pytest_command(
    folder: Path, names: list[str], report: Path, seconds: float, dry_run: bool
) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-p", "gpu_report", f"--gpu-report={report}", f"--gpu-seconds={seconds:.1f}"]
    command += ["-m", "not cuda" if dry_run else "cuda"]
    if names == ["machine"]:  # measures and builds, alone
        return [*command, str(folder / "test_machine.py")]
    if importlib.util.find_spec("xdist") is not None:
        workers = 1 if dry_run else max(1, min(MOST_WORKERS, (os.cpu_count() or 2) - 2))
        # One after another, so that their order is kept; every process that dies is replaced.
        command += [f"-n{workers}", "--maxschedchunk=1", "--max-worker-restart=1000"]
    return [*command, f"--gpu-sections={','.join(names)}", str(folder)]


def run(command: list[str], seconds: float) -> int | None:
    """The command's exit status; it is ended with all that it started."""
    paths = [str(ROOT), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        return process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def with_status(status: int | None) -> str:
    return "when their time was over" if status is None else f"with {status}"


def summary(report: Path) -> tuple[list[str], bool]:
    """Counts per section and the names of what failed; whether all checks were done and right."""
    checks, collected = [], {}
    for text in report.read_text().splitlines() if report.is_file() else []:
        with suppress(ValueError):  # half a line of a process that was killed
            line = json.loads(text)
            if line["kind"] == "check":
                checks.append(line)
            elif line["kind"] == "collected":
                collected |= line["checks"]
    lines, good = [], bool(checks)
    for section in dict.fromkeys([*SECTIONS, *(section_of(line["nodeid"]) for line in checks)]):
        mine = [line for line in checks if line["section"] == section.name]
        missing = collected.get(section.name, 0) - len(mine)
        states = [line["state"] for line in mine]
        counts = {state: states.count(state) for state in dict.fromkeys(sorted(states))}
        if missing > 0:  # a file that cannot be imported has a line and was not collected
            counts["not run"] = missing
        if not counts:
            continue
        done = not {"failed", "out of time", "not run"} & counts.keys()
        good = good and done
        verdict = "failed" if not done else "passed" if "passed" in counts else "skipped"
        numbers = ", ".join(f"{count} {state}" for state, count in counts.items())
        lines.append(f"{verdict:<8}{section.title}: {numbers}")
        lines += [
            f"        FAILED {line['nodeid']}: {in_a_line(line['reason'])}"
            for line in mine
            if line["state"] == "failed"
        ]
    return lines or ["no check was run"], good


def in_a_line(reason: str) -> str:
    """The message of an exception, as pytest marks it, or the last line of anything else."""
    lines = reason.splitlines() or [""]
    return next((line[1:].strip() for line in lines if line.startswith("E ")), lines[-1])


def sees_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    # A polite kill still ends what was started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
