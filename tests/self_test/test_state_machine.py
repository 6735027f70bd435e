"""What a user sees of each way in which a test of kernels can end; no kernel is run."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings

import filelock
import pytest
import torch

import lora_kernels
from lora_kernels import self_test
from lora_kernels.runtime import machine_files, tables, verdicts
from lora_kernels.runtime.child_process import OUT_OF_TIME, run_child
from lora_kernels.runtime.verdicts import ABSENT, BROKEN, PROVEN, UNPROVEN, Verdict
from lora_kernels.self_test.families import FAMILIES

CHILD = "lora_kernels.self_test.child"
KIND = "H200, sm_90"
FIRST, SECOND, *REST = FAMILIES


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine_files, "_of_this_process", {})
    verdicts.forget()
    yield tmp_path / "cache"
    verdicts.forget()


@pytest.fixture
def said():
    return []


class Runner:
    """Stands for the child: what each family's test does, by name; the others pass."""

    def __init__(self, **ends):
        self.ends, self.runs = ends, []

    def __call__(self, arguments, seconds):
        self.runs.append(arguments)
        skipped = {word for word in arguments if "/" in word}
        yield {"ready": [KIND]}
        for name in FAMILIES:
            if f"{KIND}/{name}" in skipped:
                continue
            yield {"kind": KIND, "family": name, "begins": True}
            yield {"check": "bfloat16, aligned"}
            end = self.ends.get(name.replace("/", "_").replace(" ", "_"))
            if isinstance(end, str):
                yield {"ended": end}
                return
            state, detail = end or (PROVEN, "14 checks passed")
            yield {
                "kind": KIND, "family": name, "state": state, "detail": detail, "seconds": 1.0,
            }  # fmt: skip


def ensure(runner, said, **options):
    return self_test.ensure(runner=runner, say=said.append, **options)


def states(found):
    return {name: verdict.state for name, verdict in found[KIND].items()}


def named(family):
    return family.replace("/", "_").replace(" ", "_")


def test_what_passes_is_proven_once_per_machine_state(said):
    runner = Runner()
    assert set(states(ensure(runner, said)).values()) == {PROVEN}
    assert set(states(ensure(runner, said)).values()) == {PROVEN}
    assert len(runner.runs) == 1
    assert len(said) == 2 and "at most 60 s" in said[0] and f"{len(FAMILIES)} proven" in said[1]


def test_again_tests_what_has_a_verdict(said):
    runner = Runner()
    ensure(runner, said)
    ensure(runner, said, again=True)
    assert len(runner.runs) == 2 and not any("/" in word for word in runner.runs[1])


def test_a_wrong_number_breaks_its_family_alone(said):
    wrong = (BROKEN, "bfloat16, odd, dropout 0.1: AssertionError: x: maximum error 1 exceeds 0.1")
    found = ensure(Runner(**{named(SECOND): wrong}), said)
    assert found[KIND][SECOND].detail == wrong[1]
    assert [name for name, state in states(found).items() if state != PROVEN] == [SECOND]
    assert f"1 broken, {len(FAMILIES) - 1} proven" in said[1]


@pytest.mark.parametrize("how", ["did nothing for 30 s", "was killed by signal 11"])
def test_a_hang_or_a_signal_breaks_its_family_and_the_rest_is_tested(said, how):
    runner = Runner(**{named(SECOND): how})
    found = ensure(runner, said)
    assert found[KIND][SECOND] == Verdict(
        BROKEN, f"bfloat16, aligned: the process {how}", 0.0, found[KIND][SECOND].time,
        ("bfloat16", "float16", "float32"),
    )  # fmt: skip
    assert [name for name, state in states(found).items() if state != PROVEN] == [SECOND]
    assert len(runner.runs) == 2
    assert {f"{KIND}/{FIRST}", f"{KIND}/{SECOND}"} <= set(runner.runs[1])


