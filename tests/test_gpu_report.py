"""What `make gpu-check` promises of checks that hang, crash and fail; planted ones play them."""

import json
import os
import subprocess
import sys
import textwrap
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
GPU = ROOT / "tests" / "gpu"
sys.path.insert(0, str(GPU))

import run  # noqa: E402
from gpu_report import SECTIONS, Checks, section_of, worth  # noqa: E402

isolated = pytest.mark.skipif(
    find_spec("xdist") is None or find_spec("pytest_timeout") is None,
    reason="pytest-xdist or pytest-timeout is not installed",
)
PREAMBLE = """
import ctypes, os, subprocess, sys, time, types, pytest

@pytest.fixture(autouse=True)
def process(record_property):
    record_property("pid", os.getpid())
"""
# run.main as a script would call it, with a folder of other checks.
PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); {}; import pathlib, run; " + (
    "sys.exit(run.main(sys.argv[3:], pathlib.Path(sys.argv[2])))"
)


@pytest.fixture
def play(tmp_path):
    """``play(linear="def test_...")`` runs these checks; the rows by the checks' names."""

    def played(before: str = "pass", only: str = "", **checks: str) -> SimpleNamespace:
        folder = tmp_path / "checks"
        folder.mkdir()
        for section, source in checks.items():
            (folder / f"test_{section}.py").write_text(PREAMBLE + textwrap.dedent(source))
        words = [str(GPU), str(folder), f"--out={tmp_path / 'out'}", "--dry-run"]
        words.append(f"--only={only or ','.join(checks)}")  # no benchmarks
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(before), *words],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        lines = [json.loads(line) for line in (tmp_path / "out" / "checks.jsonl").open()]
        rows = {line["nodeid"].split("::")[-1]: line for line in lines if line["kind"] == "check"}
        assert len(rows) == sum(line["kind"] == "check" for line in lines), "one line per check"
        return SimpleNamespace(
            rows=rows,
            states={name: row["state"] for name, row in rows.items()},
            pids={name: row["found"]["pid"] for name, row in rows.items() if "found" in row},
            lines=lines,
            status=done.returncode,
            output=done.stdout + done.stderr,
        )

    return played


def test_a_failure_is_named_and_counts(play):
    found = play(
        linear="""
        def test_one():
            pass
        def test_two():
            assert 2 == 3, "dx is off"
        def test_three():
            pytest.skip("not here")
        """,
        routed="def test_four(): pass",
    )
    assert found.status == 1
    assert found.states == dict(
        test_one="passed", test_two="failed", test_three="skipped", test_four="passed"
    )
    assert "dx is off" in found.rows["test_two"]["reason"]
    assert found.rows["test_three"]["reason"] == "not here"
    assert (
        found.rows["test_four"]["section"] == "routed" and found.rows["test_four"]["seconds"] >= 0
    )
    assert "1 failed, 1 passed, 1 skipped" in found.output
    assert "        FAILED test_linear.py::test_two: AssertionError: dx is off\n" in found.output
    assert "passed  Many adapters in one batch: 1 passed" in found.output
    session = found.lines[0]
    assert session["torch"] == torch.__version__
    assert session.keys() >= {"device", "driver", "triton", "commit", "time"}


def test_all_good_is_exit_status_zero(play):
    found = play(linear="def test_one(): pass")
    assert found.status == 0 and found.states == {"test_one": "passed"}


def test_nothing_that_ran_is_no_success(play):
    found = play(only="long", linear="def test_one(): pass")
    assert found.status == 1 and not found.rows and "no check was run" in found.output


def test_checks_that_cannot_be_imported_are_no_success(play):
    found = play(linear="def test_one(): pass", routed="import no_such_module")
    assert found.states == {"test_one": "passed", "test_routed.py": "failed"}
    assert found.status == 1 and "no_such_module" in found.rows["test_routed.py"]["reason"]


def test_an_error_in_the_teardown_is_a_failure(play):
    found = play(
        linear="""
        @pytest.fixture
        def target():
            yield
            raise RuntimeError("CUDA error: illegal memory access")
        def test_one(target):
            pass
        """
    )
    assert found.states == {"test_one": "failed"} and found.status == 1
    assert "illegal memory access" in found.rows["test_one"]["reason"]


HANGING = """
def test_one():
    pass
@pytest.mark.timeout(1, method="thread")
def test_two():
    {}
def test_three():
    pass
"""


