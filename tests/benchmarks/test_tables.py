"""What benchmarks write: rows, tables, the pages' sections and their plot."""

import json

import pytest

from benchmarks import infer, readme, report
from benchmarks.__main__ import main
from benchmarks.routed import RoutedCase
from benchmarks.step import StepCase
from lora_kernels.measuring.linear_call import LinearCase

META = {
    "time": "2026-01-01 00:00 UTC",
    "command": "python -m benchmarks op",
    "versions": {"torch": "2.13.0"},
    "device": "a CPU",
    "threads": 2,
    "device_type": "cpu",
    "extension": "built, using AVX2",
}


def known_rows():
    case = LinearCase(m=2, k=3, n=4)

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


@pytest.mark.parametrize(
    "meta, told",
    [
        ({"device_type": "cpu"}, "a CPU (AVX2), 2 threads"),
        ({"device_type": "cuda"}, "a CPU, 2 threads"),
        ({"device_type": "cpu", "extension": "not built: no compiler"}, "a CPU, 2 threads"),
    ],
)
def test_the_instructions_in_use_stand_beside_the_cpu(meta, told):
    assert report.machine_of(META | {"device": "a CPU"} | meta) == told


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


# ---- the pages


def step_rows():
    """frozen, naive, PEFT and ours: bf16 without dropout and with it, and fp32, which another
    machine measured."""
    rows = []
    for dtype, dropout, device in (
        ("bf16", 0.0, "a CPU"),
        ("bf16", 0.05, "a CPU"),
        ("fp32", 0.0, "another"),
    ):
        samples = {
            name: [{"forward": 0.4 * t, "backward": 0.6 * t, "step": t} for t in (f, 2 * f, 4 * f)]
            for name, f in (("frozen", 1.0), ("naive", 1.6), ("peft", 2.0), ("ours", 1.25))
        }
        details = {name: {"timing": "wall clock", "saved_bytes": 10**8} for name in samples}
        details["ours"]["saved_bytes"] = 5 * 10**7
        meta = META | {"device": device}
        case = StepCase(dtype=dtype, dropout=dropout)
        rows += report.rows_of("step", case, meta, samples, {}, details)
    return rows


def routed_rows():
    samples = {
        name: [{"layer": t, "part": t - 1} if name != "frozen" else {"layer": t}]
        for name, t in (("frozen", 1.0), ("peft", 4.0), ("naive", 3.0), ("ours", 2.0))
    }
    details = {name: {"timing": "wall clock", "saved_bytes": 0} for name in samples}
    return report.rows_of("routed", RoutedCase(), META, samples, {}, details)


def infer_rows():
    samples = {name: [{"prefill": 2.0, "token": t}] for name, t in (("base", 1.0), ("ours", 1.5))}
    details = infer.compared(samples)
    meta = META | {"load": 0.1}
    return report.rows_of("infer", infer.InferCase(), meta, samples, {}, details)


def count_rows():
    return [
        {"case": case, "provider": provider, "launches": launches, "read": 10**9, "written": 10**9}
        for case in readme.COUNTED.values()
        for provider, launches in (("PEFT", 20 if "bf16 adapters" in case else 30), ("ours", 10))
    ]


@pytest.fixture
def pages(tmp_path):
    """A root with results and pages of its own; the options that name them."""
    results = tmp_path / "results"
    report.write_rows(results / "cpu" / "step.jsonl", step_rows())
    report.write_rows(results / "cpu" / "joint.jsonl", step_rows()[:1])
    report.write_rows(results / "cpu" / "routed.jsonl", routed_rows())
    report.write_rows(results / "cpu" / "infer.jsonl", infer_rows())
    report.write_rows(results / "counted" / "gpu.jsonl", count_rows())
    for page, marks in readme.PAGES.items():
        (tmp_path / page).parent.mkdir(exist_ok=True)
        text = "".join(f"<!-- bench:{m} -->\nold\n<!-- /bench:{m} -->\n" for m in marks)
        (tmp_path / page).write_text(f"# Title\nbefore\n{text}after\n")
    return [f"--root={tmp_path}", f"--results={results}"]


