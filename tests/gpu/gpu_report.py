"""A pytest plug-in for checks that may hang or break their process: ``--gpu-report FILE``.

FILE gets a line of JSON for each check as it ends, so that a run that is killed keeps what it had.
pytest-xdist runs the checks in processes of their own and replaces one that dies, pytest-timeout
ends one that hangs; here is what they do not do:

* a section of checks has its time (``--gpu-seconds`` for all of them), and what it does not get to
  is said to be out of time;
* a process whose CUDA context is broken ends itself, and the next checks get a fresh one;
* a check that hangs while it holds the interpreter's lock is ended as well.

Without ``--gpu-report`` nothing of this happens.
"""

import faulthandler
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Section:
    name: str
    title: str
    seconds: float  # for all of it
    check_seconds: float  # for one check, a hanging one say


# In order of worth, but for the first, whose extension the rest asks for.
SECTIONS = (
    Section("machine", "The machine, the extension built, and the self-test", 100, 58),
    Section("linear", "Every Triton kernel, dtype and shape", 85, 60),
    Section("routed", "Many adapters in one batch", 30, 30),
    Section("native", "CUDA kernels", 35, 30),
    Section("shapes", "The sizes that models have", 20, 19),
    Section("long", "Graphs, streams, threads, offsets", 15, 14),
    Section("profiler", "Launches that were counted, against the profiler", 10, 10),
    Section("sanitizer", "compute-sanitizer", 30, 28),
)
# Within a section. A GPU's targets by name; others have none.
WORTH = ("composed", "fused", "hybrid", "native")
OUT_OF_TIME = "the time was over"
GRACE = 2.0  # seconds that pytest-timeout has before the process is ended without it
LINES = 6  # of an error


def target_of(nodeid: str) -> str | None:
    found = re.search(rf"\[({'|'.join(WORTH)})\b", nodeid)
    return found and found[1]


def section_of(nodeid: str) -> Section:
    """By the file's name; the CUDA kernels have one of their own wherever they are checked."""
    name = Path(nodeid.split("::")[0]).stem.removeprefix("test_")
    if name in ("linear", "routed") and target_of(nodeid) == "native":
        name = "native"
    found = [section for section in SECTIONS if section.name == name]
    return found[0] if found else Section(name, name, 30, 30)


def pytest_addoption(parser):
    group = parser.getgroup("gpu")
    group.addoption("--gpu-report", metavar="FILE", help="a line of JSON for each check is added")
    group.addoption("--gpu-seconds", type=float, help="for all checks together")
    group.addoption("--gpu-sections", help="comma-separated; without it, all")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    # The option is not known where this is loaded after the command line, as in `pytest tests`.
    if not config.getoption("gpu_report", None):
        return
    began = time.monotonic()  # the same clock in all processes
    if hasattr(config, "workerinput"):
        began = config.workerinput["gpu_began"]
    else:
        config.pluginmanager.register(Report(config, began), "gpu_report_lines")
    if not config.getoption("numprocesses", None):
        config.pluginmanager.register(Checks(config, began), "gpu_checks")


