"""The command line, run as a user runs it, on models small enough for a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kernels.__main__ import doctor, main

ROOT = Path(__file__).resolve().parents[1]
TINY_STEP = ["step", "--layers=1", "--hidden=32", "--heads=2", "--kv-heads=1"]
TINY_STEP += ["--intermediate=48", "--vocab=64", "--tokens=2x8", "--rank=2", "--reps=2"]
TINY_OP = ["op", "--shapes=32x48x40", "--rank=2", "--reps=2"]


def command(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    words = [sys.executable, "-m", "lora_kernels", *argv]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_bench_op_with_memory_end_to_end(tmp_path):
    out = tmp_path / "op.jsonl"
    # Of tensors that no heap has room for by chance: 4 MiB for each of x, y and their gradients.
    argv = ["bench", "op", "--shapes=4096x256x256", "--rank=2", "--reps=2", "--dtype=fp32"]
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


def test_bench_step(tmp_path, capsys):
    pytest.importorskip("peft")
    out = tmp_path / "step.jsonl"
    argv = ["bench", *TINY_STEP, "--dropout=0.1", "--no-memory", f"--out={out}"]
    assert main(argv) == 0
    printed = capsys.readouterr()
    assert "repetition 2/2" in printed.err and "loss of the first step: frozen" in printed.out

    found = {row["provider"]: row for row in rows(out)}
    assert list(found) == ["frozen", "peft", "peft-base-dtype", "ours"]
    ours = found["ours"]
    assert ours["seconds"]["step"]["median"] > 0 and ours["over_frozen"]["step"]["median"] > 0
    assert 0 < ours["saved_bytes"] < found["peft"]["saved_bytes"]
    assert ours["case"]["layers"] == 1 and ours["case"]["dtype"] == "bf16"


def test_memory_of_a_step(capsys):
    pytest.importorskip("peft")
    assert main(["bench", *TINY_STEP, "--only-memory=ours"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["peak_bytes"] > found["step_bytes"] >= 0


def test_bench_op_runs_every_combination(tmp_path, capsys):
    out = tmp_path / "op.jsonl"
    argv = ["bench", *TINY_OP, "--providers=frozen,naive,ours,triton", f"--out={out}"]
    argv += ["--dtype=fp32,bf16", "--dropout=0,0.5", "--no-memory", "--shapes=32x48x40,8x16x24"]
    assert main(argv) == 0
    found = rows(out)
    cases = [(r["case"]["dtype"], r["case"]["dropout"], r["case"]["m"]) for r in found[::4]]
    grid = [(d, p, m) for d in ("fp32", "bf16") for p in (0.0, 0.5) for m in (32, 8)]
    assert cases == grid and len(found) == 4 * len(grid)
    for row in found:
        assert row["memory"] is None
        assert row["floor"]["both"] > 0 and row["meta"]["ceilings"]["flops_per_second"] > 0
        if not row["skipped"]:
            assert row["saved_bytes"] == sum(part["bytes"] for part in row["saved"])
    text = capsys.readouterr().out
    assert "floor" in text and "saved by ours" in text and "\x1b[" not in text


def test_only_memory_prints_one_json_line(capsys):
    assert main(["bench", *TINY_OP, "--only-memory=naive"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"peak_bytes", "step_bytes", "method"}


def test_memory_grows_with_the_tokens():
    """What the number is for: sixteen times the tokens must show, beyond a page or two."""
    peaks = []
    for tokens in (256, 4096):
        shape = f"--shapes={tokens}x256x256"
        done = command("bench", "op", shape, "--dtype=fp32", "--only-memory=frozen")
        assert done.returncode == 0, done.stderr
        peaks.append(json.loads(done.stdout)["step_bytes"])
    y_and_dx = 2 * 4096 * 256 * 4
    assert peaks[0] < peaks[1] and y_and_dx * 0.9 < peaks[1] < y_and_dx * 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["op", "--dtype=int8"], "--dtype: expected bf16, fp16, fp32, got 'int8'"),
        (["op", "--dropout=1"], "--dropout: expected probabilities in [0, 1)"),
        (["op", "--dropout=a"], "--dropout: expected numbers"),
        (["op", "--shapes=4x5"], "--shapes: expected MxKxN"),
        (["op", "--shapes=4x0x5"], "--shapes: expected MxKxN"),
        (["op", "--providers=frozen,fast"], "got fast"),
        (["op", "--reps=0"], "expected at least 1, got 0"),
        (["op", "--only-memory=naive", "--dropout=0,0.1"], "--only-memory measures one case"),
        (["step", "--tokens=512"], "--tokens: expected BATCHxLENGTH"),
        (["step", "--hidden=100"], "--hidden must be a multiple of --heads"),
        (["op", "--device=tpu"], "--device: expected cpu or cuda, got 'tpu'"),
        (["step", "--device=cuda"], "torch sees no CUDA device"),
        ([], "required: kind"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_options_say_what_was_expected(argv, message, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *argv])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["op", "step"])
def test_bench_without_peft_names_the_extra(kind, monkeypatch, capsys, tmp_path):
    for package in ("peft", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    argv = TINY_OP if kind == "op" else TINY_STEP
    out = tmp_path / "rows.jsonl"
    assert main(["bench", *argv, f"--out={out}"]) == 2
    assert 'pip install "lora_kernels[bench]"' in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("load", [0.1, 7.0, None])
def test_bench_warns_of_a_busy_machine(load, monkeypatch, tmp_path, capsys):
    from lora_kernels.measuring import machine

    monkeypatch.setattr(machine, "load", lambda: load)
    argv = ["bench", *TINY_OP, "--providers=frozen", "--no-memory"]
    assert main([*argv, f"--out={tmp_path / 'rows.jsonl'}"]) == 0
    assert ("the machine is busy (load 7.0)" in capsys.readouterr().err) == (load == 7.0)
    assert rows(tmp_path / "rows.jsonl")[0]["meta"]["load"] == load


def test_bench_needs_no_peft_where_no_provider_does(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    argv = ["bench", *TINY_OP, "--providers=frozen,ours", "--no-memory"]
    assert main([*argv, f"--out={tmp_path / 'rows.jsonl'}"]) == 0


def test_an_interrupt_keeps_the_finished_cases(monkeypatch, tmp_path, capsys):
    from lora_kernels.bench import cli

    measure_case, calls = cli.measure_case, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure_case(*args)

    monkeypatch.setattr(cli, "measure_case", interrupted)
    out = tmp_path / "rows.jsonl"
    argv = ["bench", *TINY_OP, "--providers=frozen", "--no-memory", "--dtype=fp32,bf16"]
    assert main([*argv, "--out", str(out)]) == 130
    assert [row["case"]["dtype"] for row in rows(out)] == ["fp32"]
    assert "--out" not in rows(out)[0]["meta"]["command"]


def test_help_names_the_providers(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "step", "--help"])
    assert "peft-base-dtype" in capsys.readouterr().out


def test_doctor_names_versions_devices_backends_and_choices():
    import torch

    text = "\n".join(doctor())
    assert torch.__version__ in text and sys.version.split()[0] in text
    for word in ("triton", "peft", "transformers", "extension", "LORA_KERNELS_BACKEND", "cpu"):
        assert word in text
    for backend in ("reference", "composed", "triton", "native"):
        assert backend in text
    assert "M 8192, K 4096, N 4096" in text


def test_doctor_as_a_command_shows_the_override():
    done = command("doctor", LORA_KERNELS_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    assert "LORA_KERNELS_BACKEND  reference" in done.stdout
    assert "      reference: " in done.stdout  # and it is what the calls take


def test_doctor_runs_without_the_optional_packages(monkeypatch):
    import importlib.metadata

    found = importlib.metadata.version

    def version(name):
        if name == "torch":
            return found(name)
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    for package in ("peft", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    text = "\n".join(doctor())
    assert "peft          not installed" in text and "triton        not installed" in text


def test_importing_the_package_imports_no_bench():
    code = "import sys, lora_kernels; print([m for m in sys.modules if 'bench' in m])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "lora_kernels" not in done.stdout