def test_pages_are_filled_once_and_nothing_else_is_touched(pages, tmp_path):
    pytest.importorskip("matplotlib")
    before = (tmp_path / "README.md").read_text()
    assert main(["readme", *pages, "--check"]) == 1
    assert (tmp_path / "README.md").read_text() == before
    assert not (tmp_path / readme.PLOT).exists()
    assert main(["readme", *pages]) == 0
    once = {page: (tmp_path / page).read_text() for page in readme.PAGES}
    for text in once.values():
        assert text.startswith("# Title\nbefore\n<!-- bench:") and text.endswith("-->\nafter\n")
        assert "\nold\n" not in text
    assert main(["readme", *pages, "--check"]) == 0
    assert main(["readme", *pages]) == 0
    assert once == {page: (tmp_path / page).read_text() for page in readme.PAGES}


def test_the_figures_are_the_results(pages, tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["readme", *pages]) == 0
    lines = (tmp_path / "README.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if "results/" in line]
    assert len(rows) == 6
    assert rows[0][1:5] == ["2.00 s", "4.00 s (2.00)", "-", "2.50 s (1.25)"]
    assert rows[2][1:5] == ["100 MB", "100 MB", "-", "50.0 MB"]
    assert rows[3][1:6] == [*rows[0][1:5], "another (AVX2), 2 threads"]
    assert rows[4][1:5] == ["1.00 s", "4.00 s (4.00)", "-", "2.00 s (2.00)"]
    assert rows[5][1:6] == ["-", "30 (2.00)", "20 (2.00)", "10 (2.00)", "counted, not measured"]
    assert rows[0][5] == "a CPU (AVX2), 2 threads"


@pytest.mark.parametrize("page", readme.PAGES)
def test_a_wrong_figure_is_found(page, pages, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["readme", *pages]) == 0
    path = tmp_path / page
    text = path.read_text()
    assert "2.50 s" in text
    path.write_text(text.replace("2.50 s", "2.40 s", 1))
    assert main(["readme", *pages, "--check"]) == 1
    assert capsys.readouterr().out.startswith(f"{page} is not what the results say")


def test_a_plot_of_other_numbers_is_found(pages, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["readme", *pages]) == 0
    path = tmp_path / "results" / "cpu" / "step.jsonl"
    rows = report.read_rows(path)
    rows[3]["saved_bytes"] += 1
    report.write_rows(path, rows)
    assert main(["readme", *pages, "--check"]) == 1
    assert f"{readme.PLOT} is not what the results say" in capsys.readouterr().out
    drawn = (tmp_path / readme.PLOT).read_text()
    assert main(["readme", *pages]) == 0
    assert (tmp_path / readme.PLOT).read_text() != drawn


def test_the_same_results_give_the_same_plot(pages, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = []
    for _ in range(2):
        assert main(["readme", *pages]) == 0
        drawn.append((tmp_path / readme.PLOT).read_bytes())
        (tmp_path / readme.PLOT).unlink()
    assert drawn[0] == drawn[1] and b"<svg" in drawn[0]
    for provider in ("naive", "peft", "ours"):
        assert f'"{provider}": '.encode() in drawn[0].replace(b"&quot;", b'"')
    assert b"bf16: a CPU (AVX2), 2 threads; fp32: another (AVX2), 2 threads" in drawn[0]


@pytest.mark.parametrize(
    ("page", "text", "said"),
    [
        ("README.md", None, "README.md is missing"),
        ("docs/benchmarks.md", None, "docs/benchmarks.md is missing"),
        ("README.md", "# no marks\n", "README.md has no <!-- bench:figures -->"),
        ("docs/benchmarks.md", "", "docs/benchmarks.md has no <!-- bench:cpu/routed -->"),
    ],
)
def test_what_is_missing_is_named(page, text, said, pages, tmp_path, capsys):
    if text is None:
        (tmp_path / page).unlink()
    else:
        (tmp_path / page).write_text(text)
    assert main(["readme", *pages, "--check"]) == 1
    assert said in capsys.readouterr().out


README = """# Title
<!-- bench:here/op -->
old numbers
<!-- /bench:here/op -->
"""


@pytest.mark.parametrize(
    "text",
    ["<!-- bench:a -->\n", "<!-- bench:a -->\n<!-- /bench:b -->", README + README],
    ids=["not closed", "closed as another", "twice"],
)
def test_markers_that_do_not_match_are_refused(text):
    with pytest.raises(ValueError, match="closing marker"):
        report.fill_markers(text, lambda name: "")


def test_a_mark_without_results_is_an_error(pages, tmp_path):
    (tmp_path / "README.md").write_text(README)
    with pytest.raises(SystemExit, match="wants bench:here/op"):
        main(["readme", *pages])


def test_the_pages_of_this_repository_are_what_its_results_say():
    assert main(["readme", "--check"]) == 0
