"""What the harness writes: its rows, its tables, the README's sections."""

import importlib.util
import json
from pathlib import Path

import pytest
from lora_kernels.bench.case import OpCase

from lora_kernels.bench import report

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "readme_tables.py"
META = {
    "time": "2026-01-01 00:00 UTC",
    "command": "python -m lora_kernels bench op",
    "versions": {"torch": "2.13.0"},
    "device": "a CPU",
    "threads": 2,
}


def known_rows():
    case = OpCase(m=2, k=3, n=4)

    def samples(total):
        return [{"forward": 0.25 * t, "backward": 0.75 * t, "both": t} for t in total]

    taken = {
        "frozen": samples([1.0, 2.0, 4.0]),
        "peft": samples([2.0, 4.0, 8.0]),
        "ours": samples([1.1, 2.2, 4.4]),
    }
    details = {
        name: {
            "timing": "wall clock",
            "saved_bytes": 1_500_000,
            "saved": [{"name": "x", "bytes": 1_500_000}],
            "memory": {"peak_bytes": 9_000_000, "step_bytes": 2_000, "method": "VmHWM"},
        }
        for name in taken
    }
    floor = {"forward": 0.1, "backward": 0.2, "both": 0.3}
    return report.rows_of("op", case, META, taken, {"triton": "no GPU\nat all"}, details, floor)


def test_rows_hold_medians_quartiles_and_ratios():
    rows = {row["provider"]: row for row in known_rows()}
    assert list(rows) == ["frozen", "peft", "ours", "triton"]
    keys = {
        "schema", "kind", "case", "title", "provider", "skipped", "reps", "seconds",
        "over_frozen", "peft_over", "floor", "timing", "saved_bytes", "saved", "memory", "loss",
        "meta",
    }  # fmt: skip
    assert all(set(row) == keys for row in rows.values())
    ours = rows["ours"]
    assert ours["seconds"]["both"] == {
        "median": 2.2, "q1": pytest.approx(1.65), "q3": pytest.approx(3.3),
        "samples": [1.1, 2.2, 4.4],
    }  # fmt: skip
    assert ours["over_frozen"]["both"]["median"] == pytest.approx(1.1)
    assert ours["peft_over"]["backward"]["median"] == pytest.approx(2 / 1.1)
    assert rows["triton"]["skipped"] and rows["triton"]["seconds"] == {}


def test_rows_come_back_from_the_file(tmp_path):
    path = tmp_path / "new" / "op.jsonl"
    report.write_rows(path, known_rows())
    report.write_rows(path, known_rows())
    assert report.read_rows(path) == json.loads(json.dumps(known_rows()))
    assert [p.name for p in path.parent.iterdir()] == ["op.jsonl"]
    path.write_text(json.dumps({"schema": 99}) + "\n")
    with pytest.raises(ValueError, match=r"schema 1, got \[99\]"):
        report.read_rows(path)


def test_table_shows_every_provider_and_the_floor():
    headers, cells = report.table(known_rows())
    assert all(len(line) == len(headers) for line in cells)
    by_name = {line[0]: dict(zip(headers, line, strict=True)) for line in cells}
    assert list(by_name) == ["frozen", "peft", "ours", "triton", "floor"]
    assert by_name["ours"]["both"] == "2.20 s"
    assert by_name["ours"]["/ frozen"] == "1.10 [1.10-1.10]"
    assert by_name["ours"]["PEFT /"] == "1.82 [1.82-1.82]"
    assert by_name["ours"]["saved"] == "1.50 MB"
    assert by_name["ours"]["peak of step"] == "2.00 kB"
    assert by_name["triton"]["forward"] == "skipped: no GPU"
    assert by_name["floor"]["/ frozen"] == "0.15"


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.0, "2.00 s"), (0.0314, "31.4 ms"), (5e-8, "0.05 µs")]
)
def test_seconds_are_readable(seconds, text):
    assert report.format_seconds(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(12, "12 B"), (1e3, "1.00 kB"), (2.5e11, "250 GB")])
def test_bytes_are_readable(count, text):
    assert report.format_bytes(count) == text


README = """# Title
before
<!-- bench:here/op -->
old numbers
<!-- /bench:here/op -->
after
"""


@pytest.fixture
def readme_tables():
    spec = importlib.util.spec_from_file_location("readme_tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_readme_tables_are_idempotent_and_touch_nothing_else(tmp_path, readme_tables):
    report.write_rows(tmp_path / "here" / "op.jsonl", known_rows())
    readme = tmp_path / "README.md"
    readme.write_text(README)
    options = ["--readme", str(readme), "--results", str(tmp_path)]

    assert readme_tables([*options, "--check"]) == 1
    assert readme.read_text() == README
    assert readme_tables(options) == 0
    once = readme.read_text()
    assert "| ours |" in once and "old numbers" not in once
    assert once.startswith("# Title\nbefore\n<!-- bench:here/op -->\n")
    assert once.endswith("\n<!-- /bench:here/op -->\nafter\n")
    assert readme_tables(options) == 0
    assert readme.read_text() == once
    assert readme_tables([*options, "--check"]) == 0


def test_readme_tables_draw_the_same_plot_twice(tmp_path, readme_tables):
    pytest.importorskip("matplotlib")
    report.write_rows(tmp_path / "here" / "op.jsonl", known_rows())
    readme = tmp_path / "README.md"
    readme.write_text(README)
    drawn = []
    for _ in range(2):
        readme_tables(["--readme", str(readme), "--results", str(tmp_path), "--plots"])
        drawn.append((tmp_path / "here" / "op.svg").read_bytes())
    assert drawn[0] == drawn[1] and b"<svg" in drawn[0]


@pytest.mark.parametrize(
    "text",
    ["<!-- bench:a -->\n", "<!-- bench:a -->\n<!-- /bench:b -->", README + README],
    ids=["not closed", "closed as another", "twice"],
)
def test_markers_that_do_not_match_are_refused(text):
    with pytest.raises(ValueError, match="closing marker"):
        report.fill_markers(text, lambda name: "")


def test_a_marker_without_results_is_an_error(tmp_path, readme_tables):
    readme = tmp_path / "README.md"
    readme.write_text(README)
    with pytest.raises(SystemExit, match="here/op"):
        readme_tables(["--readme", str(readme), "--results", str(tmp_path)])


def test_the_readme_of_this_repository_is_what_its_results_say(readme_tables):
    assert readme_tables(["--check"]) == 0
