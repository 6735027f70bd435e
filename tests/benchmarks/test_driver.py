"""`python -m benchmarks`, run as a user runs it, on models small enough for a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import driver, provenance
from benchmarks.__main__ import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
TINY_STEP = ["step", "--layers=1", "--hidden=32", "--heads=2", "--kv-heads=1"]
TINY_STEP += ["--intermediate=48", "--vocab=64", "--length=8", "--rank=2", "--reps=2"]
TINY_OP = ["op", "--m=32", "--k=48", "--n=40", "--rank=2", "--reps=2"]


def command(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    words = [sys.executable, "-m", "benchmarks", *argv]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_op_with_memory_end_to_end(tmp_path):
    out = tmp_path / "op.jsonl"
    # Of tensors that no heap has room for by chance: 4 MiB for each of x, y and their gradients.
    argv = ["op", "--m=4096", "--k=256", "--n=256", "--rank=2", "--reps=2", "--dtype=fp32"]
    done = command(*argv, "--providers=frozen,ours", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "repetition 2/2" in done.stderr and "peak memory of ours" in done.stderr
    assert "peak of step" in done.stdout

    frozen, ours = rows(out)
    assert (frozen["provider"], ours["provider"]) == ("frozen", "ours")
    assert ours["skipped"] is None and ours["reps"] == 2
    assert len(ours["seconds"]["both"]["samples"]) == 2
    assert ours["memory"]["peak_bytes"] > ours["memory"]["step_bytes"] >= 4 << 20
    assert str(tmp_path) not in json.dumps(ours)


def test_step(tmp_path, capsys):
    pytest.importorskip("peft")
    out = tmp_path / "step.jsonl"
    argv = [*TINY_STEP, "--dropout=0.1", "--no-memory", f"--out={out}"]
    assert main(argv) == 0
    printed = capsys.readouterr()
    assert "repetition 2/2" in printed.err and "loss of the first step: frozen" in printed.out

    found = {row["provider"]: row for row in rows(out)}
    assert list(found) == ["frozen", "naive", "peft", "peft-base-dtype", "ours"]
    ours = found["ours"]
    assert ours["seconds"]["step"]["median"] > 0 and ours["over_frozen"]["step"]["median"] > 0
    assert 0 < ours["saved_bytes"] < found["peft"]["saved_bytes"]
    assert ours["case"]["layers"] == 1 and ours["case"]["dtype"] == "bf16"


def test_memory_of_a_step(capsys):
    pytest.importorskip("peft")
    assert main([*TINY_STEP, "--only-memory=ours"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["peak_bytes"] > found["step_bytes"] >= 0


def test_op_runs_every_combination(tmp_path, capsys):
    out = tmp_path / "op.jsonl"
    argv = [*TINY_OP, "--providers=frozen,naive,ours,triton", f"--out={out}"]
    argv += ["--dtype=fp32,bf16", "--dropout=0,0.5", "--no-memory", "--m=32,8"]
    assert main(argv) == 0
    found = rows(out)
    cases = [(r["case"]["m"], r["case"]["dtype"], r["case"]["dropout"]) for r in found[::4]]
    grid = [(m, d, p) for m in (32, 8) for d in ("fp32", "bf16") for p in (0.0, 0.5)]
    assert cases == grid and len(found) == 4 * len(grid)
    for row in found:
        assert row["memory"] is None
        assert row["floor"]["both"] > 0 and row["meta"]["ceilings"]["flops_per_second"] > 0
        if not row["skipped"]:
            assert row["saved_bytes"] == sum(part["bytes"] for part in row["saved"])
    text = capsys.readouterr().out
    assert "floor" in text and "saved by ours" in text and "\x1b[" not in text


def test_only_memory_prints_one_json_line(capsys):
    assert main([*TINY_OP, "--only-memory=naive"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"peak_bytes", "step_bytes", "method"}


def test_memory_grows_with_the_tokens():
    """What the number is for: sixteen times the tokens must show, beyond a page or two."""
    peaks = []
    for tokens in (256, 4096):
        shape = [f"--m={tokens}", "--k=256", "--n=256", "--dtype=fp32"]
        done = command("op", *shape, "--only-memory=frozen")
        assert done.returncode == 0, done.stderr
        peaks.append(json.loads(done.stdout)["step_bytes"])
    y_and_dx = 2 * 4096 * 256 * 4
    assert peaks[0] < peaks[1] and y_and_dx * 0.9 < peaks[1] < y_and_dx * 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["op", "--dtype=int8"], "--dtype: expected bf16, fp16, fp32, got 'int8'"),
        (["op", "--dropout=1"], "--dropout: expected a probability in [0, 1), got '1'"),
        (["op", "--dropout=a"], "--dropout: expected a number, got 'a'"),
        (["op", "--m=4x5"], "--m: expected positive numbers, got '4x5'"),
        (["op", "--m=0"], "--m: expected positive numbers, got '0'"),
        (["op", "--providers=frozen,fast"], "got fast"),
        (["op", "--reps=0"], "expected at least 1, got 0"),
        (["op", "--m=4+5"], "--m: expected one number, got '4+5'"),
        (["routed", "--train=yes"], "--train: expected True or False, got 'yes'"),
        (["routed", "--adapter-dtype=int8"], "--adapter-dtype: expected bf16, fp16, fp32"),
        (["step", "--hidden=100"], "--hidden must be a multiple of --heads"),
        (["op", "--device=tpu"], "--device: expected cpu or cuda, got 'tpu'"),
        (["step", "--device=cuda"], "torch sees no CUDA device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_options_say_what_was_expected(argv, message, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["op", "step"])
def test_without_peft_names_the_extra(kind, monkeypatch, capsys, tmp_path):
    for package in ("peft", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    argv = TINY_OP if kind == "op" else TINY_STEP
    out = tmp_path / "rows.jsonl"
    assert main([*argv, f"--out={out}"]) == 2
    assert 'pip install "lora_kernels[bench]"' in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("load", [0.1, 7.0, None])
def test_warns_of_a_busy_machine(load, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(provenance, "load", lambda: load)
    argv = [*TINY_OP, "--providers=frozen", "--no-memory"]
    assert main([*argv, f"--out={tmp_path / 'rows.jsonl'}"]) == 0
    assert ("the machine is busy (load 7.0)" in capsys.readouterr().err) == (load == 7.0)
    assert rows(tmp_path / "rows.jsonl")[0]["meta"]["load"] == load


def test_needs_no_peft_where_no_provider_does(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    argv = [*TINY_OP, "--providers=frozen,ours", "--no-memory"]
    assert main([*argv, f"--out={tmp_path / 'rows.jsonl'}"]) == 0


def test_an_interrupt_keeps_the_finished_cases(monkeypatch, tmp_path, capsys):
    measure_case, calls = driver.measure_case, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure_case(*args)

    monkeypatch.setattr(driver, "measure_case", interrupted)
    out = tmp_path / "rows.jsonl"
    argv = [*TINY_OP, "--providers=frozen", "--no-memory", "--dtype=fp32,bf16"]
    assert main([*argv, "--out", str(out)]) == 130
    assert [row["case"]["dtype"] for row in rows(out)] == ["fp32"]
    assert "--out" not in rows(out)[0]["meta"]["command"]


def test_help_names_the_providers(capsys):
    with pytest.raises(SystemExit):
        main(["step", "--help"])
    text = "".join(capsys.readouterr().out.split())  # argparse breaks lines at hyphens
    assert "frozen,naive,peft,peft-base-dtype" in text and "--kv-heads" in text


def test_commands_are_listed(capsys):
    for argv, code in (([], 0), (["--help"], 0), (["fast"], 2)):
        assert main(argv) == code
        text = capsys.readouterr().out
        assert all(f"  {name:8}" in text for name in COMMANDS)


def test_a_benchmark_that_is_not_there_breaks_no_other(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "benchmarks.infer", None)
    assert main(["infer"]) == 2
    assert "there is no benchmarks/infer.py in this tree" in capsys.readouterr().err


def test_a_package_that_is_missing_is_no_missing_benchmark(monkeypatch):
    monkeypatch.delitem(sys.modules, "benchmarks.op", raising=False)
    monkeypatch.setitem(sys.modules, "benchmarks.ceilings", None)
    with pytest.raises(ModuleNotFoundError, match=r"benchmarks\.ceilings"):
        main(["op"])


def test_the_wheel_has_no_benchmark():
    from setuptools import find_namespace_packages

    found = find_namespace_packages(str(ROOT), include=["lora_kernels*"])
    assert "lora_kernels.measuring" in found
    assert not [name for name in found if "bench" in name]