@isolated
def test_a_check_that_hangs_is_ended_with_all_it_started(play, tmp_path):
    child = tmp_path / "child"
    began = time.monotonic()
    hang = (
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        f"open({str(child)!r}, 'w').write(str(child.pid)); time.sleep(60)"
    )
    found = play(linear=HANGING.format(hang))
    assert time.monotonic() - began < 45
    assert found.states == dict(test_one="passed", test_two="failed", test_three="passed")
    assert "its process died after" in found.rows["test_two"]["reason"]
    assert found.pids["test_one"] != found.pids["test_three"]
    assert found.status == 1 and "test_linear.py::test_two" in found.output
    time.sleep(0.2)
    stat = Path(f"/proc/{child.read_text()}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z", "it outlived the check"


@isolated
def test_a_check_that_hangs_with_the_lock_is_ended(play):
    found = play(linear=HANGING.format("ctypes.PyDLL(None).sleep(60)"))
    assert found.states == dict(test_one="passed", test_two="failed", test_three="passed")
    assert found.rows["test_two"]["seconds"] < 40


@isolated
def test_a_crash_costs_one_check(play):
    found = play(linear=HANGING.format("os.kill(os.getpid(), 11)"))
    assert found.states == dict(test_one="passed", test_two="failed", test_three="passed")
    assert "its process died" in found.rows["test_two"]["reason"] and found.status == 1


# What follows in a process whose CUDA context is broken fails as well.
STICKY = """
def broken():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_one():
    assert "torch" not in sys.modules
def test_two():
    cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=broken)
    sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
    broken()
def test_three():
    assert "torch" not in sys.modules
"""


@isolated
def test_a_broken_context_gets_a_fresh_process(play):
    found = play(linear=STICKY)
    assert found.states == dict(test_one="passed", test_two="failed", test_three="passed")
    assert "illegal memory access" in found.rows["test_two"]["reason"]
    assert found.pids["test_two"] == found.pids["test_one"] != found.pids["test_three"]
    assert "1 failed, 2 passed in" in found.output, "pytest counts it once"


def test_a_broken_context_ends_a_run_in_one_process(play):
    found = play(before="sys.modules['xdist'] = None", linear=STICKY)
    assert "pytest-xdist is not installed" in found.output
    assert found.states == dict(test_one="passed", test_two="failed")
    assert "1 not run" in found.output and found.status == 1


@isolated
def test_a_failure_keeps_its_process_where_the_context_works(play):
    found = play(linear=HANGING.format("assert False"))
    assert len(set(found.pids.values())) == 1


def test_lines_are_on_disk_as_checks_end(play, tmp_path):
    report = tmp_path / "out" / "checks.jsonl"
    found = play(
        linear=f"""
        def test_one():
            pass
        def test_two():
            until = time.monotonic() + 20
            while "test_one" not in open({str(report)!r}).read():
                assert time.monotonic() < until
                time.sleep(0.1)
        """
    )
    assert found.states == dict(test_one="passed", test_two="passed")


@isolated
def test_a_run_that_is_killed_keeps_what_it_had(play):
    found = play(linear=HANGING.format("os.kill(os.getppid(), 9); time.sleep(60)"))
    assert found.states == {"test_one": "passed"} and found.status == 1
    assert "2 not run" in found.output and "ended with -9" in found.output


def test_what_a_section_does_not_get_to_is_out_of_time(tmp_path):
    (tmp_path / "test_linear.py").write_text("def test_one(): pass")
    report = tmp_path / "checks.jsonl"
    command = [sys.executable, "-m", "pytest", "-p", "gpu_report", "--gpu-seconds=0.001"]
    subprocess.run(
        [*command, f"--gpu-report={report}", str(tmp_path)],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(GPU)}, capture_output=True,
    )  # fmt: skip
    row = json.loads(report.read_text().splitlines()[-1])
    assert (row["nodeid"], row["state"]) == ("test_linear.py::test_one", "out of time")
    lines, good = run.summary(report)
    assert not good and lines == ["failed  Every Triton kernel, dtype and shape: 1 out of time"]


class Item:
    def __init__(self, nodeid: str, own: float | None = None) -> None:
        self.nodeid, self.marks = nodeid, []
        self.own = own and pytest.mark.timeout(own).mark

    def get_closest_marker(self, name: str):
        return self.own

    def add_marker(self, mark) -> None:
        self.marks.append((*mark.args, mark.kwargs))


