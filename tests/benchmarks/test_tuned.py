"""`python -m benchmarks tuned`: choices of tune, held to composed."""

import pytest
import torch

from benchmarks import report, tuned
from benchmarks.__main__ import main
from lora_kernels.measuring import timing
from lora_kernels.runtime import tables

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(tuned.MODELS, "smollm2", ((24, 16), (24, 40)))
    tables.forget()
    yield tmp_path / "tuned.jsonl"
    tables.forget()


def run(out):
    return main(
        ["tuned", "--tokens=3", "--dtypes=fp32", "--dropouts=0,0.1", "--reps=3", f"--out={out}"]
    )


def test_every_cell_is_tuned_and_held_to_composed(tiny):
    code = run(tiny)
    rows = report.read_rows(tiny)
    assert len(rows) == 2 * 2 * 2 and code == (0 if all(row["held"] for row in rows) else 1)
    cells = tables.cells_of("lora_linear", CPU)
    assert len(cells) == len(rows)
    for row in rows:
        case = tuned.LinearCase(**row["case"])
        assert row["taken"] == cells[case.keys[row["direction"]]]["backend"]
        composed, ours = row["seconds"]["composed"], row["seconds"]["ours"]
        assert row["ratio"] == ours["median"] / composed["median"]
        assert row["meta"]["device"]


@pytest.mark.parametrize(("slower", "held"), [(1.0, True), (1.05, True), (1.3, False)])
def test_what_is_slower_than_the_spread_is_found(tiny, capsys, monkeypatch, slower, held):
    composed = [1.0, 1.1, 1.2, 0.9, 1.0]  # quartiles 1.0 and 1.1

    def interleave(runs, reps):
        times = {"composed": composed, "ours": [slower] * len(composed)}
        return {name: [dict.fromkeys(tuned.DIRECTIONS, t) for t in times[name]] for name in runs}

    monkeypatch.setattr(timing, "interleave", interleave)
    monkeypatch.setattr(tuned.tuning, "tune_calls", lambda *_, **__: None)
    assert run(tiny) == (0 if held else 1)
    assert ("NOT HELD" in capsys.readouterr().err) == (not held)
