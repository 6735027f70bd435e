"""The driver of `make gpu-check`; a script that hangs and crashes plays its sections."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_kernels.bench import gpu_check, gpu_report, gpu_units
from lora_kernels.bench.gpu_check import AGAIN, Section

ROOT = Path(__file__).resolve().parents[1]

# argv: part, then units as NAME=ACTION. What gpu_units does, without torch.
PLAYER = """
import json, os, pathlib, subprocess, sys, time

part = pathlib.Path(sys.argv[1])
say = lambda **line: part.open("a").write(json.dumps(line) + "\\n")
text = part.read_text() if part.exists() else ""
for word in sys.argv[2:]:
    name, action = word.split("=")
    if f'"{name}"' in text:
        continue
    if action == "refuse":
        sys.exit("no such module")
    say(unit=name, state="started")
    if action == "crash":
        print("Fatal: illegal address", file=sys.stderr, flush=True)
        os._exit(3)
    if action == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        say(unit="child", state="passed", detail=str(child.pid))
        time.sleep(60)
    if action == "look":
        found = (part.parents[1] / "gpu-check.jsonl").read_text()
        say(unit=name, state="passed", seconds=0.5, detail=found)
    elif action == "broken":
        say(unit=name, state="failed", detail="AssertionError: dx", seconds=0.1)
        sys.exit(75)
    else:
        say(unit=name, state="passed", seconds=0.1, detail=str(os.getpid()))