def test_what_there_is_no_time_for_is_unproven_and_tried_again_later(said, monkeypatch):
    found = ensure(Runner(**{named(SECOND): OUT_OF_TIME}), said)
    assert states(found) == {FIRST: PROVEN} | dict.fromkeys([SECOND, *REST], UNPROVEN)
    assert "no time" in found[KIND][SECOND].detail
    runner = Runner()
    ensure(runner, said)
    assert not runner.runs, "not at once"
    later = time.time() + verdicts.RETRY_SECONDS + 1
    monkeypatch.setattr(time, "time", lambda: later)
    assert set(states(ensure(runner, said)).values()) == {PROVEN}
    assert f"{KIND}/{FIRST}" in runner.runs[0] and f"{KIND}/{SECOND}" not in runner.runs[0]


def test_a_child_that_cannot_start_proves_nothing_and_breaks_nothing(said):
    def runner(arguments, seconds):
        yield {"ended": "ended with status 1: CUDA error: all CUDA-capable devices are busy"}

    found = ensure(runner, said)
    assert {verdict.state for verdict in found[verdicts.ANY].values()} == {UNPROVEN}
    assert "could not start" in found[verdicts.ANY][FIRST].detail
    assert "devices are busy" in verdicts.verdict(FIRST, torch.device("cpu")).detail


def test_a_changed_state_is_tested_anew(said, monkeypatch):
    runner = Runner()
    ensure(runner, said)
    state = machine_files.machine_state() | {"torch": "99.0"}
    monkeypatch.setattr(machine_files, "machine_state", lambda: state)
    ensure(runner, said)
    assert len(runner.runs) == 2


@pytest.mark.parametrize("field", ["torch", "triton", "gpus", "cpu", "kernels", "visible", "cuda"])
def test_every_part_of_the_state_has_a_file_of_its_own(field):
    state = machine_files.machine_state()
    assert verdicts.file_of(state) != verdicts.file_of(state | {field: "another"})


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"verdicts": 3}', '{"verdicts": {"a": {"b": {"other": 1}}}}']
)
def test_a_corrupt_file_is_put_aside(said, content):
    path = verdicts.file_of(machine_files.machine_state())
    path.parent.mkdir()
    path.write_text(content)
    runner = Runner()
    with pytest.warns(UserWarning, match="cannot be read"):
        found = ensure(runner, said)
    assert set(states(found).values()) == {PROVEN} and len(runner.runs) == 1
    assert path.with_suffix(".corrupt").read_text() == content
    assert json.loads(path.read_text())["verdicts"][KIND][FIRST]["state"] == PROVEN


def test_a_home_that_cannot_be_written_to_is_served_within_the_process(said, monkeypatch, tmp_path):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "a file" / "cache"))
    runner = Runner()
    ensure(runner, said)
    found = ensure(runner, said)
    assert set(states(found).values()) == {PROVEN} and len(runner.runs) == 1
    assert "cannot be written to" in said[1]


def test_two_that_ask_at_once_test_once(said):
    began, runner = threading.Event(), Runner()

    def slow(arguments, seconds):
        began.set()
        time.sleep(0.3)
        yield from runner(arguments, seconds)

    first = threading.Thread(target=ensure, args=(slow, said))
    first.start()
    began.wait()
    found = ensure(runner, said)
    first.join()
    assert set(states(found).values()) == {PROVEN} and len(runner.runs) == 1


def test_one_that_waits_too_long_goes_on_without(said, directory):
    directory.mkdir()
    path = verdicts.file_of(machine_files.machine_state())
    runner = Runner()
    with filelock.FileLock(path.with_suffix(".lock")):
        assert ensure(runner, said, patience=0.05) == {}
    assert not runner.runs and "goes on without them" in said[0]


def test_a_test_that_is_interrupted_leaves_no_lock_and_no_verdict(said):
    def runner(arguments, seconds):
        yield {"ready": [KIND]}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure(runner, said)
    assert set(states(ensure(Runner(), said)).values()) == {PROVEN}