def test_sections_have_their_own_time():
    """What one does not use, the next ones have; what one does not get to, they still do."""
    config = SimpleNamespace(
        getoption={"gpu_seconds": 57.5, "gpu_sections": "linear,sanitizer"}.get,
        pluginmanager=SimpleNamespace(hasplugin=lambda name: True),
        hook=SimpleNamespace(pytest_deselected=lambda items: None),
    )
    names = ("routed", "sanitizer", "linear")
    items = [Item(f"test_{name}.py::test_{own}", own) for name in names for own in (None, 5)]
    checks = Checks(config, began=100.0)
    checks.pytest_collection_modifyitems(items)
    assert [section_of(item.nodeid).name for item in items] == ["linear"] * 2 + ["sanitizer"] * 2
    assert checks.deadlines == {"linear": 142.5, "sanitizer": 157.5}
    # The time of one check; pytest-timeout's other method ends a check and not its process.
    thread = {"method": "thread"}
    assert [item.marks for item in items] == [[(60, thread)], [], [(28, thread)], []]


def test_order_of_worth():
    ids = [
        "tests/gpu/test_sanitizer.py::test_a[memcheck-native]",
        "tests/gpu/test_linear.py::test_a[native-bfloat16]",
        "tests/gpu/test_linear.py::test_a[hybrid-bfloat16]",
        "tests/gpu/test_routed.py::test_a[composed]",
        "tests/gpu/test_native.py::test_b[native-odd]",
        "tests/gpu/test_linear.py::test_a[fused-bfloat16]",
        "tests/gpu/test_linear.py::test_a[composed-fused]",
    ]
    order = [ids[i] for i in (6, 5, 2, 3, 1, 4, 0)]
    assert sorted(ids, key=worth) == order
    assert [section_of(each).name for each in order] == [
        "linear", "linear", "linear", "routed", "native", "native", "sanitizer",
    ]  # fmt: skip


def test_every_file_of_checks_is_a_section():
    files = {path.stem.removeprefix("test_") for path in GPU.glob("test_*.py")}
    assert files == {section.name for section in SECTIONS}


def test_all_sections_fit_into_the_time():
    assert sum(section.seconds for section in SECTIONS) + run.BENCHMARK_SECONDS <= 480
    assert all(section.check_seconds <= section.seconds for section in SECTIONS)


@pytest.mark.parametrize(("bench", "status"), [(0, 0), (1, 1), (None, 1)])
def test_on_a_gpu_checks_come_first_and_benchmarks_count(
    bench, status, tmp_path, monkeypatch, capsys
):
    commands = []

    def pretended(command: list[str], seconds: float) -> int | None:
        commands.append((command, seconds))
        if "benchmarks" in command:
            return bench
        line = {"kind": "check", "nodeid": "test_linear.py::test_one", "section": "linear"}
        with (tmp_path / "checks.jsonl").open("a") as file:
            file.write(json.dumps(line | {"state": "passed"}) + "\n")
        return 0

    monkeypatch.setattr(run, "run", pretended)
    monkeypatch.setattr(run, "sees_cuda", lambda: True)
    assert run.main([f"--out={tmp_path}", "--minutes=8"]) == status
    machine, checks, benchmarks = (command for command, _ in commands)
    assert machine[-1].endswith("test_machine.py") and checks[-1] == str(GPU)
    assert all(words[words.index("-m", 3) + 1] == "cuda" for words in (machine, checks))
    assert benchmarks[1:4] == ["-m", "benchmarks", "gpu"] and "--dry-run" not in benchmarks
    assert all(0 < seconds <= 480 for _, seconds in commands)
    said = capsys.readouterr().out
    assert ("the benchmarks ended" in said) == (bench != 0)


def shell(*words: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tests/gpu/run.py", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path):
    done = shell(f"--out={tmp_path / 'out'}")
    assert done.returncode == 2 and "no CUDA device" in done.stdout
    assert not (tmp_path / "out").exists()


def test_an_unknown_section_is_refused():
    done = shell("--only=linear,speed")
    assert done.returncode == 2 and "got speed" in done.stderr


REFUSING = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
"""


def test_dry_run_on_a_bare_machine(tmp_path):
    """The real checks on a CPU, where torch and pytest are all that is installed."""
    absent = ("hypothesis", "peft", "transformers", "safetensors", "rich", "matplotlib")
    (tmp_path / "sitecustomize.py").write_text(REFUSING.format(absent))
    out = tmp_path / "out"
    done = shell("--dry-run", "--only=long,sanitizer", f"--out={out}", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (out / "checks.jsonl").open()]
    states = [row["state"] for row in rows if row["kind"] == "check"]
    assert len(states) > 5 and set(states) == {"passed"}