class Report:
    """Writes the lines: where all processes report to, and nowhere else."""

    def __init__(self, config, began: float) -> None:
        self.path, self.began = Path(config.getoption("gpu_report")), began
        self.started: dict[str, float] = {}
        self.failed: dict[str, str] = {}  # checks that have not ended, and why they failed
        self.ended: set[str] = set()
        self.counted = False

    def write(self, **line) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_sessionstart(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        self.write(kind="session", time=now, **machine())

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node):
        node.workerinput["gpu_began"] = self.began

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids):
        self.count(ids)

    def pytest_collection_finish(self, session):
        self.count([item.nodeid for item in session.items])

    def count(self, ids: list[str]) -> None:
        if ids and not self.counted:
            self.counted = True
            counts: dict[str, int] = {}
            for nodeid in ids:
                name = section_of(nodeid).name
                counts[name] = counts.get(name, 0) + 1
            self.write(kind="collected", checks=counts)

    def pytest_collectreport(self, report):
        if report.failed:
            self.end(report, "failed", last_lines(report.longreprtext))

    def pytest_runtest_logstart(self, nodeid):
        self.started[nodeid] = time.monotonic()

    def pytest_runtest_logreport(self, report):
        nodeid = report.nodeid
        if nodeid in self.ended:
            return
        if report.failed:
            self.failed.setdefault(nodeid, last_lines(report.longreprtext))
        if report.skipped:
            reason = report.longrepr[2].removeprefix("Skipped: ")
            self.end(report, "out of time" if reason == OUT_OF_TIME else "skipped", reason)
        elif report.when == "teardown" or report.when == "???":  # xdist's, of a process that died
            reason = self.failed.pop(nodeid, None)
            self.end(report, "passed" if reason is None else "failed", reason)

    def end(self, report, state: str, reason: str | None) -> None:
        self.ended.add(report.nodeid)
        seconds = time.monotonic() - self.started.get(report.nodeid, time.monotonic())
        found = dict(getattr(report, "user_properties", ()))
        self.write(
            kind="check",
            nodeid=report.nodeid,
            section=section_of(report.nodeid).name,
            state=state,
            seconds=round(seconds, 2),
            reason=reason,
            **({"found": found} if found else {}),
        )

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem, report):
        if crashitem in self.ended:  # it had failed, and its process ended itself
            report.outcome, report.when = "passed", "setup"
            return
        took = time.monotonic() - self.started.get(crashitem, time.monotonic())
        limit = section_of(crashitem).check_seconds
        report.longrepr = f"its process died after {took:.1f} s (a check has {limit:g} s)"


class Checks:
    """Around every check, in the process that runs it."""

    def __init__(self, config, began: float) -> None:
        self.config, self.began = config, began
        self.deadlines: dict[str, float] = {}
        self.failed = False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        if chosen := self.config.getoption("gpu_sections"):
            kept = [i for i in items if section_of(i.nodeid).name in chosen.split(",")]
            self.config.hook.pytest_deselected(items=[i for i in items if i not in kept])
            items[:] = kept
        items.sort(key=lambda item: worth(item.nodeid))
        sections = dict.fromkeys(section_of(item.nodeid) for item in items)
        seconds = sum(section.seconds for section in sections)
        share = (self.config.getoption("gpu_seconds") or seconds) / max(seconds, 1)
        until = self.began
        for section in sections:
            until += share * section.seconds
            self.deadlines[section.name] = until
        if self.config.pluginmanager.hasplugin("timeout"):
            for item in items:
                if item.get_closest_marker("timeout") is None:
                    item.add_marker(pytest.mark.timeout(seconds_of(item), method="thread"))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        if time.monotonic() > self.deadlines[section_of(item.nodeid).name]:
            pytest.skip(OUT_OF_TIME)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        self.failed = self.failed or report.failed
        return report

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item):
        self.failed = False
        # A C thread, which needs no lock.
        faulthandler.dump_traceback_later(seconds_of(item) + GRACE, exit=True, file=sys.__stderr__)
        try:
            result = yield
        finally:
            faulthandler.cancel_dump_traceback_later()
        if self.failed and context_is_broken():
            if hasattr(self.config, "workerinput"):
                os._exit(1)  # xdist starts another
            item.session.shouldfail = "the CUDA context is broken, and nothing replaces the process"
        return result


def worth(nodeid: str) -> tuple[int, int]:
    section, target = section_of(nodeid), target_of(nodeid)
    return (
        SECTIONS.index(section) if section in SECTIONS else len(SECTIONS),
        WORTH.index(target) if target else 0,
    )


def seconds_of(item) -> float:
    marker = item.get_closest_marker("timeout")
    return marker.args[0] if marker and marker.args else section_of(item.nodeid).check_seconds


def context_is_broken() -> bool:
    """Some errors stay: every call that follows has them too."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-LINES:])


def machine() -> dict:
    """Where the checks ran. torch is not imported: it would make a context here as well."""
    card = said("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    device, _, driver = (card or platform.processor() or platform.machine()).partition(", ")
    return {
        "device": device,
        "driver": driver or None,
        "torch": installed("torch"),
        "triton": installed("triton"),
        "commit": said("git", "describe", "--always", "--dirty"),
    }


def said(*command: str) -> str | None:
    """The first line of what a command says."""
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.strip().splitlines() or [None])[0]


def installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