# ---- the process itself


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Runs a script in place of the child."""

    def run(script, seconds=30.0, hung=30.0):
        path = tmp_path / "child.py"
        path.write_text("import json, os, signal, sys, time\n" + script)
        popen = subprocess.Popen

        def start(command, **options):
            return popen([sys.executable, str(path), *command[5:]], **options)

        monkeypatch.setattr(subprocess, "Popen", start)
        return list(run_child(CHILD, ["--dtypes", "float32"], seconds, hung))

    return run


SAY = "print(json.dumps({'ready': []}), flush=True)\n"


def test_lines_come_through_and_a_good_end_says_nothing(child):
    assert child(SAY + "print('noise')\nprint('x' * 200000, file=sys.stderr)") == [{"ready": []}]


def test_a_signal_is_named(child):
    lines = child(SAY + "os.kill(os.getpid(), signal.SIGSEGV)")
    assert lines[1:] == [{"ended": f"was killed by signal {signal.SIGSEGV.value}"}]


def test_the_last_complaint_is_told(child):
    (line,) = child("raise RuntimeError('CUDA error: out of memory')")
    assert line["ended"] == "ended with status 1: RuntimeError: CUDA error: out of memory"


def test_a_hang_ends(child):
    began = time.monotonic()
    assert child(SAY + "time.sleep(60)", hung=0.5)[1:] == [{"ended": "did nothing for 0 s"}]
    assert time.monotonic() - began < 20


def test_out_of_time_is_no_hang(child):
    busy = "while True:\n    print(json.dumps({'check': 'x'}), flush=True); time.sleep(0.05)"
    assert child(SAY + busy, seconds=1.5, hung=1.0)[-1] == {"ended": OUT_OF_TIME}


def test_what_a_launcher_says_to_its_workers_is_not_for_the_child(child, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    (line,) = child("print(json.dumps({'seen': sorted(os.environ)}))")
    assert not {"RANK", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} & set(line["seen"])
    assert "CUDA_VISIBLE_DEVICES" in line["seen"]


def test_a_python_that_is_gone_means_unproven(said, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    found = self_test.ensure(say=said.append)
    assert found[verdicts.ANY][FIRST].state == UNPROVEN
    assert "FileNotFoundError" in found[verdicts.ANY][FIRST].detail


def test_the_parent_starts_no_cuda():
    code = (
        "import torch, lora_kernels; from lora_kernels.runtime import machine_files\n"
        "machine_files.machine_state(); assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))


def test_absent_stands_for_good():
    tried = ("float32",)
    assert Verdict(ABSENT, dtypes=tried).stands_for(tried) and Verdict(BROKEN).stands_for(tried)
    assert not Verdict(UNPROVEN, dtypes=tried).stands_for(tried)


def test_what_was_tried_in_one_dtype_is_no_proof_for_another(said):
    runner = Runner()
    ensure(runner, said, dtypes=(torch.float32,))
    ensure(runner, said, dtypes=(torch.float32,))
    assert len(runner.runs) == 1
    found = ensure(runner, said, dtypes=(torch.bfloat16,))
    assert len(runner.runs) == 2 and runner.runs[1][1] == "bfloat16,float32"
    assert found[KIND][FIRST].dtypes == ("bfloat16", "float32")
    ensure(runner, said, dtypes=(torch.float32,))
    assert len(runner.runs) == 2


def test_what_the_child_has_started_ends_with_it(child, tmp_path):
    mark = tmp_path / "still there"
    later = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    start = f"import subprocess; subprocess.Popen([sys.executable, '-c', {later!r}])"
    child(SAY + start + "\ntime.sleep(60)", hung=0.7)
    time.sleep(3)
    assert not mark.exists()


# ---- machines that are odd


def test_a_test_that_could_not_start_once_is_made_once_more(said, monkeypatch):
    def cannot_start(arguments, seconds):
        yield {"ended": "ended with status 1: CUDA error: all CUDA-capable devices are busy"}

    ensure(cannot_start, said)
    later = time.time() + verdicts.RETRY_SECONDS + 1
    monkeypatch.setattr(time, "time", lambda: later)
    runner = Runner()
    found = [ensure(runner, said) for _ in range(3)]
    assert len(runner.runs) == 1 and all(set(each) == {KIND} for each in found)


def test_what_another_process_has_tested_is_known_here(said):
    assert verdicts.known() == {}
    tested = {name: Verdict(PROVEN, "", 1.0, time.time(), verdicts.DTYPES) for name in FAMILIES}
    state = machine_files.machine_state()
    assert verdicts.store(verdicts.file_of(state), state, {KIND: tested})
    runner = Runner()
    ensure(runner, said)
    assert not runner.runs and verdicts.known() == {KIND: tested}


def test_a_file_that_cannot_be_replaced_does_not_hide_what_is_newer(said, monkeypatch):
    ensure(Runner(), said)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(machine_files.tempfile, "NamedTemporaryFile", full)
    wrong = (BROKEN, "wrong by a tile")
    runner = Runner(**{named(SECOND): wrong})
    ensure(runner, said, again=True)
    found = ensure(runner, said)
    assert found[KIND][SECOND].state == BROKEN and len(runner.runs) == 1


def test_without_a_home_everything_holds_for_the_process(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("LORA_KERNELS_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine_files.Path, "home", no_home)
    verdicts.forget()
    tables.forget()
    assert verdicts.known() == {} and tables.all_of(torch.device("cpu")) == {}
    x, weight, a, b = (torch.randn(size) for size in ((3, 8), (6, 8), (2, 8), (6, 2)))
    lora_kernels.lora_linear(x, weight, a, b, 1.0)
    assert not machine_files.write(machine_files.file_of("self-test", {}), {"verdicts": {}})


def test_warnings_as_errors_put_a_corrupt_file_aside_all_the_same(said):
    path = verdicts.file_of(machine_files.machine_state())
    path.parent.mkdir()
    path.write_text("{")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="cannot be read"):
            verdicts.load(path)
    assert not path.exists() and path.with_suffix(".corrupt").exists()


@pytest.mark.parametrize("said_beside", [r'"{not an object\n"', r'"[1]\n"', r'b"\xff\xfe {\n"'])
def test_what_else_is_printed_is_passed_over(child, said_beside):
    out = "sys.stdout.buffer.write" if said_beside.startswith("b") else "sys.stdout.write"
    lines = child(SAY + f"sys.stdout.flush(); {out}({said_beside}); sys.stdout.flush()\n" + SAY)
    assert lines == [{"ready": []}, {"ready": []}]


def test_a_child_that_closes_its_output_and_goes_on_is_ended(child):
    began = time.monotonic()
    lines = child(SAY + "sys.stdout.close(); os.close(1); time.sleep(60)", seconds=20.0, hung=1.0)
    assert lines[-1] == {"ended": "closed its output and went on"}
    assert time.monotonic() - began < 15


def test_the_working_directory_is_no_place_to_import_from(tmp_path, monkeypatch):
    """Nor may the package's neighbours shadow what Python brings."""
    (tmp_path / "queue.py").write_text("raise ImportError('my own queue.py')")
    (tmp_path / "lora_kernels.py").write_text("raise ImportError('my own lora_kernels.py')")
    monkeypatch.chdir(tmp_path)
    assert list(run_child("lora_kernels.version", [], 60.0, 60.0)) == []


@pytest.mark.parametrize("broken", ["no temporary directory", "no executable"])
def test_where_no_process_can_be_made_it_is_said(monkeypatch, broken):
    def none(*arguments, **options):
        raise FileNotFoundError("no usable temporary directory")

    if broken == "no executable":  # embedded in another program
        monkeypatch.setattr(sys, "executable", None)
    else:
        monkeypatch.setattr(machine_files.tempfile, "TemporaryFile", none)
    (line,) = run_child("lora_kernels.version", [], 60.0, 60.0)
    assert "Error: " in line["ended"]