"""


@pytest.fixture
def play(tmp_path):
    script = tmp_path / "player.py"
    script.write_text(PLAYER)

    def run(plays: dict[str, str], minutes=1.0, seconds=30.0, workers=1):
        sections = [Section(name, name.title(), seconds, 10, workers) for name in plays]

        def command(section, part, worker, workers):
            words = plays[section.name].split()
            return [sys.executable, str(script), str(part), *words[worker::workers]]

        rows = gpu_check.run_sections(
            sections, tmp_path / "out", minutes, command, 8, "make gpu-check"
        )
        return {(row["section"], row["unit"]): row for row in rows}

    return run


def test_a_crash_costs_one_unit(play, tmp_path):
    found = play({"a": "one=pass two=crash three=pass", "b": "four=pass"})
    assert found["a", "two"]["state"] == "failed"
    assert "ended with 3" in found["a", "two"]["detail"]
    assert "illegal address" in found["a", "two"]["detail"]
    for unit in (("a", "one"), ("a", "three"), ("b", "four")):
        assert found[unit]["state"] == "passed"
    assert found["a", None]["states"] == {"passed": 2, "failed": 1}
    assert (found["a", None]["state"], found["b", None]["state"]) == ("failed", "passed")
    assert found["a", "one"]["detail"] != found["a", "three"]["detail"], "a fresh process"
    assert not (tmp_path / "out" / "parts").exists()


def test_a_hang_is_ended_with_all_it_started(play):
    began = time.monotonic()
    found = play({"a": "one=pass two=hang three=pass", "b": "four=pass"}, seconds=3)
    assert time.monotonic() - began < 12
    assert "time was over" in found["a", "two"]["detail"]
    assert ("a", "three") not in found and found["b", "four"]["state"] == "passed"
    assert "time was over" in found["a", None]["detail"]
    child = int(found["a", "child"]["detail"])
    time.sleep(0.2)
    try:
        state = Path(f"/proc/{child}/stat").read_text().split()[2]
    except FileNotFoundError:
        return
    assert state == "Z", "the unit's own process outlived it"


def test_a_broken_context_gets_a_fresh_process(play):
    assert AGAIN == 75
    found = play({"a": "one=pass two=broken three=pass"})
    assert found["a", "two"]["detail"] == "AssertionError: dx"
    assert found["a", "three"]["state"] == "passed"
    assert found["a", "one"]["detail"] != found["a", "three"]["detail"]
    assert found["a", None]["state"] == "failed" and found["a", None]["detail"] is None


def test_a_section_that_cannot_start_says_why(play):
    found = play({"a": "one=refuse", "b": "two=pass"})
    assert found["a", None]["state"] == "failed"
    assert "no such module" in found["a", None]["detail"]
    assert found["b", "two"]["state"] == "passed"


def test_results_are_on_disk_after_every_section(play, tmp_path):
    found = play({"a": "one=crash", "b": "two=look"})
    on_disk = [json.loads(line) for line in found["b", "two"]["detail"].splitlines()]
    assert [(row["unit"], row["state"]) for row in on_disk] == [(None, "failed"), ("one", "failed")]
    text = (tmp_path / "out" / "REPORT.md").read_text()
    assert "Fatal: illegal address" in text and "| B | passed | 1 |" in text


def test_no_section_starts_when_the_time_is_over(play):
    found = play({"a": "one=hang", "b": "two=pass"}, minutes=2 / 60)
    assert found["a", "one"]["state"] == "failed"
    assert found["b", None]["state"] == "skipped" and ("b", "two") not in found


def test_workers_share_the_units(play):
    found = play({"a": "one=pass two=pass three=pass four=crash five=pass"}, workers=2)
    assert found["a", None]["states"] == {"passed": 4, "failed": 1}
    assert found["a", "one"]["detail"] == found["a", "three"]["detail"]
    assert found["a", "one"]["detail"] != found["a", "two"]["detail"]


def test_half_a_line_of_a_killed_process_is_ignored(tmp_path):
    part = tmp_path / "part.jsonl"
    gpu_check.append(part, {"unit": "one", "state": "started"})
    gpu_check.append(part, {"unit": "one", "state": "passed"})
    with open(part, "a") as file:
        file.write('{"unit": "tw')
    assert gpu_check.read_part(part) == [{"unit": "one", "state": "passed"}]


def test_all_sections_fit_into_the_time():
    assert sum(section.seconds for section in gpu_check.SECTIONS) <= 480
    assert all(section.unit_seconds <= section.seconds for section in gpu_check.SECTIONS)


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("section", gpu_check.SECTIONS, ids=lambda section: section.name)
def test_units_have_names_of_their_own(section, dry_run):
    names = [unit.name for unit in gpu_units.units_of(section.name, dry_run)]
    assert names and len(names) == len(set(names))


def test_a_unit_that_hangs_ends_its_process(tmp_path):
    code = (
        "import time, sys; from pathlib import Path; from lora_kernels.bench import gpu_units as g;"
        "g.run_unit(g.Unit('slow', lambda: time.sleep(30)), Path(sys.argv[1]), 0.5)"
    )
    part = tmp_path / "part.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", code, str(part)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Timeout" in done.stderr
    assert gpu_check.read_part(part) == [{"unit": "slow", "state": "started"}]


def test_a_unit_that_fails_keeps_its_rows(tmp_path):
    def fail():
        raise gpu_units.Wrong("triton-fused: dx is off", [{"kind": "op"}])

    def skip():
        raise gpu_units.Skip("no memory")

    part = tmp_path / "part.jsonl"
    for name, run in (("bad", fail), ("left out", skip), ("good", lambda: None)):
        assert gpu_units.run_unit(gpu_units.Unit(name, run), part, 60)
    bad, left_out, good = gpu_check.read_part(part)
    assert bad["state"] == "failed" and "dx is off" in bad["detail"]
    assert bad["rows"] == [{"kind": "op"}]
    assert left_out["state"] == "skipped" and good["state"] == "passed" and good["seconds"] >= 0


def test_dry_run_end_to_end(tmp_path):
    """The real workers and the real benchmark on a CPU, as somebody without a GPU would try it."""
    words = ["benchmarks/gpu_check.py", "--dry-run", "--only=core", f"--out={tmp_path}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "gpu-check.jsonl").read_text().splitlines()]
    assert [row["state"] for row in rows if row["kind"] == "check"] == ["passed"] * 3
    providers = {row["provider"] for row in rows if row["kind"] == "op"}
    assert providers == {"frozen", "naive", "naive-fp32", "composed", "ours"}
    text = (tmp_path / "REPORT.md").read_text()
    assert "Geometric means over 2 cells" in text and str(tmp_path) not in text


def test_a_bare_machine_is_enough(tmp_path):
    """torch and nothing else: no pytest, no hypothesis, no PEFT, no transformers."""
    absent = ("pytest", "hypothesis", "peft", "transformers", "rich", "matplotlib", "ruff")
    code = (
        f"import sys; sys.modules |= dict.fromkeys({absent!r})\n"
        "from lora_kernels.bench import gpu_check, gpu_report, gpu_units\n"
        "for section in ('layer', 'long', 'core'):\n"
        "    gpu_units.main([section, '--dry-run', f'--part={sys.argv[1]}'])\n"
    )
    part = tmp_path / "part.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", code, str(part)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {line["state"] for line in gpu_check.read_part(part)} == {"passed"}


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main([f"--out={tmp_path / 'report'}"]) == 2
    assert "no CUDA device" in capsys.readouterr().out and not (tmp_path / "report").exists()
    with pytest.raises(SystemExit):
        gpu_check.main(["--only=speed"])
    assert "got speed" in capsys.readouterr().err


# ---- the report


def op_row(provider, samples, dropout=0.0, m=8192, skipped=None):
    case = {"m": m, "k": 4096, "n": 4096, "rank": 16, "dropout": dropout}
    middle = sorted(samples)[len(samples) // 2] if samples else None
    seconds = {"both": {"median": middle, "samples": samples}}
    return {"kind": "op", "case": case, "provider": provider, "skipped": skipped,
            "seconds": seconds, "floor": {"both": 0.9}}  # fmt: skip


ROWS = [
    op_row("frozen", [1.0, 2.0, 1.0]),
    op_row("naive", [2.0, 4.0, 2.0]),
    op_row("naive-fp32", [4.0, 8.0, 4.0]),
    op_row("composed", [1.25, 2.5, 1.25]),
    op_row("ours", [1.05, 2.1, 1.05]),
    op_row("frozen", [1.0, 1.0, 1.0], m=512),
    op_row("composed", [1.0, 1.0, 1.0], m=512),
    op_row("ours", [1.2, 1.2, 1.2], m=512),
    op_row("naive", [], m=512, skipped="out of memory"),
]


def test_report_compares_repetition_by_repetition_and_with_the_targets():
    cells = gpu_report.cells_of(ROWS)
    assert [set(cell) for cell in cells] == [
        {"frozen", "naive", "naive-fp32", "composed", "ours"},
        {"frozen", "composed", "ours"},
    ]
    assert gpu_report.ratio(cells[0], "naive", "ours") == pytest.approx(2 / 1.05)
    assert gpu_report.ratio(cells[1], "naive", "ours") is None
    targets = gpu_report._targets(ROWS)
    assert "| ours | 0 | 1.050 | met |" in targets
    assert "| composed | 0 | 1.250 | **missed** |" in targets
    means = gpu_report._providers(ROWS)
    assert f"| ours | 2 | {(1.05 * 1.2) ** 0.5:.2f} | 1.90 | 3.81 | 1.20 |" in means
    assert "8192x4096x4096 r 16 p 0 | 1000.000 | 0.90 | 2.00 | 4.00 | 1.25 | 1.05" in (
        gpu_report._cells(ROWS)
    )


def test_report_without_any_benchmark_still_shows_what_failed():
    section = Section("quick", "Correctness", 10, 5)
    rows = [gpu_check.check_row(section, None, "failed", 3.0, None) | {"states": {"failed": 1},
            "title": "Correctness"},
            gpu_check.check_row(section, "nan hunt", "failed", 1.0, "y is not finite")]  # fmt: skip
    text = gpu_report.markdown(rows, "make gpu-check")
    assert "nan hunt" in text and "y is not finite" in text and "Geometric" not in text
