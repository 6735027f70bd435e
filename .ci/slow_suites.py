"""Runs the suites that take longer than a change can wait for, and records what they gave.

    python .ci/slow_suites.py [SUITE...]      all of them if none is named

Each is a target of the Makefile, and gives a row of benchmarks/results/slow_suites.jsonl.
"""

import json
import platform
import re
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "slow_suites.jsonl"
# The environment that a target makes, where it is not the first one.
SUITES = {
    "peft-suite": ".venv-peft-suite",
    "newest": ".venv-newest",
    "oldest": ".venv-oldest",
    "test-stress": ".venv",
    "triton-matrix": ".venv",
    "sanitize": ".venv",
}
PACKAGES = ("torch", "triton", "transformers", "peft", "numpy")
VERSIONS = f"""
import json, platform
from importlib.metadata import PackageNotFoundError, version
found = {{"python": platform.python_version()}}
for name in {PACKAGES}:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""

COUNT = r"\d+ (?:passed|failed|skipped|errors?|deselected|xfailed|xpassed|warnings?|rerun)"
LAST_LINE = re.compile(rf"^=*\s*({COUNT}(?:, {COUNT})*) in [\d.]+s\b", re.M)


def counts(said: str) -> dict[str, int]:
    """Of the last lines of every pytest in an output, together; errors are failures."""
    found = Counter()
    for line in LAST_LINE.findall(said):
        for number, what in re.findall(r"(\d+) (\w+)", line):
            found["failed" if what.startswith("error") else what] += int(number)
    return {what: found[what] for what in ("passed", "failed", "skipped")}


def processor() -> str:
    try:
        listed = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = re.findall(r"^model name\s*: (.+)$", listed, re.M)
    threads = len(re.findall(r"^processor\s*:", listed, re.M))
    return f"{names[0] if names else platform.machine()}, {threads} threads"


def output_of(*command: str) -> str:
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def run(suite: str) -> dict:
    """What ran, where, and what it gave. ``exit`` is make's: it may fail without a failed test."""
    began, said = time.monotonic(), []
    with subprocess.Popen(
        ["make", suite], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        for line in running.stdout:
            print(line, end="", flush=True)
            said.append(line)
    python = ROOT / SUITES[suite] / "bin" / "python"
    return {
        "suite": suite,
        "commit": output_of("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "cpu": processor(),
        "versions": json.loads(output_of(str(python), "-c", VERSIONS)) if python.exists() else {},
        **counts("".join(said)),
        "exit": running.returncode,
        "seconds": round(time.monotonic() - began),
    }


def main() -> None:
    asked = sys.argv[1:] or list(SUITES)
    if unknown := [suite for suite in asked if suite not in SUITES]:
        sys.exit(f"expected suites out of {', '.join(SUITES)}, got {', '.join(unknown)}\n{__doc__}")
    rows = []
    for suite in asked:
        rows.append(run(suite))
        with RESULTS.open("a") as results:
            results.write(json.dumps(rows[-1]) + "\n")
    for row in rows:
        print("{suite}: {passed} passed, {failed} failed, {skipped} skipped, exit {exit}, "
              "{seconds} s".format(**row))  # fmt: skip
    sys.exit(any(row["exit"] for row in rows))


if __name__ == "__main__":
    main()
